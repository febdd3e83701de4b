"""Rule B2: when a breaker opens, its probes, its ramp, and the law of generations: by example, model and walk."""

from __future__ import annotations

from copy import copy
from math import floor, inf
from typing import Any, NamedTuple

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from scripted import PROPERTY, Draws

from meshlib import Breaker
from meshlib.core.breaker import NodeBreaker

pytestmark = pytest.mark.once

LAPSE = 10.0
"""Seconds after which a probe of these tests has lapsed."""


class Alone:
    """A breaker with its time; every node may be ejected."""

    def __init__(self, draw: float = 0.5, **settings: Any) -> None:
        self.breaker = NodeBreaker(Breaker(**settings))
        self.rng = Draws(draw)
        self.now = 1000.0

    def admit(self) -> int | None:
        return self.breaker.admit(self.now, self.now + LAPSE)

    def record(self, permit: int | None, success: bool | None, *, may_open: bool = True) -> bool:
        assert permit is not None
        return self.breaker.record(permit, success, self.now, lambda: may_open, self.rng)

    def hear(self, *verdicts: bool | None, may_open: bool = True) -> bool:
        """Verdicts of calls that were admitted one by one; returns whether the last changed the state."""
        return [self.record(self.admit(), verdict, may_open=may_open) for verdict in verdicts][-1]

    def opened(self) -> Alone:
        self.hear(*[False] * self.breaker._settings.consecutive)
        assert self.breaker.state == "open"
        return self

    def probing(self) -> int:
        """The permit of a probe that is out."""
        self.opened()
        self.now += 2.0
        permit = self.admit()
        assert permit is not None
        assert self.breaker.state == "half_open"
        return permit

    def open_for(self) -> float:
        """How long it stays open from now, to a millisecond."""
        assert self.breaker.state == "open"
        return next(ms / 1000 for ms in range(200_000) if self.breaker.is_eligible(self.now + ms / 1000))


def test_B2_opens_after_5_failures_in_a_row_and_not_before() -> None:
    alone = Alone()
    assert alone.hear(False, False, False, False) is False
    assert alone.breaker.state == "closed"
    assert alone.hear(False) is True
    assert alone.breaker.state == "open"


def test_B2_consecutive_is_a_setting() -> None:
    alone = Alone(consecutive=1)
    alone.hear(False)
    assert alone.breaker.state == "open"


def test_B2_a_success_starts_the_count_anew() -> None:
    alone = Alone()
    alone.hear(False, False, False, False, True, False, False, False, False)
    assert alone.breaker.state == "closed"


def test_B2_an_attempt_that_says_nothing_neither_counts_nor_starts_the_count_anew() -> None:
    alone = Alone()
    alone.hear(False, False, None, False, False, None)
    assert alone.breaker.state == "closed"
    alone.hear(False)
    assert alone.breaker.state == "open"


def test_B3_it_stays_closed_while_no_further_node_may_be_ejected_and_opens_at_the_next_failure_after() -> None:
    alone = Alone()
    alone.hear(*[False] * 20, may_open=False)
    assert alone.breaker.state == "closed"
    alone.hear(False)
    assert alone.breaker.state == "open"


def test_B2_an_open_breaker_admits_nobody_until_its_time_has_passed() -> None:
    alone = Alone().opened()
    alone.now += 1.999
    assert not alone.breaker.is_eligible(alone.now)
    assert alone.admit() is None
    assert alone.breaker.state == "open"
    alone.now = 1002.0
    assert alone.breaker.is_eligible(alone.now)
    assert alone.admit() is not None
    assert alone.breaker.state == "half_open"


@pytest.mark.parametrize(("draw", "length"), [(0.0, 1.0), (0.5, 2.0), (1.0, 3.0)])
def test_B2_the_ejection_has_a_jitter_of_50_percent(draw: float, length: float) -> None:
    assert Alone(draw).opened().open_for() == pytest.approx(length, abs=0.002)


def test_B2_every_failed_probe_doubles_the_ejection_up_to_60_s_and_a_success_starts_at_2_s_again() -> None:
    alone, lengths = Alone().opened(), []
    for _ in range(8):
        lengths.append(alone.open_for())
        alone.now += lengths[-1]
        alone.hear(False)
    assert lengths == pytest.approx([2, 4, 8, 16, 32, 60, 60, 60], abs=0.002)
    alone.now += 60
    assert alone.hear(True) is True
    assert alone.opened().open_for() == pytest.approx(2, abs=0.002)


