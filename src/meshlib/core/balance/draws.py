"""Drawing nodes by chance, without drawing one twice.

Decides nothing but the order; what is drawn is compared by whoever asked for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshlib.core.chance import Rng
    from meshlib.core.node import Node


def draw(nodes: Sequence[Node], rng: Rng, first: int = 0, moved: dict[int, int] | None = None) -> Iterator[Node]:
    """The nodes in a random order, at the price of those that are asked for.

    A Fisher-Yates shuffle whose swaps are kept in a dict: the list of nodes is neither copied nor changed.

    Args:
        nodes: the nodes.
        rng: the source of chance.
        first: how many were drawn already.
        moved: their swaps: which node has taken whose place.
    """
    count = len(nodes)
    moved = {} if moved is None else moved
    for position in range(first, count):
        chosen = position + int(rng.random() * (count - position))
        yield nodes[moved.get(chosen, chosen)]
        moved[chosen] = moved.get(position, position)
