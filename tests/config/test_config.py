"""Configuration: what tables come to, which faults are told, and what wins over what."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib import (
    TLS,
    Breaker,
    Budget,
    ConfigError,
    Connections,
    ConsistentHash,
    Endpoint,
    HealthCheck,
    Hedge,
    LeastRequest,
    Limit,
    Mesh,
    PeakEwma,
    Random,
    Retry,
    RoundRobin,
    Service,
    Throttle,
    Timeout,
)
from meshlib.config import tables
from meshlib.config.reading import Fixed, configured
from meshlib.config.sources import of_environment, of_file
from meshlib.discovery import Static

ADDRESSES = ["10.0.0.1:80", "10.0.0.2:80"]

WHOLE = """
[mesh]
zone = "eu-west-1a"
send_deadline = false
spans = "call"

[services.orders]
resolver = ["10.0.0.1:80", "10.0.0.2:80"]
balancer = { type = "consistent_hash", key = "header:x-user-id", bounded_load = 1.25 }
timeout = { total = 5, attempt = 1.5 }
limit = { max_in_flight = 100, per_endpoint = 10 }
hedge = { after = 0.1 }
health = { path = "/healthz", expect = [200, 204] }
connections = { max_idle = 5 }
throttle.k = 1.5
host = "endpoint"
min_healthy = 2
max_stale = 60

[services.orders.retry]
max_attempts = 2
on_status = [503]
methods = ["GET"]
wait = 0.5
budget = { capacity = 100 }

[services.orders.breaker]
consecutive = 3
slow_call = 2.5
enforce = false

