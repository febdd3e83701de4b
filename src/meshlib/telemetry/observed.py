"""The metrics that are read when they are collected: what the core has counted, and how things are.

Decides their names, units and attributes, one row of a table each. They cost a call nothing. Nothing here changes or
locks anything: a reader that is a moment late is no harm, and one that waited for a lock could hold up calls.

A meter takes the callbacks of an instrument once, so all meshes of a provider share them; each of them is held weakly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from math import inf, isfinite
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from weakref import WeakValueDictionary, finalize

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from meshlib.fork import inherited

if TYPE_CHECKING:
    from meshlib.core.cluster import Cluster
    from meshlib.core.node import Node

Rows = Iterable[tuple[Mapping[str, str | bool], float]]

Kind = Literal["counter", "gauge", "up_down_counter"]

ENDPOINT_STATES: tuple[str, ...] = ("closed", "open", "half_open", "unhealthy", "waiting", "taken_out")


REGISTRATION_STATES: tuple[str, ...] = ("waiting", "standby", "registered", "lost", "critical", "closed")
REGISTRATION_EVENTS: tuple[str, ...] = ("registered", "heartbeats", "forgotten", "errors")


class Registered(Protocol):
    """A registration of this process, as far as metrics go."""

    @property
    def name(self) -> str:
        """The service that it is registered for."""
        ...

    @property
    def state(self) -> str:
        """One of `REGISTRATION_STATES`."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each of `REGISTRATION_EVENTS` has come to pass."""
        ...


class Service(NamedTuple):
    """A service, and what is read with it.

    Attributes:
        cluster: the service's live state.
        now: the time.
        connections: tells how many are idle and how many in use, by service.
        is_followed: whether its endpoints are kept up to date, as they are until the mesh is closed.
    """

    cluster: Cluster
    now: float
    connections: Callable[[], Mapping[str, tuple[int, int]]]
    is_followed: bool


Named = tuple[tuple[str, str], Any]


class Source:
    """A mesh, as far as metrics go.

    Args:
        clusters: its services.
        clock: its own.
        connections: idle and used ones by service.
        registrations: those of this process.

    Attributes:
        is_followed: see `Service`.
    """

    is_followed = True

    def __init__(
        self,
        clusters: Mapping[str, Cluster],
        clock: Callable[[], float],
        connections: Callable[[], Mapping[str, tuple[int, int]]],
        registrations: Collection[Registered],
    ) -> None:
        self._clusters = clusters
        self._clock = clock
        self._connections = connections
        self._registrations = registrations

    def services(self) -> Iterable[Named]:
        """All services, each with the attribute that tells it apart, as they are now."""
        now = self._clock()
        for cluster in list(self._clusters.values()):
            if cluster.telemetry is not None:
                cluster.telemetry.collect()
            service = Service(cluster, now, self._connections, self.is_followed)
            yield ("server.address", cluster.service.name), service

    def registrations(self) -> Iterable[Named]:
        """All registrations, likewise."""
        for each in list(self._registrations):
            yield ("meshlib.registration.name", each.name), each


class Observed(NamedTuple):
    """One metric.

    Attributes:
        read: its values for a service, or whatever it is `of`.
        of: whose it is.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    read: Callable[[Any], Rows]
    of: Callable[[Source], Iterable[Named]] = Source.services


Known = WeakValueDictionary[int, Source]


class Sources:
    """The meshes that each provider sees."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}
        self.forget()
        inherited.add(self)

    def forget(self) -> None:
        """After a fork, in the child: nobody holds the lock."""
        self._lock = Lock()

    def add(self, provider: Any, meter: Meter, source: Source) -> None:
        """Have the provider's readers see this mesh as well, for as long as it lives."""
        with self._lock:
            known = self._known.get(id(provider))  # some cannot be hashed
            if known is None:
                known = WeakValueDictionary()
                finalize(provider, self._known.pop, id(provider), None).atexit = False
                for each in OBSERVED:
                    create: Any = getattr(meter, f"create_observable_{each.kind}")
                    create(each.name, [partial(_observations, each, known)], each.unit, each.description)
                self._known[id(provider)] = known
            known[id(source)] = source


sources = Sources()


