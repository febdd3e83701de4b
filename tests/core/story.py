"""Whole stories of faults on a virtual clock: processes that call, servers that break, and the real core between them.

Decides when things happen: connections, queues, answers, timers and the faults of the script. What is called, what
counts and what follows is the core's own doing, turned as a driver turns it. Nothing waits and no socket is opened, so
a minute takes a fraction of a second, and the same seed makes the same log to the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from math import ceil
from random import Random
from typing import Any, NamedTuple

from meshlib import Endpoint, Service
from meshlib.core.call import Call
from meshlib.core.cluster import Cluster
from meshlib.core.ending import Ending
from meshlib.core.outcome import End
from meshlib.core.report import Attempt

START = 1000.0
"""When a story begins on its clock: "a minute ago" is not before the beginning of time."""

TRIP = 0.0002
"""Seconds from a process to a server and back."""


class World:
    """A clock, and what is still to happen; what is due at one moment happens in the order in which it was planned.

    Args:
        grain: seconds between two ticks of the clock; what happens between them happens at the next one. 0: none.
    """

    def __init__(self, grain: float = 0.0) -> None:
        self.now = START
        self._grain = grain
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = count()

    def at(self, when: float, act: Callable[..., None], *args: Any) -> None:
        heappush(self._due, (when, next(self._serial), act, args))

    def after(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        self.at(self.now + seconds, act, *args)

    def run(self) -> None:
        while self._due:
            when, _, act, args = heappop(self._due)
            if self._grain:
                when = ceil(when / self._grain) * self._grain
            self.now = max(self.now, when)  # a leap leaves what was due behind: it happens late
            act(*args)

    def leap(self, seconds: float) -> None:
        """The clock is ahead at once: what was due meanwhile is late."""
        self.now += seconds


class Server:
    """Works on `slots` calls at once, and keeps the others waiting in their order.

    Attributes:
        pace: how fast it is, 1.0 being usual.
        failing: the share of its calls that fails.
        failure: how: a status, or `End.lost`.
        retry_after: what its failures ask for.
        is_up: whether it listens.
        is_hanging: whether it takes calls and answers none, as a stopped process does.
        reached: when each call came.
    """

    def __init__(self, world: World, rng: Random, mean: float, slots: int) -> None:
        self.world, self._rng, self._mean, self._slots = world, rng, mean, slots
        self.pace, self.failing = 1.0, 0.0
        self.failure: int | End = 503
        self.retry_after: float | None = None
        self.is_up, self.is_hanging = True, False
        self.life, self.died_at = 0, 0.0
        self.reached: list[float] = []
        self._working: dict[Flight, None] = {}
        self._waiting: deque[Flight] = deque()
        self._held: list[Flight] = []

    def take(self, flight: Flight) -> None:
        """A call comes in."""
        self.reached.append(self.world.now)
        if len(self._working) >= self._slots:
            self._waiting.append(flight)
            return
        self._working[flight] = None
        fails = self.failing > 0 and self._rng.random() < self.failing
        seconds = TRIP if fails else self._rng.uniform(0.5, 1.5) * self._mean / self.pace
        self.world.after(seconds, self._done, flight, self.failure if fails else 200, self.life)

    def die(self) -> None:
        """Nobody listens any more, and every call is lost."""
        self.is_up, self.life, self.died_at = False, self.life + 1, self.world.now
        for flight in (*self._working, *self._waiting):
            self.world.after(TRIP, flight.lost)
        self._working.clear()
        self._waiting.clear()
        self._held.clear()

    def rise(self) -> None:
        """A new process listens."""
        self.is_up = True

    def hang(self) -> None:
        self.is_hanging = True

    def resume(self) -> None:
        self.is_hanging = False
        held, self._held = self._held, []
        for flight in held:
            self._done(flight, 200, self.life)

    def _done(self, flight: Flight, result: int | End, life: int) -> None:
        if life != self.life:
            return
        if self.is_hanging:
            self._held.append(flight)
            return
        del self._working[flight]
        if isinstance(result, End):
            flight.is_reused = False  # part of the answer had come
            flight.lost()
        else:
            flight.answered(result, None if result == 200 else self.retry_after)
        if self._waiting:
            next_one = self._waiting.popleft()
            self.reached.pop()  # it came when it came
            self.take(next_one)


class Ended(NamedTuple):
    """What became of a call."""

    started: float
    ended: float
    process: int
    status: int | None
    attempts: int
    sent: int
    """Attempts that reached a server."""

    @property
    def failed(self) -> bool:
        return self.status != 200


class Flight:
    """An attempt on its way, with the call it belongs to."""

    __slots__ = ("attempt", "call", "is_over", "is_reused", "process", "server", "started", "then")

    def __init__(self, process: Process, call: Call, started: float, then: Callable[[], None]) -> None:
        self.process, self.call, self.started, self.then = process, call, started, then
        self.begin()

    def begin(self) -> None:
        """The driver's loop: the next attempt, if there is one."""
        process, call, world = self.process, self.call, self.process.world
        attempt = call.begin(world.now)
        if attempt is None:
            self._over(None)
            return
        self.attempt, self.is_over = attempt, False
        self.server = process.servers[attempt.endpoint.port - 1]
        process.sees(attempt)
        world.at(attempt.deadline, self._time_out, attempt)
        self._connect()

    def _connect(self) -> None:
        """As the transport does: a kept connection is taken unless its end is known, which it is after a trip."""
        idle, server, world = self.process.idle[self.attempt.endpoint.port - 1], self.server, self.process.world
        while idle and idle[-1] != server.life and world.now > server.died_at + TRIP:
            idle.pop()
        self.is_reused = bool(idle)
        if idle and idle.pop() != server.life:
            world.after(TRIP, self.lost)
        elif self.is_reused or server.is_up:
            server.take(self)
        else:
            world.after(TRIP, self._refused)

    def _refused(self) -> None:
        self._settle(end=End.lost, sent=False)

    def answered(self, status: int, retry_after: float | None) -> None:
        if not self.is_over:
            if (late := self.process.frozen_until) > self.process.world.now:
                self.process.world.at(late + TRIP, self.answered, status, retry_after)  # timers come first: the worst
                return
            if self.process.story.keeps:
                self.process.idle[self.attempt.endpoint.port - 1].append(self.server.life)
            self._settle(status=status, retry_after=retry_after, whole=True)

    def lost(self) -> None:
        if not self.is_over:
            if (late := self.process.frozen_until) > self.process.world.now:
                self.process.world.at(late + TRIP, self.lost)
                return
            self._settle(end=End.stale if self.is_reused else End.lost)

    def _time_out(self, attempt: Attempt) -> None:
        if attempt is self.attempt and not self.is_over:
            if (late := self.process.frozen_until) > self.process.world.now:
                self.process.world.at(late, self._time_out, attempt)
                return
            self._settle(end=End.timeout)

    def _settle(self, **result: Any) -> None:
        self.is_over = True
        process, attempt, world = self.process, self.attempt, self.process.world
        wait = self.call.settle(attempt, world.now, Ending(**result))
        process.noted(attempt)
        if wait is None:
            self._over(attempt.status)
        else:
            again = Flight.__new__(Flight)  # answers to this attempt may still come, and must not meet the next one
            again.process, again.call, again.started, again.then = process, self.call, self.started, self.then
            world.after(wait, again.begin)

    def _over(self, status: int | None) -> None:
        process, attempts = self.process, self.call.report.attempts
        sent = sum(attempt.outcome != "not_sent" for attempt in attempts)
        now = process.world.now
        process.story.calls.append(Ended(self.started, now, process.number, status, len(attempts), sent))
        self.then()


