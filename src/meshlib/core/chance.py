"""What the core asks of randomness: so little that a test can play it by hand.

Decides nothing. `random.Random` fits; nothing in the core makes one of its own.
"""

from __future__ import annotations

from typing import Protocol


class Rng(Protocol):
    """The two draws the core makes."""

    def random(self) -> float:
        """A float in [0, 1)."""

    def randrange(self, start: int, stop: int) -> int:
        """A whole number in [start, stop)."""
