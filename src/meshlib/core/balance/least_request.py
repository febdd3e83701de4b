"""Least request by the power of two choices.

Two nodes are drawn, the one with fewer calls in flight for its weight goes first (Mitzenmacher, "The Power of Two
Choices in Randomized Load Balancing", 2001: nearly as even as asking all of them, and without the herd that running
to the one best node makes). Between two idle endpoints a heavy one wins as often as its weight says; going by the load,
it would win always. The loser stays a candidate and meets the next one drawn, so a walk meets every node once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from meshlib.core.balance.draws import draw
from meshlib.validation import check, ruled, whole

if TYPE_CHECKING:
    from meshlib.core.balance import Candidates
    from meshlib.core.chance import Rng
    from meshlib.core.node import Node


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
        count = len(nodes)
        choices = min(self.choices, count)
        random, others = rng.random, count - 1

        def candidates(now: float, key: str | None) -> Iterator[Node]:
            drawn = draw(nodes, rng)
            best, losers = next(drawn), []
            for other in islice(drawn, choices - 1):
                if is_better(other, best, rng):
                    best, other = other, best
                losers.append(other)
            yield best
            yield from _others(losers, drawn, rng)

        def candidates_of_two(now: float, key: str | None) -> Iterator[Node]:
            # The same for the two choices that nearly everybody has: most calls ask for the first candidate alone.
            one = int(random() * count)
            two = 1 + int(random() * others)
            best, other = nodes[one], nodes[two if two != one else 0]
            if (other.in_flight or best.in_flight or other.effective_weight != best.effective_weight) and is_better(
                other, best, rng
            ):
                best, other = other, best
            yield best
            moved = {one: 0}
            moved[two] = moved.get(1, 1)
            yield from _others([other], draw(nodes, rng, 2, moved), rng)

        return candidates_of_two if choices == 2 else candidates


def _others(losers: list[Node], drawn: Iterator[Node], rng: Rng) -> Iterator[Node]:
    """The candidates after the first: the best of those that have lost so far and the next one drawn."""
    while losers:
        losers += islice(drawn, 1)
        best = losers[0]
        for other in losers[1:]:
            if is_better(other, best, rng):
                best = other
        losers.remove(best)
        yield best


def is_better(one: Node, other: Node, rng: Rng) -> bool:
    """Whether `one` has fewer calls for its weight, this one included; between idle ones chance decides by weight."""
    if one.in_flight or other.in_flight or one.effective_weight == other.effective_weight:
        return (one.in_flight + 1) / one.effective_weight < (other.in_flight + 1) / other.effective_weight
    return rng.random() * (one.effective_weight + other.effective_weight) < one.effective_weight