class Process:
    """A process that calls: a cluster of its own, and its idle connections."""

    def __init__(self, story: Story, number: int, endpoints: Sequence[Endpoint], rng: Random, **service: Any) -> None:
        self.story, self.world, self.servers, self.number = story, story.world, story.servers, number
        self.cluster = Cluster(Service("orders", [str(each) for each in endpoints], **service), rng)
        self.cluster.publish(endpoints, "paper", self.world.now)
        self.idle: list[list[int]] = [[] for _ in endpoints]
        self.frozen_until = 0.0
        self.most_probes = 0
        self._probing: list[list[Attempt]] = [[] for _ in endpoints]

    def call(self, then: Callable[[], None] = lambda: None, **how: Any) -> None:
        """Make a call; `then` is called at its end."""
        now = self.world.now
        if self.frozen_until > now:
            self.world.at(self.frozen_until + 2 * TRIP, lambda: self.call(then, **how))
            return
        total = how.pop("total", 30.0)
        Flight(self, Call(self.cluster, **{"repeatable": True, "deadline": now + total, **how}), now, then)

    def freeze(self, seconds: float) -> None:
        """It does nothing for so long: its loop is blocked, or it is suspended."""
        self.frozen_until = self.world.now + seconds

    def sees(self, attempt: Attempt) -> None:
        """Count the probes under way."""
        if attempt.why == "probe":
            probing = self._probing[attempt.endpoint.port - 1]
            probing[:] = [each for each in probing if each.outcome is None]
            probing.append(attempt)
            self.most_probes = max(self.most_probes, len(probing))

    def noted(self, attempt: Attempt) -> None:
        """Write down how an attempt ended."""
        breaker, place, cluster = attempt.node.breaker, attempt.endpoint.port, self.cluster
        was = (attempt.kind, attempt.why, str(attempt.outcome), attempt.status, attempt.started, attempt.waited)
        is_now = (breaker.state, breaker.generation, breaker.ejections, cluster.bucket.tokens, cluster.view.panic)
        self.story.log.append((self.world.now, self.number, place, *was, *is_now))


