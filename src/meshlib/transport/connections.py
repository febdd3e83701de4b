"""Connections: one LIFO stack per place, so that taking and returning one costs the same whatever their number.

Decides which connection an attempt uses, when one is too old or too many, and who waits when all are taken. The one
used last goes first: it is the likeliest to be alive, and the others can age and go. It never judges an endpoint: that
no connection was free in time is our own queue, not the endpoint's fault.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio import AbstractEventLoop as EventLoop
from collections import deque
from typing import Any, Generic, TypeVar

import anyio
import anyio.lowlevel
import httpcore

from meshlib.endpoint import Endpoint, Place
from meshlib.policy import Connections
from meshlib.transport import network, network_anyio, network_asyncio
from meshlib.transport.network import Clock


class Connection:
    """One sync connection.

    Args:
        stream: the connected stream.
        stack: where it belongs.
        now: the time.
    """

    def __init__(self, stream: network.Stream, stack: Stack[Connection], now: float) -> None:
        self.stream = stream
        self.stack = stack
        self.http = httpcore.HTTP11Connection(stack.origin, stream)
        self.opened_at = self.idle_since = now
        self.is_reused = False


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
        self.http = httpcore.AsyncHTTP11Connection(stack.origin, stream)
        self.opened_at = self.idle_since = now
        self.is_reused = False


C = TypeVar("C", Connection, AsyncConnection)


class Stack(Generic[C]):
    """The connections to one place, in use and idle. Not locked: its owner sees to that.

    Args:
        endpoint: the place.
        settings: how many, and for how long.
        origin: what httpcore calls the place.

    Attributes:
        size: connections open or being opened.
        waiting: those who wait for one, first come first.
    """

    def __init__(self, endpoint: Endpoint, settings: Connections) -> None:
        self.origin = httpcore.Origin(b"http", endpoint.host.encode("ascii"), endpoint.port)
        self.place = str(endpoint)
        self.settings = settings
        self.size = 0
        self.waiting: deque[threading.Event | anyio.Event] = deque()
        self._idle: deque[C] = deque()

    def pop(self, now: float) -> C | None:
        """The idle connection that was used last, if it is not too old."""
        while self._idle:
            connection = self._idle.pop()
            if not self._is_too_old(connection, now) and not connection.stream.is_readable:
                connection.is_reused = True
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
        if len(self._idle) >= self.settings.max_idle or not connection.http.is_idle():
            self.drop(connection)
        else:
            self._idle.append(connection)
            self.wake_next()

    def drop(self, connection: C) -> None:
        """Close a connection and give its room away."""
        connection.stream.abort()
        self.vacate()

    def vacate(self) -> None:
        """Give up room that was claimed."""
        self.size -= 1
        self.wake_next()

    def wake_next(self) -> None:
        """Let the first of those who wait look again."""
        if self.waiting:
            self.waiting.popleft().set()

    def leave(self, turn: threading.Event | anyio.Event) -> None:
        """Stop waiting; a turn that came too late goes to the next."""
        if turn in self.waiting:
            self.waiting.remove(turn)
        else:
            self.wake_next()

    def clear(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self.drop(self._idle.pop())

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
        self._stacks: dict[tuple[str, Place], Stack[Connection]] = {}
        self._is_closed = False
        self.orphans: deque[Connection] = deque()

    def take(
        self, service: str, endpoint: Endpoint, settings: Connections, *, timeout: float | None, deadline: float
    ) -> Connection:
        """A connection to the endpoint: a kept one, else a new one, else wait for one.

        Args:
            service: the service's name.
            endpoint: where to.
            settings: the service's.
            timeout: bound for connecting, in seconds.
            deadline: bound for all of it.

        Raises:
            httpcore.PoolTimeout: if none became free in time.
            httpcore.ConnectError, httpcore.ConnectTimeout: if a new one could not be opened.
        """
        key = (service, endpoint.place)
        while True:
            with self._lock:
                self._collect_orphans()
                stack = self._stacks.get(key)
                if stack is None:
                    stack = self._stacks[key] = Stack(endpoint, settings)
                if (connection := stack.pop(self._clock())) is not None:
                    connection.stream.arm(deadline)
                    return connection
                if stack.reserve():
                    break
                turn = threading.Event()
                stack.waiting.append(turn)
            self._wait(stack, turn, deadline)
        return self._open(stack, endpoint, timeout, deadline)

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

    def _wait(self, stack: Stack[Connection], turn: threading.Event, deadline: float) -> None:
        try:
            if not turn.wait(max(0.0, deadline - self._clock())):
                raise no_slot(stack)
        except BaseException:
            with self._lock:
                stack.leave(turn)
            raise

    def _open(self, stack: Stack[Connection], endpoint: Endpoint, timeout: float | None, deadline: float) -> Connection:
        host, port = endpoint.place
        try:
            stream = network.connect(host, port, timeout=timeout, deadline=deadline, clock=self._clock)
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


class AsyncStacks:
    """The connections of one async client: on each event loop its own, since sockets do not move between loops.

    See `SyncStacks`.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._loops: dict[object, dict[tuple[str, Place], Stack[AsyncConnection]]] = {}
        self._is_closed = False
        self.orphans: deque[AsyncConnection] = deque()

    async def take(
        self, service: str, endpoint: Endpoint, settings: Connections, *, timeout: float | None, deadline: float
    ) -> AsyncConnection:
        """See `SyncStacks.take`."""
        self._collect_orphans()
        loop = running_loop()
        stacks = self._loops.get(loop)
        if stacks is None:
            stacks = self._adopt(loop)
        key = (service, endpoint.place)
        stack = stacks.get(key)
        if stack is None:
            stack = stacks[key] = Stack(endpoint, settings)
        while True:
            if (connection := stack.pop(self._clock())) is not None:
                connection.stream.arm(deadline)
                return connection
            if stack.reserve():
                connect = network_asyncio.connect if isinstance(loop, EventLoop) else network_anyio.connect
                return await self._open(connect, stack, endpoint, timeout, deadline)
            await self._wait(stack, deadline)

    def put(self, connection: AsyncConnection) -> None:
        """Take a connection back after its response has ended."""
        if self._is_closed:
            connection.stack.drop(connection)
        else:
            connection.stack.put(connection, self._clock())

    def drop(self, connection: AsyncConnection) -> None:
        """Close a connection."""
        connection.stack.drop(connection)

    def close(self) -> None:
        """Close every idle connection; those in use close when they are put back or dropped."""
        self._is_closed = True
        self._collect_orphans()
        for stacks in self._loops.values():
            for stack in stacks.values():
                stack.clear()
        self._loops.clear()

    def _adopt(self, loop: object) -> dict[tuple[str, Place], Stack[AsyncConnection]]:
        """Begin with a new loop; connections of loops that are over are closed."""
        for other in [known for known in self._loops if isinstance(known, EventLoop)]:
            if other.is_closed():
                for stack in self._loops.pop(other).values():
                    stack.clear()
        return self._loops.setdefault(loop, {})

    async def _wait(self, stack: Stack[AsyncConnection], deadline: float) -> None:
        turn = anyio.Event()
        stack.waiting.append(turn)
        try:
            with anyio.move_on_after(max(0.0, deadline - self._clock())):
                await turn.wait()
            if not turn.is_set():
                raise no_slot(stack)
        except BaseException:
            stack.leave(turn)
            raise

    async def _open(
        self,
        connect: Any,
        stack: Stack[AsyncConnection],
        endpoint: Endpoint,
        timeout: float | None,
        deadline: float,
    ) -> AsyncConnection:
        host, port = endpoint.place
        try:
            stream = await connect(host, port, timeout=timeout, deadline=deadline, clock=self._clock)
        except BaseException:
            stack.vacate()
            raise
        stream.arm(deadline)
        return AsyncConnection(stream, stack, self._clock())

    def _collect_orphans(self) -> None:
        while self.orphans:
            orphan = self.orphans.popleft()
            orphan.stack.drop(orphan)


def running_loop() -> object:
    """The event loop of the caller, whichever library runs it."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return anyio.lowlevel.current_token()


def no_slot(stack: Stack[Any]) -> httpcore.PoolTimeout:
    """All connections stayed taken until the deadline."""
    limit = stack.settings.max_per_endpoint
    return httpcore.PoolTimeout(f"all {limit} connections to {stack.place} stayed in use")
