"""Who is let in: the limits of a service, and its throttle as calls meet it. Rule B4, and B5 for the throttle."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import pytest
from scripted import LOST, OK, REFUSED, Draws, Stage, Step, answer, broke

from meshlib import Breaker, Hedge, Limit, Retry, Throttle, Timeout
from meshlib.core.ending import STALLED
from meshlib.core.outcome import End
from meshlib.core.report import Attempt

TIMEOUT = broke(End.timeout, error="ReadTimeout", lasts=0.5)
THROTTLED = answer(503, retry_after=60.0)


def started(stage: Stage) -> Attempt:
    attempt = stage.call().begin(stage.clock())
    assert attempt is not None
    return attempt


def test_a_call_over_the_limit_is_refused_and_one_that_ends_makes_room() -> None:
    stage = Stage(2, limit=Limit(2))
    calls = [stage.call() for _ in range(3)]
    attempts = [call.begin(stage.clock()) for call in calls]
    assert attempts[2] is None
    assert calls[2].refused == "it has 2 in flight, which is its limit"
    assert calls[2].report.attempts == []
    assert attempts[0] is not None
    stage.settle(calls[0], attempts[0], OK)
    assert stage.call().begin(stage.clock()) is None, "its body is still to come"
    calls[0].release(attempts[0], stage.clock())
    assert stage.call().begin(stage.clock()) is not None


def test_the_limit_is_for_calls_and_not_for_what_a_call_does_next() -> None:
    stage = Stage(2, limit=Limit(1))
    call = stage.call()
    first = call.begin(stage.clock())
    assert first is not None
    assert stage.settle(call, first, REFUSED) is not None
    other = started(stage)
    assert call.begin(stage.clock()) is not None, "its failover"
    assert other.outcome is None
    assert stage.cluster.in_flight == 2


def test_an_endpoint_with_as_many_calls_as_it_may_is_not_chosen() -> None:
    stage = Stage(2, limit=Limit(10, per_endpoint=1))
    assert [str(started(stage).endpoint) for _ in range(2)] == ["10.0.0.1:80", "10.0.0.2:80"]
    call = stage.call()
    assert call.begin(stage.clock()) is None
    assert call.refused == "each of its endpoints has 1 in flight, which is their limit"


def refused(stage: Stage, calls: int) -> int:
    """How many of so many calls are not let in, each of them at the very same time."""
    return sum(
        bool(call.begin(stage.clock()) is None and call.refused) for call in [stage.call() for _ in range(calls)]
    )


SIGNS = [
    ("attempt timeout", TIMEOUT, True),
    ("connect timeout", broke(End.timeout, sent=False, lasts=0.5), True),
    ("429", answer(429), True),
    ("503 with Retry-After", THROTTLED, True),
    ("503 by a proxy that says so", Step(status=503, overloaded=True), True),
    ("503", answer(503), False),
    ("500", answer(500), False),
    ("refused", REFUSED, False),
    ("lost", LOST, False),
    ("no slot", broke(End.no_slot, sent=False), False),
    ("the caller left", broke(End.caller), False),
    ("a timer that was kept", broke(End.timeout, lasts=0.5 + STALLED + 0.1), False),
]


@pytest.mark.parametrize(("step", "is_sign"), [row[1:] for row in SIGNS], ids=[row[0] for row in SIGNS])
def test_B4_what_is_a_sign_of_overload(step: Step, is_sign: bool) -> None:
    stage = Stage(1, rng=Draws(0.0), retry=Retry(max_attempts=1), timeout=Timeout(attempt=0.5))
    for _ in range(40):
        call = stage.call()
        if (attempt := call.begin(stage.clock())) is not None:
            stage.settle(call, attempt, step)
            call.release(attempt, stage.clock())
    assert stage.cluster.shedder.is_awake == is_sign
    assert (refused(stage, 10) > 0) == is_sign


def test_B4_a_refused_call_says_why() -> None:
    stage = Stage(1, rng=Draws(0.0), retry=Retry(max_attempts=1))
    call = stage.call()
    while not call.refused:
        call = stage.call()
        if (attempt := call.begin(stage.clock())) is not None:
            stage.settle(call, attempt, THROTTLED)
            call.release(attempt, stage.clock())
    assert call.refused.startswith("it is overloaded, and ")
    assert call.refused.endswith("% of the calls are refused here")


def test_B4_an_overloaded_service_gets_no_retry_that_its_throttle_does_not_let_in() -> None:
    for step, wait in ((TIMEOUT, None), (REFUSED, 0.0)):
        stage = Stage(2, rng=Draws(0.0), timeout=Timeout(attempt=0.5))
        call = stage.call()
        attempt = call.begin(stage.clock())
        assert attempt is not None
        for _ in range(30):
            stage.cluster.shedder.overloaded(stage.clock())
        assert stage.settle(call, attempt, step) == wait, "what never left is not held against it"


@pytest.mark.parametrize("setting", [{"enforce": False}, {"enforce": True}])
def test_B5_a_throttle_that_is_not_enforced_only_counts(setting: dict[str, Any]) -> None:
    stage = Stage(1, rng=Draws(0.0), retry=Retry(max_attempts=1), throttle=Throttle(**setting))
    for _ in range(40):
        call = stage.call()
        if (attempt := call.begin(stage.clock())) is not None:
            stage.settle(call, attempt, THROTTLED)
            call.release(attempt, stage.clock())
    shedder = stage.cluster.shedder
    assert (shedder.refused > 0, shedder.would_refuse > 0) == (setting["enforce"], not setting["enforce"])


def test_B1_an_attempt_after_an_answer_that_asks_for_fewer_costs_5() -> None:
    stage = Stage(2, retry=Retry(max_attempts=2))
    stage.play([Step(status=503, overloaded=True), answer(503)])
    assert stage.tokens == 495


def test_C2_endpoints_at_their_limit_are_nobody_to_fail_over_to() -> None:
    stage = Stage(2, limit=Limit(9, per_endpoint=1), breaker=Breaker(enforce=False), retry=Retry(max_attempts=1))
    other = stage.nodes[1]
    other.start(stage.clock())
    assert stage.play(repeat(REFUSED), repeatable=False).places == [1]
    assert stage.tokens == 500


def test_C2_there_are_no_more_failovers_than_endpoints_when_the_balancer_does_not_offer_all() -> None:
    class Half:
        def prepare(self, nodes: Any, rng: Any) -> Any:
            return lambda now, key: iter(nodes[:1])

    stage = Stage(2, balancer=Half(), breaker=Breaker(enforce=False), retry=Retry(max_attempts=1))
    assert len(stage.play(repeat(REFUSED)).places) == 3


def test_a_probe_keeps_to_the_limit_of_its_endpoint() -> None:
    stage = Stage(2, limit=Limit(9, per_endpoint=1))
    stage.nodes[0].start(stage.clock())
    stage.eject(1)
    stage.clock.advance(2.0)
    assert stage.play([OK]).places == [2]


@pytest.mark.parametrize("service", [{"limit": Limit(1)}, {}], ids=["limit", "throttle"])
def test_no_call_is_hedged_where_none_would_be_let_in(service: dict[str, Any]) -> None:
    stage = Stage(2, hedge=Hedge(after=0.05), rng=Draws(0.0), **service)
    call = stage.call()
    assert call.begin(stage.clock()) is not None
    if not service:
        for _ in range(40):
            stage.cluster.shedder.overloaded(stage.clock())
    assert call.begin_hedge(stage.clock.advance(0.05)) is None
    assert stage.tokens == 500
