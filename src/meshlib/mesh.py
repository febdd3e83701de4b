"""The mesh: a set of services, and the httpx clients that call them.

Decides nothing about a call; it holds what outlives clients, the live state of every service, and hands out transports
that share it. What runs beside the calls is in `upkeep`. Making a mesh starts no thread and opens no socket.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from meshlib.discovery.static import fixed
from meshlib.endpoint import Endpoint, Place, place_of
from meshlib.errors import UnknownService
from meshlib.fork import inherit, whole
from meshlib.service import Service, faults_among
from meshlib.validation import ConfigError, Fault

if TYPE_CHECKING:
    from typing import Unpack

    import httpx
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from meshlib.config.sources import Source
    from meshlib.core.cluster import Cluster
    from meshlib.core.snapshot import ServiceSnapshot
    from meshlib.decorators import CallOptions, Injecting, InjectingOr, InjectingOrAwaiting
    from meshlib.events import Event
    from meshlib.registry import Registration
    from meshlib.registry.entry import Alive
    from meshlib.transport.router import Router
    from meshlib.upkeep import Upkeep

F = TypeVar("F")

SPANS = ("both", "call", "attempt", "off")


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
        _check(services, inner, _wrong_options(passthrough, zone, spans))
        self._passthrough = passthrough
        self._clock = clock
        self._zone = zone
        self._inner = inner
        self._send_deadline = send_deadline
        self._rng = rng or random.Random()
        self._is_own_rng = rng is None
        _load(passthrough)
        with whole:
            self._clusters = {service.name: self._cluster_of(service) for service in services}
            self._upkeep = _upkeep_of(
                self._clusters,
                clock,
                spans=spans,
                endpoint_attributes=endpoint_attributes,
                call_duration=call_duration,
                meter_provider=meter_provider,
                tracer_provider=tracer_provider,
            )
        self._clients, self._telemetry = self._upkeep.clients, self._upkeep.telemetry
        inherit(self, Mesh._forget)

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
            with whole:
                mesh._upkeep.follow(source, content, found, mesh.update)
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
        with whole:
            from meshlib.decorators import MISSING, Injection

        if callable(service):
            raise TypeError('a service is missing: @mesh.call("orders")')
        fallback = given.pop("fallback", MISSING)
        return Injection(self, self._upkeep.shared, service, self._cluster(service), given, fallback)

    def snapshot(self) -> dict[str, ServiceSnapshot]:
        """What every service looks like now, by name: frozen values with `.to_dict()`."""
        from meshlib.review import review

        now, clusters = self._clock(), dict(self._clusters)
        for cluster in clusters.values():
            review(cluster, now)
        snapshots = {name: cluster.snapshot(now) for name, cluster in clusters.items()}
        if said := self._upkeep.warnings:
            snapshots = {name: replace(each, warnings=(*each.warnings, *said)) for name, each in snapshots.items()}
        self._upkeep.deliver(*clusters.values())
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
        return self._upkeep.delivery.subscribe(callback)

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
        _check(services, self._inner)
        with whole:
            from meshlib.rollout import roll_out

            concerned = roll_out(services, self._clusters, self._cluster_of, self._upkeep, self._clock())
        self._upkeep.deliver(*concerned)

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
        self._upkeep.deliver(cluster)

    def restore(self, service: str, place: Place | Endpoint | str) -> None:
        """End an ejection, whether it was made by hand or by the breaker: calls come back on a ramp. See `eject`."""
        cluster = self._cluster(service)
        cluster.unbar(place_of(place), self._clock())
        self._upkeep.deliver(cluster)

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
            deregister_after: seconds after which Consul forgets it if it stays critical; at least 60, at most a year.
            drain: seconds for others to hear that it is going, before the program hears of the signal.

        Raises:
            ConfigError: with every fault, as `register.<argument>`.
        """
        with whole:
            from meshlib.registry.entry import Entry

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
        with whole:  # whoever needs it first makes the control plane
            return self._upkeep.register(entry, owner=self)

    def wait_ready(self, timeout: float) -> None:
        """Start finding endpoints now, and block until every service has a first answer.

        Without it the first call to a service starts and waits, within its own time. Health checks start as well, and
        nobody waits for them.

        Args:
            timeout: seconds.

        Raises:
            ResolveError: if a service has none by then; it says which ones, and why.
        """
        self._upkeep.wait_ready(timeout)

    async def await_ready(self, timeout: float) -> None:
        """See `wait_ready`; on asyncio and trio."""
        await self._upkeep.await_ready(timeout)

    def close(self) -> None:
        """Stop what the mesh runs: endpoints are neither looked for nor checked any more, and calls make do with what
        was known last.

        Clients are closed on their own, as with httpx, but for those of decorated functions and frameworks. A `with`
        block lets it start again, at the next use. Callbacks have a second to hear what has happened, and go on
        hearing of calls that are still made.
        """
        self._upkeep.close()

    async def aclose(self) -> None:
        """See `close`."""
        await self._upkeep.aclose()

    def __enter__(self) -> Mesh:
        self._upkeep.reopen()
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

    def _forget(self) -> None:
        """After a fork, in the child. What was learned of the endpoints stays."""
        for cluster in self._clusters.values():
            cluster.forget()
        if self._is_own_rng:
            self._rng.seed()  # or all children would draw alike

    def _cluster_of(self, service: Service) -> Cluster:
        """A service's live state, with the endpoints that its settings hold."""
        from meshlib.core.cluster import Cluster

        cluster = Cluster(service, self._rng, self._zone)
        if (held := fixed(service.resolver)) is not None:
            cluster.publish(held.endpoints, held.source, self._clock())
        return cluster

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
        from meshlib.clients import settings

        found = settings(service, kwargs)
        if service is not None:
            self._cluster(service)
        return found


