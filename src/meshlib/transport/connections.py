"""The connections of one client: a stack per place, for threads under a lock, for event loops one set each.

Decides nothing about a connection (see `meshlib.transport.stack`); it opens them, waits for them, and closes them. That
none was free in time is our own queue, not the endpoint's fault.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

from meshlib.core.report import Attempt
from meshlib.endpoint import Place
from meshlib.fork import inherited
from meshlib.service import Service
from meshlib.transport import network, network_anyio, network_asyncio
from meshlib.transport.draining import Cut
from meshlib.transport.exchange import Exchange
from meshlib.transport.loops import loops, on_asyncio, post, running_loop
from meshlib.transport.network import Bounded, Clock
from meshlib.transport.stack import (
    AsyncConnection,
    C,
    Connection,
    Key,
    Stack,
    SyncTurn,
    abandon_all,
    alive,
    no_slot,
    patience,
)

SLICE = 0.25
"""Seconds after which a thread that waits looks for responses that were garbage-collected meanwhile."""


class SyncStacks:
    """The connections of one sync client; safe for threads.

    Args:
        clock: what ages and deadlines are measured by.

    Attributes:
        orphans: connections whose response was garbage-collected; the next call gives their room away, or whoever
            waits for it. (A finalizer may run while this very thread holds the lock.)
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
        while True:
            with self._lock:
                self._collect_orphans()
                stack = self._stacks.get(key)
                if stack is None:
                    stack = self._stacks[key] = _made_for(exchange, attempt)
                connection = stack.pop(self._clock())
                turn = None
                if connection is None and not stack.reserve():
                    turn = SyncTurn()
                    stack.waiting.append(turn)
            # Looking lets other threads run, so it is done without the lock: they would only run into it.
            if connection is None or not connection.stream.is_readable:
                break
            self.drop(connection)
        if turn is not None:
            connection = self._wait(stack, turn, exchange.slot_timeout, deadline)
            exchange.connected(attempt, self._clock(), queued=True)
        if connection is None:
            connection = self._open(stack, exchange.connect_timeout, deadline)
            exchange.connected(attempt, connection.opened_at)
        else:
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

    def abandon(self, connection: Connection) -> None:
        """Close a connection from a finalizer, which may run anywhere."""
        connection.stream.abandon()
        self.orphans.append(connection)

    def close(self) -> None:
        """Close every idle connection; those in use close when they are put back or dropped."""
        with self._lock:
            self._is_closed = True
            self._collect_orphans()
            for stack in self._stacks.values():
                stack.clear()

    def adopt(self, service: Service) -> None:
        """See `draining.Stacks`."""
        with self._lock:
            _adopt(self._stacks, service)

    def drain(self, service: str, place: Place) -> Cut:
        """See `draining.Stacks`."""
        with self._lock:
            stacks = _taken_from(self._stacks, service, place)

        def cut() -> None:
            with self._lock:
                for connection in [each for stack in stacks for each in stack.open]:
                    connection.stream.cut()

        return cut

    def counts(self) -> Iterator[tuple[str, int, int]]:
        """Idle and used connections to each place, by service; without the lock, so that who looks holds up nobody."""
        return ((key[0], stack.idle, stack.size - stack.idle) for key, stack in list(self._stacks.items()))

    def forget(self) -> None:
        """After a fork, in the child: start anew. The streams see to themselves."""
        self._lock = threading.Lock()
        self._stacks = {}
        self.orphans = deque()

    def _wait(
        self, stack: Stack[Connection], turn: SyncTurn, timeout: float | None, deadline: float
    ) -> Connection | None:
        """Wait for one's turn: a connection, or None for the room to open one."""
        left = patience(timeout, deadline - self._clock())
        try:
            while not turn.wait(min(left, SLICE)):
                left -= SLICE
                if left <= 0:
                    raise no_slot(stack)
                with self._lock:
                    self._collect_orphans()
        except BaseException:
            with self._lock:
                stack.leave(turn, self._clock())
            raise
        given: Connection | None = turn.gift
        with self._lock:
            return alive(given)

    def _open(self, stack: Stack[Connection], timeout: float, deadline: float) -> Connection:
        try:
            stream = network.connect(stack.dial, timeout, Bounded(self._clock, deadline))
        except BaseException:
            with self._lock:
                stack.vacate()
            raise
        stream.arm(deadline)
        connection = Connection(stream, stack, self._clock())
        with self._lock:
            stack.open.add(connection)
        return connection

    def _collect_orphans(self) -> None:
        while self.orphans:
            orphan = self.orphans.popleft()
            orphan.stack.drop(orphan)

    def __del__(self) -> None:
        if abandon_all is not None:  # else the interpreter ends, and has emptied this module; the sockets go with it
            abandon_all(iter(self._stacks.values()), self._is_closed)


