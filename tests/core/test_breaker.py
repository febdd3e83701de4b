"""Rule B2, as far as it exists: consecutive failures, one probe at a time, doubling, and the law of generations."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from scripted import PROPERTY, Draws

from meshlib import Breaker
from meshlib.core.breaker import NodeBreaker

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


class AnySequence(RuleBasedStateMachine):
    """Admissions, verdicts, late verdicts and time, in any order, against the law of the breaker."""

    permits = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.breaker = NodeBreaker(Breaker(consecutive=3, success_rate=0.0))
        self.rng = random.Random(5)
        self.now = 1000.0
        self.failures = self.in_vain = 0
        self.probe: tuple[int, float] | None = None
        """The permit of the probe that is out, and when it lapses."""

    def known(self) -> tuple[Any, ...]:
        return tuple(str(getattr(self.breaker, name)) for name in NodeBreaker.__slots__)

    @rule(seconds=st.floats(0, 5) | st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=permits, lapse=st.floats(0.1, 5))
    def admit(self, lapse: float) -> Any:
        was, eligible, before = self.breaker.state, self.breaker.is_eligible(self.now), self.known()
        permit = self.breaker.admit(self.now, self.now + lapse)
        assert (permit is not None) == eligible, "is_eligible says what admit does"
        if permit is None:
            assert self.known() == before
            return multiple()
        if was == "closed":
            assert self.known() == before
        else:
            assert self.probe is None or self.now >= self.probe[1], "two probes at a time"
            assert self.breaker.state == "half_open"
            self.probe = (permit, self.now + lapse)
        return permit

    @rule(permit=consumes(permits), success=st.sampled_from([True, False, False, None]), may_open=st.booleans())
    def record(self, permit: int, success: bool | None, may_open: bool) -> None:
        before, was = self.known(), self.breaker.state
        is_late = permit != self.breaker.generation
        changed = self.breaker.record(permit, success, self.now, lambda: may_open, self.rng)
        assert changed == (self.breaker.state != was)
        if is_late:
            assert self.known() == before
        elif was == "half_open":
            assert self.probe is not None
            assert permit == self.probe[0]
            again = "open" if self.in_vain else "half_open"
            assert self.breaker.state == {True: "closed", False: "open", None: again}[success]
            self.probe, self.failures = None, 0
            self.in_vain = int(self.breaker.state == "half_open")
        else:
            assert was == "closed", "an open breaker has no permit out that counts"
            self.failures = {True: 0, False: self.failures + 1, None: self.failures}[success]
            expected = success is False and self.failures >= 3 and may_open
            assert self.breaker.state == ("open" if expected else "closed")
        if changed:
            assert self.breaker.generation != permit, "a change of state starts a new generation"

    @invariant()
    def an_open_breaker_is_due_within_its_bound(self) -> None:
        if self.breaker.state == "open":
            assert self.breaker.is_eligible(self.now + 60 * 1.5)

    @invariant()
    def a_probe_lapses(self) -> None:
        if self.breaker.state == "half_open":
            assert self.breaker.is_eligible(self.now + 5)


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = PROPERTY
