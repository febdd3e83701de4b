"""The sync driver: turns a call with blocking I/O.

Decides nothing; see `meshlib.core.call`. Its twin is `aio`, and the two are kept alike line by line, but for what only
a sync generator meets: the garbage collector may close it amid one of our locks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import httpx

from meshlib.core.report import Attempt, attach
from meshlib.transport.body import RecordedBody
from meshlib.transport.connections import SyncStacks
from meshlib.transport.exchange import NETWORK_ERRORS, Exchange, Reply
from meshlib.transport.inner import InnerStacks
from meshlib.transport.race_sync import SyncRace
from meshlib.transport.router import Router


class MeshTransport(httpx.BaseTransport):
    """Sends every request to an endpoint of the service its URL names.

    Args:
        router: finds the service.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._stacks: Any = (
            SyncStacks(router.clock) if router.inner is None else InnerStacks(router.inner, router.clock)
        )
        router.clients.add(self._stacks)

    if not TYPE_CHECKING:  # it would accept every name

        def __getattr__(self, name: str) -> NoReturn:
            known = "it is for httpx.Client; for httpx.AsyncClient take mesh.async_transport()"
            raise AttributeError(f"{type(self).__name__} has no {name}: {known}")

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """See `httpx.BaseTransport`.

        Raises:
            UnknownService: if the URL's host is not a declared service.
            NoEndpoints: if there is no endpoint to send it to.
            ResolveError: if its endpoints are not known, and will not be.
            DeadlineExceeded: if the total time ran out.
            httpx.TransportError: the last attempt's failure.
        """
        exchange = self._router.exchange(request, RecordedBody)
        journal = exchange.cluster.journal
        reply: SyncReply | None = None
        try:
            now = exchange.started
            if exchange.cluster.pending is not None:
                exchange.cluster.pending.wait(exchange.deadline - now)
                now = exchange.clock()
            while (attempt := exchange.begin(now)) is not None:
                if journal.waiting:
                    journal.deliver(exchange.cluster)
                make = self._attempt if exchange.cluster.hedging is None else self._hedged
                reply, again = make(exchange, attempt, reply)
                if journal.waiting:
                    journal.deliver(exchange.cluster)
                if again is None:
                    break
                if again:
                    time.sleep(again)
                now = exchange.clock()
            if reply is None or not reply.is_whole:
                raise exchange.failure()
            return exchange.deliver(reply)
        except BaseException as error:
            attach(error, exchange.report)
            exchange.left(error)
            if reply is not None and not reply.is_over:
                reply.give_up(error)
            if journal.waiting:
                journal.deliver(exchange.cluster)
            raise

    def close(self) -> None:
        """Close every idle connection."""
        self._stacks.close()

    def _attempt(
        self, exchange: Exchange, attempt: Attempt, last: SyncReply | None
    ) -> tuple[SyncReply | None, float | None]:
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
                last.drain()
                exchange.restart(attempt, exchange.clock())
            connection = self._stacks.take(exchange, attempt)
            answer = connection.send(exchange, attempt)
        except BaseException as error:
            if connection is not None:
                self._stacks.drop(connection)
            again = exchange.broke(attempt, error, connection)
            if not isinstance(error, Exception):
                raise
            return last, again
        reply = answer if answer.is_closed else SyncReply(exchange, attempt, connection, answer, self._stacks)
        try:
            return reply, exchange.answered(attempt, answer)
        except BaseException:  # a strategy's own
            if not reply.is_over:
                reply.give_up(None)
            raise

    def _hedged(
        self, exchange: Exchange, attempt: Attempt, last: SyncReply | None
    ) -> tuple[SyncReply | None, float | None]:
        """See `_attempt`; one that takes long may get a backup."""
        if self._router.inner is not None or not exchange.may_be_hedged:
            return self._attempt(exchange, attempt, last)
        return SyncRace(self._stacks, SyncReply, exchange, attempt).run()


class SyncReply(Reply, httpx.SyncByteStream):
    """The body of an answer to a sync client."""

    def __iter__(self) -> Iterator[bytes]:
        if self.kept is not None:
            yield from self.kept
            return
        try:
            yield from self.answer.body
            self.answer.body.close()
        except GeneratorExit:
            self.let_go()  # maybe from the garbage collector, amid one of the locks, or as the interpreter ends
            raise
        except NETWORK_ERRORS as error:
            self.give_up(error)
            raise self.exchange.body_died(error)  # noqa: B904  # it names its cause itself
        except BaseException as error:
            self.give_up(error)
            raise
        self.end()

    def close(self) -> None:
        """The caller is done with it."""
        self.give_up(None)

    def give_up(self, error: BaseException | None) -> None:
        """End it before its body has ended; `error` is what made that necessary, if anything did."""
        if not self.is_over:
            try:
                self.answer.body.close()
            finally:
                self.end(error)

    def drain(self) -> None:
        """Make room for another attempt: read the rest if it is short, and keep it; else drop the connection."""
        if self.is_over:
            return
        self.hurry()
        kept: list[bytes] = []
        size = 0
        try:
            for chunk in self.answer.body:
                kept.append(chunk)
                size += len(chunk)
                if self.is_enough(size):
                    return
            self.kept = kept
        except Exception:
            pass  # whatever it was: the answer was on its way out, and its body is lost with it
        finally:
            self.close()
