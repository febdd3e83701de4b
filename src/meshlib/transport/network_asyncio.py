"""The asyncio stream: a protocol whose waits are futures with a timer.

Decides nothing of its own; the bounds are those of `network.Bounded`. A deadline ends a wait by resolving its future,
not by cancelling a task, and dropping the connection is one call that needs no await. Data is handed on as it arrives;
what nobody waits for is kept up to a limit, then reading stops until it is fetched.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import ssl
from typing import Any, cast

import httpcore

from meshlib.fork import inherited, strays
from meshlib.transport.loops import post
from meshlib.transport.network import Bounded, Clock, Dial, connect_error, open_socket, patience, pieces, socket_info
from meshlib.transport.tls import UNREADABLE, unproven

KEPT = 256 * 1024
"""Received bytes held for a slow consumer before the socket is no longer read."""


class AsyncioStream(Bounded, asyncio.Protocol, httpcore.AsyncNetworkStream):
    """A connected socket on an asyncio loop.

    Args:
        sock: the connected socket; the stream owns it.
        clock: what deadlines are measured by.
        loop: the running loop.
    """

    def __init__(self, sock: socket.socket, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(clock)
        self._sock = sock
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._reader: asyncio.Future[bool] | None = None
        self._writer: asyncio.Future[bool] | None = None
        self._is_paused = False
        self._is_held = False
        self._ended = False
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rings = self._expires = math.inf
        inherited.add(self)

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > KEPT and not self._is_held and self._transport is not None:
            self._is_held = True
            self._transport.pause_reading()
        _wake(self._reader)

    def eof_received(self) -> bool:
        self._ended = True
        _wake(self._reader)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._error = exc
        self._transport = None  # which has let go of its loop, so that aborting it now would raise
        if self._timer is not None:
            self._timer.cancel()
        _wake(self._reader)
        _wake(self._writer)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        _wake(self._writer)

    # What a connection calls

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Wait for some bytes; none means that the peer has closed."""
        left = self.left(timeout)
        if left is not None and left <= 0:
            raise httpcore.ReadTimeout("no time left to read")
        if not self._received and not self._ended:
            self._reader = self._loop.create_future()
            try:
                if not await self._wait(self._reader, timeout):
                    raise httpcore.ReadTimeout("the read timed out")
            finally:
                self._reader = None
        if not self._received and self._error is not None:
            raise httpcore.ReadError(str(self._error)) from self._error
        data = bytes(self._received[:max_bytes])
        del self._received[:max_bytes]
        if self._is_held and len(self._received) < KEPT and self._transport is not None:
            self._is_held = False
            self._transport.resume_reading()
        self.answered = self.answered or bool(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Hand over all of it, and wait while the peer does not take it."""
        for piece in pieces(buffer):
            if self._transport is None or self._ended or self._transport.is_closing():
                raise httpcore.WriteError("the connection is closed")
            left = self.left(timeout)
            if left is not None and left <= 0:
                raise httpcore.WriteTimeout("no time left to write")
            self.sent = self.sent or bool(buffer)
            self._transport.write(piece)
            if piece is not buffer:
                await asyncio.sleep(0)  # others may run between two pieces of a long body
            if self._is_paused or self._error is not None:
                await self._flush(timeout)

    async def _flush(self, timeout: float | None) -> None:
        """Wait while the peer does not take what was written."""
        while self._is_paused and not self._ended:
            self._writer = self._loop.create_future()
            try:
                if not await self._wait(self._writer, timeout):
                    raise httpcore.WriteTimeout("the write timed out")
            finally:
                self._writer = None
        if self._error is not None:
            raise httpcore.WriteError(str(self._error)) from self._error

    def abandon(self) -> None:
        """See `Bounded.abandon`. The loop watches the descriptor, so it is the loop that must close it."""
        if self._transport is None or not post(self._loop, self._transport.abort):
            self._sock.close()  # a loop that is over watches nothing

    def forget(self) -> None:
        """See `Bounded.forget`. Aborting would take the socket out of the epoll that is shared with the parent."""
        super().forget()
        if self._transport is not None:
            strays.append(self._transport)
            self._transport = None
        self._ended = True

    async def aclose(self) -> None:
        """Close at once; more than once is fine."""
        self.abort()

    def abort(self) -> None:
        """Drop the connection without waiting, from whatever state; more than once is fine."""
        if self._transport is not None and asyncio._get_running_loop() is self._loop:
            self._transport.abort()
        else:
            self.abandon()

    @property
    def is_awaited(self) -> bool:  # type: ignore[override]
        """See `Bounded.is_awaited`."""
        return self._reader is not None or self._writer is not None

    @property
    def ssl_object(self) -> Any:
        """The TLS side of the connection, if it has one."""
        return self._transport.get_extra_info("ssl_object") if self._transport is not None else None

    @property
    def is_readable(self) -> bool:
        """Whether something can be read. On an idle connection that means the peer has closed it."""
        return self._ended or bool(self._received) or self._transport is None or self._transport.is_closing()

    def get_extra_info(self, info: str) -> Any:
        """See `httpcore.AsyncNetworkStream`."""
        return socket_info(self._sock, info, self)

    async def _wait(self, future: asyncio.Future[bool], timeout: float | None) -> bool:
        """Wait for the future; False if the time ran out first."""
        left = self.left(timeout)
        self._expires = math.inf if left is None else self._loop.time() + left
        if self._expires < self._rings:
            self._ring_at(self._expires)
        return await future

    def _ring_at(self, when: float) -> None:
        """Set the timer. There is one for all the waits of a stream: most end long before their time, and the next one
        only puts it off, which a timer that rings too early finds out by itself."""
        if self._timer is not None:
            self._timer.cancel()
        self._rings, self._timer = when, self._loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._rings, self._timer = math.inf, None
        waiting = self._reader or self._writer
        if waiting is None:
            return
        if self._loop.time() >= self._expires:
            _resolve(waiting, False)
        elif self._expires < math.inf:
            self._ring_at(self._expires)


async def connect(dial: Dial, timeout: float, bounds: Bounded) -> AsyncioStream:
    """Open a connection, the TLS handshake included; see `network.connect`."""
    loop = asyncio.get_running_loop()
    if renewal := dial.look(aside=True):
        turn = Turn()
        renewal.add_done_callback(lambda done: post(loop, turn.set))
        await turn.wait(patience(timeout, bounds))
    context = dial.context
    last: Exception | None = None
    for address, own in dial.addresses(timeout, bounds):
        sock: socket.socket | None = None
        try:
            sock = open_socket(address)
            stream = AsyncioStream(sock, bounds.clock, loop)
            await _connect_socket(loop, sock, (address, dial.port), own.some_left())
            await loop.create_connection(lambda: stream, sock=sock, **_tls(dial, context, own))  # noqa: B023
        except BaseException as error:  # whatever it is, the socket goes
            if sock is not None:
                sock.close()
            if isinstance(error, UnicodeDecodeError):  # asyncio reads the certificate itself
                raise dial.stranger(UNREADABLE) from error
            if not isinstance(error, OSError):
                raise
            # asyncio calls a handshake that took too long "aborted".
            last = TimeoutError() if isinstance(error, ConnectionAbortedError) else error
            if unproven(error):
                break
        else:
            return _proved(dial, stream)
    raise connect_error(last, dial)


def _proved(dial: Dial, stream: AsyncioStream) -> AsyncioStream:
    try:
        dial.prove(stream.ssl_object)
    except BaseException:
        stream.abort()
        raise
    return stream


def _tls(dial: Dial, context: ssl.SSLContext | None, own: Bounded) -> dict[str, Any]:
    if context is None:
        return {}
    return {"ssl": context, "server_hostname": dial.server_name, "ssl_handshake_timeout": own.some_left()}


async def _connect_socket(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, address: tuple[str, int], left: float
) -> None:
    """Connect without a task that would have to be cancelled when the time is over."""
    sock.setblocking(False)
    try:
        sock.connect(address)
        return
    except BlockingIOError:
        pass
    connected: asyncio.Future[bool] = loop.create_future()
    loop.add_writer(sock, _wake, connected)
    try:
        if not await wait_until(loop, connected, left):
            raise TimeoutError
    finally:
        loop.remove_writer(sock)
    if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, os.strerror(code))


async def wait_until(loop: asyncio.AbstractEventLoop, happened: asyncio.Future[bool], left: float) -> bool:
    """Wait for what a future stands for at most `left` seconds; whether it happened."""
    if left <= 0:
        return happened.done()
    timer = loop.call_later(left, _resolve, happened, False)
    try:
        return await happened
    finally:
        timer.cancel()


def _wake(happened: asyncio.Future[bool] | None) -> None:
    if happened is not None:
        _resolve(happened, True)


def _resolve(happened: asyncio.Future[bool], how: bool) -> None:
    if not happened.done():
        happened.set_result(how)


class Turn:
    """Somebody's turn to have a connection; see `stack.Turn`."""

    def __init__(self) -> None:
        self.gift: Any = None
        self._loop = asyncio.get_running_loop()
        self._has_come: asyncio.Future[bool] = self._loop.create_future()

    def set(self) -> None:
        """It has come."""
        _wake(self._has_come)

    async def wait(self, left: float) -> bool:
        """Wait for it at most `left` seconds; whether it came."""
        return await wait_until(self._loop, self._has_come, left)
