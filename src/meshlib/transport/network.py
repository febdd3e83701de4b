"""Deadline-bound network streams, and the sync one.

Decides how long a single connect, send or receive may take: the given timeout, or what is left until the deadline of
the attempt that uses the stream, whichever is less. So whatever a peer does, drip, stall or say "100 Continue" for
ever, the attempt ends on time without a watchdog and without cancelling anything. A stream also knows whether a byte of
the request was written, which is the proof that a request may be repeated. It never retries and never logs.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import httpcore

Clock = Callable[[], float]

LOOPBACKS = ("127.0.0.1", "::1")
"""What `localhost` means (RFC 6761, section 6.3), without asking anybody."""


class Bounded:
    """What the streams of both colours share: the bounds of the attempt that uses them, and what it did.

    Args:
        clock: what deadlines are measured by.
        deadline: see below; default none.

    Attributes:
        deadline: no read or write lasts longer than this instant.
        sent: whether a byte was handed to the kernel since `arm`.
        answered: whether a byte was received since `arm`.
    """

    def __init__(self, clock: Clock, deadline: float = math.inf) -> None:
        self._clock = clock
        self.arm(deadline)

    def arm(self, deadline: float) -> None:
        """A new attempt takes the stream over."""
        self.deadline = deadline
        self.sent = self.answered = False

    def left(self, timeout: float | None) -> float | None:
        """Seconds that the next operation may take; not above 0 if none; None if there is no bound at all."""
        if self.deadline == math.inf:
            return timeout
        left = self.deadline - self._clock()
        return left if timeout is None or left < timeout else timeout


class Stream(Bounded, httpcore.NetworkStream):
    """A connected socket.

    Args:
        sock: the socket; the stream owns it.
        clock: what deadlines are measured by.
    """

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        super().__init__(clock)
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Wait for some bytes; none means that the peer has closed."""
        left = self.left(timeout)
        if left is not None and left <= 0:
            raise httpcore.ReadTimeout("no time left to read")
        try:
            self._sock.settimeout(left)
            data = self._sock.recv(max_bytes)
        except TimeoutError as error:
            raise httpcore.ReadTimeout("the read timed out") from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error
        self.answered = self.answered or bool(data)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it. The time left is looked at before every chunk: a slow reader does not get it anew."""
        rest = memoryview(buffer)
        while rest:
            left = self.left(timeout)
            if left is not None and left <= 0:
                raise httpcore.WriteTimeout("no time left to write")
            try:
                self._sock.settimeout(left)
                written = self._sock.send(rest)
            except TimeoutError as error:
                raise httpcore.WriteTimeout("the write timed out") from error
            except OSError as error:
                raise httpcore.WriteError(str(error)) from error
            self.sent = True
            rest = rest[written:]

    def close(self) -> None:
        """Close at once; more than once is fine."""
        self._sock.close()

    abort = close

    @property
    def is_readable(self) -> bool:
        """Whether something can be read. On an idle connection that means the peer has closed it."""
        return self._sock.fileno() < 0 or bool(self._poll.poll(0))

    def get_extra_info(self, info: str) -> Any:
        """See `httpcore.NetworkStream`."""
        return socket_info(self._sock, info, self)


def connect(host: str, port: int, *, timeout: float | None, deadline: float, clock: Clock) -> Stream:
    """Open a connection to an address.

    Args:
        host: an IP address or `localhost`.
        port: the port.
        timeout: bound for each address, in seconds.
        deadline: bound for all of it.
        clock: what the deadline is measured by.

    Raises:
        httpcore.ConnectTimeout, httpcore.ConnectError: the last address's failure.
    """
    last: Exception | None = None
    for address, left in dials(host, timeout, Bounded(clock, deadline)):
        sock = open_socket(address)
        try:
            sock.settimeout(left)
            sock.connect((address, port))
        except BaseException as error:  # whatever it is, the socket goes
            sock.close()
            if not isinstance(error, OSError):
                raise
            last = error
        else:
            return Stream(sock, clock)
    raise connect_error(last, host, port)


def dials(host: str, timeout: float | None, bounds: Bounded) -> Iterator[tuple[str, float | None]]:
    """The addresses to dial, in order, each with the seconds it may take, until no time is left."""
    for address in LOOPBACKS if host == "localhost" else (host,):
        left = bounds.left(timeout)
        if left is not None and left <= 0:
            return
        yield address, left


def open_socket(address: str) -> socket.socket:
    """A TCP socket of the address's family, without Nagle's delay: requests go out in one piece anyway."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def connect_error(error: Exception | None, host: str, port: int) -> Exception:
    """The failure to connect, in httpcore's classes and with the place in it."""
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if error is None or isinstance(error, TimeoutError):
        timeout = httpcore.ConnectTimeout(f"connecting to {place} timed out")
        timeout.__cause__ = error
        return timeout
    refused = httpcore.ConnectError(f"connecting to {place} failed: {error.strerror if isinstance(error, OSError) and error.strerror else error}")
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
            return sock if isinstance(sock, ssl.SSLSocket) else None
    return None
