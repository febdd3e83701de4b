"""The view: the nodes of a service as the request path sees them, and the balancer's index over them.

Decides which nodes a call may be offered, in which order, and whether one more may be ejected. It is immutable and
swapped whole by one assignment, so readers take no lock; it is built anew when a node comes, goes, is ejected, comes
back or is a step further on its ramp, never for a call. It never changes a node.

One level at a time (rule D6): the first with `min_healthy` healthy nodes is called, those after it serve the calls
that have failed there, and levels that are too small come last. Where fewer than the share `panic` of a level are
healthy, and no lower level is there to go to, it is in panic (rule B3): all of its nodes are called, whatever breakers
and checks say, since a few survivors would not bear the load of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from meshlib.core.balance import Balancer, Candidates
from meshlib.core.chance import Rng
from meshlib.core.node import Node

if TYPE_CHECKING:
    from meshlib.policy import Limit
    from meshlib.service import Service


class Level(NamedTuple):
    """The nodes of one priority.

    Attributes:
        priority: theirs.
        nodes: all of them, but those that were taken out by hand.
        usable: those that neither breaker nor check speaks against. New ones that still wait for their first check are
            among them only if there are no others.
        healthy: how many have not failed enough to be ejected, had there been room for it.
        known: how many nodes that is of. New ones count for neither, likewise.
        sure: how many of the healthy ones are not new.
    """

    priority: int
    nodes: Sequence[Node]
    usable: Sequence[Node]
    healthy: int
    known: int
    sure: int

    @classmethod
    def of(cls, priority: int, nodes: Sequence[Node]) -> Level:
        """What the nodes of this priority come to."""
        present = [node for node in nodes if not node.is_barred]
        known = [node for node in present if not node.is_waiting]
        usable = [node for node in known if node.is_usable]
        sure = healthy = sum(node.breaker.is_healthy for node in usable)
        if not usable:  # rather an endpoint that nobody has looked at than none
            known, usable = present, [node for node in present if node.is_usable]
            healthy = sum(node.breaker.is_healthy for node in usable)
        return cls(priority, present, usable, healthy, len(known), sure)

    def panics(self, levels: Sequence[Level], service: Service) -> bool:
        """Whether too few of them are healthy, and there is no lower level to go to."""
        if self.healthy >= service.breaker.panic * self.known:
            return False
        good = [level.priority for level in levels if level.sure >= service.min_healthy]
        return not any(priority > self.priority for priority in good) if self.priority in good else not good


class Levels(NamedTuple):
    """All levels.

    Attributes:
        order: in which they are called.
        panicking: the priorities of those in panic.
        spared: the nodes of these that are not healthy, where others are. They are called, but seldom: a balancer that
            goes by no errors would send most calls to them, as they have the fewest in flight.
    """

    order: Sequence[Level]
    panicking: frozenset[int]
    spared: frozenset[Node]

    @classmethod
    def of(cls, nodes: Sequence[Node], service: Service) -> Levels:
        """What the nodes of a service come to."""
        by_priority: dict[int, list[Node]] = {}
        for node in nodes:
            by_priority.setdefault(node.endpoint.priority, []).append(node)
        levels = [Level.of(priority, by_priority[priority]) for priority in sorted(by_priority)]
        order = sorted(levels, key=lambda level: level.sure < service.min_healthy)
        panicking = [level for level in order if level.panics(order, service)]
        spared = (node for level in panicking if level.healthy for node in level.nodes if not node.is_healthy)
        return cls(order, frozenset(level.priority for level in panicking), frozenset(spared))


@dataclass(frozen=True, slots=True)
class View:
    """One snapshot of a service.

    Attributes:
        nodes: all of them.
        candidates: the balancer's order for one call, level after level.
        balancer: its name, which is the reason most endpoints are chosen for.
        offered: the nodes that are candidates.
        ejected: those whose breakers wait for a probe, which calls on this view make.
        panicking: the candidates that are called whatever breakers and checks say.
        priority: of the level that is called.
        panic: whether that one is in panic.
        until: when a node is a step further on its ramp.
    """

    nodes: tuple[Node, ...]
    candidates: Candidates
    balancer: str
    offered: tuple[Node, ...] = ()
    ejected: tuple[Node, ...] = ()
    panicking: frozenset[Node] = frozenset()
    priority: int = 0
    panic: bool = False
    until: float = inf

    @classmethod
    def build(cls, nodes: tuple[Node, ...], levels: Levels, service: Service, rng: Rng, zone: str, now: float) -> View:
        """Prepare the service's balancer for these nodes, level by level, and within a level for `zone` first.

        Args:
            nodes: with their effective weights of now.
            levels: what they come to.
            service: whose they are.
            rng: the only source of chance.
            zone: where this process is; empty if that does not count.
            now: the time.
        """
        orders: list[Candidates] = []
        offered: list[Node] = []
        for level in levels.order:
            panics = level.priority in levels.panicking
            pool = level.nodes if panics else level.usable
            if pool:
                orders.append(_order(level, pool, service.balancer, rng, "" if panics else zone))
                offered += pool
        called = levels.order[0].priority if levels.order else 0
        return cls(
            nodes=nodes,
            candidates=_with_room(_one_by_one(orders), service.limit),
            balancer=type(service.balancer).__name__,
            offered=tuple(offered),
            ejected=tuple(node for node in nodes if node.is_ejected and node.endpoint.priority <= called),
            panicking=frozenset(
                node for level in levels.order if level.priority in levels.panicking for node in level.nodes
            ),
            priority=called,
            panic=called in levels.panicking,
            until=min((node.breaker.next_step(now) for node in nodes), default=inf),
        )


def most_ejected(count: int, share: float) -> int:
    """How many of so many nodes may be ejected: the share, but one always and the last never (rule B3).

    A caller that ejects on local evidence must not send everybody to the survivors.
    """
    return min(count - 1, max(1, int(count * share)))


def _order(level: Level, pool: Sequence[Node], balancer: Balancer, rng: Rng, zone: str) -> Candidates:
    """The balancer's order over a level: the nodes of our zone before the others, while half of them may be used.

    With fewer, what is left of them would have to bear all that comes from the zone: then the zone does not count.
    """
    near = [node for node in pool if zone and node.endpoint.zone == zone]
    of_our_zone = sum(node.endpoint.zone == zone and not node.is_waiting for node in level.nodes) if near else 0
    if len(near) in (0, len(pool)) or 2 * len(near) < of_our_zone:
        return balancer.prepare(pool, rng)
    far = [node for node in pool if node.endpoint.zone != zone]
    return _one_by_one([balancer.prepare(near, rng), balancer.prepare(far, rng)])


def _one_by_one(orders: Sequence[Candidates]) -> Candidates:
    """One order after the other, each of them asked for only when the walk comes to it."""
    if len(orders) == 1:
        return orders[0]

    def candidates(now: float, key: str | None) -> Iterator[Node]:
        return chain.from_iterable(order(now, key) for order in orders)

    return candidates


def _with_room(candidates: Candidates, limit: Limit | None) -> Candidates:
    """The same order without the nodes that have as many calls as they may."""
    if limit is None or (most := limit.per_endpoint) is None:
        return candidates

    def with_room(now: float, key: str | None) -> Iterator[Node]:
        return (node for node in candidates(now, key) if node.in_flight < most)

    return with_room
