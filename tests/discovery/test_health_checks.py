"""Health checks: who is asked, what is a pass, what becomes of a node, and what they leave behind."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpcore
import pytest
from played import Played

from meshes import mesh_of, outcomes, refusing
from meshlib import TLS, Breaker, Endpoint, HealthCheck, Mesh, Retry, Service, health
from meshlib.core.cluster import Cluster
from meshlib.health import Finding, check
from meshlib.testing import Upstream, upstreams
from waiting import until

pytestmark = pytest.mark.usefixtures("no_leaks", "hurry")

QUICK = HealthCheck("/healthz", interval=0.05, timeout=0.5)
LONG = 10.0
"""Seconds within which everything here comes to pass on the busiest machine."""

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def one() -> Iterator[Upstream]:
    """An upstream process for all the tests that only need its answers."""
    with Upstream("one") as started:
        started.log()  # over a connection that it keeps
        yield started


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes and goes is seen at once."""
    monkeypatch.setattr(health, "LOOK", 0.01)
    monkeypatch.setattr(health, "AT_ONCE", 0.02)


def healths(mesh: Mesh, service: str = "orders") -> dict[str, bool | None]:
    """What the checks say of every node."""
    return {str(node.endpoint): node.health for node in mesh._clusters[service].view.nodes}


def becomes(mesh: Mesh, *expected: bool | None) -> Callable[[], bool]:
    return lambda: tuple(healths(mesh).values()) == expected


def controls() -> int:
    return sum(thread.name == "meshlib-control" for thread in threading.enumerate())


def asked(upstream: Upstream, target: str = "/healthz") -> int:
    return sum(request.target == target for request in upstream.log())


def found(upstream: Upstream | str, settings: HealthCheck = QUICK, **service: Any) -> Finding | None:
    """What one check finds."""
    endpoint = Endpoint.parse(upstream.address if isinstance(upstream, Upstream) else upstream)
    return asyncio.run(check(Service("orders", [endpoint], **service), settings, endpoint))


# One check


def test_a_check_is_a_plain_get_on_a_connection_of_its_own(upstream: Upstream) -> None:
    settings = HealthCheck("/healthz?full=1")
    assert [found(upstream, settings) for _ in range(2)] == [Finding(True, "status 200")] * 2
    found(upstream, host="endpoint")
    found(upstream, host="orders.internal")
    log = upstream.log()
    assert [request.connection for request in log] == [1, 2, 3, 4]
    assert (log[0].method, log[0].target, log[0].body_length) == ("GET", "/healthz?full=1", 0)
    assert log[0].headers == [
        ("Host", "orders"),
        ("User-Agent", "meshlib-health-check"),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    assert [log[2].values("host"), log[3].values("host")] == [[upstream.address], ["orders.internal"]]
    until(lambda: upstream.stats()["connections_open"] == 0, LONG)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"status": 399}, Finding(True, "status 399")),
        ({"status": 500}, Finding(False, "status 500")),
        ({"status": 302, "headers": {"location": "/elsewhere"}}, Finding(True, "status 302")),
        ({"size": 10**12}, Finding(True, "status 200")),
        ({"size": 10**12, "chunked": True}, Finding(True, "status 200")),
        ({"fault": "cut"}, Finding(False, "RemoteProtocolError")),
        ({"fault": "garbage"}, Finding(False, "RemoteProtocolError")),
        ({"fault": "big_headers"}, Finding(False, "RemoteProtocolError")),
        ({"fault": "reset"}, Finding(False, "ReadError")),
        ({"fault": "hang"}, Finding(False, "ReadTimeout")),
        ({"fault": "endless_1xx"}, Finding(False, "RemoteProtocolError")),
        ({"fault": "drip_headers", "interval": 0.1}, Finding(False, "ReadTimeout")),
        ({"fault": "drip", "interval": 0.1}, Finding(False, "ReadTimeout")),
    ],
    ids=str,
)
def test_what_an_answer_shows(step: dict[str, object], expected: Finding, one: Upstream) -> None:
    slow = expected.reason == "ReadTimeout"
    one.clear()
    one.script(then=step)
    began = time.monotonic()
    assert found(one, HealthCheck("/healthz", timeout=0.2 if slow else 5.0)) == expected
    assert time.monotonic() - began < 2.5
    assert asked(one, "/elsewhere") == 0


