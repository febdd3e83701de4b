"""What of a resolver's answers is believed (rule D1), and when it is asked again."""

from __future__ import annotations

import random

import pytest

from meshlib import Endpoint
from meshlib.core.last_good import DOUBT, DOUBT_EVERY, LONGEST, SHORTEST, LastGood

SET = (Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 80))
RNG = random.Random(1)


def known(now: float = 0.0) -> LastGood:
    state = LastGood()
    assert state.answer(SET, now)
    return state


def test_D1_every_error_leaves_the_last_good_set() -> None:
    state = known()
    for now in range(1, 100):
        state.fail(now)
        assert state.current(now, 3600) == SET
    assert state.known_at == 0.0, "its age goes on"


def test_D1_an_empty_answer_is_believed_when_it_was_repeated_twice() -> None:
    state = known()
    assert [state.answer((), now) for now in (1.0, 2.0)] == [False, False]
    assert state.current(2.0, 3600) == SET
    assert state.answer((), 3.0)
    assert state.current(3.0, 3600) == ()


def test_D1_or_once_after_half_a_minute() -> None:
    state = known()
    assert not state.answer((), 1.0)
    assert state.answer((), 1.0 + DOUBT)
    assert state.current(40.0, 3600) == ()


@pytest.mark.parametrize("between", ["answer", "error"])
def test_D1_doubt_begins_anew_after_an_answer_and_after_an_error(between: str) -> None:
    state = known()
    assert not state.answer((), 1.0)
    assert not state.answer((), 2.0)
    if between == "answer":
        assert state.answer(SET, 3.0)
    else:
        state.fail(3.0)
    assert [state.answer((), now) for now in (4.0, 5.0, 6.0)] == [False, False, True]


def test_D1_a_first_answer_that_is_empty_is_doubted_as_well() -> None:
    state = LastGood()
    assert [state.answer((), now) for now in (0.0, 1.0)] == [False, False]
    assert state.known_at is None
    assert state.answer((), 2.0)
    assert state.known_at == 2.0


def test_an_empty_set_stays_empty_without_doubt() -> None:
    state = known()
    for now in (1.0, 2.0, 3.0):
        state.answer((), now)
    assert state.answer((), 4.0)
    assert state.known_at == 4.0
    assert state.answer(SET, 5.0)
    assert not state.answer((), 6.0), "a set that came back is defended anew"


def test_D1_too_old_an_answer_is_none() -> None:
    state = known()
    assert state.current(3600.0, 3600) == SET
    assert state.current(3600.1, 3600) == ()
    assert LastGood().current(0.0, 3600) == ()


@pytest.mark.parametrize(("ttl", "holds"), [(300.0, 300.0), (None, 5000.0)])
def test_D1_nothing_is_stale_before_it_is_to_be_confirmed(ttl: float | None, holds: float) -> None:
    state = LastGood()
    assert state.answer(SET, 0.0, ttl)
    assert state.current(holds, 60) == SET, "nobody was to be asked yet, or who was asked waits for news"
    state.fail(holds)
    assert state.current(holds + 60, 60) == SET
    assert state.current(holds + 61, 60) == ()
    assert state.answer(SET, holds + 62, ttl)
    assert not state.answer((), holds + 63)
    assert state.current(holds + 124, 60) == ()


def test_D1_half_a_minute_of_errors_confirms_no_empty_answer() -> None:
    state = known()
    assert not state.answer((), 1.0)
    state.fail(1.0 + DOUBT)
    assert [state.answer((), now + DOUBT) for now in (2.0, 3.0, 4.0)] == [False, False, True]


def test_D3_a_time_to_live_is_cut_by_up_to_a_fifth() -> None:
    state = known()
    delays = [state.delay(0.0, 10.0, RNG) for _ in range(1000)]
    assert 8.0 <= min(delays) < 8.1
    assert 9.9 < max(delays) <= 10.0


def test_who_waits_for_news_is_asked_again_at_once() -> None:
    assert known().delay(0.0, None, RNG) == 0.0


def test_a_doubted_answer_is_checked_soon() -> None:
    state = known()
    state.answer((), 1.0)
    assert 0.8 * DOUBT_EVERY <= state.delay(1.0, 300.0, RNG) <= DOUBT_EVERY
    assert 0.8 * DOUBT_EVERY <= state.delay(1.0, None, RNG) <= DOUBT_EVERY


@pytest.mark.parametrize(
    ("outage", "longest"), [(0, 0.5), (1, 0.5), (5, 1.0), (20, 4.0), (50, LONGEST), (9999, LONGEST)]
)
def test_D4_the_back_off_has_full_jitter_and_follows_the_outage(outage: float, longest: float) -> None:
    state = known()
    state.fail(100.0)
    state.fail(100.0 + outage)
    delays = [state.delay(100.0 + outage, None, RNG) for _ in range(1000)]
    assert SHORTEST <= min(delays) < SHORTEST + 0.05 * longest
    assert 0.95 * longest < max(delays) <= longest


def test_an_answer_ends_the_back_off() -> None:
    state = known()
    state.fail(1.0)
    state.answer(SET, 60.0)
    assert state.delay(60.0, 10.0, RNG) > 7.9
    state.fail(61.0)
    assert state.delay(61.0, 10.0, RNG) <= 0.5, "the next outage is a new one"
