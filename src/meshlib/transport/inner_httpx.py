"""httpx's own async transport under the mesh, on asyncio, where it must not be cancelled just anywhere.

httpcore's pool loses a slot for good when a request that has been given a connection is cancelled, or runs into the
pool timeout, before it has begun to use it; and when a response is cancelled while it is being closed. So each attempt
and each closing runs in a task of its own, the pool gets no timeout, and httpcore's `trace` tells how far a request is.
Decides what becomes of an attempt that nobody waits for any more: if its request is being sent it is cancelled, which
closes the connection and frees the slot; else it is stopped when it would connect or send. So nothing is sent for a
call that has ended. It never looks into the transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpcore
import httpx

Tasks = set[asyncio.Task[Any]]
"""What nobody waits for; the loop alone would let go of it half-way."""

CONNECTS = (".connect_tcp.started", ".connect_unix_socket.started")
SENDS = ".send_request_headers.started"


class Gate:
    """What a request passes on its way; httpcore's `trace`. An exception here leaves the pool in order.

    Args:
        trace: the caller's own, if any.

    Attributes:
        is_shut: whether nothing may be sent any more.
        is_connecting: whether a connection is being made for the request.
        is_sending: whether it is being sent, or has been.
    """

    def __init__(self, trace: Any) -> None:
        self.is_shut = self.is_connecting = self.is_sending = False
        self._trace = trace

    async def __call__(self, name: str, info: dict[str, Any]) -> None:
        """See httpcore's `trace` extension."""
        if name.endswith(SENDS):
            self._pass()
            self.is_sending = True
        elif name.endswith(CONNECTS):
            self._pass()
            self.is_connecting = True
        if self._trace is not None:
            await self._trace(name, info)

    def _pass(self) -> None:
        if self.is_shut:
            raise asyncio.CancelledError

    @property
    def is_queued(self) -> bool:
        """Whether the request still waits for the pool."""
        return not (self.is_connecting or self.is_sending)

    def timeout(self) -> httpcore.TimeoutException:
        """What it was that took so long."""
        if self.is_queued:
            return httpcore.PoolTimeout("no connection became free in time")
        kind = httpcore.ReadTimeout if self.is_sending else httpcore.ConnectTimeout
        return kind("the attempt timed out")


class CancellableTransport(httpx.AsyncBaseTransport):
    """An `httpx.AsyncHTTPTransport` that may be cancelled.

    Args:
        transport: it.
    """

    def __init__(self, transport: httpx.AsyncHTTPTransport) -> None:
        self._transport = transport
        self._abandoned: Tasks = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See `httpx.AsyncBaseTransport`."""
        gate = request.extensions["trace"] = Gate(request.extensions.get("trace"))
        patience = request.extensions["timeout"].pop("pool")
        task = asyncio.ensure_future(self._transport.handle_async_request(request))
        try:
            await asyncio.wait((task,), timeout=patience)
            if not task.done():
                if gate.is_queued:
                    raise httpx.PoolTimeout("no connection became free in time")
                await asyncio.wait((task,))
        except BaseException as error:
            self._abandon(task, gate)
            if gate.is_sending and isinstance(error, asyncio.CancelledError):
                await _ended(task)
            raise
        response = task.result()
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = CancellableStream(response.stream, self._abandoned)
        return response

    async def aclose(self) -> None:
        """End what was abandoned, and close the transport."""
        for task in self._abandoned:
            task.cancel()
        if self._abandoned:
            await asyncio.wait(self._abandoned)
        await self._transport.aclose()

    def _abandon(self, task: asyncio.Task[httpx.Response], gate: Gate) -> None:
        gate.is_shut = True
        if gate.is_sending:
            task.cancel()
        self._abandoned.add(task)
        task.add_done_callback(self._abandoned.discard)
        task.add_done_callback(_heard)


class CancellableStream(httpx.AsyncByteStream):
    """The body of such a transport's answer, closed even if who closes it is cancelled.

    Args:
        stream: it.
        abandoned: where the closing is kept.
    """

    def __init__(self, stream: httpx.AsyncByteStream, abandoned: Tasks) -> None:
        self._stream = stream
        self._abandoned = abandoned

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._stream)

    async def aclose(self) -> None:
        """See `httpx.AsyncByteStream`."""
        closing = asyncio.ensure_future(self._stream.aclose())
        self._abandoned.add(closing)
        closing.add_done_callback(self._abandoned.discard)
        await asyncio.shield(closing)


async def _ended(task: asyncio.Task[httpx.Response]) -> None:
    """Wait for a cancelled attempt, so that the request's body is no longer read, and close what it still brought."""
    await asyncio.wait((task,))
    if not task.cancelled() and task.exception() is None:
        await task.result().aclose()


def _heard(task: asyncio.Task[httpx.Response]) -> None:
    """Nobody else is left to hear of an error, and asyncio would log it."""
    if not task.cancelled():
        task.exception()
