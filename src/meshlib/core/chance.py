"""What the core asks of randomness: so little that a test can play it by hand.

Decides nothing. `random.Random` fits; nothing in the core makes one of its own.
"""

from __future__ import annotations

from typing import Protocol


class Rng(Protocol):
    """The one draw the core makes; a whole number below `n` is `int(random() * n)`, far cheaper than `randrange`."""

    def random(self) -> float:
        """A float in [0, 1)."""
        ...
