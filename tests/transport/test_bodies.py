"""Request bodies on real sockets: what is sent again is sent whole (C3), and answers between two attempts (C5).

What a server got is compared by digest and length: a client that sends an empty or a cut body does not notice it by
itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpcore
import httpx
import pytest

from conftest import Colour
from meshes import mesh_of, outcomes, refusing
from meshlib import Retry, RoundRobin, Timeout, options
from meshlib.testing import Upstream, upstreams
from meshlib.testing.upstream import Request
from payloads import (
    LONG,
    REJECTION,
    SHORT,
    answer_of,
    arrived,
    at_once,
    cut,
    digest,
    leaving_after_the_head,
    pattern,
    slowly,
    source,
    unexhausted,
)
from waiting import until

pytestmark = pytest.mark.usefixtures("collected")

LIMIT = 65536
"""`Retry.buffer_body`."""

BOUNDARY = {"content-type": "multipart/form-data; boundary=fence"}
REPLAYABLE = {"meshlib": {"replayable": True}}


@pytest.fixture(scope="module")
def started() -> Iterator[list[Upstream]]:
    with upstreams(3) as started:
        for upstream in started:
            upstream.clear()  # opens the connection for control, which is no test's leak
        yield started


@pytest.fixture
def fleet(started: list[Upstream]) -> list[Upstream]:
    """Three upstreams without a script and a log; nothing of an earlier test is on its way to them."""
    for upstream in started:
        try:
            until(lambda: upstream.stats()["connections_open"] == 0, 0.4)  # noqa: B023
        except AssertionError:
            upstream.restart()
        upstream.script()
        upstream.clear()
    return started


class AsyncParts:
    """An async body that is no generator."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in cut(SHORT):
            yield part


def check_whole(request: Request, whole: bytes) -> None:
    """It arrived as it was, and the headers say of it what it was."""
    assert (request.complete, request.body_length, request.body_digest) == (True, len(whole), digest(whole))
    lengths, codings = request.values("content-length"), request.values("transfer-encoding")
    assert (codings, lengths) in [(["chunked"], []), ([], [str(len(whole))]), ([], [] if not whole else None)]


# The replay table


@dataclass(frozen=True)
class Kind:
    """One kind of body.

    Attributes:
        make: the arguments of a request, made anew for every request, given a directory to put files into.
        is_resent: whether it is sent again after it went once.
        colours: whose clients take it.
    """

    make: Callable[[Path], dict[str, Any]]
    is_resent: bool = True
    colours: str = "sync asyncio trio"


def opened(directory: Path, size: int, at: int = 0) -> Any:
    path = directory / f"{size}"
    path.write_bytes(pattern(size))
    file = path.open("rb")
    file.seek(at)
    return file


def content(make: Callable[[], Any], colours: str = "sync asyncio trio", *, resent: bool = True, **more: Any) -> Kind:
    return Kind(lambda directory: {"content": make(), **more}, resent, colours)


def multipart(make: Callable[[Path], Any], *, resent: bool = True, **more: Any) -> Kind:
    return Kind(
        lambda directory: {"files": {"f": ("n", make(directory))}, "data": {"a": "b"}, "headers": BOUNDARY, **more},
        resent,
    )


def file(size: int, *, resent: bool = True, **more: Any) -> Kind:
    return Kind(lambda directory: {"content": opened(directory, size), **more}, resent, "sync")


def pulled(name: str, parts: list[bytes], *, resent: bool = True, **more: Any) -> dict[str, Kind]:
    """A generator for the sync client, and one for the others."""
    return {
        f"{name} generator": content(lambda: at_once(parts), "sync", resent=resent, **more),
        f"{name} async generator": content(lambda: slowly(parts), "asyncio trio", resent=resent, **more),
    }


