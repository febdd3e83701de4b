"""Attempts over somebody else's transports: what `Mesh(inner=...)` puts in the place of our own connections.

Decides how a transport per endpoint is made, and how its answers and exceptions are read. With it, that nothing was
sent is only known from a failure to connect, and the deadline ends an async attempt by cancelling it; a sync transport
is told the time left as its timeouts. It never looks into a transport.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpcore
import httpx

from meshlib.core.report import Attempt, Report
from meshlib.endpoint import Endpoint, Place
from meshlib.fork import inherited, strays
from meshlib.transport import binding
from meshlib.transport.exchange import Exchange
from meshlib.transport.loops import running_loop
from meshlib.transport.network import Bounded, Clock
from meshlib.transport.waits import bounded, on_asyncio

Factory = Callable[[Endpoint], Any]
"""Makes the transport for an endpoint: an `httpx.BaseTransport`, an `httpx.AsyncBaseTransport`, or both in one."""


class InnerAnswer:
    """A response from an inner transport; see `binding.Answer`."""

    __slots__ = ("_response", "body", "is_closed", "status")

    def __init__(self, response: httpx.Response, body: Any) -> None:
        self._response = response
        self.body = body
        self.is_closed = response.is_closed
        self.status = response.status_code

    def header(self, name: bytes) -> bytes:
        """See `binding.Answer.header`."""
        value: str = self._response.headers.get(name.decode("ascii"), "")
        return value.encode("latin-1", "replace")

    def response(self, stream: Any, report: Report) -> httpx.Response:
        """See `binding.Answer.response`."""
        if not self.is_closed:
            self._response.stream = stream
        self._response.extensions["meshlib"] = report
        return self._response


class InnerStream(Bounded):
    """Stands where a connection's stream stands: it carries the deadline, and what is known of the sending."""

    def __init__(self, clock: Clock, deadline: float) -> None:
        super().__init__(clock, deadline)
        self.sent = True  # unless the exception says otherwise

    def abort(self) -> None:
        """There is nothing to drop: the transport looks after its connections."""

    def abandon(self) -> None:
        """See `abort`."""


class InnerConnection:
    """One attempt's use of a transport.

    Args:
        transport: the endpoint's.
        clock: the mesh's.
        deadline: the attempt's.
    """

    is_reused = False
    is_idle = True

    def __init__(self, transport: Any, clock: Clock, deadline: float) -> None:
        self.stream = InnerStream(clock, deadline)
        self._transport = transport

    def send(self, exchange: Exchange, attempt: Attempt) -> InnerAnswer:
        """Send the request and wait for the headers."""
        try:
            response = self._transport.handle_request(self._request(exchange, attempt))
        except httpx.TransportError as error:
            if error is exchange.body.error:
                raise
            raise self._translated(error) from error
        body = response.stream if response.is_closed else SyncInnerBody(response.stream, self.stream)
        return InnerAnswer(response, body)

    def _request(self, exchange: Exchange, attempt: Attempt) -> httpx.Request:
        exchange.body.deadline = self.stream.deadline
        left = self.stream.deadline - attempt.started
        given = exchange.request.extensions.get("timeout") or {}
        timeout = {
            "connect": _shorter(exchange.connect_timeout, left),
            "read": _shorter(given.get("read"), left),
            "write": _shorter(given.get("write"), left),
            "pool": _shorter(given.get("pool"), left),
        }
        return exchange.inner_request(attempt, timeout)

    def _translated(self, error: httpx.TransportError) -> Exception:
        self.stream.sent = not _failed_to_connect(error)
        return binding.core_error(error)


class AsyncInnerConnection(InnerConnection):
    """See `InnerConnection`."""

    async def send(self, exchange: Exchange, attempt: Attempt) -> InnerAnswer:  # type: ignore[override]
        """See `InnerConnection.send`."""
        request = self._request(exchange, attempt)
        left = self.stream.left(None)
        try:
            if isinstance(self._transport, httpx.AsyncHTTPTransport) and left is not None and on_asyncio():
                response = await _unleashed(self._transport, request, left)
            else:
                async with bounded(left):
                    response = await self._transport.handle_async_request(request)
        except TimeoutError as error:
            raise httpcore.ReadTimeout("the attempt timed out") from error
        except httpx.TransportError as error:
            if error is exchange.body.error:
                raise
            raise self._translated(error) from error
        if isinstance(response.stream, httpx.ByteStream):
            return InnerAnswer(response, response.stream)  # it is all here
        return InnerAnswer(response, InnerBody(response.stream, self.stream))


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