def test_what_is_expected_is_a_setting(one: Upstream) -> None:
    one.script({"status": 204}, {"status": 200}, then={"status": 302})
    settings = HealthCheck("/healthz", expect={204})
    assert [found(one, settings) for _ in range(3)] == [
        Finding(True, "status 204"),
        Finding(False, "status 200"),
        Finding(False, "status 302"),
    ]


def test_who_does_not_listen_is_not_well(upstream: Upstream) -> None:
    with refusing() as address:
        assert found(address) == Finding(False, "ConnectionRefusedError")
    upstream.suspend()
    assert found(upstream, HealthCheck("/healthz", timeout=0.1)) == Finding(False, "ReadTimeout")


def test_S2_over_TLS_the_name_is_verified_as_for_calls(certificates: tuple[str, str]) -> None:
    bundle, certificate = certificates
    with Upstream("a", cert=certificate) as secure:
        assert found(secure, tls=TLS(verify=bundle)) == Finding(True, "status 200")
        other = TLS(verify=bundle, server_name="users")
        assert found(secure, tls=other) == Finding(False, "IdentityError")
        assert len(secure.log()) == 1


def test_B6_a_stall_of_our_own_tells_nothing_of_the_node(one: Upstream) -> None:
    one.script(then={"fault": "hang"})
    endpoint = Endpoint.parse(one.address)
    settings = HealthCheck("/healthz", timeout=0.2)

    async def main() -> Finding | None:
        asyncio.get_running_loop().call_later(0.1, time.sleep, 0.4)
        return await check(Service("orders", [endpoint]), settings, endpoint)

    assert asyncio.run(main()) is None


def test_B6_a_lack_of_descriptors_is_our_own(one: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cannot(*args: object) -> None:
        raise httpcore.ConnectError("no more") from OSError(code, "no more")

    monkeypatch.setattr(health, "connect", cannot)
    code = errno.EMFILE
    assert found(one) is None
    code = errno.EHOSTUNREACH
    assert found(one) == Finding(False, "OSError")


# What becomes of a node


def test_who_fails_is_not_called_and_who_passes_again_is(
    fleet: list[Upstream], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "meshlib.health")
    bad = fleet[1]
    check = HealthCheck("/healthz?token=secret", interval=0.05, timeout=5.0)
    with mesh_of(*fleet, health=check) as mesh, mesh.client("orders") as client:
        assert client.get("/").status_code == 200
        until(becomes(mesh, True, True, True), LONG)
        bad.script(then={"status": 503})
        until(becomes(mesh, True, False, True), LONG)
        failures = [request for request in bad.log() if request.step is None]
        assert len(failures) >= QUICK.unhealthy
        before = asked(bad, "/")
        for _ in range(30):
            assert outcomes(client.get("/")) == [("first", "ok")]
        assert asked(bad, "/") == before
        bad.script(then={"status": 200})
        until(becomes(mesh, True, True, True), LONG)
        until(lambda: client.get("/") and asked(bad, "/") > before, LONG)
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("meshlib.health", "INFO", f"orders: {bad.address} is unhealthy (status 503)"),
        ("meshlib.health", "INFO", f"orders: {bad.address} is healthy again (status 200)"),
    ]


def test_who_stands_still_is_found_without_a_call_and_who_fails_first_is_out_at_once(fleet: list[Upstream]) -> None:
    fleet[0].suspend()
    settings = HealthCheck("/healthz", interval=30.0, timeout=0.3)
    with mesh_of(*fleet, health=settings, retry=Retry(max_attempts=1)) as mesh, mesh.client("orders") as client:
        mesh.wait_ready(1)
        until(becomes(mesh, False, True, True), LONG)
        for _ in range(20):
            assert outcomes(client.get("/")) == [("first", "ok")]


def test_a_pass_does_not_close_a_breaker() -> None:
    settings = HealthCheck("/healthz", interval=0.02, timeout=5.0, healthy=1, expect={200, 500})
    with upstreams(2) as (broken, other):
        broken.script(then={"status": 500})
        mesh = mesh_of(broken, other, health=settings, breaker=Breaker(consecutive=3, open_for=60.0))
        with mesh, mesh.client("orders") as client:
            until(lambda: client.get("/") and mesh.snapshot()["orders"].nodes[0].state == "open", LONG)
            before = asked(broken)
            until(lambda: asked(broken) > before + 5, LONG)
            assert healths(mesh)[broken.address] is True
            assert mesh.snapshot()["orders"].nodes[0].state == "open"


