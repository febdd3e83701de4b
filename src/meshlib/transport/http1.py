"""HTTP/1.1 on one connection: what is written for a request, what is read of its answer.

Decides, by h11, what goes over the wire, and whether the connection can carry another request afterwards. h11 parses,
and refuses what is malformed; the two drivers here only move bytes between it and the stream. They never open or close
anything, and know nothing of deadlines: the stream does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import h11
import httpcore

from meshlib.core.report import Attempt
from meshlib.transport.binding import Answer
from meshlib.transport.exchange import Exchange

LONGEST_HEAD = 100 * 1024
"""Bytes of a status line with its headers, or of a chunk's header, that are accepted without an end to them."""

CHUNK = 65536
"""Bytes asked of the stream at once; also the longest body that goes out in one piece with its head."""


class Http1:
    """The state of a connection: h11's, with its exceptions in httpcore's classes."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST_HEAD)

    def head(self, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The bytes that open a request."""
        try:
            return self._h11.send(h11.Request(method=method, target=target, headers=headers)) or b""
        except h11.LocalProtocolError as error:
            raise httpcore.LocalProtocolError(str(error)) from error

    def data(self, chunk: bytes) -> bytes:
        """The bytes for a piece of the body, which may be none."""
        return self._sent(h11.Data(data=chunk))

    def end(self) -> bytes:
        """The bytes that end the request, which may be none."""
        return self._sent(h11.EndOfMessage())

    def _sent(self, event: h11.Event) -> bytes:
        try:
            return self._h11.send(event) or b""
        except h11.LocalProtocolError as error:
            raise httpcore.LocalProtocolError(str(error)) from error

    def feed(self, data: bytes) -> None:
        """Take what was read; nothing means that the peer has closed."""
        if not data and self._h11.their_state is h11.SEND_RESPONSE:
            raise httpcore.RemoteProtocolError("the server closed the connection without sending a response")
        self._h11.receive_data(data)

    def event(self) -> Any:
        """What the peer says next, apart from interim answers; `h11.NEED_DATA` if more has to be read first."""
        try:
            event = self._h11.next_event()
            while isinstance(event, h11.InformationalResponse) and event.status_code != 101:
                event = self._h11.next_event()
        except h11.RemoteProtocolError as error:
            raise httpcore.RemoteProtocolError(str(error)) from error
        return event

    def renew(self) -> bool:
        """Make ready for another request; False if there can be none.

        What came beyond the answer would be taken for the answer to the next request, which is somebody else's.
        """
        ours = self._h11
        if ours.our_state is not h11.DONE or ours.their_state is not h11.DONE or ours.trailing_data[0]:
            return False
        ours.start_next_cycle()
        return True


def send(http: Http1, stream: Any, exchange: Exchange, attempt: Attempt) -> Answer:
    """Send the request, and wait for the headers of its answer."""
    timeouts = exchange.given_timeouts
    try:
        _write(http, stream, exchange, attempt, timeouts.get("write"))
    except httpcore.WriteError:
        pass  # a server may answer before it has the whole request, and hang up; if not, reading says what is wrong
    timeout = timeouts.get("read")
    while (event := http.event()) is h11.NEED_DATA:
        http.feed(stream.read(CHUNK, timeout))
    return Answer(event, Body(http, stream, timeout), stream)


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
        while (event := self._http.event()) is h11.NEED_DATA:
            self._http.feed(self._stream.read(CHUNK, self._timeout))
        if type(event) is h11.Data:
            return bytes(event.data)
        raise StopIteration

    def close(self) -> None:
        """There is nothing to let go of: whoever read it looks after the connection."""


async def asend(http: Http1, stream: Any, exchange: Exchange, attempt: Attempt) -> Answer:
    """See `send`."""
    timeouts = exchange.given_timeouts
    try:
        await _awrite(http, stream, exchange, attempt, timeouts.get("write"))
    except httpcore.WriteError:
        pass  # a server may answer before it has the whole request, and hang up; if not, reading says what is wrong
    timeout = timeouts.get("read")
    while (event := http.event()) is h11.NEED_DATA:
        http.feed(await stream.read(CHUNK, timeout))
    return Answer(event, AsyncBody(http, stream, timeout), stream)


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
        while (event := self._http.event()) is h11.NEED_DATA:
            self._http.feed(await self._stream.read(CHUNK, self._timeout))
        if type(event) is h11.Data:
            return bytes(event.data)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """See `Body.close`."""
