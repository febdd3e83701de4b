"""Least request by the power of two choices.

Two nodes are drawn, the one with fewer calls in flight for its weight goes first (Mitzenmacher, "The Power of Two
Choices in Randomized Load Balancing", 2001: nearly as even as asking all of them, and without the herd that running
to the one best node makes). The loser stays a candidate and meets the next one drawn, so a walk meets every node once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from meshlib.core.balance import Candidates
from meshlib.core.chance import Rng
from meshlib.core.node import Node
from meshlib.validation import check, ruled, whole


@dataclass(frozen=True, kw_only=True, slots=True)
class LeastRequest:
    """Prefers the endpoint with the fewest calls in flight, in proportion to its weight.

    Args:
        choices: how many distinct endpoints are compared. Default 2.

    Raises:
        ConfigError: if `choices` is less than 2.
    """

    choices: int = ruled(whole(at_least=2), default=2)

    def __post_init__(self) -> None:
        check(self)

    def prepare(self, nodes: Sequence[Node], rng: Rng) -> Candidates:
        """See `Balancer`."""
        choices = min(self.choices, len(nodes))

        def candidates(now: float, key: str | None) -> Iterator[Node]:
            drawn = draw(nodes, rng)
            best, losers = next(drawn), []
            for _ in range(choices - 1):
                other = next(drawn)
                if load(other) < load(best):
                    best, other = other, best
                losers.append(other)
            yield best
            while losers:
                losers += islice(drawn, 1)
                best = min(losers, key=load)
                losers.remove(best)
                yield best

        return candidates


def load(node: Node) -> float:
    """Calls in flight, this one included, for its weight."""
    return (node.in_flight + 1) / node.effective_weight


def draw(nodes: Sequence[Node], rng: Rng) -> Iterator[Node]:
    """The nodes in a random order, at the price of those that are asked for.

    A Fisher-Yates shuffle whose swaps are kept in a dict: the list of nodes is neither copied nor changed.
    """
    count = len(nodes)
    moved: dict[int, int] = {}
    for position in range(count):
        chosen = position + int(rng.random() * (count - position))
        yield nodes[moved.get(chosen, chosen)]
        moved[chosen] = moved.get(position, position)