class AsyncStacks:
    """The connections of one async client: on each event loop its own, since sockets do not move between loops.

    See `SyncStacks`.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # over the loops, not over what is on them
        self._loops: dict[object, dict[Key, Stack[AsyncConnection]]] = {}
        self._is_closed = False
        inherited.add(self)

    async def take(self, exchange: Exchange, attempt: Attempt) -> AsyncConnection:
        """See `SyncStacks.take`."""
        service, endpoint, deadline = exchange.service, attempt.endpoint, attempt.deadline
        loop = running_loop()
        stacks = self._loops.get(loop)
        if stacks is None:
            stacks = await self._begin_on(loop)
        key = (service.name, endpoint.place, service.tls)
        stack = stacks.get(key)
        if stack is None:
            stack = stacks[key] = _made_for(exchange, attempt)
        while (connection := stack.pop(self._clock())) is not None and connection.stream.is_readable:
            stack.drop(connection)
        if connection is None and not stack.reserve():
            connection = await self._wait(stack, exchange.slot_timeout, deadline)
            exchange.connected(attempt, self._clock(), queued=True)
        if connection is None:
            connection = await self._open(loop, stack, exchange.connect_timeout, deadline)
            exchange.connected(attempt, connection.opened_at)
        else:
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

    def abandon(self, connection: AsyncConnection) -> None:
        """Close a connection from a finalizer, which may run anywhere: its own loop does it, and wakes who waits."""
        if not post(connection.loop, partial(connection.stack.drop, connection)):
            connection.stream.abandon()

    async def aclose(self) -> None:
        """Close every idle connection; those in use close when they are put back or dropped."""
        self._is_closed = True
        here = running_loop()
        for loop, stacks in list(self._loops.items()):
            for stack in list(stacks.values()):
                if loop == here or not post(loop, stack.clear):
                    stack.clear()

    def adopt(self, service: Service) -> None:
        """See `draining.Stacks`."""
        for loop, stacks in list(self._loops.items()):
            post(loop, partial(_adopt, stacks, service))

    def shut(self) -> None:
        """See `aclose`; from any thread: each loop closes its own, at its next turn."""
        self._is_closed = True
        for loop, stacks in list(self._loops.items()):
            for stack in list(stacks.values()):
                if not post(loop, stack.clear):
                    stack.clear()

    def drain(self, service: str, place: Place) -> Cut:
        """See `draining.Stacks`."""
        drained: dict[object, list[Stack[AsyncConnection]]] = {}

        def drain_here(loop: object, stacks: dict[Key, Stack[AsyncConnection]]) -> None:
            drained[loop] = _taken_from(stacks, service, place)

        def cut_here(loop: object) -> None:
            for connection in [each for stack in drained[loop] for each in stack.open]:
                connection.stream.abort()

        def cut() -> None:
            for loop in asked:
                post(loop, partial(cut_here, loop))  # after it has drained, which it may not have done yet

        asked = [loop for loop, stacks in list(self._loops.items()) if post(loop, partial(drain_here, loop, stacks))]
        return cut

    def counts(self) -> Iterator[tuple[str, int, int]]:
        """See `SyncStacks.counts`."""
        for stacks in list(self._loops.values()):
            for key, stack in list(stacks.items()):
                yield key[0], stack.idle, stack.size - stack.idle

    def forget(self) -> None:
        """See `SyncStacks.forget`."""
        self._lock = threading.Lock()
        self._loops = {}

    def _all_stacks(self) -> Iterator[Stack[AsyncConnection]]:
        return (stack for stacks in list(self._loops.values()) for stack in list(stacks.values()))

    async def _begin_on(self, loop: object) -> dict[Key, Stack[AsyncConnection]]:
        """Begin with a new loop, and have done with those that are over."""
        await loops.streams_of(loop)
        with self._lock:
            over = [known for known in self._loops if loops.is_over(known)]
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
            if not await turn.wait(patience(timeout, deadline - self._clock())):
                raise no_slot(stack)
        except BaseException:
            stack.leave(turn, self._clock())
            raise
        given: AsyncConnection | None = turn.gift
        return alive(given)

    async def _open(
        self, loop: object, stack: Stack[AsyncConnection], timeout: float, deadline: float
    ) -> AsyncConnection:
        connect: Any = network_asyncio.connect if on_asyncio(loop) else network_anyio.connect
        try:
            stream = await connect(stack.dial, timeout, Bounded(self._clock, deadline))
        except BaseException:
            stack.vacate()
            raise
        (await loops.streams_of(loop)).add(stream)
        stream.arm(deadline)
        connection = AsyncConnection(stream, stack, self._clock(), loop)
        stack.open.add(connection)
        return connection

    def __del__(self) -> None:
        if abandon_all is not None:  # see `SyncStacks.__del__`
            abandon_all(self._all_stacks(), self._is_closed)


def _made_for(exchange: Exchange, attempt: Attempt) -> Stack[Any]:
    """The stack for an attempt's endpoint, as the settings are now: the call may have begun by others."""
    stack: Stack[Any] = Stack(exchange.service, attempt.endpoint)
    stack.adopt(exchange.cluster.service)
    return stack


def _adopt(stacks: dict[Key, Stack[C]], service: Service) -> None:
    for key, stack in stacks.items():
        if key[0] == service.name:
            stack.adopt(service)


def _taken_from(stacks: dict[Key, Stack[C]], service: str, place: Place) -> list[Stack[C]]:
    """Take out the stacks of one place, draining; a call that is on its way there yet makes a new one."""
    taken = [stacks.pop(key) for key in list(stacks) if key[:2] == (service, place)]
    for stack in taken:
        stack.drain()
    return taken
