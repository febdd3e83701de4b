"""What a peer may send, right or wrong: clear errors, bounded reads, and the right end for every connection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import socket
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import pytest

from conftest import Colour
from meshes import mesh_of, outcomes
from meshlib import Breaker, DeadlineExceeded, Mesh, Retry, RoundRobin, Timeout, report
from meshlib.testing import Upstream, upstreams
from meshlib.testing.upstream import generated
from meshlib.transport import network, network_anyio, network_asyncio
from payloads import unexhausted
from waiting import until

pytestmark = pytest.mark.usefixtures("collected")

MIB = 1 << 20
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 %d Status\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def started() -> Iterator[list[Upstream]]:
    with upstreams(2) as started:
        for upstream in started:
            upstream.clear()  # opens the connection for control, which is no test's leak
        yield started


@pytest.fixture
def pair(started: list[Upstream]) -> list[Upstream]:
    """A bad upstream and a good one; nothing of an earlier test is on its way to them."""
    for upstream in started:
        upstream.accept_reset(False)
        try:
            until(lambda: all(upstream.stats()["connections_open"] == 0 for _ in range(3)), 0.4)  # noqa: B023
        except AssertionError:
            upstream.restart()
        upstream.script()
        upstream.clear()
    return started


@dataclass
class Raw:
    """A server that says bytes.

    Attributes:
        address: where it listens.
        connections: for every request, in order, the number of the connection it came on.
        closed: how many connections the client has closed.
    """

    address: str
    connections: list[int] = field(default_factory=list)
    closed: int = 0


@contextlib.contextmanager
def saying(*answers: bytes, closes: bool = False) -> Iterator[Raw]:
    """A server that answers each request with the next of `answers`, and then with the last, whatever was asked.

    Args:
        answers: raw bytes.
        closes: whether it closes the connection after each.
    """
    threads: list[threading.Thread] = []
    open_now: set[socket.socket] = set()

    def serve(connection: socket.socket, number: int) -> None:
        with connection:
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    try:
                        piece = connection.recv(65536)
                    except OSError:
                        piece = b""
                    if not piece:
                        raw.closed += 1
                        open_now.discard(connection)
                        return
                    data += piece
                data = data.partition(b"\r\n\r\n")[2]
                answer = answers[min(len(raw.connections), len(answers) - 1)]
                raw.connections.append(number)
                try:
                    connection.sendall(answer)
                except OSError:
                    continue  # the next read tells
                if closes:
                    open_now.discard(connection)
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            open_now.add(connection)
            thread = threading.Thread(target=serve, args=[connection, len(threads)])
            threads.append(thread)
            thread.start()

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        raw = Raw(f"127.0.0.1:{listening.getsockname()[1]}")
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield raw
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for connection in list(open_now):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


async def unread(colour: Colour, client: Any, url: str = "/", **more: Any) -> Any:
    """A response whose body is still to come."""
    request = client.build_request("GET", url, **more)
    return await client.send(await request if colour.is_sync else request, stream=True)


async def pieces(response: Any, how: str = "iter_raw") -> AsyncIterator[bytes]:
    """The body in pieces, in every colour."""
    if isinstance(response.stream, httpx.SyncByteStream):
        for piece in getattr(response, how)():
            yield piece
    else:
        async for piece in getattr(response, f"a{how}")():
            yield piece


def once(*places: Upstream | str, **more: Any) -> Mesh:
    """A mesh that tries once."""
    return mesh_of(*places, retry=Retry(max_attempts=1), timeout=Timeout(total=20), **more)


@contextlib.contextmanager
def memory(at_most: int) -> Iterator[None]:
    """Python holds no more than so many bytes at any time in between."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < at_most, f"{peak:,} bytes"


# The faults of the scripted upstream

BEFORE_THE_HEADERS: dict[str, tuple[type[httpx.TransportError], str]] = {
    "garbage": (httpx.RemoteProtocolError, "illegal status line"),
    "half_status": (httpx.RemoteProtocolError, "without sending a response|closed"),
    "close": (httpx.RemoteProtocolError, "without sending a response"),
    "reset": (httpx.ReadError, "reset"),
}