def _observations(observed: Observed, known: Known, options: CallbackOptions) -> Iterable[Observation]:
    """Of what has the same name in several meshes, what can be added up is; of the rest the largest counts."""
    found: dict[tuple[tuple[str, str | bool], ...], float] = {}
    # Meshes come in other threads, which no iteration over what is weak survives: the references it gives.
    for source in filter(None, [reference() for reference in known.valuerefs()]):
        for name, subject in observed.of(source):
            for attributes, value in observed.read(subject):
                key = (name, *attributes.items())
                if observed.kind == "gauge":
                    found[key] = max(found.get(key, -inf), value)
                else:
                    found[key] = found.get(key, 0) + value
    return [Observation(value, dict(key)) for key, value in found.items()]


def _active(service: Service) -> Rows:
    cluster = service.cluster
    scheme = "http" if cluster.service.tls is None else "https"
    yield {"url.scheme": scheme}, max(0, cluster.in_flight - len(cluster.orphans))


def _connections(service: Service) -> Rows:
    counts = service.connections().get(service.cluster.service.name, (0, 0))
    for state, count in zip(("idle", "active"), counts, strict=True):
        yield {"http.connection.state": state}, count


def _endpoints(service: Service) -> Rows:
    counts: dict[str, int] = dict.fromkeys(ENDPOINT_STATES, 0)
    for node in service.cluster.view.nodes:
        counts[_state(node)] += 1
    for state, count in counts.items():
        yield {"meshlib.endpoint.state": state}, count


def _state(node: Node) -> str:
    if node.is_barred:
        return "taken_out"
    if node.health is False:
        return "unhealthy"
    return "waiting" if node.is_waiting else node.breaker.state


def _limit(service: Service) -> Rows:
    if isfinite(service.cluster.most):
        yield {}, service.cluster.most


def _refused(service: Service) -> Rows:
    refusals, shedder = service.cluster.tally.refusals, service.cluster.shedder
    yield {"meshlib.refused.by": "limit", "meshlib.enforced": True}, refusals["limit"]
    yield {"meshlib.refused.by": "throttle", "meshlib.enforced": True}, refusals["throttle"]
    yield {"meshlib.refused.by": "throttle", "meshlib.enforced": False}, shedder.would_refuse


def _ejections(service: Service) -> Rows:
    ejections = service.cluster.tally.ejections
    yield {"meshlib.ejection.method": "manual", "meshlib.enforced": True}, ejections["manual", True]
    for method in ("consecutive", "success_rate"):
        for enforced in (True, False):
            yield {"meshlib.ejection.method": method, "meshlib.enforced": enforced}, ejections[method, enforced]


def _transitions(service: Service) -> Rows:
    for state in ("closed", "open", "half_open"):
        yield {"meshlib.breaker.state": state}, service.cluster.tally.turns[state]


def _decisions(service: Service) -> Rows:
    """Most of them are never made, and each would be a series; those that were are a few."""
    for decision, count in list(service.cluster.tally.decisions.items()):
        yield {"meshlib.retry.decision": decision}, count


def _checks(service: Service) -> Rows:
    if service.cluster.service.health is not None:
        for passed, result in ((True, "passed"), (False, "failed")):
            yield {"meshlib.check.result": result}, service.cluster.tally.checks[passed]


def _answers(service: Service) -> Rows:
    if _is_dynamic(service.cluster):
        for answered, result in ((True, "answered"), (False, "failed")):
            yield {"meshlib.resolver.result": result}, service.cluster.tally.answers[answered]


def _dropped(service: Service) -> Rows:
    if _is_dynamic(service.cluster):
        yield {}, service.cluster.tally.dropped


def _changes(service: Service) -> Rows:
    yield {}, service.cluster.tally.changes


def _age(service: Service) -> Rows:
    if _is_followed(service):
        yield {}, max(0.0, service.now - service.cluster.known_at)


def _staleness(service: Service) -> Rows:
    if _is_followed(service):
        yield {}, max(0.0, service.now - service.cluster.holds_until)


def _is_followed(service: Service) -> bool:
    """Whether somebody is asked for its endpoints again and again, and has answered."""
    return service.is_followed and _is_dynamic(service.cluster) and service.cluster.is_known


