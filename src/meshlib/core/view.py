"""The view: the nodes of a service as the request path sees them, and the balancer's index over them.

Decides which nodes a call may be offered, in which order, and whether one more may be ejected. It is immutable and
swapped whole by one assignment, so readers take no lock. It never changes a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

from meshlib.core.balance import Balancer, Candidates
from meshlib.core.chance import Rng
from meshlib.core.node import Node

if TYPE_CHECKING:
    from meshlib.service import Service


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
    def build(cls, nodes: tuple[Node, ...], service: Service, rng: Rng, zone: str = "") -> View:
        """Prepare the service's balancer for these nodes, level by level, and within a level for `zone` first.

        At most the share `max_ejected` of them may be ejected, one always, the last never (rule B3): a caller that
        ejects on local evidence must not send everybody to the survivors.
        """
        balancer, count = service.balancer, len(nodes)
        well = [node for node in nodes if node.health is not False]
        used = well if 2 * len(well) >= count else nodes
        levels = [Level(level, _near_first(level, balancer, rng, zone)) for level in _by_priority(used)]
        candidates = levels[0].candidates if len(levels) == 1 else _in_order(levels, service.min_healthy)
        most = min(count - 1, max(1, int(count * service.breaker.max_ejected)))
        return cls(nodes, candidates, type(balancer).__name__, most)

    def may_eject(self) -> bool:
        """Whether one more node may be ejected."""
        return sum(node.breaker.state != "closed" for node in self.nodes) < self.most_ejected


class Level(NamedTuple):
    """The nodes of one priority, and the balancer's order over them."""

    nodes: Sequence[Node]
    candidates: Candidates


def _by_priority(nodes: Sequence[Node]) -> list[list[Node]]:
    """The nodes of each priority, the preferred ones first."""
    priorities = sorted({node.endpoint.priority for node in nodes})
    return [[node for node in nodes if node.endpoint.priority == priority] for priority in priorities]


def _near_first(nodes: Sequence[Node], balancer: Balancer, rng: Rng, zone: str) -> Candidates:
    """The balancer's order over a level: the nodes of our zone before the others, while half of them may be used.

    With fewer, what is left of them would have to bear all that comes from the zone: then the zone does not count.
    """
    near = [node for node in nodes if zone and node.endpoint.zone == zone]
    everybody = balancer.prepare(nodes, rng)
    if not near or len(near) == len(nodes):
        return everybody
    own = Level(near, balancer.prepare(near, rng))
    others = balancer.prepare([node for node in nodes if node.endpoint.zone != zone], rng)
    enough = -(-len(near) // 2)

    def candidates(now: float, key: str | None) -> Iterator[Node]:
        if _is_short(own, enough, now):
            return everybody(now, key)
        return chain(own.candidates(now, key), others(now, key))

    return candidates


def _in_order(levels: Sequence[Level], min_healthy: int) -> Candidates:
    """One level after the other; those with fewer than `min_healthy` nodes that may be used come last (rule D6)."""

    def candidates(now: float, key: str | None) -> Iterator[Node]:
        short: list[Level] = []
        for level in levels:
            if _is_short(level, min_healthy, now):
                short.append(level)
            else:
                yield from level.candidates(now, key)
        for level in short:
            yield from level.candidates(now, key)

    return candidates


def _is_short(level: Level, min_healthy: int, now: float) -> bool:
    """Whether it has too few nodes that may be used; the first ones tell it as a rule, however many there are."""
    healthy = (node for node in level.nodes if node.breaker.is_eligible(now))
    return sum(1 for _ in islice(healthy, min_healthy)) < min_healthy
