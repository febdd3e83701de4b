"""Attempts over somebody else's transports: what `Mesh(inner=...)` puts in the place of our own connections.

Decides how a transport per endpoint is made, and how its answers and exceptions are read. With it, that nothing was
sent is only known from a failure to connect, and the deadline ends an async attempt by cancelling it; a sync transport
is told the time left as its timeouts. httpx's own async transport cannot be cancelled as it is; see
`meshlib.transport.inner_httpx`. It never looks into a transport.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpcore
import httpx

from meshlib.core.report import Attempt, Report
from meshlib.endpoint import Endpoint, Place
from meshlib.fork import inherited, strays
from meshlib.service import Service
from meshlib.transport import binding
from meshlib.transport.draining import Cut
from meshlib.transport.exchange import Exchange
from meshlib.transport.inner_body import InnerBody, SyncInnerBody
from meshlib.transport.inner_httpx import CancellableTransport, Gate
from meshlib.transport.loops import loops, on_asyncio, running_loop, spawn
from meshlib.transport.network import Bounded, Clock
from meshlib.transport.waits import within

Factory = Callable[[Endpoint], Any]
"""Makes the transport for an endpoint: an `httpx.BaseTransport`, an `httpx.AsyncBaseTransport`, or both in one."""


Key = tuple[str, Place, object]
"""What transports are kept apart by: a service, a place, and the event loop that an async one cannot leave."""

logger = logging.getLogger("meshlib.transport")


class InnerAnswer:
    """A response from an inner transport; see `binding.Answer`."""

    __slots__ = ("_response", "body", "status")
    is_closed = False

    def __init__(self, response: httpx.Response, body: Any) -> None:
        self._response = response
        self.body = body
        self.status = response.status_code

    def header(self, name: bytes) -> bytes:
        """See `binding.Answer.header`."""
        value: str = self._response.headers.get(name.decode("ascii"), "")
        return value.encode("latin-1", "replace")

    def response(self, stream: Any, report: Report) -> httpx.Response:
        """See `binding.Answer.response`."""
        self._response.stream = stream
        self._response.extensions["meshlib"] = report
        return self._response

    def evidence(self, request: httpx.Request, report: Report) -> httpx.Response:
        """See `binding.Answer.evidence`."""
        known, extensions = self._response, {**self._response.extensions, "meshlib": report}
        return httpx.Response(
            self.status, headers=known.headers, stream=binding.Unread(), request=request, extensions=extensions
        )


class WholeAnswer(InnerAnswer):
    """A response whose body came along with its headers: nothing of it is to be read, ended or given up any more.

    So it needs no `exchange.Reply`, and stands in the place of one.
    """

    __slots__ = ()
    is_closed = is_over = is_whole = True

    def __init__(self, response: httpx.Response, report: Report) -> None:
        response.extensions["meshlib"] = report
        self._response = response
        self.status = response.status_code

    def response(self) -> httpx.Response:  # type: ignore[override]
        """The answer as the caller gets it."""
        return self._response


UNBOUNDED = {"connect": None, "read": None, "write": None, "pool": None}
"""The timeouts of a client that leaves them to the mesh."""


class InnerConnection(Bounded):
    """One attempt's use of a transport: stands where a connection stands, and where its stream does.

    Of a stream it has the bounds and the facts, and no socket: there is nothing to drop, forget or ask.

    Args:
        transport: the endpoint's.
        clock: the mesh's.
        deadline: the attempt's.
    """

    is_reused = False
    sent = True  # unless an exception says otherwise
    answered = False

    def __init__(self, transport: Any, clock: Clock, deadline: float) -> None:
        self.clock = clock
        self.deadline = deadline
        self._transport = transport

    @property
    def stream(self) -> InnerConnection:
        """What carries the deadline, and what is known of the sending."""
        return self

    def renew(self) -> bool:
        """There is nothing to make ready: the transport does."""
        return True

    def abort(self) -> None:
        """There is nothing to drop: the transport looks after its connections."""

    def send(self, exchange: Exchange, attempt: Attempt) -> InnerAnswer:
        """Send the request and wait for the headers."""
        try:
            send = self._transport.handle_request
            if exchange.trail is not None:
                send = exchange.trail.quietly(send, attempt)
            response = send(self.request(exchange, attempt))
        except httpx.TransportError as error:
            if error is exchange.body.error:
                raise
            raise self._translated(error) from error
        if response.is_closed:
            return WholeAnswer(response, exchange.report)
        return InnerAnswer(response, SyncInnerBody(response.stream, self))

    def request(self, exchange: Exchange, attempt: Attempt) -> httpx.Request:
        """The request as the transport gets it."""
        route, body = exchange.route, exchange.body
        body.deadline = self.deadline  # the transport's timeouts cannot be put off while a body's source waits
        left = self.deadline - attempt.started
        connect = exchange.terms.connect
        connect = connect if connect < left else left  # noqa: FURB136  # `min` costs as much as three of these lines
        timeout = {"connect": connect, "read": left, "write": left, "pool": left}
        given = exchange.request.extensions.get("timeout")
        if given and given != UNBOUNDED:
            for operation, bound in given.items():
                if bound is not None and bound < timeout.get(operation, 0):
                    timeout[operation] = bound
        host = None if route.host is None else exchange.host_at(attempt)
        told = exchange.deadline - self.clock() if route.send_deadline else None
        number = exchange.number_of(attempt)
        moved = binding.inner_request(
            exchange.request, route.scheme, attempt.endpoint, host, told, number, body, timeout
        )
        if exchange.trail is not None and (carried := exchange.trail.headers(attempt)):
            binding.carry(moved.headers, carried)
        return moved

    def _translated(self, error: httpx.TransportError) -> Exception:
        self.sent = not _failed_to_connect(error)
        return binding.core_error(error)


class AsyncInnerConnection(InnerConnection):
    """See `InnerConnection`."""

    async def send(self, exchange: Exchange, attempt: Attempt) -> InnerAnswer:  # type: ignore[override]
        """See `InnerConnection.send`."""
        request = self.request(exchange, attempt)
        try:
            send = self._transport.handle_async_request
            if exchange.trail is not None:
                send = exchange.trail.quietly_async(send, attempt)
            response = await within(self.deadline - self.clock(), send(request))
        except TimeoutError as error:
            raise self._late(request) from error
        except httpx.TransportError as error:
            if error is exchange.body.error:
                raise
            raise self._translated(error) from error
        if response.is_closed:
            return WholeAnswer(response, exchange.report)
        if isinstance(response.stream, httpx.ByteStream):
            return InnerAnswer(response, response.stream)  # it is all here
        return InnerAnswer(response, InnerBody(response.stream, self))

    def _late(self, request: httpx.Request) -> httpcore.TimeoutException:
        gate = request.extensions.get("trace")
        if not isinstance(gate, Gate):
            return httpcore.ReadTimeout("the attempt timed out")
        self.sent = gate.is_sending
        return gate.timeout()


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
        self._transports: dict[Key, Any] = {}
        self._drained: list[tuple[object, Any]] = []

    def take(self, exchange: Exchange, attempt: Attempt) -> InnerConnection:
        """A use of the endpoint's transport."""
        key = (exchange.route.name, attempt.endpoint.place, None)
        transport = self._transports.get(key)
        if transport is None:
            transport = self._kept(key, attempt.endpoint)
        return InnerConnection(transport, self._clock, attempt.deadline)

    def put(self, connection: InnerConnection) -> None:
        """The response has ended."""

    def drop(self, connection: InnerConnection) -> None:
        """The response is given up; closing its body has told the transport."""

    def abandon(self, connection: InnerConnection) -> None:
        """The response is garbage, and so is its body, which is the transport's."""

    def close(self) -> None:
        """Close every transport, also when one of them fails to."""
        with contextlib.ExitStack() as stack:
            for transport in self._taken():
                stack.callback(transport.close)

    def adopt(self, service: Service) -> None:
        """See `draining.Stacks`. A transport knows no settings."""

    def drain(self, service: str, place: Place) -> Cut:
        """See `draining.Stacks`. A transport has no way to drain: it is closed at the end, whole."""
        keys = [key for key in list(self._transports) if key[:2] == (service, place)]
        # A call that comes when the place is back makes a new one.
        drained = [(key[2], made) for key in keys if (made := self._transports.pop(key, None)) is not None]
        self._drained += drained

        def cut() -> None:
            for each in drained:
                if each in self._drained:
                    self._drained.remove(each)
                    self._end(*each)

        return cut

    def _end(self, home: object, transport: Any) -> None:
        try:
            transport.close()
        except Exception:  # the user's own; nobody waits for it here
            logger.exception("a transport failed to close")

    def _taken(self) -> Iterator[Any]:
        """Every transport, which are nobody's any more."""
        while self._transports:
            yield self._transports.popitem()[1]
        while self._drained:
            yield self._drained.pop()[1]

    def counts(self) -> Iterator[tuple[str, int, int]]:
        """See `connections.SyncStacks.counts`. What a transport has open is not known."""
        return iter(())

    def forget(self) -> None:
        """After a fork, in the child: the transports are the parent's."""
        strays.append((self._transports, self._drained))
        self._transports, self._drained = {}, []

    def _made(self, endpoint: Endpoint) -> Any:
        return of_colour(self._factory(endpoint), endpoint, "handle_request", "a sync client", httpx.BaseTransport)

    def _kept(self, key: Key, endpoint: Endpoint) -> Any:
        # Two threads may both make one; the first to store it wins, and an unused transport holds nothing.
        return self._transports.setdefault(key, self._made(endpoint))