KINDS: dict[str, Kind] = {
    "none": Kind(lambda directory: {}),
    "bytes": content(lambda: SHORT),
    "long bytes": content(lambda: pattern(3_000_000)),
    "str": content(lambda: "Grüße, 世界 " * 50, "sync"),
    "json": Kind(lambda directory: {"json": {"numbers": list(range(100)), "text": "Grüße"}}, colours="asyncio"),
    "form": Kind(lambda directory: {"data": {"a": "b", "many": ["1", "2"], "text": "Grüße &="}}),
    "multipart of bytes": multipart(lambda directory: SHORT),
    "multipart of a BytesIO": multipart(lambda directory: io.BytesIO(SHORT)),
    "multipart of a file that was read": multipart(lambda directory: opened(directory, 5_000, at=3_000)),
    "multipart of a long file": multipart(lambda directory: opened(directory, 200_000), resent=False),
    "replayable multipart": multipart(lambda directory: opened(directory, 200_000), extensions=REPLAYABLE),
    "BytesIO": content(lambda: io.BytesIO(SHORT), "sync"),
    "long BytesIO": content(lambda: io.BytesIO(LONG), "sync", resent=False),
    "file": file(5_000),
    "file at the limit": file(LIMIT),
    "file over the limit": file(LIMIT + 1, resent=False),
    "replayable file": file(200_000, extensions=REPLAYABLE),
    "list": content(lambda: cut(SHORT), "sync"),
    "async iterable": content(lambda: AsyncParts(), "asyncio trio"),
    **pulled("short", cut(SHORT)),
    **pulled("long", cut(LONG), resent=False),
    **pulled("replayable", cut(LONG), extensions=REPLAYABLE),
    **pulled("hollow", [b"", b"a", b"", b"b" * 3000, b""]),
    **pulled("measured", cut(SHORT), headers={"content-length": "5000"}),
}


@pytest.fixture
def bodies(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """Makes the arguments of a request with a body of the kind, as often as it is called."""
    kind = KINDS[request.param]
    with contextlib.ExitStack() as files:

        def make() -> dict[str, Any]:
            arguments = kind.make(tmp_path)
            given = arguments["files"]["f"][1] if "files" in arguments else arguments.get("content")
            if isinstance(given, io.IOBase):
                files.enter_context(given)
            return arguments

        yield make


every_kind = pytest.mark.parametrize(
    ("colour", "bodies"),
    [
        pytest.param(colour, name, id=f"{name}-{colour}")
        for name, kind in KINDS.items()
        for colour in kind.colours.split()
    ],
    indirect=True,
)


def whole_of(arguments: dict[str, Any]) -> bytes:
    """The body by httpx's own reading."""
    request = httpx.Request("POST", "http://reference/", **arguments)
    return request.read() if isinstance(request.stream, httpx.SyncByteStream) else asyncio.run(request.aread())


@every_kind
def test_C3_a_body_fails_over_whole_from_an_endpoint_that_refuses(
    colour: Colour, bodies: Callable[[], dict[str, Any]], fleet: list[Upstream]
) -> None:
    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post(f"/{number}", **bodies()) for number in range(2)]

    with refusing() as dead:
        responses = colour.run(mesh_of(dead, fleet[0], balancer=RoundRobin()), script)
    assert [("first", "not_sent"), ("failover", "ok")] in map(outcomes, responses)
    for number in range(2):
        [request] = arrived(fleet, f"/{number}")
        check_whole(request, whole_of(bodies()))


