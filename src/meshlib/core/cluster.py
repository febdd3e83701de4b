"""The live state of one service: its nodes, its view, its retry budget, and the one lock over them.

Decides which nodes survive a change of the endpoints and tells breakers their verdicts. It publishes a new view by one
assignment. It never resolves a name and never does I/O; the lock is held for arithmetic only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from meshlib.core.balance.hashing import ConsistentHash
from meshlib.core.budget import Bucket
from meshlib.core.chance import Rng
from meshlib.core.node import Node, remembering
from meshlib.core.report import Attempt
from meshlib.core.snapshot import NodeSnapshot, ServiceSnapshot, quantile
from meshlib.core.view import View
from meshlib.endpoint import Endpoint, Place

if TYPE_CHECKING:
    from meshlib.service import Service


SHOWN = 5
"""Warnings that an error repeats; a list may hold a thousand names that cannot be looked up."""


class Pending(Protocol):
    """What a call waits for while nobody asks the service's resolver, or there is no answer yet."""

    def wait(self, left: float) -> None:
        """Wait `left` seconds at most."""
        ...

    async def wait_async(self, left: float) -> None:
        """See `wait`."""
        ...


class Cluster:
    """The live state of a service.

    Args:
        service: its settings.
        rng: the only source of chance.
        zone: where this process is; endpoints there are preferred.

    Attributes:
        view: what the request path reads, without the lock.
        pending: what a call waits for before it begins; None as a rule.
        source: where the endpoints come from, for people.
        is_known: whether there was a first answer, which may have been that there is no endpoint.
        warnings: what people should know of the endpoints and where they come from.
        keyless: calls that brought no key to a balancer that goes by one.
        bucket: the retry budget.
        orphans: attempts whose response was garbage-collected without being closed. A finalizer may run while this
            very thread holds the lock, so it appends here and the next call does the counting.
    """

    def __init__(self, service: Service, rng: Rng, zone: str = "") -> None:
        self.service = service
        self._zone = zone
        self.rng = rng
        self.lock = Lock()
        self._publishing = Lock()
        self.bucket = Bucket(service.retry.budget)
        self.orphans: deque[Attempt] = deque()
        self._nodes: dict[Place, Node] = {}
        self._published: dict[Place, Endpoint] = {}
        self.source = ""
        self._known_at = 0.0
        self.pending: Pending | None = None
        self.is_known = False
        self.warnings: tuple[str, ...] = ()
        self.keyless = 0
        self.view = View.build((), service, rng, zone)

    def publish(self, endpoints: Sequence[Endpoint], source: str, now: float) -> list[Place]:
        """Take over a set of endpoints; places that stay keep their node.

        Args:
            endpoints: the whole set.
            source: where it came from, for people.
            now: when it was last confirmed.

        Returns:
            The places that are no longer in it.
        """
        wanted = {endpoint.place: endpoint for endpoint in endpoints}
        with self._publishing:
            gone = [place for place in self._nodes if place not in wanted]
            if wanted != self._published:
                nodes = {
                    place: self._nodes.get(place) or remembering(endpoint, self.service.breaker, self.service.balancer)
                    for place, endpoint in wanted.items()
                }
                with self.lock:
                    for node, endpoint in zip(nodes.values(), wanted.values(), strict=True):
                        node.endpoint, node.effective_weight = endpoint, float(endpoint.weight)
                # A balancer may take long, while calls go on; the user's may raise.
                view = View.build(tuple(nodes.values()), self.service, self.rng, self._zone)
                with self.lock:
                    self.view, self._nodes, self._published = view, nodes, wanted
            self.source, self._known_at = source, now
            self.is_known = True  # now that the view is there: who waits for this looks without the lock
        return gone

    def heard(self, place: Place, healthy: bool) -> None:
        """A check has told whether a place is well; one that is not known is ignored."""
        with self._publishing:
            node = self._nodes.get(place)
            if node is not None and node.health is not healthy:
                node.health = healthy
                view = View.build(tuple(self._nodes.values()), self.service, self.rng, self._zone)
                with self.lock:
                    self.view = view

    def has(self, place: Place) -> bool:
        """Whether a place is one of its endpoints."""
        return place in self._nodes

    def why_empty(self, now: float) -> str:
        """Why there is no endpoint to call, in words."""
        said = "; ".join(self.warnings[:SHOWN])
        if (more := len(self.warnings) - SHOWN) > 0:
            said = f"{said}; and {more} more"
        said = f" ({said})" if said else ""
        if not self.is_known:
            return f"its endpoints are not known yet{said}"
        if self._nodes:
            return "no endpoint is to be called now"
        return f"it has no endpoint, as of {now - self._known_at:.0f} s ago{said or f' ({self.source})'}"

    def record(self, node: Node, permit: int, success: bool | None, now: float) -> None:
        """Tell a node's breaker a verdict. Under the lock."""
        node.breaker.record(permit, success, now, self.view.may_eject, self.rng)

    def count_keyless(self) -> None:
        """A call has brought no key."""
        with self.lock:
            self.keyless += 1

    def collect_orphans(self) -> None:
        """Count the ends of responses that were garbage-collected. Under the lock."""
        while self.orphans:
            self.orphans.popleft().finish()

    def forget(self) -> None:
        """After a fork, in the child: nobody holds the lock, and no attempt of the parent's is ours."""
        self.lock, self._publishing = Lock(), Lock()
        self.orphans.clear()
        for node in self._nodes.values():
            node.forget_open()

    def snapshot(self, now: float) -> ServiceSnapshot:
        """The state of the service as frozen values."""
        with self.lock:
            self.collect_orphans()
            nodes = tuple(_node_snapshot(node, now) for node in self.view.nodes)
            return ServiceSnapshot(
                name=self.service.name,
                nodes=nodes,
                in_flight=sum(node.in_flight for node in nodes),
                panic=False,
                budget_tokens=self.bucket.tokens,
                source=self.source,
                age=now - self._known_at if self.is_known else None,
                warnings=(*self.warnings, *self._doubts()),
            )

    def _doubts(self) -> list[str]:
        """What does not go well together: the balancer and the traffic, or the number of endpoints."""
        balancer, doubts = self.service.balancer, []
        if self.keyless:
            doubts.append(f"{self.keyless} call{'' if self.keyless == 1 else 's'} had no hash key")
        if isinstance(balancer, ConsistentHash):
            doubts += balancer.doubts(len(self.view.nodes))
        return doubts


def _node_snapshot(node: Node, now: float) -> NodeSnapshot:
    eligible = node.breaker.is_eligible(now)
    latencies = sorted(node.latencies)
    return NodeSnapshot(
        endpoint=str(node.endpoint),
        state=node.breaker.state,
        eligible=eligible,
        why=_why(node, eligible),
        in_flight=node.in_flight,
        attempts=node.attempts,
        failures=node.failures,
        ewma=node.ewma,
        weight=node.effective_weight,
        rate=node.rate(now),
        p50=quantile(latencies, 0.50),
        p99=quantile(latencies, 0.99),
    )


def _why(node: Node, eligible: bool) -> str:
    if node.breaker.state == "closed":
        return "closed"
    if node.breaker.state == "half_open":
        return "a probe is due" if eligible else "a probe is under way"
    return "the next call is the probe" if eligible else "ejected after failures in a row"
