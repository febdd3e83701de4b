"""Somebody else's transports under the mesh: `Mesh(inner=...)`."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
from httpx_aiohttp import AiohttpTransport

from conftest import Colour
from meshes import outcomes, refusing
from meshlib import DeadlineExceeded, Endpoint, Mesh, Retry, RoundRobin, Service, Timeout, report
from meshlib.testing import Upstream, upstreams
from meshlib.testing.upstream import generated

SLACK = 0.5
"""Seconds that a busy machine may be late."""

ONCE = Retry(max_attempts=1)
TWO = ("10.0.0.1:80", "10.0.0.2:80")


class Both(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """A transport of both colours that answers as it is told, and remembers what it was asked.

    Args:
        endpoint: whose it is.
        answer: a function of the request; what it raises is raised. Default 200 and the endpoint's name.
        hang: whether the async side never answers, which the sync side cannot.
    """

    def __init__(
        self, endpoint: Endpoint, answer: Callable[[httpx.Request], httpx.Response] | None = None, hang: bool = False
    ) -> None:
        self.endpoint = endpoint
        self.requests: list[httpx.Request] = []
        self.cancelled = 0
        self.closed = 0
        self._answer = answer or (lambda request: httpx.Response(200, text=str(endpoint)))
        self._hang = hang

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self._answer(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self._hang:
            try:
                await anyio.sleep(60)
            except BaseException:
                self.cancelled += 1
                raise
        return self._answer(request)

    def close(self) -> None:
        self.closed += 1

    async def aclose(self) -> None:
        self.closed += 1


class Factory:
    """Makes one `Both` for each endpoint it is asked for, and keeps them in order.

    Args:
        answers: by address; the others answer 200.
        hang: see `Both`; these addresses.
    """

    def __init__(
        self, answers: dict[str, Callable[[httpx.Request], httpx.Response]] | None = None, hang: tuple[str, ...] = ()
    ) -> None:
        self.made: list[Both] = []
        self._answers = answers or {}
        self._hang = hang

    def __call__(self, endpoint: Endpoint) -> Both:
        self.made.append(Both(endpoint, self._answers.get(str(endpoint)), str(endpoint) in self._hang))
        return self.made[-1]

    @property
    def requests(self) -> list[httpx.Request]:
        return [request for each in self.made for request in each.requests]


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A streamed body of both colours that knows what was done with it.

    Args:
        chunks: what it brings; an exception is raised.
        interval: seconds before each chunk.
    """

    def __init__(self, *chunks: bytes | Exception, interval: float = 0.0) -> None:
        self.closed = 0
        self._chunks = chunks
        self._interval = interval

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            time.sleep(self._interval)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            await anyio.sleep(self._interval)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def close(self) -> None:
        self.closed += 1

    async def aclose(self) -> None:
        self.closed += 1


def raising(error: Exception) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error

    return answer


def over(*addresses: str, inner: Callable[[Endpoint], Any], **settings: Any) -> Mesh:
    """A mesh with the service `orders` whose attempts go through `inner`."""
    return Mesh(Service("orders", addresses, balancer=RoundRobin(), **settings), inner=inner)


async def get(client: httpx.AsyncClient) -> httpx.Response:
    return await client.get("/")


async def get_or_error(client: httpx.AsyncClient) -> httpx.Response | Exception:
    try:
        return await client.get("/")
    except Exception as error:
        return error


async def post_or_error(client: httpx.AsyncClient) -> httpx.Response | Exception:
    try:
        return await client.post("/", content=b"once")
    except Exception as error:
        return error


# What an inner transport is asked


