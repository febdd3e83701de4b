"""Which balancer is best when? A simulation of many clients and some servers that are not all alike.

32 client processes, each with a balancer of its own that sees its own calls only, call 20 servers. Nothing waits and no
socket is opened: time jumps from one event to the next, so half a minute of a fleet takes a second. Every balancer gets
the same calls, of the same size, at the same moments; the same seed gives the same figures.

    python examples/simulate.py
    python examples/simulate.py --seconds 60 --svg chart.svg 'PeakEwma()' 'LeastRequest()'

There are no retries and no breakers here, so the table shows what the balancer does on its own.
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import log
from pathlib import Path
from random import Random
from typing import Any

from meshlib import LeastRequest, PeakEwma, RoundRobin
from meshlib.testing import BalancerHarness

BALANCERS = [PeakEwma(), PeakEwma(choices=2), LeastRequest(), RoundRobin()]

WORKERS = 32  # 4 hosts with 8 processes each: what one of them knows of the others' calls is nothing
SERVERS = 20
SLOTS = 4  # calls that a server works on at once; more wait in its queue
MEAN = 0.020  # seconds of work in a usual call; the sizes are exponential, so some calls are five times as long
RATE = 2400.0  # calls per second from all workers together: 60 % of what all servers can do
FAILING = 0.001  # seconds in which a broken server says so


class World:
    """A clock, and what is still to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = count()  # what is due at the same moment happens in the order in which it was planned

    def after(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        heappush(self._due, (self.now + seconds, next(self._serial), act, args))

    def run(self) -> None:
        while self._due:
            self.now, _, act, args = heappop(self._due)
            act(*args)


def usual_pace(now: float) -> float:
    return 1.0


class Server:
    """Works on some calls at once, and keeps the others waiting in their order.

    Args:
        mean: seconds that a call of size 1 takes.
        pace: how fast it is at a moment, 1.0 being usual; 0 means that it is broken and answers at once with an error.
        slots: calls that it works on at once.
    """

    def __init__(self, mean: float = MEAN, pace: Callable[[float], float] = usual_pace, slots: int = SLOTS) -> None:
        self.mean, self.pace, self.slots = mean, pace, slots
        self.busy = self.served = 0
        self.queue: deque[tuple[World, float, Callable[[bool], None]]] = deque()

    def take(self, world: World, size: float, answer: Callable[[bool], None]) -> None:
        """Begin with a call or let it wait; `answer(failed)` is called in the end."""
        if self.busy == self.slots:
            self.queue.append((world, size, answer))
            return
        self.busy += 1
        pace = self.pace(world.now)
        world.after(size * self.mean / pace if pace else FAILING, self._done, answer, not pace)

    def _done(self, answer: Callable[[bool], None], failed: bool) -> None:
        self.busy -= 1
        self.served += 1
        answer(failed)
        if self.queue and self.busy < self.slots:
            self.take(*self.queue.popleft())


class Worker:
    """A client process: it picks by what it has seen itself."""

    def __init__(self, world: World, balancer: Any, servers: Sequence[Server], rng: Random) -> None:
        addresses = [f"10.0.0.{number + 1}:80" for number in range(len(servers))]
        self._world = world
        self._harness = BalancerHarness(balancer, addresses, rng)
        self._servers = {node.endpoint.place: server for node, server in zip(self._harness.nodes, servers, strict=True)}

    def call(self, size: float, then: Callable[[float, bool], None]) -> None:
        """Make a call; `then(seconds, failed)` is called with its answer."""
        endpoint, started = self._harness.pick(self._world.now), self._world.now

        def answered(failed: bool) -> None:
            now = self._world.now
            self._harness.done(endpoint, now, now - started, failed)
            then(now - started, failed)

        self._servers[endpoint.place].take(self._world, size, answered)


# Scenarios: what the servers are like. A function gets the time that is simulated, and returns them.


def all_even(seconds: float) -> list[Server]:
    return [Server() for _ in range(SERVERS)]


def one_slow(seconds: float) -> list[Server]:
    return [Server(5 * MEAN), *all_even(seconds)[1:]]


def one_failing(seconds: float) -> list[Server]:
    return [Server(pace=lambda now: 0.0), *all_even(seconds)[1:]]


def brown_out(seconds: float) -> list[Server]:
    """One server becomes ten times slower half-way, and recovers after a quarter of the time."""
    return [Server(pace=lambda now: 0.1 if 0.5 <= now / seconds < 0.75 else 1.0), *all_even(seconds)[1:]]


def two_speeds(seconds: float) -> list[Server]:
    """Old machines and new ones."""
    return [Server(MEAN * (1.4 if number % 2 else 0.6)) for number in range(SERVERS)]


def antagonists(seconds: float) -> list[Server]:
    """Somebody else's jobs on the same machines: each server runs at 40 % of its pace for 5 s, 30 % of the time."""
    return [Server(pace=partial(_disturbed, number)) for number in range(SERVERS)]


def _disturbed(number: int, now: float) -> float:
    # Spread over servers and moments as by chance, and yet the same for every balancer and seed.
    return 0.4 if (number * 7919 + int(now / 5) * 104729) * 2654435761 % 2**32 < 0.3 * 2**32 else 1.0


SCENARIOS = {
    "all even": all_even,
    "one 5x slower": one_slow,
    "one fails fast": one_failing,
    "brown-out": brown_out,
    "two speeds": two_speeds,
    "antagonists": antagonists,
}


@dataclass(frozen=True)
class Figures:
    """What came of a run: the first fifth, in which the balancers learn, is not in it."""

    latencies: Sequence[float]
    """In seconds, sorted; those of failed calls are in it."""
    failed: int
    served: Sequence[int]
    """Calls of each server."""

    def quantile(self, share: float) -> float:
        """In milliseconds."""
        return 1000 * self.latencies[min(len(self.latencies) - 1, int(share * len(self.latencies)))]

    @property
    def errors(self) -> float:
        return self.failed / len(self.latencies)

    @property
    def spread(self) -> tuple[float, float]:
        """The calls of the server with the fewest and of that with the most, over the mean."""
        mean = sum(self.served) / len(self.served)
        return min(self.served) / mean, max(self.served) / mean


def simulate(
    balancer: Any, servers: Sequence[Server], *, seconds: float, seed: int, workers: int = WORKERS, rate: float = RATE
) -> Figures:
    """Let all workers call all servers for a while."""
    world, calls = World(), Random(f"calls {seed}")
    fleet = [Worker(world, balancer, servers, Random(f"worker {number} {seed}")) for number in range(workers)]
    latencies: list[float] = []
    failures: list[float] = []

    def ended(started: float, took: float, failed: bool) -> None:
        if started >= seconds / 5:
            latencies.append(took)
            if failed:
                failures.append(started)

    def arrive() -> None:
        fleet[int(calls.random() * workers)].call(calls.expovariate(1.0), partial(ended, world.now))
        if world.now < seconds:
            world.after(calls.expovariate(rate), arrive)

    world.after(0.0, arrive)
    world.run()
    return Figures(sorted(latencies), len(failures), [server.served for server in servers])


def name_of(balancer: Any) -> str:
    """As it is written: only what differs from the defaults."""
    default, kind = type(balancer)(), type(balancer)
    given = {name: getattr(balancer, name) for name in getattr(kind, "__dataclass_fields__", {})}
    return f"{kind.__name__}({', '.join(f'{n}={v}' for n, v in given.items() if v != getattr(default, n))})"


COLUMNS = ["scenario", "balancer", "p50 ms", "p99 ms", "p99.9 ms", "errors", "fewest..most calls"]


def row(scenario: str, balancer: str, figures: Figures) -> list[str]:
    quantiles = [f"{figures.quantile(share):.0f}" for share in (0.5, 0.99, 0.999)]
    fewest, most = figures.spread
    return [scenario, balancer, *quantiles, f"{figures.errors:.3%}", f"{fewest:.2f}..{most:.2f}"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as Markdown; numbers stand to the right."""
    columns = []
    for number, cells in enumerate(zip(COLUMNS, *rows, strict=True)):
        width = max(map(len, cells))
        head, *rest = (cell.ljust(width) if number < 2 else cell.rjust(width) for cell in cells)
        columns.append([head, "-" * width if number < 2 else "-" * (width - 1) + ":", *rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


# The chart, written by hand: a group of bars per scenario, with the p99 to scale.

COLOURS = ["#1b6ca8", "#6fb1dc", "#e08e45", "#8a8a8a", "#5a9e6f", "#a05a9e"]
LEFT, WIDTH, BAR, GAP = 120, 560, 13, 14
AXIS = [10, 30, 100, 300, 1000, 3000, 10000, 30000]


def svg(p99: dict[str, dict[str, float]]) -> str:
    """A chart of milliseconds, on a logarithmic scale: by scenario, then by balancer."""
    names = list(next(iter(p99.values())))
    colours = dict(zip(names, COLOURS * len(names), strict=False))
    highest = max(value for group in p99.values() for value in group.values())
    scale = partial(_scale, max(1.5 * highest, 100))
    top, parts = 30, [_text(LEFT, 18, "p99 of a call in ms, logarithmic; shorter is better", "bold")]
    for scenario, group in p99.items():
        parts.append(_text(LEFT - 8, top + BAR * len(group) / 2 + 4, scenario, anchor="end"))
        for name, value in group.items():
            parts.append(
                f'<rect x="{LEFT}" y="{top}" width="{scale(value):.0f}" height="{BAR - 2}" fill="{colours[name]}"/>'
            )
            parts.append(_text(LEFT + scale(value) + 4, top + BAR - 3, f"{value:.0f}"))
            top += BAR
        top += GAP
    axis = [_mark(LEFT + scale(mark), top, mark) for mark in AXIS if scale(mark) < WIDTH]
    for position, name in enumerate(names):
        left = 10 + position * (LEFT + WIDTH) / len(names)
        parts.append(f'<rect x="{left:.0f}" y="{top + 26}" width="10" height="10" fill="{colours[name]}"/>')
        parts.append(_text(left + 15, top + 35, name))
    size = f'width="{LEFT + WIDTH + 40}" height="{top + 48}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *axis, *parts, "</svg>", ""])


def _scale(highest: float, value: float) -> float:
    """How long a bar is: nothing at the first mark of the axis, `WIDTH` at `highest`."""
    return WIDTH * max(0.0, log(value / AXIS[0])) / log(highest / AXIS[0])


def _text(x: float, y: float, text: str, weight: str = "normal", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-weight="{weight}" text-anchor="{anchor}" fill="#222222">{text}</text>'


def _mark(x: float, bottom: float, value: float) -> str:
    line = f'<line x1="{x:.0f}" y1="26" x2="{x:.0f}" y2="{bottom:.0f}" stroke="#dddddd"/>'
    return line + _text(x, bottom + 12, f"{value:.0f}", anchor="middle")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    known = [name_of(balancer) for balancer in BALANCERS]
    parser = argparse.ArgumentParser(description="Compare balancers in a simulated fleet.")
    parser.add_argument("balancers", nargs="*", metavar="BALANCER", help=f"of {', '.join(known)}; default all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="simulated per run (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="simulate one second only: to see whether it works")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a chart of the p99")
    given = parser.parse_args(argv)
    if unknown := set(given.balancers) - set(known):
        parser.error(f"no balancer {', '.join(sorted(unknown))} here; there are {', '.join(known)}")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    seconds = 1.0 if given.quick else given.seconds
    chosen = [each for each in BALANCERS if not given.balancers or name_of(each) in given.balancers]
    rows: list[list[str]] = []
    p99: dict[str, dict[str, float]] = {}
    for scenario, servers in SCENARIOS.items():
        for balancer in chosen:
            figures = simulate(balancer, servers(seconds), seconds=seconds, seed=given.seed)
            rows.append(row(scenario, name_of(balancer), figures))
            p99.setdefault(scenario, {})[name_of(balancer)] = figures.quantile(0.99)
    print(table(rows))
    if given.svg:
        given.svg.write_text(svg(p99), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
