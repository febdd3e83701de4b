"""HTTP/1.1 on one connection: what is written for a request, what is read of its answer.

Decides what is said in which order, whether an answer may be believed, and whether the connection can carry another
request afterwards. What a head may look like is decided in `meshlib.transport.head`, where a body ends in
`meshlib.transport.framing`; the two drivers here only move bytes between those and the stream. They never open or close
anything, and know nothing of deadlines: the stream does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpcore

from meshlib.core.report import Attempt
from meshlib.transport.binding import Answer
from meshlib.transport.exchange import Exchange
from meshlib.transport.framing import Content, SendCounted, Sending, content_of, declared, sending_of
from meshlib.transport.head import END, OPENING, Head, Malformed, Pair, answer_head, may_open, request_head
from meshlib.transport.received import Received

CHUNK = 65536
"""Bytes asked of the stream at once; also the longest body that goes out in one piece with its head."""


class Http1:
    """The state of a connection.

    Attributes:
        interim: how many interim answers (1xx) there were to the request.
    """

    def __init__(self) -> None:
        self._received = Received()
        self._begin()

    def _begin(self) -> None:
        self._method = b""
        self._sending: Sending = SendCounted(0)
        self._content: Content | None = None
        self._is_sent = self._wants_upgrade = False
        self._is_kept = True
        self.interim = 0

    def head(self, method: bytes, target: bytes, headers: list[Pair]) -> bytes:
        """The bytes that open a request."""
        try:
            head, fields = request_head(method, target, headers)
            self._sending = sending_of(fields)
            if fields.raw_items() is not headers:
                head, _ = request_head(method, target, fields.raw_items())
        except Malformed as error:
            raise httpcore.LocalProtocolError(str(error)) from error
        self._method = method
        self._is_kept = not fields.has(b"connection", b"close")
        self._wants_upgrade = bool(fields.named.get(b"upgrade"))
        return head

    def data(self, chunk: bytes) -> bytes:
        """The bytes for a piece of the body, which may be none."""
        try:
            return self._sending.data(chunk)
        except Malformed as error:
            raise httpcore.LocalProtocolError(str(error)) from error

    def end(self) -> bytes:
        """The bytes that end the request, which may be none."""
        try:
            rest = self._sending.end()
        except Malformed as error:
            raise httpcore.LocalProtocolError(str(error)) from error
        self._is_sent = True
        return rest

    def cut(self) -> None:
        """What was written has not arrived whole, so the peer waits for the rest or has hung up."""
        self._is_kept = False

    def feed(self, data: bytes) -> None:
        """Take what was read; nothing means that the peer has closed."""
        if not data and self._content is None:
            raise httpcore.RemoteProtocolError("the server closed the connection without sending a response")
        self._received.feed(data)

    def answer(self) -> Head | None:
        """The head of the answer, apart from interim ones; None if more has to be read first."""
        try:
            while (text := self._received.until(END)) is not None:
                head = answer_head(text)
                if head.status_code >= 200 or head.status_code == 101:
                    self._settle(head)
                    return head
                self.interim += 1
                declared(head.headers)
            if not may_open(self._received.peek(len(OPENING))):
                raise Malformed("illegal status line")
        except Malformed as error:
            raise httpcore.RemoteProtocolError(str(error)) from error
        return None

    def _settle(self, head: Head) -> None:
        """What follows this head, and whether there may be another one after it."""
        if head.status_code == 101 and not self._wants_upgrade:
            raise Malformed("a switch to a protocol that nobody asked for")
        self._content, is_certain = content_of(head, self._method)
        is_last = head.http_version < b"1.1" or head.headers.has(b"connection", b"close")
        self._is_kept = self._is_kept and is_certain and not is_last

    def chunk(self) -> bytes | None:
        """The next piece of the body; none at its end; None if more has to be read first."""
        content = self._content
        if content is None or content.is_over:
            return b""
        try:
            return content.take(self._received)
        except Malformed as error:
            raise httpcore.RemoteProtocolError(str(error)) from error

    def renew(self) -> bool:
        """Make ready for another request; False if there can be none.

        What came beyond the answer would be taken for the answer to the next request, which is somebody else's.
        """
        if not (self._is_sent and self._is_kept and self._content is not None and self._content.is_over):
            return False
        if self._received:
            return False
        self._begin()
        return True


def send(http: Http1, stream: Any, exchange: Exchange, attempt: Attempt) -> Answer:
    """Send the request, and wait for the headers of its answer."""
    timeouts = exchange.given_timeouts
    try:
        _write(http, stream, exchange, attempt, timeouts.get("write"))
    except httpcore.WriteError:
        # A server may answer before it has the whole request, and hang up; if not, reading says what is wrong.
        http.cut()
    timeout = timeouts.get("read")
    head = None
    while head is None:
        http.feed(stream.read(CHUNK, timeout))
        head = http.answer()
    return Answer(head, Body(http, stream, timeout), stream)


def _write(http: Http1, stream: Any, exchange: Exchange, attempt: Attempt, timeout: float | None) -> None:
    head, content = http.head(*exchange.head(attempt)), exchange.body.content
    if content is not None and len(content) <= CHUNK:
        stream.write(head + (http.data(content) if content else b"") + http.end(), timeout)
        return
    stream.write(head, timeout)
    for chunk in exchange.body:
        if data := http.data(chunk):
            stream.write(data, timeout)
    if data := http.end():
        stream.write(data, timeout)


class Body(Iterator[bytes]):
    """The body of an answer, read as it is asked for.

    Args:
        http, stream: where it comes from.
        timeout: for each read, in seconds; None leaves it to the stream.
    """

    __slots__ = ("_http", "_stream", "_timeout")

    def __init__(self, http: Http1, stream: Any, timeout: float | None) -> None:
        self._http = http
        self._stream = stream
        self._timeout = timeout

    def __next__(self) -> bytes:
        while (chunk := self._http.chunk()) is None:
            self._http.feed(self._stream.read(CHUNK, self._timeout))
        if chunk:
            return chunk
        raise StopIteration

    def close(self) -> None:
        """There is nothing to let go of: whoever read it looks after the connection."""


async def asend(http: Http1, stream: Any, exchange: Exchange, attempt: Attempt) -> Answer:
    """See `send`."""
    timeouts = exchange.given_timeouts
    try:
        await _awrite(http, stream, exchange, attempt, timeouts.get("write"))
    except httpcore.WriteError:
        http.cut()  # see `send`
    timeout = timeouts.get("read")
    head = None
    while head is None:
        http.feed(await stream.read(CHUNK, timeout))
        head = http.answer()
    return Answer(head, AsyncBody(http, stream, timeout), stream)


async def _awrite(http: Http1, stream: Any, exchange: Exchange, attempt: Attempt, timeout: float | None) -> None:
    head, content = http.head(*exchange.head(attempt)), exchange.body.content
    if content is not None and len(content) <= CHUNK:
        await stream.write(head + (http.data(content) if content else b"") + http.end(), timeout)
        return
    await stream.write(head, timeout)
    async for chunk in exchange.body:
        if data := http.data(chunk):
            await stream.write(data, timeout)
    if data := http.end():
        await stream.write(data, timeout)


class AsyncBody(AsyncIterator[bytes]):
    """See `Body`. Not a generator: one that is left half-way is cleaned up by the event loop at some later time."""

    __slots__ = ("_http", "_stream", "_timeout")

    def __init__(self, http: Http1, stream: Any, timeout: float | None) -> None:
        self._http = http
        self._stream = stream
        self._timeout = timeout

    async def __anext__(self) -> bytes:
        while (chunk := self._http.chunk()) is None:
            self._http.feed(await self._stream.read(CHUNK, self._timeout))
        if chunk:
            return chunk
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """See `Body.close`."""
