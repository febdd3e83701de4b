"""Connections: one LIFO stack per place, so that taking and returning one costs the same whatever their number.

Decides which connection an attempt uses, when one is too old or too many, and who waits when all are taken. The one
used last goes first: it is the likeliest to be alive, and the others can age and go. It never judges an endpoint: that
no connection was free in time is our own queue, not the endpoint's fault.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import anyio.lowlevel
import httpcore

from meshlib.core.report import Attempt
from meshlib.endpoint import Endpoint, Place
from meshlib.fork import inherited
from meshlib.policy import TLS
from meshlib.service import Service
from meshlib.transport import network, network_anyio, network_asyncio
from meshlib.transport.binding import Answer
from meshlib.transport.exchange import Exchange
from meshlib.transport.network import Bounded, Clock, Dial
from meshlib.transport.tls import context_for

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
        self._http = httpcore.HTTP11Connection(stack.origin, stream)

    @property
    def is_idle(self) -> bool:
        """Whether its last response has ended in a way that lets it be used again."""
        return self._http.is_idle()

    def send(self, exchange: Exchange, attempt: Attempt) -> Answer:
        """Send the request and wait for the headers."""
        return Answer(self._http.handle_request(exchange.core_request(attempt, self.stack.origin)))


class Uncontended:
    """The lock of a connection that its stack hands to one attempt at a time.

    httpcore's own lock gives way to the event loop twice per request, which costs a tenth of a call, and it cannot be
    taken while a coroutine is being closed, so that its clean-up would fail half-way.
    """

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *error: object) -> None:
        pass


UNCONTENDED = Uncontended()


class AsyncConnection:
    """One async connection; see `Connection`."""

    def __init__(
        self,
        stream: network_asyncio.AsyncioStream | network_anyio.AnyIOStream,
        stack: Stack[AsyncConnection],
        now: float,
    ) -> None:
        self.stream = stream
        self.stack = stack
        self.opened_at = self.idle_since = now
        self.is_reused = False
        self._http = httpcore.AsyncHTTP11Connection(stack.origin, stream)
        self._http._state_lock = UNCONTENDED  # type: ignore[assignment]

    @property
    def is_idle(self) -> bool:
        """See `Connection.is_idle`."""
        return self._http.is_idle()

    async def send(self, exchange: Exchange, attempt: Attempt) -> Answer:
        """See `Connection.send`."""
        return Answer(await self._http.handle_async_request(exchange.core_request(attempt, self.stack.origin)))


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
        origin: what httpcore calls the place.
        size: connections open or being opened.
        waiting: those who wait for one, first come first. What becomes free is handed to them, so nobody who comes
            later can take it.
    """

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        context = None if service.tls is None else context_for(service.tls)
        name = None if service.tls is None else service.tls.server_name or service.name
        scheme = b"http" if service.tls is None else b"https"
        self.dial = Dial(endpoint.host, endpoint.port, context, name)
        self.origin = httpcore.Origin(scheme, endpoint.host.encode("ascii"), endpoint.port)
        self.settings = service.connections
        self.size = 0
        self.waiting: deque[Turn] = deque()
        self._idle: deque[C] = deque()

    def pop(self, now: float) -> C | None:
        """The idle connection that was used last, if it is not too old."""
        while self._idle:
            connection = self._idle.pop()
            if not self._is_too_old(connection, now) and not connection.stream.is_readable:
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
        if self._hand_over(connection):
            return
        if len(self._idle) >= self.settings.max_idle:
            self.drop(connection)
        else:
            self._idle.append(connection)

    def drop(self, connection: C) -> None:
        """Close a connection and give its room away."""
        connection.stream.abort()
        self.vacate()

    def vacate(self) -> None:
        """Give up room that was claimed."""
        if not self._hand_over(None):
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

    def streams(self) -> Iterator[Bounded]:
        """The streams of the idle connections."""
        return (connection.stream for connection in self._idle)

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


