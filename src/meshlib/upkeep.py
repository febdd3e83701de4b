"""What runs beside the calls of a mesh, from its first use to its end.

Decides which of it a mesh needs, and in which order it stops. What each part does is its own affair: the control
thread, who finds endpoints out and who checks them, registrations, a file that is followed, events, telemetry. Nothing
is begun that nobody needs, and no call waits for any of it, but for a first answer.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from meshlib.clients import SharedClients
from meshlib.core.cluster import Cluster
from meshlib.delivery import Delivery
from meshlib.discovery.static import fixed
from meshlib.endpoint import Place
from meshlib.review import review, reviewing
from meshlib.telemetry.watch import Telemetry
from meshlib.transport.draining import Clients

if TYPE_CHECKING:
    from meshlib.config.reading import Configuration
    from meshlib.config.reload import Reload, Update
    from meshlib.config.sources import Source
    from meshlib.control import Control
    from meshlib.health import Checks
    from meshlib.registry import Entry, Registration
    from meshlib.transport.ready import Ready
    from meshlib.updates import Updates


class Upkeep:
    """All that serves the calls of one mesh.

    Args:
        clusters: its services, by name; more may come.
        clock: the mesh's.
        told: what `Telemetry` takes.

    Attributes:
        clients: the connections of all clients.
        shared: the clients of decorated functions.
        delivery: tells the events.
        telemetry: tells of the calls.
        control, updates, checks, reload: as soon as something needs them.
    """

    def __init__(self, clusters: Mapping[str, Cluster], clock: Callable[[], float], **told: Any) -> None:
        self.clients = Clients()
        self.shared = SharedClients()
        self.delivery = Delivery()
        self.control: Control | None = None
        self.updates: Updates | None = None
        self.checks: Checks | None = None
        self.reload: Reload | None = None
        self._clusters = clusters
        self._clock = clock
        self._registrations: list[Registration] = []
        self._starts: list[Ready] = []
        self.telemetry = Telemetry(clusters, clock, self.clients.counts, self._registrations, **told)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What people should know of the file that is followed, if one is."""
        return () if self.reload is None else self.reload.warnings

    def attend(self, clusters: Collection[Cluster]) -> None:
        """Take in new services."""
        for cluster in clusters:
            self.telemetry.lead(cluster)
            self.delivery.attach(cluster)  # not before: that a list holds what it holds is no news
            review(cluster, self._clock())
        self._oversee(clusters)

    def adapt(self, clusters: Collection[Cluster], gone: Iterable[Iterable[Place]]) -> None:
        """Go by the settings that these services have got, and drain what is connected to places that are gone."""
        self._oversee(clusters)
        for cluster, places in zip(clusters, gone, strict=True):
            self.telemetry.lead(cluster)
            self.clients.adopt(cluster.service)
            review(cluster, self._clock())
            if places:
                self._finding().drain(cluster, places)

    def deliver(self, *clusters: Cluster) -> None:
        """Tell what has happened to services. Under no lock."""
        for cluster in clusters:
            self.delivery.deliver(cluster)

    def follow(self, source: Source, content: bytes, found: Configuration, update: Update) -> None:
        """Have a file followed from the first use on; see `Reload`. A call to any service is such a use."""
        from meshlib.config.reload import Reload
        from meshlib.transport.ready import Ready

        self.reload = following = Reload(source, content, found, update)
        control = self._controlled()
        control.starters.append(lambda control: control.supervise("following the file", following.run))
        clusters = [cluster for cluster in self._clusters.values() if cluster.pending is None]
        self._starts = [Ready(cluster, control.ensure) for cluster in clusters]

    def register(self, entry: Entry, owner: object) -> Registration:
        """A registration of this process, which lives as long as the mesh, its owner."""
        from meshlib.registry import Registration

        chance = random.SystemRandom()
        registration = Registration(entry, self._controlled(), clock=time.monotonic, rng=chance, owner=owner)
        self._registrations.append(registration)
        return registration

    def wait_ready(self, timeout: float) -> None:
        """See `Mesh.wait_ready`."""
        if self.control is not None:
            self.control.ensure()
        if self.updates is not None:
            self.updates.wait(timeout)

    async def await_ready(self, timeout: float) -> None:
        """See `Mesh.wait_ready`."""
        if self.control is not None:
            self.control.ensure()
        if self.updates is not None:
            await self.updates.wait_async(timeout)

    def close(self) -> None:
        """See `Mesh.close`. Others hear that this process goes while all else still runs."""
        for registration in self._leaving():
            registration.close()
        self._stop()
        self.delivery.wait()

    async def aclose(self) -> None:
        """See `close`."""
        try:
            for registration in self._leaving():
                await registration.aclose()
            await self.shared.aclose()
            if self.control is not None:
                await self.control.aclose()
        finally:
            self._stop()
        await self.delivery.wait_async()

    def reopen(self) -> None:
        """Let it start again, at the next use."""
        if self.control is not None:
            self.control.reopen()
        self.telemetry.reopen()

    def _leaving(self) -> list[Registration]:
        """Have all registrations end, at the same time."""
        for registration in self._registrations:
            registration.ask_to_leave()
        return self._registrations

    def _stop(self) -> None:
        if self.control is not None:
            self.control.close()
        if self.updates is not None:
            self.updates.close()
        if self.checks is not None:
            self.checks.close()
        self.shared.close()
        for start in self._starts:
            start.close()
        self.telemetry.close()

    def _oversee(self, clusters: Iterable[Cluster]) -> None:
        """Have the endpoints of services found out and checked, as they are set now, from the first use on."""
        for cluster in clusters:
            if fixed(cluster.service.resolver) is None:
                self._finding().follow(cluster)
            elif self.updates is not None:
                self.updates.leave(cluster)
            if cluster.service.health is not None:
                self._checking().follow(cluster)

    def _controlled(self) -> Control:
        if self.control is None:
            from meshlib.control import Control

            self.control = Control(random.SystemRandom())  # jitter must differ in every process, and forks
            look = reviewing(self._clusters.values(), self._clock)
            self.control.starters.append(lambda control: control.supervise("looking over the settings", look))
            weakref.finalize(self, self.control.close, 0.0).atexit = False  # it sees to that exit itself
        return self.control

    def _finding(self) -> Updates:
        if self.updates is None:
            from meshlib.updates import Updates

            self.updates = Updates(self._controlled(), self.clients, self._clock, random.SystemRandom())
        return self.updates

    def _checking(self) -> Checks:
        if self.checks is None:
            from meshlib.health import Checks

            self.checks = Checks(self._controlled(), self._clock, random.SystemRandom())
        return self.checks