AFTER_THE_HEADERS: dict[str, tuple[type[httpx.TransportError], str]] = {
    "cut": (httpx.RemoteProtocolError, "without sending complete message body"),
    "cut_reset": (httpx.ReadError, "reset"),
}


@pytest.mark.parametrize("fault", BEFORE_THE_HEADERS | AFTER_THE_HEADERS)
def test_a_fault_is_a_clear_httpx_error_and_blames_the_endpoint(
    colour: Colour, pair: list[Upstream], fault: str
) -> None:
    error, said = (BEFORE_THE_HEADERS | AFTER_THE_HEADERS)[fault]
    pair[0].script({"fault": fault})
    mesh = once(pair[0])

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(error, match=said) as caught:
            await client.get("/x")
        assert type(caught.value) is error
        assert str(caught.value.request.url) == "http://orders/x"
        assert outcomes(caught.value) == [("first", "failed")]
        assert error.__name__ in str(report(caught.value))
        assert any("first at 127.0.0.1" in note for note in caught.value.__notes__)
        node = mesh.snapshot()["orders"].nodes[0]
        assert (node.failures, node.in_flight) == (1, 0)
        assert (await client.get("/")).status_code == 200

    colour.run(mesh, script)
    assert len({request.connection for request in pair[0].log()}) == 2


def test_a_connection_that_is_reset_at_once_is_a_clear_httpx_error(colour: Colour, pair: list[Upstream]) -> None:
    pair[0].accept_reset()
    mesh = once(pair[0])

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises((httpx.ReadError, httpx.WriteError, httpx.ConnectError, httpx.RemoteProtocolError)):
            await client.get("/")

    colour.run(mesh, script)
    node = mesh.snapshot()["orders"].nodes[0]
    assert (node.failures, node.in_flight) == (1, 0)


@pytest.mark.parametrize("fault", [*BEFORE_THE_HEADERS, "accept_reset"])
def test_a_get_is_retried_elsewhere_and_the_breaker_opens_after_five(
    colour: Colour, pair: list[Upstream], fault: str
) -> None:
    if fault == "accept_reset":
        pair[0].accept_reset()
    else:
        pair[0].script(then={"fault": fault})
    mesh = mesh_of(*pair, balancer=RoundRobin(), breaker=Breaker(open_for=60.0))

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(12)]

    responses = colour.run(mesh, script)
    assert {response.headers["x-upstream"] for response in responses} == {"b"}
    bad, good = mesh.snapshot()["orders"].nodes
    assert (bad.state, bad.failures, bad.attempts) == ("open", 5, 5)
    assert (good.state, good.failures) == ("closed", 0)


def test_headers_of_128_KiB_are_refused_or_read(colour: Colour, pair: list[Upstream]) -> None:
    """h11 gives up at 100 KiB without an end, so it depends on how they arrive."""
    pair[0].script(then={"fault": "big_headers"})
    mesh = mesh_of(*pair, balancer=_First(), breaker=Breaker(open_for=60.0))

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(6)]

    with memory(4 * MIB):
        responses = colour.run(mesh, script)
    refused = [response for response in responses if response.headers["x-upstream"] == "b"]
    assert {outcomes(response)[0] for response in refused} <= {("first", "failed"), ("first", "ok")}
    assert all(len(response.headers["x-big-31"]) == 4096 for response in responses if response not in refused)
    assert mesh.snapshot()["orders"].nodes[0].failures == sum(len(outcomes(response)) - 1 for response in responses)


@pytest.mark.parametrize("fault", BEFORE_THE_HEADERS)
def test_C1_a_post_is_not_retried_after_rubbish(colour: Colour, pair: list[Upstream], fault: str) -> None:
    for upstream in pair:
        upstream.script(then={"fault": fault})

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(BEFORE_THE_HEADERS[fault][0]):
            await client.post("/", content=b"x")

    colour.run(mesh_of(*pair), script)
    assert sum(len(upstream.log()) for upstream in pair) == 1