class SyncStacks:
    """The connections of one sync client; safe for threads.

    Args:
        clock: what ages and deadlines are measured by.

    Attributes:
        orphans: connections whose response was garbage-collected; the next call closes them. (A finalizer may run
            while this very thread holds the lock.)
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stacks: dict[Key, Stack[Connection]] = {}
        self._is_closed = False
        self.orphans: deque[Connection] = deque()
        inherited.add(self)

    def take(self, exchange: Exchange, attempt: Attempt) -> Connection:
        """A connection to the attempt's endpoint: a kept one, else a new one, else wait for one.

        Raises:
            httpcore.PoolTimeout: if none became free in time.
            httpcore.ConnectError, httpcore.ConnectTimeout: if a new one could not be opened.
        """
        service, endpoint, deadline = exchange.service, attempt.endpoint, attempt.deadline
        key = (service.name, endpoint.place, service.tls)
        with self._lock:
            self._collect_orphans()
            stack = self._stacks.get(key)
            if stack is None:
                stack = self._stacks[key] = Stack(service, endpoint)
            connection = stack.pop(self._clock())
            turn = None
            if connection is None and not stack.reserve():
                turn = SyncTurn()
                stack.waiting.append(turn)
        if turn is not None:
            connection = self._wait(stack, turn, exchange.slot_timeout, deadline)
        if connection is None:
            return self._open(stack, exchange.connect_timeout, deadline)
        connection.stream.arm(deadline)
        return connection

    def put(self, connection: Connection) -> None:
        """Take a connection back after its response has ended."""
        with self._lock:
            if self._is_closed:
                connection.stack.drop(connection)
            else:
                connection.stack.put(connection, self._clock())

    def drop(self, connection: Connection) -> None:
        """Close a connection."""
        with self._lock:
            connection.stack.drop(connection)

    def close(self) -> None:
        """Close every idle connection; those in use close when they are put back or dropped."""
        with self._lock:
            self._is_closed = True
            self._collect_orphans()
            for stack in self._stacks.values():
                stack.clear()

    def forget(self) -> None:
        """After a fork, in the child: start anew. The streams see to themselves."""
        self._lock = threading.Lock()
        self._stacks = {}
        self.orphans = deque()

    def _wait(
        self, stack: Stack[Connection], turn: SyncTurn, timeout: float | None, deadline: float
    ) -> Connection | None:
        """Wait for one's turn: a connection, or None for the room to open one."""
        try:
            if not turn.wait(_patience(timeout, deadline - self._clock())):
                raise _no_slot(stack)
        except BaseException:
            with self._lock:
                stack.leave(turn, self._clock())
            raise
        given: Connection | None = turn.gift
        return _alive(given)

    def _open(self, stack: Stack[Connection], timeout: float, deadline: float) -> Connection:
        try:
            stream = network.connect(stack.dial, timeout, Bounded(self._clock, deadline))
        except BaseException:
            with self._lock:
                stack.vacate()
            raise
        stream.arm(deadline)
        return Connection(stream, stack, self._clock())

    def _collect_orphans(self) -> None:
        while self.orphans:
            orphan = self.orphans.popleft()
            orphan.stack.drop(orphan)

    def __del__(self) -> None:
        _warn_unclosed(stack for stack in self._stacks.values())


