"""The mesh: a set of services, and the httpx clients that call them.

Decides nothing about a call; it holds what outlives clients, the live state of every service, and hands out transports
that share it. Making one starts no thread and opens no socket.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from meshlib.discovery.static import Static
from meshlib.endpoint import Endpoint, Place, place_of
from meshlib.errors import UnknownService
from meshlib.fork import inherited
from meshlib.policy import TLS
from meshlib.service import Service
from meshlib.validation import ConfigError, Fault

if TYPE_CHECKING:
    from typing import Unpack

    import httpx
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from meshlib.control import Control
    from meshlib.core.cluster import Cluster
    from meshlib.core.snapshot import ServiceSnapshot
    from meshlib.decorators import CallOptions, Injecting, InjectingOr, InjectingOrAwaiting
    from meshlib.events import Event
    from meshlib.health import Checks
    from meshlib.transport.router import Router
    from meshlib.updates import Updates

F = TypeVar("F")

SPANS = ("both", "call", "attempt", "off")

NOT_FOR_CLIENTS = {
    "transport": "the mesh is its transport; for another one under it see Mesh(inner=...)",
    "proxy": "calls would go past the mesh",
    "verify": "TLS is a setting of the service, Service(tls=TLS(verify=...))",
    "cert": "TLS is a setting of the service, Service(tls=TLS(cert=...))",
    "limits": "connections are a setting of the service, Service(connections=Connections(...))",
    "http2": "a mesh speaks HTTP/1.1",
    "http1": "a mesh speaks HTTP/1.1",
}
"""What `httpx.Client` takes that would go past the mesh, or have no effect without a word."""


class Mesh:
    """A set of services.

    One mesh serves sync and async code, any number of clients, threads and event loops; what is learned of an endpoint
    by one of them is known to all.

    Args:
        services: the services that may be called.
        zone: where this process is. Endpoints of the same zone are called before others of their priority, while at
            least half of them may be. Default none: zones do not count.
        inner: makes the transport for an endpoint, in place of meshlib's own connections: an `httpx.BaseTransport` for
            sync clients, an `httpx.AsyncBaseTransport` for async ones, or both in one. It is closed with the client. An
            async one is cancelled at the deadline; a sync one is told the time left as its timeouts, and has to keep
            them. Default none.
        send_deadline: whether the next hop is told, in `x-meshlib-deadline-ms`, what is left of a call's time. Default
            True.
        spans: what of a call is traced: "both" itself and its attempts, only the "call", only each "attempt", or "off".
        endpoint_attributes: whether `http.client.request.duration` is told apart by endpoint. Default False: every
            endpoint would be some series more.
        call_duration: whether `meshlib.client.call.duration` is recorded beside it. Default True.
        meter_provider: where metrics go. Default the process's, once it has one.
        tracer_provider: where spans go. Default likewise.
        clock: seconds that only grow; deadlines and all state go by it. Default `time.monotonic`.
        rng: the source of every draw. Default a new `random.Random()`.

    Raises:
        ConfigError: if something is not a service, two have the same name, a setting cannot be, or a certificate
            cannot be used.
    """

    def __init__(
        self,
        *services: Service,
        zone: str = "",
        inner: Callable[[Endpoint], Any] | None = None,
        send_deadline: bool = True,
        spans: Literal["both", "call", "attempt", "off"] = "both",
        endpoint_attributes: bool = False,
        call_duration: bool = True,
        meter_provider: MeterProvider | None = None,
        tracer_provider: TracerProvider | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        from meshlib.core.cluster import Cluster
        from meshlib.decorators import SharedClients
        from meshlib.delivery import Delivery
        from meshlib.review import review
        from meshlib.telemetry.watch import Telemetry
        from meshlib.transport.draining import Clients

        _check(services, zone, spans)
        self._clock = clock
        self._inner = inner
        self._send_deadline = send_deadline
        self._rng = rng or random.Random()
        self._is_own_rng = rng is None
        self._clusters = {service.name: Cluster(service, self._rng, zone) for service in services}
        self._clients = Clients()
        self._delivery = Delivery()
        self._telemetry = Telemetry(
            self._clusters,
            clock,
            self._clients.counts,
            spans=spans,
            endpoint_attributes=endpoint_attributes,
            call_duration=call_duration,
            meter_provider=meter_provider,
            tracer_provider=tracer_provider,
        )
        self._shared = SharedClients()
        self._control: Control | None = None
        self._updates: Updates | None = None
        self._checks: Checks | None = None
        to_find = []
        for cluster in self._clusters.values():
            resolver = cluster.service.resolver
            if isinstance(resolver, Static) and resolver.is_resolved:
                cluster.publish(resolver.endpoints, resolver.source, clock())
            else:
                to_find.append(cluster)
            self._delivery.attach(cluster)  # not before: that a list holds what it holds is no news
            review(cluster, clock())
        to_check = [cluster for cluster in self._clusters.values() if cluster.service.health is not None]
        if to_find or to_check:
            self._oversee(to_find, to_check)
        inherited.add(self)

    def client(self, service: str | None = None, **kwargs: Any) -> httpx.Client:
        """A plain `httpx.Client` whose requests go through the mesh.

        Args:
            service: becomes the base URL, `http://<service>`; None for a client without one.
            kwargs: go to httpx: headers, auth, follow_redirects, event_hooks ... Its timeouts are off unless given,
                since the service's `Timeout` bounds the whole call; those given stay upper bounds of each operation.

        Raises:
            UnknownService: if the service is not declared.
            TypeError: for a keyword that would go past the mesh, or have no effect: `transport`, `proxy`, `verify`,
                `cert`, `limits`, `http1`, `http2`.
        """
        import httpx

        from meshlib.transport.cookies import spare

        client = httpx.Client(transport=self.transport(), **self._settings(service, kwargs))
        spare(client)
        return client

    def async_client(self, service: str | None = None, **kwargs: Any) -> httpx.AsyncClient:
        """A plain `httpx.AsyncClient` whose requests go through the mesh; see `client`."""
        import httpx

        from meshlib.transport.cookies import spare

        client = httpx.AsyncClient(transport=self.async_transport(), **self._settings(service, kwargs))
        spare(client)
        return client

    def transport(self) -> httpx.BaseTransport:
        """A transport for any `httpx.Client`. Its connections are its own; closing the client closes them."""
        from meshlib.transport.sync import MeshTransport

        return MeshTransport(self._router())

    def async_transport(self) -> httpx.AsyncBaseTransport:
        """A transport for any `httpx.AsyncClient`; see `transport`."""
        from meshlib.transport.aio import AsyncMeshTransport

        return AsyncMeshTransport(self._router())

    @overload
    def call(self, service: str, **options: Unpack[CallOptions]) -> Injecting: ...

    @overload
    def call(  # type: ignore[overload-overlap]  # an awaitable is never the fallback itself
        self, service: str, *, fallback: Callable[..., Awaitable[F]], **options: Unpack[CallOptions]
    ) -> InjectingOrAwaiting[F]: ...

    @overload
    def call(self, service: str, *, fallback: Callable[..., F], **options: Unpack[CallOptions]) -> InjectingOr[F]: ...

    @overload
    def call(self, service: str, *, fallback: F, **options: Unpack[CallOptions]) -> InjectingOr[F]: ...

    def call(self, service: str, **given: Any) -> Any:
        """Decorate a function so that it is called without its first parameter, and gets a client of a service there.

        An `async def` gets an `httpx.AsyncClient`, any other function an `httpx.Client`. All functions of a mesh share
        one client for each service, which is closed with the mesh and keeps no cookies.

        Args:
            service: its name.
            given: `fallback`, and what `options` takes, for the calls to this service that the function makes.
                `hash_key` may be a function of the function's arguments; it gets those that it names.

                `fallback` is what the function returns instead of raising an `httpx.TransportError`, or an
                `httpx.HTTPStatusError` of a 5xx: a value, or a function of the function's arguments, which gets those
                that it names, and the exception as `error`. It does not answer for `UnknownService`.

        Raises:
            UnknownService: if the service is not declared.
            TypeError, ConfigError: for an option that cannot be; when a function is decorated, if it is a method or a
                generator, has no parameter for a client, has one of another type, or does not go with an option.
        """
        from meshlib.decorators import UNSAID, Injection

        if callable(service):
            raise TypeError('a service is missing: @mesh.call("orders")')
        fallback = given.pop("fallback", UNSAID)
        return Injection(self, self._shared, service, self._cluster(service), given, fallback)

    def snapshot(self) -> dict[str, ServiceSnapshot]:
        """What every service looks like now, by name: frozen values with `.to_dict()`."""
        from meshlib.review import review

        now = self._clock()
        for cluster in self._clusters.values():
            review(cluster, now)
        snapshots = {name: cluster.snapshot(now) for name, cluster in self._clusters.items()}
        for cluster in self._clusters.values():
            self._delivery.deliver(cluster)
        return snapshots

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Have a function called with everything that happens to the services from now on; see `meshlib.events`.

        It is called by a thread of its own, one event at a time, those of a service in their order: it may take its
        time, make calls through this mesh, or unsubscribe. What it raises is logged once per class, to
        `meshlib.events`.

        Args:
            callback: a function of an event; not an async one.

        Returns:
            What ends it, from any thread and as often as you like. One call may be under way then, or just beginning.

        Raises:
            TypeError: if `callback` cannot be called, or is async.
        """
        return self._delivery.subscribe(callback)

    def eject(self, service: str, place: Place | Endpoint | str) -> None:
        """Take an endpoint out by hand: it gets no call until `restore`, not even in panic. What it works on goes on.

        Args:
            service: its name.
            place: the endpoint, its `(host, port)`, or `"host:port"`.

        Raises:
            UnknownService: if the service is not declared.
            ValueError: if it has no such endpoint now.
        """
        cluster = self._cluster(service)
        cluster.bar(place_of(place), self._clock())
        self._delivery.deliver(cluster)

    def restore(self, service: str, place: Place | Endpoint | str) -> None:
        """End an ejection, whether it was made by hand or by the breaker: calls come back on a ramp. See `eject`."""
        cluster = self._cluster(service)
        cluster.unbar(place_of(place), self._clock())
        self._delivery.deliver(cluster)

    def wait_ready(self, timeout: float) -> None:
        """Start finding endpoints now, and block until every service has a first answer.

        Without it the first call to a service starts and waits, within its own time. Health checks start as well, and
        nobody waits for them.

        Args:
            timeout: seconds.

        Raises:
            ResolveError: if a service has none by then; it says which ones, and why.
        """
        if self._control is not None:
            self._control.ensure()
        if self._updates is not None:
            self._updates.wait(timeout)

    async def await_ready(self, timeout: float) -> None:
        """See `wait_ready`; on asyncio and trio."""
        if self._control is not None:
            self._control.ensure()
        if self._updates is not None:
            await self._updates.wait_async(timeout)

    def close(self) -> None:
        """Stop what the mesh runs: endpoints are neither looked for nor checked any more, and calls make do with what
        was known last.

        Clients are closed on their own, as with httpx, but for those of decorated functions. `with mesh:` lets it start
        again, at the next use. Callbacks have a second to hear what has happened, and go on hearing of calls that are
        still made.
        """
        self._stop()
        self._delivery.wait()

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._updates is not None:
            self._updates.close()
        if self._checks is not None:
            self._checks.close()
        self._shared.close()

    async def aclose(self) -> None:
        """See `close`."""
        try:
            await self._shared.aclose()
            if self._control is not None:
                await self._control.aclose()
        finally:
            self._stop()
        await self._delivery.wait_async()

    def forget(self) -> None:
        """After a fork, in the child; called by itself. What was learned of the endpoints stays."""
        for cluster in self._clusters.values():
            cluster.forget()
        if self._is_own_rng:
            self._rng.seed()  # or all children would draw alike

    def __enter__(self) -> Mesh:
        if self._control is not None:
            self._control.reopen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Mesh:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Mesh of {', '.join(self._clusters) or 'no services'}>"

    def _oversee(self, to_find: list[Cluster], to_check: list[Cluster]) -> None:
        """Have the endpoints of services found out, and those of services checked, from the first use on."""
        from meshlib.control import Control
        from meshlib.review import reviewing

        rng = random.SystemRandom()  # jitter must differ in every process, and forks
        self._control = Control(rng)
        if to_find:
            from meshlib.updates import Updates

            self._updates = Updates(to_find, self._control, self._clients, self._clock, rng)
        if to_check:
            from meshlib.health import Checks

            self._checks = Checks(to_check, self._control, self._clock, rng)
        look = reviewing(tuple(self._clusters.values()), self._clock)
        self._control.starters.append(lambda control: control.supervise("looking over the settings", look))
        weakref.finalize(self, self._control.close, 0.0).atexit = False  # the control plane sees to that exit itself

    def _cluster(self, service: str) -> Cluster:
        if not isinstance(service, str) or service not in self._clusters:
            raise UnknownService(str(service), self._clusters)
        return self._clusters[service]

    def _router(self) -> Router:
        from meshlib.transport.router import Router

        return Router(
            self._clusters,
            self._clock,
            send_deadline=self._send_deadline,
            inner=self._inner,
            clients=self._clients,
            telemetry=self._telemetry,
            owner=self,
        )

    def _settings(self, service: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        for name in kwargs.keys() & NOT_FOR_CLIENTS.keys():
            raise TypeError(f"a mesh's client takes no {name!r}: {NOT_FOR_CLIENTS[name]}")
        if service is not None:
            self._cluster(service)
            kwargs = {"base_url": f"http://{service}", **kwargs}
        # The environment's proxies and credentials are for the world outside; a mesh knows its endpoints.
        return {"timeout": None, "trust_env": False, **kwargs}


def _check(services: tuple[Any, ...], zone: Any, spans: Any) -> None:
    faults: list[Fault] = []
    if not isinstance(zone, str):
        faults.append(Fault("zone", f"must be text, for example 'eu-west-1a', got {zone!r}"))
    if spans not in SPANS:
        faults.append(Fault("spans", f"must be one of {', '.join(map(repr, SPANS))}, got {spans!r}"))
    names: set[str] = set()
    for position, service in enumerate(services):
        if not isinstance(service, Service):
            example = "Service('orders', ['10.0.0.1:8080'])"
            faults.append(Fault(f"services[{position}]", f"must be a Service, for example {example}, got {service!r}"))
        elif service.name in names:
            faults.append(Fault(f"services.{service.name}", "must be declared once"))
        else:
            names.add(service.name)
        if isinstance(service, Service) and service.tls is not None:
            faults += _bad_files(service.name, service.tls)
    if faults:
        raise ConfigError(faults)


def _bad_files(name: str, tls: TLS) -> list[Fault]:
    """Make the TLS context now: the first call would pay for it, and a file that is missing is found out here."""
    from meshlib.transport.tls import context_for

    try:
        context_for(tls)
    except ConfigError as error:
        return [fault.under(f"services.{name}") for fault in error.faults]
    return []
