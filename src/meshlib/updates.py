"""What keeps the services of a mesh up to date: from the resolvers' answers to the view that calls see.

Decides what is done with a set of endpoints when it comes: the cluster takes it over, calls that wait for it go on, and
the connections to what is gone are drained. It never asks a resolver and never decides what is believed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

from meshlib.control import Control
from meshlib.core.chance import Rng
from meshlib.core.cluster import Cluster
from meshlib.discovery.feed import Feed, Membership, parts_of
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
        control: where that is done; it is started by whoever waits for a first answer.
        clients: whose connections are drained.
        clock: the mesh's.
        rng: for jitter.
    """

    def __init__(self, control: Control, clients: Clients, clock: Callable[[], float], rng: Rng) -> None:
        self._followed: dict[str, Followed] = {}
        self._control = control
        self._clients = clients
        self._clock = clock
        self._rng = rng
        self._loop: object = None
        self._watches: Watches | None = None
        control.starters.append(self._start)

    def follow(self, cluster: Cluster) -> None:
        """Have a service's endpoints found out by the resolver that its settings name now.

        What another one has found stays until this one has answered. It does no harm to say it twice, but not from two
        threads at once.
        """
        if not cluster.is_known:
            cluster.source = source_of(_resolver(cluster))
        followed = self._followed.get(cluster.service.name)
        if followed is None:
            followed = Followed(cluster, Ready(cluster, self._control.ensure))
            self._followed[cluster.service.name] = followed
        self._control.post(partial(self._begin, followed), start=False)

    def leave(self, cluster: Cluster) -> None:
        """Its settings hold its endpoints now: nobody is asked any more."""
        followed = self._followed.pop(cluster.service.name, None)
        if followed is not None:
            _without_trouble(cluster, self._clock())
            followed.ready.open()
            self._control.post(partial(self._end, followed), start=False)

    def drain(self, cluster: Cluster, gone: Iterable[Place]) -> None:
        """Drain the connections to places that settings have taken away; from any thread."""
        for place in gone:
            if self._control.ensure():
                self._control.post(partial(self._drain, cluster, place), start=False)
            else:  # nobody is there to cut what stays in use
                self._clients.drain(cluster.service.name, place)

    def wait(self, timeout: float) -> None:
        """Block until every service has a first answer; see `Mesh.wait_ready`."""
        until = time.monotonic() + timeout
        for each in list(self._followed.values()):
            each.ready.wait(max(0.0, until - time.monotonic()))
        self._check(timeout)

    async def wait_async(self, timeout: float) -> None:
        """See `wait`."""
        until = time.monotonic() + timeout
        for each in list(self._followed.values()):
            await each.ready.wait_async(max(0.0, until - time.monotonic()))
        self._check(timeout)

    def close(self) -> None:
        """Nobody asks any more: let those go who wait for an answer."""
        for each in list(self._followed.values()):
            if CLOSED not in each.cluster.warnings:
                each.cluster.warnings = (CLOSED, *each.cluster.warnings)
            each.ready.close()

    def _check(self, timeout: float) -> None:
        now = self._clock()
        clusters = [each.cluster for each in list(self._followed.values())]
        missing = [f"{each.service.name}: {each.why_empty(now)}" for each in clusters if not each.is_known]
        if missing:
            raise ResolveError(f"not ready after {timeout:g} s: {', '.join(missing)}")

    def _start(self, control: Control) -> None:
        for followed in list(self._followed.values()):
            self._begin(followed)

    def _begin(self, followed: Followed) -> None:
        """On the loop: have the service's resolver followed, in the place of another one if there was."""
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._loop, self._watches = loop, Watches(self._control, self._clock, self._rng)
        cluster = followed.cluster
        if self._followed.get(cluster.service.name) is not followed:
            return  # it was left again
        resolver = _resolver(cluster)
        if followed.loop is loop and followed.feed is not None and followed.resolver is resolver:
            followed.feed.service = cluster.service  # whose other settings may have changed
            return
        assert self._watches is not None
        before = followed.task if followed.loop is loop else None
        tell = partial(self._take_over, followed, resolver)
        followed.loop, followed.resolver, followed.since = loop, resolver, self._clock()
        followed.feed = Feed(cluster.service, resolver, self._watches, tell, self._clock)
        followed.task = self._control.supervise(f"following {cluster.service.name}", followed.feed.run)
        if before is not None:
            before.cancel()  # after the new one has begun: what both follow is not interrupted

    def _end(self, followed: Followed) -> None:
        """On the loop: ask nobody any more."""
        if followed.task is not None and followed.loop is asyncio.get_running_loop():
            followed.task.cancel()
        if followed.cluster.service.name not in self._followed:
            _without_trouble(followed.cluster, self._clock())  # of which the last answer may have told since

    def _take_over(self, followed: Followed, resolver: Resolver, found: Membership) -> None:
        cluster = followed.cluster
        if cluster.service.resolver is not resolver:
            return  # this is not asked any more
        now = self._clock()
        cluster.warnings = found.warnings
        cluster.asked(found.answers, found.errors, found.holds_until, found.dropped)
        cluster.set_trouble(found.trouble, now)
        endpoints = found.endpoints
        if endpoints is None and cluster.is_known and now - followed.since > cluster.service.max_stale:
            endpoints = ()  # the resolver before this one has found what there is, too long ago
        if endpoints is not None:
            self._publish(followed, resolver, found, endpoints)
        cluster.journal.deliver(cluster)

    def _publish(
        self, followed: Followed, resolver: Resolver, found: Membership, endpoints: tuple[Endpoint, ...]
    ) -> None:
        cluster = followed.cluster
        if cluster.view.nodes and not endpoints:
            why = "; ".join(found.warnings) or cluster.source
            logger.warning("%s has no endpoint any more (%s)", cluster.service.name, why)
        now, source = self._clock(), source_of(resolver)
        for place in cluster.publish(endpoints, source, now, known_at=found.known_at, found_by=resolver):
            self._drain(cluster, place)
        followed.ready.open()

    def _drain(self, cluster: Cluster, place: Place) -> None:
        name = cluster.service.name
        cut = self._clients.drain(name, place)

        def end() -> None:
            cut()
            if not cluster.has(place):
                self._clients.drain(name, place)()  # of a call that was on its way there when the place went

        asyncio.get_running_loop().call_later(GRACE, end)