def _is_dynamic(cluster: Cluster) -> bool:
    """Whether somebody is asked for its endpoints; a list of addresses never grows old."""
    return not getattr(cluster.service.resolver, "is_resolved", False)


def _panic(service: Service) -> Rows:
    yield {}, int(service.cluster.view.panic)


def _panics(service: Service) -> Rows:
    yield {}, service.cluster.panics


def _tokens(service: Service) -> Rows:
    yield {}, service.cluster.bucket.tokens


def _capacity(service: Service) -> Rows:
    yield {}, service.cluster.bucket.capacity


def _share(service: Service) -> Rows:
    yield {}, service.cluster.shedder.share(service.now)


def _died(service: Service) -> Rows:
    yield {}, service.cluster.tally.bodies_died


def _standing(registration: Registered) -> Rows:
    now = registration.state
    for state in REGISTRATION_STATES:
        yield {"meshlib.registration.state": state}, int(state == now)


def _happened(registration: Registered) -> Rows:
    for event in REGISTRATION_EVENTS:
        yield {"meshlib.registration.event": event}, registration.counts[event]


OBSERVED = (
    Observed(
        "http.client.active_requests",
        "up_down_counter",
        "{request}",
        "Number of active HTTP requests.",
        _active,
    ),
    Observed(
        "http.client.open_connections",
        "up_down_counter",
        "{connection}",
        "Number of outbound HTTP connections that are currently active or idle on the client.",
        _connections,
    ),
    Observed("meshlib.endpoints", "up_down_counter", "{endpoint}", "Endpoints by their state.", _endpoints),
    Observed("meshlib.endpoint_changes", "counter", "{change}", "How often the endpoints became others.", _changes),
    Observed(
        "meshlib.panic",
        "gauge",
        "{service}",
        "1 while breakers are ignored since too few endpoints are healthy.",
        _panic,
    ),
    Observed("meshlib.panics", "counter", "{panic}", "How often a panic began.", _panics),
    Observed(
        "meshlib.retry_budget.tokens",
        "gauge",
        "{token}",
        "What is left of the retry budget.",
        _tokens,
    ),
    Observed(
        "meshlib.retry_budget.capacity",
        "gauge",
        "{token}",
        "What the retry budget holds at most.",
        _capacity,
    ),
    Observed(
        "meshlib.retry_decisions",
        "counter",
        "{decision}",
        "Whether another attempt followed one that ended badly, and if not, why.",
        _decisions,
    ),
    Observed("meshlib.limit", "gauge", "{request}", "Attempts that may be in flight at once.", _limit),
    Observed(
        "meshlib.throttle.share",
        "gauge",
        "1",
        "The share of the calls that the throttle refuses, or would.",
        _share,
    ),
    Observed("meshlib.refused_calls", "counter", "{call}", "Calls that were not let in.", _refused),
    Observed("meshlib.ejections", "counter", "{ejection}", "Endpoints taken out.", _ejections),
    Observed(
        "meshlib.breaker.transitions",
        "counter",
        "{transition}",
        "Changes of breakers, by the new state.",
        _transitions,
    ),
    Observed("meshlib.health_checks", "counter", "{check}", "Health checks that were made.", _checks),
    Observed("meshlib.resolver.updates", "counter", "{update}", "What was heard from resolvers.", _answers),
    Observed(
        "meshlib.resolver.dropped",
        "counter",
        "{endpoint}",
        "Endpoints in resolvers' answers that may not be called.",
        _dropped,
    ),
    Observed("meshlib.resolver.age", "gauge", "s", "Since the endpoints were last confirmed.", _age),
    Observed(
        "meshlib.resolver.staleness", "gauge", "s", "For how long they lack a confirmation that was due.", _staleness
    ),
    Observed(
        "meshlib.client.body_failures",
        "counter",
        "{response}",
        "Responses whose body did not end well, after a good status.",
        _died,
    ),
    Observed(
        "meshlib.registrations",
        "up_down_counter",
        "{registration}",
        "Registrations of this process by their state.",
        _standing,
        Source.registrations,
    ),
    Observed(
        "meshlib.registration.events",
        "counter",
        "{event}",
        "What has come to pass at the registry.",
        _happened,
        Source.registrations,
    ),
)
"""All of them."""
