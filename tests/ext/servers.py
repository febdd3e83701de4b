"""Web servers as processes of their own, on a socket that listens before they do: nobody has to wait for them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 20.0
"""Seconds that a server may take to end before it is killed."""


@dataclass
class Server:
    """A running server.

    Attributes:
        url: where it listens.
        told: what it has written, once it is stopped.
    """

    url: str
    process: subprocess.Popen[str]
    told: str = ""

    def stop(self) -> float:
        """End it by SIGTERM, and give the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.told, _ = self.process.communicate(timeout=PATIENCE)
        return time.monotonic() - began

    def _end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.told, _ = self.process.communicate()
        elif self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def server(*command: str, folder: Path, **environment: str) -> Iterator[Server]:
    """Run `python -m <command>`, where `{fd}` is the socket's descriptor, in a folder; it is killed at the end."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        arguments = [each.format(fd=listening.fileno()) for each in command]
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env={**os.environ, "HOME": str(folder), **environment},
            pass_fds=[listening.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        started = Server(f"http://127.0.0.1:{listening.getsockname()[1]}", process)
    try:
        yield started
    finally:
        started._end()


def uvicorn(app: str, *more: str) -> tuple[str, ...]:
    """The command for an ASGI app."""
    return "uvicorn", app, "--fd", "{fd}", "--log-level", "warning", *more


def gunicorn(app: str, folder: Path, *more: str) -> tuple[str, ...]:
    """The command for a WSGI app, with two workers."""
    return "gunicorn", app, "--bind", "fd://{fd}", "--workers", "2", "--worker-tmp-dir", str(folder), *more