class Followed:
    """A service whose endpoints are found out.

    Args:
        cluster: its live state.
        ready: what calls wait for before the first answer.

    Attributes:
        resolver: who is asked.
        feed: what asks.
        task: in which it does.
        loop: on which that is.
        since: since when this resolver is asked.
    """

    def __init__(self, cluster: Cluster, ready: Ready) -> None:
        self.cluster = cluster
        self.ready = ready
        self.resolver: Resolver | None = None
        self.feed: Feed | None = None
        self.task: asyncio.Task[None] | None = None
        self.loop: object = None
        self.since = 0.0


def is_same(resolver: Resolver, other: Resolver) -> bool:
    """Whether two resolvers ask the same of the same."""
    if type(resolver) is not type(other):
        return False
    parts, others = parts_of(resolver), parts_of(other)
    return len(parts) == len(others) and all(map(_asks_the_same, parts, others))


def _asks_the_same(part: Resolver, other: Resolver) -> bool:
    key = getattr(part, "watch_key", None)
    return part is other or (type(part) is type(other) and key is not None and key == getattr(other, "watch_key", None))


def _without_trouble(cluster: Cluster, now: float) -> None:
    cluster.warnings = ()
    cluster.asked(0, 0, math.inf)
    cluster.set_trouble("", now)


def _resolver(cluster: Cluster) -> Resolver:
    """The service's resolver, which the settings have made of whatever was given."""
    return cast("Resolver", cluster.service.resolver)
