"""How the tests wait for what another thread, task or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(is_true: Callable[[], object], seconds: float = 20.0, what: str = "it did not come to that") -> None:
    """Wait for it, this many seconds at most: by default more than any machine should take, however busy it is."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
