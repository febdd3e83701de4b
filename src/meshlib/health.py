"""Active health checks: the nodes of a service are asked, again and again, whether they are well.

Decides when a node is asked and how, and which answers are a pass. What they add up to is decided in
`meshlib.core.health`, and what becomes of a node in its cluster. It never touches a breaker, whose evidence is the
calls themselves.

Every check has a connection of its own. One that is kept would say nothing of a node that accepts no new ones, most
servers close it before the next check comes, and with thousands of processes it would be one more that each node holds
for each of them.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import httpcore

from meshlib.core.chance import Rng
from meshlib.core.cluster import Cluster
from meshlib.core.health import Standing
from meshlib.core.node import Node
from meshlib.endpoint import Endpoint
from meshlib.policy import HealthCheck
from meshlib.transport.network import Bounded
from meshlib.transport.network_asyncio import AsyncioStream, connect
from meshlib.transport.once import ask
from meshlib.transport.ready import Ready
from meshlib.transport.stack import dial_to
from meshlib.transport.tls import IdentityError

if TYPE_CHECKING:
    from meshlib.control import Control
    from meshlib.service import Service

LOOK = 0.2
"""Seconds from one look at which nodes there are to the next."""

AT_ONCE = 0.3
"""Seconds over which the first checks of a few nodes are spread: a new endpoint is seen by many processes at once."""

PACE = 0.01
"""Seconds for each of the first checks of many nodes, so that a thousand take as long as a usual round of them."""

JITTER = 0.2
"""The share by which an interval is longer or shorter by chance, so that what began together drifts apart."""

MOST = 100
"""Checks of a service under way at once; those beyond it come later. It bounds the descriptors that checks take from
the calls, and by default it is what a thousand nodes come to when all of them hang."""

LONGEST_BODY = 65536
"""Bytes of an answer that are read; then the rest does not matter."""

STALL = 0.25
"""Seconds that a check may end after its time. Timers are never that late but in a process that stood still itself, and
then nothing is known of the node (rule B6)."""

OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""What is wrong here, and not there, when no connection can be opened."""

USER_AGENT = b"meshlib-health-check"


class Checks:
    """Checks the nodes of services, once `control` runs.

    Args:
        control: where that is done. It is started by the first call to one of them, which does not wait for it.
        clock: the mesh's.
        rng: for the jitter.
    """

    def __init__(self, control: Control, clock: Callable[[], float], rng: Rng) -> None:
        self._clusters: list[Cluster] = []
        self._begun: set[Cluster] = set()
        self._loop: object = None
        self._control = control
        self._clock = clock
        self._rng = rng
        self._starts: dict[Cluster, Ready] = {}
        control.starters.append(self._start)

    def follow(self, cluster: Cluster) -> None:
        """Check the nodes of one more service, as its settings say at any time. It does no harm to say it twice."""
        if cluster.pending is None and cluster not in self._starts:
            # Where endpoints are yet to be found, calls start the control plane already.
            self._starts[cluster] = Ready(cluster, self._control.ensure)
        if cluster not in self._clusters:
            self._clusters.append(cluster)
            self._control.post(partial(self._begin, cluster), start=False)

    def close(self) -> None:
        """Nobody checks any more, until a call finds that it can be started again."""
        for start in list(self._starts.values()):
            start.close()

    def _start(self, control: Control) -> None:
        for cluster in list(self._clusters):
            self._begin(cluster)

    def _begin(self, cluster: Cluster) -> None:
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._loop, self._begun = loop, set()  # what was begun has gone with its loop
        if cluster not in self._begun:
            self._begun.add(cluster)
            rounds = Rounds(cluster, self._control, self._clock, self._rng)
            self._control.supervise(f"checking {cluster.service.name}", rounds.run)


