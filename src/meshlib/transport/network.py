"""Deadline-bound network streams, and the sync one.

Decides how long a single connect, send or receive may take: the given timeout, or what is left until the deadline of
the attempt that uses the stream, whichever is less. So whatever a peer does, drip, stall or say "100 Continue" for
ever, the attempt ends on time without a watchdog and without cancelling anything. A stream also knows whether a byte of
the request was written, which is the proof that a request may be repeated. It never retries and never logs.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import httpcore

from meshlib.endpoint import joined
from meshlib.fork import close_inherited, inherited
from meshlib.policy import TLS
from meshlib.transport.tls import IdentityError, context_for, is_plain, unproven, whom, why_stranger

Clock = Callable[[], float]

LONGEST = 1e6
"""Seconds of a single wait: about eleven days. The system counts no further than some weeks."""

PIECE = 256 * 1024
"""Bytes handed to an event loop's transport at once. All of a long body would be copied, or encrypted, in one go, and
nothing else would run meanwhile."""

LOOPBACKS = ("127.0.0.1", "::1")
"""What `localhost` means (RFC 6761, section 6.3), without asking anybody."""


def pieces(buffer: bytes) -> Iterator[bytes | memoryview]:
    """A buffer in pieces that can be handed on at once; most are one."""
    if len(buffer) <= PIECE:
        return iter((buffer,))
    view = memoryview(buffer)
    return (view[start : start + PIECE] for start in range(0, len(view), PIECE))


class Bounded:
    """What the streams of both colours share: the bounds of the attempt that uses them, and what it did.

    Args:
        clock: what deadlines are measured by.
        deadline: see below; default none.

    Attributes:
        clock: see above.
        deadline: no read or write lasts longer than this instant.
        sent: whether a byte was handed to the kernel since `arm`.
        answered: whether a byte was received since `arm`.
        is_awaited: whether somebody waits for it at this moment, as far as that is known.
    """

    is_awaited = False

    def __init__(self, clock: Clock, deadline: float = math.inf) -> None:
        self.clock = clock
        self.arm(deadline)

    @property
    def is_closed(self) -> bool:
        """Whether its socket is gone."""
        return bool(self.get_extra_info("socket").fileno() < 0)

    def get_extra_info(self, info: str) -> Any:
        """See `httpcore.NetworkStream`."""
        raise NotImplementedError

    def abort(self) -> None:
        """Drop the connection without waiting, from whatever state; more than once is fine."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Drop the connection from a finalizer, which may run anywhere: nothing but the descriptor is touched."""
        self.forget()

    def forget(self) -> None:
        """After a fork, in the child: close the descriptor, and nothing else; the connection is the parent's."""
        descriptor = self.get_extra_info("socket").detach()
        if descriptor >= 0:
            close_inherited(descriptor)

    def arm(self, deadline: float) -> None:
        """A new attempt takes the stream over."""
        self.deadline = deadline
        self.sent = self.answered = False

    def left(self, timeout: float | None) -> float | None:
        """Seconds that the next operation may take; not above 0 if none; None if there is no bound at all."""
        if self.deadline == math.inf:
            return timeout
        left = self.deadline - self.clock()
        return left if timeout is None or left < timeout else timeout

    def some_left(self) -> float:
        """Seconds until the deadline, which is a finite one.

        Raises:
            TimeoutError: if there are none.
        """
        left = self.deadline - self.clock()
        if left <= 0:
            raise TimeoutError
        return left


class Poll(Protocol):
    """What waits for a socket: a `select.poll`, or one with an alarm."""

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        """Wait so many milliseconds at most."""
        ...


class AlarmedPoll:
    """A poll that rings an alarm when the time for it comes while it waits.

    Args:
        poll: what waits.
        clock, at: when the time comes.
        ring: the alarm.
    """

    def __init__(self, poll: Poll, clock: Clock, at: float, ring: Callable[[], object]) -> None:
        self._poll = poll
        self._clock = clock
        self._at = at
        self._ring = ring

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        """See `Poll.poll`."""
        started = self._clock()
        before = max(0, ceil(min(self._at - started, LONGEST) * 1000))
        if timeout is None or before < timeout:
            if ready := self._poll.poll(before):
                return ready
            self._ring()
        if timeout is None:
            return self._poll.poll()
        return self._poll.poll(max(0, ceil(timeout - (self._clock() - started) * 1000)))