class Story:
    """Some servers, some processes, and what happens to them.

    Args:
        count: of servers; their endpoints are 10.0.0.1:1, 10.0.0.1:2 and so on.
        processes: how many call them.
        seed: the only source of chance.
        mean: seconds of work in a call.
        slots: calls that a server works on at once.
        priorities: of the servers.
        keeps: whether connections are used again; a call that is lost on one that was is repeated for free (rule C8).
        grain: see `World`.
        service: the settings of the service.

    Attributes:
        calls: every call that has ended.
        log: every attempt that has ended, with what it has come to in the core.
    """

    def __init__(
        self,
        count: int = 3,
        *,
        processes: int = 1,
        seed: int = 1,
        mean: float = 0.01,
        slots: int = 100,
        priorities: Sequence[int] = (),
        keeps: bool = True,
        grain: float = 0.0,
        **service: Any,
    ) -> None:
        self.keeps = keeps
        self.world, self._seed = World(grain), seed
        self.servers = [Server(self.world, Random(f"server {n} {seed}"), mean, slots) for n in range(count)]
        priorities = priorities or [0] * count
        endpoints = [Endpoint("10.0.0.1", n + 1, priority=each) for n, each in enumerate(priorities)]
        rngs = [Random(f"process {n} {seed}") for n in range(processes)]
        self.processes = [Process(self, n, endpoints, rng, **service) for n, rng in enumerate(rngs)]
        self.calls: list[Ended] = []
        self.log: list[tuple[Any, ...]] = []
        self._ends_at = START

    def at(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        """Plan something, in seconds from the beginning."""
        self.world.at(START + seconds, act, *args)

    def set(self, seconds: float, *servers: int, **what: Any) -> None:
        """Plan that these servers (the first is 0) become like that."""
        for number in servers:
            for name, value in what.items():
                self.at(seconds, setattr, self.servers[number], name, value)

    def load(self, rate: float, seconds: float, *, callers: int = 16, keys: int = 0, **how: Any) -> Story:
        """Let `callers` in turn call `rate` times a second together, in all processes, and tell the story to its end.

        A caller waits for its answer; one that has waited too long makes its next call at once, but only that one.
        """
        self._ends_at = START + seconds
        for number in range(callers):
            rng = Random(f"caller {number} {self._seed}")
            process = self.processes[number % len(self.processes)]
            self._come_again(process, rng, callers / rate, START, keys, how)
        self.world.run()
        return self

    def _come_again(
        self, process: Process, rng: Random, pause: float, last: float, keys: int, how: dict[str, Any]
    ) -> None:
        due = max(self.world.now, last + rng.expovariate(1 / pause))
        if due < self._ends_at:
            key = {"key": f"k{int(rng.random() * keys)}"} if keys else {}
            then = lambda: self._come_again(process, rng, pause, due, keys, how)  # noqa: E731
            self.world.at(due, lambda: process.call(then, **key, **how))

    # What came of it

    @property
    def failed(self) -> list[Ended]:
        return [call for call in self.calls if call.failed]

    def between(self, since: float, until: float) -> list[Ended]:
        """The calls that began in these seconds."""
        return [call for call in self.calls if since <= call.started - START < until]

    def shares(self, since: float, until: float) -> list[int]:
        """How many calls reached each server in these seconds."""
        return [sum(since <= at - START < until for at in server.reached) for server in self.servers]

    def states(self, process: int = 0) -> list[str]:
        return [node.breaker.state for node in self.processes[process].cluster.view.nodes]

    def ejections(self) -> int:
        return sum(node.breaker.ejections for process in self.processes for node in process.cluster.view.nodes)
