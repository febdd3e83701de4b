"""What stands in for a connection while faults are played.

Decides how a fault looks to the driver that turns the call: what is raised, when, and what is known of the sending. An
attempt that is merely late is made for real, on a real connection, after the wait. What is drawn, and for whom, is
decided in `meshlib.testing.faults`.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import anyio
import httpcore
import httpx

from meshlib.testing.faults import Play, passes
from meshlib.transport.inner import WholeAnswer
from meshlib.transport.network import Stream

if TYPE_CHECKING:
    from meshlib.core.report import Attempt
    from meshlib.transport.exchange import Exchange

Draw = Callable[[Any, Any], "Play | None"]


def taking(real: Callable[..., Any], draw: Draw) -> Callable[..., Any]:
    """A `take` of sync connections that plays what is drawn."""

    def take(stacks: Any, exchange: Exchange, attempt: Attempt) -> Any:
        play = draw(exchange, attempt)
        if play is not None and play.kind is not None:
            return StandIn(play, attempt)
        connection = real(stacks, exchange, attempt)
        if play is not None:
            connection.send = partial(_late, connection, play.latency)
        return connection

    return take


def taking_async(real: Callable[..., Awaitable[Any]], draw: Draw) -> Callable[..., Awaitable[Any]]:
    """See `taking`."""

    async def take(stacks: Any, exchange: Exchange, attempt: Attempt) -> Any:
        play = draw(exchange, attempt)
        if play is not None and play.kind is not None:
            return AsyncStandIn(play, attempt)
        connection = await real(stacks, exchange, attempt)
        if play is not None:
            connection.send = partial(_late_async, connection, play.latency)
        return connection

    return take


def _late(connection: Any, latency: float, exchange: Exchange, attempt: Attempt) -> Any:
    del connection.send  # the next attempt on this connection draws anew
    wait, is_in_time = _bounded(exchange, attempt, latency)
    if not passes(exchange.clock, exchange.clock() + wait):
        _doze(connection.stream, wait)
    if not is_in_time:
        connection.stream.sent = True
        raise _timeout()
    return connection.send(exchange, attempt)


def _doze(stream: Any, wait: float) -> None:
    """Wait at a stream: in a race that rings the alarm, and ends when the stream is cut."""
    until = time.monotonic() + wait
    if isinstance(stream, Stream):
        stream._readable.poll(ceil(wait * 1000))
        try:
            has_more = socket.socket.recv(stream._sock, 1, socket.MSG_PEEK)
        except OSError:
            has_more = b""
        if not has_more:  # the time is over, or the stream is; else there is something for TLS alone
            return
    time.sleep(max(0.0, until - time.monotonic()))


async def _late_async(connection: Any, latency: float, exchange: Exchange, attempt: Attempt) -> Any:
    del connection.send
    wait, is_in_time = _bounded(exchange, attempt, latency)
    if not passes(exchange.clock, exchange.clock() + wait):
        await anyio.sleep(wait)
    if not is_in_time:
        connection.stream.sent = True
        raise _timeout()
    return await connection.send(exchange, attempt)


def _bounded(exchange: Exchange, attempt: Attempt, latency: float) -> tuple[float, bool]:
    """Seconds to wait, and whether the attempt lasts longer than that."""
    left = attempt.deadline - exchange.clock()
    given = exchange.given_timeouts.get("read")
    bound = max(0.0, left if given is None else min(left, given))
    return (latency, True) if latency < bound else (bound, False)


def _timeout() -> Exception:
    return httpcore.ReadTimeout("no answer: a played fault")


class StandIn:
    """A connection that nobody is at the other end of, and its stream and stack as well.

    Args:
        play: what it plays.
        attempt: whose it is.
    """

    is_reused = False
    answered = False

    def __init__(self, play: Play, attempt: Attempt) -> None:
        self.sent = play.kind != "refuse"
        self._play = play
        self._cut = threading.Event()
        self._alarm = math.inf
        self._ring: Callable[[], object] = lambda: None

    @property
    def stream(self) -> StandIn:
        """What is known of the sending."""
        return self

    stack = stream

    def drop(self, connection: object) -> None:
        """There is nothing to close."""

    def cut(self) -> None:
        """End the wait, from another thread."""
        self._cut.set()

    @contextlib.contextmanager
    def ringing(self, at: float, ring: Callable[[], object]) -> Iterator[None]:
        """See `network.Stream.ringing`."""
        self._alarm, self._ring = at, ring
        yield

    def send(self, exchange: Exchange, attempt: Attempt) -> Any:
        """Play it."""
        wait, is_in_time = self._wait(exchange, attempt)
        until = exchange.clock() + wait
        if self._alarm < until:
            self._pass(exchange, self._alarm)
            self._ring()
        self._pass(exchange, until)
        return self._end(exchange, is_in_time)

    def _pass(self, exchange: Exchange, until: float) -> None:
        if not passes(exchange.clock, until):
            self._cut.wait(max(0.0, until - exchange.clock()))

    def _wait(self, exchange: Exchange, attempt: Attempt) -> tuple[float, bool]:
        if self._play.kind == "refuse":
            return 0.0, True
        return _bounded(exchange, attempt, math.inf if self._play.kind == "hang" else self._play.latency)

    def _end(self, exchange: Exchange, is_in_time: bool) -> Any:
        if not is_in_time:
            raise _timeout()
        if self._play.kind == "refuse":
            raise httpcore.ConnectError("connection refused: a played fault")
        if self._play.status is None:
            raise httpcore.ReadError("the connection was lost: a played fault")
        return WholeAnswer(httpx.Response(self._play.status), exchange.report)


class AsyncStandIn(StandIn):
    """See `StandIn`."""

    async def send(self, exchange: Exchange, attempt: Attempt) -> Any:
        """Play it."""
        wait, is_in_time = self._wait(exchange, attempt)
        if not passes(exchange.clock, exchange.clock() + wait):
            await anyio.sleep(wait)
        return self._end(exchange, is_in_time)
