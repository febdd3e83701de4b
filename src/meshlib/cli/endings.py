"""How a subcommand ends when it does not end by itself: a signal, or nobody reading its output any more.

Decides the exit status and the one line said then. It cleans nothing up: an ending is an exception, so that every
`with` and `finally` on its way does its work.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

CLEANING_UP = 2.0
"""Seconds after a signal in which another one is not heard: it must not interrupt what the first one began."""


class Stopped(BaseException):
    """A signal asks the program to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def guarded(name: str, command: Callable[[], int]) -> int:
    """Run a subcommand in the main thread.

    Args:
        name: what the line on stderr begins with.
        command: the subcommand; returns its exit status.

    Returns:
        Its exit status; 128 and the signal's number if SIGINT or SIGTERM ended it.
    """
    stop = _stopper()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return command()
    except Stopped as stopped:
        print(f"{name}: ended by {signal.Signals(stopped.number).name}", file=sys.stderr)
        return 128 + stopped.number
    except BrokenPipeError:
        # Nobody reads on; what is still buffered must not raise again when the interpreter flushes it.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        return 1
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _stopper() -> Callable[[int, object], None]:
    deaf_until = 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal deaf_until
        now = time.monotonic()
        if now >= deaf_until:
            deaf_until = now + CLEANING_UP
            raise Stopped(number)

    return stop
