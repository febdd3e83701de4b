"""Whether a mesh's calls are observed, and by what.

Decides that, and finds out when it changes: a program may set its providers long after it has made its mesh. Until then
calls leave no trail, and OpenTelemetry is not even loaded here. Looking is cheap, and done once a second at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from meshlib.fork import inherited
from meshlib.telemetry.providers import may_change, recording

if TYPE_CHECKING:
    from meshlib.core.cluster import Cluster
    from meshlib.telemetry.observed import Source

EVERY = 1.0
"""Seconds from one look for providers to the next."""


class Telemetry:
    """What a mesh tells of its calls.

    Args:
        clusters: its services; each of them leads its calls to their telemetry.
        clock: its own.
        connections: idle and used ones by service.
        spans: which are made: `both`, `call`, `attempt` or `off`.
        endpoint_attributes: whether an attempt's duration has its endpoint as attributes.
        call_duration: whether the duration of calls is recorded beside that of attempts.
        meter_provider, tracer_provider: what to tell; None for the process's.

    Attributes:
        looks_at: when to `look` next, on the mesh's clock.
    """

    def __init__(
        self,
        clusters: Mapping[str, Cluster],
        clock: Callable[[], float],
        connections: Callable[[], Mapping[str, tuple[int, int]]],
        *,
        spans: str = "both",
        endpoint_attributes: bool = False,
        call_duration: bool = True,
        meter_provider: Any = None,
        tracer_provider: Any = None,
    ) -> None:
        self._clusters = clusters
        self._clock = clock
        self._connections = connections
        self._source: Source | None = None
        self._spans = spans
        self._recorded = {"endpoint_attributes": endpoint_attributes, "call_duration": call_duration}
        self._given = meter_provider, tracer_provider
        self._instruments: Any = None
        self._tracer: Any = None
        self._meters: Any = None
        self._tracers: Any = None
        self.looks_at = -inf
        self.forget()
        inherited.add(self)
        _all.add(self)

    def look(self) -> None:
        """See whether there are providers now; whoever comes while somebody else is at it goes on without."""
        if self._is_looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._is_looking.release()

    def lead(self, cluster: Cluster) -> None:
        """Have a service's calls leave their trails as it is set now, if calls leave any."""
        if self._meters is None and self._tracers is None:
            return
        from meshlib.telemetry.recorded import Recorder
        from meshlib.telemetry.trail import Line

        service, instruments = cluster.service, self._instruments
        scheme = "http" if service.tls is None else "https"
        recorder = None if instruments is None else Recorder(instruments, service.name, scheme, **self._recorded)
        cluster.telemetry = Line(service.name, scheme, recorder, self._tracer, self._spans)

    def forget(self) -> None:
        """After a fork, in the child: nobody is looking."""
        self._is_looking = Lock()

    def _look(self) -> None:
        meters, tracers = self._given
        found_meters = self._meters or recording(meters, "opentelemetry.metrics", "get_meter_provider")
        found_tracers = self._tracers or recording(tracers, "opentelemetry.trace", "get_tracer_provider")
        is_new = found_meters is not self._meters or found_tracers is not self._tracers
        self._meters, self._tracers = found_meters, found_tracers
        is_settled = (found_meters or not may_change(meters)) and (found_tracers or not may_change(tracers))
        self.looks_at = inf if is_settled else self._clock() + EVERY
        if is_new:
            self._begin()

    def _begin(self) -> None:
        """Have calls leave their trails from now on."""
        from meshlib.telemetry.observed import Source, sources
        from meshlib.telemetry.recorded import Instruments

        if self._meters is not None:  # those of before, if any, are the same
            meter = self._meters.get_meter("meshlib", _version())
            self._instruments = Instruments(meter)
            self._source = Source(self._clusters, self._clock, self._connections)
            sources.add(self._meters, meter, self._source)
        if self._tracers is not None:
            self._tracer = self._tracers.get_tracer("meshlib", _version())
        for cluster in list(self._clusters.values()):  # those that come meanwhile are led by who brings them
            self.lead(cluster)


_all: WeakSet[Telemetry] = WeakSet()


def look_all() -> None:
    """Providers were set: have every mesh see it at once."""
    for each in list(_all):
        each.look()


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("meshlib-http")
    except PackageNotFoundError:  # it runs from its sources
        return ""
