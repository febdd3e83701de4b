"""The second half of rule B4 on paper: a server that stops for a while, and callers who give up on it.

Everybody has his own throttle and bucket; the server works on its queue in turn and does not notice that nobody waits
for an answer any more. So what the callers send during the stall is what keeps it from working for them afterwards.
Time is virtual, chance is seeded, and nothing is random but who calls when.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from meshlib import Budget, Throttle
from meshlib.core.backoff import delay_before
from meshlib.core.budget import Bucket
from meshlib.core.throttle import Shedder

STALLS = 5.0
"""When the stall begins."""

LASTS = 10.0
LOAD = 0.8
MAX_ATTEMPTS = 3
SLICE = 0.5


class Server:
    """One worker and its queue."""

    def __init__(self, service_time: float) -> None:
        self._service_time = service_time
        self._free_at = 0.0

    def takes(self, now: float) -> float:
        """Queue a request; returns when it is answered."""
        begins = max(now, self._free_at)
        ends = begins + self._service_time
        if begins < STALLS + LASTS and ends > STALLS:
            ends = max(begins, STALLS) + self._service_time + (STALLS + LASTS - max(begins, STALLS))
        self._free_at = ends
        return ends


@dataclass
class Caller:
    """A process with calls to make; None for what it does without."""

    shedder: Shedder | None
    bucket: Bucket | None
    in_flight: int = 0


@dataclass
class Call:
    caller: Caller
    began: float
    attempts: int = 0
    paid: float = 0.0


@dataclass
class Stall:
    """A run: `rate` calls per second of `callers` together, each given up after `timeout` per attempt and `total`."""

    rate: float
    seed: int
    callers: int = 1
    timeout: float = 0.5
    total: float = 2.0
    throttle: Throttle | None = Throttle()
    budget: Budget | None = Budget()
    lasts: float = STALLS + LASTS + 10.0
    slices: dict[int, list[bool]] = field(default_factory=dict)
    """Whether the calls that began in each half second, counted from the stall's end, were answered."""

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._server = Server(LOAD / self.rate)
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._callers = [
            Caller(Shedder(self.throttle) if self.throttle else None, Bucket(self.budget) if self.budget else None)
            for _ in range(self.callers)
        ]
        self._plan(0.0, self._arrive)
        while self._agenda:
            now, _, act = heapq.heappop(self._agenda)
            act(now)

    def goodput(self, begins: float, ends: float) -> float:
        """The share of the calls that were answered, of those begun between these times after the stall's end."""
        numbers = range(int(begins / SLICE), int(ends / SLICE))
        calls = [answered for number in numbers for answered in self.slices.get(number, [])]
        return sum(calls) / len(calls)

    @property
    def back_after(self) -> float:
        """Seconds after the stall's end from which on every second has 95 % of its calls answered."""
        last = int((self.lasts - STALLS - LASTS) / SLICE) - 2
        bad = [number for number in range(last) if self.goodput(number * SLICE, number * SLICE + 1.0) < 0.95]
        return (bad[-1] + 1) * SLICE if bad else 0.0

    def _plan(self, when: float, act: Callable[..., None], *what: Any) -> None:
        entry: tuple[float, int, Callable[[float], None]] = (when, next(self._order), partial(act, *what))
        heapq.heappush(self._agenda, entry)

    def _arrive(self, now: float) -> None:
        if now < self.lasts:
            self._plan(now + self._rng.expovariate(self.rate), self._arrive)
        call = Call(self._rng.choice(self._callers), now)
        self._try(call, now) if self._is_admitted(call, now) else self._end(call, False)

    def _is_admitted(self, call: Call, now: float) -> bool:
        shedder = call.caller.shedder
        return shedder is None or not shedder.is_awake or shedder.admits(now, self._rng)

    def _try(self, call: Call, now: float) -> None:
        call.attempts += 1
        call.caller.in_flight += 1
        answered, given_up = self._server.takes(now), min(now + self.timeout, call.began + self.total)
        if answered <= given_up:
            self._plan(answered, self._succeed, call)
        else:
            self._plan(given_up, self._fail, call)

    def _succeed(self, call: Call, now: float) -> None:
        caller = call.caller
        caller.in_flight -= 1
        if caller.shedder is not None and caller.shedder.is_awake:
            caller.shedder.accepted(now)
        if caller.bucket is not None:
            caller.bucket.succeeded(call.paid)
        self._end(call, True)

    def _fail(self, call: Call, now: float) -> None:
        caller = call.caller
        if caller.shedder is not None:
            caller.shedder.overloaded(now, caller.in_flight)
        caller.in_flight -= 1
        wait = delay_before(call.attempts, self._rng)
        if call.attempts == MAX_ATTEMPTS or now + wait >= call.began + self.total or not self._is_admitted(call, now):
            return self._end(call, False)
        if caller.bucket is not None:
            call.paid = caller.bucket.pay(throttled=False)
            if not call.paid:
                return self._end(call, False)
        return self._plan(now + wait, self._try, call)

    def _end(self, call: Call, answered: bool) -> None:
        self.slices.setdefault(int((call.began - STALLS - LASTS) // SLICE), []).append(answered)
