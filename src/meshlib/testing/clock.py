"""A clock that moves when it is told to.

Decides nothing. It stands in for `time.monotonic` wherever meshlib takes a clock, so that a test of a breaker's minute
takes no time.
"""

from __future__ import annotations


class ManualClock:
    """Seconds that pass only by `advance`.

    Args:
        start: where it begins. Default 1000.0, so that "a minute ago" is not before the beginning of time.
    """

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> float:
        """Let `seconds` pass, at least 0; returns the new time."""
        if seconds < 0:
            raise ValueError(f"time does not run backwards: seconds must be >= 0, got {seconds!r}")
        self._now += seconds
        return self._now
