"""What may be set, what is said when it cannot be, and what an import does not do."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import pickle
import ssl
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import tenacity

from meshlib import (
    TLS,
    Breaker,
    Budget,
    ConfigError,
    Connections,
    ConsistentHash,
    DeadlineExceeded,
    Endpoint,
    HealthCheck,
    Hedge,
    LeastRequest,
    Limit,
    Mesh,
    MeshError,
    NoEndpoints,
    Overloaded,
    Random,
    Retry,
    RoundRobin,
    Service,
    Throttle,
    Timeout,
    UnknownService,
    deadline,
    options,
)
from meshlib.discovery import Resolution, Resolver
from meshlib.discovery.failover import Failover
from meshlib.discovery.static import Static
from meshlib.scope import current_scope
from meshlib.validation import Fault

ONE = ["10.0.0.1:8080"]
POSITIVE = "must be > 0"
NATURAL = "must be >= 0"
FINITE = "must be a finite number"
WHOLE = "must be a whole number"


def faults_of(make: Any, *args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(*args, **kwargs)
    return [str(fault) for fault in caught.value.faults]


# Defaults and bounds


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        (Timeout(), {"total": 30.0, "attempt": 10.0, "connect": 1.0}),
        (Budget(), {"capacity": 500, "retry_cost": 14, "throttle_cost": 5, "refund": 1}),
        (
            Retry(),
            {
                "max_attempts": 3,
                "on_status": {502, 503, 504},
                "methods": {"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"},
                "budget": Budget(),
                "buffer_body": 65536,
                "wait": None,
                "stop": None,
                "on": None,
            },
        ),
        (Hedge(), {"max_extra": 0.02, "after": None}),
        (Breaker(), {"consecutive": 5, "open_for": 2.0, "max_open_for": 60.0, "max_ejected": 0.5}),
        (Throttle(), {"k": 2.0, "window": 120.0, "enforce": True}),
        (Limit(10), {"max_in_flight": 10, "per_endpoint": None}),
        (
            HealthCheck("/healthz"),
            {"interval": 10.0, "timeout": 1.0, "healthy": 2, "unhealthy": 3, "expect": range(200, 400)},
        ),
        (Connections(), {"max_per_endpoint": 100, "max_idle": 20, "keepalive": 60.0, "max_age": 600.0}),
        (TLS(), {"verify": "system", "server_name": None, "cert": None, "key": None, "min_version": "1.2"}),
        (TLS(), {"spiffe_id": None, "trust_domain": None}),
        (LeastRequest(), {"choices": 2}),
        (RoundRobin(), {}),
        (ConsistentHash(), {"key": None, "scheme": "rendezvous", "bounded_load": None}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_defaults_are_those_of_the_design(setting: Any, values: dict[str, Any]) -> None:
    assert {name: getattr(setting, name) for name in values} == values


BOUNDS: list[tuple[type, str, list[Any], list[tuple[Any, str]]]] = [
    (Timeout, "total", [0.001, 1, 1e9], [(0, POSITIVE), (-1, POSITIVE)]),
    (Timeout, "attempt", [0.001], [(0.0, POSITIVE)]),
    (Timeout, "connect", [0.001], [(-0.001, POSITIVE)]),
    (Budget, "capacity", [0.5, 1], [(0, POSITIVE)]),
    (Budget, "retry_cost", [0.5], [(0, POSITIVE)]),
    (Budget, "throttle_cost", [0.5], [(0, POSITIVE)]),
    (Budget, "refund", [0, 0.5], [(-0.1, NATURAL)]),
    (Retry, "max_attempts", [1, 100], [(0, "must be >= 1"), (-3, "must be >= 1"), (1.5, WHOLE), (2.0, WHOLE)]),
    (Retry, "buffer_body", [0, 1 << 30], [(-1, NATURAL), (0.5, WHOLE)]),
    (Hedge, "max_extra", [0.001, 1], [(0, POSITIVE), (1.01, "must be <= 1"), (2, "must be <= 1")]),
    (Breaker, "consecutive", [1, 50], [(0, "must be >= 1"), (1.5, WHOLE)]),
    (Breaker, "open_for", [0.01], [(0, POSITIVE)]),
    (Breaker, "max_open_for", [0.01], [(0, POSITIVE)]),
    (Breaker, "max_ejected", [0, 0.5, 1], [(-0.01, NATURAL), (1.01, "must be <= 1"), (50, "must be <= 1")]),
    (Throttle, "k", [1, 1.1, 10], [(0.99, "must be >= 1"), (-2, "must be >= 1")]),
    (Throttle, "window", [0.1], [(0, POSITIVE)]),
    (Limit, "max_in_flight", [1, 1000], [(0, "must be >= 1"), (1.5, WHOLE)]),
    (Connections, "max_per_endpoint", [1], [(0, "must be >= 1"), (1.5, WHOLE)]),
    (Connections, "max_idle", [0], [(-1, NATURAL), (1.5, WHOLE)]),
    (Connections, "keepalive", [0.1], [(0, POSITIVE)]),
    (Connections, "max_age", [0.1], [(0, POSITIVE)]),
    (LeastRequest, "choices", [2, 10], [(1, "must be >= 2"), (2.5, WHOLE)]),
]
WRONG_TYPES: list[Any] = ["5", None, True, [5], object(), math.nan, math.inf, -math.inf, 1j]


@pytest.mark.parametrize(("kind", "name", "good", "bad"), BOUNDS, ids=[f"{row[0].__name__}.{row[1]}" for row in BOUNDS])
def test_every_numbers_bounds(kind: type, name: str, good: list[Any], bad: list[tuple[Any, str]]) -> None:
    for value in good:
        assert getattr(kind(**{name: value}), name) == value
    path = f"{kind.__name__.lower()}.{name}"
    for value, wrong in bad:
        assert faults_of(kind, **{name: value}) == [f"{path}: {wrong}, got {value!r}"]
    for value in WRONG_TYPES:
        (said,) = faults_of(kind, **{name: value})
        assert said.startswith((f"{path}: {FINITE}, got ", f"{path}: {WHOLE}, got "))
        assert said.endswith(f"got {value!r}")


@pytest.mark.parametrize(
    "kind", [Timeout, Budget, Retry, Breaker, Hedge, Throttle, Connections, TLS, LeastRequest, ConsistentHash]
)
def test_every_field_of_a_setting_is_looked_at(kind: type) -> None:
    """A field without a rule would take anything."""
    for field in dataclasses.fields(kind):
        assert faults_of(kind, **{field.name: object()}), field.name


@pytest.mark.parametrize(
    "kind",
    [
        Timeout,
        Budget,
        Retry,
        Breaker,
        Hedge,
        Throttle,
        Connections,
        TLS,
        LeastRequest,
        RoundRobin,
        Random,
        ConsistentHash,
    ],
)
def test_settings_are_frozen_keyword_only_values(kind: type) -> None:
    setting = kind()
    assert setting == kind()
    assert hash(setting) == hash(kind())
    assert pickle.loads(pickle.dumps(setting)) == setting
    assert copy.deepcopy(setting) == setting
    assert dataclasses.replace(setting) == setting
    with pytest.raises(TypeError):
        kind(1)
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(setting, field.name, 1)


def test_replacing_a_value_checks_it_again() -> None:
    assert faults_of(dataclasses.replace, Timeout(), total=0) == ["timeout.total: must be > 0, got 0"]


def test_an_unknown_setting_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="max_attempt"):
        Retry(max_attempt=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("make", [lambda: Timeout(total=10**400), lambda: Endpoint("10.0.0.1", 10**400)])
def test_a_number_beyond_all_floats_is_a_fault_like_any_other(make: Any) -> None:
    assert faults_of(make)


@pytest.mark.parametrize(
    ("value", "taken"), [([503], {503}), ((500, 599), {500, 599}), (range(500, 503), {500, 501, 502}), ([], set())]
)
def test_on_status_may_be_any_collection_of_statuses(value: Any, taken: set[int]) -> None:
    assert Retry(on_status=value).on_status == taken
    assert isinstance(Retry(on_status=value).on_status, frozenset)


@pytest.mark.parametrize(
    "value", [503, "503", None, ["503"], [503.0], [True], [200], [399], [600], [[503]], iter([503])]
)
def test_on_status_must_be_statuses(value: Any) -> None:
    (said,) = faults_of(Retry, on_status=value)
    assert said == f"retry.on_status: must be a set of statuses, for example {{502, 503}}, got {value!r}"


@pytest.mark.parametrize("value", [["GET"], ("GET", "POST"), {"PROPFIND"}, []])
def test_methods_may_be_any_collection_of_names_in_capitals(value: Any) -> None:
    assert Retry(methods=value).methods == frozenset(value)


@pytest.mark.parametrize("value", ["GET", b"GET", None, 5, ["get"], ["Get"], [""], [5], [None]])
def test_methods_must_be_names_in_capitals(value: Any) -> None:
    (said,) = faults_of(Retry, methods=value)
    assert said == f"retry.methods: must be a set of methods in capitals, for example {{'GET'}}, got {value!r}"


@pytest.mark.parametrize("seconds", [0, -1, math.inf, "1", True])
def test_a_backup_comes_after_some_seconds_if_it_is_given_any(seconds: Any) -> None:
    assert Hedge(after=None).after is None
    assert Hedge(after=0.05).after == 0.05
    (said,) = faults_of(Hedge, after=seconds)
    assert said.startswith("hedge.after: must be ")


def test_a_budget_must_be_one() -> None:
    assert faults_of(Retry, budget=500) == ["retry.budget: must be a Budget, for example Budget(), got 500"]


async def asynchronous(state: Any) -> bool:
    return True


class Asynchronous:
    async def __call__(self, state: Any) -> bool:
        return True


@pytest.mark.parametrize("name", ["wait", "stop", "on"])
def test_a_strategy_is_any_function_but_an_async_one_and_no_class(name: str) -> None:
    for strategy in (tenacity.wait_fixed(1), tenacity.stop_never, tenacity.retry_always, lambda state: 1, None):
        assert getattr(Retry(**{name: strategy}), name) is strategy
    for value, wrong in (
        (tenacity.wait_none, ", not a class, got <class"),
        (0.5, "must be a function of the retry state, for example tenacity."),
        (False, "must be a function of the retry state"),
        (asynchronous, "must not be async"),
        (functools.partial(asynchronous, 1), "must not be async"),
        (Asynchronous(), "must not be async"),
    ):
        (said,) = faults_of(Retry, **{name: value})
        assert said.startswith(f"retry.{name}: must ")
        assert wrong in said


def test_what_was_given_as_a_list_cannot_be_changed_afterwards() -> None:
    given = [503]
    retry = Retry(on_status=given)
    given.append(500)
    assert retry.on_status == {503}


def test_several_faults_at_once_are_all_listed_in_the_order_of_the_fields() -> None:
    assert faults_of(Timeout, total=0, attempt="1", connect=math.nan) == [
        "timeout.total: must be > 0, got 0",
        "timeout.attempt: must be a finite number, got '1'",
        "timeout.connect: must be a finite number, got nan",
    ]
    said = faults_of(Retry, max_attempts=0, on_status={99}, methods={"get"}, budget=None, buffer_body=-1)
    assert [fault.partition(":")[0] for fault in said] == [
        "retry.max_attempts",
        "retry.on_status",
        "retry.methods",
        "retry.budget",
        "retry.buffer_body",
    ]


# Health checks


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/sys/health?standbyok=true", "/a%20b"])
def test_a_health_check_is_a_frozen_value(path: str) -> None:
    check = HealthCheck(path, interval=5)
    assert check.path == path
    assert check == HealthCheck(path, interval=5) != HealthCheck(path)
    assert hash(check) == hash(HealthCheck(path, interval=5))
    assert pickle.loads(pickle.dumps(check)) == copy.deepcopy(check) == dataclasses.replace(check) == check
    with pytest.raises(dataclasses.FrozenInstanceError):
        check.path = "/"  # type: ignore[misc]


@pytest.mark.parametrize(
    "path", ["", "healthz", "http://a/healthz", "/a b", "/a#b", "/ä", "/a\n", None, b"/healthz", 5]
)
def test_a_health_checks_path_must_be_one(path: Any) -> None:
    (said,) = faults_of(HealthCheck, path)
    got = repr(path) if isinstance(path, str) else type(path).__name__
    assert said == f"healthcheck.path: must be a path without spaces and '#', for example '/healthz', got {got}"


def test_a_health_checks_faults_are_all_told() -> None:
    said = faults_of(HealthCheck, "x", interval=0, timeout=0, healthy=0, unhealthy=1.5, expect=())
    assert [fault.partition(":")[0].removeprefix("healthcheck.") for fault in said] == [
        "path",
        "interval",
        "timeout",
        "healthy",
        "unhealthy",
        "expect",
    ]
    with pytest.raises(TypeError):
        HealthCheck("/healthz", 5.0)  # type: ignore[misc]


@pytest.mark.parametrize("value", [[], 200, "200", None, [199], [600], [True], ["200"], iter([200])])
def test_what_a_health_check_expects_must_be_statuses(value: Any) -> None:
    (said,) = faults_of(HealthCheck, "/", expect=value)
    example = "statuses, for example range(200, 400) or {200, 204}"
    assert said == f"healthcheck.expect: must be a set of {example}, got {value!r}"


def test_what_a_health_check_expects_may_be_any_collection() -> None:
    given = [200, 204]
    check = HealthCheck("/", expect=given)
    given.clear()
    assert check.expect == frozenset({200, 204})


def test_T3_the_query_of_a_health_check_is_not_shown() -> None:
    shown = repr(Service("orders", ONE, health=HealthCheck("/healthz?token=secret")))
    with pytest.raises(ConfigError) as caught:
        HealthCheck("/a b?token=secret", interval=0)
    assert "secret" not in shown + str(caught.value)


def test_a_services_health_must_be_a_check() -> None:
    assert Service("orders", ONE).health is None
    assert faults_of(Service, "orders", ONE, health="/healthz") == [
        "services.orders.health: must be a HealthCheck, for example HealthCheck('/healthz'), got '/healthz'"
    ]


# Consistent hash

KEY = "consistenthash.key: must be 'header:<name>', 'cookie:<name>', 'query:<name>', 'path:<number>' or a function"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"key": "haeder:x-user-id"}, f"{KEY} of the request (did you mean 'header:x-user-id'?), got"),
        ({"key": "Cookie:sid"}, f"{KEY} of the request (did you mean 'cookie:sid'?), got 'Cookie:sid'"),
        ({"key": "x-user-id"}, f"{KEY} of the request, got 'x-user-id'"),
        ({"key": ""}, f"{KEY} of the request, got ''"),
        ({"key": "header"}, f"{KEY} of the request, for example 'header:x-user-id', got 'header'"),
        ({"key": "header:x user"}, f"{KEY} of the request, for example 'header:x-user-id'"),
        ({"key": "cookie:"}, f"{KEY} of the request, for example 'cookie:sid', got 'cookie:'"),
        ({"key": "query:"}, f"{KEY} of the request, for example 'query:tenant', got"),
        ({"key": "path:-1"}, f"{KEY} of the request, for example 'path:0', got 'path:-1'"),
        ({"key": "path:first"}, f"{KEY} of the request, for example 'path:0', got"),
        ({"key": b"header:x"}, f"{KEY} of the request, got b'header:x'"),
        ({"key": str}, f"{KEY} of the request, got <class 'str'>"),
        ({"key": Resolver.resolve}, f"{KEY} of the request, got <function"),
        (
            {"scheme": "rings"},
            "consistenthash.scheme: must be 'rendezvous' or 'ring' (did you mean 'ring'?), got 'rings'",
        ),
        ({"scheme": None}, "consistenthash.scheme: must be 'rendezvous' or 'ring', got None"),
        ({"bounded_load": 0.9}, "consistenthash.bounded_load: must be >= 1, got 0.9"),
        ({"bounded_load": math.inf}, "consistenthash.bounded_load: must be a finite number, got inf"),
        ({"bounded_load": True}, "consistenthash.bounded_load: must be a finite number, got True"),
    ],
)
def test_a_consistent_hash_that_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    (fault,) = faults_of(ConsistentHash, **given)
    assert fault.startswith(said)


@pytest.mark.parametrize("key", ["header:X-User-Id", "cookie:sid", "query:a b", "path:0", "path:12", len, None])
def test_what_a_key_may_be(key: Any) -> None:
    assert ConsistentHash(key=key, bounded_load=1).key is key


# TLS


def test_a_context_of_ones_own_is_taken_for_verify() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert TLS(verify=context).verify is context


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"verify": ""}, "tls.verify"),
        ({"verify": True}, "tls.verify"),
        ({"verify": False}, "tls.verify"),
        ({"verify": None}, "tls.verify"),
        ({"server_name": ""}, "tls.server_name"),
        ({"server_name": 5}, "tls.server_name"),
        ({"cert": ""}, "tls.cert"),
        ({"cert": "a.pem", "key": ""}, "tls.key"),
        ({"key": "key.pem"}, "tls.cert"),
        ({"min_version": "1.1"}, "tls.min_version"),
        ({"min_version": 1.2}, "tls.min_version"),
        ({"spiffe_id": "mesh.test/orders"}, "tls.spiffe_id"),
        ({"spiffe_id": "spiffe://mesh.test"}, "tls.spiffe_id"),
        ({"spiffe_id": "spiffe://mesh.test/"}, "tls.spiffe_id"),
        ({"spiffe_id": "spiffe://Mesh.test/orders"}, "tls.spiffe_id"),
        ({"spiffe_id": "spiffe://mesh.test/../orders"}, "tls.spiffe_id"),
        ({"spiffe_id": "spiffe://mesh.test/orders?x"}, "tls.spiffe_id"),
        ({"spiffe_id": "spiffe://mesh.test:443/orders"}, "tls.spiffe_id"),
        ({"trust_domain": ""}, "tls.trust_domain"),
        ({"trust_domain": "spiffe://mesh.test"}, "tls.trust_domain"),
        ({"trust_domain": "mesh.test/orders"}, "tls.trust_domain"),
        ({"trust_domain": "mesh.test", "spiffe_id": "spiffe://mesh.test/orders"}, "tls.trust_domain"),
        ({"trust_domain": "mesh.test", "verify": ssl.create_default_context()}, "tls.verify"),
    ],
)
def test_a_TLS_setting_that_cannot_work_is_refused(given: dict[str, Any], path: str) -> None:
    (said,) = faults_of(TLS, **given)
    assert said.startswith(f"{path}: must be ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"verify": False},
            "must be 'system', a file's path as text, for example '/etc/tls/mesh.pem', or an ssl.SSLContext, got False",
        ),
        ({"server_name": "a b"}, "must be a host name, for example 'orders.internal', or None, got 'a b'"),
        ({"cert": b"a.pem"}, "must be a file's path as text, for example '/etc/tls/mesh.pem', or None, got b'a.pem'"),
        ({"key": "key.pem"}, "must be given with a key, TLS(cert='client.pem', key='client.key'), got none"),
    ],
)
def test_a_TLS_setting_shows_what_would_be_right(given: dict[str, Any], said: str) -> None:
    assert faults_of(TLS, **given) == [f"tls.{'cert' if 'key' in given else next(iter(given))}: {said}"]


def test_https_is_short_for_TLS() -> None:
    assert Service("orders", ONE, scheme="https").tls == TLS()
    assert Service("orders", ONE, scheme="https", tls=TLS(server_name="a")).tls == TLS(server_name="a")
    assert Service("orders", ONE, scheme="http").tls is None
    assert Service("orders", ONE).tls is None


@pytest.mark.parametrize("given", [{"scheme": "http", "tls": TLS()}, {"scheme": "ftp"}, {"scheme": ""}, {"tls": True}])
def test_a_scheme_that_cannot_be_is_refused(given: dict[str, Any]) -> None:
    (said,) = faults_of(Service, "orders", ONE, **given)
    assert said.startswith(
        ("services.orders.scheme: must be ", "services.orders.tls: must be a TLS, for example TLS()")
    )


def test_a_certificate_that_is_not_there_is_found_out_when_the_mesh_is_made() -> None:
    service = Service("orders", ONE, tls=TLS(verify="/nowhere/bundle.pem"))
    (said,) = faults_of(Mesh, service)
    assert said == (
        "services.orders.tls.verify: must be 'system' or a readable bundle of certificates, got '/nowhere/bundle.pem': "
        "[Errno 2] No such file or directory"
    )


def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    cert = tmp_path / "web.pem"
    cert.write_text("no certificate")
    (said,) = faults_of(Mesh, Service("orders", ONE, tls=TLS(cert="/nowhere/web.pem", key="/nowhere/web.key")))
    assert "got '/nowhere/web.pem' and the key '/nowhere/web.key': [Errno 2] No such file" in said
    (said,) = faults_of(Mesh, Service("orders", ONE, tls=TLS(cert=str(cert))))
    assert said.endswith(f"got {str(cert)!r}: there is no certificate, or no key, in PEM format")


@pytest.mark.parametrize("name", ["verify", "cert"])
def test_a_path_of_tls_is_text(name: str) -> None:
    (said,) = faults_of(TLS, **{name: Path("/etc/mesh/web.pem")})
    assert "a file's path as text" in said
    assert "Path('/etc/mesh/web.pem')" in said


# Endpoints


@pytest.mark.parametrize(
    ("text", "host", "port", "written"),
    [
        ("10.0.0.1:8080", "10.0.0.1", 8080, "10.0.0.1:8080"),
        ("10.0.0.1:1", "10.0.0.1", 1, "10.0.0.1:1"),
        ("10.0.0.1:65535", "10.0.0.1", 65535, "10.0.0.1:65535"),
        ("10.0.0.1:0080", "10.0.0.1", 80, "10.0.0.1:80"),
        ("  10.0.0.1:8080\n", "10.0.0.1", 8080, "10.0.0.1:8080"),
        ("[::1]:8080", "::1", 8080, "[::1]:8080"),
        ("[0:0:0:0:0:0:0:1]:8080", "::1", 8080, "[::1]:8080"),
        ("[2001:DB8::A]:443", "2001:db8::a", 443, "[2001:db8::a]:443"),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80, "[fe80::1%eth0]:80"),
        ("localhost:80", "localhost", 80, "localhost:80"),
        ("LocalHost.:80", "localhost", 80, "localhost:80"),
        ("users.internal.:80", "users.internal", 80, "users.internal:80"),
        ("DB-1.my_zone.Example:5432", "db-1.my_zone.example", 5432, "db-1.my_zone.example:5432"),
        ("xn--bcher-kva.example:80", "xn--bcher-kva.example", 80, "xn--bcher-kva.example:80"),
        (f"{'a' * 63}.b:80", f"{'a' * 63}.b", 80, f"{'a' * 63}.b:80"),
    ],
)
def test_an_endpoint_is_read_and_written_in_one_way(text: str, host: str, port: int, written: str) -> None:
    endpoint = Endpoint.parse(text)
    assert (endpoint.host, endpoint.port) == (host, port)
    assert endpoint.place == (host, port)
    assert str(endpoint) == written
    assert Endpoint.parse(written) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ":",
        "10.0.0.1",
        "10.0.0.1:",
        "10.0.0.1:http",
        "10.0.0.1:+80",
        "10.0.0.1:-80",
        "10.0.0.1:8 0",
        "10.0.0.1:80.0",
        "10.0.0.1:８０",  # noqa: RUF001 - full-width digits are digits to str.isdigit
        "10.0.0.1:²",
        "::1:8080",
        "::1",
        "[::1]",
        "2001:db8::1:80",
        "http://10.0.0.1",
        "10.0.0.1:80:90",
        None,
        8080,
        b"10.0.0.1:80",
        ("10.0.0.1", 80),
    ],
    ids=repr,
)
def test_what_is_not_host_and_port_is_refused_with_an_example(text: Any) -> None:
    (said,) = faults_of(Endpoint.parse, text)
    assert said == (f"endpoint: must be 'host:port', for example '10.0.0.1:8080' or '[::1]:8080', got {text!r}")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Endpoint.parse("user:secret@10.0.0.1:80"),
        lambda: Endpoint.parse("user:secret@host"),
        lambda: Endpoint("user:secret@10.0.0.1", 80),
        lambda: Service("orders", "http://user:secret@host/?token=secret"),
        lambda: Service("orders", ["user:secret@host:80"]),
    ],
)
def test_T3_no_credentials_reach_an_error(make: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        (":8080", ""),
        ("[]:80", "[]"),
        ("[::1:80", "[::1"),
        ("[:::1]:80", "[:::1]"),
        ("[localhost]:80", "[localhost]"),
        ("[::1]x:80", "[::1]x"),
        ("10.0.0.1 :80", "10.0.0.1 "),
        ("a b:80", "a b"),
        ("a\tb:80", "a\tb"),
        ("a\n.b:80", "a\n.b"),
        ("a/b:80", "a/b"),
        ("-a:80", "-a"),
        ("a-:80", "a-"),
        ("a..b:80", "a..b"),
        (".a:80", ".a"),
        (".:80", "."),
        ("a...:80", "a..."),
        ("bücher.example:80", "bücher.example"),
        ("10.0.0.256:80", "10.0.0.256"),
        ("10.0.0:80", "10.0.0"),
        ("010.0.0.1:80", "010.0.0.1"),
        ("1234:80", "1234"),
        ("example.7:80", "example.7"),
        (f"{'a' * 64}:80", "a" * 64),
        (f"{'.'.join(['a' * 50] * 6)}:80", ".".join(["a" * 50] * 6)),
    ],
    ids=repr,
)
def test_a_host_that_is_none_is_refused_by_name(text: str, host: str) -> None:
    assert faults_of(Endpoint.parse, text) == [
        f"endpoint.host: must be an IP address or a host name, for example '10.0.0.1', got {host!r}"
    ]


@pytest.mark.parametrize(
    ("port", "wrong"), [("0", "must be >= 1"), ("65536", "must be <= 65535"), ("99999", "must be <= 65535")]
)
def test_a_port_out_of_range_is_refused(port: str, wrong: str) -> None:
    assert faults_of(Endpoint.parse, f"10.0.0.1:{port}") == [f"endpoint.port: {wrong}, got {port}"]


def test_a_port_of_many_digits_is_refused_like_any_other() -> None:
    assert faults_of(Endpoint.parse, "10.0.0.1:" + "9" * 5000)


@pytest.mark.parametrize("host", ["fe80::1%\r\nX-Evil: 1", "fe80::1%é", "fe80::1%a b"])
def test_a_scope_id_is_a_name(host: str) -> None:
    assert faults_of(Endpoint, host, 80)


@pytest.mark.parametrize(
    ("given", "path", "wrong"),
    [
        ({"host": None}, "host", "must be an IP address or a host name"),
        ({"host": 167772161}, "host", "must be an IP address or a host name"),
        ({"host": b"10.0.0.1"}, "host", "must be an IP address or a host name"),
        ({"port": "80"}, "port", WHOLE),
        ({"port": 80.0}, "port", WHOLE),
        ({"port": True}, "port", WHOLE),
        ({"port": None}, "port", WHOLE),
        ({"weight": 0}, "weight", POSITIVE),
        ({"weight": -1}, "weight", POSITIVE),
        ({"weight": math.nan}, "weight", FINITE),
        ({"weight": math.inf}, "weight", FINITE),
        ({"weight": "3"}, "weight", FINITE),
        ({"weight": True}, "weight", FINITE),
        ({"priority": -1}, "priority", NATURAL),
        ({"priority": 0.5}, "priority", WHOLE),
        ({"zone": None}, "zone", "must be a str, for example 'eu-west-1a'"),
        ({"zone": 1}, "zone", "must be a str"),
        ({"metadata": None}, "metadata", "must be a Mapping, for example {'version': 'v2'}"),
        ({"metadata": [("a", "b")]}, "metadata", "must be a Mapping"),
    ],
)
def test_every_part_of_an_endpoint_is_checked(given: dict[str, Any], path: str, wrong: str) -> None:
    (said,) = faults_of(Endpoint, **{"host": "10.0.0.1", "port": 80, **given})
    assert said.startswith(f"endpoint.{path}: {wrong}")
    assert said.endswith(f"got {next(iter(given.values()))!r}")


def test_all_faults_of_an_endpoint_are_listed() -> None:
    said = faults_of(Endpoint, "a b", 0, weight=0, priority=-1, zone=None, metadata=None)
    assert [fault.partition(":")[0] for fault in said] == [
        "endpoint.host",
        "endpoint.port",
        "endpoint.weight",
        "endpoint.priority",
        "endpoint.zone",
        "endpoint.metadata",
    ]


FULL = Endpoint("10.0.0.1", 80, weight=2.5, priority=1, zone="a", metadata={"version": "v2"})


@pytest.mark.parametrize(
    "change",
    [
        {"host": "10.0.0.2"},
        {"port": 81},
        {"weight": 1},
        {"priority": 0},
        {"zone": "b"},
        {"metadata": {}},
        {"metadata": {"version": "v3"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_endpoints_are_equal_only_if_every_part_is(change: dict[str, Any]) -> None:
    other = dataclasses.replace(FULL, **change)
    assert other != FULL
    assert dataclasses.replace(other, **{name: getattr(FULL, name) for name in change}) == FULL


def test_equal_endpoints_have_equal_hashes_however_they_were_written() -> None:
    same = Endpoint("[::1]", 80), Endpoint("0::1", 80), Endpoint.parse("[::1]:80")
    assert len(set(same)) == 1
    assert hash(FULL) == hash(dataclasses.replace(FULL, metadata={"other": "x"})), "a mapping has no hash"


@pytest.mark.parametrize("endpoint", [FULL, Endpoint("::1", 80)])
def test_an_endpoint_survives_copying_and_pickling(endpoint: Endpoint) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(endpoint, protocol))
        assert again == endpoint
        assert again.place == endpoint.place
        assert isinstance(again.metadata, MappingProxyType)
    assert copy.copy(endpoint) == copy.deepcopy(endpoint) == dataclasses.replace(endpoint) == endpoint


def test_an_endpoint_is_frozen_its_metadata_included() -> None:
    given = {"version": "v1"}
    endpoint = Endpoint("10.0.0.1", 80, metadata=given)
    given["version"] = "v2"
    assert endpoint.metadata == {"version": "v1"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        endpoint.port = 81  # type: ignore[misc]
    with pytest.raises(TypeError):
        endpoint.metadata["version"] = "v3"  # type: ignore[index]


def test_the_place_moves_with_the_port_and_cannot_be_given() -> None:
    assert dataclasses.replace(FULL, port=81).place == ("10.0.0.1", 81)
    with pytest.raises(TypeError):
        Endpoint("10.0.0.1", 80, place=("10.0.0.2", 80))  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Endpoint("10.0.0.1", 80, 3)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("host", "is_address"),
    [("10.0.0.1", True), ("::1", True), ("localhost", True), ("db", False), ("localhost.x", False)],
)
def test_an_address_can_be_dialled_a_name_must_be_resolved(host: str, is_address: bool) -> None:
    assert Endpoint(host, 80).is_address is is_address


# Services and where their endpoints come from


def places(service: Service) -> list[tuple[str, int, float]]:
    assert isinstance(service.resolver, Static)
    return [(endpoint.host, endpoint.port, endpoint.weight) for endpoint in service.resolver.endpoints]


@pytest.mark.parametrize(
    "resolver",
    [
        ["10.0.0.1:80", "[::1]:81"],
        ("10.0.0.1:80", Endpoint("::1", 81)),
        (text for text in ("10.0.0.1:80", "[::1]:81")),
        "static:10.0.0.1:80,[::1]:81",
        "static: 10.0.0.1:80 , [::1]:81 ,",
        "static:10.0.0.1:80,[::1]:81?weight=1",
        "static:10.0.0.1:80,[::1]:81?weight=1,1.0",
        Static(["10.0.0.1:80", "[::1]:81"]),
    ],
    ids=["list", "tuple", "generator", "url", "url with spaces", "one weight", "two weights", "object"],
)
def test_endpoints_may_be_written_in_many_ways(resolver: Any) -> None:
    assert places(Service("orders", resolver)) == [("10.0.0.1", 80, 1), ("::1", 81, 1)]


def test_names_in_a_list_are_kept_to_be_resolved() -> None:
    named, dialled = Static(["10.0.0.1:80", "db.internal:80"]), Static(["10.0.0.1:80", "[::1]:80", "localhost:80"])
    assert [endpoint.host for endpoint in named.endpoints] == ["10.0.0.1", "db.internal"]
    assert (named.is_resolved, dialled.is_resolved) == (False, True)


class Blocking:
    def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        raise AssertionError("never called")


class Unhashable:
    watch_key: ClassVar = ["orders"]

    async def resolve(self, service: str, previous: Any) -> Any: ...


class Sourceless:
    @property
    def source(self) -> str:
        raise OSError("SECRET")

    async def resolve(self, service: str, previous: Any) -> Any: ...


@dataclasses.dataclass
class Misspelt:
    token: str

    async def reslove(self, service: str, previous: Any) -> Any: ...


class Own:
    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        return Resolution([], 1.0)


def test_a_resolver_may_be_any_object_that_resolves() -> None:
    own = Own()
    assert Service("orders", own).resolver is own


def test_a_list_of_resolvers_and_their_URLs_is_a_failover() -> None:
    own = Own()
    resolver = Service("orders", ["static:10.0.0.1:80", own]).resolver
    assert isinstance(resolver, Failover)
    assert resolver.parts[1] is own
    # digits alone after a name are a port, whatever the name
    assert places(Service("orders", ["static:80", "failover:80"])) == [("static", 80, 1), ("failover", 80, 1)]


def test_weights_in_a_url_are_one_for_all_or_one_for_each() -> None:
    assert places(Service("orders", "static:10.0.0.1:80,10.0.0.2:80?weight=3")) == [
        ("10.0.0.1", 80, 3),
        ("10.0.0.2", 80, 3),
    ]
    assert places(Service("orders", "static:10.0.0.1:80,10.0.0.2:80?weight=3,0.5")) == [
        ("10.0.0.1", 80, 3),
        ("10.0.0.2", 80, 0.5),
    ]


@pytest.mark.parametrize(
    ("resolver", "said"),
    [
        ([], "resolver: must name at least one endpoint, for example ['10.0.0.1:8080', '10.0.0.2:8080'], got none"),
        (
            "static:",
            "resolver: must name at least one endpoint, for example ['10.0.0.1:8080', '10.0.0.2:8080'], got none",
        ),
        ("static:,", "resolver: must name at least one endpoint"),
        (None, "resolver: must be a list of addresses or a resolver URL"),
        (5, "resolver: must be a list of addresses or a resolver URL"),
        (Endpoint("10.0.0.1", 80), "resolver: must be a list of addresses or a resolver URL"),
        ("", "resolver: must be a URL of a known scheme"),
        ("10.0.0.1:80", "got '10.0.0.1:80'; did you mean 'static:10.0.0.1:80'?"),
        ("http://10.0.0.1:80", "resolver: must be a URL of a known scheme"),
        ("statik:10.0.0.1:80", "got 'statik:10.0.0.1:80'; did you mean 'static:'?"),
        (["statik://10.0.0.1:80"], "resolver[0]: must be a URL of a known scheme"),
        (
            ["10.0.0.1:80", "static:10.0.0.2:80"],
            "must hold addresses or resolver URLs, never both: resolver[1] is a resolver, resolver[0] is not; "
            "addresses beside resolvers are 'static:10.0.0.1:8080,10.0.0.2:8080'",
        ),
        ([Static(ONE), Endpoint("10.0.0.1", 80)], "resolver[0] is a resolver, resolver[1] is not"),
        (["static:10.0.0.1:80", "file:x.toml?a=b"], "resolver[1]: must have no parameters"),
        (Static, "resolver: must be a resolver, Static(...), got the class"),
        (Blocking(), "resolver: must be a resolver whose 'resolve' is an 'async def', got an object of type Blocking"),
        (Unhashable(), "resolver: must be a resolver whose 'watch_key' is hashable, got an object of type Unhashable"),
        (Sourceless(), "'source' can be told, got an object of type Sourceless: it raised OSError"),
        (Misspelt("SECRET"), "for example ['10.0.0.1:8080', '10.0.0.2:8080'], got an object of type Misspelt"),
        (["10.0.0.1"], "resolver[0]: endpoint: must be 'host:port'"),
        (["10.0.0.1:80", "http://10.0.0.2:80"], "resolver[1]: must be 'host:port' without a scheme, for example '10"),
        (["https://10.0.0.1:80"], "got 'https://10.0.0.1:80'; for https give the service tls=TLS()"),
        (["10.0.0.1:80", None], "resolver[1]: endpoint: must be 'host:port'"),
        ([["10.0.0.1:80"]], "resolver[0]: endpoint: must be 'host:port'"),
        (["10.0.0.1:0"], "resolver[0]: endpoint.port: must be >= 1, got 0"),
        (["10.0.0.1:80", "10.0.0.1:80"], "resolver[1]: must be listed once: 10.0.0.1:80 is there already"),
        (["[::1]:80", "[0::1]:80"], "resolver[1]: must be listed once: [::1]:80 is there already"),
        ("static:10.0.0.1:80?weight=0", "resolver[0]: endpoint.weight: must be > 0, got 0.0"),
        ("static:10.0.0.1:80?weight=nan", "resolver[0]: endpoint.weight: must be a finite number, got nan"),
        ("static:10.0.0.1:80?weight=x", "for example 'static:10.0.0.1:8080,10.0.0.2:8080?weight=3,1', got 'x'"),
        ("static:10.0.0.1:80?weight=", "for example 'static:10.0.0.1:8080,10.0.0.2:8080?weight=3,1', got ''"),
        ("static:10.0.0.1:80?weight=1,2", "for example 'static:10.0.0.1:8080,10.0.0.2:8080?weight=3,1', got '1,2'"),
        ("static:10.0.0.1:80?wieght=1", "resolver: must have no parameter but 'weight', got 'wieght'"),
    ],
)
def test_a_resolver_that_cannot_work_says_what_where_and_what_would_be_right(resolver: Any, said: str) -> None:
    faults = faults_of(Service, "orders", resolver)
    assert len(faults) == 1
    assert faults[0].startswith("services.orders.resolver")
    assert said in faults[0]


def test_every_bad_address_of_a_list_is_listed_by_its_position() -> None:
    said = faults_of(Service, "orders", ["10.0.0.1:80", "x", "10.0.0.1:80", "10.0.0.2:0"])
    assert [fault.split(": ")[0] for fault in said] == [f"services.orders.resolver[{index}]" for index in (1, 2, 3)]


def test_a_limit_is_a_frozen_value_and_may_be_given_by_position() -> None:
    limit = Limit(10, per_endpoint=4)
    assert limit == Limit(max_in_flight=10, per_endpoint=4)
    assert pickle.loads(pickle.dumps(limit)) == copy.deepcopy(limit) == limit
    assert faults_of(Limit, 0, per_endpoint=0) == [
        "limit.max_in_flight: must be >= 1, got 0",
        "limit.per_endpoint: must be >= 1, got 0",
    ]
    assert faults_of(Limit, 1, per_endpoint=1.5) == ["limit.per_endpoint: must be a whole number, got 1.5"]
    with pytest.raises(TypeError):
        Limit()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Limit(10, 4)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        limit.max_in_flight = 5  # type: ignore[misc]


@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_a_throttle_acts_or_does_not(value: Any) -> None:
    assert faults_of(Throttle, enforce=value) == [f"throttle.enforce: must be a bool, for example False, got {value!r}"]


def test_a_services_throttle_and_limit() -> None:
    service = Service("orders", ONE)
    assert service.throttle == Throttle()
    assert service.limit is None
    assert Service("orders", ONE, limit=Limit(5)).limit == Limit(5)
    assert faults_of(Service, "orders", ONE, throttle=None, limit=5) == [
        "services.orders.throttle: must be a Throttle, for example Throttle(k=1.5), got None",
        "services.orders.limit: must be a Limit, for example Limit(100), got 5",
    ]


def test_the_faults_of_a_service_are_all_listed_with_their_path() -> None:
    wrong: dict[str, Any] = {
        "timeout": 5,
        "retry": False,
        "breaker": None,
        "hedge": 0.02,
        "connections": [],
        "host": "",
    }
    assert faults_of(Service, "orders", ["x:0"], **wrong) == [
        "services.orders.resolver[0]: endpoint.port: must be >= 1, got 0",
        "services.orders.timeout: must be a Timeout, for example Timeout(total=5.0), got 5",
        "services.orders.retry: must be a Retry, for example Retry(max_attempts=2), got False",
        "services.orders.breaker: must be a Breaker, for example Breaker(consecutive=3), got None",
        "services.orders.hedge: must be a Hedge, for example Hedge(max_extra=0.02), got 0.02",
        "services.orders.connections: must be a Connections, for example Connections(max_idle=5), got []",
        "services.orders.host: must be None, 'endpoint' or a header value, for example 'orders.internal', got ''",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"min_healthy": 0}, "min_healthy: must be >= 1, got 0"),
        ({"min_healthy": 1.5}, "min_healthy: must be a whole number, got 1.5"),
        ({"max_stale": 0}, "max_stale: must be > 0, got 0"),
        ({"max_stale": math.inf}, "max_stale: must be a finite number, got inf"),
    ],
)
def test_how_many_must_be_well_and_how_old_they_may_be(given: dict[str, Any], said: str) -> None:
    assert faults_of(Service, "orders", ONE, **given) == [f"services.orders.{said}"]
    assert (Service("orders", ONE).min_healthy, Service("orders", ONE).max_stale) == (1, 3600.0)


@pytest.mark.parametrize("balancer", [None, "round_robin", RoundRobin, 5])
def test_a_balancer_is_an_object_that_prepares_never_a_string_or_a_class(balancer: Any) -> None:
    assert faults_of(Service, "orders", ONE, balancer=balancer) == [
        f"services.orders.balancer: must be a balancer, for example PeakEwma(), got {balancer!r}"
    ]


@pytest.mark.parametrize("host", [None, "endpoint", "orders.example:8080", "[::1]:80"])
def test_the_host_header_may_be_set(host: str | None) -> None:
    assert Service("orders", ONE, host=host).host == host


@pytest.mark.parametrize("host", ["", "a b", "a\r\nX-Evil: 1", "a\tb", "ä", 5, b"a"])
def test_a_host_header_that_cannot_be_sent_is_refused(host: Any) -> None:
    (said,) = faults_of(Service, "orders", ONE, host=host)
    assert said.startswith(
        "services.orders.host: must be None, 'endpoint' or a header value, for example 'orders.internal', got "
    )


@pytest.mark.parametrize("name", ["orders", "o", "orders-2", "my_orders", "orders.shop.internal", "7up", "a--b"])
def test_a_name_is_a_host_in_lower_case(name: str) -> None:
    assert Service(name, ONE).name == name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Orders", "orders"),
        ("ORDERS.Shop", "orders.shop"),
        ("", None),
        ("orders ", None),
        ("orders\n", None),
        ("orders/", None),
        ("orders:80", None),
        ("http://orders", None),
        ("-orders", None),
        ("orders-", None),
        ("orders.", None),
        (".orders", None),
        ("a..b", None),
        ("bücher", None),
        (None, None),
        (5, None),
        (ONE, None),
    ],
    ids=repr,
)
def test_a_name_that_no_url_can_hold_is_refused(name: Any, meant: str | None) -> None:
    suggestion = f"; did you mean {meant!r}?" if meant else ""
    assert faults_of(Service, name, ONE) == [
        f"service.name: must be a host name in lower case, for example 'orders', got {name!r}{suggestion}"
    ]


def test_a_service_is_a_frozen_value() -> None:
    service = Service("orders", ONE, balancer=RoundRobin())
    with pytest.raises(dataclasses.FrozenInstanceError):
        service.name = "users"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Service("orders", ONE, RoundRobin())  # type: ignore[misc]
    assert places(pickle.loads(pickle.dumps(service))) == places(service)
    assert dataclasses.replace(service, name="users").name == "users"
    assert repr(service.resolver) == "Static(['10.0.0.1:8080'])"


# The mesh and its errors


def test_two_services_of_one_name_are_refused() -> None:
    orders, users = Service("orders", ONE), Service("users", ONE)
    assert faults_of(Mesh, orders, users, orders) == ["services.orders: must be declared once"]


def test_everything_wrong_about_the_services_of_a_mesh_is_listed() -> None:
    orders = Service("orders", ONE)
    said = faults_of(Mesh, "orders", orders, orders, [orders])
    assert [fault.partition(":")[0] for fault in said] == ["services[0]", "services.orders", "services[3]"]
    assert "must be a Service, for example Service('orders', ['10.0.0.1:8080']), got 'orders'" in said[0]


def test_a_mesh_may_have_no_services() -> None:
    assert repr(Mesh()) == "<Mesh of no services>"
    assert repr(Mesh(Service("a", ONE), Service("b", ONE))) == "<Mesh of a, b>"
    assert Mesh().snapshot() == {}


def test_ConfigError_is_a_ValueError_that_lists_its_faults_and_survives_pickling() -> None:
    error = ConfigError([Fault("a.b", "must be x"), Fault("c", "must be y")])
    assert isinstance(error, ValueError)
    assert str(error) == "a.b: must be x; c: must be y"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ConfigError
    assert (str(again), again.faults) == (str(error), error.faults)
    assert copy.copy(error).faults == error.faults
    assert Fault("a.b", "must be x").under("services.orders") == Fault("services.orders.a.b", "must be x")


@pytest.mark.parametrize(
    ("name", "known", "hint", "said"),
    [
        (
            "ordesr",
            ("orders", "users"),
            "",
            "no service 'ordesr' in this mesh; did you mean 'orders'? (known: orders, users)",
        ),
        ("billing", ("users", "orders"), "", "no service 'billing' in this mesh (known: orders, users)"),
        ("billing", (), "", "no service 'billing' in this mesh (known: none)"),
        ("orders:80", ("orders",), "call http://orders/", "no service 'orders:80' in this mesh: call http://orders/"),
    ],
)
def test_UnknownService_names_the_known_ones_and_the_one_that_was_meant(
    name: str, known: tuple[str, ...], hint: str, said: str
) -> None:
    error = UnknownService(name, known, hint)
    assert str(error) == said
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.known) == (UnknownService, said, tuple(sorted(known)))


def test_a_client_of_an_unknown_service_is_refused_with_a_suggestion() -> None:
    mesh = Mesh(Service("orders", ONE))
    for make in (mesh.client, mesh.async_client):
        with pytest.raises(UnknownService, match="did you mean 'orders'"):
            make("ordres")


def test_errors_of_a_call_are_errors_of_httpx() -> None:
    import httpx

    for kind in (UnknownService, NoEndpoints, Overloaded, DeadlineExceeded):
        assert issubclass(kind, MeshError)
    assert issubclass(MeshError, httpx.TransportError)
    assert issubclass(DeadlineExceeded, httpx.TimeoutException)
    assert not issubclass(ConfigError, MeshError)
    for kind in (NoEndpoints, Overloaded, DeadlineExceeded):
        assert str(pickle.loads(pickle.dumps(kind("orders: gone")))) == "orders: gone"


# Options and deadlines


def test_options_add_up_and_the_nearest_wins() -> None:
    with options(timeout=2.0, idempotent=True):
        with options(timeout=1.0, hash_key="u1"):
            assert current_scope().options == {"timeout": 1.0, "idempotent": True, "hash_key": "u1"}
        assert current_scope().options == {"timeout": 2.0, "idempotent": True}
    assert current_scope().options == {}


def test_of_nested_deadlines_the_earliest_wins() -> None:
    with deadline(5.0):
        outer = current_scope().deadline
        with deadline(50.0):
            assert current_scope().deadline == outer
        with deadline(1.0):
            assert current_scope().deadline < outer
        assert current_scope().deadline == outer
    assert current_scope().deadline == math.inf


def test_an_unknown_option_is_a_type_error_that_names_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"options\(\) has no option 'timout'; known: timeout, idempotent"):
        options(timout=1.0)


@pytest.mark.parametrize(
    "given",
    [
        {"timeout": 0},
        {"timeout": "1"},
        {"timeout": math.inf},
        {"timeout": None},
        {"idempotent": 1},
        {"idempotent": None},
        {"hash_key": 5},
        {"retry": 3},
        {"retry": Retry()},
        {"replayable": 1},
        {"body_deadline": 0},
    ],
)
def test_an_option_that_cannot_be_is_refused_where_it_is_written(given: dict[str, Any]) -> None:
    (said,) = faults_of(options, **given)
    assert said.startswith(f"{next(iter(given))}: must be ")


@pytest.mark.parametrize("seconds", [-0.001, math.nan, math.inf, "1", None, True])
def test_a_deadline_that_cannot_be_is_refused(seconds: Any) -> None:
    (said,) = faults_of(deadline, seconds)
    assert said.startswith("deadline.seconds: must be ")


# What an import does not do

PROBE = """
import sys
sockets = []
sys.addaudithook(lambda event, args: sockets.append(event) if event.startswith("socket.") else None)
import httpx
before = set(sys.modules)
sockets.clear()
import threading
threads = threading.active_count()
import meshlib
added = sorted(set(sys.modules) - before)
meshlib.Mesh(meshlib.Service("orders", ["10.0.0.1:8080"])).close()
import json
print(json.dumps({
    "added": added,
    "sockets": sockets,
    "threads": threading.active_count() - threads,
}))
"""

HEAVY = ("aiohttp", "anyio", "asyncio", "consul", "dns", "fastapi", "flask", "grpc", "h11", "httpcore", "mmh3")
HEAVY += (
    "importlib.metadata",
    "tomllib",
    "hypothesis",
    "opentelemetry.sdk",
    "pytest",
    "rich",
    "sniffio",
    "starlette",
    "tenacity",
    "trio",
    "uvicorn",
)


def test_an_import_loads_nothing_heavy_and_making_a_mesh_starts_no_thread_and_opens_no_socket() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60, check=True)
    seen = json.loads(done.stdout)
    assert "meshlib.mesh" in seen["added"]
    assert seen["sockets"] == []
    assert seen["threads"] == 0
    assert [
        name for name in seen["added"] if any(name == heavy or name.startswith(f"{heavy}.") for heavy in HEAVY)
    ] == []


def test_everything_public_is_there_and_listed() -> None:
    import meshlib

    assert len(set(meshlib.__all__)) == len(meshlib.__all__)
    assert all(hasattr(meshlib, name) for name in meshlib.__all__)


def test_a_mesh_shows_what_people_call_and_nothing_else() -> None:
    made = {"from_mapping", "from_toml", "from_env"}
    clients = {"client", "async_client", "transport", "async_transport", "call"}
    looks = {"snapshot", "subscribe"}
    changes = {"update", "eject", "restore", "register"}
    life = {"wait_ready", "await_ready", "close", "aclose"}
    assert {name for name in dir(Mesh) if not name.startswith("_")} == made | clients | looks | changes | life
