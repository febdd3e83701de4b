"""Processes of real components, for tests.

Decides how one is started so that it never outlives the test run, and which ports it gets. It never signals a process
that it did not start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PATIENCE = 30.0
"""Seconds for a component to get ready, on a machine that has much else to do."""

# The kernel kills the program when the thread that started it is gone, whatever ended that. Python runs nothing of its
# own between fork and exec, as it would warn of where there are threads.
_BOUND_TO_US = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Ports:
    """Free ports of loopback, kept until they are given back.

    Who listens with SO_REUSEADDR, as servers do, gets them all the same, and nobody is given them by chance while the
    server is being restarted.
    """

    def __init__(self, *names: str, host: str = "127.0.0.1") -> None:
        self._held = {name: _reserved(host) for name in names}

    def __getitem__(self, name: str) -> int:
        return int(self._held[name].getsockname()[1])

    def close(self) -> None:
        """Give them back."""
        for held in self._held.values():
            held.close()


def _reserved(host: str) -> socket.socket:
    """A port that is free of TCP, and was free of UDP a moment ago."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        held = socket.socket(family)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, 0))
        with socket.socket(family, socket.SOCK_DGRAM) as datagrams:
            try:
                datagrams.bind(held.getsockname())
            except OSError:
                held.close()
            else:
                return held


class Process:
    """One running program, whose output goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as written:
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOUND_TO_US, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                env=environment,
            )

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until it is ready.

        Raises:
            RuntimeError: with the end of its output, if it ended before, or took too long.
        """
        deadline = time.monotonic() + PATIENCE
        while not is_ready():
            if not self.is_running or time.monotonic() > deadline:
                end = self.log.read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"{self._popen.args[6]} did not get ready: {end}")  # type: ignore[index]
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, such as SIGSTOP, after which it hangs, and SIGCONT."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it at once, and wait until it is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end; if that takes 10 s, end it at once."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._end(signal.SIGTERM)
        self.kill()

    def _end(self, with_signal: signal.Signals) -> None:
        self._popen.send_signal(with_signal)
        self._popen.wait(timeout=10)
