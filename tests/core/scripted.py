"""What the tests of the core share: a service on paper, and a loop that turns a call by a script, without a socket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import settings

from meshlib import Endpoint, Service
from meshlib.core.call import Call
from meshlib.core.cluster import Cluster
from meshlib.core.ending import Ending
from meshlib.core.node import Node
from meshlib.core.outcome import End
from meshlib.core.report import Attempt
from meshlib.testing import ManualClock

PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=150)
"""The same examples in every run: a test that fails on Tuesdays only helps nobody."""


class Draws:
    """Chance that is none: every draw is `share`.

    With 0.5 a breaker stays open for exactly `open_for`; with 0 nodes are drawn in their order.
    """

    def __init__(self, share: float = 0.5) -> None:
        self.share = share
        self.drawn = 0

    def random(self) -> float:
        self.drawn += 1
        return self.share


@dataclass(frozen=True)
class InOrder:
    """A balancer that offers the nodes in the order of the settings, so that a test knows where a call goes."""

    def prepare(self, nodes: Sequence[Node], rng: Any) -> Callable[[float, str | None], Iterator[Node]]:
        return lambda now, key: iter(nodes)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the world does with one attempt; `seen` is what the user's strategies see of its end."""

    status: int | None = None
    retry_after: float | None = None
    end: End | None = None
    error: str | None = None
    sent: bool = True
    resendable: bool = True
    overloaded: bool = False
    lasts: float = 0.01
    seen: Any = None


def answer(status: int, **more: Any) -> Step:
    return Step(status=status, **more)


def broke(end: End, *, sent: bool = True, **more: Any) -> Step:
    return Step(end=end, sent=sent, **more)


OK = answer(200)
UNAVAILABLE = answer(503)
REFUSED = broke(End.lost, sent=False, error="ConnectError: refused")
LOST = broke(End.lost, error="ReadError: reset")
STALE = broke(End.stale, error="ReadError: reset")


@dataclass
class Played:
    """What became of a call that was played."""

    call: Call
    attempts: list[Attempt]
    waits: list[float]
    places: list[int]
    """The last number of each attempt's address: 1 for 10.0.0.1."""

    @property
    def kinds(self) -> list[str]:
        return [attempt.kind for attempt in self.attempts]

    @property
    def outcomes(self) -> list[str]:
        return [str(attempt.outcome) for attempt in self.attempts]


class Stage:
    """A service with `count` endpoints, 10.0.0.1 and so on, its clock, and its calls played by a script."""

    def __init__(self, count: int = 3, *, rng: Any = None, zone: str = "", **service: Any) -> None:
        self.clock = ManualClock()
        self.rng = Draws() if rng is None else rng
        endpoints = [f"10.0.0.{position + 1}:80" for position in range(count)]
        self.cluster = Cluster(Service("orders", endpoints, **{"balancer": InOrder(), **service}), self.rng, zone)
        self.publish(*endpoints)

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.cluster.view.nodes

    @property
    def in_flight(self) -> int:
        return sum(node.in_flight for node in self.nodes)

    @property
    def tokens(self) -> float:
        return self.cluster.bucket.tokens

    def publish(self, *endpoints: str | Endpoint) -> None:
        read = [each if isinstance(each, Endpoint) else Endpoint.parse(each) for each in endpoints]
        self.cluster.publish(read, "paper", self.clock())

    def eject(self, *positions: int) -> None:
        """Open the breakers of these nodes; the first is 1."""
        for node in (self.nodes[position - 1] for position in positions):
            for _ in range(self.cluster.service.breaker.consecutive):
                self.cluster.record(node, node.breaker.generation, False, self.clock())
            assert node.breaker.state == "open"

    def call(self, *, repeatable: bool = True, total: float = 30.0, **more: Any) -> Call:
        return Call(self.cluster, repeatable=repeatable, deadline=self.clock() + total, **more)

    def settle(self, call: Call, attempt: Attempt, step: Step) -> float | None:
        """Let an attempt take its time and end as the step says."""
        now = self.clock.advance(step.lasts)
        ending = Ending(
            status=step.status,
            retry_after=step.retry_after,
            end=step.end,
            error=step.error,
            sent=step.sent,
            resendable=step.resendable,
            overloaded=step.overloaded,
            evidence=lambda: step.seen,
        )
        return call.settle(attempt, now, ending)

    def play(self, script: Iterable[Step], **how: Any) -> Played:
        """Turn a whole call as a driver does: begin, settle, wait, release. Every step must be used, and no more."""
        call, steps, waits = self.call(**how), iter(script), []
        held: Attempt | None = None
        while (attempt := call.begin(self.clock())) is not None:
            if held is not None:
                call.release(held, self.clock())
            step = next(steps, None)
            assert step is not None, f"one attempt more than the script has: {attempt}"
            wait = self.settle(call, attempt, step)
            held = attempt if step.end is None else None
            if wait is None:
                break
            waits.append(wait)
            self.clock.advance(wait)
        if held is not None:
            call.release(held, self.clock())
        assert all(attempt.is_over for attempt in call.report.attempts)
        if isinstance(script, list):
            left = list(steps)
            assert not left, f"the call ended after {len(script) - len(left)} of {len(script)} steps: {call.report}"
        attempts = call.report.attempts
        return Played(call, attempts, waits, [int(each.endpoint.host.rpartition(".")[2]) for each in attempts])