@pytest.mark.parametrize("fault", ["garbage", "half_status", "close", "reset"])
def test_C8_only_a_connection_that_died_in_silence_is_forgiven(
    colour: Colour, pair: list[Upstream], fault: str
) -> None:
    """On a kept connection, a peer that has said something is alive, and to blame for what it said."""
    pair[0].script({}, {"fault": fault})
    mesh = mesh_of(pair[0])

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        await client.get("/")
        return await client.get("/")

    response = colour.run(mesh, script)
    kind = "transparent" if fault in ("close", "reset") else "retry"
    assert outcomes(response) == [("first", "failed"), (kind, "ok")]
    assert mesh.snapshot()["orders"].nodes[0].failures == (0 if kind == "transparent" else 1)


# What a raw server may say

MALFORMED: dict[str, bytes] = {
    "nothing like it": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "HTTP/0.9": b"<html>hello</html>\r\n\r\n",
    "HTTP/2": b"HTTP/2 200\r\ncontent-length: 0\r\n\r\n",
    "an HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no number": b"HTTP/1.1 OK\r\n\r\n",
    "four digits": b"HTTP/1.1 2000 OK\r\ncontent-length: 0\r\n\r\n",
    "a request": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "no colon": b"HTTP/1.1 200 OK\r\ncontent-length 0\r\n\r\n",
    "a nameless header": b"HTTP/1.1 200 OK\r\n: x\r\ncontent-length: 0\r\n\r\n",
    "a space before the colon": b"HTTP/1.1 200 OK\r\ncontent-length : 0\r\n\r\n",
    "a zero byte": b"HTTP/1.1 200 OK\r\nx-a: \x00\r\ncontent-length: 0\r\n\r\n",
    "a length that is no number": b"HTTP/1.1 200 OK\r\ncontent-length: ten\r\n\r\n",
    "a negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nokk",
    "an unknown coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: rot13\r\n\r\n",
    "two codings": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "headers without an end": b"HTTP/1.1 200 OK\r\n" + b"x-a: bbbbbbbbbbbbbbbb\r\n" * 100_000,
    "a header without an end": b"HTTP/1.1 200 OK\r\nx-a: " + b"b" * 4_000_000,
    "a status line without an end": b"HTTP/1.1 200 " + b"b" * 4_000_000,
    "only 1xx": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n",
}


@pytest.mark.parametrize("answer", MALFORMED)
def test_a_malformed_answer_is_the_endpoints_fault_and_retried(
    colour: Colour, pair: list[Upstream], answer: str
) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            await client.post("/")
        assert outcomes(caught.value) == [("first", "failed")]
        assert len(str(caught.value)) < 1000
        pair[0].script()
        assert (await client.get("/")).status_code == 200

    with saying(MALFORMED[answer], closes=True) as raw, memory(8 * MIB):
        mesh = mesh_of(raw.address, pair[1], balancer=_First(), timeout=Timeout(total=20))
        colour.run(mesh, script)
        assert raw.connections[:2] == [0, 1]
    bad, good = mesh.snapshot()["orders"].nodes
    assert (bad.failures, good.failures) == (2, 0)


class _First:
    """A balancer that keeps the order of the list."""

    def prepare(self, nodes: Any, rng: Any) -> Any:
        return lambda now, key: iter(nodes)


MALFORMED_BODIES: dict[str, bytes] = {
    "no size": CHUNKED % 200 + b"hello\r\n",
    "a negative size": CHUNKED % 200 + b"-1\r\nx\r\n",
    "a chunk that is longer": CHUNKED % 200 + b"1\r\nxxxx\r\n0\r\n\r\n",
    "a size without an end": CHUNKED % 200 + b"1" * 4_000_000,
    "an extension without an end": CHUNKED % 200 + b"1;" + b"e" * 4_000_000,
    "trailers without an end": CHUNKED % 200 + b"0\r\n" + b"x-a: bbbbbbbbbbbbbbbb\r\n" * 100_000,
    "chunks that are cut": CHUNKED % 200 + b"5\r\nhello\r\n",
    "a size too big for all": CHUNKED % 200 + b"F" * 40 + b"\r\n",
}


