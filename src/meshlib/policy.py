"""The settings of a service: frozen, keyword-only, checked when they are built.

Decides what may be set, within which bounds, and what holds when nothing is set. It never acts on a setting: the
decisions are in `meshlib.core`, the sockets in `meshlib.transport`. All lengths of time are seconds as floats.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, dataclass, field
from ssl import SSLContext
from typing import Any

from meshlib.validation import (
    Fault,
    Told,
    check,
    choice,
    held_to,
    instance,
    is_host_name,
    number,
    optional,
    ruled,
    seconds,
    trust_domain_of,
    whole,
)

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
    """The bucket that bounds the extra attempts (retries, failovers and hedges) of a service.

    It starts full. An extra attempt takes its cost out, or is not made; a call that succeeds in the end gives back what
    its last retry and its failovers cost, or `refund` if it needed none. The numbers are those of the AWS SDKs'
    standard retry mode, which has carried them through many outages.

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

    `wait`, `stop` and `on` take tenacity's strategies (`wait_fixed(0.5) + wait_random(0, 1)`, `stop_after_delay(5) |
    stop_when_event_set(event)`), or any function of a `tenacity.RetryCallState`. They are asked only after a failure,
    and only about a retry, never about a failover. What they raise leaves the call. The state's `attempt_number` counts
    as `max_attempts` does; its times are on the mesh's clock, and begin with the first attempt; there is no
    `retry_object` and no `fn`.

    Args:
        max_attempts: attempts in all, the first included; failovers do not count. Default 3; 1 means no retry.
        on_status: answers worth another attempt. Default 502, 503, 504. (429 and 503 with a `Retry-After` that the
            deadline allows are retried as well.)
        methods: methods whose requests may be sent twice. Default GET, HEAD, OPTIONS, PUT, DELETE, TRACE.
        wait: seconds before each retry, also the first one on another endpoint. A `Retry-After` wins over it, and if
            the deadline comes before its end the call ends at once. Default None: a draw between nothing and 25 ms that
            doubles up to 250 ms, and nothing before the first retry on another endpoint.
        stop: when there is to be no further retry; `max_attempts` holds as well. Default None.
        on: what is retried, in the place of `on_status`: it is asked about every failure of a request that may be
            repeated. The outcome is the httpx exception that would leave the call, or an `httpx.Response` with the
            status 429 or 5xx (but 501 and 505) or one in `on_status`. Its body is still unread: `content`, `text`
            and `json()` raise `httpx.ResponseNotRead`. (429 and 503 with a `Retry-After` are retried without asking.)
            Default None.
        budget: what bounds all extra attempts of the service.
        buffer_body: bytes of a body that is not bytes already (a file, a generator) which are kept in memory so that
            it can be sent again; a longer one is sent once, unless the call's options say `replayable`. Default 65536.

    Raises:
        ConfigError: if a value is out of bounds; it names each.
    """

    max_attempts: int = ruled(whole(at_least=1), default=3)
    on_status: Collection[int] = ruled(
        Told(
            lambda value: _each(value, whole(at_least=400, at_most=599), "statuses, for example {502, 503}"),
            {"type": "array", "items": {"type": "integer", "minimum": 400, "maximum": 599}},
        ),
        default=RETRIED_STATUS,
    )
    methods: Collection[str] = ruled(
        lambda value: _each(value, _method, "methods in capitals, for example {'GET'}"), default=REPEATABLE_METHODS
    )
    wait: Callable[[Any], float] | None = ruled(
        lambda value: _strategy(value, "tenacity.wait_fixed(0.5)"), default=None
    )
    stop: Callable[[Any], bool] | None = ruled(
        lambda value: _strategy(value, "tenacity.stop_after_delay(5)"), default=None
    )
    on: Callable[[Any], bool] | None = ruled(
        lambda value: _strategy(value, "tenacity.retry_if_exception_type(httpx.ReadTimeout)"), default=None
    )
    budget: Budget = ruled(instance(Budget, "Budget()"), default=Budget())
    buffer_body: int = ruled(whole(at_least=0), default=65536)

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "on_status", frozenset(self.on_status))
        object.__setattr__(self, "methods", frozenset(self.methods))


@dataclass(frozen=True, kw_only=True, slots=True)
class Breaker(_Checked):
    """When a node is ejected, for how long, and when nobody is.

    Args:
        consecutive: failures in a row that open the breaker. Default 5.
        success_rate: share of successes below which it opens as well, once there are `min_calls` to judge by. Default
            0.8.
        window: seconds of which the rate is taken. Default 30.
        min_calls: outcomes within the window that it takes. Default 10, which a caller reaches who makes a call in
            three seconds.
        open_for: seconds until the first probe, +-50 % so that a fleet of callers does not probe as one. Default 2.
        max_open_for: `open_for` doubles with each failed probe up to this many seconds. Default 60. (While calls run on
            a lower level, a probe is never more than 15 s away.)
        ramp: seconds in which a node that has come back gets its full weight again, in ten steps from a tenth. Default
            10; 0 for at once.
        max_ejected: the largest share of the nodes of one priority that may be ejected at once; one always may be, the
            last never. Default 0.5. It does not count while a lower level has a node to go to.
        panic: with a smaller share of healthy nodes than this, and no lower level to go to, breakers and checks are
            ignored: the survivors would not bear the load of all. Default 0.5; 0 for never.
        slow_call: seconds after which an answer counts as a failure, whatever it says. Default None: none does.
        enforce: False to count what would be ejected, and eject nothing. Default True.

    Raises:
        ConfigError: if a value is out of bounds; it names each.
    """

    consecutive: int = ruled(whole(at_least=1), default=5)
    success_rate: float = ruled(number(at_least=0, at_most=1), default=0.8)
    window: float = seconds(30.0)
    min_calls: int = ruled(whole(at_least=1), default=10)
    open_for: float = seconds(2.0)
    max_open_for: float = seconds(60.0)
    ramp: float = ruled(number(at_least=0), default=10.0)
    max_ejected: float = ruled(number(at_least=0, at_most=1), default=0.5)
    panic: float = ruled(number(at_least=0, at_most=1), default=0.5)
    slow_call: float | None = ruled(optional(number(above=0)), default=None)
    enforce: bool = ruled(lambda value: None if isinstance(value, bool) else "must be True or False", default=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Throttle(_Checked):
    """When calls are refused here because the service is overloaded.

    It learns from signs of overload only: timeouts, 429, and 503 with a `Retry-After` or a marker of overload. While
    more requests than `k` times the accepted ones were made, as many calls are refused at once, with `Overloaded`, as
    bring them back to that; at most nine in ten. It acts after about ten such requests more than there were others, or
    after half a second where there are many, and lets go as fast. The law and the `k` are those of Google's "Site
    Reliability Engineering", chapter "Handling Overload"; its memory is shorter, so that it lets go within seconds.

    Args:
        k: requests per accepted request that are let through. Default 2; less sheds sooner, and 1 sheds whatever
            is not accepted.
        window: seconds without a sign of overload after which everything is forgotten. Default 120.
        enforce: whether calls are refused. Default True; False only counts those that would be.

    Raises:
        ConfigError: unless `k` is at least 1, the window above 0 and `enforce` a bool.
    """

    k: float = ruled(number(at_least=1), default=2.0)
    window: float = seconds(120.0)
    enforce: bool = ruled(instance(bool, "False"), default=True)


@dataclass(frozen=True, slots=True)
class Limit(_Checked):
    """How many calls may be in flight at once. One more is refused at once, with `Overloaded`; none waits in a queue.

    Args:
        max_in_flight: calls to the service, from their start to the end of their bodies. Required. A call counts by its
            attempts that are under way: a backup request is one more, and a call that waits for its retry is none.
        per_endpoint: attempts on one endpoint; one that has so many is not chosen. Default None: no such limit.

    Raises:
        ConfigError: unless each is a whole number and at least 1.
    """

    max_in_flight: int = field(metadata=held_to(whole(at_least=1)))  # type checkers see by `field` that it is required
    _: KW_ONLY
    per_endpoint: int | None = ruled(optional(whole(at_least=1)), default=None)


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
            faults.append(
                Fault("healthcheck.path", f"must be a path without spaces and '#', for example '/healthz', got {shown}")
            )
        check(self, faults)
        if not isinstance(self.expect, range):
            object.__setattr__(self, "expect", frozenset(self.expect))


@dataclass(frozen=True, kw_only=True, slots=True)
class Hedge(_Checked):
    """When a call that takes long gets a backup request at another endpoint; the first good answer of the two wins.

    Only calls that may be repeated, whose body is bytes, and only while another endpoint is well. The retry budget pays
    for it like for a retry, and gets it back when the backup was what brought the answer.

    Args:
        max_extra: the share of calls that may get one. It is made once a call has taken longer than all but this share
            of the last some hundred did; before 50 answers nothing is hedged. Default 0.02.
        after: seconds after which it is made, in place of the share: then the retry budget is all that bounds how many
            there are. Default None.

    Raises:
        ConfigError: unless `max_extra` is above 0 and at most 1, and `after` above 0 or None.
    """

    max_extra: float = ruled(number(above=0, at_most=1), default=0.02)
    after: float | None = ruled(optional(number(above=0)), default=None)


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


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
class TLS(_Checked):
    """How a service is spoken to over TLS.

    The name in the certificate is checked against `server_name`, else the service's name, never the address; or its
    SPIFFE id is, if one is asked for. The files may be replaced at any time: new connections use what they hold then.

    Args:
        verify: whom to trust: `"system"` (default), the path of a bundle of certificates, or an `ssl.SSLContext` of
            your own, which is then used as it is.
        server_name: the name that the endpoints' certificates carry, which is asked for in the handshake. Default the
            service's name.
        cert: path of our own certificate, for services that ask for one.
        key: path of its key, if that is not in the same file.
        spiffe_id: the SPIFFE id that the endpoints' certificates carry, in place of a name.
        trust_domain: the same for any SPIFFE id of this trust domain.
        min_version: `"1.2"` (default) or `"1.3"`.

    Raises:
        ConfigError: if a value is not usable.
    """

    verify: str | SSLContext = ruled(lambda value: _trust(value), default="system")
    server_name: str | None = ruled(lambda value: _optional_host(value), default=None)
    cert: str | None = ruled(lambda value: _optional_path(value), default=None)
    key: str | None = ruled(lambda value: _optional_path(value), default=None)
    spiffe_id: str | None = ruled(lambda value: _optional_spiffe_id(value), default=None)
    trust_domain: str | None = ruled(lambda value: _optional_trust_domain(value), default=None)
    min_version: str = ruled(choice("1.2", "1.3"), default="1.2")

    def __post_init__(self) -> None:
        faults = []
        if self.key is not None and self.cert is None:
            faults.append(
                Fault("tls.cert", "must be given with a key, TLS(cert='client.pem', key='client.key'), got none")
            )
        if isinstance(self.verify, SSLContext) and (self.cert is not None or self.min_version != "1.2"):
            faults.append(Fault("tls.verify", "must not be a context beside cert, key or min_version: set them in it"))
        if self.spiffe_id is not None and self.trust_domain is not None:
            faults.append(Fault("tls.trust_domain", "must be left out where spiffe_id is given"))
        is_spiffe = self.spiffe_id is not None or self.trust_domain is not None
        if is_spiffe and isinstance(self.verify, SSLContext) and self.verify.check_hostname:
            faults.append(
                Fault("tls.verify", "must be a context without check_hostname where a SPIFFE id is asked for")
            )
        check(self, faults)


_A_PATH = "a file's path as text, for example '/etc/tls/mesh.pem'"


def _optional_host(value: Any) -> str | None:
    usable = value is None or (isinstance(value, str) and is_host_name(value))
    return None if usable else "must be a host name, for example 'orders.internal', or None"


def _optional_spiffe_id(value: Any) -> str | None:
    usable = value is None or (isinstance(value, str) and trust_domain_of(value) is not None)
    return None if usable else "must be a SPIFFE id, for example 'spiffe://mesh.test/orders'"


def _optional_trust_domain(value: Any) -> str | None:
    usable = value is None or (isinstance(value, str) and trust_domain_of(f"spiffe://{value}/x") == value)
    return None if usable else "must be a trust domain, for example 'mesh.test'"


def _is_path(value: Any) -> bool:
    """Whether it may be a path: what a file holds is none, and would be shown wherever the setting is."""
    return isinstance(value, str) and bool(value) and "-----BEGIN" not in value


def _trust(value: Any) -> str | None:
    usable = isinstance(value, SSLContext) or _is_path(value)
    return None if usable else f"must be 'system', {_A_PATH}, or an ssl.SSLContext"


def _optional_path(value: Any) -> str | None:
    return None if value is None or _is_path(value) else f"must be {_A_PATH}, or None"


def _strategy(value: Any, example: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, type):
        return f"must be an object, for example {example}, not a class"
    if not callable(value):
        return f"must be a function of the retry state, for example {example}"
    if inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(type(value).__call__):
        return f"must not be async, for example {example}: the sync client asks it as well"
    return None


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
