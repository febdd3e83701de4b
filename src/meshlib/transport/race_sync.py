"""The race of two attempts for a sync client; see `meshlib.transport.race`, and its twin `race_async`.

Decides nothing. The first attempt blocks the caller's thread, whose wait for the answer doubles as the alarm; a backup
gets a thread of its own. Whichever loses is woken by a shutdown of its socket. While a connection is being opened there
is no alarm: `Timeout.connect` bounds that, and a backup that has become due meanwhile is made right after.

A call that gets no backup costs 10 to 20 us of CPU more than in a service without `Hedge`. One that does costs 0.4 ms
more: a thread, the other request, and a new connection in place of the loser's.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from contextvars import copy_context
from typing import Any

from meshlib.fork import inherited
from meshlib.transport.race import Race, Side

MOST = 64
"""Backups of a process at once, a thread each; a call that finds so many goes without."""


class Room:
    """Room for the threads of backups."""

    def __init__(self) -> None:
        self.forget()
        inherited.add(self)

    def forget(self) -> None:
        """After a fork, in the child: the threads are the parent's."""
        self.free = threading.Semaphore(MOST)


room = Room()


class SyncRace(Race):
    """See `Race`."""

    def run(self) -> tuple[Any, float | None]:
        """See the driver's `_attempt`."""
        reply = None
        try:
            self._run(self._first)
            self._wait()
            reply, again = self._decided()
        finally:
            for spare in self._leave(reply):
                spare.give_up(None)
        return reply, again

    def _run(self, side: Side) -> None:
        """Make one of the attempts."""
        exchange, attempt = self._exchange, side.attempt
        try:
            connection = self._stacks.take(exchange, attempt)
            if not self._takes(side, connection):
                return
            is_first = side is self._first
            with connection.stream.ringing(attempt.started + self._delay, self._ring) if is_first else nullcontext():
                answer = connection.send(exchange, attempt)
        except BaseException as error:
            self._broke(side, error)
        else:
            self._answered(side, answer)

    def _takes(self, side: Side, connection: Any) -> bool:
        """Make the connection known to who may have to end its wait; False if the attempt was dropped meanwhile."""
        with self._lock:
            side.connection = connection
            if side.is_over:
                self._discard(side)
            return not side.is_over

    def _ring(self) -> None:
        """The alarm: start a backup in a thread."""
        free, context = room.free, copy_context()
        if not free.acquire(blocking=False):
            return
        backup = self._begin_backup()
        if backup is None:
            free.release()
            return

        def work() -> None:
            try:
                context.run(self._run, backup)
            finally:
                free.release()

        try:
            threading.Thread(target=work, name="meshlib-hedge", daemon=True).start()
        except RuntimeError:  # the system gives no more, or the interpreter is about to end
            free.release()
            with self._lock:
                self._drop(iter((backup,)))

    def _wait(self) -> None:
        """Wait for the one that is still under way."""
        with self._lock:
            if self._is_decided:
                return
            self._arrived = arrived = threading.Event()
        arrived.wait()

    def _interrupt(self, side: Side) -> None:
        if side.connection is not None:
            side.connection.stream.cut()  # its thread closes it
