"""The upstream process, as the benchmarks see it.

Decides how it is started and ended; what it answers is decided by its program, `answering_server`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from answering_server import BODY

PROGRAM = Path(__file__).with_name("answering_server.py")


class WrongAnswer(Exception):
    """A call came back with something else than the upstream's answer, so that its time says nothing."""


@contextlib.contextmanager
def answering(count: int) -> Iterator[list[str]]:
    """Start the upstream on `count` ports; gives their addresses."""
    command = [sys.executable, "-I", "-S", str(PROGRAM), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield [f"127.0.0.1:{port}" for port in json.loads(process.stdout.readline())]
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def check(status: int, body: bytes) -> None:
    """Insist on the upstream's answer."""
    if status != 200 or body != BODY:
        raise WrongAnswer(f"status {status}, {len(body)} bytes of body")
