"""A service: a logical name, where its endpoints come from, and how calls to it are made.

Decides what the settings of a service are and whether they fit together. It never makes a call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from meshlib.core.balance import Balancer
from meshlib.core.balance.peak_ewma import PeakEwma
from meshlib.discovery.static import EXAMPLE, Static
from meshlib.endpoint import Endpoint
from meshlib.policy import TLS, Breaker, Connections, HealthCheck, Hedge, Limit, Retry, Throttle, Timeout
from meshlib.validation import (
    ConfigError,
    Fault,
    check,
    choice,
    instance,
    is_host_name,
    optional,
    ruled,
    seconds,
    shown,
    whole,
)

if TYPE_CHECKING:
    from meshlib.discovery.resolver import Resolver

_NAME = re.compile(r"[a-z0-9]([a-z0-9_-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9_-]*[a-z0-9])?)*\Z")


@dataclass(frozen=True)
class Service:
    """A service that the application calls by name.

    Args:
        name: the host in the URLs that reach it: `orders` in `http://orders/v1/7`. Lower case.
        resolver: where its endpoints come from: a list of `"host:port"` strings and `Endpoint`s; a resolver URL, such
            as `file:endpoints.toml`; a resolver; or a list of these two, the first of which are preferred.
        balancer: which endpoint is best. Default `PeakEwma()`.
        timeout: how long a call may take.
        retry: when it is tried again.
        breaker: when a node is ejected.
        throttle: when calls are refused here because the service is overloaded.
        health: how its endpoints are checked, beside the calls. Default not at all.
        hedge: when a call that takes long gets a backup request. Default None: never.
        limit: how many calls may be in flight at once. Default None: any number.
        connections: how many connections a client holds.
        tls: how it is spoken to over TLS. Default not at all.
        scheme: `"https"` is short for `tls=TLS()`. Default follows `tls`.
        host: the `Host` header: None (default) sends the service's name, `"endpoint"` the endpoint's address, any
            other string is sent as it is.
        min_healthy: with fewer healthy nodes of one priority than this, the next one is called. Default 1.
        max_stale: seconds that the last known endpoints are called for while the resolver has no answer. Default 3600.

    Raises:
        ConfigError: with every fault, as `services.<name>.<setting>`.
    """

    name: str
    resolver: str | Resolver | Iterable[str | Endpoint | Resolver]
    _: KW_ONLY
    balancer: Balancer = ruled(lambda value: _balancer(value), default=PeakEwma())
    timeout: Timeout = ruled(instance(Timeout, "Timeout(total=5.0)"), default=Timeout())
    retry: Retry = ruled(instance(Retry, "Retry(max_attempts=2)"), default=Retry())
    breaker: Breaker = ruled(instance(Breaker, "Breaker(consecutive=3)"), default=Breaker())
    throttle: Throttle = ruled(instance(Throttle, "Throttle(k=1.5)"), default=Throttle())
    health: HealthCheck | None = ruled(optional(instance(HealthCheck, "HealthCheck('/healthz')")), default=None)
    hedge: Hedge | None = ruled(optional(instance(Hedge, "Hedge(max_extra=0.02)")), default=None)
    limit: Limit | None = ruled(optional(instance(Limit, "Limit(100)")), default=None)
    connections: Connections = ruled(instance(Connections, "Connections(max_idle=5)"), default=Connections())
    tls: TLS | None = ruled(optional(instance(TLS, "TLS()")), default=None)
    scheme: str | None = ruled(optional(choice("http", "https")), default=None)
    host: str | None = ruled(lambda value: _host(value), default=None)
    min_healthy: int = ruled(whole(at_least=1), default=1)
    max_stale: float = seconds(3600.0)

    def __repr__(self) -> str:
        # Of a resolver that is not ours no more than the type: its own repr may show a token.
        told = {each.name: repr(getattr(self, each.name)) for each in fields(self) if each.repr}
        kind = type(self.resolver)
        if kind.__module__.partition(".")[0] != "meshlib":
            told["resolver"] = f"<{kind.__name__}>"
        return f"Service({', '.join(f'{name}={value}' for name, value in told.items())})"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.match(self.name) or not is_host_name(self.name):
            raise ConfigError([Fault("service.name", _bad_name(self.name))])
        faults: list[Fault] = []
        try:
            object.__setattr__(self, "resolver", _resolver(self.resolver))
        except ConfigError as error:
            faults += error.faults
        if self.scheme == "http" and self.tls is not None:
            faults.append(Fault("scheme", "must be 'https' or left out where tls is given, got 'http'"))
        if self.scheme == "https" and self.tls is None:
            object.__setattr__(self, "tls", TLS())
        try:
            check(self, faults)
        except ConfigError as error:
            prefix = f"services.{self.name}"
            inner = (Fault(fault.path.removeprefix("service."), fault.message) for fault in error.faults)
            raise ConfigError(fault.under(prefix) for fault in inner) from None


def _resolver(given: Any) -> Resolver:
    if isinstance(given, str):
        from meshlib.discovery.schemes import resolver_of

        return resolver_of(given)
    if isinstance(given, type) or hasattr(given, "resolve"):
        from meshlib.discovery.resolver import wrong_with

        if wrong := wrong_with(given):
            raise ConfigError([Fault("resolver", wrong)])
        return cast("Resolver", given)
    if isinstance(given, Iterable):
        return _listed(list(given))
    kind = f"an object of type {type(given).__name__}"  # whose repr may show a token
    raise ConfigError([Fault("resolver", f"must be a list of addresses or a resolver URL, {EXAMPLE}, got {kind}")])


def _listed(entries: list[Any]) -> Resolver:
    """A list of addresses, or of resolvers and their URLs."""
    from meshlib.discovery.schemes import is_url

    if wrong := [_web_address(place, each) for place, each in enumerate(entries) if _is_web(each) and not is_url(each)]:
        raise ConfigError(wrong)
    # A URL of a scheme that nobody knows is told so, rather than what an address looks like.
    urls = [hasattr(each, "resolve") or (isinstance(each, str) and ("://" in each or is_url(each))) for each in entries]
    if not any(urls):
        return Static(entries)
    if not all(urls):
        found = f"resolver[{urls.index(True)}] is a resolver, resolver[{urls.index(False)}] is not"
        instead = "addresses beside resolvers are 'static:10.0.0.1:8080,10.0.0.2:8080'"
        raise ConfigError([Fault("resolver", f"must hold addresses or resolver URLs, never both: {found}; {instead}")])
    from meshlib.discovery.failover import Failover

    return Failover(*entries)


def _is_web(entry: Any) -> bool:
    return isinstance(entry, str) and entry.startswith(("http://", "https://"))


def _web_address(place: int, url: str) -> Fault:
    tls = "; for https give the service tls=TLS()" if url.startswith("https:") else ""
    right = "must be 'host:port' without a scheme, for example '10.0.0.1:8080'"
    return Fault(f"resolver[{place}]", f"{right}, got {shown(url)}{tls}")


def _bad_name(name: Any) -> str:
    meant = f"; did you mean {name.lower()!r}?" if isinstance(name, str) and _NAME.match(name.lower()) else ""
    return f"must be a host name in lower case, for example 'orders', got {shown(name)}{meant}"


def _balancer(value: Any) -> str | None:
    if isinstance(value, type) or not callable(getattr(value, "prepare", None)):
        return "must be a balancer, for example PeakEwma()"
    return None


def _host(value: Any) -> str | None:
    usable = value is None or (isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value)
    return (
        None if usable and value != "" else "must be None, 'endpoint' or a header value, for example 'orders.internal'"
    )


def faults_among(services: Iterable[Any]) -> list[Fault]:
    """What is wrong with services that are declared together."""
    faults: list[Fault] = []
    names: set[str] = set()
    for position, service in enumerate(services):
        if not isinstance(service, Service):
            example = "Service('orders', ['10.0.0.1:8080'])"
            given = shown(service) if isinstance(service, str) else f"an object of type {type(service).__name__}"
            faults.append(Fault(f"services[{position}]", f"must be a Service, for example {example}, got {given}"))
            continue
        if service.name in names:
            faults.append(Fault(f"services.{service.name}", "must be declared once"))
        names.add(service.name)
        if service.tls is not None:
            faults += _bad_files(service.name, service.tls)
    return faults


def _bad_files(name: str, tls: TLS) -> list[Fault]:
    """Make the TLS context now: the first call would pay for it, and a file that is missing is found out here."""
    from meshlib.transport.tls import context_for

    try:
        context_for(tls)
    except ConfigError as error:
        return [fault.under(f"services.{name}") for fault in error.faults]
    return []
