"""Waits for code that is not ours, which nothing but a cancellation can end: inner transports, and callers' bodies.

Decides nothing. Our own streams need none of this: they know their deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from types import CoroutineType, coroutine
from typing import Any

import anyio

from meshlib.transport.loops import on_asyncio, running_loop


async def within(left: float | None, awaited: Awaitable[Any]) -> Any:
    """Cancel what takes longer than `left` seconds, and raise `TimeoutError`."""
    if not on_asyncio(running_loop()):
        with anyio.fail_after(left):
            return await awaited
    if not isinstance(awaited, CoroutineType):
        async with asyncio.timeout(left):
            return await awaited
    try:
        waits_for = awaited.send(None)
    except StopIteration as ended:
        return ended.value  # at once: no timer is needed, which is a quarter of what the mesh costs here
    async with asyncio.timeout(left):
        return await _resumed(awaited, waits_for)


@coroutine
def _resumed(started: CoroutineType[Any, Any, Any], waits_for: Any) -> Generator[Any, Any, Any]:
    """What `await` would do with a coroutine, from its first wait on."""
    while True:
        try:
            try:
                sent = yield waits_for
            except BaseException as error:
                waits_for = started.throw(error)
            else:
                waits_for = started.send(sent)
        except StopIteration as ended:
            return ended.value
