"""Random: a lottery in which an endpoint has as many tickets as its weight.

Decides nothing by what an endpoint is doing: its share is its weight, call for call. The first candidate is found in
O(1) among equal weights and in O(log n) among others. Those after it are drawn by weight from who is left, only if they
are asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log
from typing import TYPE_CHECKING

from meshlib.core.balance.draws import draw

if TYPE_CHECKING:
    from meshlib.core.balance import Candidates
    from meshlib.core.chance import Rng
    from meshlib.core.node import Node


@dataclass(frozen=True, kw_only=True, slots=True)
class Random:
    """Draws an endpoint by its weight."""

    def prepare(self, nodes: Sequence[Node], rng: Rng) -> Candidates:
        """See `Balancer`."""
        tickets = list(accumulate(node.effective_weight for node in nodes))
        last = len(nodes) - 1

        def candidates(now: float, key: str | None) -> Iterator[Node]:
            # `hi` is for a product that was rounded up to all of the tickets.
            first = nodes[bisect_right(tickets, rng.random() * tickets[last], hi=last)]
            yield first
            yield from _others(nodes, first, rng)

        def candidates_alike(now: float, key: str | None) -> Iterator[Node]:
            return draw(nodes, rng)

        weights = {node.effective_weight for node in nodes}
        return candidates_alike if len(weights) < 2 else candidates


def _others(nodes: Sequence[Node], first: Node, rng: Rng) -> Iterator[Node]:
    """All nodes but the first, each place drawn by weight from who is left.

    Each node gets an exponential time at the rate of its weight, and who is due next is drawn by weight (Efraimidis and
    Spirakis, "Weighted random sampling with a reservoir", 2006).
    """
    due = {node: -log(1.0 - rng.random()) / node.effective_weight for node in nodes if node is not first}
    return iter(sorted(due, key=due.__getitem__))