def test_a_request_goes_to_the_endpoint_as_the_caller_made_it(colour: Colour) -> None:
    factory = Factory()
    mesh = over("10.0.0.1:8080", "[::1]:81", inner=factory)

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [
            await client.post("/v1/orders?x=1&y=%2F", content=b"hello", headers={"x-c": "d", "cookie": "k=v"})
            for _ in range(2)
        ]

    responses = colour.run(mesh, script)
    assert {response.text for response in responses} == {"10.0.0.1:8080", "[::1]:81"}
    assert {str(request.url) for request in factory.requests} == {
        "http://10.0.0.1:8080/v1/orders?x=1&y=%2F",
        "http://[::1]:81/v1/orders?x=1&y=%2F",
    }
    for request in factory.requests:
        assert request.method == "POST"
        assert request.headers["host"] == "orders"
        assert (request.headers["x-c"], request.headers["cookie"]) == ("d", "k=v")
        assert request.headers["content-length"] == "5"
        assert 0 < int(request.headers["x-meshlib-deadline-ms"]) <= 30_000
        assert b"".join(request.stream) == b"hello"  # type: ignore[arg-type]
    for response in responses:
        assert str(response.request.url) == "http://orders/v1/orders?x=1&y=%2F", "the caller sees its own request"
        assert outcomes(response) == [("first", "ok")]
    assert mesh.snapshot()["orders"].in_flight == 0


def test_the_host_may_be_the_endpoints(colour: Colour) -> None:
    factory = Factory()
    colour.run(over("10.0.0.1:8080", inner=factory, host="endpoint"), get)
    assert [request.headers["host"] for request in factory.requests] == ["10.0.0.1:8080"]


def test_the_time_left_is_told_as_timeouts(colour: Colour) -> None:
    factory = Factory()
    mesh = over("10.0.0.1:80", inner=factory, timeout=Timeout(total=5, attempt=2, connect=0.5))

    async def script(client: httpx.AsyncClient) -> None:
        await client.get("/")
        await client.get("/", timeout=httpx.Timeout(20, read=1.0, connect=0.25))

    colour.run(mesh, script)
    first, second = (request.extensions["timeout"] for request in factory.requests)
    assert first["connect"] == 0.5
    assert 1.9 < first["read"] == first["write"] == first["pool"] <= 2
    assert (second["connect"], second["read"]) == (0.25, 1.0)
    assert 1.9 < second["write"] == second["pool"] <= 2


def test_one_transport_for_each_endpoint_closed_with_the_client(colour: Colour) -> None:
    factory = Factory()
    mesh = Mesh(Service("orders", TWO), Service("users", TWO[:1]), inner=factory)

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(10):
            await client.get("http://orders/")
            await client.get("http://users/")
        assert [each.closed for each in factory.made] == [0, 0, 0]

    colour.run(mesh, script, service=None)
    assert sorted(str(each.endpoint) for each in factory.made) == [TWO[0], TWO[0], TWO[1]]
    assert [each.closed for each in factory.made] == [1, 1, 1]
    colour.run(mesh, script_once)
    assert len(factory.made) == 4, "another client has its own"


async def script_once(client: httpx.AsyncClient) -> None:
    await client.get("/")


def test_threads_share_one_transport_for_each_endpoint() -> None:
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
        assert sum(len(each.requests) for each in used) == 160
        with_late_ones = len(used)
    assert with_late_ones == 2
    assert [each.closed for each in used] == [1, 1]
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


def test_a_factory_that_raises_is_the_callers_own_error(colour: Colour) -> None:
    def factory(endpoint: Endpoint) -> Both:
        raise LookupError("no transport")

    mesh = over(*TWO, inner=factory)
    assert isinstance(colour.run(mesh, get_or_error), LookupError)
    assert mesh.snapshot()["orders"].in_flight == 0
    assert [node.failures for node in mesh.snapshot()["orders"].nodes] == [0, 0]


# What an exception means


