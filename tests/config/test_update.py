"""`mesh.update`: other settings for services that are in use. What was learned stays, and no call is lost to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import anyio
import httpx
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from conftest import Colour, Secured
from meshes import outcomes, over
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
    IdentityError,
    LeastRequest,
    Limit,
    Mesh,
    NoEndpoints,
    Overloaded,
    PeakEwma,
    Retry,
    RoundRobin,
    Service,
    Throttle,
    Timeout,
    UnknownService,
    health,
    report,
    updates,
)
from meshlib.core.cluster import Cluster
from meshlib.core.node import Node
from meshlib.discovery import Failover, Resolution, feed
from meshlib.discovery.feed import Membership
from meshlib.events import ConfigChanged, Event
from meshlib.testing import ManualClock, Upstream
from waiting import until

A, B, C = "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"

LONG = 20.0

pytestmark = pytest.mark.usefixtures("no_leaks")


def answering(status: int = 200) -> Callable[[Endpoint], httpx.MockTransport]:
    return lambda endpoint: httpx.MockTransport(lambda request: httpx.Response(status, text=str(endpoint)))


def cluster_of(mesh: Mesh, service: str = "orders") -> Cluster:
    return mesh._clusters[service]


def nodes_of(mesh: Mesh, service: str = "orders") -> dict[str, Node]:
    return {str(node.endpoint): node for node in cluster_of(mesh, service).view.nodes}


def places(mesh: Mesh) -> list[str]:
    return [str(node.endpoint) for node in mesh.snapshot()["orders"].nodes]


class Told:
    """A resolver that answers what it is told, and counts how often it was asked."""

    def __init__(self, *endpoints: str, key: str | None = None) -> None:
        self.endpoints: Sequence[str] = endpoints
        self.watch_key = key
        self.asked = 0
        self.hangs = False

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        self.asked += 1
        while self.hangs:
            await asyncio.sleep(0.005)
        return Resolution([Endpoint.parse(each) for each in self.endpoints], 0.05)


# What was learned stays


def test_nodes_budget_and_throttle_go_on() -> None:
    mesh = over(A, B, inner=answering(503), breaker=Breaker(consecutive=2), retry=Retry(budget=Budget(capacity=100)))
    with mesh.client("orders") as client:
        for _ in range(4):
            client.get("/")
        cluster, nodes, shedder = cluster_of(mesh), nodes_of(mesh), cluster_of(mesh).shedder
        learned = {place: (node.breaker.state, node.attempts, node.ewma) for place, node in nodes.items()}
        left = cluster.bucket.tokens
        assert "open" in str(learned)
        assert left < 100
        settings: dict[str, Any] = {"breaker": Breaker(consecutive=9), "retry": Retry(budget=Budget(capacity=1000))}
        mesh.update(Service("orders", [A, B], balancer=PeakEwma(), **settings))
        assert cluster_of(mesh) is cluster
        assert cluster.shedder is shedder
        assert nodes_of(mesh) == nodes
        assert {p: (n.breaker.state, n.attempts, n.ewma) for p, n in nodes_of(mesh).items()} == learned
        assert cluster.bucket.tokens == pytest.approx(left * 10)
        client.get("/")
        assert cluster.view.balancer == "PeakEwma"


def opens_after(mesh: Mesh) -> int:
    with mesh.client("orders") as client:
        for count in range(1, 10):
            client.post("/")
            if any(node.breaker.state == "open" for node in nodes_of(mesh).values()):
                return count
    return 0


def refuses_two(mesh: Mesh) -> bool:
    with mesh.client("orders") as client, client.stream("POST", "/"):
        try:
            client.post("/")
        except Overloaded:
            return True
    return False


SETTINGS: list[tuple[dict[str, Any], Callable[[Mesh], object], object]] = [
    ({"breaker": Breaker(consecutive=2)}, opens_after, 2),
    ({"breaker": Breaker(enforce=False, consecutive=2)}, opens_after, 0),
    ({"breaker": Breaker(slow_call=0.5)}, lambda mesh: cluster_of(mesh).slow_call, 0.5),
    ({"limit": Limit(1)}, refuses_two, True),
    ({"limit": Limit(9, per_endpoint=1)}, lambda mesh: cluster_of(mesh).most_each, 1),
    ({"hedge": Hedge(after=0.1)}, lambda mesh: getattr(cluster_of(mesh).hedging, "_delay", None), 0.1),
    ({"throttle": Throttle(k=1.5)}, lambda mesh: cluster_of(mesh).shedder._settings.k, 1.5),
    ({"retry": Retry(budget=Budget(refund=7))}, lambda mesh: cluster_of(mesh).bucket._settings.refund, 7),
    ({"balancer": PeakEwma(decay=3.0)}, lambda mesh: {node._decay for node in nodes_of(mesh).values()}, {3.0}),
    ({"min_healthy": 2}, lambda mesh: cluster_of(mesh).service.min_healthy, 2),
]


@pytest.mark.parametrize(("settings", "effect", "expected"), SETTINGS, ids=[next(iter(each[0])) for each in SETTINGS])
def test_each_setting_reaches_what_goes_by_it_and_leaves_it_again(
    settings: dict[str, Any], effect: Callable[[Mesh], object], expected: object
) -> None:
    def fails(endpoint: Endpoint) -> httpx.MockTransport:
        return httpx.MockTransport(lambda request: httpx.Response(500, stream=Endless()))

    mesh = over(A, B, inner=fails)
    mesh.update(Service("orders", [A, B], **{"balancer": First(), **settings}))
    assert effect(mesh) == expected
    mesh.restore("orders", A)
    mesh.update(Service("orders", [A, B], balancer=First()))
    assert effect(mesh) != expected


class First:
    """A balancer that prefers the first endpoint."""

    def prepare(self, nodes: Sequence[Any], rng: Any) -> Any:
        return lambda now, key: iter(nodes)


class Endless(httpx.SyncByteStream):
    """A body that is not here yet when the headers are."""

    def __iter__(self) -> Iterator[bytes]:
        yield b"x"


def test_a_breaker_that_is_not_enforced_any_more_lets_go() -> None:
    mesh = over(A, B, inner=answering(500), breaker=Breaker(consecutive=1))
    with mesh.client("orders") as client:
        client.get("/")
        assert "open" in {node.breaker.state for node in nodes_of(mesh).values()}
        mesh.update(Service("orders", [A, B], breaker=Breaker(enforce=False, ramp=0)))
        assert {node.state for node in mesh.snapshot()["orders"].nodes} == {"closed"}
        assert cluster_of(mesh).ejections._ejected.total() == 0


def test_a_shorter_time_of_ejection_holds_at_once() -> None:
    clock = ManualClock()
    service = Service("orders", [A, B], breaker=Breaker(consecutive=1, open_for=600, max_open_for=600))
    mesh = Mesh(service, inner=answering(500), clock=clock)
    with mesh.client("orders") as client:
        client.get("/")
        node = next(node for node in nodes_of(mesh).values() if node.breaker.state == "open")
        mesh.update(Service("orders", [A, B], breaker=Breaker(max_open_for=2.0, window=10.0)))
        assert node.breaker.seconds_left(clock()) <= 3.0


def test_latencies_are_remembered_for_hedges_with_another_share() -> None:
    mesh = over(A, B, inner=answering(), hedge=Hedge(max_extra=0.5))
    hedging = cluster_of(mesh).hedging
    assert hedging is not None
    for number in range(60):
        hedging.observe(number / 100, True)
    assert hedging.delay() == pytest.approx(0.25, abs=0.05)
    mesh.update(Service("orders", [A, B], hedge=Hedge(max_extra=0.1)))
    assert cluster_of(mesh).hedging is hedging
    assert hedging.delay() == pytest.approx(0.54, abs=0.05)


def test_the_hash_key_is_found_as_the_settings_say_now() -> None:
    mesh = over(A, B, C, inner=answering())
    with mesh.client("orders") as client:
        client.get("/")
        mesh.update(Service("orders", [A, B, C], balancer=ConsistentHash(key="header:x-user-id")))
        answers = {client.get("/", headers={"x-user-id": "u1"}).text for _ in range(10)}
        assert len(answers) == 1
        mesh.update(Service("orders", [A, B, C], balancer=RoundRobin(), host="other.example"))
        answers = {client.get("/", headers={"x-user-id": "u1"}).text for _ in range(10)}
        assert len(answers) == 3


def test_doubts_are_those_of_the_settings_of_now(caplog: pytest.LogCaptureFixture) -> None:
    keyed, doubtful = ConsistentHash(key="header:x-user-id"), Timeout(total=1.0)
    mesh = Mesh(Service("orders", [A, B], balancer=keyed, timeout=doubtful), inner=answering())
    with mesh.client("orders") as client:
        client.get("/")
    assert len(mesh.snapshot()["orders"].warnings) == 2
    mesh.update(Service("orders", [A, B], timeout=doubtful))
    (warning,) = mesh.snapshot()["orders"].warnings
    assert "timeout.attempt" in warning
    assert caplog.text.count("timeout.attempt, ") == caplog.text.count("hash key") == 1
    mesh.update(Service("orders", [A, B], timeout=Timeout(total=2.0)))
    assert caplog.text.count("timeout.attempt, ") == 2


# All or none


class Picky:
    """A balancer that cannot do with these endpoints."""

    def prepare(self, nodes: Sequence[Any], rng: Any) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        ((Service("users", [C]), "orders"), "services[2]"),
        ((Service("users", [C]), Service("users", [A])), "services.users"),
        ((Service("users", [C], tls=TLS(verify="/nowhere")),), "services.users.tls.verify"),
        ((Service("users", [C], balancer=Picky()),), "services.users.balancer"),
    ],
)
def test_nothing_changes_if_something_cannot(wrong: tuple[Any, ...], path: str) -> None:
    heard: list[Event] = []
    with Mesh(Service("orders", [A]), Service("users", [B])) as mesh:
        mesh.subscribe(heard.append)
        before = [cluster.service for cluster in mesh._clusters.values()], mesh._clusters["orders"].view
        with pytest.raises(ConfigError) as caught:
            mesh.update(Service("orders", [B], timeout=Timeout(total=1.0)), *wrong)
        assert path in [fault.path for fault in caught.value.faults]
        assert ([cluster.service for cluster in mesh._clusters.values()], mesh._clusters["orders"].view) == before
        assert mesh.snapshot().keys() == {"orders", "users"}
        assert places(mesh) == [A]
    assert heard == []


def test_the_same_settings_are_no_change() -> None:
    heard: list[Event] = []
    with Mesh(Service("orders", "static:10.0.0.1:80", retry=Retry(on_status=[502]))) as mesh:
        mesh.subscribe(heard.append)
        before, service = cluster_of(mesh).view, cluster_of(mesh).service
        mesh.update(Service("orders", "static:10.0.0.1:80", retry=Retry(on_status={502})))
        assert cluster_of(mesh).view is before
        assert cluster_of(mesh).service is service
        mesh.update()
    assert heard == []


def test_a_change_is_told_with_the_names_of_the_settings() -> None:
    heard: list[Event] = []
    with Mesh(Service("orders", [A])) as mesh:
        mesh.subscribe(heard.append)
        mesh.update(Service("orders", [A, B], timeout=Timeout(total=3)), Service("users", [C]))
    told = {event.service: event.changed for event in heard if isinstance(event, ConfigChanged)}
    assert told == {"orders": ("resolver", "timeout"), "users": ()}


# Services and endpoints


def test_clients_that_are_there_can_call_what_is_added() -> None:
    mesh = over(A, inner=answering())
    with mesh.client("orders") as client:
        with pytest.raises(UnknownService):
            client.get("http://users/")
        mesh.update(Service("users", [B]))
        assert client.get("http://users/").text == B


def test_D2_another_list_keeps_what_stays_and_drains_what_goes(colour: Colour, fleet: list[Upstream]) -> None:
    first, second, third = fleet
    mesh = Mesh(Service("orders", [first.address, second.address], balancer=RoundRobin()))

    async def script(client: Any) -> None:
        for _ in range(4):
            await client.get("/")
        kept = nodes_of(mesh)[second.address]
        mesh.update(Service("orders", [second.address, third.address], balancer=RoundRobin()))
        assert nodes_of(mesh)[second.address] is kept
        ports = {report(await client.get("/")).attempts[-1].endpoint.port for _ in range(6)}
        assert ports == {second.port, third.port}
        with anyio.fail_after(LONG):
            while first.stats()["connections_open"]:
                await anyio.sleep(0.01)
        assert len({request.connection for request in second.log()}) == 1

    with mesh:
        colour.run(mesh, script)


def test_weights_and_priorities_of_a_list_are_taken_over() -> None:
    mesh = over(A, B, inner=answering())
    node = nodes_of(mesh)[A]
    mesh.update(Service("orders", [Endpoint("10.0.0.1", 80, weight=5, priority=1), B]))
    assert nodes_of(mesh)[A] is node
    assert node.effective_weight == 5
    assert mesh._clusters["orders"].view.offered[0] is nodes_of(mesh)[B]


@pytest.mark.usefixtures("hurry")
def test_another_resolver_takes_effect_with_its_first_answer() -> None:
    first, second = Told(A), Told(B)
    second.hangs = True
    with Mesh(Service("orders", first)) as mesh:
        mesh.wait_ready(LONG)
        mesh.update(Service("orders", second))
        until(lambda: second.asked)
        asked = first.asked
        time.sleep(0.3)
        assert first.asked <= asked + 1
        assert places(mesh) == [A]
        assert any("no answer yet" in words for words in mesh.snapshot()["orders"].warnings)
        second.hangs = False
        until(lambda: places(mesh) == [B])
        until(lambda: not mesh.snapshot()["orders"].warnings)


@pytest.mark.usefixtures("hurry")
def test_a_resolver_that_stays_goes_on_undisturbed() -> None:
    first, shared = Told(A, key="x"), Told(C, key="shared")
    with Mesh(Service("orders", Failover(first, shared))) as mesh:
        mesh.wait_ready(LONG)
        until(lambda: len(places(mesh)) == 2)
        mesh.update(Service("orders", Failover(Told(A, key="x"), Told(C, key="shared")), timeout=Timeout(total=1)))
        other = Told(B, key="y")
        asked = shared.asked
        mesh.update(Service("orders", Failover(other, Told(C, key="shared"))))  # whose second part is the same
        until(lambda: set(places(mesh)) == {B, C})
        until(lambda: shared.asked > asked)


@pytest.mark.usefixtures("hurry")
def test_max_stale_of_now_holds_for_a_resolver_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "LOOK", 0.02)
    resolver = Told(A)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(LONG)
        resolver.hangs = True
        mesh.update(Service("orders", resolver, max_stale=0.2))
        until(lambda: places(mesh) == [])


@pytest.mark.usefixtures("hurry")
def test_an_answer_that_comes_too_late_from_a_resolver_that_was_left_changes_nothing() -> None:
    resolver = Told(A)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(LONG)
        assert mesh._upkeep.updates is not None
        followed = mesh._upkeep.updates._followed["orders"]
        mesh.update(Service("orders", [B]))
        late = Membership((Endpoint.parse(A),), 0.0, ("late",), "late", 0.0, 1, 0)
        mesh._upkeep.updates._take_over(followed, resolver, late)
        assert (places(mesh), mesh.snapshot()["orders"].warnings) == ([B], ())
        assert cluster_of(mesh).publish([Endpoint.parse(A)], "late", 0.0, found_by=resolver) == []
        assert places(mesh) == [B]


@pytest.mark.usefixtures("hurry")
def test_max_stale_holds_from_the_change_for_a_resolver_that_never_answers() -> None:
    silent = Told()
    silent.hangs = True
    with Mesh(Service("orders", [A])) as mesh:
        mesh.update(Service("orders", silent, max_stale=0.3))
        mesh.wait_ready(LONG)
        assert places(mesh) == [A]
        until(lambda: places(mesh) == [])
        with mesh.client("orders") as client, pytest.raises(NoEndpoints):
            client.get("/")


@pytest.mark.usefixtures("hurry")
def test_from_a_resolver_to_a_list_and_back(fleet: list[Upstream]) -> None:
    first, second, _ = fleet
    resolver = Told(first.address)
    with Mesh(Service("orders", resolver)) as mesh, mesh.client("orders") as client:
        assert client.get("/").status_code == 200
        mesh.update(Service("orders", [second.address]))
        assert report(client.get("/")).attempts[-1].endpoint.port == second.port
        until(lambda: first.stats()["connections_open"] == 0)
        asked = resolver.asked
        time.sleep(0.3)
        assert resolver.asked <= asked + 1
        assert places(mesh) == [second.address]
        assert mesh.snapshot()["orders"].source == "static"
        mesh.update(Service("orders", resolver))
        until(lambda: client.get("/") and places(mesh) == [first.address])


@pytest.mark.usefixtures("hurry")
def test_who_waits_for_a_first_answer_is_served_by_a_list(upstream: Upstream) -> None:
    silent = Told()
    silent.hangs = True
    answers: list[int] = []
    with Mesh(Service("orders", silent)) as mesh, mesh.client("orders") as client:
        thread = threading.Thread(target=lambda: answers.append(client.get("/").status_code))
        thread.start()
        until(lambda: silent.asked)
        mesh.update(Service("orders", [upstream.address]))
        thread.join(LONG)
    assert answers == [200]


def test_a_closed_mesh_takes_other_settings_and_asks_nobody() -> None:
    resolver = Told(B)
    mesh = Mesh(Service("orders", [A]))
    mesh.close()
    mesh.update(Service("orders", [B]), Service("users", resolver))
    assert places(mesh) == [B]
    with mesh:
        mesh.wait_ready(LONG)
        assert resolver.asked


# Health checks


def test_checks_begin_change_and_end(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK", 0.01)
    monkeypatch.setattr(health, "AT_ONCE", 0.0)
    upstream.script(then={"status": 503})

    def healths() -> set[bool | None]:
        return {node.health for node in nodes_of(mesh).values()}

    with Mesh(Service("orders", [upstream.address])) as mesh, mesh.client("orders") as client:
        client.post("/")
        mesh.update(Service("orders", [upstream.address], health=HealthCheck("/healthz")))
        client.post("/")  # starts them, as the first call of a service with checks does
        until(lambda: healths() == {False})
        mesh.update(Service("orders", [upstream.address], health=HealthCheck("/ready", expect={503})))
        until(lambda: healths() == {True})
        assert "/ready" in [request.target for request in upstream.log()]
        mesh.update(Service("orders", [upstream.address], health=HealthCheck("/healthz")))
        until(lambda: healths() == {False})
        mesh.update(Service("orders", [upstream.address]))
        assert healths() == {None}
        upstream.clear()
        time.sleep(0.1)
        cluster_of(mesh).heard(("127.0.0.1", upstream.port), False, 0.0, by=HealthCheck("/healthz"))  # a late one
        assert healths() == {None}


def test_checks_start_with_a_call_when_a_resolver_that_was_never_asked_becomes_a_list(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "AT_ONCE", 0.0)
    checked = HealthCheck("/healthz")
    with Mesh(Service("orders", Told("10.0.0.1:80"), health=checked)) as mesh, mesh.client("orders") as client:
        mesh.update(Service("orders", [upstream.address], health=checked))
        client.get("/")
        until(lambda: "/healthz" in [request.target for request in upstream.log()])


# Telemetry


def test_T1_what_is_added_or_gets_tls_is_observed_as_it_is_now() -> None:
    reader = InMemoryMetricReader()
    mesh = Mesh(Service("orders", [A]), inner=answering(), meter_provider=MeterProvider([reader]))
    with mesh.client() as client:
        client.get("http://orders/")
        mesh.update(Service("users", [A]), Service("orders", [A], tls=TLS()))
        client.get("http://users/")
        client.get("http://orders/")
    data = reader.get_metrics_data()
    assert data is not None
    seen = {
        (point.attributes["server.address"], point.attributes["url.scheme"])
        for metric in data.resource_metrics[0].scope_metrics[0].metrics
        if metric.name == "meshlib.client.call.duration"
        for point in metric.data.data_points
    }
    assert seen == {("orders", "http"), ("users", "http"), ("orders", "https")}


# Calls under way


def test_a_call_under_way_keeps_its_timeouts_and_retries(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"status": 503, "delay": 0.3}, {"status": 503}, then={"status": 200})
    mesh = Mesh(Service("orders", [upstream.address], retry=Retry(max_attempts=3)))
    timer = threading.Timer(
        0.1, lambda: mesh.update(Service("orders", [upstream.address], retry=Retry(max_attempts=1)))
    )

    async def script(client: Any) -> None:
        timer.start()
        assert len(outcomes(await client.get("/"))) == 3
        timer.join()
        upstream.script({"status": 503})
        assert len(outcomes(await client.get("/"))) == 1

    colour.run(mesh, script)


# Connections


def test_more_room_goes_to_who_waits(colour: Colour, upstream: Upstream) -> None:
    if not colour.is_sync:
        upstream.script({"delay": 2.0}, then={"status": 200})
    mesh = Mesh(Service("orders", [upstream.address], connections=Connections(max_per_endpoint=1)))

    def give_room() -> None:
        mesh.update(Service("orders", [upstream.address], connections=Connections(max_per_endpoint=2)))

    def counts() -> tuple[int, int]:
        return mesh._clients.counts()["orders"]

    def in_threads() -> None:
        with mesh.client("orders") as client, client.stream("GET", "/"):
            done: list[int] = []
            thread = threading.Thread(target=lambda: done.append(client.get("/").status_code))
            thread.start()
            time.sleep(0.2)
            assert not done
            give_room()
            thread.join(LONG)
            assert done == [200]

    async def script(client: Any) -> None:
        began = time.monotonic()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.get, "/")
            await anyio.sleep(0.1)
            with anyio.fail_after(LONG):
                async with anyio.create_task_group() as inner:
                    inner.start_soon(client.get, "/")
                    await anyio.sleep(0.05)
                    give_room()
                assert time.monotonic() - began < 1.95

    if colour.is_sync:
        in_threads()
    else:
        colour.run(mesh, script)
    assert mesh._clients.counts().get("orders", (0, 0)) == (0, 0)


def test_less_room_ends_with_what_comes_back(upstream: Upstream) -> None:
    mesh = Mesh(Service("orders", [upstream.address]))
    with mesh.client("orders") as client:
        with client.stream("GET", "/") as one, client.stream("GET", "/") as two, client.stream("GET", "/") as three:
            assert mesh._clients.counts()["orders"] == (0, 3)
            mesh.update(Service("orders", [upstream.address], connections=Connections(max_per_endpoint=1)))
            for response in (one, two, three):
                response.read()
        assert mesh._clients.counts()["orders"] == (1, 0)
        mesh.update(Service("orders", [upstream.address], connections=Connections(max_idle=0)))
        assert mesh._clients.counts()["orders"] == (0, 0)


def test_a_call_that_has_just_begun_connects_by_the_settings_of_now(colour: Colour, upstream: Upstream) -> None:
    def meanwhile(request: httpx.Request) -> None:
        mesh.update(Service("orders", [upstream.address], connections=Connections(max_idle=0)))

    mesh = Mesh(Service("orders", [upstream.address], balancer=ConsistentHash(key=meanwhile)))

    async def script(client: Any) -> None:
        assert (await client.get("/")).status_code == 200
        assert mesh._clients.counts()["orders"] == (0, 0)

    colour.run(mesh, script)


def test_S2_idle_connections_close_with_another_tls(colour: Colour, certificates: tuple[str, str]) -> None:
    bundle, certificate = certificates
    with (
        Upstream("a", cert=certificate) as upstream,
        Mesh(Service("orders", [upstream.address], tls=TLS(verify=bundle))) as mesh,
    ):

        async def script(client: Any) -> None:
            await client.get("/")
            async with client.stream("GET", "/") if not colour.is_sync else _Opened(client):
                mesh.update(Service("orders", [upstream.address], tls=TLS(verify=bundle, min_version="1.3")))
            assert (await client.get("/")).status_code == 200
            with anyio.fail_after(LONG):
                while upstream.stats()["connections_open"] != 1:
                    await anyio.sleep(0.01)
            mesh.update(Service("orders", [upstream.address], tls=TLS(verify="system")))
            with pytest.raises(IdentityError):
                await client.get("/")

        colour.run(mesh, script)


class _Opened:
    def __init__(self, client: Any) -> None:
        self._client = client

    async def __aenter__(self) -> None:
        await self._client.get("/")

    async def __aexit__(self, *_: object) -> None:
        pass


def test_a_url_with_https_is_refused_once_there_is_no_tls(secured: Secured) -> None:
    with secured.mesh() as mesh, mesh.client() as client:
        scheme = "https" if secured.bundle else "http"
        assert client.get(f"{scheme}://orders/").status_code == 200
        mesh.update(Service("orders", [secured.upstream.address]))
        if secured.bundle:
            with pytest.raises(UnknownService):
                client.get("https://orders/")


# Under load


def test_no_call_is_lost_while_settings_change(fleet: list[Upstream]) -> None:
    addresses = [each.address for each in fleet]
    services = [
        Service("orders", addresses, timeout=Timeout(attempt=5, total=20), hedge=Hedge(after=0.01)),
        Service("orders", addresses[1:], balancer=LeastRequest(), limit=Limit(500), breaker=Breaker(window=5)),
        Service("orders", f"static:{','.join(addresses)}", connections=Connections(max_per_endpoint=2, max_idle=1)),
        Service("orders", Told(*addresses[:2]), retry=Retry(max_attempts=2), balancer=ConsistentHash(key="path:0")),
    ]
    over_at = time.monotonic() + 2.0
    failed: list[str] = []
    calls = [0] * 9

    def call(number: int) -> None:
        with mesh.client("orders") as client:
            while time.monotonic() < over_at:
                calls[number] += 1
                try:
                    assert client.get("/").status_code == 200
                except Exception as error:
                    failed.append(repr(error))

    async def call_async(number: int) -> None:
        async def again(client: httpx.AsyncClient) -> None:
            while time.monotonic() < over_at:
                calls[number] += 1
                try:
                    assert (await client.get("/")).status_code == 200
                except Exception as error:
                    failed.append(repr(error))

        async with mesh.async_client("orders") as client:
            await asyncio.gather(*(again(client) for _ in range(4)))

    with Mesh(services[0]) as mesh:
        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        threads.append(threading.Thread(target=lambda: asyncio.run(call_async(8))))
        for thread in threads:
            thread.start()
        rounds = 0
        while time.monotonic() < over_at:
            rounds += 1
            mesh.update(services[rounds % len(services)])
            time.sleep(0.002)
        for thread in threads:
            thread.join(LONG)
        assert cluster_of(mesh).in_flight == 0
    assert not failed, failed[:5]
    assert rounds > 20
    assert sum(calls) > 100


def test_grace_is_as_for_endpoints_that_a_resolver_takes_away(upstream: Upstream, monkeypatch: Any) -> None:
    monkeypatch.setattr(updates, "GRACE", 0.2)
    upstream.script({"fault": "drip", "size": 200, "interval": 0.05})
    mesh = Mesh(Service("orders", [upstream.address]))
    with mesh, mesh.client("orders") as client, client.stream("GET", "/") as response:
        mesh.update(Service("orders", [A]))
        with pytest.raises(httpx.TransportError):
            response.read()
