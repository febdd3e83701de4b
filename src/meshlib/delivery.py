"""How events reach the log and those who subscribed.

Decides who tells them: the thread that has caused an event writes the log, as soon as it has left every lock; each
callback is called by a thread of its own, which lives only while there is something to tell, so that a slow one keeps
no call waiting, no event loop, and no other callback. In both, the events of a service come in their order. It never
decides what an event is, and nothing that is raised here reaches a call.

A forked child keeps the subscriptions; what waits at that moment is told by the parent.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from weakref import WeakSet

from meshlib import events
from meshlib.core.cluster import Cluster
from meshlib.core.journal import MOST, Backlog
from meshlib.events import Event
from meshlib.fork import inherited

Callback = Callable[[Event], object]

PATIENCE = 1.0
"""Seconds that `close`, and the interpreter at its exit, wait for callbacks."""

SHOWN = 5
"""Endpoints that come or go at once and are named in a line of the log; there may be thousands."""

NOT_ASYNC = "a callback for events is a plain function: an async one would need a loop, and there is none here"

logger = logging.getLogger("meshlib.events")

_LOGS: dict[type[Event], tuple[logging.Logger, int]] = {
    kind: (logging.getLogger(f"meshlib.{name}"), level)
    for kind, name, level in (
        (events.EndpointAdded, "discovery", logging.INFO),
        (events.EndpointRemoved, "discovery", logging.INFO),
        (events.HealthChanged, "health", logging.INFO),
        (events.Ejected, "breaker", logging.WARNING),
        (events.Probing, "breaker", logging.INFO),
        (events.Restored, "breaker", logging.INFO),
        (events.PanicBegan, "breaker", logging.WARNING),
        (events.PanicEnded, "breaker", logging.INFO),
        (events.BudgetExhausted, "budget", logging.INFO),
        (events.OverloadBegan, "throttle", logging.INFO),
        (events.OverloadEnded, "throttle", logging.INFO),
        (events.ConfigChanged, "config", logging.INFO),
        (events.Missed, "events", logging.WARNING),
    )
}
"""Where each event is logged, and how. Of discovery the resolver that fails has spoken already, with its error."""


class Delivery:
    """Tells the events of a mesh."""

    def __init__(self) -> None:
        self._subscribers: tuple[Subscriber, ...] = ()
        self._lock = threading.Lock()
        inherited.add(self)

    def attach(self, cluster: Cluster) -> None:
        """Tell the events of this service from now on."""
        cluster.journal.hears = self._hears
        cluster.journal.deliver = self.deliver

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """See `Mesh.subscribe`."""
        subscriber = Subscriber(callback)
        with self._lock:
            self._subscribers = (*self._subscribers, subscriber)

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = tuple(each for each in self._subscribers if each is not subscriber)
            subscriber.end()

        return unsubscribe

    def deliver(self, cluster: Cluster) -> None:
        """Tell what waits; whoever is at it already goes on with what comes meanwhile, this very thread included."""
        journal = cluster.journal
        while journal.waiting and journal.telling.acquire(blocking=False):
            try:
                with cluster.lock:
                    batch = journal.take()
                for subscriber in self._subscribers:
                    subscriber.tell(batch)
                _log(batch)
            finally:
                journal.telling.release()

    def wait(self) -> None:
        """Wait until the callbacks have been told everything, at most `PATIENCE` seconds."""
        _wait_for(self._subscribers)

    async def wait_async(self) -> None:
        """See `wait`; on asyncio and trio."""
        import anyio  # it is heavy, and a mesh that is closed from sync code does without it

        with anyio.move_on_after(PATIENCE):
            while any(each.busy is not None for each in self._subscribers):  # noqa: ASYNC110  # it is another thread
                await anyio.sleep(0.005)

    def forget(self) -> None:
        """After a fork, in the child."""
        self._lock = threading.Lock()

    def _hears(self, kind: type[Event]) -> bool:
        if self._subscribers:
            return True
        if kind not in _LOGS:
            return False
        log, level = _LOGS[kind]
        # `isEnabledFor` may wait for the logging module's own lock, and is asked again in any case.
        return log.getEffectiveLevel() <= level > log.manager.disable


class Subscriber:
    """One callback, and what it is still to be told.

    Args:
        callback: the user's.

    Raises:
        TypeError: if it cannot be called, or is async.
    """

    def __init__(self, callback: Callback) -> None:
        if not callable(callback):
            raise TypeError(f"a callback for events must be a function of one argument, got {callback!r}")
        if _is_async(callback) or _is_async(getattr(callback, "__call__", None)):  # noqa: B004  # it is looked at
            raise TypeError(NOT_ASYNC)
        self._callback = callback
        self._said: set[str] = set()
        self._is_over = False
        self.forget()
        inherited.add(self)
        _subscribers.add(self)

    @property
    def busy(self) -> threading.Thread | None:
        """Who is telling it, unless that is who asks."""
        thread = self._thread
        return None if thread is threading.current_thread() else thread

    def tell(self, batch: Sequence[Event]) -> None:
        """Have it told, soon."""
        with self._lock:
            if self._is_over:
                return
            self._backlog.add_all(batch)
            if self._thread is None:
                self._start()

    def end(self) -> None:
        """It is told no more."""
        with self._lock:
            self._is_over = True
            self._backlog.clear()

    def forget(self) -> None:
        """After a fork, in the child: the thread is the parent's, and so is what waits for it."""
        self._lock = threading.Lock()
        self._backlog = Backlog(MOST)
        self._thread: threading.Thread | None = None

    def _start(self) -> None:
        """Begin to tell. Under the lock."""
        self._thread = threading.Thread(target=self._run, name="meshlib-events", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system gives no more, or the interpreter is about to end: the next event tries again
            self._thread = None

    def _run(self) -> None:
        while batch := self._take():
            for event in batch:
                if self._is_over:
                    break
                if isinstance(event, events.Missed):
                    logger.warning("%s", event)
                self._call(event)

    def _take(self) -> list[Event]:
        with self._lock:
            batch = self._backlog.take()
            if not batch:
                self._thread = None
            return batch

    def _call(self, event: Event) -> None:
        try:
            result = self._callback(event)
            if inspect.iscoroutine(result):
                result.close()
                raise TypeError(NOT_ASYNC)
        except BaseException as error:  # a callback that calls `sys.exit` is told the next event all the same
            name = type(error).__name__
            if name not in self._said:
                self._said.add(name)
                logger.exception("a callback raised %s (said once)", name)


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _log(batch: Sequence[Event]) -> None:
    for kind, alike in groupby(batch, type):
        if kind not in _LOGS:
            continue
        log, level = _LOGS[kind]
        try:
            for line, lowered in _lines(list(alike)):
                log.log(min(level, lowered), "%s", line)
        except Exception:  # a filter's own; handlers see to theirs in the same way
            if logging.raiseExceptions and sys.stderr is not None:
                traceback.print_exc()


def _lines(alike: list[Event]) -> Iterable[tuple[str, int]]:
    """What the log says of events of one class, and the highest level at which it is worth that."""
    first = alike[0]
    if isinstance(first, events.EndpointAdded | events.EndpointRemoved) and len(alike) > SHOWN:
        verb = "added" if isinstance(first, events.EndpointAdded) else "removed"
        some = ", ".join(str(each.endpoint) for each in alike[:SHOWN] if isinstance(each, type(first)))
        yield f"{first.service}: {len(alike)} endpoints were {verb}: {some} and {len(alike) - SHOWN} more", logging.INFO
        return
    for event in alike:
        is_news = not isinstance(event, events.Ejected) or not event.again
        yield str(event), logging.CRITICAL if is_news else logging.INFO


def _wait_for(subscribers: Iterable[Subscriber]) -> None:
    until = time.monotonic() + PATIENCE
    for each in subscribers:
        if (thread := each.busy) is not None:
            thread.join(max(0.0, until - time.monotonic()))


_subscribers: WeakSet[Subscriber] = WeakSet()


@atexit.register
def _exit() -> None:
    _wait_for(list(_subscribers))
