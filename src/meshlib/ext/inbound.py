"""What a request that comes in says of its caller: how long that waits, and which attempt of its call this is.

Decides which headers are believed, and for which calls they hold: those that begin before the request is answered.
Whoever sends them can make nobody's life harder but their own: a deadline only shortens, and what cannot be read counts
as not sent. It knows neither ASGI nor WSGI: `meshlib.ext.asgi` and `meshlib.ext.wsgi` translate.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from meshlib.scope import Scope, behalf_of_attempt, current_scope, deadline
from meshlib.validation import ConfigError, Fault, number

LONGEST = 24 * 3600.0
"""Seconds. Who says they wait longer is not asked how much."""

_MILLISECONDS = re.compile(r"[-+]?[0-9]{1,400}")
_GRPC = re.compile(r"([0-9]{1,8})([HMSmun])")
_ATTEMPT = re.compile(r"[1-9][0-9]{0,3}")
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def _milliseconds(text: str) -> float | None:
    return float(text) / 1000 if _MILLISECONDS.fullmatch(text) else None


def _grpc_timeout(text: str) -> float | None:
    found = _GRPC.fullmatch(text)
    return int(found[1]) * _UNITS[found[2]] if found else None


_DEADLINES: Mapping[str, Callable[[str], float | None]] = {
    "x-meshlib-deadline-ms": _milliseconds,
    "grpc-timeout": _grpc_timeout,
    "x-envoy-expected-rq-timeout-ms": _milliseconds,
}
"""How the headers that tell a deadline are read, as seconds."""

_ATTEMPT_HEADER = "x-meshlib-attempt"

NAMES = (*_DEADLINES, _ATTEMPT_HEADER)
"""Of all headers that mean something here."""

TOO_LATE = json.dumps({"detail": "the deadline of this request had passed when it came"}).encode()
"""The body of the 504 for such a request."""


@dataclass(frozen=True, slots=True)
class Inbound:
    """What a request says of its caller.

    Attributes:
        left: seconds until its deadline; None if it has none.
        attempt: which attempt of its caller's call it is, from 1.
    """

    left: float | None
    attempt: int

    @classmethod
    def of(cls, headers: Mapping[str, str], max_deadline: float | None) -> Self:
        """Read the headers.

        Args:
            headers: those of `NAMES` that the request has; values of one that came more than once are joined by ",".
            max_deadline: what the deadline is at most, whatever the headers say; None if they alone decide.
        """
        told = [
            seconds
            for name, read in _DEADLINES.items()
            for value in headers.get(name, "").split(",")
            if (seconds := read(value.strip())) is not None
        ]
        attempt = headers.get(_ATTEMPT_HEADER, "")
        # A proxy on the way may give up before the caller does, so the earliest holds, whoever told it.
        left = min((*told, LONGEST)) if told else math.inf
        left = left if max_deadline is None else min(left, max_deadline)
        return cls(None if left == math.inf else left, int(attempt) if _ATTEMPT.fullmatch(attempt) else 1)

    @property
    def is_late(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.left is not None and self.left <= 0

    @property
    def is_plain(self) -> bool:
        """Whether it says nothing that holds for calls."""
        return self.left is None and self.attempt == 1


class Serving:
    """A block in which a request is served: its calls end at its deadline, and know which attempt they serve.

    Args:
        inbound: what the request says; it is not late.
    """

    def __init__(self, inbound: Inbound) -> None:
        self._inbound = inbound
        self._blocks = ExitStack()
        self._scopes: list[Scope] = []

    def __enter__(self) -> Self:
        self._enter(behalf_of_attempt(self._inbound.attempt))
        if self._inbound.left is not None:
            self._enter(deadline(self._inbound.left))
        return self

    def _enter(self, block: AbstractContextManager[None]) -> None:
        self._blocks.enter_context(block)
        self._scopes.append(current_scope())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._blocks.close()
        self.answered()

    def answered(self) -> None:
        """The answer has been sent whole, or never will be: what follows, such as a background task, has all the time
        it likes, and is retried as ever, since nobody else repeats it."""
        for scope in self._scopes:
            scope.lift()


def checked_max_deadline(seconds: float | None) -> float | None:
    """Hold the setting against its rule.

    Raises:
        ConfigError: if it is neither None nor a finite number above 0.
    """
    if seconds is not None and (wrong := number(above=0)(seconds)):
        raise ConfigError([Fault("max_deadline", f"{wrong}, got {seconds!r}")])
    return seconds
