"""The async driver: turns a call on asyncio or trio.

Decides nothing; see `meshlib.core.call`. Its twin is `sync`, and the two are kept alike line by line, but for what only
a coroutine meets: when its loop was thrown away, the garbage collector may close it amid one of our locks.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, NoReturn

import anyio
import httpx

from meshlib.core.report import Attempt, attach
from meshlib.transport.body import AsyncRecordedBody
from meshlib.transport.connections import AsyncStacks
from meshlib.transport.exchange import NETWORK_ERRORS, Exchange, Reply
from meshlib.transport.inner import AsyncInnerStacks
from meshlib.transport.race_async import AsyncRace
from meshlib.transport.router import Router


class AsyncMeshTransport(httpx.AsyncBaseTransport):
    """Sends every request to an endpoint of the service its URL names.

    Args:
        router: finds the service.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._stacks: Any = (
            AsyncStacks(router.clock) if router.inner is None else AsyncInnerStacks(router.inner, router.clock)
        )
        router.clients.add(self._stacks)

    if not TYPE_CHECKING:  # it would accept every name

        def __getattr__(self, name: str) -> NoReturn:
            known = "it is for httpx.AsyncClient; for httpx.Client take mesh.transport()"
            raise AttributeError(f"{type(self).__name__} has no {name}: {known}")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See `httpx.AsyncBaseTransport`.

        Raises:
            UnknownService: if the URL's host is not a declared service.
            NoEndpoints: if there is no endpoint to send it to.
            ResolveError: if its endpoints are not known, and will not be.
            DeadlineExceeded: if the total time ran out.
            httpx.TransportError: the last attempt's failure.
        """
        exchange = self._router.exchange(request, AsyncRecordedBody)
        journal = exchange.cluster.journal
        reply: AsyncReply | None = None
        try:
            now = exchange.started
            if exchange.cluster.pending is not None:
                await exchange.cluster.pending.wait_async(exchange.deadline - now)
                now = exchange.clock()
            while (attempt := exchange.begin(now)) is not None:
                if journal.waiting:
                    journal.deliver(exchange.cluster)
                make = self._attempt if exchange.cluster.hedging is None else self._hedged
                reply, again = await make(exchange, attempt, reply)
                if journal.waiting:
                    journal.deliver(exchange.cluster)
                if again is None:
                    break
                if again:
                    await anyio.sleep(again)
                now = exchange.clock()
            if reply is None or not reply.is_whole:
                raise exchange.failure()
            return exchange.deliver(reply)
        except GeneratorExit:
            exchange.forsaken()
            if reply is not None and not reply.is_over:
                reply.let_go()
            raise
        except BaseException as error:
            attach(error, exchange.report)
            exchange.left(error)
            if reply is not None and not reply.is_over:
                await reply.give_up(error)
            if journal.waiting:
                journal.deliver(exchange.cluster)
            raise

    async def aclose(self) -> None:
        """Close every idle connection."""
        await self._stacks.aclose()

    def shut(self) -> None:
        """See `aclose`; from any thread, on whichever loops the connections are."""
        self._stacks.shut()

    async def _attempt(
        self, exchange: Exchange, attempt: Attempt, last: AsyncReply | None
    ) -> tuple[AsyncReply | None, float | None]:
        """Make one attempt.

        Args:
            exchange: the call.
            attempt: what was begun.
            last: the rejected answer of an earlier attempt, still unread.

        Returns:
            The latest answer, if any, and the seconds to wait before the next attempt, or None if this was the last.
        """
        connection = None
        try:
            if last is not None and not last.is_over:
                await last.drain()
                exchange.restart(attempt, exchange.clock())
            connection = await self._stacks.take(exchange, attempt)
            answer = await connection.send(exchange, attempt)
        except GeneratorExit:  # its loop was thrown away: maybe from the garbage collector, amid one of the locks
            if connection is not None:
                self._stacks.drop(connection)
            exchange.cluster.orphans.append(attempt)
            raise
        except BaseException as error:
            if connection is not None:
                self._stacks.drop(connection)
            again = exchange.broke(attempt, error, connection)
            if not isinstance(error, Exception):
                raise
            return last, again
        reply = answer if answer.is_closed else AsyncReply(exchange, attempt, connection, answer, self._stacks)
        try:
            return reply, exchange.answered(attempt, answer)
        except BaseException:  # a strategy's own
            if not reply.is_over:
                await reply.give_up(None)
            raise

    async def _hedged(
        self, exchange: Exchange, attempt: Attempt, last: AsyncReply | None
    ) -> tuple[AsyncReply | None, float | None]:
        """See `_attempt`; one that takes long may get a backup."""
        if not exchange.may_be_hedged:
            return await self._attempt(exchange, attempt, last)
        return await AsyncRace(self._stacks, AsyncReply, exchange, attempt).run()


class AsyncReply(Reply, httpx.AsyncByteStream):
    """The body of an answer to an async client."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.kept is not None:
            for chunk in self.kept:
                yield chunk
            return
        try:
            async for chunk in self.answer.body:
                yield chunk
            await self.answer.body.aclose()
        except GeneratorExit:
            self.let_go()  # maybe from the garbage collector, amid one of the locks, or as the interpreter ends
            raise
        except NETWORK_ERRORS as error:
            await self.give_up(error)
            raise self.exchange.body_died(error)  # noqa: B904  # it names its cause itself
        except BaseException as error:
            await self.give_up(error)
            raise
        self.end()

    async def aclose(self) -> None:
        """The caller is done with it."""
        if isinstance(sys.exc_info()[1], GeneratorExit):
            self.let_go()  # httpx closes it on the way out of a coroutine that is being collected
        await self.give_up(None)

    async def give_up(self, error: BaseException | None) -> None:
        """End it before its body has ended; `error` is what made that necessary, if anything did."""
        if not self.is_over:
            try:
                await self.answer.body.aclose()
            finally:
                self.end(error)

    async def drain(self) -> None:
        """Make room for another attempt: read the rest if it is short, and keep it; else drop the connection."""
        if self.is_over:
            return
        self.hurry()
        kept: list[bytes] = []
        size = 0
        try:
            async for chunk in self.answer.body:
                kept.append(chunk)
                size += len(chunk)
                if self.is_enough(size):
                    return
            self.kept = kept
        except GeneratorExit:
            self.let_go()
            raise
        except Exception:
            pass  # whatever it was: the answer was on its way out, and its body is lost with it
        finally:
            await self.aclose()
