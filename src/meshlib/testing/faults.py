"""Faults below a mesh: a share of the attempts of a service fails, hangs or is slow; all else is as in production.

Decides what becomes of an attempt once its endpoint is chosen: nothing, or it is played instead of made. So breakers,
retries, budgets, hedges and telemetry see what they would see of endpoints like that. Nothing of it is there outside of
the block: for its time it stands in the place where clients get their connections.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from meshlib.endpoint import Endpoint, Place, place_of
from meshlib.testing.clock import ManualClock
from meshlib.validation import ConfigError, Fault, number, optional

if TYPE_CHECKING:
    from meshlib.core.report import Attempt
    from meshlib.mesh import Mesh

Kind = Literal["fail", "hang", "refuse"]

SHOWN = 5
"""Endpoints that an error names."""


class Play(NamedTuple):
    """What becomes of an attempt: it is late, and if there is a kind, that is its end."""

    latency: float
    kind: Kind | None
    status: int | None


class Faults:
    """What `faults` yields.

    Attributes:
        attempts: how many were made where the faults are.
        hit: how many of them failed, hung or were refused by it.
    """

    def __init__(
        self, shares: dict[Kind, float], status: int | None, latency: float, place: Place | None, rng: random.Random
    ) -> None:
        self.attempts = self.hit = 0
        self._shares = shares
        self._status = status
        self._latency = latency
        self._place = place
        self._rng = rng
        self._lock = threading.Lock()

    def play(self, place: Place) -> Play | None:
        """Draw for one attempt; None if it is not about this endpoint."""
        if self._place is not None and place != self._place:
            return None
        with self._lock:
            self.attempts += 1
            drawn = self._rng.random()
            for kind, share in self._shares.items():
                if drawn < share:
                    self.hit += 1
                    return Play(self._latency, kind, self._status)
                drawn -= share
        return Play(self._latency, None, None)


@contextlib.contextmanager
def faults(
    mesh: Mesh,
    service: str,
    *,
    fail: float | None = None,
    status: int | None = None,
    hang: float | None = None,
    refuse: float | None = None,
    latency: float | None = None,
    endpoint: Endpoint | Place | str | None = None,
    rng: random.Random | None = None,
) -> Iterator[Faults]:
    """Have attempts go wrong inside the block, of whichever client, sync or async, old or new.

    What is to fail reaches no server, so there need not be one. Of several blocks around a call all count. Health
    checks are not touched. On a mesh with a `ManualClock` the time that passes is the clock's.

    Of `fail`, `hang`, `refuse` and `latency` at least one is given; it may be 0.

    Args:
        mesh, service: whose attempts.
        fail: the share that is sent and then lost; with `status`, that is answered so.
        status: see `fail`. Default none.
        hang: the share that is sent and never answered.
        refuse: the share whose connection is refused; nothing is sent.
        latency: seconds more until the answer; of every attempt.
        endpoint: where, as an `Endpoint`, `(host, port)` or `"host:port"`. Default everywhere.
        rng: draws who is hit. Default one that draws the same in every run.

    Raises:
        UnknownService: if the service is not declared.
        ConfigError: if no fault is given, a share is not one, or they are more than 1 together.
        ValueError: if the service has no such endpoint.
    """
    cluster = mesh._cluster(service)
    given: dict[Kind, float | None] = {"fail": fail, "hang": hang, "refuse": refuse}
    shares: dict[Kind, float] = {kind: share for kind, share in given.items() if share is not None}
    _check(shares, status, latency)
    place = None if endpoint is None else place_of(endpoint)
    if place is not None and cluster.is_known and not cluster.has(place):
        known = ", ".join(node.endpoint for node in mesh.snapshot()[service].nodes[:SHOWN])
        raise ValueError(f"{service} has no endpoint {endpoint} (known: {known or 'none'})")
    played = Faults(shares, status, latency or 0.0, place, rng or random.Random(1))
    with _stage.plays(cluster, played):
        yield played


def _check(shares: dict[Kind, float], status: Any, latency: Any) -> None:
    if not shares and status is None and latency is None:
        nothing = (
            "nothing is to go wrong: give fail=, hang= or refuse=, shares of the attempts, or latency=, in seconds"
        )
        raise ConfigError([Fault("faults", f"{nothing}, for example faults(mesh, 'orders', fail=0.3)")])
    found = [
        Fault(f"faults.{name}", f"{wrong} (a share of the attempts: 1 is all of them), got {value!r}")
        for name, value in shares.items()
        if (wrong := number(at_least=0, at_most=1)(value))
    ]
    if not found and sum(shares.values()) > 1 + 1e-9:
        found.append(Fault("faults", f"fail, hang and refuse must be 1 at most together, got {sum(shares.values()):g}"))
    if status is not None and not (isinstance(status, int) and 200 <= status <= 599):
        found.append(Fault("faults.status", f"must be from 200 to 599, got {status!r}"))
    if status is not None and not shares.get("fail"):
        found.append(Fault("faults.status", "says how attempts fail: give fail=, the share of those that do"))
    if wrong := optional(number(at_least=0))(latency):
        found.append(Fault("faults.latency", f"{wrong} (seconds), got {latency!r}"))
    if found:
        raise ConfigError(found)


class Stage:
    """Stands between clients and their connections, while anything is played."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._played: tuple[tuple[object, Faults], ...] = ()
        self._replaced: list[tuple[type, Any]] = []

    @contextlib.contextmanager
    def plays(self, cluster: object, played: Faults) -> Iterator[None]:
        """Play these, to a service."""
        with self._lock:
            if not self._played:
                self._set_up()
            self._played = (*self._played, (cluster, played))
        try:
            yield
        finally:
            with self._lock:
                self._played = tuple(each for each in self._played if each[1] is not played)
                if not self._played:
                    self._take_down()

    def play(self, exchange: Any, attempt: Attempt) -> Play | None:
        """What becomes of an attempt; None if nothing does."""
        place, latency, ends = attempt.endpoint.place, 0.0, None
        for cluster, played in self._played:
            if cluster is exchange.cluster and (found := played.play(place)) is not None:
                latency += found.latency
                ends = ends or (found if found.kind else None)
        if ends is not None:
            return Play(latency, ends.kind, ends.status)
        return Play(latency, None, None) if latency else None

    def _set_up(self) -> None:
        from meshlib.testing.stand_in import taking, taking_async
        from meshlib.transport.connections import AsyncStacks, SyncStacks
        from meshlib.transport.inner import AsyncInnerStacks, InnerStacks

        ways: list[tuple[type, Callable[..., Any]]] = [
            (SyncStacks, taking),
            (InnerStacks, taking),
            (AsyncStacks, taking_async),
            (AsyncInnerStacks, taking_async),
        ]
        for stacks, way in ways:
            real = vars(stacks)["take"]
            self._replaced.append((stacks, real))
            stacks.take = way(real, self.play)  # type: ignore[attr-defined]

    def _take_down(self) -> None:
        while self._replaced:
            stacks, real = self._replaced.pop()
            stacks.take = real  # type: ignore[attr-defined]


_stage = Stage()


def passes(clock: Callable[[], float], until: float) -> bool:
    """Let the time pass that is turned by hand; False if it passes by itself."""
    if not isinstance(clock, ManualClock):
        return False
    if math.isfinite(until):
        clock.advance(max(0.0, until - clock()))
    return True
