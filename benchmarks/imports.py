"""What `import meshlib` costs beside `import httpx`, in fresh interpreters.

Decides nothing; the start of the interpreter itself is measured too, and taken off both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from figure import Figure, ratios
from paired import Sizes, ratio

PROGRAMS = {"nothing": "pass", "httpx": "import httpx", "meshlib": "import meshlib"}
PROCESSES_PER_ROUND = 3
"""Rounds are cheap here, and single processes differ by a tenth: this many times as many of them."""


def figures(sizes: Sizes) -> Iterator[Figure]:
    """The ratio of the CPU times."""
    rounds = range(sizes.rounds * PROCESSES_PER_ROUND)
    for program in PROGRAMS.values():
        _seconds(program)  # this one compiles what is not compiled yet
    taken = [{name: _seconds(program) for name, program in PROGRAMS.items()} for _ in rounds]
    costs = {name: [each[name] - each["nothing"] for each in taken] for name in ("httpx", "meshlib")}
    yield ratios("imports: meshlib / httpx", ratio(costs, "meshlib", "httpx"))


def _seconds(program: str) -> float:
    process = subprocess.Popen([sys.executable, "-c", program])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise RuntimeError(f"{program!r} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime
