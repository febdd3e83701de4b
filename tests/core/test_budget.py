"""Rule B1: the bucket, alone and under a total outage."""

from __future__ import annotations

import random
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import LOST, OK, PROPERTY, REFUSED, UNAVAILABLE, Stage, Step

from meshlib import Budget, LeastRequest
from meshlib.core.budget import Bucket


def test_B1_a_full_bucket_pays_35_retries() -> None:
    bucket = Bucket(Budget())
    assert [bucket.pay(throttled=False) for _ in range(36)] == [14.0] * 35 + [0.0]
    assert bucket.tokens == 500 - 35 * 14


def test_B1_after_a_throttling_answer_an_attempt_costs_5() -> None:
    bucket = Bucket(Budget())
    assert bucket.pay(throttled=True) == 5
    assert bucket.tokens == 495


def test_B1_a_price_may_take_the_last_token_and_what_cannot_be_paid_takes_nothing() -> None:
    bucket = Bucket(Budget(capacity=20, retry_cost=15, throttle_cost=5))
    assert bucket.pay(throttled=False) == 15
    assert bucket.pay(throttled=False) == 0
    assert bucket.tokens == 5
    assert bucket.pay(throttled=True) == 5
    assert bucket.tokens == 0


def test_B1_a_success_after_a_retry_gives_its_cost_back_and_one_at_the_first_try_gives_1() -> None:
    bucket = Bucket(Budget())
    paid = bucket.pay(throttled=False)
    bucket.pay(throttled=False)
    bucket.succeeded(paid)
    assert bucket.tokens == 486
    bucket.succeeded(0.0)
    assert bucket.tokens == 487


def test_B1_the_refund_is_a_setting_and_may_be_nothing() -> None:
    bucket = Bucket(Budget(refund=0))
    bucket.pay(throttled=False)
    bucket.succeeded(0.0)
    assert bucket.tokens == 486


@PROPERTY
@given(
    st.lists(st.one_of(st.booleans(), st.none())),
    st.integers(1, 50),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 5),
)
def test_B1_the_tokens_stay_between_nothing_and_the_capacity(
    acts: list[bool | None], capacity: int, retry_cost: int, throttle_cost: int, refund: int
) -> None:
    settings = Budget(capacity=capacity, retry_cost=retry_cost, throttle_cost=throttle_cost, refund=refund)
    bucket, paid = Bucket(settings), 0.0
    for throttled in acts:
        before = bucket.tokens
        if throttled is None:
            bucket.succeeded(paid)
            assert before <= bucket.tokens <= capacity
        else:
            paid = bucket.pay(throttled=throttled)
            assert before - bucket.tokens == paid
        assert 0 <= bucket.tokens <= capacity


@pytest.mark.parametrize("how", [REFUSED, LOST, UNAVAILABLE], ids=["refused", "lost", "503"])
@pytest.mark.parametrize(("rate", "bound"), [(5, 1.25), (50, 1.10), (500, 1.05)])
def test_B1_in_a_total_outage_the_extra_attempts_dry_up(rate: int, bound: float, how: Step) -> None:
    stage = Stage(3, balancer=LeastRequest(), rng=random.Random(7))
    calls = attempts = 0
    first_second = []
    end = stage.clock() + 60
    while stage.clock() < end:
        due = stage.clock() + 1 / rate
        made = stage.play(repeat(how)).attempts
        calls, attempts = calls + 1, attempts + len(made)
        if calls <= rate:
            first_second.append(sum(attempt.outcome != "not_sent" for attempt in made))
        stage.clock.advance(max(0.0, due - stage.clock()))
    assert calls > 20 * 5
    assert attempts / calls <= bound
    assert sum(first_second) / len(first_second) <= 3.0


def test_B1_when_the_outage_ends_first_try_successes_fill_the_bucket_up_again() -> None:
    stage = Stage(2)
    for _ in range(100):
        stage.play(repeat(REFUSED))
    assert stage.tokens < 14
    for _ in range(600):
        stage.clock.advance(1)
        stage.play([OK])
    assert stage.tokens == 500
