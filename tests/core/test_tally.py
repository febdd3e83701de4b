"""What a service counts: decisions, ejections, turns of breakers, refusals, bodies that died. None of it shrinks."""

from __future__ import annotations

from typing import Any

import pytest
from scripted import LOST, OK, REFUSED, STALE, UNAVAILABLE, Draws, Stage, Step, answer, broke

from meshlib import Breaker, Budget, Limit, Retry
from meshlib.core.outcome import End

ALONE: dict[str, Any] = {"count": 1}
SHORT = broke(End.timeout, error="ReadTimeout", lasts=0.3)


@pytest.mark.parametrize(
    ("script", "decisions", "how", "settings"),
    [
        ([UNAVAILABLE, OK], ["retried", None], {}, {}),
        ([REFUSED, OK], ["retried", None], {"repeatable": False}, {}),
        ([STALE, OK], ["retried", None], {}, ALONE),
        ([LOST], ["not_repeatable"], {"repeatable": False}, {}),
        ([answer(503, resendable=False)], ["not_repeatable"], {}, {}),
        ([answer(500)], ["not_retryable"], {}, {}),
        ([LOST], ["on_behalf"], {"on_behalf": True}, {}),
        ([LOST], ["switched_off"], {"retries": False}, {}),
        ([LOST], ["attempts_exhausted"], {}, {"retry": Retry(max_attempts=1)}),
        ([SHORT], ["deadline"], {"total": 0.3}, {}),
        ([answer(503, retry_after=60.0)], ["deadline"], {}, {}),
        ([LOST], ["no_budget"], {}, {"retry": Retry(budget=Budget(capacity=1))}),
        ([LOST], ["strategy"], {}, {"retry": Retry(stop=lambda state: True)}),
        ([broke(End.caller)], [None], {}, {}),
    ],
)
def test_an_attempt_that_ended_badly_says_what_followed(
    script: list[Step], decisions: list[str | None], how: dict[str, Any], settings: dict[str, Any]
) -> None:
    stage = Stage(**{"count": 3, **settings})
    played = stage.play(script, **how)
    assert [attempt.decision for attempt in played.attempts] == decisions
    assert dict(stage.cluster.tally.decisions) == {each: 1 for each in decisions if each is not None}


def test_a_retry_that_the_throttle_refuses_is_counted_as_such() -> None:
    stage = Stage(rng=Draws(0.0))
    for _ in range(20):
        stage.cluster.shedder.overloaded(stage.clock(), 0)
    call = stage.call()
    stage.cluster.shedder.is_awake = False  # let in, and then it wakes
    attempt = call.begin(stage.clock())
    assert attempt is not None
    stage.cluster.shedder.is_awake = True
    assert stage.settle(call, attempt, LOST) is None
    assert attempt.decision == "throttled"


def test_turns_and_ejections_are_counted_and_outlive_their_node() -> None:
    stage = Stage(2, breaker=Breaker(consecutive=2, open_for=1.0))
    stage.eject(1)
    stage.clock.advance(3.0)
    stage.play([LOST, OK])  # the probe fails: no other ejection, but another turn
    stage.clock.advance(5.0)
    stage.play([OK])
    assert dict(stage.cluster.tally.turns) == {"open": 2, "half_open": 2, "closed": 1}
    assert dict(stage.cluster.tally.ejections) == {("consecutive", True): 1}
    stage.publish("10.0.0.2:80")
    assert stage.cluster.tally.ejections["consecutive", True] == 1
    assert stage.cluster.tally.changes == 2


def test_B5_what_is_not_enforced_is_counted_apart() -> None:
    stage = Stage(2, breaker=Breaker(consecutive=50, min_calls=4, enforce=False))
    node = stage.nodes[0]
    for _ in range(4):
        stage.cluster.record(node, node.breaker.generation, False, stage.clock())
    assert dict(stage.cluster.tally.ejections) == {("success_rate", False): 1}


def test_what_is_taken_out_by_hand_counts_once() -> None:
    stage = Stage(2)
    for _ in range(2):
        stage.cluster.bar(("10.0.0.1", 80), stage.clock())
    assert dict(stage.cluster.tally.ejections) == {("manual", True): 1}


@pytest.mark.parametrize("limit", [Limit(1), Limit(9, per_endpoint=1)])
def test_a_refused_call_is_counted_by_who_refused_it(limit: Limit) -> None:
    stage = Stage(1, limit=limit)
    assert stage.call().begin(stage.clock()) is not None
    assert stage.call().begin(stage.clock()) is None
    assert dict(stage.cluster.tally.refusals) == {"limit": 1}


def test_a_body_that_dies_is_counted_once() -> None:
    stage = Stage(1)
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    stage.settle(call, attempt, OK)
    for _ in range(2):
        call.release(attempt, stage.clock(), died="ReadError")
    assert stage.cluster.tally.bodies_died == 1
