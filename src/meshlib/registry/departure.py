"""The end of the process, held up until the registry knows.

Decides what happens at SIGTERM, SIGINT and the interpreter's exit: first the registration is taken back, then whoever
else waits for the signal has it. A server that ends by a signal closes its listener at once and tells the application
last, so nobody could leave in time without this. The application goes on answering meanwhile: the handler returns at
once, and the signal is sent again by whom the registry has answered. A second signal is not held up.

It never swallows a signal, and never changes what happens after it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_OF_LOOPS = {"asyncio.unix_events", "uvloop.loop"}
"""Whose handlers do nothing: these loops hear of a signal in another way, whatever its handler does."""

logger = logging.getLogger("meshlib.registry")


class Departure:
    """The signals of one registration.

    Args:
        leave: has the registration taken back, and a function called afterwards from any thread; False if there is
            nothing to take back. It must take no locks.
        wait: waits until it is taken back, for a bounded time.
    """

    def __init__(self, leave: Callable[[Callable[[], None]], bool], wait: Callable[[], object]) -> None:
        self._leave, self._wait = leave, wait
        self._previous: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._passed_on: set[int] = set()

    def hook(self) -> None:
        """Hold signals up from now on; in the main thread alone, for Python allows it there."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_kill"):
            logger.debug("signals are not waited for: the registration was not entered in the main thread")
            return
        self._seen.clear()
        self._passed_on.clear()
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if previous not in (None, signal.SIG_IGN, self._handle):
                self._previous[number] = previous
                signal.signal(number, self._handle)

    def unhook(self) -> None:
        """Leave signals to whom they were left before. A handler that somebody has put before ours stays."""
        if threading.current_thread() is threading.main_thread():
            for number, previous in self._previous.items():
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_of_loop = getattr(self._previous[number], "__module__", "") in _OF_LOOPS
        # A loop has noted the signal already; it would hear of another one as a second.
        then = _nothing if is_of_loop else partial(self._send_again, number)
        if number in self._seen or not self._leave(then):
            self._pass_on(number, frame)
            return
        self._seen.add(number)
        if is_of_loop:
            self._wait()  # the loop's own callback comes as soon as we return
            self._pass_on(number, frame)

    def _send_again(self, number: int) -> None:
        if number not in self._passed_on:
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._passed_on.add(number)
        previous = self._previous[number]
        if callable(previous):
            previous(number, frame)
        else:
            signal.signal(number, previous)
            os.kill(os.getpid(), number)


def _nothing() -> None:
    pass