def test_C2_a_failure_to_connect_fails_over_even_for_a_post(colour: Colour) -> None:
    sent: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        sent.append(str(request.url.port))
        raise httpx.ConnectError("refused")

    def transport(endpoint: Endpoint) -> httpx.MockTransport:
        return httpx.MockTransport(refuse if endpoint.port == 1 else lambda request: httpx.Response(200, text="fine"))

    mesh = over("10.0.0.1:1", "10.0.0.1:2", inner=transport)

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post("/", content=b"x") for _ in range(4)]

    responses = colour.run(mesh, script)
    assert [response.text for response in responses] == ["fine"] * 4
    assert [("first", "not_sent"), ("failover", "ok")] in map(outcomes, responses)
    assert sent
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused"), httpx.ConnectTimeout("late"), httpx.PoolTimeout("all taken")]
)
def test_what_was_surely_not_sent_goes_elsewhere(colour: Colour, error: Exception) -> None:
    factory = Factory({TWO[0]: raising(error), TWO[1]: raising(error)})
    mesh = over(*TWO, inner=factory, retry=ONCE)
    left = colour.run(mesh, post_or_error)
    assert type(left) is type(error)
    assert str(left) == str(error)
    assert outcomes(left) == [("first", "not_sent"), ("failover", "not_sent")]
    blamed = 0 if isinstance(error, httpx.PoolTimeout) else 1
    assert [node.failures for node in mesh.snapshot()["orders"].nodes] == [blamed, blamed]


