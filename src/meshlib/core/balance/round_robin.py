"""Round robin, weighted by earliest deadline first.

Every node has a deadline; the earliest goes next and its deadline moves on by 1/weight. With equal weights this is
plain rotation, with unequal ones the turns of a heavy node are spread out instead of following each other. The first
round starts at a random node, or all the workers of a fleet would start at the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshlib.core.balance import Candidates
    from meshlib.core.chance import Rng
    from meshlib.core.node import Node


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRobin:
    """Gives every endpoint its turn, in proportion to its weight."""

    def prepare(self, nodes: Sequence[Node], rng: Rng) -> Candidates:
        """See `Balancer`."""
        start = int(rng.random() * len(nodes))
        rotated = [*nodes[start:], *nodes[:start]]
        # First deadlines are staggered: endpoints that began in step would leave a heavy one its turns in a row.
        turns = [((place + 1) / len(nodes) / node.effective_weight, place, node) for place, node in enumerate(rotated)]
        heapify(turns)

        def candidates(now: float, key: str | None) -> Iterator[Node]:
            had: set[int] = set()
            while len(had) < len(turns):
                aside = []
                while turns[0][1] in had:  # a heavy node may be due again; it waits until the walk has gone on
                    aside.append(heappop(turns))
                deadline, place, node = turns[0]
                heapreplace(turns, (deadline + 1 / node.effective_weight, place, node))
                for turn in aside:
                    heappush(turns, turn)
                had.add(place)
                yield node

        return candidates
