"""Whether the application answers.

Decides whom to ask: the event loop that entered the registration, which answers by running a function, or where there
is none, the port; and then the function that the user gave. It never decides what follows from silence. Run on the
control plane, and stands outside what it asks, so that an application that hangs cannot answer for itself.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable

from meshlib.registry.entry import Alive, Entry
from meshlib.registry.readiness import answers


class Liveness:
    """Who is asked.

    Args:
        entry: whose port is asked where there is no loop.
        loop: the application's event loop; None if it has none.
        alive: a function, sync or async, that is true while the application is well; None for none. An async one runs
            on the application's loop, if there is one; any other in a thread.
    """

    def __init__(self, entry: Entry, loop: asyncio.AbstractEventLoop | None, alive: Alive | None) -> None:
        self._entry, self._loop, self._alive = entry, loop, alive

    async def is_well(self) -> bool:
        """Ask, and wait for the answer, for as long as it takes."""
        answered = await (answers(self._entry) if self._loop is None else _turns(self._loop))
        return answered and (self._alive is None or await self._told(self._alive))

    async def _told(self, alive: Alive) -> bool:
        if self._loop is None or not inspect.iscoroutinefunction(alive):
            return await asyncio.get_running_loop().run_in_executor(None, _answer_of, alive)
        coroutine = alive()
        try:
            asked = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop has ended
            coroutine.close()
            return False
        return bool(await asyncio.wrap_future(asked))


def _answer_of(alive: Alive) -> bool:
    """Ask in this thread, on a loop of its own if need be: whatever it does, the control plane is not held up."""
    answer = alive()
    return bool(asyncio.run(_awaited(answer)) if inspect.isawaitable(answer) else answer)


async def _awaited(answer: Awaitable[bool]) -> bool:
    return await answer


async def _turns(loop: asyncio.AbstractEventLoop) -> bool:
    """Wait until a loop has called a function; False if it has ended."""
    ours = asyncio.get_running_loop()
    turned = asyncio.Event()

    def answer() -> None:
        try:
            ours.call_soon_threadsafe(turned.set)
        except RuntimeError:
            pass  # the mesh was closed meanwhile, and nobody waits

    try:
        loop.call_soon_threadsafe(answer)
    except RuntimeError:
        return False
    await turned.wait()
    return True
