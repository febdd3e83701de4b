"""A first attempt and its backup: what the two colours share of the race between them, which is all but the waiting.

Decides which of the two is the call's: the first with a final answer. One that ends otherwise while the other is under
way waits for that, which then has the last word; a loser is dropped at once. When a backup may be made, where it goes
and what it costs is decided in `meshlib.core.call`. No I/O here; the halves are `race_sync` and `race_async`.

The first attempt runs where an unhedged one would, in the caller's own thread or task: a call that is fast enough pays
for an alarm and no more. Only a backup gets a thread or a task.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from meshlib.core.report import Attempt
from meshlib.transport.exchange import Exchange


class Side:
    """One of the two attempts.

    Args:
        attempt: what was begun.

    Attributes:
        connection: where it is made, while it holds one.
        reply: its answer, if that came.
        again: what its end means for the call if it came last: seconds to the next attempt, or None.
        fault: what is raised if the call ends with it: what is not about the connection, such as a cancellation.
        is_over: whether it has ended or was dropped; what still comes of it counts no more.
        scope: what cancels it, in async code.
    """

    connection: Any = None
    reply: Any = None
    again: float | None = None
    fault: BaseException | None = None
    is_over = False
    scope: Any = None

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt


class Race:
    """A call's first attempt, and the backup that it may get.

    Args:
        stacks: the client's connections.
        reply: the class of its replies.
        exchange: the call.
        attempt: the first one, just begun.
    """

    def __init__(self, stacks: Any, reply: Any, exchange: Exchange, attempt: Attempt) -> None:
        self._stacks = stacks
        self._reply = reply
        self._exchange = exchange
        self._delay = exchange.hedge_delay()
        self._lock = threading.Lock()
        self._first = self._last = Side(attempt)
        self._backup: Side | None = None
        self._winner: Side | None = None
        self._arrived: Any = None  # set when the last one has ended, once somebody waits for that

    @property
    def _sides(self) -> Iterator[Side]:
        yield self._first
        if self._backup is not None:
            yield self._backup

    @property
    def _is_decided(self) -> bool:
        return all(side.is_over for side in self._sides)

    def _begin_backup(self) -> Side | None:
        """The first one has taken long. Returns the other; None if there is none."""
        with self._lock:
            if self._first.is_over:
                return None
            attempt = self._exchange.begin_hedge(self._exchange.clock())
            if attempt is not None:
                self._backup = Side(attempt)
            return self._backup

    def _answered(self, side: Side, answer: Any) -> None:
        """An attempt has its answer."""
        exchange, attempt = self._exchange, side.attempt
        with self._lock:
            if side.is_over:
                self._discard(side)
                return
            side.reply = answer
            if not answer.is_closed:
                side.reply = self._reply(exchange, attempt, side.connection, answer, self._stacks)
            if answer.status not in exchange.route.unwell:
                self._win(side)
            try:
                side.again = exchange.answered(attempt, answer)
            except BaseException as fault:  # of the user's own function, which decides on a retry
                side.fault = fault
            self._come_in(side)

    def _broke(self, side: Side, error: BaseException) -> None:
        """An attempt has raised."""
        connection = side.connection
        with self._lock:
            self._discard(side)
            if not isinstance(error, Exception):
                side.fault = error  # also of one that was dropped: it is the caller who is interrupted
            if side.is_over:
                return
            try:
                side.again = self._exchange.broke(side.attempt, error, connection)
            except BaseException as fault:  # the caller's own
                side.fault = fault
            if side.fault is not None and side is self._first:
                self._win(side)
            self._come_in(side)

    def _win(self, side: Side) -> None:
        self._winner = side
        self._drop(other for other in self._sides if other is not side)

    def _come_in(self, side: Side) -> None:
        side.is_over = True
        self._last = side
        if self._arrived is not None:
            self._arrived.set()

    def _decided(self) -> tuple[Any, float | None]:
        """What the race means for the call; see the drivers' `_attempt`."""
        self._exchange.observe(self._first.attempt)
        side = self._winner or self._last
        if (fault := self._first.fault or side.fault) is not None:
            try:
                raise fault
            finally:
                del fault  # its traceback leads back to here
        # An answer, though bad, is better than none.
        reply = side.reply or next((each.reply for each in self._sides if each.reply is not None), None)
        return reply, side.again

    def _leave(self, reply: Any) -> list[Any]:
        """The race is over, however it ended. Returns the answers that are not needed, to be given up."""
        with self._lock:
            self._drop(self._sides)
            answers = [side.reply for side in self._sides if side.reply is not None]
            for side in self._sides:
                side.fault = None  # likewise
        return [each for each in answers if each is not reply and not each.is_over]

    def _drop(self, sides: Iterator[Side]) -> None:
        """Give up those that are still under way. Under the lock."""
        for side in sides:
            if not side.is_over:
                side.is_over = True
                self._exchange.lose(side.attempt, self._exchange.clock())
                self._interrupt(side)

    def _forsake(self, side: Side) -> None:
        """Give it up from a finalizer, which may run while this very thread holds one of the locks."""
        if side.reply is not None and not side.reply.is_over:
            side.reply.let_go()
        elif not side.is_over:
            side.is_over = True
            self._discard(side)
            self._exchange.cluster.orphans.append(side.attempt)

    def _discard(self, side: Side) -> None:
        """Close a connection that it holds."""
        connection, side.connection = side.connection, None
        if connection is not None:
            self._stacks.drop(connection)

    def _interrupt(self, side: Side) -> None:
        """End what a dropped attempt is doing, at once. Under the lock."""
        raise NotImplementedError
