"""The connections to one place: a LIFO stack of idle ones, room for more, and a queue for those who find neither.

Decides which connection goes next, when one is too old or too many, and who is next in the queue. The one used last
goes first: it is the likeliest to be alive, and the others can age and go. It opens nothing and locks nothing; its
owner, in `meshlib.transport.connections`, does.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Iterator
from math import inf
from typing import Any, Generic, Protocol, TypeVar

import httpcore

from meshlib.core.report import Attempt
from meshlib.endpoint import Endpoint, Place
from meshlib.policy import TLS
from meshlib.service import Service
from meshlib.transport import network, network_anyio, network_asyncio
from meshlib.transport.binding import Answer
from meshlib.transport.exchange import Exchange
from meshlib.transport.http1 import Http1, asend, send
from meshlib.transport.network import Dial

Key = tuple[str, Place, TLS | None]
"""What connections are kept apart by: two services never share one, nor do two ways to speak TLS."""


class Connection:
    """One sync connection.

    Args:
        stream: the connected stream.
        stack: where it belongs.
        now: the time.

    Attributes:
        is_reused: whether it has carried a request before.
    """

    def __init__(self, stream: network.Stream, stack: Stack[Connection], now: float) -> None:
        self.stream = stream
        self.stack = stack
        self.opened_at = self.idle_since = now
        self.is_reused = False
        self._http = Http1()

    def renew(self) -> bool:
        """Make ready for another request after a response has ended; False if there can be none."""
        return self._http.renew()

    def send(self, exchange: Exchange, attempt: Attempt) -> Answer:
        """Send the request and wait for the headers."""
        exchange.body.bounds = self.stream
        return send(self._http, self.stream, exchange, attempt)


class AsyncConnection:
    """One async connection, of the event loop `loop`; see `Connection`."""

    def __init__(
        self,
        stream: network_asyncio.AsyncioStream | network_anyio.AnyIOStream,
        stack: Stack[AsyncConnection],
        now: float,
        loop: object,
    ) -> None:
        self.loop = loop
        self.stream = stream
        self.stack = stack
        self.opened_at = self.idle_since = now
        self.is_reused = False
        self._http = Http1()

    def renew(self) -> bool:
        """See `Connection.renew`."""
        return self._http.renew()

    async def send(self, exchange: Exchange, attempt: Attempt) -> Answer:
        """See `Connection.send`."""
        exchange.body.bounds = self.stream
        return await asend(self._http, self.stream, exchange, attempt)


def dial_to(service: Service, endpoint: Endpoint) -> Dial:
    """How connections to a service's endpoint are opened: over TLS to the service's name, never the address."""
    if service.tls is None:
        return Dial(endpoint.host, endpoint.port)
    return Dial(endpoint.host, endpoint.port, service.tls, service.tls.server_name or service.name)


class Turn(Protocol):
    """What somebody who waits for a connection is given one by."""

    gift: Any
    """A connection, or None for the room to open one."""

    def set(self) -> None:
        """It has come."""


class SyncTurn(threading.Event):
    """See `Turn`."""

    gift: Any = None


C = TypeVar("C", Connection, AsyncConnection)


class Stack(Generic[C]):
    """The connections to one place, in use and idle. Not locked: its owner sees to that.

    Args:
        service: whose endpoint it is.
        endpoint: the place.

    Attributes:
        dial: how a new connection is opened.
        size: connections open or being opened.
        open: those that are open, in use as well: so that the garbage collector finds a response, and never its socket,
            whose own finalizer would complain.
        waiting: those who wait for one, first come first. What becomes free is handed to them, so nobody who comes
            later can take it.
    """

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        self.dial = dial_to(service, endpoint)
        self.settings = service.connections
        self._tls = service.tls
        self.size = 0
        self.open: set[C] = set()
        self.waiting: deque[Turn] = deque()
        self._idle: deque[C] = deque()
        self._max_idle = service.connections.max_idle

    def adopt(self, service: Service) -> None:
        """Go by other settings; more room goes to those who wait.

        Connections beyond a lower bound end with the responses that they carry, and all of them if TLS has changed:
        those who spoke by the old settings are the last to use them.
        """
        self.settings = service.connections
        self._max_idle = service.connections.max_idle if service.tls == self._tls else 0
        while len(self._idle) > self._max_idle:
            self.drop(self._idle.popleft())
        while self.waiting and self.reserve():
            self.vacate()
        for connection in list(self.open)[: max(0, self.size - self.settings.max_per_endpoint)]:
            connection.opened_at = -inf

    @property
    def idle(self) -> int:
        """How many connections are idle."""
        return len(self._idle)

    def pop(self, now: float) -> C | None:
        """The idle connection that was used last, if it is not too old. Its peer may have closed it meanwhile."""
        while self._idle:
            connection = self._idle.pop()
            if not self._is_too_old(connection, now):
                return connection
            self.drop(connection)
        return None

    def reserve(self) -> bool:
        """Claim room for one more connection, which is then to be opened."""
        if self.size >= self.settings.max_per_endpoint:
            return False
        self.size += 1
        return True

    def put(self, connection: C, now: float) -> None:
        """Take a connection back after its response has ended."""
        while self._idle and self._is_too_old(self._idle[0], now):
            self.drop(self._idle.popleft())
        connection.idle_since = now
        connection.is_reused = True
        if self._is_too_old(connection, now):
            self.drop(connection)
            return
        if self._hand_over(connection):
            return
        if len(self._idle) >= self._max_idle:
            self.drop(connection)
        else:
            self._idle.append(connection)

    def drop(self, connection: C) -> None:
        """Close a connection and give its room away."""
        self.close(connection)
        self.vacate()

    def close(self, connection: C) -> None:
        """Close a connection and keep its room."""
        self.open.discard(connection)
        connection.stream.abort()

    def vacate(self) -> None:
        """Give up room that was claimed."""
        if self.size > self.settings.max_per_endpoint or not self._hand_over(None):
            self.size -= 1

    def leave(self, turn: Turn, now: float) -> None:
        """Stop waiting; what was given meanwhile goes on to the next."""
        if turn in self.waiting:
            self.waiting.remove(turn)
        elif turn.gift is None:
            self.vacate()
        else:
            self.put(turn.gift, now)

    def clear(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self.drop(self._idle.pop())

    def drain(self) -> None:
        """Keep no connection any more: no new calls are to come, and old ones finish."""
        self._max_idle = 0
        self.clear()

    def _hand_over(self, gift: C | None) -> bool:
        """Give what has become free to the first of those who wait; False if nobody does."""
        if not self.waiting:
            return False
        turn = self.waiting.popleft()
        turn.gift = gift
        turn.set()
        return True

    def _is_too_old(self, connection: C, now: float) -> bool:
        return (
            now - connection.idle_since > self.settings.keepalive or now - connection.opened_at > self.settings.max_age
        )


def alive(given: C | None) -> C | None:
    """A connection that was handed over, unless its peer has closed it meanwhile: then its room is left."""
    if given is not None and given.stream.is_readable:
        given.stack.close(given)
        return None
    return given


def patience(timeout: float | None, left: float) -> float:
    """Seconds to wait for a connection: the client's own bound on that, if it has one, within the attempt's."""
    return max(0.0, left if timeout is None else min(timeout, left))


def no_slot(stack: Stack[Any]) -> httpcore.PoolTimeout:
    return httpcore.PoolTimeout(f"all {stack.settings.max_per_endpoint} connections to {stack.dial} stayed in use")


def abandon_all(stacks: Iterator[Stack[Any]], is_closed: bool) -> None:
    """A client is garbage-collected: free its sockets, and say so if that was left to us."""
    streams = [connection.stream for stack in stacks for connection in stack.open]
    held = [stream for stream in streams if not stream.is_closed]  # the others went with their loop
    for stream in held:
        stream.abandon()
    if held and not is_closed:
        warnings.warn(
            f"unclosed client of a mesh, {len(held)} connections are closed now", ResourceWarning, stacklevel=3
        )
