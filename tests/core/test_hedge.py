"""Hedging on paper: when a backup is due, how many there may be, what one costs, and which of two attempts decides."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import LOST, OK, PROPERTY, STALE, UNAVAILABLE, Draws, Stage, Step, answer, broke

from meshlib import Budget, Hedge, Limit, Retry
from meshlib.core.call import Call
from meshlib.core.ending import Ending
from meshlib.core.hedge import ENOUGH, EVERY, REMEMBERED, SAVED, Hedging
from meshlib.core.outcome import End
from meshlib.core.quantile import quantile
from meshlib.core.report import Attempt

SHARES = [0.001, 0.01, 0.02, 0.1, 0.5, 1.0]


def told(hedging: Hedging, *latencies: float) -> Hedging:
    for seconds in latencies:
        hedging.observe(seconds, answered=True)
    return hedging


# The delay


@PROPERTY
@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=300), st.sampled_from(SHARES))
def test_the_delay_is_the_shortest_that_costs_no_more_than_the_share(latencies: list[float], share: float) -> None:
    delay = quantile(sorted(latencies), 1 - share)
    assert delay is not None
    assert sum(each > delay for each in latencies) <= share * len(latencies)
    shorter = [each for each in latencies if each < delay]
    assert not shorter or sum(each > max(shorter) for each in latencies) > share * len(latencies) - 1e-6


def test_nothing_is_hedged_until_enough_is_known() -> None:
    hedging = Hedging(Hedge(max_extra=0.1))
    told(hedging, *[0.1] * (ENOUGH - 1))
    assert hedging.delay() is None
    told(hedging, 0.1)
    assert hedging.delay() == 0.1


def test_the_delay_follows_what_was_seen_of_late() -> None:
    hedging = told(Hedging(Hedge()), *[0.1] * REMEMBERED)
    told(hedging, *[0.5] * EVERY)
    assert hedging.delay() == 0.5
    told(hedging, *[0.01] * REMEMBERED)
    assert hedging.delay() == 0.01


def test_a_failure_tells_only_if_it_was_slow() -> None:
    hedging = told(Hedging(Hedge()), *[0.1] * ENOUGH)
    for _ in range(REMEMBERED):
        hedging.observe(0.001, answered=False)
    assert hedging.delay() == 0.1
    for _ in range(EVERY):
        hedging.observe(1.0, answered=False)
    assert hedging.delay() == 1.0


def test_seconds_are_taken_as_they_are_given_and_without_a_share() -> None:
    hedging = Hedging(Hedge(after=0.05))
    for _ in range(100):
        assert hedging.delay() == 0.05
        assert hedging.is_affordable
        hedging.spend()
    told(hedging, *[1.0] * 100)
    assert hedging.delay() == 0.05


# The share


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_hedges_keep_to_the_share_also_when_the_whole_fleet_slows_down(share: float) -> None:
    hedging, chance, made = Hedging(Hedge(max_extra=share)), random.Random(3), 0
    made_when_even = 0
    for number in range(1, 20_001):
        if number == 10_000:
            made_when_even = made
        slowness = 20.0 if number % 5000 > 4000 else 1.0  # a fifth of the time
        seconds = chance.lognormvariate(-4, 0.5) * slowness
        delay = hedging.delay()
        if delay is not None and seconds > delay and hedging.is_affordable:
            hedging.spend()
            made += 1
            seconds = min(seconds, delay + chance.lognormvariate(-4, 0.5) * slowness)
        hedging.observe(seconds, answered=True)
        assert made <= share * number
    assert made_when_even >= share * 10_000 / 3, "and it hedges at all"


def test_what_was_saved_is_bounded() -> None:
    hedging = Hedging(Hedge(max_extra=1.0))
    for _ in range(1000):
        hedging.delay()
    made = 0
    while hedging.is_affordable:
        hedging.spend()
        made += 1
    assert made == SAVED


# The call


def stage_of(count: int = 3, **service: Any) -> Stage:
    return Stage(count, **{"hedge": Hedge(after=0.05), **service})


def shedding(stage: Stage) -> Stage:
    stage.cluster.shedder.overloaded(stage.clock())
    return stage


def with_tokens(stage: Stage, tokens: float) -> Stage:
    stage.cluster.bucket.tokens = tokens
    return stage


def raced(stage: Stage, **how: Any) -> tuple[Call, Attempt, Attempt]:
    """A call whose first attempt is 0.05 s old, and has a backup."""
    call = stage.call(**how)
    first = call.begin(stage.clock())
    assert first is not None
    assert call.may_be_hedged
    backup = call.begin_hedge(stage.clock.advance(call.hedge_delay()))
    assert backup is not None
    return call, first, backup


def test_a_backup_goes_to_another_endpoint_and_is_paid_for() -> None:
    stage = stage_of()
    _, first, backup = raced(stage)
    assert (first.kind, backup.kind) == ("first", "hedge")
    assert [first.node, backup.node] == list(stage.nodes[:2])
    assert stage.tokens == 500 - 14
    assert stage.in_flight == stage.cluster.in_flight == 2
    assert backup.deadline == backup.started + 10


@pytest.mark.parametrize("how", [{"repeatable": False}, {"retries": False}, {"on_behalf": True}], ids=str)
def test_C1_C10_what_may_not_be_repeated_is_not_hedged(how: dict[str, Any]) -> None:
    call = stage_of().call(**how)
    assert call.begin(0.0) is not None
    assert not call.may_be_hedged


def test_only_the_first_attempt_is_hedged_and_only_where_it_was_asked_for() -> None:
    for stage, hedged in ((stage_of(), [True, False, False]), (stage_of(hedge=None), [False, False, False])):
        call, found = stage.call(), []
        for step in (LOST, UNAVAILABLE, OK):
            attempt = call.begin(stage.clock())
            assert attempt is not None
            found.append(call.may_be_hedged)
            stage.settle(call, attempt, step)
        assert found == hedged


@pytest.mark.parametrize(
    "stage",
    [
        stage_of(1),
        stage_of(2, retry=Retry(budget=Budget(capacity=13))),
        stage_of(2, hedge=Hedge()),
        with_tokens(stage_of(2), 249),
        stage_of(2, limit=Limit(1)),
        shedding(stage_of(2)),
    ],
    ids=[
        "no other endpoint",
        "no money",
        "beyond the share",
        "less than half of the budget",
        "at the limit",
        "overloaded",
    ],
)
def test_there_may_be_no_backup(stage: Stage) -> None:
    tokens = stage.tokens
    call = stage.call()
    assert call.begin(stage.clock()) is not None
    assert call.begin_hedge(stage.clock.advance(0.05)) is None
    assert stage.tokens == tokens
    assert stage.in_flight == 1


def test_a_backup_goes_to_nobody_who_is_ejected_not_even_as_a_probe() -> None:
    stage = stage_of(3)
    stage.eject(2)
    _, _, backup = raced(stage)
    assert backup.node is stage.nodes[2]


def test_a_probe_that_loses_has_not_shown_that_its_node_is_well() -> None:
    stage = stage_of(2)
    stage.eject(1)
    stage.clock.advance(60)
    call, probe, _ = raced(stage)
    assert probe.why == "probe"
    call.lose(probe, stage.clock.advance(0.1))
    assert probe.node.breaker.state == "open"
    assert not probe.node.breaker.is_eligible(stage.clock.advance(3.9))
    assert probe.node.breaker.is_eligible(stage.clock.advance(0.2)), "twice as long as before"


def test_no_backup_begins_after_the_deadline() -> None:
    stage = stage_of(2)
    call = stage.call(total=0.05)
    assert call.begin(stage.clock()) is not None
    assert call.begin_hedge(stage.clock.advance(0.05)) is None


@pytest.mark.parametrize("winner", ["first", "hedge"])
def test_the_loser_is_nobodys_fault_and_its_age_is_a_lower_bound(winner: str) -> None:
    stage = stage_of(2)
    call, *both = raced(stage)
    won, lost = both if winner == "first" else reversed(both)
    now = stage.clock.advance(0.3)
    call.lose(lost, now)
    assert call.settle(won, now, Ending(status=200)) is None
    call.release(won, now)
    assert (str(won.outcome), str(lost.outcome)) == ("ok", "abandoned")
    assert lost.seconds == lost.node.ewma == pytest.approx(now - lost.started)
    assert lost.node.failures == lost.node.breaker.failures_in_a_row == 0
    assert stage.in_flight == stage.cluster.in_flight == 0
    # A backup that was of use is paid back like a retry that was; one that was not is paid for by other calls.
    assert stage.tokens == (500 if winner == "hedge" else 500 - 14 + 1)


@pytest.mark.parametrize("step", [UNAVAILABLE, LOST, broke(End.stale), broke(End.lost, sent=False)], ids=str)
@pytest.mark.parametrize("earlier", ["first", "hedge"])
def test_one_that_fails_decides_nothing_while_the_other_is_under_way(step: Step, earlier: str) -> None:
    stage = stage_of(3)
    call, *both = raced(stage)
    one, other = both if earlier == "first" else reversed(both)
    assert stage.settle(call, one, step) is None
    assert stage.tokens == 500 - 14
    assert stage.settle(call, other, OK) is None
    assert stage.tokens == (500 if earlier == "first" else 500 - 14 + 1)


@pytest.mark.parametrize("earlier", ["first", "hedge"])
def test_when_both_have_failed_the_last_word_leads_to_one_retry(earlier: str) -> None:
    stage = stage_of(3, retry=Retry(max_attempts=2), rng=Draws())
    call, *both = raced(stage)
    one, other = both if earlier == "first" else reversed(both)
    assert stage.settle(call, one, LOST) is None
    assert stage.settle(call, other, answer(503, retry_after=0.7)) == 0.7
    assert stage.tokens == 500 - 14 - 5
    call.release(other, stage.clock())
    retry = call.begin(stage.clock.advance(0.7))
    assert retry is not None
    assert (retry.kind, retry.node) == ("retry", stage.nodes[2]), "a backup does not count to `max_attempts`"
    assert stage.settle(call, retry, LOST) is None
    assert stage.in_flight == stage.cluster.in_flight == 0


def test_C8_a_first_attempt_on_a_dead_connection_that_ends_last_is_made_again_where_it_was() -> None:
    stage = stage_of(3)
    call, first, backup = raced(stage)
    assert stage.settle(call, backup, LOST) is None
    assert stage.settle(call, first, STALE) == 0.0
    again = call.begin(stage.clock())
    assert again is not None
    assert (again.kind, again.node) == ("transparent", first.node)


def test_the_last_word_may_be_that_there_is_no_retry() -> None:
    stage = stage_of(3)
    call, first, backup = raced(stage)
    assert stage.settle(call, first, UNAVAILABLE) is None
    assert stage.settle(call, backup, answer(500)) is None
    assert stage.tokens == 500 - 14


def test_a_service_that_is_hedged_by_share_learns_from_its_first_attempts() -> None:
    stage = stage_of(2, hedge=Hedge(max_extra=0.5))
    for _ in range(ENOUGH):
        call = stage.call()
        attempt = call.begin(stage.clock())
        assert attempt is not None
        call.hedge_delay()
        stage.settle(call, attempt, answer(200, lasts=0.2))
        call.observe(attempt)
        call.release(attempt, stage.clock())
    call = stage.call()
    assert call.begin(stage.clock()) is not None
    assert call.hedge_delay() == pytest.approx(0.2)
    assert call.begin_hedge(stage.clock.advance(0.2)) is not None
