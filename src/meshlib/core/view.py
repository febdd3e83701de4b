"""The view: the nodes of a service as the request path sees them, and the balancer's index over them.

Decides which nodes a call may be offered, in which order, and whether one more may be ejected. It is immutable and
swapped whole by one assignment, so readers take no lock. It never changes a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meshlib.core.balance import Balancer, Candidates
from meshlib.core.chance import Rng
from meshlib.core.node import Node


@dataclass(frozen=True, slots=True)
class View:
    """One snapshot of a service.

    Attributes:
        nodes: all of them.
        candidates: the balancer's order for one call, level after level.
        balancer: its name, which is the reason most endpoints are chosen for.
        most_ejected: how many nodes may be ejected at once.
    """

    nodes: tuple[Node, ...]
    candidates: Candidates
    balancer: str
    most_ejected: int

    @classmethod
    def build(cls, nodes: tuple[Node, ...], balancer: Balancer, rng: Rng, max_ejected: float) -> View:
        """Prepare the balancer for these nodes.

        At most the share `max_ejected` of them may be ejected, one always, the last never (rule B3): a caller that
        ejects on local evidence must not send everybody to the survivors.
        """
        count = len(nodes)
        levels = [balancer.prepare(level, rng) for level in _levels(nodes)]
        candidates = levels[0] if len(levels) == 1 else _one_after_the_other(levels)
        return cls(nodes, candidates, type(balancer).__name__, min(count - 1, max(1, int(count * max_ejected))))

    def may_eject(self) -> bool:
        """Whether one more node may be ejected."""
        return sum(node.breaker.state != "closed" for node in self.nodes) < self.most_ejected


def _levels(nodes: Sequence[Node]) -> list[list[Node]]:
    """The nodes by priority, the preferred ones first."""
    priorities = sorted({node.endpoint.priority for node in nodes})
    return [[node for node in nodes if node.endpoint.priority == priority] for priority in priorities]


def _one_after_the_other(levels: Sequence[Candidates]) -> Candidates:
    """A lower level is asked when those above it have no candidate left."""

    def candidates(now: float, key: str | None) -> Iterator[Node]:
        for level in levels:
            yield from level(now, key)

    return candidates
