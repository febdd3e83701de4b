"""Chromium, a real browser, for tests.

Decides where the program comes from (`CHROMIUM_BIN`, the path, else Debian's package), and how one page is loaded
without a window. It never clicks: what it gives is what the page has made of itself after a while.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from components.absence import Missing
from components.debian import fetch, libraries, own_suite

PATIENCE = 60.0
"""Seconds for one page, on a machine that has much else to do."""

PACKAGE, FOUND_AT = "chromium-headless-shell", "usr/lib/chromium/chromium-headless-shell"
"""The same browser, without what it needs of a desktop."""

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")
FLAGS += ("--enable-logging=stderr", "--hide-scrollbars")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of a page: its document as HTML, and what was said on the console."""

    document: str
    console: list[str]


@functools.cache
def program() -> tuple[str, dict[str, str] | None]:
    """The program, and the environment it needs.

    Raises:
        Missing: if it is not to be had.
    """
    if chosen := os.environ.get("CHROMIUM_BIN"):
        if not os.access(chosen, os.X_OK):
            raise Missing("CHROMIUM_BIN names no program")
        return chosen, None
    if own := shutil.which("chromium"):
        return own, None
    root = fetch(own_suite(), [PACKAGE], with_lacking=True)
    found = root / FOUND_AT
    if not found.exists():
        raise Missing(f"the package {PACKAGE} has no {FOUND_AT}")
    return str(found), libraries(root)


def load(url: str, *flags: str, seconds: float = 3.0) -> Loaded:
    """Load a page and let it run.

    Args:
        url: of the page.
        flags: more for the browser, such as `--screenshot=page.png`.
        seconds: that the page believes have passed; its timers do not wait for real ones, answers it waits for do.
    """
    path, environment = program()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        budget = f"--virtual-time-budget={seconds * 1000:.0f}"
        command = [path, *FLAGS, f"--user-data-dir={profile}", budget, *flags, "--dump-dom", url]
        done = subprocess.run(
            command, env=environment, cwd=Path(profile), capture_output=True, text=True, timeout=PATIENCE
        )
    if done.returncode:
        raise RuntimeError(f"{path} ended with {done.returncode}: {done.stderr[-2000:]}")
    return Loaded(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])