def test_B2_the_doubling_does_not_overflow() -> None:
    alone = Alone(open_for=0.001, max_open_for=1.0).opened()
    for _ in range(2000):
        alone.now += 2.0
        assert alone.hear(False) is True
    assert alone.open_for() == pytest.approx(1.0, abs=0.002)


def test_B2_an_ejection_never_starts_longer_than_its_bound() -> None:
    assert Alone(open_for=30.0, max_open_for=5.0).opened().open_for() == pytest.approx(5.0, abs=0.002)


def test_B2_exactly_one_probe_at_a_time() -> None:
    alone = Alone()
    alone.probing()
    assert not alone.breaker.is_eligible(alone.now)
    assert [alone.admit() for _ in range(10)] == [None] * 10


def test_B2_a_probe_that_succeeds_closes_the_breaker_and_the_count_starts_at_nothing() -> None:
    alone = Alone()
    assert alone.record(alone.probing(), True) is True
    assert alone.breaker.state == "closed"
    alone.hear(False, False, False, False)
    assert alone.breaker.state == "closed"


def test_B2_a_probe_that_fails_opens_it_even_where_no_further_node_may_be_ejected() -> None:
    alone = Alone()
    assert alone.record(alone.probing(), False, may_open=False) is True
    assert alone.breaker.state == "open"


def test_B2_a_probe_that_learned_nothing_makes_room_for_the_next_one_at_once() -> None:
    alone = Alone()
    first = alone.probing()
    assert alone.record(first, None) is False
    assert alone.breaker.state == "half_open"
    second = alone.admit()
    assert second is not None
    assert second != first
    assert alone.admit() is None


def test_B2_a_second_probe_in_a_row_that_learned_nothing_opens_it_for_twice_as_long() -> None:
    alone = Alone()
    alone.record(alone.probing(), None)
    assert alone.record(alone.admit(), None) is True
    assert alone.breaker.state == "open"
    assert alone.open_for() == pytest.approx(4.0, abs=0.002)
    alone.now += 4.0
    assert alone.record(alone.admit(), None) is False, "the next one is a first again"
    alone.record(alone.admit(), True)
    assert alone.breaker.state == "closed"


def test_B2_a_probe_that_never_reports_lapses() -> None:
    alone = Alone()
    lost = alone.probing()
    alone.now += LAPSE - 0.001
    assert alone.admit() is None
    alone.now += 0.001
    second = alone.admit()
    assert second is not None
    assert alone.record(lost, True) is False, "the lapsed probe came back late"
    assert alone.breaker.state == "half_open"
    assert alone.record(second, True) is True
    assert alone.breaker.state == "closed"


@pytest.mark.parametrize("verdict", [True, False, None])
def test_B2_a_late_answer_from_before_the_ejection_changes_nothing(verdict: bool | None) -> None:
    alone = Alone()
    early = alone.admit()
    alone.opened()
    assert alone.record(early, verdict) is False
    assert alone.breaker.state == "open"
    assert alone.open_for() == pytest.approx(2.0, abs=0.002)
    alone.now += 2.0
    probe = alone.admit()
    assert alone.record(early, verdict) is False
    assert alone.breaker.state == "half_open"
    assert alone.admit() is None, "the late answer gave the probe's place away"
    alone.record(probe, True)
    for _ in range(10):
        alone.record(early, False)
    assert alone.breaker.state == "closed"


def test_B2_late_failures_from_before_an_ejection_do_not_count_after_the_recovery() -> None:
    alone = Alone()
    early = alone.admit()
    alone.record(alone.probing(), True)
    assert alone.breaker.state == "closed"
    alone.hear(False, False, False, False)
    alone.record(early, False)
    assert alone.breaker.state == "closed"
    alone.record(early, True)
    alone.hear(False)
    assert alone.breaker.state == "open", "the late success started the count anew"


# The success rate


