"""Retries without the wait before them.

Decides that alone: whether there is a retry is decided as in production, its wait included in what must fit into the
deadline, and strategies are asked as ever.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshlib.core.report import Attempt, Kind

_lock = threading.Lock()
_depth = 0
_real: Any = None


@contextlib.contextmanager
def no_backoff() -> Iterator[None]:
    """Have no retry wait inside the block, of whatever mesh in this process, sync or async."""
    from meshlib.core.call import Call

    _begin(Call)
    try:
        yield
    finally:
        _end(Call)


def _begin(call: Any) -> None:
    global _depth, _real
    with _lock:
        _depth += 1
        if _depth == 1:
            _real = real = call._go_on

            def at_once(self: Any, attempt: Attempt, kind: Kind, wait: float) -> float:
                return float(real(self, attempt, kind, 0.0))

            call._go_on = at_once


def _end(call: Any) -> None:
    global _depth
    with _lock:
        _depth -= 1
        if not _depth:
            call._go_on = _real
