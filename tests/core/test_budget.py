"""Rule B1: the bucket, alone and under a total outage."""

from __future__ import annotations

import random
from itertools import repeat
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from scripted import LOST, OK, PROPERTY, REFUSED, UNAVAILABLE, Stage, Step

from meshlib import Budget, LeastRequest
from meshlib.core.budget import Bucket

pytestmark = pytest.mark.once


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


class AgainstTheModel(RuleBasedStateMachine):
    """Payments and successes in any order against a ledger: what was taken, and what came back."""

    paid = Bundle("paid")

    @initialize(capacity=st.integers(1, 60), costs=st.tuples(*[st.integers(1, 20)] * 2), refund=st.integers(0, 5))
    def begin(self, capacity: int, costs: tuple[int, int], refund: int) -> None:
        self.retry_cost, self.throttle_cost = costs
        self.capacity, self.refund = capacity, refund
        self.missing = self.extra = self.came_back = 0
        self.bucket = Bucket(
            Budget(capacity=capacity, retry_cost=self.retry_cost, throttle_cost=self.throttle_cost, refund=refund)
        )

    @rule(target=paid, throttled=st.booleans())
    def pay(self, throttled: bool) -> Any:
        cost = self.throttle_cost if throttled else self.retry_cost
        is_rich = self.missing + cost <= self.capacity
        assert self.bucket.pay(throttled=throttled) == (cost if is_rich else 0)
        if not is_rich:
            return multiple()
        self.missing, self.extra = self.missing + cost, self.extra + 1
        return cost

    @rule(paid=consumes(paid))
    def succeed_after(self, paid: int) -> None:
        self.give_back(paid)

    @rule()
    def succeed_at_the_first_try(self) -> None:
        self.give_back(0)

    def give_back(self, paid: int) -> None:
        self.bucket.succeeded(float(paid))
        self.missing = max(0, self.missing - (paid or self.refund))
        self.came_back += paid or self.refund

    @invariant()
    def they_agree(self) -> None:
        assert self.bucket.tokens == self.capacity - self.missing
        assert 0 <= self.bucket.tokens <= self.capacity
        assert self.extra <= (self.capacity + self.came_back) / min(self.retry_cost, self.throttle_cost)


TestAgainstTheModel = AgainstTheModel.TestCase
TestAgainstTheModel.settings = PROPERTY


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
