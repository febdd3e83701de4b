"""The quantile of some values, as figures and decisions go by it.

Decides that it is one of the values themselves, by the nearest rank, and never something between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest of the values that at least `share` of them are not above.

    Args:
        ordered: the values, in ascending order.
        share: from 0 to 1; it may be too much by a hair, as 1 - 0.02 is.

    Returns:
        None if there are no values.
    """
    return ordered[max(0, ceil(share * len(ordered) - 1e-9) - 1)] if ordered else None