@pytest.mark.parametrize("body", MALFORMED_BODIES)
def test_a_malformed_body_is_the_endpoints_fault_and_told_to_the_caller(colour: Colour, body: str) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            await client.get("/")
        assert outcomes(caught.value) == [("first", "failed")]

    with saying(MALFORMED_BODIES[body], closes=True) as raw, memory(8 * MIB):
        mesh = mesh_of(raw.address, timeout=Timeout(total=20))
        colour.run(mesh, script)
    node = mesh.snapshot()["orders"].nodes[0]
    assert (node.failures, node.in_flight) == (1, 0)
    assert len(raw.connections) == 1  # what a caller may have seen is not asked for again


@pytest.mark.parametrize(
    "extra", [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong", b"rubbish", b"\r\n"], ids=["answer", "junk", "crlf"]
)
@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_what_comes_after_an_answer_is_no_answer_to_the_next_request(
    colour: Colour, extra: bytes, pause: float
) -> None:
    async def script(client: httpx.AsyncClient) -> list[str]:
        texts = []
        for _ in range(3):
            texts.append((await client.get("/")).text)
            await anyio.sleep(pause)
        return texts

    with saying(OK + extra, OK) as raw:
        mesh = mesh_of(raw.address)
        texts = colour.run(mesh, script)
    assert texts == ["ok"] * 3
    assert len(raw.connections) == 3, "a request was repeated for what its predecessor left"


# What is right, though odd


def _answers(*answers: bytes, **more: Any) -> Callable[[Colour], tuple[list[httpx.Response], list[int]]]:
    def run(colour: Colour, method: str = "GET") -> tuple[list[httpx.Response], list[int]]:
        async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
            return [await client.request(method, "/") for _ in range(3)]

        with saying(*answers, **more) as raw:
            mesh = once(raw.address)
            responses = colour.run(mesh, script)
            until(lambda: raw.closed + len(raw.connections) * bool(more.get("closes")) >= 1)
        assert mesh.snapshot()["orders"].in_flight == 0
        assert mesh.snapshot()["orders"].nodes[0].failures == 0
        return responses, raw.connections

    return run


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"],
    ids=["1.0", "1.1", "close"],
)
def test_a_body_without_a_length_ends_with_the_connection(colour: Colour, head: bytes) -> None:
    responses, connections = _answers(head + generated(100_000), closes=True)(colour)
    assert [response.content for response in responses] == [generated(100_000)] * 3
    assert connections == [0, 1, 2]


def test_an_answer_of_http_1_0_closes_its_connection(colour: Colour) -> None:
    responses, connections = _answers(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok")(colour)
    assert [response.text for response in responses] == ["ok"] * 3
    assert connections == [0, 1, 2]


def test_connection_close_closes_it(colour: Colour) -> None:
    answer = b"HTTP/1.1 200 OK\r\nConnection: Close\r\ncontent-length: 2\r\n\r\nok"
    responses, connections = _answers(answer)(colour)
    assert [response.text for response in responses] == ["ok"] * 3
    assert connections == [0, 1, 2]


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 1000\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 404 Not Found\r\ncontent-length: 9\r\n\r\n"),
        ("GET", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("GET", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ],
)
def test_an_answer_without_a_body_keeps_its_connection(colour: Colour, method: str, answer: bytes) -> None:
    responses, connections = _answers(answer)(colour, method)
    assert [response.content for response in responses] == [b""] * 3
    assert [response.status_code for response in responses] == [int(answer[9:12])] * 3
    assert connections == [0, 0, 0]


@pytest.mark.parametrize(
    "informational",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n" * 20,
        b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 199 Whatever\r\n\r\n",
    ],
)
def test_what_is_said_before_an_answer_is_not_the_answer(colour: Colour, informational: bytes) -> None:
    responses, connections = _answers(informational + OK)(colour)
    assert [(response.status_code, response.text) for response in responses] == [(200, "ok")] * 3
    assert connections == [0, 0, 0]


