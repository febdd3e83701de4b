"""The race of two attempts for an async client; see `meshlib.transport.race`, and its twin `race_sync`.

Decides nothing. The first attempt runs in the caller's own task; a backup gets a task of its own when a timer rings. On
asyncio that task is nobody's child, so that a call needs no task group: it holds nothing from the moment it is dropped,
and ends with the loop's next turn. On trio it is a child, since there are no others.

On asyncio a call that gets no backup costs 15 to 20 us of CPU more than in a service without `Hedge`; on trio, which
has no timers but tasks, 150 us.
"""

from __future__ import annotations

import asyncio
from typing import Any

import anyio

from meshlib.transport.loops import on_asyncio, running_loop
from meshlib.transport.network import LONGEST
from meshlib.transport.race import Race, Side


class Interruptible:
    """A block of an asyncio task that another task can end; what `asyncio.timeout` is, without a time.

    anyio's scope would not do: it refuses to be left by a coroutine that is closed when its loop is thrown away.
    """

    _is_cancelled = False

    def __enter__(self) -> Interruptible:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        return self

    def cancel(self) -> None:
        """End the block; once."""
        self._is_cancelled = True
        self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        if not self._is_cancelled:
            return False
        # If somebody else has cancelled the task as well, it is cancelled.
        return self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError


class AsyncRace(Race):
    """See `Race`."""

    _task: asyncio.Task[None] | None = None

    async def run(self) -> tuple[Any, float | None]:
        """See the driver's `_attempt`."""
        reply = None
        try:
            loop: Any = running_loop()
            await (self._on_asyncio(loop) if on_asyncio(loop) else self._on_trio())
            reply, again = self._decided()
        except GeneratorExit:  # its loop was thrown away: maybe from the garbage collector, amid one of the locks
            for side in self._sides:
                self._forsake(side)
            raise
        finally:
            for spare in self._leave(reply):
                await spare.give_up(None)
        return reply, again

    async def _on_asyncio(self, loop: asyncio.AbstractEventLoop) -> None:
        timer = loop.call_later(min(self._delay, LONGEST), self._ring, loop)
        try:
            await self._turn()
        finally:
            timer.cancel()

    async def _on_trio(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._back_up)
            await self._turn()
            group.cancel_scope.cancel()

    async def _turn(self) -> None:
        await self._run(self._first)
        await self._wait()

    async def _run(self, side: Side) -> None:
        """Make one of the attempts."""
        exchange, attempt = self._exchange, side.attempt
        answer = None
        try:
            with self._scope() as side.scope:
                if not side.is_over:
                    side.connection = connection = await self._stacks.take(exchange, attempt)
                    answer = await connection.send(exchange, attempt)
        except GeneratorExit:
            self._forsake(side)
            raise
        except BaseException as error:
            self._broke(side, error)
            if isinstance(error, anyio.get_cancelled_exc_class()):
                raise
        else:
            if answer is None:  # it was dropped
                self._discard(side)
            else:
                self._answered(side, answer)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        """The alarm: start a backup in a task."""
        backup = self._begin_backup()
        if backup is not None:
            # A loop keeps no strong reference to its tasks. The race has one, and nobody who outlives the call.
            self._task = loop.create_task(self._run(backup))

    async def _back_up(self) -> None:
        await anyio.sleep(self._delay)
        backup = self._begin_backup()
        if backup is not None:
            await self._run(backup)

    async def _wait(self) -> None:
        """Wait for the one that is still under way."""
        if not self._is_decided:
            self._arrived = anyio.Event()
            await self._arrived.wait()

    @staticmethod
    def _scope() -> Any:
        return Interruptible() if on_asyncio(running_loop()) else anyio.CancelScope()

    def _interrupt(self, side: Side) -> None:
        self._discard(side)
        if side.scope is not None:
            side.scope.cancel()
