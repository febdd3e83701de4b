"""One word for what happened to an attempt, and what follows from it.

Decides, in one table, how a response's status or the end of an attempt without one is judged. It never looks at an
exception: the transport reduces those to two facts, whether a request byte was written and who ended the attempt.

| what happened | outcome | the breaker hears |
|---|---|---|
| refused, connect timeout, no slot, TLS identity: no byte was written | `not_sent` | failure (no slot: nothing) |
| lost after the first request byte, attempt timeout | `failed` | failure (a kept connection that was dead: nothing) |
| 429 | `rejected` | nothing |
| 5xx but 501 and 505 | `rejected` | failure |
| any other status | `ok` | success |
| the caller cancelled, its body raised or did not come in time, or its request was malformed | `abandoned` | nothing |
| cut short by the call's own deadline | `failed` if it lasted ten times the node's usual, else `abandoned` | as above |
"""

from __future__ import annotations

from enum import Enum, StrEnum

USUAL_UNKNOWN = 1.0
"""Seconds without an answer that speak against a node whose latency is not known yet."""

UNUSUAL = 10.0
"""How many times its usual latency an attempt must have lasted before its end speaks against the node."""


class Outcome(StrEnum):
    """What happened to an attempt."""

    ok = "ok"
    rejected = "rejected"
    failed = "failed"
    not_sent = "not_sent"
    abandoned = "abandoned"


class End(Enum):
    """Who or what ended an attempt that brought no response."""

    identity = "the endpoint did not prove to be who it should be"
    lost = "the connection could not be made, or was lost"
    stale = "a kept connection turned out to be closed before it answered"
    timeout = "connecting, sending or waiting took too long"
    no_slot = "no connection of ours became free in time"
    deadline = "the call's own deadline"
    caller = "the caller: cancelled, or its request did not come or could not be sent"


REJECTING = frozenset({429, *range(500, 600)} - {501, 505})
"""The statuses that say that the endpoint has not done its part."""


def outcome_of_status(status: int) -> Outcome:
    """Judge an answer by its status."""
    return Outcome.rejected if status in REJECTING else Outcome.ok


def outcome_of_end(end: End, *, sent: bool, lasted: float, usual: float | None) -> Outcome:
    """Judge an attempt that brought no response.

    Args:
        end: who ended it.
        sent: whether any byte of the request was written.
        lasted: seconds from its start to its end.
        usual: the node's usual latency in seconds, None if it is not known.
    """
    if end is End.caller:
        return Outcome.abandoned
    if end is End.deadline:
        patience = USUAL_UNKNOWN if usual is None else UNUSUAL * usual
        return Outcome.failed if lasted >= patience else Outcome.abandoned
    return Outcome.failed if sent else Outcome.not_sent


def is_throttling(status: int, retry_after: float | None) -> bool:
    """Whether an answer asks for fewer calls."""
    return status == 429 or (status == 503 and retry_after is not None)


def verdict_of(outcome: Outcome, status: int | None, end: End | None) -> bool | None:
    """What a breaker hears of an attempt: True for a success, False for a failure, None for nothing."""
    if outcome is Outcome.ok:
        return True
    if outcome is Outcome.abandoned or status == 429 or end in (End.no_slot, End.stale):
        return None
    return False