class AsyncInnerStacks(InnerStacks):
    """See `InnerStacks`."""

    async def take(self, exchange: Exchange, attempt: Attempt) -> AsyncInnerConnection:  # type: ignore[override]
        """See `InnerStacks.take`."""
        loop = running_loop()
        key = (exchange.route.name, attempt.endpoint.place, loop)
        transport = self._transports.get(key)
        if transport is None:
            await loops.streams_of(loop)  # by this it is known when the loop is over
            transport = self._kept(key, attempt.endpoint)
        return AsyncInnerConnection(transport, self._clock, attempt.deadline)

    async def aclose(self) -> None:
        """See `InnerStacks.close`."""
        self._forget_dead_loops()
        async with contextlib.AsyncExitStack() as stack:
            for transport in self._taken():
                stack.push_async_callback(transport.aclose)

    def shut(self) -> None:
        """See `aclose`; from any thread: each loop closes its own."""
        self._forget_dead_loops()
        drained, self._drained = self._drained, []
        homes = [(key[2], made) for key in list(self._transports) if (made := self._transports.pop(key, None))]
        for home, transport in [*homes, *drained]:
            self._end(home, transport)

    def _end(self, home: object, transport: Any) -> None:
        async def end() -> None:
            try:
                await transport.aclose()
            except Exception:  # which on trio would end all of the application
                logger.exception("a transport failed to close")

        spawn(home, end)

    def _made(self, endpoint: Endpoint) -> Any:
        self._forget_dead_loops()
        made = self._factory(endpoint)
        transport = of_colour(made, endpoint, "handle_async_request", "an async client", httpx.AsyncBaseTransport)
        if isinstance(transport, httpx.AsyncHTTPTransport) and on_asyncio(running_loop()):
            return CancellableTransport(transport)
        return transport

    def _forget_dead_loops(self) -> None:
        """What belongs to a loop that is over cannot be closed any more; it goes as garbage."""
        for key in list(self._transports):
            if loops.is_over(key[2]):
                self._transports.pop(key, None)
        self._drained = [each for each in self._drained if not loops.is_over(each[0])]


def of_colour(transport: Any, endpoint: Endpoint, method: str, client: str, kind: type) -> Any:
    """The transport, if it can serve the client.

    Raises:
        TypeError: if not; it says what is needed.
    """
    if callable(getattr(transport, method, None)):
        return transport
    what = f"{type(transport).__module__}.{type(transport).__qualname__}"
    raise TypeError(f"Mesh(inner=...) made {what} for {endpoint}; {client} needs an httpx.{kind.__name__}")


def _failed_to_connect(error: httpx.TransportError) -> bool:
    """Whether the exception says that nothing was sent."""
    if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        return False
    cause = type(error.__cause__)
    if not cause.__module__.startswith("aiohttp"):
        return True
    # httpx-aiohttp calls all that befalls a connection a failure to connect; only these two of its causes are.
    return any(each.__name__ in ("ClientConnectorError", "ConnectionTimeoutError") for each in cause.__mro__)
