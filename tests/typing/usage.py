"""What users write, for type checkers only: this file is never run."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, assert_type

import httpx
import tenacity
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.trace import NoOpTracerProvider

import meshlib
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
    PeakEwma,
    Random,
    Retry,
    RoundRobin,
    Service,
    Throttle,
    Timeout,
    UnknownService,
    deadline,
    options,
    report,
    telemetry,
)
from meshlib.core.balance import Balancer, Candidates
from meshlib.core.chance import Rng
from meshlib.core.node import Node
from meshlib.core.outcome import Outcome
from meshlib.core.report import Attempt, Report
from meshlib.core.snapshot import NodeSnapshot, ServiceSnapshot
from meshlib.discovery import Failover, File, Resolution, Resolver, Static
from meshlib.events import Ejected, Event
from meshlib.registry import Registration
from meshlib.testing import BalancerHarness, Faults, ManualClock, ManualResolver, faults, no_backoff

# Settings

orders = Service("orders", ["10.0.0.1:8080", "10.0.0.2:8080"])
users = Service("users", "static:10.0.0.1:8080,10.0.0.2:8080?weight=3,1", balancer=RoundRobin())
search = Service(
    "search",
    ["10.0.0.1:8080", Endpoint("10.0.0.2", 8080, weight=0.5, priority=1, zone="a", metadata={"version": "v2"})],
    balancer=LeastRequest(choices=3),
    timeout=Timeout(total=5, attempt=0.5, connect=0.25),
    retry=Retry(
        max_attempts=4,
        on_status=[500, 503],
        methods=("GET", "POST"),
        wait=tenacity.wait_fixed(0.1) + tenacity.wait_random(0, 0.1),
        stop=tenacity.stop_after_delay(5) | tenacity.stop_after_attempt(3),
        on=tenacity.retry_if_exception_type(httpx.ReadTimeout) & tenacity.retry_if_exception(lambda error: True),
        budget=Budget(capacity=100, retry_cost=10, throttle_cost=2.5, refund=0),
        buffer_body=0,
    ),
    breaker=Breaker(consecutive=3, open_for=1, max_open_for=30.0, max_ejected=0),
    throttle=Throttle(k=1.5, window=60, enforce=False),
    limit=Limit(100, per_endpoint=40),
    health=HealthCheck("/healthz", interval=5, timeout=0.5, healthy=1, unhealthy=2, expect={200, 204}),
    hedge=Hedge(max_extra=0.05, after=None),
    connections=Connections(max_per_endpoint=10, max_idle=1, keepalive=5, max_age=60),
    tls=TLS(verify="ca.pem", server_name="search.internal", cert="cert.pem", key="key.pem", min_version="1.3"),
    host="endpoint",
)
pairs: tuple[str | Endpoint, ...] = ("10.0.0.1:80", Endpoint.parse("[::1]:80", weight=2))
plain = Service("plain", pairs, scheme="https", host=None)
lazily = Service("lazily", (f"10.0.0.{number}:80" for number in range(1, 4)))
written = Service("written", "file:endpoints.toml", min_healthy=2, max_stale=600)
mesh = Mesh(orders, users, search, zone="eu-west-1a", clock=time.monotonic, rng=random.Random(1))
by_hand = Mesh(orders, clock=ManualClock(), send_deadline=False)
seen = Mesh(
    orders,
    spans="attempt",
    endpoint_attributes=True,
    call_duration=False,
    meter_provider=NoOpMeterProvider(),
    tracer_provider=NoOpTracerProvider(),
)
with telemetry.setup("checkout", prometheus_port=9464, otlp="http://127.0.0.1:4318", console=True) as running:
    assert_type(running.flush(timeout=1.0), bool)
    assert_type(running.prometheus_port, int | None)
played = Mesh(orders, inner=lambda endpoint: httpx.MockTransport(lambda request: httpx.Response(200)))

assert_type(orders.name, str)
assert_type(orders.timeout.total, float)
assert_type(orders.tls, TLS | None)
assert_type(Endpoint("10.0.0.1", 80).place, tuple[str, int])
assert_type(str(Endpoint("10.0.0.1", 80)), str)
assert_type(meshlib.__version__, str)

# Resolvers


class Everywhere:
    """Knows one endpoint."""

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        return Resolution([Endpoint("10.0.0.1", 80)], ttl=5.0, warnings=["only one"])


resolver: Resolver = Everywhere()
resolvers: tuple[Resolver, ...] = (Static(["10.0.0.1:80"]), File("endpoints.toml"), Failover("file:x.toml", resolver))
everywhere = Service("everywhere", Everywhere())
in_turn = Service("in-turn", [Everywhere(), "static:10.0.0.1:80"])
urls: list[str] = ["file:endpoints.toml", "static:10.0.0.1:80"]
by_url = Service("by-url", urls)

# Clients

with mesh, mesh.client("orders", headers={"x-a": "b"}, follow_redirects=True) as client:
    assert_type(client, httpx.Client)
    response = client.get("/v1/orders/5", extensions={"meshlib": {"idempotent": True}})

assert_type(mesh.transport(), httpx.BaseTransport)
assert_type(mesh.async_transport(), httpx.AsyncBaseTransport)
foreign = httpx.Client(transport=mesh.transport())
foreign_async = httpx.AsyncClient(transport=mesh.async_transport())


async def main() -> None:
    async with mesh, mesh.async_client() as client:
        assert_type(client, httpx.AsyncClient)
        assert_type(await client.get("http://orders/v1/orders/5"), httpx.Response)
    await mesh.aclose()


# Options and deadlines: blocks, and decorators that leave a function's type as it is


with options(timeout=2.0, idempotent=True, hash_key="u1", retry=False), deadline(1.5):
    pass


@options(timeout=Timeout(total=1.0))
def fetch(order: int, *, fresh: bool = False) -> str:
    return f"{order}{fresh}"


@deadline(1.5)
async def fetch_async(order: int) -> bytes:
    return str(order).encode()


assert_type(fetch(5, fresh=True), str)


async def fetches() -> None:
    assert_type(await fetch_async(5), bytes)


# Decorated functions lose their first parameter, and gain their fallback's type


@mesh.call("orders")
def order(client: httpx.Client, number: int, *, fresh: bool = False) -> str:
    return client.get(f"/orders/{number}", params={"fresh": fresh}).text


@mesh.call("orders", timeout=0.5, idempotent=True, hash_key=lambda number: str(number), fallback=None)
async def order_async(client: httpx.AsyncClient, number: int) -> str:
    return (await client.get(f"/orders/{number}")).text


def how_long(error: Exception) -> int:
    return len(str(error))


@mesh.call("orders", hash_key="u1", retry=False, url_template="/orders", fallback=how_long)
def orders_of(client: httpx.Client, *numbers: int) -> list[str]:
    return [str(number) for number in numbers]


async def nobody(number: int) -> bytes:
    return b"nobody"


@mesh.call("orders", fallback=nobody)
async def order_or_nobody(client: httpx.AsyncClient, number: int) -> str:
    return str(number)


assert_type(order(5, fresh=True), str)
assert_type(orders_of(1, 2), list[str] | int)


async def decorated() -> None:
    assert_type(await order_async(5), str | None)
    assert_type(await order_or_nobody(number=5), str | bytes)


# What happened

assert_type(report(response), Report)
for attempt in report(response).attempts:
    assert_type(attempt, Attempt)
    assert_type(attempt.endpoint, Endpoint)
    assert_type(attempt.outcome, Outcome | None)
    assert_type(attempt.seconds, float)
    assert_type(attempt.retry_after, float | None)
    assert_type(attempt.status, int | None)
    assert_type(attempt.why, str)
    if attempt.kind == "failover" and attempt.outcome == "not_sent":
        print(attempt)

assert_type(report(response).to_dict(), dict[str, Any])


def note(event: Event) -> None:
    assert_type(event.service, str)
    assert_type(event.at, float)
    if isinstance(event, Ejected):
        assert_type(event.endpoint, Endpoint)
        assert_type(event.seconds, float | None)
        mesh.restore(event.service, event.endpoint)


unsubscribe = mesh.subscribe(note)
assert_type(mesh.subscribe(lambda event: print(event.to_dict())), Callable[[], None])
unsubscribe()

for name, service in mesh.snapshot().items():
    assert_type(name, str)
    assert_type(service, ServiceSnapshot)
    assert_type(service.nodes, tuple[NodeSnapshot, ...])
    for node in service.nodes:
        assert_type(node.p99, float | None)
        assert_type(node.eligible, bool)
        if node.state == "half_open":
            print(node.to_dict())

try:
    foreign.get("http://orders/")
except UnknownService as unknown:
    assert_type(unknown.known, tuple[str, ...])
except (DeadlineExceeded, NoEndpoints, Overloaded) as late:
    print(late.request.url, report(late))
except MeshError as error:
    as_transport_error: httpx.TransportError = error

try:
    Timeout(total=0)
except ConfigError as config_error:
    as_value_error: ValueError = config_error
    for fault in config_error.faults:
        print(fault.path, fault.message)

# A balancer of one's own


@dataclass(frozen=True)
class Freshest:
    """Prefers the node with the lowest latency."""

    spread: float = 0.1

    def prepare(self, nodes: Sequence[Node], rng: Rng) -> Candidates:
        def candidates(now: float, key: str | None) -> Iterator[Node]:
            yield from sorted(nodes, key=lambda node: node.ewma + self.spread * rng.random())

        return candidates


own: Balancer = Freshest()
default = Service("default", ["10.0.0.1:80"], balancer=PeakEwma(choices=3, decay=5, penalty=2.0))
harness = BalancerHarness(Freshest(), ["10.0.0.1:80", Endpoint("10.0.0.2", 80)], random.Random(1))
assert_type(harness.pick(0.0, key="u1", exclude={Endpoint("10.0.0.1", 80)}), Endpoint)
harness.done(harness.pick(now=0.5), 0.75, latency=0.25, failed=True)
harness.update(["10.0.0.1:80"])
balancers: tuple[Balancer, ...] = (PeakEwma(), LeastRequest(), RoundRobin(), Random(), ConsistentHash(), Freshest())


def tenant(request: httpx.Request) -> str | None:
    """The key of a request."""
    found: str | None = request.headers.get("x-tenant")
    return found


by_key: tuple[Balancer, ...] = (
    ConsistentHash(key="header:x-user-id", scheme="ring", bounded_load=1.25),
    ConsistentHash(key=tenant),
    ConsistentHash(key=lambda request: request.url.host),
)
own_wait = Retry(wait=lambda state: 0.1 * state.attempt_number, stop=lambda state: state.idle_for > 1, on=None)
chance: Rng = random.Random(1)
Service("own", ["10.0.0.1:80"], balancer=Freshest(spread=0.2))

# Registration
registration = mesh.register("orders", port=8000, host="10.0.0.5", tags=["v2"], meta={"zone": "a"}, check="http")
assert_type(registration.state, str)
with mesh.register("orders", port=8000, ttl=5, alive=lambda: True) as entered:
    assert_type(entered, Registration)


async def registered(alive: Callable[[], Awaitable[bool]]) -> None:
    async with mesh.register("orders", port=8000, alive=alive) as entered:
        assert_type(entered, Registration)


# Configuration

assert_type(Mesh.from_mapping({"services": {"orders": {"resolver": ["10.0.0.1:80"]}}}, zone="a"), Mesh)
Mesh().update(Service("orders", ["10.0.0.1:80"]), Service("users", "dns://users:80"))
configured: tuple[Callable[..., Mesh], ...] = (Mesh.from_toml, Mesh.from_env)

# Tests

by_manual = ManualResolver(["10.0.0.1:80", Endpoint("10.0.0.2", 80)])
by_manual.set([Endpoint("10.0.0.1", 80)])
by_manual.fail(OSError("down"))
Service("manual", by_manual)
with (
    no_backoff(),
    faults(mesh, "orders", fail=0.3, status=503, endpoint=("10.0.0.1", 80), rng=random.Random(1)) as played_faults,
    faults(mesh, "orders", hang=1, latency=0.2, endpoint="10.0.0.1:80"),
):
    assert_type(played_faults, Faults)
    assert_type(played_faults.hit, int)
