"""What of a resolver's answers is believed (rule D1).

Decides that the last good answer stays in force through every error, that an empty answer must be repeated before it
empties anything, and how long to wait before asking again. It never asks.

    answer with endpoints ---> believed
    empty answer ------------> doubted; believed at its second repetition, or repeated after 30 s
    error -------------------> nothing changes, but the answer in force is no longer confirmed, and grows stale
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from meshlib.core.chance import Rng
from meshlib.endpoint import Endpoint

CONFIRMATIONS = 2
"""Repetitions after which an empty answer is believed: a registry that restarts, or lost our rights, gives a few."""

DOUBT = 30.0
"""Seconds after which one repetition is enough."""

DOUBT_EVERY = 5.0
"""Seconds from one doubted answer to the next question: instances need some time to register anew."""

FIRST_DOUBT_EVERY = 1.0
"""The same while there is nothing to lose, and calls wait."""

SHORTEST, LONGEST = 0.1, 10.0
"""Seconds from an error to the next question, at the least and at the most."""

HASTE = 5.0
"""A question comes after at most this part of the time that a resolver has failed, so that its return is seen soon
whenever it comes: after an outage of 20 s within 4 s."""

SPREAD = 0.2
"""The share by which a time to live is cut at random (rule D3), so that processes started together drift apart."""


class LastGood:
    """The answer in force.

    Attributes:
        endpoints: the set.
        known_at: when it was last confirmed; None before the first answer that was believed.
        holds_until: when it needs to be confirmed again; infinite for a resolver that waits for news by itself.
        failing_since: when the errors began that have not ended; None if there are none.
    """

    def __init__(self) -> None:
        self.endpoints: tuple[Endpoint, ...] = ()
        self.known_at: float | None = None
        self.failing_since: float | None = None
        self.holds_until = 0.0
        self._doubted_since: float | None = None
        self._doubts = 0

    def answer(self, endpoints: Sequence[Endpoint], now: float, ttl: float | None = 0.0) -> bool:
        """Hear an answer; returns whether it is believed.

        Args:
            endpoints: the set.
            now: the time.
            ttl: seconds for which it needs no confirmation; None for a resolver that waits for news by itself, whose
                silence confirms it.
        """
        self.failing_since = None
        if not endpoints and self._is_doubtful(now):
            return False
        self._doubted_since, self._doubts = None, 0
        self.endpoints, self.known_at = tuple(endpoints), now
        self.holds_until = math.inf if ttl is None else now + ttl
        return True

    def fail(self, now: float) -> None:
        """Hear of an error."""
        self.holds_until = min(self.holds_until, now)
        if self.failing_since is None:
            self.failing_since = now
        self._doubted_since, self._doubts = None, 0  # who says "nothing" and fails in turn is not to be believed

    def current(self, now: float, max_stale: float) -> tuple[Endpoint, ...]:
        """The set in force; none if it has lacked its confirmation for more than `max_stale` seconds."""
        return self.endpoints if self.known_at is not None and now - self.holds_until <= max_stale else ()

    def delay(self, now: float, ttl: float | None, rng: Rng) -> float:
        """Seconds to the next question.

        Args:
            now: the time.
            ttl: what came with the answer; None for a resolver that waits for news by itself.
            rng: for the jitter.
        """
        if self.failing_since is not None:
            longest = min(LONGEST, max(5 * SHORTEST, (now - self.failing_since) / HASTE))
            return SHORTEST + (longest - SHORTEST) * rng.random()
        if self._doubted_since is not None:
            every = FIRST_DOUBT_EVERY if self.known_at is None else DOUBT_EVERY
            return every * (1 - SPREAD * rng.random())
        return 0.0 if ttl is None else ttl * (1 - SPREAD * rng.random())

    def _is_doubtful(self, now: float) -> bool:
        """Whether one more empty answer is still not to be believed; an empty set needs no confirmation."""
        if self.known_at is not None and not self.endpoints:
            return False
        if self._doubted_since is None:
            self._doubted_since = now
            self.holds_until = min(self.holds_until, now)
            return True
        self._doubts += 1
        return self._doubts < CONFIRMATIONS and now - self._doubted_since < DOUBT