def verdicts(alone: Alone, *, good: int, bad: int, every: float = 0.0) -> None:
    """So many of each, spread so that no failures follow each other where that can be had."""
    for position in range(good + bad):
        alone.hear((position + 1) * bad // (good + bad) == position * bad // (good + bad))
        alone.now += every


def test_B2_opens_below_80_percent_of_success_and_not_at_it() -> None:
    alone = Alone()
    verdicts(alone, good=80, bad=20)
    assert alone.breaker.state == "closed"
    alone.hear(False)
    assert alone.breaker.state == "open"
    assert alone.breaker.why == "79% success in 101 calls"


def test_B2_the_rate_takes_10_outcomes_to_judge_by() -> None:
    alone = Alone()
    alone.hear(False, False, True, False, False, True, False, False, True)
    assert alone.breaker.state == "closed"
    alone.hear(False)
    assert alone.breaker.state == "open"


def test_B2_the_rate_and_what_it_takes_are_settings() -> None:
    alone = Alone(success_rate=0.5, min_calls=2)
    alone.hear(True, False)
    assert alone.breaker.state == "closed"
    alone.hear(False)
    assert alone.breaker.state == "open"


def test_B2_a_success_never_opens_a_breaker() -> None:
    alone = Alone(min_calls=10)
    alone.hear(False, False, False, False, True, False, False, False, False)
    assert alone.hear(True) is False, "the tenth outcome, with 20 % of success"
    assert alone.breaker.state == "closed"


@pytest.mark.parametrize(("after", "state"), [(26.9, "open"), (30.1, "closed")])
def test_B2_outcomes_count_for_30_s_to_a_tenth(after: float, state: str) -> None:
    alone = Alone(consecutive=100)
    alone.hear(*[True] * 5, *[False] * 4)
    alone.now += after
    alone.hear(False)
    assert alone.breaker.state == state


@pytest.mark.parametrize("every", [3.4, 5.9])
def test_B2_a_call_every_few_seconds_is_too_little_to_judge_by(every: float) -> None:
    alone = Alone()
    for verdict in [True, False] * 20:  # never 10 within 30 s
        alone.hear(verdict)
        alone.now += every
    assert alone.breaker.ejections == 0


def test_B2_a_call_every_3_s_is_enough() -> None:
    alone = Alone()
    verdicts(alone, good=10, bad=10, every=2.95)
    assert alone.breaker.ejections == 1


def test_B2_what_was_heard_before_an_ejection_does_not_count_after_it() -> None:
    alone = Alone(consecutive=100)
    alone.hear(*[True] * 6, *[False] * 4)
    assert alone.breaker.state == "open"
    alone.now += 2.0
    alone.hear(True)
    alone.hear(*[False] * 9)
    assert alone.breaker.state == "closed"
    alone.hear(False)
    assert alone.breaker.state == "open"


# The ramp


def test_B2_a_success_starts_a_ramp_of_ten_steps_in_10_s_from_a_tenth() -> None:
    alone = Alone()
    assert alone.breaker.share(alone.now) == 1.0
    alone.record(alone.probing(), True)
    start, steps = alone.now, []
    while alone.breaker.next_step(alone.now) < inf:
        steps.append((round(alone.now - start, 6), alone.breaker.share(alone.now)))
        alone.now = alone.breaker.next_step(alone.now)
    assert steps == [(float(n), (n + 1) / 10) for n in range(9)]
    assert alone.breaker.share(alone.now) == 1.0


def test_B2_a_ramp_may_be_of_no_length() -> None:
    alone = Alone(ramp=0)
    alone.record(alone.probing(), True)
    assert (alone.breaker.share(alone.now), alone.breaker.next_step(alone.now)) == (1.0, inf)


def test_B2_a_node_that_is_ejected_on_its_ramp_begins_it_anew() -> None:
    alone = Alone()
    alone.record(alone.probing(), True)
    alone.now += 5.0
    alone.opened()
    assert alone.breaker.next_step(alone.now) == inf, "its steps change nothing while it is not called"
    alone.now += 2.0
    alone.hear(True)
    assert alone.breaker.share(alone.now) == 0.1


# What the view has a say in, and people


def test_B3_refused_by_the_cap_it_is_not_healthy_until_it_succeeds() -> None:
    alone = Alone()
    alone.hear(*[False] * 5, may_open=False)
    assert (alone.breaker.state, alone.breaker.is_refused, alone.breaker.is_healthy) == ("closed", True, False)
    assert alone.breaker.ejections == 0
    alone.hear(None)
    assert not alone.breaker.is_healthy
    alone.hear(True)
    assert alone.breaker.is_healthy


def test_B3_refused_for_its_rate_it_is_not_healthy_until_the_rate_is_good_again() -> None:
    alone = Alone(consecutive=100)
    alone.hear(*[True] * 7, *[False] * 3, may_open=False)
    assert alone.breaker.is_refused
    alone.hear(*[True] * 4)
    assert alone.breaker.is_refused, "11 of 14"
    alone.hear(True)
    assert alone.breaker.is_healthy, "12 of 15"


def test_B3_the_view_is_asked_only_if_it_matters() -> None:
    alone, asked = Alone(), []

    def may_open() -> bool:
        asked.append(alone.breaker.failures_in_a_row)
        return False

    for verdict in [True, False, False, False, False, False, False]:
        alone.breaker.record(alone.admit() or 0, verdict, alone.now, may_open, alone.rng)
    assert asked == [5, 6]


def test_B5_not_enforced_it_counts_what_it_would_have_done_and_does_nothing() -> None:
    alone = Alone(enforce=False)
    alone.hear(*[False] * 12)
    assert (alone.breaker.state, alone.breaker.is_healthy, alone.breaker.unenforced) == ("closed", True, 2)
    assert alone.breaker.why == "5 failures in a row"
    assert alone.breaker.ejections == alone.breaker.generation == 0
    alone.hear(*[True] * 3, False, False, True, False, False)
    assert alone.breaker.unenforced == 3, "by its rate: the two since the second time count as well"


def test_B2_a_probe_may_be_wanted_sooner_and_never_later() -> None:
    alone = Alone().opened()
    alone.breaker.probe_by(alone.now + 5.0)
    assert alone.open_for() == pytest.approx(2.0, abs=0.002)
    alone.breaker.probe_by(alone.now + 0.5)
    assert alone.open_for() == pytest.approx(0.5, abs=0.002)
    alone.now += 0.5
    alone.hear(False)
    assert alone.open_for() == pytest.approx(4.0, abs=0.002), "the doubling goes on"


@pytest.mark.parametrize("state", ["open", "half_open"])
def test_closed_by_hand_it_forgets_what_was_and_starts_a_ramp(state: str) -> None:
    alone = Alone()
    permit = alone.probing()
    if state == "open":
        alone.record(permit, False)
    assert alone.breaker.state == state
    assert alone.breaker.close(alone.now) is True
    assert (alone.breaker.state, alone.breaker.share(alone.now)) == ("closed", 0.1)
    assert alone.record(permit, False) is False
    alone.hear(False, False, False, False)
    assert alone.breaker.state == "closed"
    alone.hear(False)
    assert alone.open_for() == pytest.approx(2.0, abs=0.002)


def test_closing_a_closed_one_by_hand_changes_nothing() -> None:
    alone = Alone()
    alone.hear(False, False, False, False)
    assert alone.breaker.close(alone.now) is False
    alone.hear(False)
    assert alone.breaker.state == "open"


# A model


class Model:
    """A breaker as one would write it down: every outcome with its time, and no slices."""

    def __init__(self, settings: Breaker) -> None:
        self.settings = settings
        self.state, self.is_refused, self.unenforced = "closed", False, 0
        self.heard: list[tuple[float, bool]] = []
        self.opens_until = self.lapses_at = 0.0
        self.closed_at = -inf
        self.opened = 0
        self.in_vain = False

    def is_eligible(self, now: float) -> bool:
        return {"closed": True, "open": now >= self.opens_until, "half_open": now >= self.lapses_at}[self.state]

    def faults(self, now: float) -> set[bool]:
        """Whether there is a reason to open it; both, if that hangs on how long the window is to a tenth."""
        row = 0
        while row < len(self.heard) and not self.heard[-1 - row][1]:
            row += 1
        if row >= self.settings.consecutive:
            return {True}
        window, slack = self.settings.window, 1e-6
        ages = [now - at for at, _ in self.heard]
        least = next((n for n, age in enumerate(ages) if age <= window + slack), len(ages))
        most = next((n for n, age in enumerate(ages) if age < 0.9 * window - slack), len(ages))
        return {self.is_bad([success for _, success in self.heard[n:]]) for n in range(least, most + 1)}

    def is_bad(self, outcomes: list[bool]) -> bool:
        if len(outcomes) < self.settings.min_calls:
            return False
        return sum(outcomes) < self.settings.success_rate * len(outcomes)

    def start_afresh(self, state: str) -> None:
        self.state, self.is_refused, self.heard, self.in_vain = state, False, [], False

    def open(self, now: float) -> None:
        self.opens_until = now + min(self.settings.open_for * 2**self.opened, self.settings.max_open_for)
        self.opened += 1
        self.start_afresh("open")

    def close(self, now: float) -> None:
        self.closed_at, self.opened = now, 0
        self.start_afresh("closed")

    def hear(self, success: bool | None, now: float, may_open: bool, fault: bool) -> None:
        """A verdict of this generation; the outcome is in `heard` already."""
        if self.state == "half_open":
            if success is None and not self.in_vain:
                self.in_vain, self.lapses_at = True, now
            else:
                self.close(now) if success else self.open(now)
        elif success is not None:
            is_reason = fault and (self.is_refused or not success)
            self.is_refused = is_reason and self.settings.enforce
            if is_reason and not success and not self.settings.enforce:
                self.unenforced += 1
                self.heard = []
            elif is_reason and not success and may_open:
                self.open(now)

    def share(self, now: float) -> float:
        done = 10 * (now - self.closed_at) / self.settings.ramp if self.settings.ramp else inf
        return 1.0 if done >= 9 else (1 + floor(done)) / 10


SETTINGS = [
    Breaker(consecutive=3, success_rate=0.0),
    Breaker(consecutive=100, min_calls=4, success_rate=0.6, window=10.0),
    Breaker(window=5.0, min_calls=3, ramp=4.0, open_for=1.0, max_open_for=3.0),
    Breaker(consecutive=3, min_calls=4, enforce=False),
    Breaker(consecutive=2, min_calls=1, success_rate=1.0, ramp=0),
]


class AgainstTheModel(RuleBasedStateMachine):
    """Admissions, verdicts, late verdicts, hands and time, in any order, against the model and the law."""

    permits = Bundle("permits")

    @initialize(settings=st.sampled_from(SETTINGS))
    def begin(self, settings: Breaker) -> None:
        self.breaker, self.model = NodeBreaker(settings), Model(settings)
        self.rng = Draws(0.5)
        self.now = 1000.0

    def known(self) -> tuple[Any, ...]:
        return tuple(str(getattr(self.breaker, name)) for name in NodeBreaker.__slots__)

    @rule(tenths=st.integers(0, 20) | st.integers(0, 400))
    def wait(self, tenths: int) -> None:
        self.now += tenths / 8

    @rule(target=permits, lapse=st.integers(1, 5))
    def admit(self, lapse: int) -> Any:
        eligible, before = self.model.is_eligible(self.now), self.known()
        permit = self.breaker.admit(self.now, self.now + lapse)
        assert (permit is not None) == eligible
        if permit is None or self.model.state == "closed":
            assert self.known() == before
        else:
            assert str(self.breaker.generation) != before[NodeBreaker.__slots__.index("generation")]
            self.model.state, self.model.lapses_at = "half_open", self.now + lapse
        return multiple() if permit is None else permit

    @rule(permit=permits, success=st.sampled_from([True, True, False, False, None]), may_open=st.booleans())
    def record(self, permit: int, success: bool | None, may_open: bool) -> None:
        self.tell(permit, success, may_open)

    @rule(
        run=st.lists(st.sampled_from([True, True, False, False, None]), min_size=3, max_size=12),
        every=st.sampled_from([0, 0, 1, 7, 15]),
        may_open=st.booleans(),
    )
    def traffic(self, run: list[bool | None], every: int, may_open: bool) -> None:
        for success in run:
            if self.breaker.state == "closed":
                self.tell(self.breaker.generation, success, may_open)
                self.now += every / 8

    def tell(self, permit: int, success: bool | None, may_open: bool) -> None:
        breaker, model, before, was = self.breaker, self.model, self.known(), self.breaker.state
        if permit != breaker.generation:
            assert breaker.record(permit, success, self.now, lambda: may_open, self.rng) is False
            assert self.known() == before, "a late verdict changes nothing"
            return
        if success is not None and model.state == "closed":
            model.heard.append((self.now, success))
        faults = model.faults(self.now)
        if success and self.now < breaker.quiet_until:
            breaker.successes += 1  # as a call does
        else:
            changed = breaker.record(permit, success, self.now, lambda: may_open, self.rng)
            assert changed == (breaker.state != was)
            assert not changed or breaker.generation != permit, "a change of state starts a new generation"
        is_fault = faults == {True} or (len(faults) == 2 and self.has_found_a_fault(before, success))
        model.hear(success, self.now, may_open, is_fault)

    def has_found_a_fault(self, before: tuple[Any, ...], success: bool | None) -> bool:
        """Where the model leaves it open: what the breaker has made of it."""
        unenforced = before[NodeBreaker.__slots__.index("unenforced")]
        opened = self.breaker.state == "open" or self.breaker.is_refused
        return opened or str(self.breaker.unenforced) != unenforced

    @rule()
    def close(self) -> None:
        assert self.breaker.close(self.now) == (self.model.state != "closed")
        if self.model.state != "closed":
            self.model.close(self.now)

    @rule(seconds=st.integers(0, 5))
    def probe_by(self, seconds: int) -> None:
        self.breaker.probe_by(self.now + seconds)
        self.model.opens_until = min(self.model.opens_until, self.now + seconds)

    @invariant()
    def they_agree(self) -> None:
        breaker, model = self.breaker, self.model
        assert breaker.state == model.state
        assert breaker.is_refused == model.is_refused
        assert breaker.unenforced == model.unenforced
        assert breaker.is_healthy == (model.state == "closed" and not model.is_refused)
        assert breaker.is_eligible(self.now) == model.is_eligible(self.now)
        assert breaker.share(self.now) == model.share(self.now)
        step = breaker.next_step(self.now)
        assert (step == inf) == (model.state != "closed" or model.share(self.now) == 1.0)
        assert step == inf or breaker.share(step) > breaker.share(self.now)


TestAgainstTheModel = AgainstTheModel.TestCase
TestAgainstTheModel.settings = hypothesis_settings(PROPERTY, stateful_step_count=60)


# Every way through the states

EDGES = {
    ("closed", "fail", "open"),
    ("open", "admit", "half_open"),
    ("half_open", "admit", "half_open"),
    ("half_open", "ok", "closed"),
    ("half_open", "fail", "open"),
    ("half_open", "refuse", "open"),
    ("half_open", "none", "open"),
}
"""The arrows of the breaker's module; `refuse` is a failure after which the view allows no ejection."""

ACTS = ("admit", "ok", "fail", "none", "advance", "refuse")


class Walk(NamedTuple):
    """Where a walk stands."""

    breaker: NodeBreaker
    permits: tuple[int, ...]
    now: float

    def key(self) -> tuple[Any, ...]:
        """All that can make a difference from here on, and nothing else."""
        of, now = self.breaker, self.now
        permits = tuple(of.generation - permit for permit in self.permits)
        until = {"closed": 0.0, "open": of._opens_until - now, "half_open": of._lapses_at - now}[of.state]
        heard = (of.failures_in_a_row, of.is_refused, of.successes, of._failures, tuple(of._past), of._slice_ends - now)
        return of.state, permits, max(until, 0.0), of._opened, of._is_probed_in_vain, heard

    def after(self, act: str) -> Walk:
        """A verdict is for the permit that is out for longest."""
        breaker = copy(self.breaker)
        breaker._past = self.breaker._past.copy()
        if act == "advance":
            return Walk(breaker, self.permits, self.now + 1.0)
        if act == "admit":
            permit = breaker.admit(self.now, self.now + 2.0)
            return Walk(breaker, self.permits if permit is None else (*self.permits, permit), self.now)
        success = {"ok": True, "fail": False, "none": None, "refuse": False}[act]
        breaker.record(self.permits[0], success, self.now, lambda: act != "refuse", Draws(0.5))
        return Walk(breaker, self.permits[1:], self.now)


def test_B2_every_walk_of_up_to_14_steps_keeps_to_the_documented_edges() -> None:
    settings = Breaker(consecutive=2, success_rate=0.7, min_calls=3, window=20.0, open_for=1.0, max_open_for=2.0)
    here = {walk.key(): walk for walk in [Walk(NodeBreaker(settings), (), 1000.0)]}
    taken, met = set(), set(here)
    for _ in range(14):
        following: dict[tuple[Any, ...], Walk] = {}
        for walk in here.values():
            for act in ACTS if walk.permits else ("admit", "advance"):
                then = walk.after(act)
                taken.add(step_of(walk, act, then))
                if then.key() not in met:
                    met.add(then.key())
                    following[then.key()] = then
        here = following
    assert taken - {None} == EDGES
    assert len(met) > 1000


def step_of(walk: Walk, act: str, then: Walk) -> tuple[str, str, str] | None:
    """The edge that was taken, if any; checks the law on the way."""
    was, is_now = walk.breaker, then.breaker
    if is_now.generation == was.generation:
        assert is_now.state == was.state, "a change of state starts a new generation"
        return None
    assert is_now.generation == was.generation + 1
    if act == "admit":
        valid = was.state == "half_open" and was.generation in walk.permits
        assert not valid or walk.now >= was._lapses_at, "two probes at a time"
    else:
        assert walk.permits[0] == was.generation, "a late verdict has changed something"
    return was.state, act, is_now.state