def test_who_comes_is_checked_at_once_and_who_goes_no_longer() -> None:
    with upstreams(2) as (first, second):
        resolver = Played(first.address)
        often = Service("often", resolver, health=HealthCheck("/often", interval=0.05, timeout=5.0))
        seldom = Service("seldom", resolver, health=HealthCheck("/seldom", interval=60.0, timeout=5.0))
        with Mesh(often, seldom) as mesh, mesh.client("often") as client:
            assert client.get("/", extensions={"meshlib": {"timeout": LONG}}).status_code == 200
            until(lambda: healths(mesh, "seldom") == {first.address: True}, LONG)
            resolver.say(second.address)
            until(lambda: healths(mesh, "seldom") == {second.address: True}, LONG)
            time.sleep(0.1)
            gone, stays = asked(first, "/often"), asked(second, "/often")
            until(lambda: asked(second, "/often") >= stays + 4, LONG)
            assert asked(first, "/often") == gone


def test_every_service_has_checks_of_its_own(upstream: Upstream) -> None:
    services = [
        Service("a", [upstream.address], health=HealthCheck("/a", interval=0.05)),
        Service("b", [upstream.address], health=HealthCheck("/b", interval=0.05, expect={500})),
        Service("c", [upstream.address]),
    ]
    with Mesh(*services) as mesh:
        mesh.wait_ready(1)
        until(lambda: healths(mesh, "a") == {upstream.address: True}, LONG)
        until(lambda: healths(mesh, "b") == {upstream.address: False}, LONG)
        assert healths(mesh, "c") == {upstream.address: None}


# When they run


def test_checks_start_with_the_first_call_which_does_not_wait_for_them(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    async def after_the_call(service: Service, settings: HealthCheck, endpoint: Endpoint) -> Finding | None:
        while not answered.is_set():
            await asyncio.sleep(0.005)
        return await check(service, settings, endpoint)

    monkeypatch.setattr(health, "check", after_the_call)
    upstream.script({"delay": 0.0}, then={"fault": "hang"})
    mesh = mesh_of(upstream, health=HealthCheck("/healthz", timeout=30.0))
    with mesh.client("orders") as client:
        assert controls() == 0
        assert client.get("/").status_code == 200
        answered.set()
        assert controls() == 1
        assert mesh._clusters["orders"].pending is None, "calls go the short way from now on"
        until(lambda: asked(upstream) == 1, LONG)
    began = time.monotonic()
    mesh.close()
    assert time.monotonic() - began < 1.0
    assert controls() == 0
    until(lambda: upstream.stats()["connections_open"] == 0, LONG)


def test_checks_start_with_the_first_async_call(upstream: Upstream) -> None:
    mesh = mesh_of(upstream, health=QUICK)

    async def main() -> None:
        async with mesh, mesh.async_client("orders") as client:
            assert (await client.get("/")).status_code == 200
            while not asked(upstream):
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), LONG))
    assert controls() == 0


def test_nothing_runs_without_checks(upstream: Upstream) -> None:
    with mesh_of(upstream) as mesh, mesh.client("orders") as client:
        mesh.wait_ready(1)
        client.get("/")
        assert controls() == 0
        assert mesh._upkeep.control is None


def test_a_mesh_that_is_closed_checks_no_more_until_it_is_opened_again(upstream: Upstream) -> None:
    mesh = mesh_of(upstream, health=QUICK)
    with mesh.client("orders") as client:
        with mesh:
            client.get("/")
            until(lambda: asked(upstream) >= 3, LONG)
        time.sleep(0.1)
        before = asked(upstream)
        assert client.get("/").status_code == 200, "calls go on"
        time.sleep(0.2)
        assert (asked(upstream), controls()) == (before, 0)
        with mesh:
            client.get("/")
            until(lambda: asked(upstream) >= before + 3, LONG)