def _load(passthrough: bool) -> None:
    """Import what calls need: were it imported by the first of them, a fork would not wait for it."""
    import_module("concurrent.futures.thread")  # it hooks into forks, and must not do that amid one that waits
    with whole:
        for name in ("aio", "sync", "cookies", *(["passthrough"] if passthrough else [])):
            import_module(f"meshlib.transport.{name}")
        with suppress(ModuleNotFoundError):  # anyio has no public name for it, and imports it at the first wait
            import_module("anyio._backends._asyncio")


def _upkeep_of(clusters: dict[str, Cluster], clock: Callable[[], float], **told: Any) -> Upkeep:
    from meshlib.upkeep import Upkeep

    upkeep = Upkeep(clusters, clock, **told)
    upkeep.attend(clusters.values())
    return upkeep


_UNSEEN = Fault("tls", "must not ask for a SPIFFE id beside Mesh(inner=...), whose connections nobody could look at")


def _asks_for_id(service: Any) -> bool:
    tls = service.tls if isinstance(service, Service) else None
    return tls is not None and (tls.spiffe_id is not None or tls.trust_domain is not None)


def _wrong_options(passthrough: Any, zone: Any, spans: Any) -> Iterator[Fault]:
    if not isinstance(passthrough, bool):
        yield Fault("passthrough", f"must be True or False, got {passthrough!r}")
    if not isinstance(zone, str):
        yield Fault("zone", f"must be text, for example 'eu-west-1a', got {zone!r}")
    if spans not in SPANS:
        yield Fault("spans", f"must be one of {', '.join(map(repr, SPANS))}, got {spans!r}")


def _check(services: tuple[Any, ...], inner: Any, others: Iterable[Fault] = ()) -> None:
    """Refuse services that cannot be, alone, together or beside this `inner`; and what else is at fault, first."""
    faults = [*others, *faults_among(services)]
    if inner is not None:
        faults += (_UNSEEN.under(f"services.{each.name}") for each in services if _asks_for_id(each))
    if faults:
        raise ConfigError(faults)
