"""The live side of an endpoint: what its calls have shown about it.

Decides what is remembered of an attempt. It never chooses: balancers and the view read it. A node survives every
re-resolution of its place, so what it has learned outlives views and balancers. Its owner, the cluster, touches it
only under the cluster's lock.
"""

from __future__ import annotations

from collections import deque
from math import exp, inf

from meshlib.core.breaker import NodeBreaker
from meshlib.endpoint import Endpoint
from meshlib.policy import Breaker

MEMORY = 10.0
"""Seconds after which an observation has lost all but 1/e of its weight in `rate`, and in `ewma` as a rule."""

ONE = 1 / MEMORY
"""What one attempt adds to `rate`."""

TICK = 0.1
"""Seconds whose attempts count for `rate` as if they had begun at once, which is 1 % from the truth at most."""

REMEMBERED = 256
"""Latencies kept for the quantiles of a snapshot."""


class Node:
    """The live side of a place.

    Args:
        endpoint: what the resolver says of it.
        breaker: the service's settings.
        decay: seconds after which an observation has lost all but 1/e of its weight.
        penalty: seconds that a failure counts for in `ewma`, at least.

    Attributes:
        in_flight: attempts whose response has not ended.
        attempts: attempts ever made.
        failures: those that ended badly, or whose body died.
        ewma: exponentially weighted latency in seconds, 0 until the first answer. It is what balancers go by: a peak
            counts in full, and failures count as `penalty`.
        usual: the plain average of what its attempts took, weighted likewise.
        observed_at: when these were last brought up to date; -inf before the first answer.
        effective_weight: what the view gives the balancer to work with.
        breaker: the state machine.
        health: what its checks say; None before the first one, and without any.
        awaits_check: whether it is to be called only after a first check, as long as there are others.
        finding: what its last check has found, in a few words; empty before the first one, and without any.
        last_error: what its last failure was, in words; empty if there was none.
        failed_at: when that was.
        is_barred: whether it was taken out by hand.
        inherited: attempts made before the last fork, which are not ours to count.
    """

    __slots__ = (
        "_decay",
        "_open",
        "_penalty",
        "_rate",
        "_rated_at",
        "attempts",
        "awaits_check",
        "breaker",
        "effective_weight",
        "endpoint",
        "ewma",
        "failed_at",
        "failures",
        "finding",
        "health",
        "in_flight",
        "inherited",
        "is_barred",
        "last_error",
        "latencies",
        "observed_at",
        "usual",
    )

    def __init__(self, endpoint: Endpoint, breaker: Breaker, decay: float = MEMORY, penalty: float = 0.0) -> None:
        self.endpoint = endpoint
        self.effective_weight = float(endpoint.weight)
        self.breaker = NodeBreaker(breaker)
        self.health: bool | None = None
        self.finding = self.last_error = ""
        self.failed_at = -inf
        self.awaits_check = self.is_barred = False
        self.inherited = 0
        self.in_flight = 0
        self.attempts = 0
        self.failures = 0
        self.ewma = self.usual = 0.0
        self.observed_at = -inf
        self.latencies: deque[float] = deque(maxlen=REMEMBERED)
        self._open: dict[int, float] = {}
        self._decay = decay
        self._penalty = penalty
        self._rate = 0.0
        self._rated_at = -inf

    @property
    def is_usable(self) -> bool:
        """Whether neither its breaker nor its checks speak against calling it."""
        return self.breaker.state == "closed" and self.health is not False

    @property
    def is_healthy(self) -> bool:
        """Whether they have nothing against it, not even that it would be ejected, had not too many been."""
        return self.breaker.is_healthy and self.health is not False

    @property
    def is_waiting(self) -> bool:
        """Whether its first check is still to come, and to be waited for."""
        return self.awaits_check and self.health is None

    @property
    def is_ejected(self) -> bool:
        """Whether all that speaks against it is its breaker, so that a probe can bring it back."""
        return self.breaker.state != "closed" and self.health is not False and not self.is_barred

    def is_due(self, now: float) -> bool:
        """Whether it waits for a probe that may be made now."""
        return self.is_ejected and self.breaker.is_eligible(now)

    def may_serve(self, now: float) -> bool:
        """Whether a call could go there now, be it as a probe."""
        return not self.is_barred and (self.is_usable or self.is_due(now))

    @property
    def oldest_open(self) -> float | None:
        """When the oldest attempt under way was started; None if there is none."""
        return next(iter(self._open.values()), None)

    def start(self, now: float) -> int:
        """An attempt begins; returns the number it is closed by."""
        self.attempts = number = self.attempts + 1
        self.in_flight += 1
        if now > self._rated_at + TICK:
            self._rate, self._rated_at = self.rate(now), now
        self._rate += ONE
        self._open[number] = now
        return number

    def settle(self, number: int, now: float, success: bool | None) -> None:
        """The attempt's answer, or its end without one, is known."""
        seconds = now - self._open.pop(number, now)
        if success is None:
            return
        keep = exp((self.observed_at - now) / self._decay)
        self.observed_at = now
        self.latencies.append(seconds)
        self.usual = seconds + (self.usual - seconds) * keep
        if not success:
            self.failures += 1
            if seconds < self._penalty:
                seconds = self._penalty
        self.ewma = seconds if seconds > self.ewma else seconds + (self.ewma - seconds) * keep

    def blame(self, error: str, now: float) -> None:
        """An attempt has failed, and this is how."""
        self.last_error, self.failed_at = error, now

    def give_up(self, seconds: float, now: float) -> None:
        """An attempt was given up after `seconds`: its latency would have been that or more."""
        if seconds > self.usual:
            self.latencies.append(seconds)
            self.usual = self.usual or seconds
            self.shun(seconds, now)

    def shun(self, seconds: float, now: float) -> None:
        """A call is expected to take `seconds` at least."""
        if seconds > self.ewma:
            self.ewma, self.observed_at = seconds, now

    def finish(self) -> None:
        """The attempt's response has ended."""
        self.in_flight -= 1

    def recover(self, now: float) -> None:
        """It is well again: its last attempt tells what to expect, and the failures before it do not."""
        if self.latencies:
            self.ewma = self.usual = self.latencies[-1]
            self.observed_at = now

    def adopt(self, balancer: object) -> None:
        """Remember from now on as this balancer wants it; see `remembering`."""
        self._decay, self._penalty = _memory(balancer)

    def forget_open(self) -> None:
        """No attempt is under way: those that were belong to another process."""
        self.inherited = self.attempts
        self.in_flight = 0
        self._open.clear()

    def restart(self, number: int, now: float) -> None:
        """What the attempt takes is counted from now on, unless it is over: a loser may hear of that late."""
        if number in self._open:
            self._open[number] = now

    def rate(self, now: float) -> float:
        """Attempts per second of late."""
        return self._rate * exp((self._rated_at - now) / MEMORY)


def remembering(endpoint: Endpoint, breaker: Breaker, balancer: object) -> Node:
    """A node that remembers latencies as the balancer wants it, if it says so: by its `decay` and `penalty`."""
    return Node(endpoint, breaker, *_memory(balancer))


def _memory(balancer: object) -> tuple[float, float]:
    return getattr(balancer, "decay", MEMORY), getattr(balancer, "penalty", 0.0)
