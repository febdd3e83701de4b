"""Somebody else's transports under the mesh: `Mesh(inner=...)`. httpx's own and aiohttp's are in `test_inner_real`."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import aiohttp
import anyio
import anyio.lowlevel
import httpx
import pytest
from doubles import Answer, Body, Both, Factory

from conftest import Colour
from meshes import get_or_error, outcomes, over, post_or_error
from meshlib import DeadlineExceeded, Endpoint, Mesh, Retry, RoundRobin, Service, Timeout, report

SLACK = 0.5
"""Seconds that a busy machine may be late."""

ONCE = Retry(max_attempts=1)
TWO = ("10.0.0.1:80", "10.0.0.2:80")


def raising(error: Exception) -> Answer:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error

    return answer


def busy(request: httpx.Request) -> httpx.Response:
    return httpx.Response(503, headers={"retry-after": "60"}, text="busy")


async def get(client: httpx.AsyncClient) -> httpx.Response:
    return await client.get("/")


# What an inner transport is asked


def test_a_request_goes_to_the_endpoint_as_the_caller_made_it(colour: Colour) -> None:
    factory = Factory()
    mesh = over("10.0.0.1:8080", "[::1]:81", inner=factory)

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        headers = {"x-c": "d", "cookie": "k=v"}
        return [await client.post("/v1/orders?x=1&y=%2F", content=b"hello", headers=headers) for _ in range(2)]

    responses = colour.run(mesh, script)
    assert {response.text for response in responses} == {"10.0.0.1:8080", "[::1]:81"}
    assert {str(request.url) for request in factory.requests} == {
        "http://10.0.0.1:8080/v1/orders?x=1&y=%2F",
        "http://[::1]:81/v1/orders?x=1&y=%2F",
    }
    for request in factory.requests:
        sent = request.headers
        assert (request.method, sent["host"], sent["x-c"], sent["cookie"]) == ("POST", "orders", "d", "k=v")
        assert sent["content-length"] == "5"
        assert 0 < int(sent["x-meshlib-deadline-ms"]) <= 30_000
        assert b"".join(request.stream) == request.content == b"hello"  # type: ignore[arg-type]
    for response in responses:
        assert str(response.request.url) == "http://orders/v1/orders?x=1&y=%2F", "the caller sees its own request"
        assert outcomes(response) == [("first", "ok")]
    assert mesh.snapshot()["orders"].in_flight == 0


def test_the_time_left_is_told_as_timeouts(colour: Colour) -> None:
    factory = Factory()
    mesh = over("10.0.0.1:80", inner=factory, host="endpoint", timeout=Timeout(total=5, attempt=2, connect=0.5))

    async def script(client: httpx.AsyncClient) -> None:
        await client.get("/")
        await client.get("/", timeout=httpx.Timeout(20, read=1.0, connect=0.25))

    colour.run(mesh, script)
    first, second = (request.extensions["timeout"] for request in factory.requests)
    assert first["connect"] == 0.5
    assert 1.9 < first["read"] == first["write"] == first["pool"] <= 2
    assert (second["connect"], second["read"]) == (0.25, 1.0)
    assert 1.9 < second["write"] == second["pool"] <= 2
    assert factory.requests[0].headers["host"] == "10.0.0.1:80"


def test_one_transport_for_each_endpoint_closed_with_the_client(colour: Colour) -> None:
    factory = Factory()
    orders = Service("orders", TWO, balancer=RoundRobin())  # chance may well choose one of two ten times in a row
    mesh = Mesh(orders, Service("users", TWO[:1]), inner=factory)

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(10):
            await client.get("http://orders/")
            await client.get("http://users/")
        assert [each.closed for each in factory.made] == [0, 0, 0]

    colour.run(mesh, script, service=None)
    assert sorted(str(each.endpoint) for each in factory.made) == [TWO[0], TWO[0], TWO[1]]
    assert [each.closed for each in factory.made] == [1, 1, 1]
    colour.run(mesh, get)
    assert len(factory.made) == 4, "another client has its own"


def test_S3_threads_share_one_transport_for_each_endpoint() -> None:
    factory = Factory()
    mesh = over(*TWO, inner=factory)
    barrier = threading.Barrier(8)
    with mesh.client("orders") as client:

        def work() -> None:
            barrier.wait()
            for _ in range(20):
                assert client.get("/").status_code == 200

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    used = [each for each in factory.made if each.requests]
    assert [each.closed for each in used] == [1, 1]
    assert len(factory.requests) == 160
    assert mesh.snapshot()["orders"].in_flight == 0


def test_every_transport_is_closed_even_if_one_fails_to(colour: Colour) -> None:
    class Stubborn(Both):
        def close(self) -> None:
            super().close()
            raise RuntimeError("will not close")

        async def aclose(self) -> None:
            self.close()

    made: list[Stubborn] = []

    def factory(endpoint: Endpoint) -> Stubborn:
        made.append(Stubborn(endpoint))
        return made[-1]

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(2):
            await client.get("/")

    with pytest.raises(RuntimeError, match="will not close"):
        colour.run(over(*TWO, inner=factory), script)
    assert [each.closed for each in made] == [1, 1]


def test_a_transport_of_the_wrong_colour_is_named(colour: Colour) -> None:
    class OnlySync(httpx.BaseTransport):
        pass

    class OnlyAsync(httpx.AsyncBaseTransport):
        pass

    wrong, needed = (OnlyAsync, "BaseTransport") if colour.is_sync else (OnlySync, "AsyncBaseTransport")
    mesh = over(*TWO, inner=lambda endpoint: wrong())
    error = colour.run(mesh, get_or_error)
    assert type(error) is TypeError
    assert f"{wrong.__name__} for 10.0.0." in str(error)
    assert str(error).endswith(f"client needs an httpx.{needed}")
    assert [(node.failures, node.in_flight) for node in mesh.snapshot()["orders"].nodes] == [(0, 0), (0, 0)]


# What an exception means


def test_C2_a_failure_to_connect_fails_over_even_for_a_post(colour: Colour) -> None:
    factory = Factory({TWO[0]: raising(httpx.ConnectError("refused"))})
    mesh = over(*TWO, inner=factory)

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post("/", content=b"x") for _ in range(4)]

    responses = colour.run(mesh, script)
    assert [response.text for response in responses] == [TWO[1]] * 4
    assert [("first", "not_sent"), ("failover", "ok")] in map(outcomes, responses)
    assert mesh.snapshot()["orders"].in_flight == 0


NOWHERE = OSError(111, "refused")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (httpx.ConnectError("refused"), 1),
        (httpx.ConnectTimeout("late"), 1),
        (httpx.PoolTimeout("all taken"), 0),
        (caused(httpx.ConnectTimeout(""), aiohttp.ClientConnectorError(None, NOWHERE)), 1),  # type: ignore[arg-type]
        (caused(httpx.ConnectTimeout(""), aiohttp.ConnectionTimeoutError()), 1),
    ],
    ids=["refused", "late", "pool", "aiohttp refused", "aiohttp late"],
)
def test_C1_what_was_surely_not_sent_goes_elsewhere(error: Exception, blamed: int) -> None:
    colour = Colour("sync")  # one function decides it for all colours
    mesh = over(*TWO, inner=Factory({TWO[0]: raising(error), TWO[1]: raising(error)}), retry=ONCE)
    left = colour.run(mesh, post_or_error)
    assert (type(left), str(left)) == (type(error), str(error))
    assert outcomes(left) == [("first", "not_sent"), ("failover", "not_sent")]
    assert [node.failures for node in mesh.snapshot()["orders"].nodes] == [blamed, blamed]


@pytest.mark.parametrize(
    "error",
    [
        httpx.ReadError("lost"),
        httpx.ReadTimeout("late"),
        httpx.RemoteProtocolError("rubbish"),
        httpx.ProxyError("lost"),
        httpx.TimeoutException("late"),
        caused(httpx.ConnectTimeout(""), aiohttp.ServerDisconnectedError()),
        caused(httpx.ConnectTimeout(""), aiohttp.ClientOSError(32, "Can not write request body")),
        caused(httpx.ConnectTimeout(""), aiohttp.ClientConnectionResetError("Cannot write to closing transport")),
    ],
    ids=lambda error: type(error.__cause__ or error).__name__,
)
def test_C1_what_may_have_arrived_is_repeated_only_if_it_may_be(error: Exception) -> None:
    colour = Colour("asyncio")
    factory = Factory({TWO[0]: raising(error), TWO[1]: raising(error)})
    mesh = over(*TWO, inner=factory, retry=Retry(max_attempts=2))
    left = colour.run(mesh, post_or_error)
    assert type(left) is type(error)
    assert outcomes(left) == [("first", "failed")]
    assert len(factory.requests) == 1
    left = colour.run(mesh, get_or_error)
    assert type(left) is type(error)
    assert outcomes(left) == [("first", "failed"), ("retry", "failed")]


@pytest.mark.parametrize("error", [ValueError("mine"), httpx.UnsupportedProtocol("mine")])
def test_what_the_caller_did_wrong_blames_nobody(colour: Colour, error: Exception) -> None:
    mesh = over(*TWO, inner=Factory({TWO[0]: raising(error), TWO[1]: raising(error)}))
    left = colour.run(mesh, get_or_error)
    assert type(left) is type(error)
    assert outcomes(left) == [("first", "abandoned")]
    assert [(node.failures, node.in_flight) for node in mesh.snapshot()["orders"].nodes] == [(0, 0), (0, 0)]


def test_C9_a_rejected_answer_is_read_for_its_retry_after(colour: Colour) -> None:
    response = colour.run(over(*TWO, inner=Factory({TWO[0]: busy, TWO[1]: busy}), timeout=Timeout(total=5)), get)
    assert (response.status_code, response.text) == (503, "busy")
    assert outcomes(response) == [("first", "rejected")]
    assert report(response).attempts[0].retry_after == 60


def test_the_answers_own_extensions_and_headers_stay(colour: Colour) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        headers = [("set-cookie", "a=1"), ("set-cookie", "b=2")]
        return httpx.Response(200, headers=headers, stream=Body(b"x"), extensions={"http_version": b"HTTP/2"})

    response = colour.run(over(TWO[0], inner=Factory({TWO[0]: answer})), get)
    assert response.http_version == "HTTP/2"
    assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert response.content == b"x"


# Deadlines


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_C4_a_hanging_transport_is_cancelled_at_the_deadline(backend: str) -> None:
    factory = Factory(hang=True)
    mesh = over(*TWO, inner=factory, timeout=Timeout(total=0.3))

    async def main() -> Exception:
        async with mesh.async_client("orders") as client:
            started = time.monotonic()
            error = await get_or_error(client)
            assert 0.28 <= time.monotonic() - started <= 0.3 + SLACK
            return error

    error = anyio.run(main, backend=backend)
    assert type(error) is DeadlineExceeded
    assert [kind for kind, _ in outcomes(error)] == ["first"]
    assert sum(each.cancelled for each in factory.made) == len(factory.requests) == 1
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_C1_a_post_that_hangs_is_not_sent_again(backend: str) -> None:
    factory = Factory(hang=True)
    mesh = over(*TWO, inner=factory, timeout=Timeout(total=5, attempt=0.1))

    async def main() -> tuple[Exception, Exception]:
        async with mesh.async_client("orders") as client:
            return await post_or_error(client), await get_or_error(client)

    posted, got = anyio.run(main, backend=backend)
    assert type(posted) is httpx.ReadTimeout
    assert outcomes(posted) == [("first", "failed")]
    assert outcomes(got) == [("first", "failed"), ("retry", "failed"), ("retry", "failed")]
    assert [request.method for request in factory.requests].count("POST") == 1


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_C7_a_cancelled_call_cancels_the_transport(backend: str) -> None:
    factory = Factory(hang=True)
    mesh = over(*TWO, inner=factory)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            with anyio.move_on_after(0.1) as scope:
                await client.get("/")
            assert scope.cancelled_caught

    anyio.run(main, backend=backend)
    assert sum(each.cancelled for each in factory.made) == len(factory.requests) == 1
    assert [(node.failures, node.in_flight) for node in mesh.snapshot()["orders"].nodes] == [(0, 0), (0, 0)]


def test_C4_a_streamed_body_ends_at_the_deadline_unless_the_caller_says_so(colour: Colour) -> None:
    bodies: list[Body] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(Body(*[b"x"] * (20 if bodies else 200), interval=0.03))
        return httpx.Response(200, stream=bodies[-1])

    mesh = over(TWO[0], inner=Factory({TWO[0]: answer}), timeout=Timeout(total=0.3))

    async def script(client: httpx.AsyncClient) -> bytes:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            await client.get("/")
        assert 0.28 <= time.monotonic() - started <= 0.3 + SLACK
        assert report(caught.value).attempts[0].status == 200
        return (await client.get("/", extensions={"meshlib": {"body_deadline": False}})).content

    assert colour.run(mesh, script) == b"x" * 20
    assert mesh.snapshot()["orders"].in_flight == 0
    assert [body.closed for body in bodies] == [1, 1]


# Bodies: what is in flight, and what is closed


@pytest.mark.parametrize(("read", "whole"), [(True, False), (False, False), (True, True)])
def test_C6_a_streamed_body_is_in_flight_until_it_ends_and_is_closed_once(
    colour: Colour, read: bool, whole: bool
) -> None:
    body = Body(b"one", b"two")
    answer = httpx.Response(200, content=b"whole") if whole else httpx.Response(200, stream=body)
    mesh = over(TWO[0], inner=Factory({TWO[0]: lambda request: answer}))

    async def script(client: Any) -> None:
        response = await client.send(httpx.Request("GET", "http://orders/"), stream=True)
        assert mesh.snapshot()["orders"].in_flight == (0 if whole else 1)
        if colour.is_sync:
            assert not read or response.read() in (b"onetwo", b"whole")
            response.close()
        else:
            assert not read or await response.aread() in (b"onetwo", b"whole")
            await response.aclose()
        assert mesh.snapshot()["orders"].in_flight == 0

    colour.run(mesh, script)
    assert body.closed == (0 if whole else 1)


def test_a_body_that_dies_is_one_failure_and_is_closed(colour: Colour) -> None:
    body = Body(b"one", httpx.ReadError("lost"))
    mesh = over(TWO[0], inner=Factory({TWO[0]: lambda request: httpx.Response(200, stream=body)}))
    error = colour.run(mesh, get_or_error)
    assert type(error) is httpx.ReadError
    assert error.__cause__ is not error, "whoever follows the causes would never end"
    assert outcomes(error) == [("first", "failed")]
    [node] = mesh.snapshot()["orders"].nodes
    assert (node.attempts, node.failures, node.in_flight, body.closed) == (1, 1, 0, 1)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_C4_a_body_that_does_not_close_is_left_at_the_deadline(backend: str) -> None:
    class Clinging(Body):
        async def aclose(self) -> None:
            await anyio.sleep(10)

    body = Clinging(b"x", b"y", interval=0.2)
    mesh = over(TWO[0], inner=Factory({TWO[0]: lambda _: httpx.Response(200, stream=body)}), timeout=Timeout(total=0.3))

    async def main() -> Exception:
        async with mesh.async_client("orders") as client:
            started = time.monotonic()
            error = await get_or_error(client)
            assert time.monotonic() - started <= 0.3 + SLACK
            return error

    assert type(anyio.run(main, backend=backend)) is DeadlineExceeded
    assert mesh.snapshot()["orders"].in_flight == 0


def test_C5_a_rejected_answer_that_cannot_be_read_does_not_end_the_call(colour: Colour) -> None:
    body = Body(b"x", OSError("odd"))
    mesh = over(*TWO, inner=Factory({TWO[0]: lambda request: httpx.Response(503, stream=body)}))

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(2)]

    responses = colour.run(mesh, script)
    assert [response.text for response in responses] == [TWO[1]] * 2
    assert [("first", "rejected"), ("retry", "ok")] in map(outcomes, responses)
    assert [(node.in_flight, node.state) for node in mesh.snapshot()["orders"].nodes] == [(0, "closed")] * 2


@pytest.mark.parametrize("size", [100, 500_000])
def test_C5_a_rejected_answer_is_closed_before_the_next_attempt(colour: Colour, size: int) -> None:
    rejected = [Body(*[b"x" * 10_000] * (size // 10_000 + 1)) for _ in range(2)]
    answers = iter([httpx.Response(503, stream=body) for body in rejected])
    closed: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        closed.append(sum(body.closed for body in rejected))
        return next(answers, httpx.Response(200, text="fine"))

    assert colour.run(over(*TWO, inner=Factory({TWO[0]: answer, TWO[1]: answer})), get).text == "fine"
    assert closed == [0, 1, 2]
    gc.collect()  # of a generator left half-way trio complains


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_C7_a_call_cancelled_between_attempts_closes_the_answer_it_holds(backend: str) -> None:
    body = Body(b"busy")

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, headers={"retry-after": "5"}, stream=body)

    mesh = over(*TWO, inner=Factory({TWO[0]: answer, TWO[1]: answer}))

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            with anyio.move_on_after(0.2) as scope:
                await client.get("/")
            assert scope.cancelled_caught

    anyio.run(main, backend=backend)
    assert mesh.snapshot()["orders"].in_flight == 0
    assert body.closed == 1


def test_C6_a_response_thrown_away_is_not_in_flight(colour: Colour) -> None:
    body = Body(b"one", b"two")
    mesh = over(TWO[0], inner=Factory({TWO[0]: lambda request: httpx.Response(200, stream=body)}))

    async def script(client: Any) -> None:
        await client.send(httpx.Request("GET", "http://orders/"), stream=True)
        if not colour.is_sync:
            await (
                anyio.lowlevel.checkpoint()
            )  # asyncio holds on to what it threw into a task until the task waits again
        gc.collect()
        assert mesh.snapshot()["orders"].in_flight == 0

    colour.run(mesh, script)
