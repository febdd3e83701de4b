"""What the tests of bodies send, where it goes, and what has arrived of it."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import anyio
import httpx
import pytest

from conftest import Colour
from meshlib.testing import Upstream
from meshlib.testing.upstream import Request

BUSY = 1.5
"""Seconds that a busy machine may add."""

unexhausted = pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning")
"""In trio, httpcore and httpx leave generators behind where sending or reading breaks off."""


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def pattern(size: int) -> bytes:
    """Bytes of which every cut, gap and repetition shows."""
    return b"".join(b"%07d " % number for number in range(size // 8 + 1))[:size]


def cut(body: bytes, size: int = 999) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


SHORT, LONG = pattern(5_000), pattern(200_000)


def at_once(parts: Iterable[bytes]) -> Iterator[bytes]:
    yield from parts


async def slowly(parts: Iterable[bytes], seconds: float = 0.0) -> AsyncIterator[bytes]:
    for part in parts:
        await anyio.sleep(seconds)
        yield part


def source(colour: Colour, parts: Iterable[bytes]) -> Any:
    """A generator as the client takes it."""
    return at_once(parts) if colour.is_sync else slowly(parts)


async def answer_of(doing: Any) -> Any:
    """The response, or the error."""
    try:
        return await doing
    except httpx.TransportError as error:
        return error


def arrived(fleet: Iterable[Upstream], target: str) -> list[Request]:
    """What came for a target, in order of time."""
    found = [request for upstream in fleet for request in upstream.log() if request.target == target]
    return sorted(found, key=lambda request: request.at)


class Wrapped(httpx.AsyncBaseTransport):
    """A transport that is not httpx's own."""

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


REJECTION = b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\nconnection: close\r\n\r\nbusy"


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