def test_a_protocol_nobody_asked_for_is_not_switched_to(colour: Colour) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")

    with saying(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n") as raw:
        mesh = once(raw.address)
        colour.run(mesh, script)
    assert mesh.snapshot()["orders"].nodes[0].failures == 1


def test_chunks_with_extensions_and_trailers_are_read(colour: Colour) -> None:
    answer = CHUNKED % 200 + b"5;a=b\r\nhello\r\n1\r\n!\r\n0\r\nx-sum: 1\r\n\r\n"
    responses, connections = _answers(answer)(colour)
    assert [response.text for response in responses] == ["hello!"] * 3
    assert connections == [0, 0, 0]


def test_headers_are_kept_as_they_came(colour: Colour) -> None:
    answer = b"HTTP/1.1 200 Fine\r\nX-Dup: 1\r\nx-dup: 2\r\nx-latin: \xe9\r\ncontent-length: 0\r\n\r\n"
    [response, *_], _ = _answers(answer)(colour)
    assert response.headers.get_list("x-dup") == ["1", "2"]
    assert response.headers["x-latin"] == "é"
    assert response.reason_phrase == "Fine"
    assert response.http_version == "HTTP/1.1"
    assert (b"X-Dup", b"1") in response.headers.raw


def test_an_unread_body_closes_its_connection_and_an_empty_one_need_not(colour: Colour, pair: list[Upstream]) -> None:
    pair[0].script({"size": 5_000_000}, {})
    mesh = once(pair[0])

    async def script(client: httpx.AsyncClient) -> None:
        response = await unread(colour, client)
        _ = response.close() if colour.is_sync else await response.aclose()
        assert mesh.snapshot()["orders"].in_flight == 0
        assert (await client.get("/")).status_code == 200

    colour.run(mesh, script)
    assert len({request.connection for request in pair[0].log()}) == 2


# Much of it


def test_a_million_chunks_of_a_byte_end_by_the_deadline(colour: Colour, pair: list[Upstream]) -> None:
    pair[0].script(then={"fault": "tiny_chunks", "size": 1_000_000})
    mesh = mesh_of(pair[0], timeout=Timeout(total=0.5))

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(DeadlineExceeded):
            await client.get("/")

    with memory(4 * MIB):
        colour.run(mesh, script)
    assert mesh.snapshot()["orders"].in_flight == 0


def test_chunks_of_a_byte_are_read_through_in_little_memory(colour: Colour) -> None:
    count = 20_000
    answer = CHUNKED % 200 + b"1\r\nx\r\n" * count + b"0\r\n\r\n"
    length = 0

    async def script(client: httpx.AsyncClient) -> None:
        nonlocal length
        response = await unread(colour, client)
        async for piece in pieces(response):
            length += len(piece)

    with saying(answer) as raw, memory(4 * MIB):
        colour.run(mesh_of(raw.address, timeout=Timeout(total=600, attempt=600)), script)
    assert length == count


def test_a_long_body_is_read_in_little_memory(colour: Colour, pair: list[Upstream]) -> None:
    pair[0].script(then={"size": 200_000_000})
    length = 0

    async def script(client: httpx.AsyncClient) -> None:
        nonlocal length
        response = await unread(colour, client)
        async for piece in pieces(response):
            length += len(piece)

    with memory(4 * MIB):
        colour.run(mesh_of(pair[0], timeout=Timeout(total=120)), script)
    assert length == 200_000_000


def test_a_peer_that_sends_faster_than_it_is_read_is_held_back(no_leaks: None, pair: list[Upstream]) -> None:
    """An asyncio stream takes what arrives even if nobody asks; there must be an end to that."""
    pair[0].script(then={"size": 200_000_000})

    async def main() -> None:
        async with mesh_of(pair[0], timeout=Timeout(total=60)).async_client("orders") as client:
            response = await client.send(client.build_request("GET", "/"), stream=True)
            body = response.aiter_raw()
            for _ in range(50):
                await anext(body)
                await asyncio.sleep(0.01)
            await response.aclose()

    with memory(4 * MIB):
        asyncio.run(main())


@pytest.mark.parametrize("how", ["iter_raw", "iter_bytes"])
def test_a_gzip_bomb_is_streamed_in_little_memory(colour: Colour, pair: list[Upstream], how: str) -> None:
    size = 400 * MIB
    pair[0].script(then={"fault": "gzip_bomb", "size": size})
    length = 0

    async def script(client: httpx.AsyncClient) -> None:
        nonlocal length
        response = await unread(colour, client)
        async for piece in pieces(response, how):
            length += len(piece)

    # What one read brings, 64 KiB, is decoded at once by httpx, a thousandfold; raw bytes are as they came.
    with memory(4 * MIB if how == "iter_raw" else 256 * MIB):
        colour.run(mesh_of(pair[0], timeout=Timeout(total=60, attempt=60)), script)
    assert length == size if how == "iter_bytes" else length < MIB


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is read from our streams."""
    sizes: list[int] = []

    def sync(stream: type[Any]) -> None:
        read = stream.read

        def counted(self: Any, *args: Any, **kwargs: Any) -> bytes:
            data: bytes = read(self, *args, **kwargs)
            sizes.append(len(data))
            return data

        monkeypatch.setattr(stream, "read", counted)

    def later(stream: type[Any]) -> None:
        read = stream.read

        async def counted(self: Any, *args: Any, **kwargs: Any) -> bytes:
            data: bytes = await read(self, *args, **kwargs)
            sizes.append(len(data))
            return data

        monkeypatch.setattr(stream, "read", counted)

    sync(network.Stream)
    later(network_asyncio.AsyncioStream)
    later(network_anyio.AnyIOStream)
    return sizes


@unexhausted
@pytest.mark.parametrize(
    "step",
    [
        {"size": 100 << 20},
        {"size": 100 << 20, "chunked": True},
        {"fault": "gzip_bomb", "size": 256 * MIB},
        {"fault": "tiny_chunks", "size": 1_000_000},
    ],
    ids=["long", "chunked", "bomb", "tiny_chunks"],
)
def test_C5_what_we_read_ourselves_is_bounded_and_not_decoded(
    colour: Colour, pair: list[Upstream], received: list[int], step: dict[str, Any]
) -> None:
    pair[0].script(then={"status": 503, **step})
    mesh = mesh_of(*pair, balancer=_First(), timeout=Timeout(total=60, attempt=60))

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/")

    with memory(4 * MIB):
        response = colour.run(mesh, script)
    assert outcomes(response) == [("first", "rejected"), ("retry", "ok")]
    # 64 KiB, and the read that is needed to find out that there is more, besides both heads and the good answer; of
    # chunks of a byte, six times as much.
    assert sum(received) < (131_072 if "tiny" not in str(step) else 500_000) + 4096, received


def test_C5_a_small_bomb_is_kept_as_it_came(colour: Colour, pair: list[Upstream]) -> None:
    """It is drained, kept, and decoded only if the caller asks for it."""
    for upstream in pair:
        upstream.script(then={"status": 503, "fault": "gzip_bomb", "size": 50 * MIB})

    async def script(client: httpx.AsyncClient) -> Any:
        request = client.build_request("GET", "/")
        return await client.send(await request if colour.is_sync else request, stream=True)

    async def main(client: httpx.AsyncClient) -> int:
        response = await script(client)
        assert response.status_code == 503
        return sum([len(piece) async for piece in pieces(response)])

    with memory(4 * MIB):
        assert 40_000 < colour.run(mesh_of(*pair), main) < 65_536


@unexhausted
def test_a_body_that_cannot_be_decoded_is_httpx_s_error_and_ends_the_call(colour: Colour, pair: list[Upstream]) -> None:
    broken = gzip.compress(b"hello" * 1000)[:-20] + b"x" * 20
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(broken) + broken

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(2):
            with pytest.raises(httpx.DecodingError):
                await client.get("/")
        assert mesh.snapshot()["orders"].in_flight == 0

    with saying(answer) as raw:
        mesh = once(raw.address)
        colour.run(mesh, script)
    assert mesh.snapshot()["orders"].nodes[0].in_flight == 0
