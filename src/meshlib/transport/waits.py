"""Waits for code that is not ours, which nothing but a cancellation can end: inner transports, and callers' bodies.

Decides nothing. Our own streams need none of this: they know their deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio


@contextlib.asynccontextmanager
async def _fail_after(left: float | None) -> AsyncIterator[None]:
    with anyio.fail_after(left):
        yield


def bounded(left: float | None) -> contextlib.AbstractAsyncContextManager[Any]:
    """Cancel what takes longer than `left` seconds, and raise `TimeoutError`; asyncio's own way costs a quarter."""
    return asyncio.timeout(left) if on_asyncio() else _fail_after(left)


def on_asyncio() -> bool:
    """Whether it is asyncio that runs the caller's loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
