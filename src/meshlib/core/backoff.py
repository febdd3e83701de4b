"""How long to wait before a retry, and what the user's own strategies say of it.

Decides a length of time. It never sleeps. The default is full jitter (Marc Brooker, "Exponential Backoff And Jitter",
AWS Architecture Blog, 2015): a draw between nothing and a bound that doubles, because callers that failed together
must not come back together. Strategies are tenacity's; its loop is not used, and nothing of it is loaded before a
strategy is to be asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from meshlib.core.chance import Rng
from meshlib.core.report import Attempt
from meshlib.policy import Retry
from meshlib.validation import number

if TYPE_CHECKING:
    from tenacity import RetryCallState

FIRST = 0.025
"""The bound before the first retry, in seconds."""

LONGEST = 0.25
"""Where the doubling ends, in seconds."""

ASKING_STATUS = frozenset({429, 503})
"""The answers whose `Retry-After` asks for another attempt (rule C9)."""

Evidence = Callable[[], object]
"""Makes what an attempt ended with, as strategies see it: an exception, or else the answer."""


def delay_before(retry: int, rng: Rng) -> float:
    """Seconds to wait before a retry; `retry` counts from 1."""
    return rng.random() * min(LONGEST, FIRST * 2.0 ** min(retry - 1, 10))


def is_asked_for(attempt: Attempt) -> bool:
    """Whether the server itself has said when to come again."""
    return attempt.retry_after is not None and attempt.status in ASKING_STATUS


def advised(
    retry: Retry, attempts: Sequence[Attempt], counted: int, now: float, wait: float, evidence: Evidence
) -> float | None:
    """What the user's strategies make of a retry that the rules allow. Never under a lock: they are not our code.

    Args:
        retry: the settings.
        attempts: the call's, of which the last has just failed.
        counted: how many of them count to `max_attempts`.
        now: the time.
        wait: seconds to wait if no strategy says otherwise.
        evidence: what the last one ended with.

    Returns:
        The seconds to wait; None if there is to be no retry.

    Raises:
        ValueError: if what a strategy returned cannot be.
        Exception: a strategy's own.
    """
    if retry.on is None and retry.wait is None and retry.stop is None:
        return wait
    asked_for = is_asked_for(attempts[-1])
    state = _state(attempts, counted, now, evidence())
    if retry.on is not None and not asked_for and not _said("on", retry.on(state)):
        return None
    if retry.wait is not None and not asked_for:
        wait = _seconds(retry.wait(state))
    state.upcoming_sleep = wait
    return None if retry.stop is not None and _said("stop", retry.stop(state)) else wait


def _state(attempts: Sequence[Attempt], counted: int, now: float, ended_with: object) -> RetryCallState:
    """The call as tenacity's strategies know one."""
    from tenacity import Future, RetryCallState

    state = RetryCallState(cast(Any, None), None, (), {})
    state.start_time, state.outcome_timestamp = attempts[0].started, now
    state.attempt_number = counted
    state.idle_for = sum(attempt.waited for attempt in attempts)
    state.outcome = Future(counted)
    if isinstance(ended_with, BaseException):
        state.outcome.set_exception(ended_with)
    else:
        state.outcome.set_result(ended_with)
    return state


def _said(name: str, answer: object) -> bool:
    if inspect.iscoroutine(answer):  # it would pass for a yes
        answer.close()
        raise ValueError(f"Retry({name}=...) returned a coroutine: a strategy must not be async")
    return bool(answer)


def _seconds(answer: Any) -> float:
    if wrong := number(at_least=0)(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise ValueError(f"Retry(wait=...) returned {answer!r}: {wrong} (seconds)")
    return float(answer)
