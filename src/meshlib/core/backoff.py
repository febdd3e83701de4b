"""How long to wait before a retry.

Decides a length of time. It never sleeps. The default is full jitter (Marc Brooker, "Exponential Backoff And Jitter",
AWS Architecture Blog, 2015): a draw between nothing and a bound that doubles, because callers that failed together
must not come back together.
"""

from __future__ import annotations

from meshlib.core.chance import Rng

FIRST = 0.025
"""The bound before the first retry, in seconds."""

LONGEST = 0.25
"""Where the doubling ends, in seconds."""


def delay_before(retry: int, rng: Rng) -> float:
    """Seconds to wait before a retry; `retry` counts from 1."""
    return rng.random() * min(LONGEST, FIRST * 2.0 ** min(retry - 1, 10))