[services.users]
resolver = "static:10.0.0.3:80"
balancer = "least_request"
scheme = "https"
tls = { server_name = "users.internal", min_version = "1.3" }
"""


def read(text: str, **more: Any) -> Any:
    return configured(tomllib.loads(text), **more)


def faults(text: str, **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, **more)
    return [str(fault) for fault in caught.value.faults]


def settings_of(service: Service) -> dict[str, Any]:
    resolver = service.resolver
    return {name: getattr(service, name) for name in ("name", *tables.keys_of(Service)) if name != "resolver"} | {
        "resolver": [str(each) for each in resolver.endpoints] if isinstance(resolver, Static) else resolver
    }


def test_every_setting_is_taken_from_the_file() -> None:
    found = read(WHOLE)
    orders = Service(
        "orders",
        ADDRESSES,
        balancer=ConsistentHash(key="header:x-user-id", bounded_load=1.25),
        timeout=Timeout(total=5, attempt=1.5),
        limit=Limit(100, per_endpoint=10),
        hedge=Hedge(after=0.1),
        health=HealthCheck("/healthz", expect={200, 204}),
        connections=Connections(max_idle=5),
        throttle=Throttle(k=1.5),
        host="endpoint",
        min_healthy=2,
        max_stale=60,
        retry=Retry(max_attempts=2, on_status={503}, methods={"GET"}, wait=Fixed(0.5), budget=Budget(capacity=100)),
        breaker=Breaker(consecutive=3, slow_call=2.5, enforce=False),
    )
    tls = TLS(server_name="users.internal", min_version="1.3")
    users = Service("users", "static:10.0.0.3:80", balancer=LeastRequest(), scheme="https", tls=tls)
    assert [settings_of(each) for each in found.services] == [settings_of(orders), settings_of(users)]
    assert found.options == {"zone": "eu-west-1a", "send_deadline": False, "spans": "call"}
    mesh = Mesh.from_mapping(tomllib.loads(WHOLE), zone="b")
    assert (mesh._zone, mesh._send_deadline, list(mesh.snapshot())) == ("b", False, ["orders", "users"])


def test_no_setting_is_forgotten() -> None:
    """What a mesh or a service takes can be said in a file, but for what no file can hold."""
    names = {name for name, each in inspect.signature(Mesh).parameters.items() if isinstance(each.default, bool | str)}
    assert names == tables.keys_of(tables.Options).keys()
    for kind in (Service, Timeout, Retry, Budget, Breaker, Throttle, Hedge, Limit, HealthCheck, Connections, TLS):
        for key in tables.keys_of(kind).values():
            assert key.text, (kind, key.name)
            assert key.is_code == ((kind, key.name) in {(Service, "balancer"), (Retry, "stop"), (Retry, "on")})


@pytest.mark.parametrize("balancer", [PeakEwma(), LeastRequest(), RoundRobin(), Random(), ConsistentHash()])
def test_every_balancer_has_a_name(balancer: Any) -> None:
    names = [name for name in tables.BALANCERS if tables.balancer_named(name) is type(balancer)]
    (orders,) = configured({"services": {"orders": {"resolver": ADDRESSES, "balancer": names[0]}}}).services
    assert orders.balancer == balancer


@pytest.mark.parametrize(
    ("resolver", "endpoints"),
    [
        ('["10.0.0.1:80", {host = "10.0.0.2", port = 81, weight = 3, zone = "a", metadata = {v = "2"}}]', None),
        ('"static:10.0.0.1:80"', [Endpoint("10.0.0.1", 80)]),
    ],
)
def test_endpoints_are_addresses_or_tables(resolver: str, endpoints: Any) -> None:
    heavy = Endpoint("10.0.0.2", 81, weight=3, zone="a", metadata={"v": "2"})
    (orders,) = read(f"[services.orders]\nresolver = {resolver}").services
    assert list(orders.resolver.endpoints) == (endpoints or [Endpoint("10.0.0.1", 80), heavy])


def test_every_fault_is_told_at_once_in_the_order_of_the_file() -> None:
    assert faults("""
        [mesh]
        zone = 3
        send_deadlines = true
        [service.orders]
        [services.orders]
        balancer = "least-request"
        timeout = {total = 0, atempt = 1, connect = "x"}
        resolver = ["10.0.0.1:80", "10.0.0.2"]
        host = ""
        [services.orders.retry]
        max_attempts = 0
        on = "503"
        wait = -1
        budget = {capacity = nan}
        buffer_body = 0xffffffffffffffffffffffff
        [services.users]
        limit = {per_endpoint = 0}
        resolver = "consul://127.0.0.1:8500/users"
        tls = {key = "a.pem"}
        scheme = "http"
        [services.order]
        timeout = 5
    """) == [
        "service: must not be there; did you mean 'services'? (known: mesh, services)",
        "mesh.zone: must be a str, for example 'eu-west-1a', got 3",
        "mesh.send_deadlines: must not be there; did you mean 'send_deadline'? "
        "(known: passthrough, zone, send_deadline, spans, endpoint_attributes, call_duration)",
        "services.orders.balancer: must be one of peak_ewma, least_request, round_robin, random, consistent_hash, "
        "got 'least-request'; did you mean 'least_request'?",
        "services.orders.timeout.total: must be > 0, got 0",
        "services.orders.timeout.atempt: must not be there; did you mean 'attempt'? (known: total, attempt, connect)",
        "services.orders.timeout.connect: must be a finite number, got 'x'",
        "services.orders.resolver[1]: endpoint: must be 'host:port', for example '10.0.0.1:8080' or '[::1]:8080', "
        "got '10.0.0.2'",
        "services.orders.host: must be None, 'endpoint' or a header value, for example 'orders.internal', got ''",
        "services.orders.retry.max_attempts: must be >= 1, got 0",
        "services.orders.retry.on: must be set in code: it is a function, got '503'",
        "services.orders.retry.wait: must be seconds from 0 to 3600, got -1",
        "services.orders.retry.budget.capacity: must be a finite number, got nan",
        "services.orders.retry.buffer_body: must be a number that fits 64 bits",
        "services.users.limit.per_endpoint: must be >= 1, got 0",
        "services.users.limit.max_in_flight: must be given",
        "services.users.tls.cert: must be given with a key, TLS(cert='client.pem', key='client.key'), got none",
        "services.order.timeout: must be a table, for example timeout = {total = 30.0} "
        "(known: total, attempt, connect), got 5",
        "services.order.resolver: must be given, for example resolver = ['10.0.0.1:8080']; "
        "did you mean services.orders?",
    ]


def test_a_file_of_tls_is_looked_at_whatever_else_is_wrong() -> None:
    told = faults("[services.orders]\nresolver = '10.0.0.1:80'\ntls.verify = 'nowhere.pem'")
    assert [fault.partition(":")[0] for fault in told] == ["services.orders.resolver", "services.orders.tls.verify"]


def orders(line: str) -> str:
    return f"[services.orders]\nresolver = ['10.0.0.1:80']\n{line}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "services: must name at least one"),
        ("services = 5", "services: must be a table, for example [services.orders], got int"),
        (
            "services.orders = {resolver = ['10.0.0.1:80']}\nmesh = 5",
            "mesh: must be a table, for example [mesh], got int",
        ),
        (
            "[services.a]\nresolver = ['10.0.0.1:80']\n[b]\nresolver = []",
            "b: must be a table in services; did you mean [s",
        ),
        ("[services.orders]\nresolver = 5", "services.orders.resolver: must be a URL, or a list of addresses"),
        ("[services.orders]\nresolver = [['10.0.0.1:80']]", "services.orders.resolver: must be a list of addresses"),
        ("[services.orders]\nresolver = []", "services.orders.resolver: must name at least one endpoint"),
        (
            "[services.orders]\nresolver = [{host = '10.0.0.1'}]",
            "services.orders.resolver[0].port: must be given",
        ),
        ("[services.orders]\nresolver = 'consull://h/x'", "services.orders.resolver: must be a URL of a known scheme"),
        ("[services.'Orders!']\nresolver = ['10.0.0.1:80']", "services.'Orders!'.name: must be a host name in lower"),
        (orders("timeout = 1979-05-27"), "services.orders.timeout: must be a table"),
        (orders("min_healthy = true"), "services.orders.min_healthy: must be a whole number, got True"),
        (orders("min_healthy = 1.0"), "services.orders.min_healthy: must be a whole number, got 1.0"),
        (orders("max_stale = inf"), "services.orders.max_stale: must be a finite number, got inf"),
        (orders("max_stale = [1]"), "services.orders.max_stale: must not be a list, for example max_stale = 3600.0"),
        (orders("max_stale = {a = 1}"), "services.orders.max_stale: must not be a table"),
        (
            orders("retry.on_status = [[503]]"),
            "services.orders.retry.on_status: must be a list of values, not of lists or tables, "
            "for example on_status = [502, 503, 504]",
        ),
        (orders("health = '/x'"), "services.orders.health: must be a table, for example health = {path = '/healthz'}"),
        (orders("limit = 5"), "services.orders.limit: must be a table, for example limit = {max_in_flight = 100}"),
        (orders("retry.on_status = [99]"), "services.orders.retry.on_status: must be a set of statuses"),
        (orders("breaker.enforce = 1"), "services.orders.breaker.enforce: must be True or False, got 1"),
        (orders("balancer = {choices = 2}"), "services.orders.balancer.type: must be one of peak_ewma"),
        (orders("balancer = {type = 'least_request', choices = 1}"), "services.orders.balancer.choices: must be >= 2"),
        (orders("balancer = 5"), "services.orders.balancer: must be the name of a balancer"),
        (orders("health = {path = 'x'}"), "services.orders.health.path: must be a path"),
        (orders("tls = {verify = 'nowhere.pem'}"), "services.orders.tls.verify: must be 'system' or a readable bundle"),
        (orders('tls = {verify = "a\\u0000"}'), "services.orders.tls.verify: must be 'system' or a readable bundle"),
        (
            orders('tls = {cert = "a\\u0000", key = "b"}'),
            "services.orders.tls.cert: must be a certificate whose key fits",
        ),
        (orders("tls = {}\nscheme = 'http'"), "services.orders.scheme: must be 'https' or left out"),
        (orders("host = '${NOPE}'"), "services.orders.host: must name a variable that is set in the environment"),
        (orders(f"host = '{'x' * 9000} '"), "services.orders.host: must be None, 'endpoint' or a header value"),
    ],
)
def test_a_fault_says_where_it_is(text: str, fault: str) -> None:
    (told,) = faults(text, environ={})
    assert told.startswith(fault)
    assert len(told) < 400


@pytest.mark.parametrize(
    "document",
    [
        None,
        5,
        [],
        {1: 2, "services": {3: 4}},
        {"services": {"orders": {"resolver": [{}], (): None}}},
        {"services": {"orders": {"resolver": ["10.0.0.1:80"], "host": 10**5000}}},
        {"services": {"orders": {"resolver": "x", "retry": {"on_status": {}, "wait": 10**400, "stop": int}}}},
    ],
)
def test_whatever_else_is_a_config_error(document: Any) -> None:
    with pytest.raises(ConfigError):
        Mesh.from_mapping(document)


def test_what_no_file_can_hold_goes_through_a_mapping_as_it_is() -> None:
    def wait(state: Any) -> float:
        return 0.0

    resolver, balancer = Static(ADDRESSES), PeakEwma(choices=3)
    table = {"resolver": resolver, "balancer": balancer, "retry": {"wait": wait}, "timeout": Timeout(total=3)}
    (orders,) = configured({"services": {"orders": table}}).services
    assert (orders.resolver, orders.balancer, orders.retry.wait) == (resolver, balancer, wait)
    assert orders.timeout.total == 3


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("10.0.0.1:80"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)

PROPERTY = hypothesis.settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    database=None,
)


@PROPERTY
@given(st.dictionaries(st.sampled_from([*tables.keys_of(Service), "x"]), VALUES, max_size=5))
def test_anything_is_a_service_or_a_config_error(table: dict[str, Any]) -> None:
    try:
        configured({"services": {"orders": {"resolver": ADDRESSES, **table}}})
    except ConfigError as error:
        paths = [fault.path for fault in error.faults]
        assert [path for path in paths if not path.startswith("services.orders.")] == []


# Files


def test_relative_paths_begin_at_the_folder_of_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "a b%"
    folder.mkdir()
    (folder / "mesh.toml").write_text("""
        [services.orders]
        resolver = "file:endpoints.toml"
        [services.users]
        resolver = ["failover:file:b.toml|file:/etc/c.toml", "consul://h:1/users?token_file=token"]
        [services.files]
        resolver = "consul://h:1/users?token_file=/run/token"
    """)
    (folder / "token").write_text("t")
    orders, users, files = of_file(folder / "mesh.toml").read((folder / "mesh.toml").read_bytes()).services
    assert orders.resolver.path == folder / "endpoints.toml"  # type: ignore[union-attr]
    first, second, third = users.resolver.parts  # type: ignore[union-attr]
    assert (first.path, second.path) == (folder / "b.toml", Path("/etc/c.toml"))
    assert str(third.agent.token_file) == str(folder / "token")
    assert str(files.resolver.agent.token_file) == "/run/token"  # type: ignore[union-attr]


def test_relative_certificates_begin_there_as_well(tmp_path: Path, certificates: tuple[str, str]) -> None:
    bundle = Path(certificates[0])
    text = orders(f"tls = {{verify = '{bundle.name}', server_name = 'x'}}")
    (service,) = read(text, folder=bundle.parent).services
    assert service.tls == TLS(verify=str(bundle), server_name="x")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"x = ", "TOML: must be well-formed: Invalid value (at end of document)"),
        (b"[services.orders]\n[services.orders]", "TOML: must be well-formed: Cannot declare"),
        (b"\xff", "TOML: must be well-formed: 'utf-8' codec"),
        (b"x = " + b"[" * 9000, "TOML: must not be nested that deeply"),
        (b"x = " + b"9" * 9000, "TOML: must be well-formed: Exceeds the limit"),
    ],
)
def test_a_file_that_is_no_toml_says_where(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "mesh.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Mesh.from_toml(tmp_path / "mesh.toml")
    assert str(caught.value).startswith(fault)
    assert caught.value.__notes__ == [f"in {tmp_path / 'mesh.toml'}"]


def test_a_file_must_be_there_and_be_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Mesh.from_toml(tmp_path / "mesh.toml")
    with pytest.raises(ConfigError, match="must be a file"):
        Mesh.from_toml(tmp_path)


# The environment


def env(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_the_environment_wins_over_the_file_and_keywords_over_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mesh.toml").write_text("""
        mesh = {zone = "file", spans = "call", endpoint_attributes = true}
        [services.order-items]
        resolver = ["10.0.0.1:80"]
        balancer = "least_request"
        timeout = {total = 7, attempt = 2}
    """)
    env(
        monkeypatch,
        MESHLIB_CONFIG=str(tmp_path / "mesh.toml"),
        MESHLIB_MESH__ZONE="env",
        MESHLIB_MESH__SPANS="off",
        MESHLIB_SERVICES__ORDER_ITEMS__TIMEOUT__TOTAL="5.5",
        MESHLIB_SERVICES__ORDER_ITEMS__BALANCER__CHOICES="4",
        MESHLIB_SERVICES__ORDER_ITEMS__RETRY__ON_STATUS="[502, 503]",
        MESHLIB_SERVICES__ORDER_ITEMS__TLS__MIN_VERSION="1.3",
        MESHLIB_SERVICES__USERS__RESOLVER="static:10.0.0.3:80",
        MESHLIB_SERVICES__USERS__HOST="5",
        MESHLIB_SERVICES__USERS__LIMIT="{max_in_flight = 3}",
        MESHLIB_SERVICES__USERS__TIMEOUT="{total = 6}",
        MESHLIB_SERVICES__USERS__TIMEOUT__ATTEMPT="3",
        MESHLIB_SERVICES__USERS__BALANCER="least_request",
        MESHLIB_SERVICES__USERS__BALANCER__CHOICES="5",
        MESHLIB_OTHER="left alone",
    )
    mesh = Mesh.from_env(spans="attempt")
    items, users = (mesh._clusters[name].service for name in ("order-items", "users"))
    assert (items.timeout, items.balancer) == (Timeout(total=5.5, attempt=2), LeastRequest(choices=4))
    assert items.retry.on_status == {502, 503}
    assert items.tls == TLS(min_version="1.3")
    assert (users.host, users.limit) == ("5", Limit(3))
    assert (users.timeout, users.balancer) == (Timeout(total=6, attempt=3), LeastRequest(choices=5))
    assert mesh._zone == "env"
    assert mesh._telemetry._spans == "attempt"
    assert mesh._telemetry._recorded["endpoint_attributes"] is True


def test_a_fault_of_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    env(
        monkeypatch,
        SHOP_SERVICE__ORDERS__HOST="x",
        SHOP_SERVICES__ORDERS="x",
        SHOP_SERVICES__ORDERS__RESOLVER='["10.0.0.1:80"]',
        SHOP_SERVICES__ORDERS__RETRY__MAX_ATTEMPTS="0",
        SHOP_SERVICES__ORDRES__TIMEOUT__TOTAL="3\nx = 4",
    )
    with pytest.raises(ConfigError) as caught:
        Mesh.from_env("SHOP_")
    assert [str(fault) for fault in caught.value.faults] == [
        "SHOP_SERVICES__ORDERS: must name a setting, for example SHOP_SERVICES__ORDERS__RESOLVER",
        "SHOP_SERVICE__ORDERS__HOST: must begin with SHOP_SERVICES__ or SHOP_MESH__; did you mean SHOP_SERVICES__...?",
        "services.orders.retry.max_attempts: must be >= 1 (from SHOP_SERVICES__ORDERS__RETRY__MAX_ATTEMPTS)",
        "services.ordres.timeout.total: must be a finite number (from SHOP_SERVICES__ORDRES__TIMEOUT__TOTAL)",
        "services.ordres.resolver: must be given, for example resolver = ['10.0.0.1:8080']; "
        "did you mean services.orders?",
    ]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("RESOLVER", "s3cret"),
        ("RESOLVER", "consul://s3cret@127.0.0.1:8500/orders?token=s3cret"),
        ("RESOLVER", "file:s3cret?s3cret"),
        ("RESOLVER", '["10.0.0.1:80", "s3cret"]'),
        ("RESOLVER", '[{host = "s3cret it\'s"}]'),
        ("TLS__VERIFY", "/no/s3cret"),
        ("TLS", '{cert = "/no/s3cret", key = "/no/s3cret"}'),
        ("SCHEME", "s3cret" * 100),
        ("HOST", "s3cret\n"),
        ("BALANCER", "s3cret"),
        ("TIMEOUT__TOTAL", "s3cret"),
        ("LIMIT", "s3cret"),
        ("RETRY__ON_STATUS", '["s3cret"]'),
        ("HEALTH", '{path = "s3cret"}'),
    ],
)
def test_T3_a_fault_of_the_environment_shows_no_value(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: str
) -> None:
    # The guard: `_with_origin`.
    env(monkeypatch, SHOP_SERVICES__ORDERS__RESOLVER='["10.0.0.1:80"]')
    env(monkeypatch, **{f"SHOP_SERVICES__ORDERS__{setting}": value})
    with pytest.raises(ConfigError, match=f"from SHOP_SERVICES__ORDERS__{setting}") as caught:
        Mesh.from_env("SHOP_")
    assert "s3cret" not in str(caught.value)


def test_T3_what_a_variable_stands_for_is_not_shown() -> None:
    text = orders("host = '${HOST_PART}.internal'\nbreaker.window = '${WINDOW}'")
    told = faults(text, environ={"HOST_PART": "s3cret host", "WINDOW": "s3cret"})
    assert "s3cret" not in str(told)
    assert told[0].startswith("services.orders.host: must be None, 'endpoint' or a header value")
    assert told[0].endswith(", got '${HOST_PART}.internal'")
    (service,) = read(orders("host = '${HOST_PART}.internal'"), environ={"HOST_PART": "a"}).services
    assert service.host == "a.internal"


@pytest.mark.parametrize(
    ("setting", "environ"),
    [
        ("scheme = 'x${A}${B}'", {"A": "pass", "B": "password-s3cret"}),
        ("balancer = '${A}'", {"A": "s3cret" * 30}),
        ("scheme = 'x${A}'", {"A": "a\ns3cret"}),
        ("scheme = 'x\"${A}'", {"A": "it's s3cret"}),
        ("tls.verify = '${A}'", {"A": "/s3cret/bundle.pem"}),
    ],
    ids=["one within another", "long", "escaped", "quoted", "path"],
)
def test_T3_nor_any_part_of_it(setting: str, environ: dict[str, str]) -> None:
    (told,) = faults(orders(setting), environ=environ)
    assert "s3cret" not in told
    assert "${" in told


def test_an_environment_without_services_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    example = "NOTHING_OF_THE_KIND_SERVICES__ORDERS__RESOLVER"
    with pytest.raises(ConfigError, match=rf"services: must name at least one, for example {example}\Z"):
        Mesh.from_env("NOTHING_OF_THE_KIND_")
    assert of_environment("NOTHING_").path is None


def test_nothing_of_this_is_loaded_by_import_meshlib() -> None:
    script = "import sys, meshlib; print([m for m in sys.modules if m == 'tomllib' or m.startswith('meshlib.config')])"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_a_service_of_a_file_can_be_changed_in_code() -> None:
    (service,) = read(orders("")).services
    assert replace(service, timeout=Timeout(total=1)).timeout.total == 1
