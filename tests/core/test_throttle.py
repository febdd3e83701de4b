"""Rules B4 (its second half) and B5: what a throttle refuses, when it begins to, and when it lets go."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import PROPERTY, Draws
from stall import Stall

from meshlib import Throttle
from meshlib.core.throttle import MOST, Shedder

pytestmark = pytest.mark.once

RATES = pytest.mark.parametrize("rate", [2, 50, 5000])


class Traffic:
    """Calls at a steady rate, whose ends are told to a throttle.

    Args:
        rate: calls per second.
        is_overloaded: called for each attempt that is made; whether it ends with a sign of overload.
    """

    def __init__(self, rate: float, seed: int = 7, throttle: Throttle | None = None) -> None:
        self.rng = random.Random(seed)
        self.shedder = Shedder(throttle or Throttle())
        self.rate = rate
        self.now = 1000.0

    def run(self, seconds: float, is_overloaded: Callable[[], bool]) -> list[bool]:
        """Let calls come for a time; returns which of them went out."""
        ends, went_out = self.now + seconds, []
        while self.now < ends:
            self.now += self.rng.expovariate(self.rate)
            went_out.append(not self.shedder.is_awake or self.shedder.admits(self.now, self.rng))
            if not went_out[-1]:
                continue
            if is_overloaded():
                self.shedder.overloaded(self.now)
            elif self.shedder.is_awake:
                self.shedder.accepted(self.now)
        return went_out

    def fails(self, seconds: float) -> list[bool]:
        return self.run(seconds, lambda: True)

    def works(self, seconds: float) -> list[bool]:
        return self.run(seconds, lambda: False)

    def suffers(self, seconds: float, share: float) -> list[bool]:
        """Signs of overload at random."""
        return self.run(seconds, lambda: self.rng.random() < share)


def refused(went_out: list[bool]) -> float:
    return went_out.count(False) / len(went_out)


def test_B4_a_throttle_that_heard_nothing_is_asleep_and_refuses_nothing() -> None:
    shedder = Shedder(Throttle())
    assert not shedder.is_awake
    assert shedder.share(1000.0) == 0
    shedder.accepted(1000.0)
    assert shedder.admits(1000.0, Draws(0.0))
    assert not shedder.is_awake


@pytest.mark.parametrize(("rate", "reacts", "lets_go"), [(2, 10, 8), (50, 1, 3), (5000, 0.5, 3)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_B4_it_reacts_within_seconds_and_lets_go_within_seconds(
    rate: float, reacts: float, lets_go: float, seed: int
) -> None:
    traffic = Traffic(rate, seed)
    assert refused(traffic.works(3)) == 0
    traffic.fails(reacts)
    assert refused(traffic.fails(20 if rate < 100 else 0.5)) >= (0.5 if rate == 2 else 0.85)
    traffic.works(lets_go)
    assert traffic.shedder.share(traffic.now) == 0
    assert refused(traffic.works(20 if rate < 100 else 0.5)) == 0


@pytest.mark.parametrize(("rate", "reacts"), [(2, 30), (50, 2), (5000, 2)])
def test_B4_an_awake_one_that_heard_good_answers_reacts_as_well(rate: float, reacts: float) -> None:
    traffic = Traffic(rate)
    traffic.suffers(20 if rate < 100 else 1, 0.2)
    assert traffic.shedder.is_awake
    traffic.fails(reacts)
    assert traffic.shedder.share(traffic.now) >= 0.5


@pytest.mark.parametrize(("rate", "seconds"), [(5, 300), (50, 30), (500, 5)])
@pytest.mark.parametrize("share", [0.2, 1 / 3], ids=["a-fifth", "one-of-three"])
def test_B4_timeouts_at_random_and_one_endpoint_of_three_that_hangs_cause_no_refusals(
    rate: float, seconds: float, share: float
) -> None:
    traffics = [Traffic(rate, seed) for seed in range(10)]
    assert not any(refused(traffic.suffers(seconds, share)) for traffic in traffics)
    assert all(traffic.shedder.is_awake for traffic in traffics)


def test_B4_a_batch_of_which_a_third_hangs_causes_no_refusals() -> None:
    shedder = Shedder(Throttle())
    for left in range(33, 0, -1):
        shedder.overloaded(1000.0, left)
        assert shedder.admits(1000.0, Draws(0.0))


def hanging(workers: int, timeout: float, seed: int) -> Shedder:
    """Workers that call one of three endpoints at random, without a pause; after a second one hangs for good.

    What it does not answer in time is called again elsewhere, so no call need fail.
    """
    shedder, rng = Shedder(Throttle()), random.Random(seed)
    agenda = [(rng.random() / 100, False) for _ in range(workers)]
    now = 0.0
    while now < 3 * timeout + 2:
        now, is_timeout = heapq.heappop(agenda)
        if is_timeout:
            shedder.overloaded(now, workers)
        elif shedder.is_awake:
            shedder.accepted(now)
            shedder.admits(now, rng)
        hangs = now > 1 and not is_timeout and rng.random() < 1 / 3
        heapq.heappush(agenda, (now + (timeout if hangs else 0.005 + rng.random() / 100), hangs))
    return shedder


@pytest.mark.parametrize(("workers", "timeout"), [(16, 0.5), (100, 0.5), (100, 10.0)])
def test_B4_callers_who_all_hung_at_the_same_endpoint_cause_no_refusals(workers: int, timeout: float) -> None:
    for seed in range(3):
        shedder = hanging(workers, timeout, seed)
        assert shedder.is_awake
        assert shedder.refused == 0


@RATES
def test_B4_eight_timeouts_in_a_row_refuse_nothing(rate: float) -> None:
    shedder = Shedder(Throttle())
    for number in range(8):
        shedder.overloaded(1000.0 + number / rate)
        assert shedder.admits(1000.0 + number / rate, Draws(0.0))
    shedder.overloaded(1000.0 + 8 / rate)
    assert shedder.share(1000.0 + 8 / rate) == 1 / 4, "the ninth is not held for everything"


@pytest.mark.parametrize("k", [1.2, 2.0, 4.0])
def test_B4_k_times_what_an_overloaded_service_accepts_is_let_through(k: float) -> None:
    traffic = Traffic(2000, throttle=Throttle(k=k))
    accepts, began = 300, traffic.now
    taken = 0

    def is_overloaded() -> bool:
        nonlocal taken
        is_over = taken >= accepts * (traffic.now - began)
        taken += not is_over
        return is_over

    traffic.run(5, is_overloaded)
    assert traffic.run(5, is_overloaded).count(True) == pytest.approx(5 * k * accepts, rel=0.1)


@RATES
def test_B4_at_most_nine_in_ten_are_refused(rate: float) -> None:
    traffic = Traffic(rate)
    traffic.fails(60 if rate < 100 else 1)
    assert traffic.shedder.share(traffic.now) == MOST
    shedder, now = traffic.shedder, traffic.now
    shedder.admits(now, Draws(0.99))
    assert shedder.admits(now, Draws(0.9))
    assert not shedder.admits(now, Draws(0.89))


def test_B4_a_refused_call_counts_as_a_request() -> None:
    traffic = Traffic(50)
    traffic.fails(5)
    traffic.works(0.5)
    before = traffic.shedder.share(traffic.now)
    assert 0 < before < MOST
    traffic.shedder.admits(traffic.now, Draws(1.0))
    assert traffic.shedder.share(traffic.now) == before
    assert not traffic.shedder.admits(traffic.now, Draws(0.0))
    assert traffic.shedder.share(traffic.now) > before


def test_B4_when_none_went_out_for_a_second_one_does() -> None:
    shedder = Shedder(Throttle())
    for _ in range(100):
        shedder.overloaded(1000.0)
    asked = [1000.0, 1000.9, 1001.0, 1001.1, 1001.9, 1002.0]
    assert [shedder.admits(now, Draws(0.0)) for now in asked] == [False, False, True, False, False, True]
    assert shedder.admits(1002.5, Draws(0.99))
    assert not shedder.admits(1003.4, Draws(0.0)), "whatever lets one out counts"


def test_B4_callers_who_come_in_the_wrong_order_change_nothing() -> None:
    shares = []
    for late in (0.0, 0.1):
        shedder, now = Shedder(Throttle()), 1000.0
        shedder.overloaded(now, 50)
        for number in range(120):
            now += 0.02
            shedder.overloaded(now - late * (number % 2))
            shedder.overloaded(now)
        shares.append(shedder.share(now))
    assert shares[0] == pytest.approx(shares[1], rel=0.02)


def test_B4_it_goes_to_sleep_when_the_window_has_passed_without_a_sign() -> None:
    traffic = Traffic(50, throttle=Throttle(window=10.0))
    traffic.fails(5)
    shedder, now = traffic.shedder, traffic.now
    shedder.overloaded(now)
    assert shedder.share(now + 10.0) == MOST
    shedder.admits(now + 10.0, Draws(0.99))
    assert not shedder.admits(now + 10.0, Draws(0.0))
    assert shedder.share(now + 10.1) == 0
    assert shedder.is_awake, "only who is asked goes to sleep"
    assert shedder.admits(now + 10.1, Draws(0.0))
    assert not shedder.is_awake
    shedder.overloaded(now + 11.0)
    assert shedder.is_awake
    assert shedder.share(now + 11.0) == 0, "what was before is forgotten"


def test_B5_without_enforcement_it_counts_what_it_would_have_refused() -> None:
    traffic = Traffic(50, throttle=Throttle(enforce=False))
    calls = traffic.fails(10)
    assert all(calls)
    assert traffic.shedder.refused == 0
    assert traffic.shedder.would_refuse == pytest.approx(0.9 * len(calls), rel=0.1)
    assert traffic.shedder.share(traffic.now) == MOST


def test_B4_refusals_are_counted() -> None:
    traffic = Traffic(50)
    went_out = traffic.fails(10)
    assert traffic.shedder.refused == went_out.count(False) > 0
    assert traffic.shedder.would_refuse == 0


@PROPERTY
@given(
    st.lists(st.tuples(st.sampled_from(["overloaded", "accepted", "ask"]), st.floats(-1, 150), st.floats(0, 0.999))),
    st.floats(1, 5),
)
def test_B4_the_share_stays_within_its_bounds_whatever_the_clock_does(
    story: list[tuple[str, float, float]], k: float
) -> None:
    shedder, now = Shedder(Throttle(k=k)), 1000.0
    for what, passes, draw in story:
        now += passes
        if what == "overloaded":
            shedder.overloaded(now)
        elif shedder.is_awake:
            share = shedder.share(now)
            assert 0 <= share <= MOST
            if what == "accepted":
                shedder.accepted(now)
                assert shedder.share(now) <= share
            elif not shedder.admits(now, Draws(draw)):
                assert draw < share


def test_two_runs_are_the_same() -> None:
    one, two = ([*Traffic(50).fails(5), *Traffic(50).suffers(5, 0.5)] for _ in range(2))
    assert one == two


@pytest.mark.parametrize("total", [1.0, 2.0])
@pytest.mark.parametrize(("rate", "callers"), [(50, 1), (200, 8), (1000, 1)])
def test_B4_goodput_is_back_within_5_seconds_of_a_stall(rate: float, callers: int, total: float) -> None:
    stall = Stall(rate, 3, callers, total=total)
    assert stall.goodput(-14, -11) == 1
    assert stall.goodput(-9, -1) == 0
    assert stall.back_after <= 5


@pytest.mark.parametrize("rate", [50, 200])
@pytest.mark.parametrize("how", ["naive", "budget-alone"])
def test_B4_without_a_throttle_goodput_is_not_back(rate: float, how: str) -> None:
    budget = {"budget": None} if how == "naive" else {}
    stall = Stall(rate, 3, throttle=None, **budget)
    assert stall.goodput(-14, -11) == 1
    assert stall.goodput(5, 9) < 0.1
