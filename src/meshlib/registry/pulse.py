"""When the registry is told next that we live.

Decides the instants, by the clock and the chance that it is handed; it tells nobody, and it does not sleep.

The laws:

- a heartbeat is due a third of the time to live after the one before, give or take a tenth of that, so that two may be
  lost and a third still comes in time, and a thousand processes that began together do not stay together;
- after an error the next try comes within a random part of a time that doubles, up to `LONGEST`, and never later than
  the heartbeat that would have been due;
- `runs_out` is when the registry, having heard nothing since, calls us critical.
"""

from __future__ import annotations

from meshlib.core.chance import Rng

SHORTEST, LONGEST = 0.25, 10.0
"""Seconds from an error to the next try: what they grow from, and to."""

DOUBLINGS = 10

JITTER = 0.1
"""The share by which a heartbeat comes sooner or later by chance."""


class Pulse:
    """The heartbeats of one registration.

    Args:
        ttl: seconds after which the registry calls us critical.
        rng: for the jitter.
        now: when the first one is due.
    """

    def __init__(self, ttl: float, rng: Rng, now: float) -> None:
        self._ttl, self._rng = ttl, rng
        self._failed = 0
        self.due = now
        self.runs_out = now + ttl

    def beat(self, now: float) -> None:
        """The registry has heard us; `now` is when it was told, not when it answered."""
        self._failed = 0
        self.due = now + self._ttl / 3 * (1 - JITTER + 2 * JITTER * self._rng.random())
        self.runs_out = now + self._ttl

    def failed(self, now: float) -> None:
        """The registry did not hear us."""
        self._failed += 1
        longest = min(LONGEST, SHORTEST * 2 ** min(self._failed, DOUBLINGS), self._ttl / 3)
        self.due = now + longest * (0.2 + 0.8 * self._rng.random())