@pytest.mark.parametrize(
    "error",
    [
        httpx.ReadError("lost"),
        httpx.WriteError("lost"),
        httpx.ReadTimeout("late"),
        httpx.WriteTimeout("late"),
        httpx.RemoteProtocolError("rubbish"),
        httpx.CloseError("lost"),
        httpx.ProxyError("lost"),
        httpx.NetworkError("lost"),
        httpx.TimeoutException("late"),
        httpx.TransportError("lost"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_C1_what_may_have_arrived_is_repeated_only_if_it_may_be(colour: Colour, error: Exception) -> None:
    factory = Factory({TWO[0]: raising(error), TWO[1]: raising(error)})
    mesh = over(*TWO, inner=factory, retry=Retry(max_attempts=2))
    left = colour.run(mesh, post_or_error)
    assert type(left) is type(error)
    assert outcomes(left) == [("first", "failed")]
    assert len(factory.requests) == 1
    left = colour.run(mesh, get_or_error)
    assert type(left) is type(error)
    assert outcomes(left) == [("first", "failed"), ("retry", "failed")]
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize(
    "error", [ValueError("mine"), httpx.UnsupportedProtocol("mine"), httpx.LocalProtocolError("x")]
)
def test_what_the_caller_did_wrong_blames_nobody(colour: Colour, error: Exception) -> None:
    factory = Factory({TWO[0]: raising(error), TWO[1]: raising(error)})
    mesh = over(*TWO, inner=factory)
    left = colour.run(mesh, get_or_error)
    assert type(left) is type(error)
    assert outcomes(left) == [("first", "abandoned")]
    assert [node.failures for node in mesh.snapshot()["orders"].nodes] == [0, 0]
    assert mesh.snapshot()["orders"].in_flight == 0


def test_rejected_answers_are_retried_and_the_last_one_is_whole(colour: Colour) -> None:
    def busy(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, text="busy")

    response = colour.run(over(*TWO, inner=Factory({TWO[0]: busy, TWO[1]: busy})), get)
    assert (response.status_code, response.text) == (503, "busy")
    assert {outcome for _, outcome in outcomes(response)} == {"rejected"}
    assert len(outcomes(response)) == 3
    healed = colour.run(over(*TWO, inner=Factory({TWO[0]: busy})), get_twice)
    assert [each.status_code for each in healed] == [200, 200]


async def get_twice(client: httpx.AsyncClient) -> list[httpx.Response]:
    return [await client.get("/") for _ in range(2)]


def test_retry_after_is_read(colour: Colour) -> None:
    def busy(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, headers={"retry-after": "60"}, text="busy")

    response = colour.run(over(*TWO, inner=Factory({TWO[0]: busy, TWO[1]: busy}), timeout=Timeout(total=5)), get)
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
    assert outcomes(response) == [("first", "ok")]


# Deadlines


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("call", [get_or_error, post_or_error])
def test_C4_a_hanging_transport_is_cancelled_at_the_deadline(backend: str, call: Callable[[Any], Any]) -> None:
    factory = Factory(hang=TWO)
    mesh = over(*TWO, inner=factory, timeout=Timeout(total=0.3))

    async def main() -> Exception:
        async with mesh.async_client("orders") as client:
            started = time.monotonic()
            error: Exception = await call(client)
            assert 0.28 <= time.monotonic() - started <= 0.3 + SLACK
            return error

    error = anyio.run(main, backend=backend)
    assert type(error) is DeadlineExceeded
    assert [kind for kind, _ in outcomes(error)] == ["first"]
    assert sum(each.cancelled for each in factory.made) == len(factory.requests) == 1
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_C1_a_post_that_hangs_is_not_sent_again(backend: str) -> None:
    factory = Factory(hang=TWO)
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
    factory = Factory(hang=TWO)
    mesh = over(*TWO, inner=factory)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            with anyio.move_on_after(0.1) as scope:
                await client.get("/")
            assert scope.cancelled_caught

    anyio.run(main, backend=backend)
    assert sum(each.cancelled for each in factory.made) == len(factory.requests) == 1
    assert mesh.snapshot()["orders"].in_flight == 0
    assert [node.failures for node in mesh.snapshot()["orders"].nodes] == [0, 0]


def test_C4_a_streamed_body_ends_at_the_deadline(colour: Colour) -> None:
    body = Body(*[b"x"] * 200, interval=0.03)
    factory = Factory({TWO[0]: lambda request: httpx.Response(200, stream=body)})
    mesh = over(TWO[0], inner=factory, timeout=Timeout(total=0.3))

    async def script(client: httpx.AsyncClient) -> None:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            await client.get("/")
        assert 0.28 <= time.monotonic() - started <= 0.3 + SLACK
        assert report(caught.value).attempts[0].status == 200

    colour.run(mesh, script)
    assert mesh.snapshot()["orders"].in_flight == 0
    assert body.closed == 1


def test_a_body_may_outlast_the_deadline_where_the_caller_says_so(colour: Colour) -> None:
    body = Body(*[b"x"] * 20, interval=0.03)
    factory = Factory({TWO[0]: lambda request: httpx.Response(200, stream=body)})

    async def script(client: httpx.AsyncClient) -> bytes:
        response = await client.get("/", extensions={"meshlib": {"body_deadline": False}})
        return response.content

    assert colour.run(over(TWO[0], inner=factory, timeout=Timeout(total=0.2)), script) == b"x" * 20
    assert body.closed == 1


# Bodies: what is in flight, and what is closed


def run_stream(colour: Colour, mesh: Mesh, inside: Callable[[], None], read: bool) -> None:
    """Open a streamed response, call `inside`, then read it or leave it."""
    if colour.is_sync:
        with mesh.client("orders") as client, client.stream("GET", "/") as response:
            inside()
            if read:
                assert response.read()
        return

    async def script(client: httpx.AsyncClient) -> None:
        async with client.stream("GET", "/") as response:
            inside()
            if read:
                assert await response.aread()

    colour.run(mesh, script)


@pytest.mark.parametrize("read", [True, False])
def test_C6_a_streamed_body_is_in_flight_until_it_ends_and_is_closed_once(colour: Colour, read: bool) -> None:
    body = Body(b"one", b"two")
    factory = Factory({TWO[0]: lambda request: httpx.Response(200, stream=body)})
    mesh = over(TWO[0], inner=factory)
    seen: list[int] = []
    run_stream(colour, mesh, lambda: seen.append(mesh.snapshot()["orders"].in_flight), read)
    assert seen == [1]
    assert mesh.snapshot()["orders"].in_flight == 0
    assert body.closed == 1


def test_C6_an_answer_that_is_all_here_is_not_in_flight(colour: Colour) -> None:
    factory = Factory({TWO[0]: lambda request: httpx.Response(200, content=b"whole")})
    mesh = over(TWO[0], inner=factory)
    seen: list[int] = []
    run_stream(colour, mesh, lambda: seen.append(mesh.snapshot()["orders"].in_flight), read=True)
    assert seen == [0]


def test_a_body_that_dies_is_one_failure_and_is_closed(colour: Colour) -> None:
    body = Body(b"one", httpx.ReadError("lost"))
    factory = Factory({TWO[0]: lambda request: httpx.Response(200, stream=body)})
    mesh = over(TWO[0], inner=factory)
    error = colour.run(mesh, get_or_error)
    assert type(error) is httpx.ReadError
    assert outcomes(error) == [("first", "failed")]
    [node] = mesh.snapshot()["orders"].nodes
    assert (node.attempts, node.failures, node.in_flight) == (1, 1, 0)
    assert body.closed == 1


@pytest.mark.parametrize("size", [100, 500_000])
def test_C5_a_rejected_answer_is_closed_before_the_next_attempt(colour: Colour, size: int) -> None:
    rejected = [Body(*[b"x" * 10_000] * (size // 10_000 + 1)) for _ in range(2)]
    answers = iter([httpx.Response(503, stream=body) for body in rejected])
    closed: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        closed.append(sum(body.closed for body in rejected))
        return next(answers, httpx.Response(200, text="fine"))

    factory = Factory({TWO[0]: answer, TWO[1]: answer})
    assert colour.run(over(*TWO, inner=factory), get).text == "fine"
    assert closed == [0, 1, 2]


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
    factory = Factory({TWO[0]: lambda request: httpx.Response(200, stream=body)})
    mesh = over(TWO[0], inner=factory)

    async def script(client: Any) -> None:
        await client.send(httpx.Request("GET", "http://orders/"), stream=True)
        gc.collect()
        assert mesh.snapshot()["orders"].in_flight == 0

    colour.run(mesh, script)


# httpx's own transports


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


def mesh_of_inner(transport: Callable[[], Any], *endpoints: Upstream | str, **settings: Any) -> Mesh:
    addresses = [each.address if isinstance(each, Upstream) else each for each in endpoints]
    return over(*addresses, inner=lambda endpoint: transport(), **settings)


def ten() -> httpx.AsyncHTTPTransport:
    return httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=10))


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


async def hundred(client: httpx.AsyncClient, upstream: Upstream) -> list[int]:
    """The statuses of a hundred calls, after ten at once have shown that all of the ten slots are there.

    They may have to show it a few times: what was abandoned goes on for as long as its timeouts let it.
    """
    upstream.script(then={"delay": 0.5})
    for _ in range(6):
        started = time.monotonic()
        await asyncio.wait_for(asyncio.gather(*(client.get("/") for _ in range(10))), 25)
        if (seconds := time.monotonic() - started) < 0.9:
            break
    assert seconds < 0.9, "ten calls of half a second each never ran side by side"
    upstream.script()
    responses = await asyncio.wait_for(asyncio.gather(*(client.get("/") for _ in range(100))), 25)
    return [response.status_code for response in responses]


@pytest.mark.parametrize(
    "step", [{"fault": "hang"}, {"delay": 0.06}, {"fault": "drip", "interval": 0.02}], ids=["hang", "late", "drip"]
)
def test_httpxs_async_transport_survives_calls_that_are_too_late(
    no_leaks: None, upstream: Upstream, step: dict[str, Any]
) -> None:
    upstream.script(then=step)
    mesh = mesh_of_inner(ten, upstream, retry=ONCE)

    async def main() -> list[int]:
        async with mesh.async_client("orders") as client:
            for _ in range(10):
                calls = (client.get("/", extensions={"meshlib": {"timeout": 0.05}}) for _ in range(30))
                results = await asyncio.gather(*calls, return_exceptions=True)
                assert all(isinstance(result, httpx.TimeoutException) for result in results)
            return await hundred(client, upstream)

    assert asyncio.run(main()) == [200] * 100
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("where", ["headers", "body"])
def test_httpxs_async_transport_survives_calls_that_are_cancelled(
    no_leaks: None, upstream: Upstream, where: str
) -> None:
    upstream.script(then={"delay": 0.05} if where == "headers" else {"fault": "drip", "interval": 0.01})
    mesh = mesh_of_inner(ten, upstream, retry=ONCE)

    async def main() -> list[int]:
        async with mesh.async_client("orders") as client:
            for round_ in range(30):
                tasks = [asyncio.create_task(client.get("/")) for _ in range(10)]
                await asyncio.sleep(0.003 * round_)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.sleep(0.1)  # what was abandoned has its answer by then
            return await hundred(client, upstream)

    assert asyncio.run(main()) == [200] * 100
    assert mesh.snapshot()["orders"].in_flight == 0


def test_a_call_cancelled_while_it_waits_for_httpxs_pool_is_never_sent(no_leaks: None, upstream: Upstream) -> None:
    upstream.script({"delay": 0.4})
    mesh = mesh_of_inner(lambda: httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=1)), upstream)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            first = asyncio.create_task(client.get("/first"))
            await asyncio.sleep(0.1)
            waiting = asyncio.create_task(client.post("/cancelled"))
            await asyncio.sleep(0.1)
            waiting.cancel()
            assert (await first).status_code == 200
            await asyncio.sleep(0.3)

    asyncio.run(main())
    assert [request.target for request in upstream.log()] == ["/first"]


def test_httpxs_async_transport_keeps_the_time_on_trio(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"fault": "hang"})
    mesh = mesh_of_inner(httpx.AsyncHTTPTransport, upstream, retry=ONCE)

    async def main() -> list[int]:
        async with mesh.async_client("orders") as client:
            for _ in range(5):
                started = time.monotonic()
                with pytest.raises(httpx.TimeoutException):
                    await client.get("/", extensions={"meshlib": {"timeout": 0.1}})
                assert time.monotonic() - started <= 0.1 + SLACK
            upstream.script()
            return [(await client.get("/")).status_code for _ in range(20)]

    assert anyio.run(main, backend="trio") == [200] * 20
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # nobody can close what belongs to a loop that is over
def test_httpxs_async_transport_over_two_loops(upstream: Upstream) -> None:
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
                responses += await asyncio.gather(*(client.get(f"/{n}") for n in range(50)))
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


@pytest.mark.parametrize(("fault", "more"), [("hang", {}), ("drip", {"size": 10_000, "interval": 0.02})])
def test_C4_aiohttp_ends_at_the_deadline(no_leaks: None, upstream: Upstream, fault: str, more: dict[str, Any]) -> None:
    upstream.script(then={"fault": fault, **more})
    mesh = mesh_of_inner(AiohttpTransport, upstream, timeout=Timeout(total=0.4))

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            for _ in range(3):
                started = time.monotonic()
                with pytest.raises(DeadlineExceeded):
                    await client.get("/")
                assert 0.38 <= time.monotonic() - started <= 0.4 + SLACK
            upstream.script()
            assert (await client.get("/")).status_code == 200
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert mesh.snapshot()["orders"].in_flight == 0


def test_aiohttp_keeps_its_slots(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"fault": "drip", "size": 1000, "interval": 0.02})
    mesh = mesh_of_inner(lambda: AiohttpTransport(limits=httpx.Limits(max_connections=10)), upstream, retry=ONCE)

    async def main() -> list[int]:
        async with mesh.async_client("orders") as client:
            for _ in range(5):
                calls = (client.get("/", extensions={"meshlib": {"timeout": 0.1}}) for _ in range(10))
                results = await asyncio.gather(*calls, return_exceptions=True)
                assert all(isinstance(result, httpx.TimeoutException) for result in results)
            statuses = await hundred(client, upstream)
        await asyncio.sleep(0.05)
        return statuses

    assert asyncio.run(main()) == [200] * 100
    assert mesh.snapshot()["orders"].in_flight == 0
