"""The body of an answer that comes out of somebody else's transport, within the time there is.

Decides how reading it is cut off at the deadline: an async one by cancelling the read, a sync one between two chunks.
It never decides what the deadline is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import httpcore

from meshlib.transport.network import Bounded
from meshlib.transport.waits import within

CLOSING = 0.03
"""Seconds that closing a body may take beyond the deadline."""


class SyncInnerBody:
    """The body of an answer, given up between two chunks when the deadline has passed.

    Args:
        stream: the inner transport's.
        bounds: whose deadline holds.
    """

    def __init__(self, stream: Any, bounds: Bounded) -> None:
        self._stream = stream
        self._bounds = bounds

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            left = self._bounds.left(None)
            if left is not None and left <= 0:
                raise httpcore.ReadTimeout("no time left to read")
            yield chunk

    def close(self) -> None:
        """The caller is done with it."""
        self._stream.close()


class InnerBody(AsyncIterator[bytes]):
    """The body of an answer, bounded by the deadline.

    Args:
        stream: the inner transport's.
        bounds: whose deadline holds.
    """

    def __init__(self, stream: Any, bounds: Bounded) -> None:
        self._stream = stream
        self._bounds = bounds
        self._chunks: Any = None
        self._is_reading = False
        self._is_closed = False

    async def __anext__(self) -> bytes:
        if self._chunks is None:
            self._chunks = aiter(self._stream)
        left = self._bounds.left(None)
        self._is_reading = True
        try:
            chunk: bytes = await within(left, anext(self._chunks))
        except TimeoutError as error:
            raise httpcore.ReadTimeout("the read timed out") from error
        finally:
            self._is_reading = False
        if left is not None and left <= 0:  # it was all here, so there was nothing to cancel
            raise httpcore.ReadTimeout("no time left to read")
        return chunk

    async def aclose(self) -> None:
        """The caller is done with it. A generator left half-way would be cleaned up by the loop, which trio minds."""
        if self._is_closed:
            return
        self._is_closed = True
        left = self._bounds.left(None)
        try:
            await within(None if left is None else max(left, CLOSING), self._close())
        except TimeoutError:
            pass  # it is as closed as it will be; the caller's time is over

    async def _close(self) -> None:
        try:
            if isinstance(self._chunks, AsyncGenerator) and not self._is_reading:
                await self._chunks.aclose()
        finally:
            await self._stream.aclose()
