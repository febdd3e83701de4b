"""What keeps the services of a mesh up to date: from the resolvers' answers to the view that calls see.

Decides what is done with a set of endpoints when it comes: the cluster takes it over, calls that wait for it go on, and
the connections to what is gone are drained. It never asks a resolver and never decides what is believed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

from meshlib.control import Control
from meshlib.core.chance import Rng
from meshlib.core.cluster import Cluster
from meshlib.discovery.feed import Feed, Membership
from meshlib.discovery.resolver import Resolver, source_of
from meshlib.discovery.watch import Watches
from meshlib.endpoint import Endpoint, Place
from meshlib.errors import ResolveError
from meshlib.transport.draining import GRACE, Clients
from meshlib.transport.ready import Ready

CLOSED = "the mesh is closed"

logger = logging.getLogger("meshlib.discovery")


class Updates:
    """Keeps clusters up to date, once `control` runs.

    Args:
        clusters: those whose endpoints are to be found out.
        control: where that is done; it is started by whoever waits for a first answer.
        clients: whose connections are drained.
        clock: the mesh's.
        rng: for jitter.
    """

    def __init__(
        self, clusters: Iterable[Cluster], control: Control, clients: Clients, clock: Callable[[], float], rng: Rng
    ) -> None:
        self._waits = [(cluster, Ready(cluster, control.ensure)) for cluster in clusters]
        for cluster, _ in self._waits:
            cluster.source = source_of(_resolver(cluster))
        self._clients = clients
        self._clock = clock
        self._rng = rng
        control.starters.append(self._start)

    def wait(self, timeout: float) -> None:
        """Block until every service has a first answer; see `Mesh.wait_ready`."""
        until = time.monotonic() + timeout
        for _, ready in self._waits:
            ready.wait(max(0.0, until - time.monotonic()))
        self._check(timeout)

    async def wait_async(self, timeout: float) -> None:
        """See `wait`."""
        until = time.monotonic() + timeout
        for _, ready in self._waits:
            await ready.wait_async(max(0.0, until - time.monotonic()))
        self._check(timeout)

    def close(self) -> None:
        """Nobody asks any more: let those go who wait for an answer."""
        for cluster, ready in self._waits:
            if CLOSED not in cluster.warnings:
                cluster.warnings = (CLOSED, *cluster.warnings)
            ready.close()

    def _check(self, timeout: float) -> None:
        now = self._clock()
        missing = [f"{each.service.name}: {each.why_empty(now)}" for each, _ in self._waits if not each.is_known]
        if missing:
            raise ResolveError(f"not ready after {timeout:g} s: {', '.join(missing)}")

    def _start(self, control: Control) -> None:
        watches = Watches(control, self._clock, self._rng)
        for cluster, ready in self._waits:
            tell = partial(self._take_over, cluster, ready)
            feed = Feed(cluster.service, _resolver(cluster), watches, tell, self._clock)
            control.supervise(f"following {cluster.service.name}", feed.run)

    def _take_over(self, cluster: Cluster, ready: Ready, found: Membership) -> None:
        cluster.warnings = found.warnings
        cluster.asked(found.answers, found.errors, found.holds_until)
        cluster.set_trouble(found.trouble, self._clock())
        if found.endpoints is not None:
            self._publish(cluster, ready, found, found.endpoints)
        cluster.journal.deliver(cluster)

    def _publish(self, cluster: Cluster, ready: Ready, found: Membership, endpoints: tuple[Endpoint, ...]) -> None:
        if cluster.view.nodes and not endpoints:
            why = "; ".join(found.warnings) or cluster.source
            logger.warning("%s has no endpoint any more (%s)", cluster.service.name, why)
        for place in cluster.publish(endpoints, cluster.source, self._clock(), known_at=found.known_at):
            self._drain(cluster, place)
        ready.open()

    def _drain(self, cluster: Cluster, place: Place) -> None:
        name = cluster.service.name
        cut = self._clients.drain(name, place)

        def end() -> None:
            cut()
            if not cluster.has(place):
                self._clients.drain(name, place)()  # of a call that was on its way there when the place went

        asyncio.get_running_loop().call_later(GRACE, end)


def _resolver(cluster: Cluster) -> Resolver:
    """The service's resolver, which the settings have made of whatever was given."""
    return cast("Resolver", cluster.service.resolver)
