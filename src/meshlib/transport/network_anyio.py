"""The stream for every other event loop: httpcore's own, with our bounds on it.

Decides nothing of its own; the bounds are those of `network.Bounded`. It serves trio, where a cancel scope is the
native and leak-free way to end a wait.
"""

from __future__ import annotations

import contextlib
import ssl
from concurrent.futures import Future
from typing import Any

import anyio
import httpcore

from meshlib.fork import inherited
from meshlib.transport.loops import post, running_loop
from meshlib.transport.network import Bounded, Clock, Dial, connect_error, patience, pieces
from meshlib.transport.tls import IdentityError, unproven


class AnyIOStream(Bounded, httpcore.AsyncNetworkStream):
    """A connected socket on any loop that anyio knows.

    Args:
        stream: httpcore's stream; this one owns it.
        clock: what deadlines are measured by.
    """

    def __init__(self, stream: httpcore.AsyncNetworkStream, clock: Clock) -> None:
        super().__init__(clock)
        self._stream = stream
        self._sock = stream.get_extra_info("socket")  # to ask for it imports things, which a finalizer cannot
        inherited.add(self)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Wait for some bytes; none means that the peer has closed."""
        left = self.left(timeout)
        if left is not None and left <= 0:
            raise httpcore.ReadTimeout("no time left to read")
        try:
            data = await self._stream.read(max_bytes, left)
        except (httpcore.ReadError, ssl.SSLError) as error:
            raise httpcore.ReadError(_reason(error)) from error
        self.answered = self.answered or bool(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it."""
        for piece in pieces(buffer):
            left = self.left(timeout)
            if left is not None and left <= 0:
                raise httpcore.WriteTimeout("no time left to write")
            self.sent = self.sent or bool(buffer)
            try:
                await self._stream.write(bytes(piece), left)
            except (httpcore.WriteError, ssl.SSLError) as error:
                raise httpcore.WriteError(_reason(error)) from error

    async def aclose(self) -> None:
        """Close at once; more than once is fine."""
        self.abort()

    def abort(self) -> None:
        """Drop the connection without waiting; more than once is fine."""
        if self._sock.fileno() >= 0:
            import trio

            with contextlib.suppress(RuntimeError):  # no loop runs here, so nobody waits
                trio.lowlevel.notify_closing(self._sock)  # or trio would wait for whoever has the descriptor next
        self._sock.close()

    @property
    def is_readable(self) -> bool:
        """Whether something can be read. On an idle connection that means the peer has closed it."""
        tls = self._stream.get_extra_info("ssl_object")
        return bool(self._stream.get_extra_info("is_readable")) or (tls is not None and _has_said_something(tls))

    def get_extra_info(self, info: str) -> Any:
        """See `httpcore.AsyncNetworkStream`."""
        return self._sock if info == "socket" else self._stream.get_extra_info(info)


async def connect(dial: Dial, timeout: float, bounds: Bounded) -> AnyIOStream:
    """Open a connection, the TLS handshake included; see `network.connect`."""
    if renewal := dial.look(aside=True):
        await _wait(renewal, patience(timeout, bounds))
    context = dial.context
    last: Exception | None = None
    for address, own in dial.addresses(timeout, bounds):
        try:
            return AnyIOStream(await _dial(dial, context, address, own), bounds.clock)
        except IdentityError:
            raise
        except (httpcore.ConnectError, TimeoutError) as error:
            last = _root(error)
            if unproven(last):
                break
        except httpcore.ConnectTimeout:
            last = TimeoutError()
    raise connect_error(last, dial)


async def _wait(renewal: Future[None], left: float) -> None:
    """Wait for another thread's work at most `left` seconds."""
    loop, turn = running_loop(), Turn()
    renewal.add_done_callback(lambda done: post(loop, turn.set))
    await turn.wait(left)


async def _dial(dial: Dial, context: ssl.SSLContext | None, address: str, own: Bounded) -> httpcore.AsyncNetworkStream:
    backend: Any = httpcore.AnyIOBackend()  # to type checkers it is also what stands in where anyio is missing
    stream: httpcore.AsyncNetworkStream = await backend.connect_tcp(address, dial.port, timeout=own.some_left())
    if context is None:
        return stream
    try:
        secure = await stream.start_tls(context, dial.server_name, own.some_left())
        dial.prove(secure.get_extra_info("ssl_object"))
        return secure
    except BaseException:  # httpcore leaves the socket open when it is cancelled
        stream.get_extra_info("socket").close()
        raise


def _root(error: Exception) -> Exception:
    """What the system said; the layers between it and us keep that to themselves."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _reason(error: Exception) -> str:
    return str(_root(error))


def _has_said_something(tls: ssl.SSLObject) -> bool:
    """Whether what the TLS layer has taken from the socket already holds data, or the peer's goodbye."""
    try:
        tls.read(1)
    except ssl.SSLWantReadError:
        return False
    except ssl.SSLError:
        return True
    return True


class Turn:
    """Somebody's turn to have a connection; see `stack.Turn`."""

    def __init__(self) -> None:
        self.gift: Any = None
        self._has_come = anyio.Event()

    def set(self) -> None:
        """It has come."""
        self._has_come.set()

    async def wait(self, left: float) -> bool:
        """Wait for it at most `left` seconds; whether it came."""
        with anyio.move_on_after(left):
            await self._has_come.wait()
        return self._has_come.is_set()
