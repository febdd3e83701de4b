"""The user's own strategies for retries (`wait`, `stop`, `on`), and calls made on behalf of a retry (C10)."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from itertools import repeat
from typing import Any

import httpx
import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from scripted import LOST, OK, PROPERTY, REFUSED, STALE, UNAVAILABLE, Draws, Stage, Step, answer, broke

from meshlib import Budget, LeastRequest, Retry
from meshlib.core.outcome import End

SLOW = broke(End.timeout, error="ReadTimeout", seen=httpx.ReadTimeout("slow"))
RESET = broke(End.lost, error="ReadError: reset", seen=httpx.ReadError("reset"))
INVITED = answer(503, retry_after=2.5)


def answered(status: int, **more: Any) -> Step:
    return answer(status, seen=httpx.Response(status), **more)


class Asked:
    """A strategy that says the same every time, and remembers what it was asked."""

    def __init__(self, says: Any) -> None:
        self.says = says
        self.states: list[tenacity.RetryCallState] = []

    def __call__(self, state: tenacity.RetryCallState) -> Any:
        self.states.append(state)
        return self.says


def never_asked(state: Any) -> Any:
    raise AssertionError(f"asked about {state}")


# wait


def test_a_wait_holds_before_every_retry_and_not_before_a_failover() -> None:
    stage = Stage(4, retry=Retry(max_attempts=4, wait=tenacity.wait_fixed(1)))
    played = stage.play([REFUSED, UNAVAILABLE, REFUSED, LOST, OK])
    assert played.kinds == ["first", "failover", "retry", "failover", "retry"]
    assert played.waits == [0.0, 1.0, 0.0, 1.0]


def test_waits_add_up_and_grow_with_the_attempts_that_count() -> None:
    wait = tenacity.wait_fixed(1) + tenacity.wait_incrementing(0, 0.5)
    played = Stage(3, retry=Retry(max_attempts=4, wait=wait)).play([REFUSED, UNAVAILABLE, STALE, LOST, UNAVAILABLE, OK])
    assert played.kinds == ["first", "failover", "retry", "transparent", "retry", "retry"]
    assert played.waits == [0.0, 1.0, 0.0, 1.5, 2.0]


def test_a_function_of_ones_own_may_say_how_long() -> None:
    stage = Stage(1, retry=Retry(wait=lambda state: 0.1 * state.attempt_number))
    assert stage.play([LOST, LOST, OK]).waits == [0.1, 0.2]


def test_C9_a_retry_after_wins_over_the_wait_and_is_not_asked_about_but_stops_like_any_other() -> None:
    stage = Stage(3, retry=Retry(wait=never_asked, on=never_asked))
    assert stage.play([INVITED, OK]).waits == [2.5]
    assert len(Stage(3, retry=Retry(stop=tenacity.stop_after_attempt(1))).play([INVITED]).attempts) == 1


@pytest.mark.parametrize("wait", [tenacity.wait_fixed(29.99), tenacity.wait_fixed(3600)])
def test_a_wait_beyond_the_deadline_is_no_retry_and_costs_nothing(wait: Any) -> None:
    stage = Stage(2, retry=Retry(wait=wait))
    assert stage.play([UNAVAILABLE]).waits == []
    assert stage.tokens == 500


# stop


def test_stop_holds_beside_max_attempts_and_counts_as_it_does() -> None:
    def attempts(script: list[Step], stop: int, limit: int) -> int:
        retry = Retry(max_attempts=limit, stop=tenacity.stop_after_attempt(stop))
        return len(Stage(4, retry=retry).play(script).attempts)

    assert attempts([LOST] * 2, stop=2, limit=5) == 2
    assert attempts([LOST] * 3, stop=5, limit=3) == 3
    assert attempts([REFUSED, REFUSED, LOST, LOST], stop=2, limit=5) == 4, "failovers do not count"
    assert attempts([REFUSED, OK], stop=1, limit=5) == 2, "nor are they stopped"
    assert attempts([STALE, LOST, LOST], stop=2, limit=5) == 3


def test_a_delay_to_stop_after_is_measured_on_the_clock_of_the_mesh() -> None:
    step = answer(503, lasts=0.6)
    stage = Stage(3, retry=Retry(max_attempts=9, stop=tenacity.stop_after_delay(1)))
    assert len(stage.play([step, step]).attempts) == 2


def test_what_is_to_be_waited_counts_for_a_strategy_that_asks() -> None:
    def stop(state: Any) -> bool:
        return bool(state.seconds_since_start + state.upcoming_sleep >= 1)

    retry = Retry(max_attempts=9, stop=stop, wait=tenacity.wait_fixed(0.6))
    assert Stage(1, retry=retry).play([LOST, LOST]).waits == [0.6]


def test_stops_are_combined() -> None:
    event = threading.Event()
    either = tenacity.stop_after_attempt(3) | tenacity.stop_when_event_set(event)
    both = tenacity.stop_after_attempt(2) & tenacity.stop_when_event_set(event)
    for stop, before, after in ((either, 3, 1), (both, 4, 2)):
        event.clear()
        stage = Stage(3, retry=Retry(max_attempts=4, stop=stop))
        assert len(stage.play([LOST] * before).attempts) == before
        event.set()
        assert len(stage.play([LOST] * after).attempts) == after


# on


def test_on_decides_in_the_place_of_on_status() -> None:
    stage = Stage(3, retry=Retry(on=tenacity.retry_if_exception_type(httpx.ReadTimeout)))
    assert stage.play([SLOW, OK]).kinds == ["first", "retry"]
    for step in (RESET, answered(503), answered(500)):
        assert len(stage.play([step]).attempts) == 1
    stage = Stage(3, retry=Retry(on=tenacity.retry_if_result(lambda response: response.status_code == 500)))
    assert stage.play([answered(500), OK]).kinds == ["first", "retry"]
    for step in (SLOW, answered(503), answered(429)):
        assert len(stage.play([step]).attempts) == 1


def test_ons_are_combined() -> None:
    slow = tenacity.retry_if_exception_type(httpx.TransportError)
    polite = tenacity.retry_if_not_exception_type(httpx.ReadError)
    broken = tenacity.retry_if_result(lambda response: response.status_code in (500, 429))
    stage = Stage(3, retry=Retry(max_attempts=5, on=(slow & polite) | broken))
    assert len(stage.play([SLOW, answered(500), answered(429), RESET]).attempts) == 4


def test_on_is_asked_about_the_answers_that_on_status_adds() -> None:
    asked = Asked(True)
    stage = Stage(3, retry=Retry(on=asked, on_status={404}))
    stage.play([answered(404), answered(503), OK])
    assert [state.outcome and state.outcome.result().status_code for state in asked.states] == [404, 503]
    assert len(stage.play([answered(400)]).attempts) == 1


CANCELLED = broke(End.caller)


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ([OK], {}),
        ([answered(404)], {}),
        ([CANCELLED], {}),
        ([broke(End.timeout, lasts=2.0)], {"total": 2.0}),
        ([RESET], {"repeatable": False}),
        ([answered(503)], {"repeatable": False}),
        ([Step(end=End.lost, resendable=False)], {}),
        ([answered(503)], {"retries": False}),
        ([STALE, OK], {}),
        ([REFUSED, REFUSED, OK], {}),
        ([LOST, LOST, LOST], {}),
    ],
)
def test_C1_a_strategy_is_not_asked_where_the_rules_have_decided(script: list[Step], how: dict[str, Any]) -> None:
    asked = Asked(True)
    Stage(3, retry=Retry(on=asked)).play(script, **how)
    assert len(asked.states) == (2 if script == [LOST] * 3 else 0), "max_attempts is a rule as well"


def test_a_request_that_was_not_sent_goes_again_to_the_only_endpoint_if_on_says_so() -> None:
    refused = broke(End.lost, sent=False, seen=httpx.ConnectError("refused"))
    stage = Stage(1, retry=Retry(on=tenacity.retry_if_exception_type(httpx.ConnectError)))
    assert stage.play([refused, OK], repeatable=False).kinds == ["first", "retry"]
    stage = Stage(1, retry=Retry(on=tenacity.retry_if_result(lambda response: True)))
    assert stage.play([refused]).kinds == ["first"]


# What strategies are told, and what becomes of what they say


def test_a_strategy_is_told_of_the_call() -> None:
    asked = Asked(0.5)
    stage = Stage(3, retry=Retry(wait=asked), rng=Draws(1.0))
    began = stage.clock()
    stage.play([REFUSED, answered(503, lasts=0.2), Step(**{**vars(RESET), "lasts": 0.3}), OK])
    first, second = asked.states
    assert (first.attempt_number, second.attempt_number) == (1, 2)
    assert (first.idle_for, second.idle_for) == (0.0, 0.5)
    assert first.start_time == second.start_time == began
    assert [first.seconds_since_start, second.seconds_since_start] == pytest.approx([0.21, 1.01])
    assert first.outcome is not None
    assert second.outcome is not None
    assert (first.outcome.failed, first.outcome.result().status_code) == (False, 503)
    assert (second.outcome.failed, second.outcome.exception()) == (True, RESET.seen)
    assert (first.outcome.attempt_number, second.outcome.attempt_number) == (1, 2)


@pytest.mark.parametrize("name", ["wait", "stop", "on"])
@pytest.mark.parametrize("step", [answered(503), RESET], ids=["answer", "error"])
def test_C7_what_a_strategy_raises_leaves_the_call_which_is_settled_by_then(name: str, step: Step) -> None:
    def raising(state: Any) -> Any:
        raise KeyError("mine")

    stage = Stage(2, retry=Retry(**{name: raising}))
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    with pytest.raises(KeyError, match="mine"):
        stage.settle(call, attempt, step)
    assert attempt.outcome is not None
    call.release(attempt, stage.clock())
    assert (stage.in_flight, stage.nodes[0].failures, stage.tokens) == (0, 1, 500)
    assert not stage.cluster.lock.locked()


async def later(state: Any) -> Any:
    raise AssertionError("never awaited")


@pytest.mark.parametrize(
    ("name", "strategy", "said"),
    [
        *(("wait", Asked(value), "must be") for value in (None, -0.1, float("nan"), "1")),
        ("wait", lambda state: later(state), r"must be a finite number \(seconds\)"),
        ("stop", lambda state: later(state), "must not be async"),
        ("on", lambda state: later(state), "must not be async"),
    ],
)
def test_what_a_strategy_cannot_have_meant_is_an_error(name: str, strategy: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"Retry\({name}=\.\.\.\) returned .*{said}"):
        Stage(2, retry=Retry(**{name: strategy})).play([UNAVAILABLE])


@pytest.mark.parametrize("name", ["wait", "stop", "on"])
def test_a_strategy_may_look_at_the_mesh(name: str) -> None:
    """It is asked outside the lock."""

    def looking(state: Any) -> float:
        assert not stage.cluster.lock.locked()
        return stage.cluster.snapshot(stage.clock()).in_flight

    stage = Stage(2, retry=Retry(**{name: looking}))
    stage.play(iter([LOST, OK]))


def test_B1_a_retry_is_paid_for_whatever_a_strategy_says() -> None:
    stage = Stage(2, retry=Retry(max_attempts=9, on=Asked(True), wait=Asked(0), budget=Budget(capacity=30)))
    assert len(stage.play([answered(500)] * 3).attempts) == 3
    assert stage.tokens == 2


@PROPERTY
@given(st.lists(st.sampled_from([LOST, UNAVAILABLE, REFUSED, STALE, INVITED, answered(500)]), min_size=1, max_size=6))
def test_C2_strategies_that_always_say_yes_do_not_outdo_the_rules(script: list[Step]) -> None:
    retry = Retry(on=Asked(True), wait=Asked(0), stop=Asked(False))
    stage = Stage(3, retry=retry, balancer=LeastRequest(), rng=random.Random(1))
    kinds = stage.play(step for _ in repeat(None) for step in script).kinds
    assert kinds.count("retry") <= 2
    assert kinds.count("failover") <= 3
    assert kinds.count("transparent") <= 1


def test_tenacity_is_not_loaded_before_a_strategy_is_asked() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from scripted import OK, UNAVAILABLE, Stage\n"
        "from meshlib import Retry\n"
        "Stage(1).play([UNAVAILABLE, OK])\n"
        "Stage(1, retry=Retry(wait=lambda state: 1)).play([OK])\n"
        "assert 'tenacity' not in sys.modules\n"
        "assert Stage(1, retry=Retry(wait=lambda state: 1)).play([UNAVAILABLE, OK]).waits == [1]\n"
        "assert 'tenacity' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, *sys.path], check=True, timeout=60)


# On behalf of a retry


@pytest.mark.parametrize("step", [UNAVAILABLE, LOST, SLOW, INVITED, answer(429, retry_after=0.1)])
def test_C10_on_behalf_of_a_retry_nothing_that_was_sent_is_sent_again(step: Step) -> None:
    for retry in (Retry(), Retry(on=Asked(True))):
        stage = Stage(3, retry=retry)
        assert stage.play([step], on_behalf=True).kinds == ["first"]
        assert stage.tokens == 500


def test_C10_on_behalf_of_a_retry_failovers_go_on() -> None:
    assert Stage(3).play([REFUSED, REFUSED, LOST], on_behalf=True).kinds == ["first", "failover", "failover"]
    assert Stage(1).play([REFUSED, OK], on_behalf=True).kinds == ["first", "retry"], "it has reached nobody either"
    assert Stage(3).play([STALE, UNAVAILABLE], on_behalf=True).kinds == ["first", "transparent"]
    assert Stage(3).play([REFUSED], on_behalf=True, retries=False).kinds == ["first"]