SCRIPT = """
import os, sys, time, warnings
warnings.filterwarnings("ignore", "This process")  # that others fork with threads
sys.path[:0] = {paths!r}
from meshlib import HealthCheck, Mesh, Service, health
health.AT_ONCE = 0.02
mesh = Mesh(Service("orders", [{address!r}], health=HealthCheck("/healthz", interval=0.05)))
client = mesh.client("orders")
def parents():
    return client.get("/").status_code
assert parents() == 200
time.sleep(0.3)
pid = os.fork()
if pid == 0:
    health.USER_AGENT = b"child"
    client.get("/")
    time.sleep(0.5)
    client.close()
    mesh.close()
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
time.sleep(0.2)
client.close()
os.write(1, b"end")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_S3_a_forked_child_checks_on_its_own_and_nothing_is_left_at_the_exit(upstream: Upstream) -> None:
    upstream.script(then={"delay": 0.1})  # so that one is under way at the fork
    script = SCRIPT.format(paths=[str(HERE), str(HERE.parent)], address=upstream.address)
    command = [sys.executable, "-X", "dev", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end", "")
    log = [request for request in upstream.log() if request.target == "/healthz"]
    childs = [request.at for request in log if request.values("user-agent") == ["child"]]
    parents = [request.at for request in log if request.values("user-agent") != ["child"]]
    assert len(childs) >= 2
    assert max(parents) > max(childs), "the parent's go on"


# Many


SERVER = """
import asyncio, os, sys, threading

class Answers(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok")
        self.transport.close()

async def main():
    server = await asyncio.get_running_loop().create_server(Answers, "0.0.0.0", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
asyncio.run(main())
"""


@pytest.fixture
def everywhere() -> Iterator[int]:
    """The port of a server that answers at every loopback address."""
    command = [sys.executable, "-I", "-S", "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only there all of 127.0.0.0/8 is this machine")
def test_a_thousand_endpoints_are_checked_without_a_pause(everywhere: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are told by the time that the thread computed: that others had the processor is not its doing."""
    times: list[float] = []
    computed: list[float] = []

    async def beat() -> None:
        while True:
            at = time.thread_time()
            await asyncio.sleep(0.005)
            computed.append(time.thread_time() - at)

    async def counted(*args: Any) -> Finding | None:
        times.append(time.monotonic())
        return await check(*args)

    monkeypatch.setattr(health, "check", counted)
    addresses = [f"127.0.{number // 250}.{number % 250 + 1}:{everywhere}" for number in range(1000)]
    settings = HealthCheck("/healthz", interval=2.0, timeout=30.0)
    with mesh_of(*addresses, health=settings) as mesh:
        assert mesh._upkeep.control is not None
        mesh._upkeep.control.starters.append(lambda control: control.supervise("beating", beat) and None)
        mesh.wait_ready(1)
        until(lambda: all(healths(mesh).values()), 30.0)
        spent = times[-1] - times[0]
        assert spent > 1.0, "the first round is spread over the interval"
        halves = sum(at < times[0] + spent / 2 for at in times) / len(times)
        assert 0.3 < halves < 0.7
    assert max(computed) < 0.05


def test_so_many_at_most_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: set[object] = set()
    most: list[int] = []

    async def slow(service: Service, settings: HealthCheck, endpoint: Endpoint) -> Finding:
        under_way.add(endpoint)
        most.append(len(under_way))
        await asyncio.sleep(0.02)
        under_way.discard(endpoint)
        return Finding(True, "")

    monkeypatch.setattr(health, "check", slow)
    monkeypatch.setattr(health, "MOST", 5)
    monkeypatch.setattr(health, "PACE", 0.0)
    with mesh_of(*(f"10.0.0.{number}:80" for number in range(1, 51)), health=QUICK) as mesh:
        mesh.wait_ready(1)
        until(lambda: all(healths(mesh).values()), LONG)
    assert max(most) == 5


def test_checks_drift_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What began together does not go on together, and the interval holds on the average."""
    waits: list[float] = []

    async def at_once(*args: object) -> Finding:
        return Finding(True, "")

    async def sleep(delay: float) -> None:
        waits.append(delay)
        if len(waits) > 300:
            raise KeyboardInterrupt

    monkeypatch.setattr(health, "check", at_once)
    service = Service("orders", ["10.0.0.1:80"])
    cluster = Cluster(service, random.Random(1))
    cluster.publish([Endpoint("10.0.0.1", 80)], "", 0.0)

    async def main() -> None:
        rounds = health.Rounds(cluster, None, time.monotonic, random.Random(1))  # type: ignore[arg-type]
        monkeypatch.setattr(asyncio, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            await rounds._attend(cluster.view.nodes[0], HealthCheck("/"), 0.0)
        monkeypatch.undo()

    asyncio.run(main())
    gaps = waits[1:]
    assert 7.9 < min(gaps) < 8.5
    assert 11.5 < max(gaps) < 12.1
    assert 9.7 < sum(gaps) / len(gaps) < 10.3
