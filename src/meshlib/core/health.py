"""What the checks of a node add up to.

Decides how many checks in a row it takes to change what a node counts as: the first one is enough, since nothing speaks
against it; later ones must agree, since a single one may have gone astray. It never checks anything.

    not checked --- the first one ---------> healthy, or not
    healthy ------- `unhealthy` failures --> not healthy
    not healthy --- `healthy` passes ------> healthy
"""

from __future__ import annotations

from meshlib.policy import HealthCheck


class Standing:
    """What a node counts as.

    Args:
        settings: how many checks in a row it takes.

    Attributes:
        healthy: whether it counts as healthy; None before the first check.
    """

    __slots__ = ("_against", "_settings", "healthy")

    def __init__(self, settings: HealthCheck) -> None:
        self.healthy: bool | None = None
        self._settings = settings
        self._against = 0

    def hear(self, passed: bool) -> bool:
        """Hear of a check; returns whether the standing changed."""
        if passed is self.healthy:
            self._against = 0
            return False
        self._against += 1
        if self.healthy is not None and self._against < self._needed(passed):
            return False
        self.healthy, self._against = passed, 0
        return True

    def _needed(self, passed: bool) -> int:
        return self._settings.healthy if passed else self._settings.unhealthy
