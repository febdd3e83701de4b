"""Event loops: which one runs, how to reach another one, and what happens when one ends.

Decides that streams are closed with their loop. Afterwards nobody could do it well: an asyncio transport closes through
its loop, and complains if that is gone. What asyncio, uvloop and trio tell of their end they tell to async generators
alone, so one generator for each loop waits for it. It never starts, runs or stops a loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any
from weakref import WeakSet

import anyio.lowlevel

from meshlib.fork import inherited, strays
from meshlib.transport.network import Bounded


class Loops:
    """The loops of this process that have streams of ours, of whichever client."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Any, WeakSet[Bounded]]] = {}
        inherited.add(self)

    async def streams_of(self, loop: object) -> WeakSet[Bounded]:
        """Those that are closed when the loop ends, which must be the running one."""
        if loop not in self._known:
            for other in list(self._known):
                if self.is_over(other):
                    self._known.pop(other, None)
            streams: WeakSet[Bounded] = WeakSet()
            waiting = _close_at_the_end(streams)
            await anext(waiting)  # by this the loop comes to know of it
            self._known[loop] = waiting, streams
        return self._known[loop][1]

    def is_over(self, loop: object) -> bool:
        """Whether a loop that was known has ended."""
        known = self._known.get(loop)
        if isinstance(loop, asyncio.AbstractEventLoop):
            return known is None or loop.is_closed()
        return known is None or known[0].ag_frame is None

    def forget(self) -> None:
        """After a fork, in the child: the loops are the parent's."""
        strays.append(self._known)
        self._known = {}


loops = Loops()


def running_loop() -> object:
    """The event loop of the caller, whichever library runs it."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return anyio.lowlevel.current_token()
    # trio may be a guest of asyncio's loop; then it runs in none of its tasks.
    return loop if asyncio.current_task(loop) is not None else anyio.lowlevel.current_token()


def on_asyncio(loop: object) -> bool:
    """Whether it is asyncio that runs the loop."""
    return isinstance(loop, asyncio.AbstractEventLoop)


def post(loop: Any, work: Callable[[], object]) -> bool:
    """Have a loop do something soon; from any thread, also from a finalizer. False if the loop is over."""
    try:
        if on_asyncio(loop):
            loop.call_soon_threadsafe(work)
        else:
            getattr(loop, "native_token", loop).run_sync_soon(work)
    except RuntimeError:
        return False
    return True


def spawn(loop: Any, job: Callable[[], Coroutine[Any, Any, object]]) -> bool:
    """Have a loop run a coroutine in a task of its own; from any thread. False if the loop is over."""

    def start() -> None:
        if on_asyncio(loop):
            task = loop.create_task(job())
            _spawned.add(task)
            task.add_done_callback(_spawned.discard)
        else:
            import trio

            trio.lowlevel.spawn_system_task(job)

    return post(loop, start)


_spawned: set[asyncio.Task[object]] = set()
"""A loop keeps no strong reference to its tasks."""


async def _close_at_the_end(streams: WeakSet[Bounded]) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        for stream in list(streams):
            # Another generator may be at its own clean-up, and in the middle of a call.
            if not stream.is_awaited:
                stream.abort()
