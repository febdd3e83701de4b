"""httpx's and aiohttp's own transports under the mesh, over sockets."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import httpx
import pytest
from httpx_aiohttp import AiohttpTransport

from conftest import Colour
from meshes import get_or_error, outcomes, over, post_or_error, refusing
from meshlib import DeadlineExceeded, Mesh, Retry, Timeout
from meshlib.testing import Upstream, upstreams
from meshlib.testing.upstream import generated

SLACK = 0.5
"""Seconds that a busy machine may be late."""

ONCE = Retry(max_attempts=1)


def mesh_of_inner(transport: Callable[[], Any], *endpoints: Upstream | str, **settings: Any) -> Mesh:
    addresses = [each.address if isinstance(each, Upstream) else each for each in endpoints]
    return over(*addresses, inner=lambda endpoint: transport(), **settings)


def slots(count: int) -> Callable[[], httpx.AsyncHTTPTransport]:
    return lambda: httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=count))


async def ten_at_once(client: httpx.AsyncClient, upstream: Upstream) -> None:
    """Show that all of the ten slots are there: calls run side by side. A busy machine may need a few times."""
    upstream.script(then={"delay": 0.4})
    for _ in range(6):
        started = time.monotonic()
        await asyncio.wait_for(asyncio.gather(*(client.get("/") for _ in range(10))), 25)
        if time.monotonic() - started < 0.75:
            return
    pytest.fail("ten calls of 0.4 s each never ran side by side")


# httpx's own


def test_httpxs_sync_transport_is_bounded_by_its_timeouts(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"fault": "hang"})
    mesh = mesh_of_inner(httpx.HTTPTransport, upstream, timeout=Timeout(total=0.4), retry=ONCE)
    with mesh.client("orders") as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.post("/", content=b"x")
        assert 0.38 <= time.monotonic() - started <= 0.4 + SLACK
    assert mesh.snapshot()["orders"].in_flight == 0
    assert len(upstream.log()) == 1


def test_httpxs_own_transports_carry_calls_and_fail_over(colour: Colour, upstream: Upstream) -> None:
    transport = httpx.HTTPTransport if colour.is_sync else httpx.AsyncHTTPTransport
    upstream.script(then={"size": 200_000})

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post(f"/{n}", content=generated(100_000)) for n in range(4)]

    with refusing() as dead:
        mesh = mesh_of_inner(transport, dead, upstream)
        responses = colour.run(mesh, script)
    assert {response.content for response in responses} == {generated(200_000)}
    assert [("first", "not_sent"), ("failover", "ok")] in map(outcomes, responses)
    log = upstream.log()
    assert [request.target for request in log] == ["/0", "/1", "/2", "/3"]
    assert {request.body_digest for request in log} == {hashlib.sha256(generated(100_000)).hexdigest()}
    assert {request.connection for request in log} == {1}
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize(
    "step",
    [{"fault": "hang"}, {"delay": 0.06}, {"fault": "drip_headers", "interval": 0.02}],
    ids=["hang", "late", "drip"],
)
def test_httpxs_async_transport_survives_calls_that_are_too_late(
    no_leaks: None, upstream: Upstream, step: dict[str, Any]
) -> None:
    upstream.script(then=step)
    mesh = mesh_of_inner(slots(10), upstream, retry=ONCE)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            for _ in range(10):
                calls = (client.get("/", extensions={"meshlib": {"timeout": 0.05}}) for _ in range(30))
                started = time.monotonic()
                results = await asyncio.gather(*calls, return_exceptions=True)
                assert time.monotonic() - started <= 0.05 + 2 * SLACK
                assert all(isinstance(result, httpx.TimeoutException) for result in results)
            await ten_at_once(client, upstream)

    asyncio.run(main())
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("where", ["headers", "body"])
def test_C7_httpxs_async_transport_survives_calls_that_are_cancelled(
    no_leaks: None, upstream: Upstream, where: str
) -> None:
    upstream.script(then={"delay": 0.03} if where == "headers" else {"fault": "drip", "interval": 0.001})
    mesh = mesh_of_inner(slots(10), upstream, retry=ONCE)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            for round_ in range(40):
                tasks = [asyncio.create_task(client.get("/")) for _ in range(20)]
                await asyncio.sleep(0.002 * round_)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await ten_at_once(client, upstream)

    asyncio.run(main())
    assert mesh.snapshot()["orders"].in_flight == 0


def test_a_call_that_ends_in_httpxs_queue_is_never_sent(no_leaks: None, upstream: Upstream) -> None:
    upstream.script({"delay": 0.5})
    mesh = mesh_of_inner(slots(1), upstream, retry=ONCE, timeout=Timeout(total=5, attempt=1))

    async def main() -> list[Any]:
        async with mesh.async_client("orders") as client:
            first = asyncio.create_task(client.get("/first"))
            await asyncio.sleep(0.1)
            cancelled = asyncio.create_task(client.post("/cancelled"))
            impatient = asyncio.create_task(client.post("/impatient", timeout=httpx.Timeout(None, pool=0.1)))
            late = asyncio.create_task(client.post("/late", extensions={"meshlib": {"timeout": 0.1}}))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            ends = await asyncio.gather(cancelled, impatient, late, first, return_exceptions=True)
            assert (await client.get("/last")).status_code == 200
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return ends

    cancelled, impatient, late, first = asyncio.run(main())
    assert type(cancelled) is asyncio.CancelledError
    assert type(impatient) is httpx.PoolTimeout
    assert type(late) is DeadlineExceeded
    assert outcomes(impatient)[0] == outcomes(late)[0] == ("first", "not_sent")
    assert first.status_code == 200
    assert [request.target for request in upstream.log()] == ["/first", "/last"]
    assert [node.failures for node in mesh.snapshot()["orders"].nodes] == [0]


def test_closing_the_client_ends_what_waits_in_httpxs_queue(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"fault": "hang"})
    mesh = mesh_of_inner(slots(1), upstream, retry=ONCE)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            sent, *waiting = [asyncio.create_task(client.get("/")) for _ in range(3)]
            await asyncio.sleep(0.1)
            for call in waiting:
                call.cancel()
            await asyncio.wait(waiting)
            await asyncio.wait_for(client.aclose(), 5)
            sent.cancel()
            await asyncio.gather(sent, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_the_callers_trace_still_hears_of_every_step(no_leaks: None, upstream: Upstream) -> None:
    heard: list[str] = []

    async def trace(name: str, info: dict[str, Any]) -> None:
        heard.append(name)

    async def main() -> None:
        async with mesh_of_inner(httpx.AsyncHTTPTransport, upstream).async_client("orders") as client:
            await client.get("/", extensions={"trace": trace})

    asyncio.run(main())
    assert "connection.connect_tcp.complete" in heard
    assert "http11.send_request_headers.started" in heard


def test_httpxs_async_transport_keeps_the_time_on_trio(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"fault": "hang"})
    mesh = mesh_of_inner(httpx.AsyncHTTPTransport, upstream, retry=ONCE)

    async def main() -> list[int]:
        async with mesh.async_client("orders") as client:
            for _ in range(3):
                started = time.monotonic()
                with pytest.raises(httpx.TimeoutException):
                    await client.get("/", extensions={"meshlib": {"timeout": 0.1}})
                assert time.monotonic() - started <= 0.1 + SLACK
            upstream.script()
            return [(await client.get("/")).status_code for _ in range(5)]

    assert anyio.run(main, backend="trio") == [200] * 5
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # nobody can close what belongs to a loop that is over
def test_S3_httpxs_async_transport_over_two_loops(upstream: Upstream) -> None:
    mesh = mesh_of_inner(httpx.AsyncHTTPTransport, upstream)
    client = mesh.async_client("orders")

    async def main() -> list[int]:
        return [(await client.get("/")).status_code for _ in range(3)]

    assert asyncio.run(main()) == [200] * 3
    assert asyncio.run(main()) == [200] * 3
    asyncio.run(client.aclose())
    gc.collect()


# httpx-aiohttp


def test_aiohttp_carries_calls_and_fails_over(no_leaks: None) -> None:
    with upstreams(3) as fleet, refusing() as dead:
        for upstream in fleet:
            upstream.script(then={"size": 200_000})
        mesh = mesh_of_inner(AiohttpTransport, dead, *fleet)

        async def main() -> list[httpx.Response]:
            async with mesh.async_client("orders") as client:
                responses = [await client.post(f"/{n}?a=%2F", content=generated(100_000)) for n in range(6)]
                fleet[1].kill()
                responses += await asyncio.gather(*(client.get(f"/{n}") for n in range(30)))
            await asyncio.sleep(0.05)  # aiohttp's connections close a turn later
            return responses

        responses = asyncio.run(main())
        log = [request for upstream in (fleet[0], fleet[2]) for request in upstream.log()]
    assert {response.content for response in responses} == {generated(200_000)}
    assert [("first", "not_sent"), ("failover", "ok")] in map(outcomes, responses)
    posts = [request for request in log if request.method == "POST"]
    assert {request.body_digest for request in posts} == {hashlib.sha256(generated(100_000)).hexdigest()}
    assert len(posts) == len({request.target for request in posts})
    assert {tuple(request.values("host")) for request in log} == {("orders",)}
    assert not [request for request in log if request.values("transfer-encoding")], "bytes go as bytes"
    assert mesh.snapshot()["orders"].in_flight == 0


def test_aiohttp_streams_bodies_both_ways(no_leaks: None, upstream: Upstream) -> None:
    upstream.script({"size": 1_000_000, "chunked": True})
    mesh = mesh_of_inner(AiohttpTransport, upstream)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield generated(50_000)

    async def main() -> int:
        async with mesh.async_client("orders") as client, client.stream("POST", "/", content=body()) as response:
            assert mesh.snapshot()["orders"].in_flight == 1
            return sum([len(chunk) async for chunk in response.aiter_bytes()])

    assert asyncio.run(main()) == 1_000_000
    assert upstream.log()[0].body_digest == hashlib.sha256(generated(50_000) * 10).hexdigest()
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("fault", ["close", "reset", "garbage", "half_status"])
def test_C1_aiohttp_sends_a_post_that_may_have_arrived_once(no_leaks: None, fault: str) -> None:
    with upstreams(2) as fleet:
        for upstream in fleet:
            upstream.script(then={"fault": fault})
        mesh = mesh_of_inner(AiohttpTransport, *fleet)

        async def main() -> Exception:
            async with mesh.async_client("orders") as client:
                error: Exception = await post_or_error(client)
            await asyncio.sleep(0.05)
            return error

        error = asyncio.run(main())
        sent = sum(len(upstream.log()) for upstream in fleet)
    assert sent == 1
    if fault != "garbage":  # httpx-aiohttp hands on aiohttp's own exception, which tells us nothing
        assert isinstance(error, httpx.TransportError)
        assert outcomes(error) == [("first", "failed")]


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_C4_aiohttp_ends_at_the_deadline_and_keeps_its_slots(no_leaks: None, upstream: Upstream, fault: str) -> None:
    upstream.script(then={"fault": fault, "interval": 0.02})
    transport = lambda: AiohttpTransport(limits=httpx.Limits(max_connections=10))  # noqa: E731
    mesh = mesh_of_inner(transport, upstream, retry=ONCE, timeout=Timeout(total=0.4))

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            for _ in range(2):
                started = time.monotonic()
                errors = await asyncio.gather(*(get_or_error(client) for _ in range(10)))
                assert {type(error) for error in errors} == {DeadlineExceeded}
                assert 0.38 <= time.monotonic() - started <= 0.4 + SLACK
            upstream.script()
            assert (await client.get("/")).status_code == 200
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert mesh.snapshot()["orders"].in_flight == 0
