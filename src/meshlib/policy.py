"""The settings of a service: frozen, keyword-only, checked when they are built.

Decides what may be set, within which bounds, and what holds when nothing is set. It never acts on a setting: the
decisions are in `meshlib.core`, the sockets in `meshlib.transport`. All lengths of time are seconds as floats.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass, field
from ssl import SSLContext
from typing import Any

from meshlib.validation import Fault, check, instance, is_host_name, number, ruled, seconds, whole

REPEATABLE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
"""RFC 9110, section 9.2.2: sending these twice is meant to have the effect of sending them once."""

RETRIED_STATUS = frozenset({502, 503, 504})
"""Answers that say "not me, not now" rather than "not this request"."""

_PATH = re.compile(r"/[!-~]*\Z")


class _Checked:
    """Holds a setting against its rules as soon as it is built."""

    __slots__ = ()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeout(_Checked):
    """How long a call may take.

    Args:
        total: the whole call: every attempt, wait and the body, in seconds. Default 30.
        attempt: one attempt, from choosing an endpoint to the response's headers, in seconds, without the time that
            the caller's own body (a generator, a file) takes to come. Default 10.
        connect: establishing one connection, in seconds. Default 1.

    Raises:
        ConfigError: unless each is a finite number above 0.
    """

    total: float = seconds(30.0)
    attempt: float = seconds(10.0)
    connect: float = seconds(1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget(_Checked):
    """The bucket that bounds the extra attempts (retries and failovers) of a service.

    It starts full. An extra attempt takes its cost out, or is not made; a success after a retry gives its cost back,
    a success at the first try gives `refund`. The numbers are those of the AWS SDKs' standard retry mode, which has
    carried them through many outages.

    Args:
        capacity: tokens in a full bucket. Default 500, which pays for 35 retries at once.
        retry_cost: tokens for an extra attempt. Default 14.
        throttle_cost: tokens for an extra attempt after a throttling answer (429 or 503 with `Retry-After`). Default 5.
        refund: tokens that a success at the first try puts back. Default 1.

    Raises:
        ConfigError: unless capacity and costs are above 0 and the refund is at least 0.
    """

    capacity: float = ruled(number(above=0), default=500)
    retry_cost: float = ruled(number(above=0), default=14)
    throttle_cost: float = ruled(number(above=0), default=5)
    refund: float = ruled(number(at_least=0), default=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry(_Checked):
    """When a call is tried again.

    Args:
        max_attempts: attempts in all, the first included; failovers do not count. Default 3; 1 means no retry.
        on_status: answers worth another attempt. Default 502, 503, 504. (429 and 503 with a `Retry-After` that the
            deadline allows are retried as well.)
        methods: methods whose requests may be sent twice. Default GET, HEAD, OPTIONS, PUT, DELETE, TRACE.
        budget: what bounds all extra attempts of the service.
        buffer_body: bytes of a body that is not bytes already (a file, a generator) which are kept in memory so that
            it can be sent again; a longer one is sent once, unless the call's options say `replayable`. Default 65536.

    Raises:
        ConfigError: if a value is out of bounds; it names each.
    """

    max_attempts: int = ruled(whole(at_least=1), default=3)
    on_status: Collection[int] = ruled(
        lambda value: _each(value, whole(at_least=400, at_most=599), "statuses, for example {502, 503}"),
        default=RETRIED_STATUS,
    )
    methods: Collection[str] = ruled(
        lambda value: _each(value, _method, "methods in capitals, for example {'GET'}"), default=REPEATABLE_METHODS
    )
    budget: Budget = ruled(instance(Budget, "Budget()"), default=Budget())
    buffer_body: int = ruled(whole(at_least=0), default=65536)

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "on_status", frozenset(self.on_status))
        object.__setattr__(self, "methods", frozenset(self.methods))


@dataclass(frozen=True, kw_only=True, slots=True)
class Breaker(_Checked):
    """When a node is ejected, and for how long.

    Args:
        consecutive: failures in a row that open the breaker. Default 5.
        open_for: seconds until the first probe, +-50 % so that a fleet of callers does not probe as one. Default 2.
        max_open_for: `open_for` doubles with each failed probe up to this many seconds. Default 60.
        max_ejected: the largest share of the nodes that may be ejected at once; one always may be, the last never.
            Default 0.5.

    Raises:
        ConfigError: if a value is out of bounds; it names each.
    """

    consecutive: int = ruled(whole(at_least=1), default=5)
    open_for: float = seconds(2.0)
    max_open_for: float = seconds(60.0)
    max_ejected: float = ruled(number(at_least=0, at_most=1), default=0.5)


@dataclass(frozen=True, slots=True)
class HealthCheck(_Checked):
    """How the endpoints of a service are asked whether they are well, beside the calls.

    The first answer decides at once. An endpoint that is not well is not called, unless too few are well.

    Args:
        path: what is asked for, by GET: `"/healthz"`. A query is allowed, and not shown.
        interval: seconds from one check of an endpoint to the next, +-20 %. Default 10.
        timeout: seconds for a whole check, from the connection to the last byte. Default 1.
        healthy: passes in a row that bring an endpoint back. Default 2.
        unhealthy: failures in a row that take it out. Default 3.
        expect: the statuses that are a pass; no redirect is followed. Default 200 to 399.

    Raises:
        ConfigError: if a value is out of bounds; it names each.
    """

    path: str = field(repr=False)
    _: KW_ONLY
    interval: float = seconds(10.0)
    timeout: float = seconds(1.0)
    healthy: int = ruled(whole(at_least=1), default=2)
    unhealthy: int = ruled(whole(at_least=1), default=3)
    expect: Collection[int] = ruled(lambda value: _expected(value), default=range(200, 400))

    def __post_init__(self) -> None:
        faults = []
        if not isinstance(self.path, str) or not _PATH.match(self.path) or "#" in self.path:
            shown = repr(self.path.partition("?")[0]) if isinstance(self.path, str) else type(self.path).__name__
            faults.append(Fault("healthcheck.path", f"must be a path, for example '/healthz', got {shown}"))
        check(self, faults)
        if not isinstance(self.expect, range):
            object.__setattr__(self, "expect", frozenset(self.expect))


@dataclass(frozen=True, kw_only=True, slots=True)
class Connections(_Checked):
    """How many connections a client holds, and for how long.

    Args:
        max_per_endpoint: connections of one client to one endpoint, in use or idle. Default 100. A call that finds
            none free waits for one, as long as its deadline allows.
        max_idle: idle ones kept per endpoint. Default 20.
        keepalive: seconds an idle connection is kept. Default 60.
        max_age: seconds after which a connection is not used again. Default 600.

    Raises:
        ConfigError: if a value is out of bounds; it names each.
    """

    max_per_endpoint: int = ruled(whole(at_least=1), default=100)
    max_idle: int = ruled(whole(at_least=0), default=20)
    keepalive: float = seconds(60.0)
    max_age: float = seconds(600.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TLS(_Checked):
    """How a service is spoken to over TLS.

    The name in the certificate is checked against `server_name`, else the service's name, never the address.

    Args:
        verify: whom to trust: `"system"` (default), the path of a bundle of certificates, or an `ssl.SSLContext` of
            your own, which is then used as it is.
        server_name: the name that the endpoints' certificates carry. Default the service's name.
        cert: path of our own certificate, for services that ask for one.
        key: path of its key, if that is not in the same file.
        min_version: `"1.2"` (default) or `"1.3"`.

    Raises:
        ConfigError: if a value is not usable.
    """

    verify: str | SSLContext = ruled(
        lambda value: (
            None if isinstance(value, str | SSLContext) and value else "must be 'system', a path or a context"
        ),
        default="system",
    )
    server_name: str | None = ruled(lambda value: _optional_host(value), default=None)
    cert: str | None = ruled(lambda value: _optional_text(value, "a path"), default=None)
    key: str | None = ruled(lambda value: _optional_text(value, "a path"), default=None)
    min_version: str = ruled(lambda value: None if value in ("1.2", "1.3") else "must be '1.2' or '1.3'", default="1.2")

    def __post_init__(self) -> None:
        faults = []
        if self.key is not None and self.cert is None:
            faults.append(Fault("tls.cert", "must be given with a key, got none"))
        if isinstance(self.verify, SSLContext) and (self.cert is not None or self.min_version != "1.2"):
            faults.append(Fault("tls.verify", "must not be a context beside cert, key or min_version: set them in it"))
        check(self, faults)


def _optional_host(value: Any) -> str | None:
    usable = value is None or (isinstance(value, str) and is_host_name(value))
    return None if usable else "must be a host name or None"


def _optional_text(value: Any, what: str) -> str | None:
    return None if value is None or (isinstance(value, str) and value) else f"must be {what} or None"


def _each(values: Any, rule: Any, example: str) -> str | None:
    if isinstance(values, str) or not isinstance(values, Collection):
        return f"must be a set of {example}"
    return f"must be a set of {example}" if any(rule(value) for value in values) else None


def _expected(values: Any) -> str | None:
    example = "statuses, for example range(200, 400) or {200, 204}"
    wrong = _each(values, whole(at_least=200, at_most=599), example)
    return wrong or (None if values else f"must be a set of {example}")


def _method(value: Any) -> str | None:
    return None if isinstance(value, str) and value.isupper() else "must be a method"
