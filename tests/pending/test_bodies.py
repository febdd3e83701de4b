"""Request bodies on real sockets: what is sent again is sent whole (C3), at most once where it may not be (C1).

And answers' bodies that stand between two attempts (C5). What a server got is compared by digest and length: a client
that sends an empty or a cut body does not notice it by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import io
import itertools
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
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
from meshlib import Breaker, Connections, Endpoint, Mesh, Retry, RoundRobin, Service, Timeout, report
from meshlib.testing import Upstream, upstreams
from meshlib.testing.upstream import Request
from meshlib.testing.upstream_server import FAULTS

LIMIT = 65536
"""`Retry.buffer_body`."""

BUSY = 1.5
"""Seconds that a busy machine may add."""

EMPTY = hashlib.sha256().hexdigest()
BOUNDARY = {"content-type": "multipart/form-data; boundary=fence"}

NEVER_OPENS = Breaker(consecutive=10_000)


unexhausted = pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning")
"""In trio, httpcore leaves generators behind where sending or reading breaks off; one test of their own is for them."""


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
            until(lambda: all(upstream.stats()["connections_open"] == 0 for _ in range(3)), 0.4)  # noqa: B023
        except AssertionError:
            upstream.restart()
        upstream.script()
        upstream.clear()
    return started


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What a test leaves to the garbage collector is found in this test and not in another."""
    yield
    gc.collect()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def pattern(size: int) -> bytes:
    """Bytes of which every cut, gap and repetition shows."""
    return b"".join(b"%07d " % number for number in range(size // 8 + 1))[:size]


def cut(body: bytes, size: int) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


async def slowly(parts: Iterable[bytes], seconds: float = 0.0) -> AsyncIterator[bytes]:
    for part in parts:
        await anyio.sleep(seconds)
        yield part


class AsyncParts:
    """An async body that is no generator."""

    def __init__(self, parts: list[bytes]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part


class AsyncFile:
    """An async body that is read, as those of anyio and aiofiles are."""

    def __init__(self, body: bytes) -> None:
        self._file = io.BytesIO(body)

    async def aread(self, size: int) -> bytes:
        return self._file.read(size)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"never iterated"


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


def content(make: Callable[[], Any], *, resent: bool = True, colours: str = "sync asyncio trio") -> Kind:
    return Kind(lambda directory: {"content": make()}, resent, colours)


def multipart(make: Callable[[Path], Any], *, resent: bool = True) -> Kind:
    return Kind(
        lambda directory: {"files": {"f": ("n.bin", make(directory))}, "data": {"a": "b"}, "headers": BOUNDARY}, resent
    )


def pulled(parts: list[bytes], *, resent: bool = True) -> dict[str, Kind]:
    """A generator for the sync client, and one for the others."""
    return {
        "generator": content(lambda: iter_of(parts), resent=resent, colours="sync"),
        "async generator": content(lambda: slowly(parts), resent=resent, colours="asyncio trio"),
    }


def iter_of(parts: list[bytes]) -> Iterator[bytes]:
    yield from parts


def named(prefix: str, kinds: dict[str, Kind]) -> dict[str, Kind]:
    return {f"{prefix} {name}": kind for name, kind in kinds.items()}


SHORT, LONG = pattern(5_000), pattern(200_000)

KINDS: dict[str, Kind] = {
    "none": Kind(lambda directory: {}),
    "empty bytes": content(lambda: b""),
    "bytes": content(lambda: SHORT),
    "long bytes": content(lambda: pattern(3_000_000)),
    "str": content(lambda: "Grüße, 世界 " * 50),
    "json": Kind(lambda directory: {"json": {"numbers": list(range(100)), "text": "Grüße"}}),
    "form": Kind(lambda directory: {"data": {"a": "b", "many": ["1", "2"], "text": "Grüße &="}}),
    "multipart of bytes": multipart(lambda directory: SHORT),
    "multipart of a BytesIO": multipart(lambda directory: io.BytesIO(SHORT)),
    "multipart of a file": multipart(lambda directory: opened(directory, 5_000)),
    "multipart of a file that was read": multipart(lambda directory: opened(directory, 5_000, at=3_000)),
    "multipart of a long file": multipart(lambda directory: opened(directory, 200_000), resent=False),
    "multipart of an empty file": multipart(lambda directory: opened(directory, 0)),
    "BytesIO": content(lambda: io.BytesIO(SHORT), colours="sync"),
    "empty BytesIO": content(lambda: io.BytesIO(), colours="sync"),
    "long BytesIO": content(lambda: io.BytesIO(LONG), resent=False, colours="sync"),
    "file": Kind(lambda directory: {"content": opened(directory, 5_000)}, colours="sync"),
    "long file": Kind(lambda directory: {"content": opened(directory, 200_000)}, False, "sync"),
    "file at the limit": Kind(lambda directory: {"content": opened(directory, LIMIT)}, colours="sync"),
    "file over the limit": Kind(lambda directory: {"content": opened(directory, LIMIT + 1)}, False, "sync"),
    "file that is read on from the middle": Kind(
        lambda directory: {
            "content": opened(directory, 5_000, at=3_000),
            "headers": {"content-length": "2000"},  # httpx takes the whole file's by itself
        },
        colours="sync",
    ),
    "list": content(lambda: cut(SHORT, 999), colours="sync"),
    "long list": content(lambda: cut(LONG, 999), resent=False, colours="sync"),
    "async iterable": content(lambda: AsyncParts(cut(SHORT, 999)), colours="asyncio trio"),
    "async file": content(lambda: AsyncFile(SHORT), colours="asyncio trio"),
    "long async file": content(lambda: AsyncFile(LONG), resent=False, colours="asyncio trio"),
    **pulled(cut(SHORT, 999)),
    **named("long", pulled(cut(LONG, 999), resent=False)),
    **named("single-part", pulled([SHORT])),
    **named("long single-part", pulled([LONG], resent=False)),
    **named("at the limit:", pulled(cut(pattern(LIMIT), 4096))),
    **named("at the limit, single-part", pulled([pattern(LIMIT)])),
    **named("over the limit:", pulled(cut(pattern(LIMIT + 1), 4096), resent=False)),
    **named("empty", pulled([])),
    **named("hollow", pulled([b"", b"", b""])),
    **named("partly hollow", pulled([b"", b"a", b"", b"b" * 3000, b""])),
    "generator with a length": Kind(
        lambda directory: {"content": iter_of(cut(SHORT, 999)), "headers": {"content-length": "5000"}}, colours="sync"
    ),
    "async generator with a length": Kind(
        lambda directory: {"content": slowly(cut(SHORT, 999)), "headers": {"content-length": "5000"}},
        colours="asyncio trio",
    ),
}

CASES = [
    pytest.param(colour, kind, id=f"{kind}-{colour}")
    for kind, colour in itertools.product(KINDS, ["sync", "asyncio", "trio"])
    if colour in KINDS[kind].colours.split()
]


@pytest.fixture
def bodies(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """Makes the arguments of a request with a body of the kind, as often as it is called."""
    kind = KINDS[request.param]
    files: list[Any] = []

    def make() -> dict[str, Any]:
        arguments = kind.make(tmp_path)
        given = arguments.get("content") or (arguments.get("files") or {"f": (None, None)})["f"][1]
        files.append(given if isinstance(given, io.IOBase) else None)
        return arguments

    yield make
    for file in files:
        if file is not None:
            file.close()


every_kind = pytest.mark.parametrize(("colour", "bodies"), CASES, indirect=True)


def whole_of(arguments: dict[str, Any]) -> bytes:
    """The body by httpx's own reading."""
    request = httpx.Request("POST", "http://reference/", **arguments)
    if isinstance(request.stream, httpx.SyncByteStream):
        return request.read()
    return asyncio.run(request.aread())


def check_framing(request: Request) -> None:
    """The headers say of the body what it was."""
    lengths, codings = request.values("content-length"), request.values("transfer-encoding")
    if codings:
        assert (codings, lengths) == (["chunked"], [])
    elif lengths:
        assert lengths == [str(request.body_length)]
    else:
        assert request.body_length == 0


def arrived(fleet: Iterable[Upstream], target: str) -> list[Request]:
    """What came for a target, in order of time."""
    found = [request for upstream in fleet for request in upstream.log() if request.target == target]
    return sorted(found, key=lambda request: request.at)


async def answer_of(doing: Any) -> Any:
    """The response, or the httpx error."""
    try:
        return await doing
    except httpx.TransportError as error:
        return error


# The replay table


@every_kind
def test_C3_a_body_fails_over_whole_from_an_endpoint_that_refuses(
    colour: Colour, bodies: Callable[[], dict[str, Any]], fleet: list[Upstream]
) -> None:
    whole = whole_of(bodies())

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post(f"/{number}", **bodies()) for number in range(2)]

    with refusing() as dead:
        mesh = mesh_of(dead, fleet[0], balancer=RoundRobin())
        responses = colour.run(mesh, script)
    assert [("first", "not_sent"), ("failover", "ok")] in map(outcomes, responses)
    for number in range(2):
        [request] = arrived(fleet, f"/{number}")
        assert (request.complete, request.body_length, request.body_digest) == (True, len(whole), digest(whole))
        check_framing(request)


FAULTY: dict[str, dict[str, Any]] = {
    "reset": {"fault": "reset"},
    "close": {"fault": "close"},
    "503": {"status": 503},
    "503 and close": {"status": 503, "headers": {"connection": "close"}},
}


@pytest.mark.parametrize("step", FAULTY)
@every_kind
def test_C3_a_body_is_repeated_whole_or_not_at_all(
    colour: Colour,
    bodies: Callable[[], dict[str, Any]],
    fleet: list[Upstream],
    step: str,
    request: pytest.FixtureRequest,
) -> None:
    kind = KINDS[request.node.callspec.params["bodies"]]
    fleet[0].script(then=FAULTY[step])
    whole = whole_of(bodies())

    async def script(client: httpx.AsyncClient) -> list[Any]:
        return [await answer_of(client.put(f"/{number}", **bodies())) for number in range(2)]

    results = colour.run(mesh_of(*fleet[:2], balancer=RoundRobin()), script)
    bad = next(number for number, result in enumerate(results) if outcomes(result)[0][1] != "ok")
    requests = arrived(fleet, f"/{bad}")
    for each in [*requests, *arrived(fleet, f"/{1 - bad}")]:
        assert (each.complete, each.body_length, each.body_digest) == (True, len(whole), digest(whole))
        check_framing(each)
    if kind.is_resent:
        assert len(requests) == 2
        assert results[bad].status_code == 200
        assert [name for name, _ in outcomes(results[bad])] == ["first", "retry"]
    else:
        assert len(requests) == 1
        assert "503" not in step or results[bad].status_code == 503
        assert len(outcomes(results[bad])) == 1


@pytest.mark.parametrize(("limit", "times"), [(0, 1), (4_999, 1), (5_000, 2)])
def test_C3_the_limit_is_a_setting(colour: Colour, fleet: list[Upstream], limit: int, times: int) -> None:
    fleet[0].script(then={"status": 503})
    mesh = mesh_of(*fleet[:2], balancer=RoundRobin(), retry=Retry(buffer_body=limit))

    async def script(client: httpx.AsyncClient) -> None:
        for number in range(2):
            parts = cut(SHORT, 999)
            await client.put(f"/{number}", content=iter_of(parts) if colour.is_sync else slowly(parts))

    colour.run(mesh, script)
    requests = [request for number in range(2) for request in arrived(fleet, f"/{number}")]
    assert (len(requests) > 2) is (times == 2)
    assert {request.body_digest for request in requests} == {digest(SHORT)}


def test_C3_a_generator_is_pulled_once_however_often_it_is_sent(colour: Colour, fleet: list[Upstream]) -> None:
    for upstream in fleet[:2]:
        upstream.script(then={"status": 503})
    count = 0

    def counted() -> Iterator[bytes]:
        nonlocal count
        for part in cut(SHORT, 999):
            count += 1
            yield part

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.put("/", content=counted() if colour.is_sync else slowly(counted()))

    colour.run(mesh_of(*fleet[:2]), script)
    assert count == len(cut(SHORT, 999))
    assert {request.body_digest for request in arrived(fleet, "/")} == {digest(SHORT)}
    assert len(arrived(fleet, "/")) == 3


@unexhausted
@pytest.mark.parametrize("fault", ["reset", "hang"])
def test_C3_a_body_that_broke_off_is_repeated_from_its_first_byte(
    colour: Colour, fleet: list[Upstream], fault: str
) -> None:
    """The first endpoint goes away while the caller is still making the body."""
    parts = cut(SHORT, 500)
    broken = threading.Event()

    def sync() -> Iterator[bytes]:
        for position, part in enumerate(parts):
            if position == 5:
                broken.wait(0.3)
            yield part

    async def later() -> AsyncIterator[bytes]:
        for position, part in enumerate(parts):
            if position == 5:
                await anyio.sleep(0.3)
            yield part

    async def script(client: httpx.AsyncClient) -> list[Any]:
        return [
            await answer_of(client.put(f"/{number}", content=sync() if colour.is_sync else later()))
            for number in range(2)
        ]

    with leaving_after_the_head(hangs=fault == "hang") as address:
        mesh = mesh_of(
            address, fleet[0], balancer=RoundRobin(), timeout=Timeout(total=20, attempt=0.5), breaker=NEVER_OPENS
        )
        results = colour.run(mesh, script)
    assert [getattr(result, "status_code", result) for result in results] == [200, 200]
    assert 2 in [len(outcomes(result)) for result in results]
    for number in range(2):
        [request] = arrived(fleet, f"/{number}")
        assert (request.complete, request.body_length, request.body_digest) == (True, len(SHORT), digest(SHORT))


@contextlib.contextmanager
def leaving_after_the_head(*, hangs: bool = False, answer: bytes = b"") -> Iterator[str]:
    """The address of a peer that reads no body: it says `answer` and goes, or just stays there."""
    kept: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            data = b""
            while b"\r\n\r\n" not in data and (piece := connection.recv(65536)):
                data += piece
            if hangs:
                kept.append(connection)
                continue
            if answer:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                time.sleep(0.1)  # the goodbye arrives while the body is on its way
                connection.settimeout(5.0)
                with contextlib.suppress(OSError):
                    while connection.recv(65536):
                        pass
            connection.close()

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()


@unexhausted
@pytest.mark.parametrize("kind", ["bytes", "generator"])
def test_C3_an_early_rejection_does_not_cut_the_next_attempts_body(
    colour: Colour, fleet: list[Upstream], kind: str
) -> None:
    whole = pattern(5_000_000) if kind == "bytes" else pattern(60_000)

    async def script(client: httpx.AsyncClient) -> list[Any]:
        results = []
        for number in range(2):
            parts = cut(whole, 5000)
            pulled = iter_of(parts) if colour.is_sync else slowly(parts, 0.01)
            results.append(await answer_of(client.put(f"/{number}", content=whole if kind == "bytes" else pulled)))
        return results

    rejection = b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\nconnection: close\r\n\r\nbusy"
    with leaving_after_the_head(answer=rejection) as address:
        results = colour.run(mesh_of(address, fleet[0], balancer=RoundRobin()), script)
    assert [getattr(result, "status_code", result) for result in results] == [200, 200]
    assert 2 in [len(outcomes(result)) for result in results]
    for number in range(2):
        [request] = arrived(fleet, f"/{number}")
        assert (request.complete, request.body_length, request.body_digest) == (True, len(whole), digest(whole))


def test_C6_an_early_answer_ends_well_when_the_rest_has_gone_after_it(colour: Colour) -> None:
    """The peer answers and says goodbye, and reads on; by the time we close, its end and ours are through."""
    mesh: Mesh

    async def script(client: httpx.AsyncClient) -> None:
        for how in ("read", "close"):
            request = client.build_request("POST", "/", content=pattern(5_000_000))
            response: Any = await client.send(await request if colour.is_sync else request, stream=True)
            assert response.status_code == 200
            await anyio.sleep(0.5)
            if how == "read":
                assert (response.read() if colour.is_sync else await response.aread()) == b"busy"
            else:
                _ = response.close() if colour.is_sync else await response.aclose()
        assert mesh.snapshot()["orders"].in_flight == 0

    early = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\nbusy"
    with leaving_after_the_head(answer=early) as address:
        mesh = mesh_of(address)
        colour.run(mesh, script)
    assert mesh.snapshot()["orders"].nodes[0].failures == 0


def test_C8_a_body_on_a_kept_connection_that_died_is_repeated_whole(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script({}, {"fault": "reset"})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        await client.get("/first")
        return await client.put("/", content=iter_of([SHORT]) if colour.is_sync else slowly([SHORT]))

    response = colour.run(mesh_of(fleet[0]), script)
    assert outcomes(response) == [("first", "failed"), ("transparent", "ok")]
    assert [request.body_digest for request in arrived(fleet, "/")] == [digest(SHORT)] * 2


def test_C3_a_file_in_the_middle_without_its_length_is_the_callers_mistake(
    no_leaks: None, fleet: list[Upstream], tmp_path: Path
) -> None:
    """httpx announces the whole file's length, and then there is less: nobody may take that for a whole body."""
    mesh = mesh_of(*fleet)
    with mesh.client("orders") as client, opened(tmp_path, 5_000, at=3_000) as file:
        with pytest.raises(Exception, match="for declared Content-Length") as caught:
            client.put("/", content=file)
        assert outcomes(caught.value) == [("first", "abandoned")]
    assert {request.complete for request in arrived(fleet, "/")} <= {False}
    assert sum(node.failures for node in mesh.snapshot()["orders"].nodes) == 0


# What is executed how often


EVERY_FAULT: dict[str, dict[str, Any]] = {
    **{fault: {"fault": fault} for fault in FAULTS},
    "endless_drip": {"fault": "drip", "size": 100_000},
    "delay": {"delay": 60},
    **{str(status): {"status": status} for status in (408, 425, 429, 500, 502, 503, 504)},
    "503 with retry-after": {"status": 503, "headers": {"retry-after": "0"}},
    "429 with retry-after": {"status": 429, "headers": {"retry-after": "0"}},
    "503 of a kind": {"status": 503, "fault": "drip_headers", "interval": 0.0001},
    "503 and cut": {"status": 503, "fault": "cut"},
}

BODIES: dict[str, Callable[[Colour], Any]] = {
    "bytes": lambda colour: SHORT,
    "generator": lambda colour: iter_of(cut(SHORT, 999)) if colour.is_sync else slowly(cut(SHORT, 999)),
}


def impatient(fleet: list[Upstream], **more: Any) -> Mesh:
    return mesh_of(*fleet, timeout=Timeout(total=1.6, attempt=0.5), breaker=NEVER_OPENS, **more)


@unexhausted
@pytest.mark.parametrize(("is_warm", "body"), [(False, "generator"), (True, "bytes")], ids=["cold", "warm"])
@pytest.mark.parametrize("fault", EVERY_FAULT)
def test_C1_a_post_is_executed_at_most_once(
    colour: Colour, fleet: list[Upstream], fault: str, is_warm: bool, body: str
) -> None:
    mesh = impatient(fleet)

    async def script(client: httpx.AsyncClient) -> Any:
        for _ in range(12 if is_warm else 0):
            await client.get("/warm")
        for upstream in fleet:
            upstream.script(then=EVERY_FAULT[fault])
        return await answer_of(client.post("/once", content=BODIES[body](colour)))

    result = colour.run(mesh, script)
    [request] = arrived(fleet, "/once")
    assert len(report(result).attempts) == 1
    if request.complete:
        assert (request.body_length, request.body_digest) == (len(SHORT), digest(SHORT))
    else:
        assert fault == "stall_reader"
    assert mesh.snapshot()["orders"].in_flight == 0


REPEATED = {
    "PUT": {},
    "POST": {"headers": {"idempotency-key": "1"}},
    "PATCH": {"extensions": {"meshlib": {"idempotent": True}}},
}


@unexhausted
@pytest.mark.parametrize(
    ("method", "fault"),
    [("PUT", fault) for fault in EVERY_FAULT]
    + [(how, fault) for how in ("POST", "PATCH") for fault in ("reset", "503")],
)
def test_C1_what_may_be_repeated_is_repeated_whole(
    colour: Colour, fleet: list[Upstream], fault: str, method: str
) -> None:
    for upstream in fleet[:2]:
        upstream.script({**EVERY_FAULT[fault]})
    mesh = impatient(fleet[:2])

    async def script(client: httpx.AsyncClient) -> Any:
        return await answer_of(client.request(method, "/", content=BODIES["generator"](colour), **REPEATED[method]))

    result = colour.run(mesh, script)
    requests = arrived(fleet, "/")
    assert 1 <= len(requests) == len(report(result).attempts) <= 3
    assert {(each.body_length, each.body_digest) for each in requests if each.complete} <= {(5000, digest(SHORT))}
    answers_well = fault in (
        *("408", "425", "429", "500", "endless_drip", "close_after", "drip", "tiny_chunks", "gzip_bomb"),
        *("cut", "cut_reset"),  # settled at its headers
    )
    assert (len(requests) == 1) is answers_well
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_C1_a_server_that_stood_still_executes_a_post_once(colour: Colour, fleet: list[Upstream], method: str) -> None:
    """The kernel takes the connection and the request; the process reads it when it runs again."""
    mesh = mesh_of(*fleet, timeout=Timeout(total=20, attempt=0.3))

    async def script(client: httpx.AsyncClient) -> Any:
        return await answer_of(client.request(method, "/", content=SHORT))

    for upstream in fleet:
        upstream.suspend()
    try:
        result = colour.run(mesh, script)
    finally:
        for upstream in fleet:
            upstream.resume()
    assert isinstance(result, httpx.TimeoutException)
    attempts = len(report(result).attempts)
    assert attempts == (1 if method == "POST" else 3)
    until(lambda: len(arrived(fleet, "/")) == attempts)
    assert {request.body_digest for request in arrived(fleet, "/")} == {digest(SHORT)}


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_C1_connections_that_are_reset_at_once_repeat_no_post_that_went_out(
    colour: Colour, fleet: list[Upstream], method: str
) -> None:
    for upstream in fleet[:2]:
        upstream.accept_reset()
    mesh = impatient(fleet, balancer=RoundRobin())

    async def script(client: httpx.AsyncClient) -> list[Any]:
        return [await answer_of(client.request(method, f"/{number}", content=SHORT)) for number in range(6)]

    try:
        results = colour.run(mesh, script)
    finally:
        for upstream in fleet[:2]:
            upstream.accept_reset(False)
    for number, result in enumerate(results):
        assert len(arrived(fleet, f"/{number}")) == isinstance(result, httpx.Response)
        if method == "PUT":
            assert result.status_code == 200
        for attempt in report(result).attempts[:-1]:
            assert method == "PUT" or attempt.outcome == "not_sent"
    assert {request.body_digest for request in fleet[2].log()} <= {digest(SHORT)}


def test_C1_a_killed_server_does_not_get_a_post_twice(colour: Colour) -> None:
    with upstreams(2, delay=0.3) as doomed:
        mesh = mesh_of(*doomed, timeout=Timeout(total=20))

        async def script(client: httpx.AsyncClient) -> Any:
            await client.get("/warm")
            killer.start()
            return await answer_of(client.post("/once", content=SHORT))

        seen: list[Request] = []

        def kill() -> None:
            until(lambda: any(request.target == "/once" for each in doomed for request in each.log()))
            for each in doomed:
                if any(request.target == "/once" for request in each.log()):
                    seen.extend(each.log())
                    each.kill()
                    return

        killer = threading.Thread(target=kill)
        try:
            result = colour.run(mesh, script)
        finally:
            killer.join()
        seen += [request for each in doomed if each.pid for request in each.log()]
    assert isinstance(result, httpx.TransportError)
    assert len([request for request in seen if request.target == "/once"]) == 1


# Bodies that break by themselves


class Mine(Exception):
    """The application's."""


class Stop(BaseException):
    """The application's, and not to be caught."""


def wrapped() -> Exception:
    """What an application makes of an error of the source it copies from."""
    try:
        raise httpx.ReadError("the source's")
    except httpx.ReadError as error:
        try:
            raise Mine("mine") from error
        except Mine as mine:
            return mine


BROKEN: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("mine"),
    "OSError": lambda: OSError(5, "mine"),
    "ConnectionResetError": lambda: ConnectionResetError("mine"),
    "TimeoutError": lambda: TimeoutError("mine"),
    "httpx": lambda: httpx.ReadError("mine"),
    "httpx timeout": lambda: httpx.ReadTimeout("mine"),
    "httpcore": lambda: httpcore.ReadError("mine"),
    "httpcore write": lambda: httpcore.WriteError("mine"),
    "httpcore timeout": lambda: httpcore.ReadTimeout("mine"),
    "wrapped": wrapped,
    "BaseException": lambda: Stop("mine"),
}


@unexhausted
@pytest.mark.parametrize("after", [0, 3, 100])
@pytest.mark.parametrize("what", BROKEN)
def test_C3_a_body_that_raises_is_the_callers_and_goes_no_further(
    colour: Colour, fleet: list[Upstream], what: str, after: int
) -> None:
    error = BROKEN[what]()
    mesh = mesh_of(*fleet, timeout=Timeout(total=3))

    def sync() -> Iterator[bytes]:
        for _ in range(after):
            yield bytes(1000)
        raise error

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(type(error)) as caught:
            await client.put("/", content=sync() if colour.is_sync else slowly(sync()))
        assert caught.value is error
        assert (await client.get("/next")).status_code == 200

    colour.run(mesh, script)
    assert {request.complete for request in arrived(fleet, "/")} <= {False}
    assert len(arrived(fleet, "/")) <= 1
    snapshot = mesh.snapshot()["orders"]
    assert sum(node.failures for node in snapshot.nodes) == 0
    assert snapshot.in_flight == 0
    assert snapshot.budget_tokens == 500


def test_C3_the_connection_of_a_body_that_raised_is_closed(colour: Colour, fleet: list[Upstream]) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        def sync() -> Iterator[bytes]:
            yield b"half"
            raise Mine

        await client.get("/first")
        with pytest.raises(Mine):
            await client.put("/", content=sync() if colour.is_sync else slowly(sync()))
        await anyio.lowlevel.checkpoint()
        until(lambda: fleet[0].stats()["connections_open"] == 0)

    colour.run(mesh_of(fleet[0]), script)


@unexhausted
def test_C3_a_body_shorter_or_longer_than_it_said_goes_no_further(colour: Colour, fleet: list[Upstream]) -> None:
    mesh = mesh_of(*fleet)

    async def script(client: httpx.AsyncClient) -> None:
        for length in ("4999", "5001"):
            body = BODIES["generator"](colour)
            with pytest.raises(Exception, match="for declared Content-Length") as caught:
                await client.put("/", content=body, headers={"content-length": length})
            assert outcomes(caught.value) == [("first", "abandoned")]

    colour.run(mesh, script)
    assert [request.body_digest for request in arrived(fleet, "/") if request.complete] in ([], [digest(SHORT[:4999])])
    assert sum(node.failures for node in mesh.snapshot()["orders"].nodes) == 0


# With somebody else's transports


class Wrapped(httpx.AsyncBaseTransport):
    """A transport that is not httpx's own."""

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


@pytest.mark.parametrize("inner", [httpx.AsyncHTTPTransport, Wrapped])
def test_C3_over_an_inner_transport_a_slow_body_is_repeated_whole_or_not_at_all(
    fleet: list[Upstream], inner: Callable[[], httpx.AsyncBaseTransport]
) -> None:
    """The attempt runs out while the caller is making the body; whoever goes on pulling at it, no cut one arrives."""
    service = Service("orders", [each.address for each in fleet], timeout=Timeout(total=20, attempt=0.3))
    mesh = Mesh(service, inner=lambda endpoint: inner())
    parts = cut(SHORT, 500)

    async def main() -> Any:
        async with mesh.async_client("orders") as client:
            return await answer_of(client.put("/", content=slowly(parts, 0.06)))

    asyncio.run(main())
    complete = {request.body_digest for request in arrived(fleet, "/") if request.complete}
    assert complete <= {digest(SHORT)}


@pytest.mark.parametrize("kind", ["bytes", "generator", "long generator", "multipart of a BytesIO"])
@pytest.mark.parametrize("colour", ["sync", "asyncio", "trio"], indirect=True)
def test_C3_over_an_inner_transport_bodies_are_repeated_whole(
    colour: Colour, fleet: list[Upstream], tmp_path: Path, kind: str
) -> None:
    name = kind if kind in ("bytes", "multipart of a BytesIO") or colour.is_sync else kind.replace("gen", "async gen")
    inner = httpx.HTTPTransport if colour.is_sync else httpx.AsyncHTTPTransport if colour.name == "asyncio" else Wrapped
    fleet[0].script(then={"status": 503})
    with refusing() as dead:
        places = [dead, fleet[0].address, fleet[1].address]
        mesh = Mesh(Service("orders", places, balancer=RoundRobin()), inner=lambda endpoint: inner())
        whole = whole_of(KINDS[name].make(tmp_path))

        async def script(client: httpx.AsyncClient) -> list[Any]:
            return [await client.put("/", **KINDS[name].make(tmp_path)) for _ in range(3)]

        results = colour.run(mesh, script)
    assert {(each.complete, each.body_digest) for each in arrived(fleet, "/")} == {(True, digest(whole))}
    assert {result.status_code for result in results} == ({200} if KINDS[name].is_resent else {200, 503})


# Answers that stand between two attempts


def test_C5_a_small_rejection_keeps_its_connection(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script({"status": 503, "body": "busy"}, {"status": 503, "size": 60_000, "chunked": True})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/")

    response = colour.run(mesh_of(fleet[0]), script)
    assert outcomes(response) == [("first", "rejected"), ("retry", "rejected"), ("retry", "ok")]
    assert len({request.connection for request in fleet[0].log()}) == 1


@pytest.mark.parametrize("step", [{"size": 0}, {"size": 1}, {"size": 65_536}, {"size": 65_536, "chunked": True}])
@pytest.mark.parametrize("how", ["GET", "HEAD"])
def test_C5_up_to_64_KiB_are_drained(colour: Colour, fleet: list[Upstream], step: dict[str, Any], how: str) -> None:
    fleet[0].script({"status": 503, **step})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.request(how, "/")

    assert outcomes(colour.run(mesh_of(fleet[0]), script)) == [("first", "rejected"), ("retry", "ok")]
    assert len({request.connection for request in fleet[0].log()}) == 1


@pytest.mark.parametrize("how", ["given up", "whole"])
def test_C5_a_rejection_that_is_the_last_word_is_left_to_the_caller(
    colour: Colour, fleet: list[Upstream], how: str
) -> None:
    """Nothing of it is read before the caller reads it, so there is no limit to it."""
    fleet[0].script(then={"status": 503, "size": 1_000_000})
    mesh = mesh_of(fleet[0], retry=Retry(max_attempts=1))

    async def script(client: httpx.AsyncClient) -> Any:
        response = await client.get("/") if how == "whole" else await unread(colour, client, "/")
        if how == "given up":
            assert mesh.snapshot()["orders"].in_flight == 1
            _ = response.close() if colour.is_sync else await response.aclose()
        return response

    response = colour.run(mesh, script)
    assert response.status_code == 503
    assert how == "given up" or len(response.content) == 1_000_000
    assert mesh.snapshot()["orders"].in_flight == 0


async def unread(colour: Colour, client: Any, url: str) -> Any:
    request = await client.build_request("GET", url) if colour.is_sync else client.build_request("GET", url)
    return await client.send(request, stream=True)


LONG_REJECTIONS: dict[str, dict[str, Any]] = {
    "over the limit": {"status": 503, "size": 200_000},
    "megabytes": {"status": 503, "size": 5_000_000},
    "gigabytes": {"status": 503, "size": 10 << 30},
    "chunks": {"status": 503, "size": 10 << 30, "chunked": True},
    "drip": {"status": 503, "fault": "drip", "size": 10_000},
    "slow drip": {"status": 503, "fault": "drip", "size": 10_000, "interval": 0.09},
    "silence": {"status": 503, "size": 10, "headers": {"content-length": "20"}},
    "tiny chunks": {"status": 503, "fault": "tiny_chunks", "size": 1_000_000},
}


@unexhausted
@pytest.mark.parametrize("fault", LONG_REJECTIONS)
def test_C5_a_long_rejection_neither_delays_the_retry_nor_stays(
    colour: Colour, fleet: list[Upstream], fault: str, request: pytest.FixtureRequest
) -> None:
    fleet[0].script(then=LONG_REJECTIONS[fault])
    mesh = mesh_of(*fleet[:2], balancer=RoundRobin(), breaker=NEVER_OPENS, connections=Connections(max_per_endpoint=1))

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        responses = [await client.get(f"/{number}") for number in range(4)]
        await anyio.lowlevel.checkpoint()
        until(lambda: fleet[0].stats()["connections_open"] == 0)  # while the client is open
        return responses

    responses = colour.run(mesh, script)
    assert [response.status_code for response in responses] == [200] * 4
    rejected = [number for number, response in enumerate(responses) if len(outcomes(response)) == 2]
    assert rejected
    assert mesh.snapshot()["orders"].in_flight == 0
    for number in rejected:
        first, second = arrived(fleet, f"/{number}")
        delay = second.at - first.at
        request.node.user_properties.append(("delay", delay))
        assert delay < 0.1 + BUSY


@unexhausted
def test_C5_a_flood_of_tiny_chunks_does_not_delay_the_retry(colour: Colour, fleet: list[Upstream]) -> None:
    """All of it is there at once, so no read ever waits."""
    flood = b"HTTP/1.1 503 Busy\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 500_000

    async def script(client: httpx.AsyncClient) -> list[Any]:
        return [await client.get("/") for _ in range(2)]

    with leaving_after_the_head(answer=flood) as address:
        responses = colour.run(mesh_of(address, fleet[0], balancer=RoundRobin()), script)
    retried = [response for response in responses if len(outcomes(response)) == 2]
    assert retried
    assert max(report(response).attempts[1].seconds for response in retried) < 0.6


@unexhausted
def test_C5_draining_is_not_on_the_next_endpoints_account(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script(then={"status": 503, "fault": "drip", "size": 10_000})
    mesh = mesh_of(*fleet[:2], balancer=RoundRobin(), timeout=Timeout(total=20, attempt=0.08), breaker=NEVER_OPENS)

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(4)]

    responses = colour.run(mesh, script)
    assert [response.status_code for response in responses] == [200] * 4
    nodes = {node.endpoint: node for node in mesh.snapshot()["orders"].nodes}
    assert nodes[fleet[1].address].failures == 0
    assert [("first", "rejected"), ("retry", "ok")] in map(outcomes, responses)


def test_C5_a_dropped_rejection_leaves_no_task_and_no_generator_behind(colour: Colour, fleet: list[Upstream]) -> None:
    """In trio an async generator that was left half-way is a ResourceWarning, in asyncio it is another task."""
    fleet[0].script(then={"status": 503, "size": 5_000_000})

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(2):
            await client.get("/")
        gc.collect()
        if colour.name == "asyncio":
            assert asyncio.all_tasks() == {asyncio.current_task()}

    colour.run(mesh_of(*fleet[:2], balancer=RoundRobin()), script)


@unexhausted
def test_C5_an_inner_transports_rejection_is_drained_too(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script({"status": 503, "body": "busy"}, {}, {"status": 503, "size": 1_000_000})
    inner = httpx.HTTPTransport if colour.is_sync else httpx.AsyncHTTPTransport if colour.name == "asyncio" else Wrapped
    service = Service("orders", [Endpoint(fleet[0].host, fleet[0].port)])
    mesh = Mesh(service, inner=lambda endpoint: inner())

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(2)]

    responses = colour.run(mesh, script)
    assert [outcomes(response) for response in responses] == [[("first", "rejected"), ("retry", "ok")]] * 2
    assert [request.connection for request in fleet[0].log()][:3] == [fleet[0].log()[0].connection] * 3
