"""A balancer on its own, without a mesh, a socket or a clock: for simulators, and for tests of balancers.

Decides how picks and their ends become what a balancer sees of its nodes. It plays no faults and keeps no time: whoever
drives it does. There are no breakers and no priorities here: every endpoint may be picked, however it fails.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from meshlib.core.balance import Balancer, Candidates
from meshlib.core.node import Node, remembering
from meshlib.endpoint import Endpoint, Place
from meshlib.policy import Breaker


class Picked(NamedTuple):
    """An attempt under way. It stays with its node, which may have gone and come back as a new one meanwhile."""

    started: float
    number: int
    node: Node


class BalancerHarness:
    """Drives a balancer as a service does.

    Args:
        balancer: which one.
        endpoints: the endpoints, or `"host:port"` strings; at least one.
        rng: the source of chance. Default a new `random.Random()`.

    Raises:
        ValueError: if there is no endpoint.

    Example:
        >>> harness = BalancerHarness(RoundRobin(), ["10.0.0.1:80", "10.0.0.2:80"], random.Random(1))
        >>> endpoint = harness.pick(now=0.0)
        >>> harness.done(endpoint, now=0.02, latency=0.02)
    """

    def __init__(
        self, balancer: Balancer, endpoints: Iterable[Endpoint | str], rng: random.Random | None = None
    ) -> None:
        self.balancer = balancer
        self._rng = rng or random.Random()
        self._nodes: dict[Place, Node] = {}
        self._under_way: dict[Place, list[Picked]] = {}
        self.update(endpoints)

    @property
    def nodes(self) -> Sequence[Node]:
        """What the balancer sees."""
        return list(self._nodes.values())

    def update(self, endpoints: Iterable[Endpoint | str]) -> None:
        """Take over a new set; places that stay keep what was learned of them.

        Raises:
            ValueError: if there is no endpoint; everything stays as it was then.
        """
        given = [Endpoint.parse(each) if isinstance(each, str) else each for each in endpoints]
        if not given:
            raise ValueError("a balancer needs at least one endpoint")
        nodes: dict[Place, Node] = {}
        for endpoint in given:
            node = self._nodes.get(endpoint.place) or remembering(endpoint, Breaker(), self.balancer)
            node.endpoint, node.effective_weight = endpoint, float(endpoint.weight)
            nodes[endpoint.place] = node
        self._nodes = nodes
        self._candidates: Candidates = self.balancer.prepare(list(nodes.values()), self._rng)

    def pick(self, now: float, key: str | None = None, exclude: Collection[Endpoint] = ()) -> Endpoint:
        """Start an attempt.

        Args:
            now: the time in seconds; it never goes back.
            key: what a consistent hash goes by.
            exclude: endpoints that this call has been to.

        Returns:
            The best endpoint that is not excluded; the best of all if all are.

        Raises:
            ValueError: if the balancer offers no endpoint at all, which none of ours does.
        """
        node = self._choose(now, key, {endpoint.place for endpoint in exclude})
        picked = Picked(now, node.start(now), node)
        self._under_way.setdefault(node.endpoint.place, []).append(picked)
        return node.endpoint

    def done(self, endpoint: Endpoint, now: float, latency: float, failed: bool = False) -> None:
        """End an attempt.

        Args:
            endpoint: what `pick` returned; it may have gone meanwhile.
            now: the time.
            latency: seconds it took; of several under way on the endpoint, the one started `latency` ago ends.
            failed: whether it failed.

        Raises:
            ValueError: if no attempt is under way on the endpoint.
        """
        under_way = self._under_way.get(endpoint.place)
        if not under_way:
            raise ValueError(f"no attempt is under way on {endpoint}: it was not picked, or is done")
        picked = min(under_way, key=lambda each: abs(each.started - (now - latency)))
        under_way.remove(picked)
        picked.node.restart(picked.number, now - latency)  # the latency that is told counts, whenever it was picked
        picked.node.settle(picked.number, now, not failed)
        picked.node.finish()

    def _choose(self, now: float, key: str | None, tried: Collection[Place]) -> Node:
        """The first node that was not tried, else the first."""
        first: Node | None = None
        for node in self._candidates(now, key):
            if node.endpoint.place not in tried:
                return node
            first = first or node
        if first is None:
            raise ValueError(f"{self.balancer!r} offers no endpoint")
        return first