@pytest.mark.parametrize("step", [{"fault": "reset"}, {"status": 503}], ids=["reset", "503"])
@every_kind
def test_C3_a_body_is_repeated_whole_or_not_at_all(
    colour: Colour,
    bodies: Callable[[], dict[str, Any]],
    fleet: list[Upstream],
    step: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    kind = KINDS[request.node.callspec.params["bodies"]]
    fleet[0].script(then=step)

    async def script(client: httpx.AsyncClient) -> list[Any]:
        return [await answer_of(client.put(f"/{number}", **bodies())) for number in range(2)]

    results = colour.run(mesh_of(*fleet[:2], balancer=RoundRobin()), script)
    bad = next(number for number, result in enumerate(results) if outcomes(result)[0][1] != "ok")
    requests = arrived(fleet, f"/{bad}")
    for each in [*requests, *arrived(fleet, f"/{1 - bad}")]:
        check_whole(each, whole_of(bodies()))
    assert [name for name, _ in outcomes(results[bad])] == (["first", "retry"] if kind.is_resent else ["first"])
    assert len(requests) == (2 if kind.is_resent else 1)
    if kind.is_resent or "status" in step:
        assert results[bad].status_code == (200 if kind.is_resent else 503)


@pytest.mark.parametrize(("limit", "is_marked", "times"), [(4_999, False, 1), (5_000, False, 2), (0, True, 2)])
def test_C3_the_limit_is_a_setting_and_may_be_lifted(
    colour: Colour, fleet: list[Upstream], limit: int, is_marked: bool, times: int
) -> None:
    fleet[0].script({"status": 503})

    async def script(client: httpx.AsyncClient) -> None:
        with options(replayable=is_marked):
            await client.put("/", content=source(colour, cut(SHORT)))

    colour.run(mesh_of(fleet[0], retry=Retry(buffer_body=limit)), script)
    assert [request.body_digest for request in fleet[0].log()] == [digest(SHORT)] * times


def test_C3_a_generator_is_pulled_once_however_often_it_is_sent(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script({"status": 503}, {"fault": "reset"})
    count = 0

    def counted() -> Iterator[bytes]:
        nonlocal count
        for part in cut(SHORT):
            count += 1
            yield part

    async def script(client: httpx.AsyncClient) -> None:
        await client.put("/", content=source(colour, counted()))

    colour.run(mesh_of(fleet[0], retry=Retry(max_attempts=4)), script)
    assert count == len(cut(SHORT))
    assert len(fleet[0].log()) >= 3
    assert {request.body_digest for request in fleet[0].log()} == {digest(SHORT)}


@unexhausted
@pytest.mark.parametrize("how", ["goes", "hangs", "rejects bytes"])
def test_C3_a_body_that_broke_off_is_repeated_from_its_first_byte(
    colour: Colour, fleet: list[Upstream], how: str
) -> None:
    """The first endpoint goes away, or says no, while the body is on its way."""
    whole = pattern(5_000_000) if how == "rejects bytes" else pattern(60_000)
    parts = cut(whole, 5_000)
    pause = 0.02 if colour.is_sync else 0.0

    def sync() -> Iterator[bytes]:
        for part in parts:
            time.sleep(pause)
            yield part

    async def script(client: httpx.AsyncClient) -> list[Any]:
        results = []
        for number in range(2):
            body = whole if how == "rejects bytes" else sync() if colour.is_sync else slowly(sync(), 0.02)
            results.append(await answer_of(client.put(f"/{number}", content=body)))
        return results

    with leaving_after_the_head(hangs=how == "hangs", answer=REJECTION if "rejects" in how else b"") as address:
        settings = {"timeout": Timeout(total=20, attempt=0.3)} if how == "hangs" else {}
        results = colour.run(mesh_of(address, fleet[0], balancer=RoundRobin(), **settings), script)
    assert [getattr(result, "status_code", result) for result in results] == [200, 200]
    assert 2 in [len(outcomes(result)) for result in results]
    for number in range(2):
        [request] = arrived(fleet, f"/{number}")
        check_whole(request, whole)


def test_C6_an_early_answer_ends_well_when_the_rest_has_gone_after_it(colour: Colour) -> None:
    """The peer answers and says goodbye, and reads on; by the time we close, its end and ours are through."""

    async def script(client: httpx.AsyncClient) -> None:
        for how in ("read", "close"):
            request = client.build_request("POST", "/", content=pattern(5_000_000))
            response: Any = await client.send(await request if colour.is_sync else request, stream=True)
            assert response.status_code == 200
            await anyio.sleep(0.15)
            if how == "read":
                assert (response.read() if colour.is_sync else await response.aread()) == b"busy"
            else:
                _ = response.close() if colour.is_sync else await response.aclose()

    with leaving_after_the_head(answer=REJECTION.replace(b"503 Busy", b"200 OK")) as address:
        mesh = mesh_of(address)
        colour.run(mesh, script)
    assert (mesh.snapshot()["orders"].in_flight, mesh.snapshot()["orders"].nodes[0].failures) == (0, 0)


# Requests that httpx sends on: redirects and auth flows


@pytest.mark.parametrize("name", ["bytes", "form", "multipart of a BytesIO", "generator", "read"])
def test_C3_a_redirect_carries_the_whole_body_or_is_an_error(
    colour: Colour, fleet: list[Upstream], tmp_path: Path, name: str
) -> None:
    """What httpx itself cannot send a second time stays an error of its own: nobody gets an empty or a cut one."""
    fleet[0].script({"status": 503}, {"status": 307, "headers": {"location": "/on"}}, {"status": 503})
    is_possible = name not in ("generator", "read")
    whole = whole_of(KINDS[name].make(tmp_path)) if is_possible else SHORT
    arguments = KINDS[name].make(tmp_path) if is_possible else {"content": source(colour, [SHORT])}
    if name == "read" and colour.is_sync:
        arguments = {"content": io.BytesIO(SHORT)}

    async def script(client: httpx.AsyncClient) -> None:
        said = "already been streamed|Too little data for declared Content-Length"
        with contextlib.nullcontext() if is_possible else pytest.raises(Exception, match=said):
            await client.put("/", follow_redirects=True, **arguments)

    colour.run(mesh_of(fleet[0]), script)
    requests = [request for request in fleet[0].log() if request.complete]
    for request in requests:
        check_whole(request, whole)
    assert [request.target for request in requests] == ["/", "/", *(["/on", "/on"] if is_possible else [])]


class Signed(httpx.Auth):
    """Signs the body, and signs it again when it is asked to."""

    requires_request_body = True

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        request.headers["x-signature"] = digest(request.content)
        response = yield request
        if response.status_code == 401:
            request.headers["x-again"] = "1"
            yield request


def test_C3_an_auth_flow_that_reads_the_body_sends_it_whole_each_time(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script({"status": 401}, {"fault": "reset"}, {"status": 503})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.put("/", content=source(colour, cut(LONG)), auth=Signed())

    assert colour.run(mesh_of(fleet[0], retry=Retry(max_attempts=4)), script).status_code == 200
    assert len(fleet[0].log()) >= 4
    for request in fleet[0].log():
        assert request.body_digest == digest(LONG) == request.values("x-signature")[0]


# Bodies that break by themselves


class Stop(BaseException):
    """The application's, and not to be caught."""


BROKEN: dict[str, Callable[[], BaseException]] = {
    "ConnectionResetError": lambda: ConnectionResetError("mine"),
    "TimeoutError": lambda: TimeoutError("mine"),
    "httpx": lambda: httpx.ReadError("mine"),
    "httpcore write": lambda: httpcore.WriteError("mine"),
    "httpcore timeout": lambda: httpcore.WriteTimeout("mine"),
    "BaseException": lambda: Stop("mine"),
}


@unexhausted
@pytest.mark.parametrize("what", BROKEN)
def test_C3_a_body_that_raises_is_the_callers_and_goes_no_further(
    colour: Colour, fleet: list[Upstream], what: str
) -> None:
    error = BROKEN[what]()
    mesh = mesh_of(fleet[0], timeout=Timeout(total=20, attempt=20))
    began = time.monotonic()

    def sync(after: int) -> Iterator[bytes]:
        yield from [bytes(1000)] * after
        raise error

    async def script(client: httpx.AsyncClient) -> None:
        for after in (0, 3):
            with pytest.raises(type(error)) as caught:
                await client.put("/", content=source(colour, sync(after)))
            assert caught.value is error
            await anyio.lowlevel.checkpoint()
            until(lambda: fleet[0].stats()["connections_open"] == 0)  # while the client is open

    colour.run(mesh, script)
    assert time.monotonic() - began < 10  # nobody waits for an answer to half a request
    assert {request.complete for request in arrived(fleet, "/")} <= {False}
    snapshot = mesh.snapshot()["orders"]
    assert (snapshot.nodes[0].failures, snapshot.in_flight, snapshot.budget_tokens) == (0, 0, 500)


@unexhausted
@pytest.mark.parametrize("length", ["4999", "5001"])
def test_C3_a_body_shorter_or_longer_than_it_said_goes_no_further(
    colour: Colour, fleet: list[Upstream], length: str
) -> None:
    """As a file is from whose middle httpx reads on: it announces the whole file's length."""
    mesh = mesh_of(fleet[0])

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(Exception, match="for declared Content-Length") as caught:
            await client.put("/", content=source(colour, cut(SHORT)), headers={"content-length": length})
        assert outcomes(caught.value) == [("first", "abandoned")]

    colour.run(mesh, script)
    assert not any(request.complete for request in arrived(fleet, "/"))
    assert mesh.snapshot()["orders"].nodes[0].failures == 0


@pytest.mark.parametrize("length", [3, 10])
@pytest.mark.parametrize("kind", ["bytes", "stream"])
def test_a_body_that_is_not_as_long_as_it_says_is_the_callers_fault(
    colour: Colour, upstream: Upstream, length: int, kind: str
) -> None:
    def sync() -> Iterator[bytes]:
        yield b"12345"

    async def later() -> AsyncIterator[bytes]:
        yield b"12345"

    mesh = mesh_of(upstream)

    async def script(client: httpx.AsyncClient) -> None:
        content: Any = b"12345" if kind == "bytes" else sync() if colour.is_sync else later()
        with pytest.raises(httpx.LocalProtocolError, match="declared Content-Length") as caught:
            await client.put("/", content=content, headers={"content-length": str(length)})
        assert outcomes(caught.value) == [("first", "abandoned")]
        assert (await client.get("/")).status_code == 200

    colour.run(mesh, script)
    node = mesh.snapshot()["orders"].nodes[0]
    assert (node.failures, node.in_flight) == (0, 0)