class Stream(Bounded, httpcore.NetworkStream):
    """A connected socket.

    Args:
        sock: the socket; the stream owns it.
        clock: what deadlines are measured by.
    """

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        super().__init__(clock)
        sock.setblocking(False)  # a timeout of its own would cost two more system calls for each of ours
        self._sock = sock
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        self._readable: Poll = select.poll()
        self._writable: Poll = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)
        inherited.add(self)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Wait for some bytes; none means that the peer has closed."""
        # TLS may have taken from the socket already what is asked for; on a plain one nothing is there as a rule.
        waiting = None if self._is_tls else self._readable
        while True:
            if not self._wait(waiting, timeout):
                raise httpcore.ReadTimeout("the read timed out")
            try:
                data = self._sock.recv(max_bytes)
            except (BlockingIOError, ssl.SSLWantReadError):
                waiting = self._readable
            except ssl.SSLWantWriteError:
                waiting = self._writable
            except OSError as error:
                raise httpcore.ReadError(str(error)) from error
            else:
                self.answered = self.answered or bool(data)
                return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it. The time left is looked at before every chunk: a slow reader does not get it anew."""
        for piece in pieces(buffer):
            self._write(memoryview(piece), timeout)

    def _write(self, rest: memoryview, timeout: float | None) -> None:
        waiting = None
        while rest:
            if not self._wait(waiting, timeout):
                raise httpcore.WriteTimeout("the write timed out")
            try:
                self.sent = True
                rest = rest[self._sock.send(rest) :]
                waiting = None
            except (BlockingIOError, ssl.SSLWantWriteError):
                waiting = self._writable
            except ssl.SSLWantReadError:
                waiting = self._readable
            except OSError as error:
                raise httpcore.WriteError(str(error)) from error

    def _wait(self, until: Poll | None, timeout: float | None) -> bool:
        """Wait for the socket, if for anything; False if no time is left."""
        left = self.left(timeout)
        if left is None:
            return until is None or bool(until.poll())
        return left > 0 and (until is None or bool(until.poll(ceil(min(left, LONGEST) * 1000))))

    @contextlib.contextmanager
    def ringing(self, at: float, ring: Callable[[], object]) -> Iterator[None]:
        """Have `ring` called, once, by whoever waits for the socket at the instant `at`, and then goes on to wait."""
        polls = self._readable, self._writable

        def due() -> None:
            self._readable, self._writable = polls
            ring()

        self._readable, self._writable = (AlarmedPoll(poll, self.clock, at, due) for poll in polls)
        try:
            yield
        finally:
            self._readable, self._writable = polls

    def close(self) -> None:
        """Close at once; more than once is fine."""
        self._sock.close()

    def abort(self) -> None:
        """See `Bounded.abort`."""
        self._sock.close()

    def cut(self) -> None:
        """End whatever another thread is doing with it; that one closes it."""
        try:
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # past TLS, whose state is the other thread's
        except OSError:
            pass  # it is closed, or its peer has gone

    @property
    def ssl_object(self) -> ssl.SSLSocket | None:
        """The TLS side of the connection, if it has one."""
        return self._sock if isinstance(self._sock, ssl.SSLSocket) else None

    @property
    def is_readable(self) -> bool:
        """Whether something can be read. On an idle connection that means the peer has closed it."""
        return self._sock.fileno() < 0 or bool(self._readable.poll(0))

    def get_extra_info(self, info: str) -> Any:
        """See `httpcore.NetworkStream`."""
        return socket_info(self._sock, info, self)