class Rounds:
    """The checks of one service, each node's in a task of its own. They begin anew when their settings change.

    Args:
        cluster: hears how its nodes are.
        control: runs the tasks.
        clock: the mesh's.
        rng: for the jitter.
    """

    def __init__(self, cluster: Cluster, control: Control, clock: Callable[[], float], rng: Rng) -> None:
        self._clock = clock
        self._cluster = cluster
        self._settings: HealthCheck | None = None
        self._control = control
        self._rng = rng
        self._room = asyncio.Semaphore(MOST)
        self._tasks: dict[Node, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Check for ever whatever nodes there are."""
        try:
            while True:
                settings = self._cluster.service.health
                if settings != self._settings:
                    self._end()
                    self._settings = settings
                if settings is not None:
                    self._follow(self._cluster.view.nodes, settings)
                await asyncio.sleep(LOOK)
        finally:
            self._end()

    def _end(self) -> None:
        while self._tasks:
            self._tasks.popitem()[1].cancel()

    def _follow(self, nodes: tuple[Node, ...], settings: HealthCheck) -> None:
        """Begin with nodes that are new, and have done with those that went."""
        if self._tasks.keys() == set(nodes):
            return
        for gone in self._tasks.keys() - set(nodes):
            self._tasks.pop(gone).cancel()
        new = [node for node in nodes if node not in self._tasks]
        spread = min(settings.interval, max(AT_ONCE, PACE * len(new)))
        for node in new:
            job = partial(self._attend, node, settings, spread * self._rng.random())
            self._tasks[node] = self._control.supervise(f"checking {self._cluster.service.name}", job)

    async def _attend(self, node: Node, settings: HealthCheck, delay: float) -> None:
        """Check a node for ever, the first time after `delay` seconds."""
        standing = Standing(settings)
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(delay)
            async with self._room:
                began = clock()
                finding = await check(self._cluster.service, settings, node.endpoint)
            if finding is not None:
                self._take(node, settings, standing, finding)
            delay = began - clock() + settings.interval * (1 - JITTER + 2 * JITTER * self._rng.random())

    def _take(self, node: Node, settings: HealthCheck, standing: Standing, finding: Finding) -> None:
        self._cluster.checked(node.endpoint.place, finding.passed, finding.reason)
        if standing.hear(finding.passed):
            self._cluster.heard(node.endpoint.place, finding.passed, self._clock(), finding.reason, by=settings)
            self._cluster.journal.deliver(self._cluster)


class Finding(NamedTuple):
    """What a check has found, and why in a few words."""

    passed: bool
    reason: str


async def check(service: Service, settings: HealthCheck, endpoint: Endpoint) -> Finding | None:
    """Ask an endpoint once; None if it was we who failed."""
    clock = asyncio.get_running_loop().time
    bounds = Bounded(clock, clock() + settings.timeout)
    try:
        stream = await connect(dial_to(service, endpoint), settings.timeout, bounds)
        try:
            stream.arm(bounds.deadline)
            status = await _ask(stream, settings.path, _host(service, endpoint))
        finally:
            stream.abort()
    except (httpcore.NetworkError, httpcore.RemoteProtocolError, httpcore.TimeoutException) as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in OURS:
            return None
        is_plain = not isinstance(error, httpcore.ConnectError) or isinstance(error, IdentityError)
        told = error if is_plain else error.__cause__
        finding = Finding(False, type(told).__name__)
    else:
        finding = Finding(status in settings.expect, f"status {status}")
    return None if clock() > bounds.deadline + STALL else finding


def _host(service: Service, endpoint: Endpoint) -> str:
    """The `Host` that calls to the service's own name send."""
    return str(endpoint) if service.host == "endpoint" else service.host or service.name


async def _ask(stream: AsyncioStream, path: str, host: str) -> int:
    """The status of an answer that came whole, or as much of it as is read."""
    headers = [
        (b"Host", host.encode("ascii")),
        (b"User-Agent", USER_AGENT),
        (b"Accept", b"*/*"),
        (b"Accept-Encoding", b"identity"),
        (b"Connection", b"close"),
    ]
    head, body = await ask(stream, b"GET", path.encode("ascii"), headers)
    length = 0
    async for piece in body:
        length += len(piece)
        if length > LONGEST_BODY:
            break
    return head.status_code
