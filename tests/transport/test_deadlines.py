"""Rule C4: the deadline bounds the whole call, whatever the peer does, in every colour.

The bounds here allow for a busy machine. How much later than its deadline each call really ended is kept among the
test's properties, in seconds, so that `pytest --junitxml` shows it; the rule says at most 0.05.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import inspect
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest

from conftest import Colour, Secured
from meshes import mesh_of, outcomes, refusing
from meshlib import (
    TLS,
    Budget,
    Connections,
    DeadlineExceeded,
    Mesh,
    Retry,
    RoundRobin,
    Service,
    Timeout,
    deadline,
    options,
    report,
)
from meshlib.testing import Upstream
from meshlib.testing.upstream import generated
from payloads import unexhausted

pytestmark = pytest.mark.usefixtures("collected")

TOTAL = 0.5
BUSY = 1.5
"""Seconds that a busy machine may add."""

UPLOAD = 60_000_000

Expired = Callable[..., Awaitable[Any]]
Noted = Callable[[float], float]

# What holds the headers back
NO_HEADERS: dict[str, dict[str, object]] = {
    "hang": {"fault": "hang"},
    "delay": {"delay": 60},
    "drip_headers": {"fault": "drip_headers", "interval": 0.05},
    "endless_1xx": {"fault": "endless_1xx"},
    "flood_of_1xx": {"fault": "endless_1xx", "interval": 0},
}

# What holds the body back
NO_END: dict[str, dict[str, object]] = {
    "silence": {"size": 10, "headers": {"content-length": "20"}},
    "drip": {"fault": "drip", "size": 10_000},
    "drip_of_chunks": {"fault": "drip", "size": 10_000, "headers": {"connection": "close"}},
    "tiny_chunks": {"fault": "tiny_chunks", "size": 10_000_000},
    "gigabytes": {"size": 100 << 30},
}


@pytest.fixture
def noted(request: pytest.FixtureRequest) -> Noted:
    """Keep by how much a call was late."""

    def note(overrun: float) -> float:
        request.node.user_properties.append(("overrun", overrun))
        return overrun

    return note


@pytest.fixture
def expired(noted: Noted) -> Expired:
    """Await something that must end by the deadline, and on time."""

    async def wait(doing: Awaitable[Any], *, total: float = TOTAL, since: float | None = None) -> DeadlineExceeded:
        began = time.monotonic() if since is None else since
        with pytest.raises(DeadlineExceeded) as caught:
            await doing
        assert -0.01 < noted(time.monotonic() - began - total) < BUSY
        assert isinstance(caught.value, httpx.TimeoutException)
        assert caught.value.request is not None
        assert report(caught.value).attempts
        return caught.value

    return wait


async def opened(client: Any, method: str, url: str, **more: Any) -> Any:
    """The response to a request, its body unread, in every colour."""
    request = client.build_request(method, url, **more)
    if inspect.isawaitable(request):
        request = await request
    return await client.send(request, stream=True)


async def whole(response: Any) -> int:
    """Read the rest of a body and drop it; how much it was."""
    return sum([len(piece) async for piece in pieces(response)])


async def pieces(response: Any) -> AsyncIterator[bytes]:
    """The body in pieces, in every colour."""
    if isinstance(response.stream, httpx.SyncByteStream):
        for piece in response.iter_raw():
            yield piece
    else:
        async for piece in response.aiter_raw():
            yield piece


async def close(response: Any) -> None:
    if isinstance(response.stream, httpx.SyncByteStream):
        response.close()
    else:
        await response.aclose()


def generator(colour: Colour, size: int, piece: bytes = bytes(65536)) -> Any:
    """A body of `size` bytes that only comes in pieces."""

    def sync() -> Iterator[bytes]:
        for _ in range(size // len(piece)):
            yield piece

    async def later() -> AsyncIterator[bytes]:
        for each in sync():
            yield each

    return sync() if colour.is_sync else later()


def in_flight(mesh: Mesh) -> int:
    return mesh.snapshot()["orders"].in_flight


async def works_again(client: Any, upstream: Upstream, mesh: Mesh) -> None:
    """Nothing of the late call is left in the way of the next one."""
    assert in_flight(mesh) == 0
    upstream.script()
    for _ in range(2):
        assert (await client.get("/")).status_code == 200
    assert in_flight(mesh) == 0


# Waiting for the headers


@pytest.mark.parametrize("fault", NO_HEADERS)
def test_C4_headers_that_do_not_come_end_at_the_deadline(
    colour: Colour, upstream: Upstream, expired: Expired, fault: str
) -> None:
    upstream.script(then=NO_HEADERS[fault])
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))

    async def script(client: httpx.AsyncClient) -> None:
        error = await expired(client.get("/"))
        assert "orders: no answer within 0.5 s" in str(error)
        assert len(report(error).attempts) == 1
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)
    assert len(upstream.log()) == 3


@pytest.mark.parametrize("fault", ["hang", "drip_headers", "endless_1xx"])
def test_C4_a_kept_connection_is_bounded_as_well(
    colour: Colour, upstream: Upstream, expired: Expired, fault: str
) -> None:
    upstream.script({}, then=NO_HEADERS[fault])
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))

    async def script(client: httpx.AsyncClient) -> None:
        await client.get("/")
        await expired(client.get("/"))
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)


def test_C4_all_attempts_share_one_deadline(colour: Colour, fleet: list[Upstream], expired: Expired) -> None:
    for upstream in fleet:
        upstream.script(then={"fault": "hang"})
    mesh = mesh_of(*fleet, timeout=Timeout(total=TOTAL, attempt=0.2))

    async def script(client: httpx.AsyncClient) -> None:
        error = await expired(client.get("/"))
        seconds = [attempt.seconds for attempt in report(error).attempts]
        assert len(seconds) == 3
        assert seconds[-1] < 0.15
        assert report(error).attempts[-1].outcome == "abandoned"

    colour.run(mesh, script)
    assert in_flight(mesh) == 0


# Reading the body


@pytest.mark.parametrize("fault", NO_END)
def test_C4_a_body_that_does_not_end_ends_at_the_deadline(
    colour: Colour, upstream: Upstream, expired: Expired, fault: str
) -> None:
    upstream.script(then=NO_END[fault])
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))

    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        response = await opened(client, "GET", "/")
        assert response.status_code == 200
        assert in_flight(mesh) == 1
        error = await expired(whole(response), since=began)
        assert report(error) is report(response)
        assert len(report(error).attempts) == 1
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)
    assert mesh.snapshot()["orders"].nodes[0].failures == 0  # the caller's patience, not the endpoint's fault


@pytest.mark.parametrize("fault", ["silence", "drip", "tiny_chunks"])
def test_C4_a_call_that_reads_the_body_by_itself_ends_at_the_deadline(
    colour: Colour, upstream: Upstream, expired: Expired, fault: str
) -> None:
    upstream.script(then=NO_END[fault])
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))

    async def script(client: httpx.AsyncClient) -> None:
        await expired(client.get("/"))
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)


def test_C4_a_body_is_bounded_when_its_reader_is_the_slow_one(
    colour: Colour, upstream: Upstream, expired: Expired
) -> None:
    upstream.script(then={"size": 100 << 30})
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))

    async def read_slowly(response: Any, give_up: float) -> None:
        async for _ in pieces(response):
            await anyio.sleep(0.01)
            if time.monotonic() > give_up:
                await close(response)
                return

    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        response = await opened(client, "GET", "/")
        await expired(read_slowly(response, began + TOTAL + BUSY + 1), since=began)
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)


def test_C4_a_body_that_is_fetched_after_the_deadline_is_late(colour: Colour, upstream: Upstream) -> None:
    upstream.script(then={"size": 20_000_000})
    mesh = mesh_of(upstream, timeout=Timeout(total=0.2))

    async def script(client: httpx.AsyncClient) -> None:
        response = await opened(client, "GET", "/")
        await anyio.sleep(0.3)
        with pytest.raises(DeadlineExceeded):
            await whole(response)
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)


def test_C4_a_body_that_is_whole_before_the_deadline_is_not_late(colour: Colour, upstream: Upstream) -> None:
    upstream.script(then={"fault": "drip", "size": 20})
    mesh = mesh_of(upstream, timeout=Timeout(total=30))

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(2):
            assert (await client.get("/")).content == generated(20)

    colour.run(mesh, script)
    assert {request.connection for request in upstream.log()} == {1}


# Connecting

full_queues = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux drops what a full accept queue cannot hold"
)


@contextlib.contextmanager
def silent(*hosts: str) -> Iterator[int]:
    """A port on all of `hosts` where connecting hangs: the accept queue is full, and nobody accepts."""
    with contextlib.ExitStack() as stack:
        listening = _listening_alike(stack, hosts)
        for each in listening:
            for _ in range(8):
                filler = stack.enter_context(socket.socket(each.family))
                filler.setblocking(False)
                assert filler.connect_ex(each.getsockname()) in (0, errno.EINPROGRESS)
        time.sleep(0.05)  # the handshakes that fit are through
        yield listening[0].getsockname()[1]


def _listening_alike(stack: contextlib.ExitStack, hosts: tuple[str, ...]) -> list[socket.socket]:
    for _ in range(100):
        port, listening = 0, []
        try:
            for host in hosts:
                each = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
                each.bind((host, port))
                each.listen(0)
                port = each.getsockname()[1]
                listening.append(each)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                pytest.skip(f"no IPv6 here: {error}")
            continue
        return listening
    raise AssertionError("no port is free on all addresses")


@full_queues
def test_C4_connecting_ends_at_the_deadline(colour: Colour, upstream: Upstream, expired: Expired) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        error = await expired(client.post("/", content=b"x"))
        assert in_flight(mesh) == 0
        assert "connecting to 127.0.0.1" in str(report(error))

    with silent("127.0.0.1") as port:
        mesh = mesh_of(f"127.0.0.1:{port}", timeout=Timeout(total=TOTAL, connect=20))
        colour.run(mesh, script)


@full_queues
def test_C4_every_address_of_a_name_counts(colour: Colour, expired: Expired) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        error = await expired(client.get("/"))
        [attempt] = report(error).attempts
        assert attempt.outcome == "abandoned"

    with silent("127.0.0.1", "::1") as port:
        mesh = mesh_of(f"localhost:{port}", timeout=Timeout(total=TOTAL, connect=0.4))
        colour.run(mesh, script)
        assert in_flight(mesh) == 0


@full_queues
def test_C4_a_connect_timeout_is_for_each_address(colour: Colour, noted: Noted) -> None:
    mesh_timeout = Timeout(total=20, connect=0.2)

    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        with pytest.raises(httpx.ConnectTimeout) as caught:
            await client.get("/")
        assert -0.01 < noted(time.monotonic() - began - 0.4) < BUSY
        assert outcomes(caught.value) == [("first", "not_sent")]

    with silent("127.0.0.1", "::1") as port:
        mesh = mesh_of(f"localhost:{port}", timeout=mesh_timeout, retry=Retry(max_attempts=1))
        colour.run(mesh, script)


@full_queues
def test_C4_a_call_fails_over_from_where_connecting_hangs(colour: Colour, upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post("/", content=b"x") for _ in range(2)]

    with silent("127.0.0.1") as port:
        mesh = mesh_of(f"127.0.0.1:{port}", upstream, balancer=RoundRobin(), timeout=Timeout(total=20, connect=0.2))
        responses = colour.run(mesh, script)
    assert [("first", "not_sent"), ("failover", "ok")] in map(outcomes, responses)
    assert len(upstream.log()) == 2


@pytest.mark.parametrize("bound", ["total", "connect"])
def test_C4_a_tls_handshake_is_bounded(colour: Colour, expired: Expired, bound: str) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        if bound == "total":
            await expired(client.get("/"))
            return
        began = time.monotonic()
        with pytest.raises(httpx.ConnectTimeout):
            await client.get("/")
        assert time.monotonic() - began < 0.3 + BUSY

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)  # connections are made, and nothing is ever read or said
        mesh = mesh_of(
            f"127.0.0.1:{listening.getsockname()[1]}",
            tls=TLS(),
            timeout=Timeout(total=TOTAL, connect=20) if bound == "total" else Timeout(total=20, connect=0.3),
            retry=Retry(max_attempts=1),
        )
        colour.run(mesh, script)
    assert in_flight(mesh) == 0


# Sending


@unexhausted
@pytest.mark.parametrize("kind", ["bytes", "generator"])
def test_C4_an_upload_to_a_reader_that_stalls_ends_at_the_deadline(
    colour: Colour, upstream: Upstream, expired: Expired, kind: str
) -> None:
    upstream.script({"fault": "stall_reader"})
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))
    body = bytes(UPLOAD) if kind == "bytes" else generator(colour, UPLOAD)

    async def script(client: httpx.AsyncClient) -> None:
        error = await expired(client.put("/", content=body))
        assert len(report(error).attempts) == 1
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)


@contextlib.contextmanager
def sipping() -> Iterator[str]:
    """The address of a peer that reads a little every 10 ms, so that no single send waits for long."""
    stop = threading.Event()

    def sip(listening: socket.socket) -> None:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(0.01)
            while not stop.wait(0.01):
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(16384):
                        return

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        listening.settimeout(20)
        thread = threading.Thread(target=sip, args=[listening])
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            stop.set()
            thread.join()


@unexhausted
@pytest.mark.parametrize("kind", ["bytes", "generator"])
def test_C4_an_upload_to_a_reader_that_sips_ends_at_the_deadline(colour: Colour, expired: Expired, kind: str) -> None:
    body = bytes(UPLOAD) if kind == "bytes" else generator(colour, UPLOAD)

    async def script(client: httpx.AsyncClient) -> None:
        await expired(client.post("/", content=body))
        assert in_flight(mesh) == 0

    with sipping() as address:
        mesh = mesh_of(address, timeout=Timeout(total=TOTAL))
        colour.run(mesh, script)


def test_C4_an_upload_that_broke_off_leaves_no_generator_behind(
    colour: Colour, upstream: Upstream, expired: Expired
) -> None:
    upstream.script({"fault": "stall_reader"})
    mesh = mesh_of(upstream, timeout=Timeout(total=0.2))

    async def script(client: httpx.AsyncClient) -> None:
        await expired(client.put("/", content=bytes(UPLOAD)), total=0.2)
        gc.collect()
        if colour.name == "asyncio":
            assert asyncio.all_tasks() == {asyncio.current_task()}

    colour.run(mesh, script)


@unexhausted
def test_C4_a_body_that_comes_slowly_from_the_caller_ends_at_the_deadline(
    colour: Colour, upstream: Upstream, expired: Expired
) -> None:
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))

    def sync() -> Iterator[bytes]:
        for _ in range(1000):
            time.sleep(0.02)
            yield b"x"

    async def later() -> AsyncIterator[bytes]:
        for _ in range(1000):
            await anyio.sleep(0.02)
            yield b"x"

    async def script(client: httpx.AsyncClient) -> None:
        await expired(client.put("/", content=sync() if colour.is_sync else later()))
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)


# Waiting for a connection


def test_C4_waiting_for_a_connection_ends_at_the_deadline(colour: Colour, upstream: Upstream, expired: Expired) -> None:
    upstream.script({"size": 20_000_000})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1), timeout=Timeout(total=TOTAL))

    async def script(client: httpx.AsyncClient) -> None:
        with options(timeout=60.0):
            holder = await opened(client, "GET", "/")
        error = await expired(client.post("/", content=b"x"))
        assert outcomes(error) == [("first", "not_sent")]
        assert in_flight(mesh) == 1
        assert await whole(holder) == 20_000_000
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)
    [node] = mesh.snapshot()["orders"].nodes
    assert (node.failures, node.state) == (0, "closed")  # our own queue is not the endpoint's fault
    assert {request.connection for request in upstream.log()} == {1}


def test_C4_the_next_in_the_queue_gets_the_connection(no_leaks: None, upstream: Upstream) -> None:
    upstream.script({"delay": 0.4})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1), timeout=Timeout(total=20))

    async def impatient(client: httpx.AsyncClient) -> None:
        with options(timeout=0.1), pytest.raises(DeadlineExceeded):
            await client.get("/impatient")

    async def main() -> list[Any]:
        async with mesh.async_client("orders") as client:
            return await asyncio.gather(
                client.get("/1"), impatient(client), client.get("/2"), impatient(client), client.get("/3")
            )

    answered = [response.status_code for response in asyncio.run(main()) if response is not None]
    assert answered == [200] * 3
    assert [request.target for request in upstream.log()] == ["/1", "/2", "/3"]


# Waiting before another attempt


@pytest.mark.parametrize("status", [429, 503])
def test_C9_a_retry_after_beyond_the_deadline_is_returned_at_once(
    colour: Colour, upstream: Upstream, status: int
) -> None:
    upstream.script(then={"status": status, "headers": {"retry-after": "60"}, "body": "later"})
    mesh = mesh_of(upstream, timeout=Timeout(total=20))

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        began = time.monotonic()
        response = await client.get("/")
        assert time.monotonic() - began < BUSY
        return response

    response = colour.run(mesh, script)
    assert (response.status_code, response.text) == (status, "later")
    [attempt] = report(response).attempts
    assert attempt.retry_after == 60
    assert len(upstream.log()) == 1


def test_C9_a_retry_after_within_the_deadline_is_honoured(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"status": 429, "headers": {"retry-after": "1"}})
    mesh = mesh_of(upstream, timeout=Timeout(total=20))

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/")

    response = colour.run(mesh, script)
    assert outcomes(response) == [("first", "rejected"), ("retry", "ok")]
    assert report(response).attempts[1].waited == 1
    first, second = upstream.log()
    assert 0.99 < second.at - first.at < 1 + BUSY


@pytest.mark.parametrize("fault", ["rejected", "reset"])
def test_C4_back_off_does_not_reach_beyond_the_deadline(
    colour: Colour, upstream: Upstream, noted: Noted, fault: str
) -> None:
    upstream.script(then={"status": 503} if fault == "rejected" else {"fault": "reset"})
    mesh = mesh_of(
        upstream,
        timeout=Timeout(total=TOTAL),
        retry=Retry(max_attempts=10_000, budget=Budget(capacity=1e9)),
    )

    async def script(client: httpx.AsyncClient) -> Any:
        try:
            return await client.get("/")
        except (httpx.ReadError, httpx.RemoteProtocolError, DeadlineExceeded) as error:
            return error

    began = time.monotonic()
    result = colour.run(mesh, script)
    assert noted(time.monotonic() - began - TOTAL) < BUSY
    assert isinstance(result, httpx.Response) is (fault == "rejected")
    attempts = report(result).attempts
    assert len(attempts) > 2
    assert sum(attempt.waited for attempt in attempts) < TOTAL
    assert in_flight(mesh) == 0


def test_C4_a_drained_answer_is_bounded_too(colour: Colour, fleet: list[Upstream], expired: Expired) -> None:
    fleet[0].script(then={"status": 503, "fault": "drip", "size": 10_000})
    fleet[1].script(then={"fault": "hang"})
    mesh = mesh_of(*fleet[:2], balancer=RoundRobin(), timeout=Timeout(total=TOTAL))

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(2):  # one of them begins with the one that drips
            await expired(client.get("/"))
        assert in_flight(mesh) == 0

    colour.run(mesh, script)


# What bounds less than the whole call


def test_C4_an_attempt_is_bounded_to_its_headers(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"fault": "hang"}, {"fault": "drip", "size": 60})
    mesh = mesh_of(upstream, timeout=Timeout(total=20, attempt=0.3))

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        began = time.monotonic()
        response = await opened(client, "GET", "/")
        headers_after = time.monotonic() - began
        assert 0.29 < headers_after < 0.3 + BUSY
        assert await whole(response) == 60
        assert time.monotonic() - began > headers_after + 0.3
        return response

    response = colour.run(mesh, script)
    assert outcomes(response) == [("first", "failed"), ("retry", "ok")]


@pytest.mark.parametrize("fault", ["drip_headers", "endless_1xx"])
def test_C4_an_attempt_that_drips_is_ended_and_retried(colour: Colour, fleet: list[Upstream], fault: str) -> None:
    fleet[0].script(then=NO_HEADERS[fault])
    mesh = mesh_of(*fleet[:2], balancer=RoundRobin(), timeout=Timeout(total=20, attempt=0.3))

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(2)]

    responses = colour.run(mesh, script)
    assert [("first", "failed"), ("retry", "ok")] in map(outcomes, responses)


@pytest.mark.parametrize("how", ["block", "extension"])
def test_C4_a_body_may_run_on_after_the_deadline(colour: Colour, upstream: Upstream, how: str) -> None:
    upstream.script(then={"fault": "drip", "size": 60})
    mesh = mesh_of(upstream, timeout=Timeout(total=0.3))
    extension = {"extensions": {"meshlib": {"body_deadline": False}}} if how == "extension" else {}

    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        with options(body_deadline=False) if how == "block" else contextlib.nullcontext():
            assert len((await client.get("/", **extension)).content) == 60
        assert time.monotonic() - began > 0.5
        assert in_flight(mesh) == 0

    colour.run(mesh, script)
    assert mesh.snapshot()["orders"].nodes[0].failures == 0


@pytest.mark.parametrize("fault", ["hang", "drip_headers"])
def test_C4_headers_stay_bounded_where_a_body_may_run_on(
    colour: Colour, upstream: Upstream, expired: Expired, fault: str
) -> None:
    upstream.script(then=NO_HEADERS[fault])
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))

    async def script(client: httpx.AsyncClient) -> None:
        with options(body_deadline=False):
            await expired(client.get("/"))
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)


def test_C4_a_connection_that_ran_on_is_bounded_again_by_its_next_call(
    colour: Colour, upstream: Upstream, expired: Expired
) -> None:
    upstream.script({}, then={"fault": "hang"})
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))

    async def script(client: httpx.AsyncClient) -> None:
        with options(body_deadline=False):
            await client.get("/")
        await expired(client.get("/"))

    colour.run(mesh, script)
    assert {request.connection for request in upstream.log()} == {1}


def test_C4_a_block_s_deadline_bounds_the_body_too(colour: Colour, upstream: Upstream, expired: Expired) -> None:
    upstream.script(then=NO_END["drip"])
    mesh = mesh_of(upstream)

    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        with deadline(TOTAL):
            await expired(client.get("/"), since=began)
        await works_again(client, upstream, mesh)

    colour.run(mesh, script)


# The timeouts of a foreign client


@pytest.mark.parametrize("fault", ["hang", "silence"])
def test_C4_a_clients_read_timeout_stays_an_upper_bound(colour: Colour, upstream: Upstream, fault: str) -> None:
    upstream.script(then=NO_HEADERS.get(fault) or NO_END[fault])
    mesh = mesh_of(upstream, timeout=Timeout(total=20), retry=Retry(max_attempts=1))

    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout) as caught:
            await client.get("/")
        assert 0.19 < time.monotonic() - began < 0.2 + BUSY
        assert outcomes(caught.value) == [("first", "failed")]
        await works_again(client, upstream, mesh)

    colour.run(mesh, script, timeout=httpx.Timeout(None, read=0.2))
    assert mesh.snapshot()["orders"].nodes[0].failures == 1


def test_C4_a_clients_read_timeout_is_for_each_read(colour: Colour, upstream: Upstream) -> None:
    upstream.script(then={"fault": "drip", "size": 100})

    async def script(client: httpx.AsyncClient) -> None:
        assert len((await client.get("/")).content) == 100

    colour.run(mesh_of(upstream), script, timeout=httpx.Timeout(None, read=0.6))


@unexhausted
def test_C4_a_clients_write_timeout_stays_an_upper_bound(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"fault": "stall_reader"})
    mesh = mesh_of(upstream, timeout=Timeout(total=20), retry=Retry(max_attempts=1))

    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        with pytest.raises(httpx.WriteTimeout):
            await client.put("/", content=bytes(UPLOAD))
        assert 0.19 < time.monotonic() - began < 0.2 + BUSY
        await works_again(client, upstream, mesh)

    colour.run(mesh, script, timeout=httpx.Timeout(None, write=0.2))


@full_queues
def test_C4_a_clients_connect_timeout_stays_an_upper_bound(colour: Colour) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        with pytest.raises(httpx.ConnectTimeout):
            await client.get("/")
        assert 0.19 < time.monotonic() - began < 0.2 + BUSY

    with silent("127.0.0.1") as port:
        mesh = mesh_of(f"127.0.0.1:{port}", timeout=Timeout(total=20, connect=20), retry=Retry(max_attempts=1))
        colour.run(mesh, script, timeout=httpx.Timeout(None, connect=0.2))


def test_C4_a_clients_pool_timeout_stays_an_upper_bound(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"size": 20_000_000})
    mesh = mesh_of(
        upstream,
        connections=Connections(max_per_endpoint=1),
        timeout=Timeout(total=20),
        retry=Retry(max_attempts=1),
    )

    async def script(client: httpx.AsyncClient) -> None:
        holder = await opened(client, "GET", "/")
        began = time.monotonic()
        with pytest.raises(httpx.PoolTimeout) as caught:
            await client.get("/")
        assert 0.19 < time.monotonic() - began < 0.2 + BUSY
        assert outcomes(caught.value) == [("first", "not_sent")]
        await close(holder)
        await works_again(client, upstream, mesh)

    colour.run(mesh, script, timeout=httpx.Timeout(None, pool=0.2))
    assert mesh.snapshot()["orders"].nodes[0].failures == 0


def test_C4_the_deadline_wins_over_longer_timeouts_of_a_client(
    colour: Colour, upstream: Upstream, expired: Expired
) -> None:
    upstream.script(then={"fault": "hang"})
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))

    async def script(client: httpx.AsyncClient) -> None:
        await expired(client.get("/"))
        await works_again(client, upstream, mesh)

    colour.run(mesh, script, timeout=30)


def test_C4_a_client_of_httpx_s_own_is_bounded_by_both(no_leaks: None, upstream: Upstream) -> None:
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL), retry=Retry(max_attempts=1))

    async def main(timeout: float | None) -> None:
        async with httpx.AsyncClient(
            transport=mesh.async_transport(), base_url="http://orders", timeout=timeout
        ) as client:
            await client.get("/")

    for timeout, error in [(0.2, httpx.ReadTimeout), (5.0, DeadlineExceeded), (None, DeadlineExceeded)]:
        upstream.script(then={"fault": "hang"})
        client = httpx.Client(transport=mesh.transport(), base_url="http://orders", timeout=timeout)
        with client, pytest.raises(error):
            client.get("/")
        with pytest.raises(error):
            asyncio.run(main(timeout))


# How a deadline is kept


class Watched(asyncio.Task[Any]):
    """A task that remembers whether somebody cancelled it."""

    cancelled_by: list[str]

    def cancel(self, msg: Any = None) -> bool:
        Watched.cancelled_by.append(self.get_name())
        return super().cancel(msg)


@contextlib.contextmanager
def watching(loop: asyncio.AbstractEventLoop) -> Iterator[list[str]]:
    """The names of the tasks that were cancelled meanwhile."""
    Watched.cancelled_by = []
    loop.set_task_factory(lambda loop, coro, **more: Watched(coro, loop=loop, **more))
    try:
        yield Watched.cancelled_by
    finally:
        loop.set_task_factory(None)


@pytest.mark.parametrize("fault", ["hang", "endless_1xx", "silence", "drip", "stall_reader", "no_slot", "connect"])
def test_C4_a_deadline_cancels_no_task_and_starts_none(no_leaks: None, upstream: Upstream, fault: str) -> None:
    content = bytes(UPLOAD) if fault == "stall_reader" else b""
    step = NO_HEADERS.get(fault) or NO_END.get(fault) or {"fault": "stall_reader"}
    upstream.script({"delay": 30} if fault == "no_slot" else step)

    async def main(mesh: Mesh) -> None:
        loop = asyncio.get_running_loop()
        with watching(loop) as cancelled:
            async with mesh.async_client("orders") as client:
                threads = threading.active_count()
                if fault == "no_slot":
                    with options(timeout=2.5):
                        holder = asyncio.create_task(client.get("/"))
                    await asyncio.sleep(0.1)
                task = asyncio.create_task(client.put("/", content=content))
                await asyncio.sleep(0.3)
                assert not task.done()
                others = {holder} if fault == "no_slot" else set()
                assert asyncio.all_tasks() == {asyncio.current_task(), task} | others
                assert threading.active_count() == threads
                with pytest.raises(DeadlineExceeded):
                    await task
                if others:
                    with pytest.raises(DeadlineExceeded):
                        await holder
            assert cancelled == []

    if fault == "connect":
        if sys.platform != "linux":
            pytest.skip("only Linux drops what a full accept queue cannot hold")
        with silent("127.0.0.1") as port:
            asyncio.run(main(mesh_of(f"127.0.0.1:{port}", timeout=Timeout(total=1.5, connect=5))))
        return
    asyncio.run(main(mesh_of(upstream, timeout=Timeout(total=1.5), connections=Connections(max_per_endpoint=1))))


@pytest.mark.parametrize("fault", ["hang", "silence", "stall_reader"])
def test_C4_a_deadline_of_a_sync_call_starts_no_thread(no_leaks: None, upstream: Upstream, fault: str) -> None:
    upstream.script(NO_HEADERS.get(fault) or NO_END.get(fault) or {"fault": "stall_reader"})
    mesh = mesh_of(upstream, timeout=Timeout(total=1.5))
    caught: list[Exception] = []

    def call() -> None:
        with mesh.client("orders") as client:
            try:
                client.put("/", content=bytes(UPLOAD) if fault == "stall_reader" else b"")
            except httpx.HTTPError as error:
                caught.append(error)

    before = set(threading.enumerate())
    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    assert set(threading.enumerate()) == before | {thread}
    thread.join()
    assert [type(error) for error in caught] == [DeadlineExceeded]


def test_C4_a_hundred_calls_at_once_all_end_on_time(no_leaks: None, upstream: Upstream, noted: Noted) -> None:
    upstream.script(then={"fault": "endless_1xx", "interval": 0.05})
    mesh = mesh_of(upstream, timeout=Timeout(total=TOTAL))

    async def one(client: httpx.AsyncClient) -> float:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await client.get("/")
        return time.monotonic() - began - TOTAL

    async def main() -> list[float]:
        async with mesh.async_client("orders") as client:
            return await asyncio.gather(*(one(client) for _ in range(100)))

    overruns = asyncio.run(main())
    assert min(overruns) > -0.01
    assert noted(max(overruns)) < BUSY
    assert in_flight(mesh) == 0


def test_C4_a_deadline_is_no_deadline_of_another_call(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script(then={"fault": "hang"})
    mesh = Mesh(Service("orders", [fleet[0].address], timeout=Timeout(total=0.2)), Service("users", [fleet[1].address]))

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(DeadlineExceeded, match=r"orders: no answer within 0\.2 s"):
            await client.get("http://orders/")
        assert (await client.get("http://users/")).status_code == 200

    colour.run(mesh, script, service=None)


def test_C4_an_error_before_the_deadline_is_told_as_it_is(colour: Colour, no_leaks: None) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        with pytest.raises(httpx.ConnectError) as caught:
            await client.get("/")
        assert not isinstance(caught.value, DeadlineExceeded)
        assert time.monotonic() - began < BUSY

    with refusing() as dead:
        colour.run(mesh_of(dead, timeout=Timeout(total=20)), script)


def test_a_timeout_may_be_longer_than_the_system_counts(colour: Colour, secured: Secured) -> None:
    secured.upstream.script(then={"size": 100_000, "chunked": True, "delay": 0.02})
    mesh = secured.mesh(timeout=Timeout(total=1e10, attempt=1e10, connect=1e10))

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(2)]

    assert [len(response.content) for response in colour.run(mesh, script)] == [100_000] * 2