class InnerBody:
    """The body of an answer, bounded by the deadline.

    Args:
        stream: the inner transport's.
        bounds: whose deadline holds.
    """

    def __init__(self, stream: Any, bounds: Bounded) -> None:
        self._stream = stream
        self._bounds = bounds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._stream)
        while True:
            left = self._bounds.left(None)
            try:
                async with bounded(left):
                    chunk = await anext(chunks, None)
            except TimeoutError as error:
                raise httpcore.ReadTimeout("the read timed out") from error
            if chunk is None:
                return
            if left is not None and left <= 0:  # it was all here, so there was nothing to cancel
                raise httpcore.ReadTimeout("no time left to read")
            yield chunk

    async def aclose(self) -> None:
        """The caller is done with it."""
        await self._stream.aclose()


class InnerStacks:
    """The transports of one client; see `connections.SyncStacks`.

    Args:
        factory: makes one for an endpoint.
        clock: the mesh's.
    """

    def __init__(self, factory: Factory, clock: Clock) -> None:
        self._factory = factory
        self._clock = clock
        inherited.add(self)
        self._transports: dict[tuple[str, Place, object], Any] = {}

    def take(self, exchange: Exchange, attempt: Attempt) -> InnerConnection:
        """A use of the endpoint's transport."""
        return InnerConnection(self._transport(exchange, attempt), self._clock, attempt.deadline)

    def put(self, connection: InnerConnection) -> None:
        """The response has ended."""

    def drop(self, connection: InnerConnection) -> None:
        """The response is given up; closing its body has told the transport."""

    def abandon(self, connection: InnerConnection) -> None:
        """The response is garbage, and so is its body, which is the transport's."""

    def close(self) -> None:
        """Close every transport, also when one of them fails to."""
        with contextlib.ExitStack() as stack:
            while self._transports:
                stack.callback(self._transports.popitem()[1].close)

    def forget(self) -> None:
        """After a fork, in the child: the transports are the parent's."""
        strays.append(self._transports)
        self._transports = {}

    def _home(self) -> object:
        """What a transport cannot leave; for a sync one, nothing."""
        return None

    def _transport(self, exchange: Exchange, attempt: Attempt) -> Any:
        key = (exchange.service.name, attempt.endpoint.place, self._home())
        transport = self._transports.get(key)
        if transport is None:
            # Two threads may both make one; the first to store it wins, and an unused transport holds nothing.
            transport = self._transports.setdefault(key, self._factory(attempt.endpoint))
        return transport


class AsyncInnerStacks(InnerStacks):
    """See `InnerStacks`."""

    async def take(self, exchange: Exchange, attempt: Attempt) -> AsyncInnerConnection:  # type: ignore[override]
        """See `InnerStacks.take`."""
        return AsyncInnerConnection(self._transport(exchange, attempt), self._clock, attempt.deadline)

    def _home(self) -> object:
        return running_loop()

    async def aclose(self) -> None:
        """See `InnerStacks.close`."""
        async with contextlib.AsyncExitStack() as stack:
            while self._transports:
                stack.push_async_callback(self._transports.popitem()[1].aclose)


def _failed_to_connect(error: httpx.TransportError) -> bool:
    """Whether the exception says that nothing was sent."""
    if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        return False
    # httpx-aiohttp calls a connection that was lost after the request a ConnectError as well; its cause tells.
    return type(error.__cause__).__name__ not in ("ServerDisconnectedError", "ClientOSError")


_abandoned: set[asyncio.Task[Any]] = set()
"""Attempts nobody waits for any more; the loop itself would let go of them half-way."""


async def _unleashed(transport: httpx.AsyncHTTPTransport, request: httpx.Request, left: float) -> httpx.Response:
    """Run the attempt in a task of its own and leave it alone if it is late.

    httpx's own pool loses a slot for good when a request in it is cancelled. Left alone, the attempt ends by the
    timeouts it was given.
    """
    task = asyncio.ensure_future(transport.handle_async_request(request))
    try:
        done, _ = await asyncio.wait({task}, timeout=left)
    except BaseException:
        _abandon(task)
        raise
    if not done:
        _abandon(task)
        raise TimeoutError
    return task.result()


def _abandon(task: asyncio.Task[httpx.Response]) -> None:
    async def close() -> None:
        try:
            response = await task
        except Exception:
            return  # nobody is left to hear of it; the caller's own body may be what raised
        await response.aclose()

    closing = asyncio.ensure_future(close())
    _abandoned.add(closing)
    closing.add_done_callback(_abandoned.discard)


def _shorter(timeout: float | None, left: float) -> float:
    return left if timeout is None or left < timeout else timeout