@dataclass(frozen=True, slots=True)
class Dial:
    """Where a connection goes.

    Attributes:
        host: an IP address or `localhost`.
        port: the port.
        tls: how TLS is spoken; None for not at all.
        server_name: the name that is asked for, and that the peer's certificate must carry if no SPIFFE id is.
    """

    host: str
    port: int
    tls: TLS | None = None
    server_name: str | None = None

    def __str__(self) -> str:
        return joined(self.host, self.port)

    @property
    def context(self) -> ssl.SSLContext | None:
        """For a connection that is opened now: its files may have been replaced since the last one."""
        return None if self.tls is None else context_for(self.tls)

    def prove(self, peer: Any) -> None:
        """The rest of the handshake: look at whom the peer has proved to be, before anything is sent.

        Args:
            peer: the connection's TLS side, if it has one.

        Raises:
            IdentityError: if it is somebody else.
            httpcore.ConnectError: if it was offered another protocol, and took it.
        """
        if self.tls is None:
            return
        if (why := why_stranger(self.tls, peer)) is not None:
            raise self.stranger(why)
        if (spoken := peer.selected_alpn_protocol()) is not None and not spoken.startswith("http/1"):
            raise httpcore.ConnectError(f"{self} speaks {spoken}, which the context of TLS(verify=...) must not offer")

    def stranger(self, why: str) -> IdentityError:
        """The error that says so."""
        assert self.tls is not None
        return IdentityError(f"{self} has not proved to be {whom(self.tls, self.server_name)}: {why}")

    def addresses(self, timeout: float, bounds: Bounded) -> Iterator[tuple[str, Bounded]]:
        """The addresses to dial, in order, each with bounds of its own, until no time is left."""
        for address in LOOPBACKS if self.host == "localhost" else (self.host,):
            now = bounds.clock()
            if now >= bounds.deadline:
                return
            yield address, Bounded(bounds.clock, min(bounds.deadline, now + timeout))


def connect(dial: Dial, timeout: float, bounds: Bounded) -> Stream:
    """Open a connection, the TLS handshake included.

    Args:
        dial: where to.
        timeout: for each address, in seconds.
        bounds: for all of it.

    Raises:
        httpcore.ConnectTimeout, httpcore.ConnectError: the last address's failure, or that of an address where somebody
            else was: an `IdentityError`.
    """
    context = dial.context
    last: Exception | None = None
    for address, own in dial.addresses(timeout, bounds):
        sock: socket.socket | None = None
        try:
            sock = open_socket(address)
            sock.settimeout(min(own.some_left(), LONGEST))
            sock.connect((address, dial.port))
            if context is not None:
                sock.settimeout(min(own.some_left(), LONGEST))
                # In two steps: by itself it leaves out the handshake where the connection is lost already.
                sock = tls = context.wrap_socket(sock, server_hostname=dial.server_name, do_handshake_on_connect=False)
                tls.do_handshake()
                dial.prove(tls)
        except BaseException as error:  # whatever it is, the socket goes
            if sock is not None:
                sock.close()
            if not isinstance(error, OSError):
                raise
            last = error
            if unproven(error):
                break
        else:
            return Stream(sock, bounds.clock)
    raise connect_error(last, dial)


def open_socket(address: str) -> socket.socket:
    """A TCP socket of the address's family, without Nagle's delay: requests go out in one piece anyway."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def connect_error(error: Exception | None, dial: Dial) -> Exception:
    """The failure to connect, in httpcore's classes and with the place in it."""
    if error is None or isinstance(error, TimeoutError):
        timeout = httpcore.ConnectTimeout(f"connecting to {dial} timed out")
        timeout.__cause__ = error
        return timeout
    if (wrong := unproven(error)) is not None:
        stranger = dial.stranger(f"certificate verify failed: {wrong.verify_message}")
        stranger.__cause__ = wrong
        return stranger
    said = (isinstance(error, OSError) and error.strerror) or str(error) or "the peer closed the connection"
    if is_plain(error):
        said = f"it does not answer in TLS ({said})"
    refused = httpcore.ConnectError(f"connecting to {dial} failed: {said}")
    refused.__cause__ = error
    return refused


def socket_info(sock: Any, info: str, stream: Any) -> Any:
    """What httpx's users may ask of a stream."""
    match info:
        case "socket":
            return sock
        case "client_addr":
            return sock.getsockname()
        case "server_addr":
            return sock.getpeername()
        case "is_readable":
            return stream.is_readable
        case "ssl_object":
            return stream.ssl_object
    return None
