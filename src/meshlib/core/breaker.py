"""The breaker of one node: when to stop calling it, and how to find out that it is well again.

Decides whether a call may use the node, and what a verdict does to its state. It never looks at other nodes: whether
one more may be ejected is told by the view. It never waits: time comes in as `now`.

    closed --[`consecutive` failures in a row, and the view allows it]--> open
    open ----[`open_for` passed, one call asks]-------------------------> half_open, that call is the probe
    half_open --[the probe succeeds]------------------------------------> closed
    half_open --[the probe fails]---------------------------------------> open, for twice as long
    half_open --[the probe never reports]-------------------------------> half_open, with a new probe

The law: a verdict counts only for the generation in which its permit was given; every change of state and every probe
starts a new generation. So a late answer from before an ejection can neither close nor reopen anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from meshlib.core.chance import Rng
from meshlib.policy import Breaker

State = Literal["closed", "open", "half_open"]

JITTER = 0.5
"""An ejection lasts its length +-50 %: callers that opened together must not probe together."""


class NodeBreaker:
    """The state machine on a node.

    Args:
        settings: when it opens and for how long.
    """

    __slots__ = ("_lapses_at", "_opened", "_opens_until", "_settings", "failures_in_a_row", "generation", "state")

    def __init__(self, settings: Breaker) -> None:
        self._settings = settings
        self.state: State = "closed"
        self.generation = 0
        self.failures_in_a_row = 0
        self._opened = 0
        self._opens_until = 0.0
        self._lapses_at = 0.0

    def is_eligible(self, now: float) -> bool:
        """Whether `admit` would give a permit."""
        if self.state == "closed":
            return True
        return now >= (self._opens_until if self.state == "open" else self._lapses_at)

    def admit(self, now: float, lapses_at: float) -> int | None:
        """Ask to use the node.

        Args:
            now: the time.
            lapses_at: when an attempt with this permit will have ended in any case; a probe that has not reported by
                then is given up.

        Returns:
            A permit, to be handed back with the verdict; None if the node is not to be used.
        """
        if self.state == "closed":
            return self.generation
        if not self.is_eligible(now):
            return None
        self.state = "half_open"
        self._lapses_at = lapses_at
        self.generation += 1
        return self.generation

    def record(self, permit: int, success: bool | None, now: float, may_open: Callable[[], bool], rng: Rng) -> bool:
        """Hear the verdict of an attempt.

        Args:
            permit: what `admit` gave for it.
            success: None if the attempt says nothing about the node.
            now: the time.
            may_open: whether the view lets one more node be ejected; asked only if it matters.
            rng: for the jitter.

        Returns:
            Whether the state changed.
        """
        if permit != self.generation:
            return False
        if success is None:
            self._lapses_at = now  # a probe that learned nothing makes room for the next one
            return False
        if self.state == "half_open":
            return self._close() if success else self._open(now, rng)
        if success:
            self.failures_in_a_row = 0
            return False
        self.failures_in_a_row += 1
        return self.failures_in_a_row >= self._settings.consecutive and may_open() and self._open(now, rng)

    def _open(self, now: float, rng: Rng) -> bool:
        length = min(self._settings.open_for * 2**self._opened, self._settings.max_open_for)
        self._opens_until = now + length * (1 - JITTER + 2 * JITTER * rng.random())
        self._opened = min(self._opened + 1, 30)  # the doubling ends at max_open_for long before 2**30
        self.state = "open"
        self.generation += 1
        return True

    def _close(self) -> bool:
        self.state = "closed"
        self.generation += 1
        self.failures_in_a_row = 0
        self._opened = 0
        return True
