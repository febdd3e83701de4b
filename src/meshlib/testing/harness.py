"""A balancer on its own, without a mesh, a socket or a clock: for simulators, and for tests of balancers.

Decides how picks and their ends become what a balancer sees of its nodes. It plays no faults and keeps no time: whoever
drives it does. There are no breakers here: every endpoint may be picked, however it fails.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence

from meshlib.core.balance import Balancer, Candidates
from meshlib.core.node import Node, remembering
from meshlib.endpoint import Endpoint, Place
from meshlib.policy import Breaker


class BalancerHarness:
    """Drives a balancer as a service does.

    Args:
        balancer: which one.
        endpoints: the endpoints, or `"host:port"` strings; at least one.
        rng: the source of chance. Default a new `random.Random()`.

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
        self._open: dict[Place, list[tuple[float, int]]] = {}
        self.update(endpoints)

    @property
    def nodes(self) -> Sequence[Node]:
        """What the balancer sees."""
        return list(self._nodes.values())

    def update(self, endpoints: Iterable[Endpoint | str]) -> None:
        """Take over a new set; places that stay keep what was learned of them."""
        given = [Endpoint.parse(each) if isinstance(each, str) else each for each in endpoints]
        nodes: dict[Place, Node] = {}
        for endpoint in given:
            node = self._nodes.get(endpoint.place) or remembering(endpoint, Breaker(), self.balancer)
            node.endpoint, node.effective_weight = endpoint, float(endpoint.weight)
            nodes[endpoint.place] = node
            self._open.setdefault(endpoint.place, [])
        if not nodes:
            raise ValueError("a balancer needs at least one endpoint")
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
        """
        places = {endpoint.place for endpoint in exclude}
        walk = self._candidates(now, key)
        first = node = next(walk)
        while node.endpoint.place in places:
            another = next(walk, None)
            if another is None:
                node = first
                break
            node = another
        self._open[node.endpoint.place].append((now, node.start(now)))
        return node.endpoint

    def done(self, endpoint: Endpoint, now: float, latency: float, failed: bool = False) -> None:
        """End an attempt.

        Args:
            endpoint: what `pick` returned.
            now: the time.
            latency: seconds it took; of several under way on the endpoint, the one started `latency` ago ends.
            failed: whether it failed.
        """
        under_way = self._open[endpoint.place]
        one = min(under_way, key=lambda each: abs(each[0] - (now - latency)))
        under_way.remove(one)
        if (node := self._nodes.get(endpoint.place)) is not None:
            node.settle(one[1], now, not failed)
            node.finish()
