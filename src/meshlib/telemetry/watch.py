"""Whether a mesh's calls are observed, and by what.

Decides that, and finds out when it changes: a program may set its providers long after it has made its mesh. Until then
calls leave no trail, and OpenTelemetry is not even loaded here. Looking is cheap, and done once a second at most.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from meshlib.fork import inherited, whole
from meshlib.telemetry.providers import may_change, recording
from meshlib.validation import ConfigError, Fault

if TYPE_CHECKING:
    from meshlib.core.cluster import Cluster
    from meshlib.telemetry.observed import Registered, Source
    from meshlib.telemetry.recorded import Instruments

logger = logging.getLogger("meshlib.telemetry")

EVERY = 1.0
"""Seconds from one look for providers to the next."""


class Telemetry:
    """What a mesh tells of its calls.

    Args:
        clusters: its services; each of them leads its calls to their telemetry.
        clock: its own.
        connections: idle and used ones by service.
        registrations: those of this process; more may come.
        spans: which are made: `both`, `call`, `attempt` or `off`.
        endpoint_attributes: whether an attempt's duration has its endpoint as attributes.
        call_duration: whether the duration of calls is recorded beside that of attempts.
        meter_provider, tracer_provider: what to tell; None for the process's.

    Attributes:
        looks_at: when to `look` next, on the mesh's clock.

    Raises:
        ConfigError: for what is no provider.
    """

    def __init__(
        self,
        clusters: Mapping[str, Cluster],
        clock: Callable[[], float],
        connections: Callable[[], Mapping[str, tuple[int, int]]],
        registrations: Collection[Registered] = (),
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
        self._registrations = registrations
        self._source: Source | None = None
        self._instruments: Instruments | None = None
        self._spans = spans
        self._recorded = {"endpoint_attributes": endpoint_attributes, "call_duration": call_duration}
        self._given = meter_provider, tracer_provider
        self._meters: Any = None
        self._tracers: Any = None
        self._tracer: Any = None
        self._is_followed = True
        _check(meter_provider, tracer_provider)
        self.looks_at = -inf
        self.forget()
        inherited.add(self)
        _all[id(self)] = self

    def look(self) -> None:
        """See whether there are providers now; whoever comes while somebody else is at it goes on without.

        It is a call that looks: what goes wrong with a provider is no fault of the call's.
        """
        if self._is_looking.acquire(blocking=False):
            try:
                self._look()
            except Exception:  # of the provider's
                self.looks_at = inf
                logger.exception("OpenTelemetry's providers cannot be used; calls go unobserved")
            finally:
                self._is_looking.release()

    def lead(self, cluster: Cluster) -> None:
        """Have a service's calls leave their trails as it is set now, if calls leave any."""
        if self._meters is None and self._tracers is None:
            return
        from meshlib.telemetry.recorded import Recorder
        from meshlib.telemetry.trail import Line

        service, instruments, before = cluster.service, self._instruments, cluster.telemetry
        scheme = "http" if service.tls is None else "https"
        recorder = None if instruments is None else Recorder(instruments, service.name, scheme, **self._recorded)
        cluster.telemetry = Line(service.name, scheme, recorder, self._tracer, self._spans)
        if before is not None:
            before.collect()

    def collect(self) -> None:
        """End the trails of calls that were garbage-collected."""
        for cluster in list(self._clusters.values()):
            if cluster.telemetry is not None:
                cluster.telemetry.collect()

    def close(self) -> None:
        """The mesh is closed: that its endpoints grow old is no news."""
        self._follow(False)
        self.collect()

    def reopen(self) -> None:
        """It is not any more."""
        self._follow(True)

    def forget(self) -> None:
        """After a fork, in the child: nobody is looking, and the trails of calls under way are the parent's."""
        self._is_looking = Lock()
        for cluster in self._clusters.values():
            cluster.telemetry = None
            self.lead(cluster)

    def _look(self) -> None:
        meters, tracers = self._given
        found_meters = self._meters or recording(meters, "opentelemetry.metrics", "get_meter_provider")
        found_tracers = self._tracers or recording(tracers, "opentelemetry.trace", "get_tracer_provider")
        is_new = found_meters is not self._meters or found_tracers is not self._tracers
        if is_new:
            _load()  # before a child that is forked meanwhile sees that there are providers
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
            self._source = Source(self._clusters, self._clock, self._connections, self._registrations)
            self._source.is_followed = self._is_followed
            sources.add(self._meters, meter, self._source)
        if self._tracers is not None:
            self._tracer = self._tracers.get_tracer("meshlib", _version())
        for cluster in list(self._clusters.values()):  # those that come meanwhile are led by who brings them
            self.lead(cluster)

    def _follow(self, is_followed: bool) -> None:
        self._is_followed = is_followed
        if self._source is not None:
            self._source.is_followed = is_followed


_all: WeakValueDictionary[int, Telemetry] = WeakValueDictionary()


def look_all() -> None:
    """Providers were set: have every mesh see it at once."""
    for each in filter(None, [reference() for reference in _all.valuerefs()]):
        each.look()


def _check(meter_provider: Any, tracer_provider: Any) -> None:
    made_by = (("meter_provider", meter_provider, "get_meter"), ("tracer_provider", tracer_provider, "get_tracer"))
    faults = [
        Fault(name, f"must be one of OpenTelemetry's providers, got a {type(given).__name__}")
        for name, given, method in made_by
        if given is not None and not hasattr(given, method)
    ]
    if faults:
        raise ConfigError(faults)


def _load() -> None:
    """Import what calls leave their trails with."""
    with whole:
        for name in ("observed", "recorded", "trail"):
            import_module(f"meshlib.telemetry.{name}")


def _version() -> str:
    with whole:  # looking imports more, as it goes
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("meshlib-http")
        except PackageNotFoundError:  # it runs from its sources
            return ""
