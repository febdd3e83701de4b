"""The mesh: a set of services, and the httpx clients that call them.

Decides nothing about a call; it holds what outlives clients, the live state of every service, and hands out transports
that share it. Making one starts no thread and opens no socket.
"""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

from meshlib.discovery.static import Static
from meshlib.endpoint import Endpoint, Place, place_of
from meshlib.errors import UnknownService
from meshlib.fork import inherited
from meshlib.policy import TLS
from meshlib.service import Service
from meshlib.validation import ConfigError, Fault, shown

if TYPE_CHECKING:
    from typing import Unpack

    import httpx
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from meshlib.config.reload import Reload
    from meshlib.config.sources import Source
    from meshlib.control import Control
    from meshlib.core.cluster import Cluster
    from meshlib.core.renewal import Change
    from meshlib.core.snapshot import ServiceSnapshot
    from meshlib.decorators import CallOptions, Injecting, InjectingOr, InjectingOrAwaiting
    from meshlib.discovery.resolver import Resolver
    from meshlib.events import Event
    from meshlib.health import Checks
    from meshlib.registry import Registration
    from meshlib.registry.entry import Alive
    from meshlib.transport.ready import Ready
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
        passthrough: whether requests to other hosts go out as plain httpx would send them, instead of raising
            `UnknownService`. Default False.
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
        passthrough: bool = False,
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
        from meshlib.decorators import SharedClients
        from meshlib.delivery import Delivery
        from meshlib.telemetry.watch import Telemetry
        from meshlib.transport.draining import Clients

        _check(services, zone, spans, passthrough)
        self._passthrough = passthrough
        self._clock = clock
        self._zone = zone
        self._inner = inner
        self._send_deadline = send_deadline
        self._rng = rng or random.Random()
        self._is_own_rng = rng is None
        self._changing = threading.Lock()
        self._clusters = {service.name: self._cluster_of(service) for service in services}
        self._clients = Clients()
        self._delivery = Delivery()
        self._registrations: list[Registration] = []
        self._telemetry = Telemetry(
            self._clusters,
            clock,
            self._clients.counts,
            self._registrations,
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
        self._reload: Reload | None = None
        self._starts: list[Ready] = []
        self._attend(self._clusters.values())
        inherited.add(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], **settings: Any) -> Mesh:
        """A mesh as a mapping says, with the tables of a configuration file: `{"services": {"orders": {...}}}`.

        Args:
            mapping: the tables; docs/configuration.md lists them. Settings that no file can hold, such as functions,
                may stand in it as they are.
            settings: keywords of `Mesh`, which count for more.

        Raises:
            ConfigError: with every fault and its path.
        """
        from meshlib.config.reading import configured

        found = configured(mapping)
        return cls(*found.services, **{**found.options, **settings})

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], *, reload: bool = False, **settings: Any) -> Mesh:
        """A mesh as a TOML file says.

        Args:
            path: of the file. Relative paths in it begin at its folder.
            reload: whether the file is followed once the mesh is in use: a change is made by `update`, and a file that
                cannot be used changes nothing, and is complained of in the log and in the snapshot's warnings.
            settings: keywords of `Mesh`, which count for more.

        Raises:
            ConfigError: with every fault and its path.
            OSError: if the file cannot be read.
        """
        from meshlib.config.sources import of_file

        return cls._from(of_file(path), reload, settings)

    @classmethod
    def from_env(cls, prefix: str = "MESHLIB_", *, reload: bool = False, **settings: Any) -> Mesh:
        """A mesh as the environment says: `MESHLIB_SERVICES__ORDERS__RESOLVER`, over the file `MESHLIB_CONFIG`, if any.

        Args:
            prefix: what the names of the variables begin with.
            reload: whether that file is followed; see `from_toml`.
            settings: keywords of `Mesh`, which count for more.

        Raises:
            ConfigError: with every fault and its path, or its variable.
            OSError: if the file cannot be read.
        """
        from meshlib.config.sources import of_environment

        return cls._from(of_environment(prefix), reload, settings)

    @classmethod
    def _from(cls, source: Source, reload: bool, settings: dict[str, Any]) -> Mesh:
        content = source.content()
        try:
            found = source.read(content)
        except ConfigError as error:
            if source.path is not None:
                error.add_note(f"in {source.path}")
            raise
        mesh = cls(*found.services, **{**found.options, **settings})
        if reload and source.path is not None:
            from meshlib.config.reload import Reload
            from meshlib.transport.ready import Ready

            mesh._reload = following = Reload(source, content, found, mesh.update)
            control = mesh._controlled()
            control.starters.append(lambda control: control.supervise("following the file", following.run))
            clusters = [cluster for cluster in mesh._clusters.values() if cluster.pending is None]
            mesh._starts = [Ready(cluster, control.ensure) for cluster in clusters]
        return mesh

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
        if self._passthrough:
            from meshlib.transport.passthrough import PassingTransport

            return PassingTransport(self._router())
        from meshlib.transport.sync import MeshTransport

        return MeshTransport(self._router())

    def async_transport(self) -> httpx.AsyncBaseTransport:
        """A transport for any `httpx.AsyncClient`; see `transport`."""
        if self._passthrough:
            from meshlib.transport.passthrough import AsyncPassingTransport

            return AsyncPassingTransport(self._router())
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

        now, clusters = self._clock(), dict(self._clusters)
        for cluster in clusters.values():
            review(cluster, now)
        snapshots = {name: cluster.snapshot(now) for name, cluster in clusters.items()}
        if self._reload is not None and (said := self._reload.warnings):
            snapshots = {name: replace(each, warnings=(*each.warnings, *said)) for name, each in snapshots.items()}
        for cluster in clusters.values():
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

    def update(self, *services: Service) -> None:
        """Replace the settings of services, or add services, while calls go on; from any thread.

        Endpoints that stay keep what was learned of them, and their connections; so do the retry budget and the
        throttle. A call under way keeps those settings that concern it alone: its timeouts, when it is repeated, its
        key, `host` and `tls`. What all calls share goes by the new ones at once. Another resolver takes effect with its
        first answer. Clients that are there already can call what is added. No service is taken away by this.

        Args:
            services: the settings as a whole, by the name of the service.

        Raises:
            ConfigError: if something is not a service, is given twice, or cannot be used; then nothing has changed.
        """
        from meshlib.core.renewal import renew
        from meshlib.review import review

        _check(services, self._zone, "both", self._passthrough)
        with self._changing:
            now = self._clock()
            new = {each.name: self._cluster_of(each) for each in services if each.name not in self._clusters}
            changes = [change for each in services if each.name in self._clusters for change in self._change_to(each)]
            gone = renew(changes, now)
            changed = [change.cluster for change in changes]
            self._clusters.update(new)
            self._attend(new.values())
            self._oversee(changed)
            for cluster, places in zip(changed, gone, strict=True):
                self._telemetry.lead(cluster)
                self._clients.adopt(cluster.service)
                review(cluster, now)
                if places:
                    self._finding().drain(cluster, places)
            for cluster in new.values():
                cluster.announce(now)
        for cluster in (*new.values(), *changed):
            self._delivery.deliver(cluster)

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

    def register(
        self,
        name: str,
        *,
        port: int,
        host: str | None = None,
        tags: Sequence[str] = (),
        meta: Mapping[str, str] | None = None,
        weight: int = 1,
        check: Literal["ttl", "http", "tcp"] = "ttl",
        at: str = "consul://127.0.0.1:8500",
        ttl: float = 10.0,
        alive: Alive | None = None,
        check_path: str = "/healthz",
        check_interval: float = 10.0,
        deregister_after: float = 60.0,
        drain: float = 0.3,
    ) -> Registration:
        """Have others find the running process, for as long as the registration is entered.

        Entered by `with` or `async with`, which returns at once. The process is registered as soon as its own port
        answers, and deregistered before the program hears of SIGTERM or SIGINT. Whatever the registry does, it goes on.

        Args:
            name: of the service.
            port: at which the application listens.
            host: at which others reach it. Default the address of the registry's agent.
            tags: of this instance.
            meta: texts by names; `zone` is what other meshes go by.
            weight: its share of the calls, a whole number. Default 1.
            check: how Consul knows that it is well: by our heartbeats ("ttl"), or by asking for `check_path` ("http")
                or connecting ("tcp") itself.
            at: the agent, as `consul://host:port?token_file=` or `consul+https://host:port?ca_file=`.
            ttl: seconds without a heartbeat after which it is critical. They come three times as often, while the event
                loop that entered the registration answers; without one, while the port does.
            alive: a function, sync or async, that is true while the application is well; asked before each heartbeat,
                beside the loop. Default None.
            check_path, check_interval: for Consul's own checks; seconds.
            deregister_after: seconds after which Consul forgets it if it stays critical; at least 60.
            drain: seconds for others to hear that it is going, before the program hears of the signal.

        Raises:
            ConfigError: with every fault, as `register.<argument>`.
        """
        from meshlib.registry import Entry, Registration

        entry = Entry(
            name,
            port=port,
            host=host,
            tags=tags,
            meta={} if meta is None else meta,
            weight=weight,
            check=check,
            at=at,
            ttl=ttl,
            alive=alive,
            check_path=check_path,
            check_interval=check_interval,
            deregister_after=deregister_after,
            drain=drain,
        )
        registration = Registration(
            entry, self._controlled(), clock=time.monotonic, rng=random.SystemRandom(), owner=self
        )
        self._registrations.append(registration)
        return registration

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
        for registration in self._leaving():
            registration.close()
        self._stop()
        self._delivery.wait()

    def _leaving(self) -> list[Registration]:
        """Have all registrations end, at the same time."""
        for registration in self._registrations:
            registration.ask_to_leave()
        return self._registrations

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._updates is not None:
            self._updates.close()
        if self._checks is not None:
            self._checks.close()
        self._shared.close()
        for start in self._starts:
            start.close()
        self._telemetry.close()

    async def aclose(self) -> None:
        """See `close`."""
        try:
            for registration in self._leaving():
                await registration.aclose()
            await self._shared.aclose()
            if self._control is not None:
                await self._control.aclose()
        finally:
            self._stop()
        await self._delivery.wait_async()

    def forget(self) -> None:
        """After a fork, in the child; called by itself. What was learned of the endpoints stays."""
        self._changing = threading.Lock()
        for cluster in self._clusters.values():
            cluster.forget()
        if self._is_own_rng:
            self._rng.seed()  # or all children would draw alike

    def __enter__(self) -> Mesh:
        if self._control is not None:
            self._control.reopen()
        self._telemetry.reopen()
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

    def _cluster_of(self, service: Service) -> Cluster:
        """A service's live state, with the endpoints that its settings hold."""
        from meshlib.core.cluster import Cluster

        cluster = Cluster(service, self._rng, self._zone)
        if (fixed := _fixed(service)) is not None:
            cluster.publish(fixed.endpoints, fixed.source, self._clock())
        return cluster

    def _attend(self, clusters: Collection[Cluster]) -> None:
        """Take in new services."""
        from meshlib.review import review

        for cluster in clusters:
            self._telemetry.lead(cluster)
            self._delivery.attach(cluster)  # not before: that a list holds what it holds is no news
            review(cluster, self._clock())
        self._oversee(clusters)

    def _change_to(self, service: Service) -> Iterable[Change]:
        """The change of a service to these settings, unless they are the same."""
        from meshlib.core.renewal import Change, differing
        from meshlib.updates import is_same

        cluster = self._clusters[service.name]
        before: Any = cluster.service.resolver
        if is_same(before, cast("Resolver", service.resolver)):
            service = replace(service, resolver=before)  # so that whoever asks it goes on
        if changed := differing(cluster.service, service):
            fixed = _fixed(service) if "resolver" in changed else None
            held = (None, "") if fixed is None else (fixed.endpoints, fixed.source)
            yield Change(cluster, service, changed, *held)

    def _oversee(self, clusters: Iterable[Cluster]) -> None:
        """Have the endpoints of services found out and checked, as they are set now, from the first use on."""
        for cluster in clusters:
            if _fixed(cluster.service) is None:
                self._finding().follow(cluster)
            elif self._updates is not None:
                self._updates.leave(cluster)
            if cluster.service.health is not None:
                self._checking().follow(cluster)

    def _controlled(self) -> Control:
        if self._control is None:
            from meshlib.control import Control
            from meshlib.review import reviewing

            self._control = Control(random.SystemRandom())  # jitter must differ in every process, and forks
            look = reviewing(self._clusters.values(), self._clock)
            self._control.starters.append(lambda control: control.supervise("looking over the settings", look))
            weakref.finalize(self, self._control.close, 0.0).atexit = False  # it sees to that exit itself
        return self._control

    def _finding(self) -> Updates:
        if self._updates is None:
            from meshlib.updates import Updates

            self._updates = Updates(self._controlled(), self._clients, self._clock, random.SystemRandom())
        return self._updates

    def _checking(self) -> Checks:
        if self._checks is None:
            from meshlib.health import Checks

            self._checks = Checks(self._controlled(), self._clock, random.SystemRandom())
        return self._checks

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


def _fixed(service: Service) -> Static | None:
    """The resolver of a service whose settings hold its endpoints, so that nobody has to be asked."""
    resolver = service.resolver
    return resolver if isinstance(resolver, Static) and resolver.is_resolved else None


def _check(services: tuple[Any, ...], zone: Any, spans: Any, passthrough: Any) -> None:
    faults: list[Fault] = []
    if not isinstance(passthrough, bool):
        faults.append(Fault("passthrough", f"must be True or False, got {passthrough!r}"))
    if not isinstance(zone, str):
        faults.append(Fault("zone", f"must be text, for example 'eu-west-1a', got {zone!r}"))
    if spans not in SPANS:
        faults.append(Fault("spans", f"must be one of {', '.join(map(repr, SPANS))}, got {spans!r}"))
    names: set[str] = set()
    for position, service in enumerate(services):
        if not isinstance(service, Service):
            example = "Service('orders', ['10.0.0.1:8080'])"
            given = shown(service) if isinstance(service, str) else f"an object of type {type(service).__name__}"
            faults.append(Fault(f"services[{position}]", f"must be a Service, for example {example}, got {given}"))
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
