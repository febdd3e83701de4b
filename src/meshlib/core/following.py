"""What may follow an attempt that ended badly: a free one, a failover, a retry or none, and after how long.

Decides by the rules alone; the user's strategies have their say on a retry afterwards, see `backoff`. It never begins
an attempt and does not pay for one. All of it happens under the cluster's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from meshlib.core.backoff import delay_before, is_asked_for
from meshlib.core.choosing import has_untried, is_among_strangers
from meshlib.core.cluster import Cluster
from meshlib.core.ending import Ending
from meshlib.core.outcome import End, Outcome
from meshlib.core.report import Attempt, Kind
from meshlib.core.tally import Decision
from meshlib.policy import Retry


class CallState(NamedTuple):
    """Where a call stands when one of its attempts has ended badly.

    Attributes:
        retry: the settings.
        repeatable: whether the request may be executed twice (rule C1).
        retries: whether there may be more than one attempt, apart from a transparent one.
        on_behalf: whether the caller is itself at work for a retry (rule C10).
        attempts: all of its attempts.
        counted: how many of them count to `max_attempts`.
        is_expired: whether its total time has run out.
    """

    retry: Retry
    repeatable: bool
    retries: bool
    on_behalf: bool
    attempts: Sequence[Attempt]
    counted: int
    is_expired: bool


def another(
    cluster: Cluster, call: CallState, attempt: Attempt, ending: Ending, now: float
) -> tuple[Kind, float] | Decision:
    """What may follow this attempt, and after how many seconds; or why nothing may."""
    if not ending.resendable:
        return "not_repeatable"
    if ending.end is End.stale and (call.repeatable or not ending.sent) and not _count(call, "transparent"):
        return "transparent", 0.0  # rule C8: nobody's fault, and free, once
    if call.is_expired:
        return "deadline"
    if not call.retries:
        return "switched_off"
    kind: Kind = "failover" if _fails_over(cluster, call, attempt, now) else "retry"
    if kind == "retry" and (why := _why_no_retry(cluster, call, attempt)) is not None:
        return why
    return kind, _wait_before(cluster, call, kind, attempt, now)


def _fails_over(cluster: Cluster, call: CallState, attempt: Attempt, now: float) -> bool:
    """Whether another attempt would be a failover, which is no retry."""
    if attempt.outcome is not Outcome.not_sent:
        return False
    return _count(call, "failover") < len(cluster.view.nodes) and has_untried(cluster, call.attempts, now)


def _count(call: CallState, kind: Kind) -> int:
    return sum(attempt.kind == kind for attempt in call.attempts)


def _why_no_retry(cluster: Cluster, call: CallState, attempt: Attempt) -> Decision | None:
    """Why there may be no retry; None if there may."""
    retry = call.retry
    if is_among_strangers(cluster, call.attempts):
        return "not_retryable"
    if attempt.outcome is not Outcome.not_sent:
        if not call.repeatable:
            return "not_repeatable"
        if call.on_behalf:
            return "on_behalf"
        if attempt.status is None:
            if attempt.outcome is not Outcome.failed:
                return "deadline"  # which cut it short
        elif attempt.status not in retry.on_status and retry.on is None and not is_asked_for(attempt):
            return "not_retryable"
    return None if call.counted < retry.max_attempts else "attempts_exhausted"


def _wait_before(cluster: Cluster, call: CallState, kind: Kind, attempt: Attempt, now: float) -> float:
    """The server's word (rule C9); nothing before a failover or the first retry elsewhere; else the back-off."""
    if attempt.retry_after is not None:
        return attempt.retry_after
    if kind == "failover" or (call.counted == 1 and has_untried(cluster, call.attempts, now)):
        return 0.0
    return delay_before(call.counted, cluster.rng)
