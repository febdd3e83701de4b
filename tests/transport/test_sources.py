"""Bodies whose source does not come: bounded by the call's deadline (C4), and nobody's fault but the caller's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest

from conftest import Colour
from meshes import mesh_of, outcomes
from meshlib import DeadlineExceeded, Mesh, Service, Timeout, report
from meshlib.testing import Upstream
from meshlib.transport.body import AsyncRecordedBody, SourceFailed
from payloads import BUSY, REJECTION, SHORT, Wrapped, answer_of, arrived, cut, digest, leaving_after_the_head, slowly


@pytest.mark.parametrize(
    ("inner", "timeout", "error", "after"),
    [
        (None, Timeout(total=0.4, attempt=0.1), DeadlineExceeded, 0),
        (None, Timeout(total=0.4, attempt=0.1), DeadlineExceeded, 3),
        (Wrapped, Timeout(total=20, attempt=0.4), httpx.WriteTimeout, 3),
        (httpx.AsyncHTTPTransport, Timeout(total=20, attempt=0.4), httpx.WriteTimeout, 3),
    ],
)
@pytest.mark.parametrize("colour", ["asyncio", "trio"], indirect=True)
def test_C4_a_source_that_stalls_is_bounded(
    colour: Colour, upstream: Upstream, inner: Any, timeout: Timeout, error: type[Exception], after: int
) -> None:
    """By the call's deadline, over an inner transport by the attempt's: and it says nothing of the endpoint."""
    mesh = Mesh(Service("orders", [upstream.address], timeout=timeout), inner=inner and (lambda endpoint: inner()))
    ended = []

    async def stalling() -> AsyncIterator[bytes]:
        try:
            for part in cut(SHORT)[:after]:
                yield part
            await anyio.sleep(60)
        finally:
            ended.append(True)

    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        with pytest.raises(error) as caught:
            await client.put("/", content=stalling())
        assert 0.39 < time.monotonic() - began < 0.4 + BUSY
        assert outcomes(caught.value) == [("first", "abandoned")]
        await anyio.sleep(0.05)  # an attempt of httpx's own transport ends by itself
        assert ended
        await client.get("/next")

    colour.run(mesh, script)
    assert not any(request.complete for request in arrived([upstream], "/"))
    snapshot = mesh.snapshot()["orders"]
    assert (snapshot.nodes[0].failures, snapshot.in_flight) == (0, 0)


@pytest.mark.parametrize("is_too_late", [False, True])
def test_C4_what_the_source_takes_is_not_the_endpoints_time(
    colour: Colour, upstream: Upstream, is_too_late: bool
) -> None:
    """A sync source cannot be interrupted; it ends the call when it comes back."""
    mesh = mesh_of(upstream, timeout=Timeout(total=0.5 if is_too_late else 20, attempt=0.2))
    pause = 0.7 if is_too_late else 0.3

    def sync() -> Iterator[bytes]:
        yield SHORT
        time.sleep(pause if colour.is_sync else 0.0)
        yield SHORT

    async def script(client: httpx.AsyncClient) -> Any:
        return await answer_of(client.put("/", content=sync() if colour.is_sync else slowly(sync(), pause)))

    result = colour.run(mesh, script)
    assert isinstance(result, DeadlineExceeded if is_too_late else httpx.Response)
    assert outcomes(result) == [("first", "abandoned" if is_too_late else "ok")]
    assert is_too_late or report(result).attempts[0].seconds < 0.3
    node = mesh.snapshot()["orders"].nodes[0]
    assert node.failures == 0
    assert node.ewma < 0.3


def test_C4_over_a_sync_inner_transport_a_late_source_ends_the_call(no_leaks: None, upstream: Upstream) -> None:
    """There nothing but the body itself looks at the clock between two chunks."""
    service = Service("orders", [upstream.address], timeout=Timeout(total=0.3))
    mesh = Mesh(service, inner=lambda endpoint: httpx.HTTPTransport())
    pulled = []

    def late() -> Iterator[bytes]:
        for number in range(6):
            pulled.append(number)
            time.sleep(0.2)
            yield SHORT

    with mesh.client("orders") as client, pytest.raises(DeadlineExceeded) as caught:
        client.put("/", content=late())
    assert len(pulled) <= 2
    assert outcomes(caught.value) == [("first", "abandoned")]


def test_C3_an_older_sending_gets_nothing_once_there_is_a_newer_one() -> None:
    """An attempt of an inner transport that was left alone may go on pulling; no chunk is lost to it."""

    async def main() -> None:
        request = httpx.Request("PUT", "http://orders/", content=slowly([b"a", b"b"]))
        assert isinstance(request.stream, httpx.AsyncByteStream)
        body = AsyncRecordedBody(request.stream, 10, time.monotonic, time.monotonic() + 20)
        older = aiter(body)
        assert await anext(older) == b"a"
        newer = aiter(body)
        with pytest.raises(SourceFailed):
            await anext(older)
        assert [chunk async for chunk in newer] == [b"a", b"b"]

    asyncio.run(main())


def test_C4_a_source_that_stalls_after_an_answer_leaves_that_answer(no_leaks: None) -> None:
    async def stalling() -> AsyncIterator[bytes]:
        yield SHORT
        await anyio.sleep(0.2)
        yield SHORT
        await anyio.sleep(60)

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.put("/", content=stalling())

    with leaving_after_the_head(answer=REJECTION) as address:
        mesh = mesh_of(address, timeout=Timeout(total=0.6))
        response = Colour("asyncio").run(mesh, script)
    assert (response.status_code, response.content) == (503, b"busy")
    assert outcomes(response) == [("first", "rejected"), ("retry", "abandoned")]


@pytest.mark.parametrize("inner", [httpx.AsyncHTTPTransport, Wrapped])
def test_C3_over_an_inner_transport_a_slow_body_is_repeated_whole_or_not_at_all(
    fleet: list[Upstream], inner: Callable[[], httpx.AsyncBaseTransport]
) -> None:
    """The attempt runs out while the caller is making the body; whoever goes on pulling at it, no cut one arrives."""
    service = Service("orders", [each.address for each in fleet], timeout=Timeout(total=20, attempt=0.33))
    mesh = Mesh(service, inner=lambda endpoint: inner())

    async def script(client: httpx.AsyncClient) -> None:
        await answer_of(client.put("/", content=slowly(cut(SHORT, 500), 0.06)))
        await anyio.sleep(0.1)  # an attempt of httpx's own transport ends by itself

    Colour("asyncio").run(mesh, script)
    assert {request.body_digest for request in arrived(fleet, "/") if request.complete} <= {digest(SHORT)}
