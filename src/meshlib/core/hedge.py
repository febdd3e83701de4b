"""When a call of a service gets a backup request, and how many of its calls may.

Decides the delay: with `max_extra` the latency that only this share of the recent calls was above, so that at an even
pace no more than that share is hedged; and a counter that every call adds the share to, and every hedge takes one from.
A fleet that becomes slow as a whole is beyond the remembered latency with all of its calls, and must not get twice the
load for it. It knows neither nodes nor the retry budget, which pays for every hedge as well.
"""

from __future__ import annotations

from collections import deque

from meshlib.core.quantile import quantile
from meshlib.policy import Hedge

REMEMBERED = 500
"""Latencies that the delay is worked out from."""

ENOUGH = 50
"""Latencies it takes: of fewer, nobody knows what is slow."""

EVERY = 25
"""New latencies after which the delay is worked out anew: sorting all of them for each would cost as much as a call."""

SAVED = 10.0
"""Hedges that may be made at once, after calls that needed none."""


class Hedging:
    """What a service knows of its latencies; touched under the cluster's lock.

    Args:
        settings: the share or the delay.
    """

    __slots__ = ("_awaited", "_delay", "_latencies", "_saved", "_share")

    def __init__(self, settings: Hedge) -> None:
        self._latencies: deque[float] = deque(maxlen=REMEMBERED)
        self._awaited = ENOUGH
        self._saved = 0.0
        self.adopt(settings)

    def adopt(self, settings: Hedge) -> None:
        """Go by these settings, and by the latencies of before."""
        self._share = None if settings.after is not None else settings.max_extra
        self._delay = settings.after
        if self._share is not None and len(self._latencies) >= ENOUGH:
            self._delay = quantile(sorted(self._latencies), 1 - self._share)

    def delay(self) -> float | None:
        """A call begins that may be hedged: after how many seconds it may be; None if too little is known yet."""
        if self._share is not None:
            self._saved = min(SAVED, self._saved + self._share)
        return self._delay

    @property
    def is_affordable(self) -> bool:
        """Whether one more hedge keeps to the share."""
        return self._share is None or self._saved >= 1

    def spend(self) -> None:
        """A hedge is made."""
        if self._share is not None:
            self._saved -= 1

    def observe(self, seconds: float, answered: bool) -> None:
        """A first attempt took `seconds`: until its answer, or until it was given up, which tells if it was slow."""
        if self._share is None or not (answered or (self._delay is not None and seconds > self._delay)):
            return
        self._latencies.append(seconds)
        self._awaited -= 1
        if self._awaited <= 0:
            self._awaited = EVERY
            self._delay = quantile(sorted(self._latencies), 1 - self._share)


def hedging_by(settings: Hedge | None, before: Hedging | None = None) -> Hedging | None:
    """What goes by these settings, and by what was known `before`; None if no call is to be hedged."""
    if settings is None or before is None:
        return None if settings is None else Hedging(settings)
    before.adopt(settings)
    return before