class AsyncStacks:
    """The connections of one async client: on each event loop its own, since sockets do not move between loops.

    See `SyncStacks`.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # over the loops, not over what is on them
        self._loops: dict[object, dict[Key, Stack[AsyncConnection]]] = {}
        self._is_closed = False
        self.orphans: deque[AsyncConnection] = deque()
        inherited.add(self)

    async def take(self, exchange: Exchange, attempt: Attempt) -> AsyncConnection:
        """See `SyncStacks.take`."""
        service, endpoint, deadline = exchange.service, attempt.endpoint, attempt.deadline
        loop = running_loop()
        stacks = self._loops.get(loop)
        if stacks is None:
            stacks = self._adopt(loop)
        key = (service.name, endpoint.place, service.tls)
        stack = stacks.get(key)
        if stack is None:
            stack = stacks[key] = Stack(service, endpoint)
        if self.orphans:
            self._collect_orphans(stacks)
        connection = stack.pop(self._clock())
        if connection is None and not stack.reserve():
            connection = await self._wait(stack, exchange.slot_timeout, deadline)
        if connection is None:
            return await self._open(loop, stack, exchange.connect_timeout, deadline)
        connection.stream.arm(deadline)
        return connection

    def put(self, connection: AsyncConnection) -> None:
        """Take a connection back after its response has ended."""
        if self._is_closed:
            connection.stack.drop(connection)
        else:
            connection.stack.put(connection, self._clock())

    def drop(self, connection: AsyncConnection) -> None:
        """Close a connection."""
        connection.stack.drop(connection)

    async def aclose(self) -> None:
        """Close every idle connection; those in use close when they are put back or dropped."""
        self._is_closed = True
        self.orphans.clear()  # their sockets are closed; only their room was still to be given away
        for stack in self._all_stacks():
            stack.clear()
        self._loops.clear()

    def forget(self) -> None:
        """See `SyncStacks.forget`."""
        self._lock = threading.Lock()
        self._loops = {}
        self.orphans = deque()

    def _all_stacks(self) -> Iterator[Stack[AsyncConnection]]:
        return (stack for stacks in list(self._loops.values()) for stack in list(stacks.values()))

    def _adopt(self, loop: object) -> dict[Key, Stack[AsyncConnection]]:
        """Begin with a new loop; connections of loops that are over are closed."""
        with self._lock:
            over = [
                known for known in self._loops if isinstance(known, asyncio.AbstractEventLoop) and known.is_closed()
            ]
            stacks = [stack for other in over for stack in self._loops.pop(other).values()]
            mine = self._loops.setdefault(loop, {})
        for stack in stacks:
            stack.clear()
        return mine

    async def _wait(
        self, stack: Stack[AsyncConnection], timeout: float | None, deadline: float
    ) -> AsyncConnection | None:
        """See `SyncStacks._wait`."""
        turn = network_asyncio.Turn() if on_asyncio(running_loop()) else network_anyio.Turn()
        stack.waiting.append(turn)
        try:
            if not await turn.wait(_patience(timeout, deadline - self._clock())):
                raise _no_slot(stack)
        except BaseException:
            stack.leave(turn, self._clock())
            raise
        given: AsyncConnection | None = turn.gift
        return _alive(given)

    async def _open(
        self, loop: object, stack: Stack[AsyncConnection], timeout: float, deadline: float
    ) -> AsyncConnection:
        connect: Any = network_asyncio.connect if isinstance(loop, asyncio.AbstractEventLoop) else network_anyio.connect
        try:
            stream = await connect(stack.dial, timeout, Bounded(self._clock, deadline))
        except BaseException:
            stack.vacate()
            raise
        stream.arm(deadline)
        return AsyncConnection(stream, stack, self._clock())

    def _collect_orphans(self, stacks: dict[Key, Stack[AsyncConnection]]) -> None:
        """Drop the orphans of this loop; those of another are for a call on that one."""
        for _ in range(len(self.orphans)):
            orphan = self.orphans.popleft()
            if orphan.stack in stacks.values():
                orphan.stack.drop(orphan)
            else:
                self.orphans.append(orphan)

    def __del__(self) -> None:
        _warn_unclosed(self._all_stacks())


def running_loop() -> object:
    """The event loop of the caller, whichever library runs it."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return anyio.lowlevel.current_token()


def on_asyncio(loop: object) -> bool:
    """Whether it is asyncio that runs the loop."""
    return isinstance(loop, asyncio.AbstractEventLoop)


def _alive(given: C | None) -> C | None:
    """A connection that was handed over, unless its peer has closed it meanwhile: then its room is left."""
    if given is not None and given.stream.is_readable:
        given.stream.abort()
        return None
    return given


def _patience(timeout: float | None, left: float) -> float:
    """Seconds to wait for a connection: the client's own bound on that, if it has one, within the attempt's."""
    return max(0.0, left if timeout is None else min(timeout, left))


def _no_slot(stack: Stack[Any]) -> httpcore.PoolTimeout:
    return httpcore.PoolTimeout(f"all {stack.settings.max_per_endpoint} connections to {stack.dial} stayed in use")


def _warn_unclosed(stacks: Iterator[Stack[Any]]) -> None:
    """A client is garbage-collected: free its sockets, and say so if that was left to us."""
    idle = [stream for stack in stacks for stream in stack.streams()]
    for stream in idle:
        stream.abandon()
    if idle:
        warnings.warn(
            f"unclosed client of a mesh, {len(idle)} connections are closed now", ResourceWarning, stacklevel=3
        )
