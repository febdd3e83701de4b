"""The call: outcomes, kinds, waits, and every reason to stop. Rules C1, C2, C3, C8, C9 and the payments of B1."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, repeat
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scripted import LOST, OK, PROPERTY, REFUSED, STALE, UNAVAILABLE, Draws, Stage, Step, answer, broke

from meshlib import Budget, LeastRequest, Retry, RoundRobin, Timeout
from meshlib.core.call import TIMER_SLACK
from meshlib.core.choosing import LAPSE
from meshlib.core.node import Node
from meshlib.core.outcome import End

NO_SLOT = broke(End.no_slot, sent=False, error="PoolTimeout")
STRANGER = broke(End.identity, sent=False, error="IdentityError")
CONNECT_TIMEOUT = broke(End.timeout, sent=False, error="ConnectTimeout", lasts=1.0)
TIMEOUT = broke(End.timeout, error="ReadTimeout", lasts=1.0)
CANCELLED = broke(End.caller, error="CancelledError")

# The outcome table, row by row

FAILURE, SUCCESS, NOTHING = 2, 0, 1
"""Failures in a row of a node that had one before, after it has heard the verdict."""

TABLE = [
    ("refused", REFUSED, "not_sent", FAILURE),
    ("connect timeout", CONNECT_TIMEOUT, "not_sent", FAILURE),
    ("somebody else", STRANGER, "not_sent", FAILURE),
    ("no slot", NO_SLOT, "not_sent", NOTHING),
    ("lost after the first byte", LOST, "failed", FAILURE),
    ("attempt timeout", TIMEOUT, "failed", FAILURE),
    ("kept connection was dead, sent", STALE, "failed", NOTHING),
    ("kept connection was dead, not sent", broke(End.stale, sent=False), "not_sent", NOTHING),
    ("cancelled after sending", CANCELLED, "abandoned", NOTHING),
    ("cancelled before sending", broke(End.caller, sent=False), "abandoned", NOTHING),
    ("cut by the deadline, early", broke(End.deadline, lasts=0.5), "abandoned", NOTHING),
    ("cut by the deadline, late", broke(End.deadline, lasts=1.5), "failed", FAILURE),
    ("429", answer(429), "rejected", NOTHING),
    *((str(status), answer(status), "rejected", FAILURE) for status in (500, 502, 503, 504, 506, 507, 511, 599)),
    *(
        (str(status), answer(status), "ok", SUCCESS)
        for status in (200, 204, 301, 304, 400, 404, 408, 418, 499, 501, 505)
    ),
]


@pytest.mark.parametrize(("step", "outcome", "heard"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_every_row_of_the_outcome_table(step: Step, outcome: str, heard: int) -> None:
    stage = Stage(1, retry=Retry(max_attempts=1))
    node = stage.nodes[0]
    stage.cluster.record(node, node.breaker.generation, False, stage.clock())
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    assert attempt.outcome is None
    stage.settle(call, attempt, step)
    assert attempt.outcome == outcome
    assert node.breaker.failures_in_a_row == heard
    assert node.failures == (heard == FAILURE)
    assert node.in_flight == (step.end is None), "an answer is in flight until its body ends"
    call.release(attempt, stage.clock())
    assert node.in_flight == 0


def test_the_table_has_a_row_for_every_end() -> None:
    assert {row[1].end for row in TABLE} == {*End, None}


@pytest.mark.parametrize(("lasts", "outcome"), [(0.499, "abandoned"), (0.501, "failed")])
def test_a_deadline_blames_a_node_after_ten_times_its_usual_latency(lasts: float, outcome: str) -> None:
    stage = Stage(1)
    stage.play([answer(200, lasts=0.05)])
    played = stage.play([broke(End.timeout, lasts=lasts)], total=lasts)
    assert played.outcomes == [outcome]


@pytest.mark.parametrize("lasts", [0.3, 2.0])
def test_the_age_of_an_attempt_cut_by_the_deadline_is_a_lower_bound_of_the_latency(lasts: float) -> None:
    stage = Stage(1)
    stage.play([broke(End.timeout, lasts=lasts)], total=lasts)
    assert stage.nodes[0].ewma == pytest.approx(lasts)


def test_an_attempt_timeout_is_the_nodes_fault_but_the_calls_deadline_is_told_apart() -> None:
    slow = broke(End.timeout, lasts=0.5)
    assert Stage(1).play([slow, OK]).outcomes == ["failed", "ok"]
    assert Stage(1).play([slow], total=0.5).outcomes == ["abandoned"]
    assert Stage(1).play([slow], total=0.5 + TIMER_SLACK / 2).outcomes == ["abandoned"], "a timer that went off early"


def test_a_caller_who_leaves_blames_nobody_and_ends_the_call() -> None:
    stage = Stage(2)
    played = stage.play([CANCELLED])
    assert played.outcomes == ["abandoned"]
    assert [node.failures for node in stage.nodes] == [0, 0]
    assert stage.tokens == 500


# Kinds and endpoints


@pytest.mark.parametrize("step", [UNAVAILABLE, LOST, TIMEOUT], ids=["rejected", "lost", "timeout"])
def test_C2_a_retry_goes_to_an_untried_endpoint(step: Step) -> None:
    played = Stage(3).play([step, step, OK])
    assert played.kinds == ["first", "retry", "retry"]
    assert played.places == [1, 2, 3]


@pytest.mark.parametrize("balancer", [LeastRequest(), RoundRobin()])
def test_C2_a_retry_goes_to_an_untried_endpoint_whatever_the_balancer(balancer: Any) -> None:
    for seed in range(20):
        stage = Stage(4, balancer=balancer, rng=random.Random(seed), retry=Retry(max_attempts=4))
        assert sorted(stage.play([UNAVAILABLE] * 3 + [OK]).places) == [1, 2, 3, 4]


def test_C2_a_retry_goes_to_an_untried_endpoint_even_if_the_balancer_repeats_itself() -> None:
    class Stuttering:
        def prepare(self, nodes: Sequence[Node], rng: Any) -> Callable[[float, str | None], Iterator[Node]]:
            return lambda now, key: iter([nodes[0], nodes[0], nodes[1], nodes[1]])

    assert Stage(2, balancer=Stuttering()).play([UNAVAILABLE, OK]).places == [1, 2]


def test_C2_when_all_were_tried_a_retry_goes_to_the_best_again() -> None:
    played = Stage(2, retry=Retry(max_attempts=4)).play([UNAVAILABLE, UNAVAILABLE, UNAVAILABLE, OK])
    assert played.places == [1, 2, 1, 1]
    assert [attempt.why for attempt in played.attempts] == ["InOrder", "InOrder", "again", "again"]


@pytest.mark.parametrize("step", [UNAVAILABLE, LOST, REFUSED], ids=["rejected", "failed", "not_sent"])
def test_C2_a_single_endpoint_still_retries(step: Step) -> None:
    played = Stage(1).play([step, step, OK])
    assert played.kinds == ["first", "retry", "retry"]
    assert played.places == [1, 1, 1]


@pytest.mark.parametrize("step", [REFUSED, CONNECT_TIMEOUT, NO_SLOT], ids=["refused", "connect timeout", "no slot"])
def test_C2_after_not_sent_a_failover_goes_to_an_untried_endpoint(step: Step) -> None:
    played = Stage(3).play([step, step, OK])
    assert played.kinds == ["first", "failover", "failover"]
    assert played.places == [1, 2, 3]


def test_C2_failovers_do_not_count_to_max_attempts() -> None:
    played = Stage(6, retry=Retry(max_attempts=2)).play([REFUSED, REFUSED, REFUSED, UNAVAILABLE, UNAVAILABLE])
    assert played.kinds == ["first", "failover", "failover", "failover", "retry"]
    assert played.places == [1, 2, 3, 4, 5]


def test_C2_even_a_call_without_retries_fails_over() -> None:
    assert Stage(3, retry=Retry(max_attempts=1)).play([REFUSED, OK]).kinds == ["first", "failover"]
    assert Stage(3, retry=Retry(max_attempts=1)).play([REFUSED, REFUSED, REFUSED]).kinds[1:] == ["failover"] * 2


def test_C2_failovers_are_bounded_by_the_number_of_endpoints() -> None:
    played = Stage(4).play([REFUSED] * 6)
    assert played.kinds == ["first", *["failover"] * 3, *["retry"] * 2]
    assert sorted(played.places[:4]) == [1, 2, 3, 4]


def test_C2_a_failover_may_follow_a_retry() -> None:
    played = Stage(3, rng=Draws(1.0)).play([UNAVAILABLE, REFUSED, OK])
    assert played.kinds == ["first", "retry", "failover"]
    assert played.places == [1, 2, 3]
    assert played.waits == [0.0, 0.0]


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_max_attempts_counts_the_first(limit: int) -> None:
    played = Stage(2, retry=Retry(max_attempts=limit)).play([UNAVAILABLE] * limit)
    assert played.kinds == ["first", *["retry"] * (limit - 1)]


def test_an_ejected_node_is_passed_over() -> None:
    stage = Stage(3)
    stage.eject(1)
    assert stage.play([OK]).places == [2]


def test_a_failover_does_not_count_on_ejected_nodes() -> None:
    stage = Stage(2)
    stage.eject(2)
    assert stage.play([REFUSED, OK]).kinds == ["first", "retry"]


def test_the_probe_of_an_ejected_node_is_one_call_and_says_so() -> None:
    stage = Stage(2)
    stage.eject(1)
    stage.clock.advance(2.0)
    probe, other = stage.call(), stage.call()
    first, second = probe.begin(stage.clock()), other.begin(stage.clock())
    assert first is not None
    assert second is not None
    assert (str(first.endpoint), first.why) == ("10.0.0.1:80", "probe")
    assert (str(second.endpoint), second.why) == ("10.0.0.2:80", "InOrder")
    assert stage.settle(probe, first, OK) is None
    assert stage.nodes[0].breaker.state == "closed"


def test_a_failed_probe_costs_the_call_nothing_but_a_retry() -> None:
    stage = Stage(2)
    stage.eject(1)
    stage.clock.advance(2.0)
    played = stage.play([LOST, OK])
    assert played.places == [1, 2]
    assert stage.nodes[0].breaker.state == "open"


def test_B2_a_probe_that_never_reports_lapses_a_second_after_its_attempts_deadline() -> None:
    stage = Stage(2, timeout=Timeout(attempt=3.0))
    stage.eject(1)
    stage.clock.advance(2.0)
    call = stage.call()
    assert call.begin(stage.clock()) is not None
    stage.clock.advance(3.0 + LAPSE - 0.01)
    assert stage.play([OK]).places == [2]
    stage.clock.advance(0.01)
    assert stage.play([OK]).places == [1]


def test_B2_a_probe_whose_caller_left_makes_room_for_the_next() -> None:
    stage = Stage(2)
    stage.eject(1)
    stage.clock.advance(2.0)
    assert stage.play([CANCELLED]).places == [1]
    assert stage.play([OK]).places == [1]
    assert stage.nodes[0].breaker.state == "closed"


@pytest.mark.parametrize("in_vain", [CANCELLED, answer(429), broke(End.deadline, lasts=0.05)])
def test_B2_an_ejected_node_that_no_probe_learns_of_does_not_get_every_call(in_vain: Step) -> None:
    stage = Stage(2)
    stage.play([answer(200)])
    stage.eject(1)
    stage.clock.advance(2.0)
    total = 0.05 if in_vain.end is End.deadline else 30.0
    places = [stage.play([in_vain], total=total).places for _ in range(10)]
    assert places == [[1]] * 2 + [[2]] * 8


def test_calls_do_not_look_at_every_ejected_node(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(20)
    stage.eject(*range(1, 11))
    looked: list[Node] = []
    is_due = Node.is_due
    monkeypatch.setattr(Node, "is_due", lambda node, now: looked.append(node) or is_due(node, now))
    for _ in range(50):
        stage.play([OK])
    assert len(looked) == 10, "all of them once, after the view was built"
    stage.clock.advance(2.0)
    assert [stage.play([OK]).attempts[0].why for _ in range(11)] == ["probe"] * 10 + ["InOrder"]


def test_B3_in_panic_a_retry_goes_to_an_endpoint_that_is_well_if_there_is_one() -> None:
    stage = Stage(4)
    stage.eject(1, 2)
    for _ in range(5):
        stage.cluster.record(stage.nodes[2], stage.nodes[2].breaker.generation, False, stage.clock())
    played = stage.play([LOST, OK])
    assert stage.cluster.view.panic
    assert played.places == [1, 4], "or it takes three attempts, and the budget does not pay for that for long"
    assert stage.tokens == 500
    assert stage.play([LOST, LOST, OK]).places == [1, 4, 2], "then the others, in their order"


def test_no_endpoint_no_attempt() -> None:
    stage = Stage(1)
    stage.publish()
    assert stage.call().begin(stage.clock()) is None


def test_C2_an_endpoint_that_was_ejected_when_the_walk_passed_it_is_untried_when_its_time_has_come() -> None:
    stage = Stage(3, retry=Retry(max_attempts=4))
    stage.eject(2)
    played = stage.play([answer(503, retry_after=1.0), answer(503, retry_after=5.0), OK])
    assert played.places == [1, 3, 2]
    assert played.attempts[-1].why == "probe"


def test_C2_an_endpoint_that_was_being_probed_when_the_walk_passed_it_is_untried_when_it_has_come_back() -> None:
    stage = Stage(3, retry=Retry(max_attempts=4))
    stage.eject(1)
    stage.clock.advance(2.0)
    probing = stage.call()
    probe = probing.begin(stage.clock())
    assert probe is not None
    call = stage.call()
    for expected in ("10.0.0.2:80", "10.0.0.3:80"):
        attempt = call.begin(stage.clock())
        assert attempt is not None
        assert str(attempt.endpoint) == expected
        assert stage.settle(call, attempt, UNAVAILABLE) is not None
    stage.settle(probing, probe, OK)
    last = call.begin(stage.clock())
    assert last is not None
    assert (str(last.endpoint), last.kind, last.why) == ("10.0.0.1:80", "retry", "InOrder")
    assert stage.settle(call, last, REFUSED) is not None
    again = call.begin(stage.clock())
    assert again is not None
    assert (again.kind, again.why) == ("retry", "again"), "now it has been tried, so there is nowhere to fail over to"


def test_C2_an_endpoint_whose_time_came_during_the_attempt_is_one_to_fail_over_to() -> None:
    stage = Stage(2)
    stage.eject(2)
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    assert stage.settle(call, attempt, broke(End.timeout, sent=False, lasts=3.0)) == 0.0
    following = call.begin(stage.clock())
    assert following is not None
    assert (following.kind, str(following.endpoint)) == ("failover", "10.0.0.2:80")


def test_C2_failovers_are_bounded_when_endpoints_are_added_during_the_call() -> None:
    stage = Stage(2)
    call, attempts = stage.call(), 0
    while (attempt := call.begin(stage.clock())) is not None:
        attempts += 1
        if attempts == 1:
            stage.publish("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80")
        if stage.settle(call, attempt, REFUSED) is None:
            break
    assert attempts <= 3 + 3 + 1
    kinds = [(str(attempt.endpoint), attempt.kind, attempt.why) for attempt in call.report.attempts[:3]]
    assert kinds == [
        ("10.0.0.1:80", "first", "InOrder"),
        ("10.0.0.2:80", "failover", "InOrder"),
        ("10.0.0.3:80", "failover", "InOrder"),
    ]


def test_C2_failovers_are_bounded_when_an_ejected_node_becomes_due_during_the_call() -> None:
    stage = Stage(3, retry=Retry(max_attempts=4))
    stage.eject(2)
    played = stage.play(iter([answer(503, retry_after=1.0), answer(503, retry_after=5.0), *[REFUSED] * 60]))
    assert len(played.attempts) <= 4 + 3 + 1


@pytest.mark.parametrize("step", [UNAVAILABLE, REFUSED], ids=["retry", "failover"])
def test_D2_an_endpoint_removed_during_the_call_gets_no_attempt_of_it(step: Step) -> None:
    stage = Stage(3)
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    stage.publish("10.0.0.1:80", "10.0.0.3:80")
    stage.clock.advance(stage.settle(call, attempt, step) or 0.0)
    following = call.begin(stage.clock())
    assert following is not None
    assert str(following.endpoint) == "10.0.0.3:80"


# What may be repeated


def test_without_retries_there_is_one_attempt_and_at_most_a_transparent_one() -> None:
    for step in (UNAVAILABLE, LOST, TIMEOUT, REFUSED, answer(503, retry_after=0.1), answer(429, retry_after=0.1)):
        for count in (1, 3):
            stage = Stage(count)
            assert stage.play([step], retries=False).kinds == ["first"]
            assert stage.play([STALE, step], retries=False).kinds == ["first", "transparent"]
            assert stage.tokens == 500


@pytest.mark.parametrize("step", [LOST, TIMEOUT, STALE], ids=["lost", "timeout", "stale"])
def test_C1_a_POST_that_was_sent_never_goes_again(step: Step) -> None:
    assert Stage(3).play([step], repeatable=False).kinds == ["first"]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("retry_after", [None, 0.1])
def test_C1_a_POST_that_was_rejected_never_goes_again(status: int, retry_after: float | None) -> None:
    assert Stage(3).play([answer(status, retry_after=retry_after)], repeatable=False).kinds == ["first"]


def test_C1_a_POST_that_was_not_sent_goes_on() -> None:
    assert Stage(3).play([REFUSED, REFUSED, OK], repeatable=False).kinds == ["first", "failover", "failover"]
    assert Stage(1).play([REFUSED, REFUSED, OK], repeatable=False).kinds == ["first", "retry", "retry"]
    assert Stage(3).play([REFUSED, CONNECT_TIMEOUT, LOST], repeatable=False).outcomes[-1] == "failed"


@pytest.mark.parametrize("step", [UNAVAILABLE, LOST, REFUSED, STALE, answer(503, retry_after=0.1)])
def test_C3_a_body_that_cannot_be_sent_again_makes_the_attempt_final(step: Step) -> None:
    final = Step(**{**vars(step), "resendable": False})
    stage = Stage(3)
    assert len(stage.play([final]).attempts) == 1
    assert stage.tokens == 500


@pytest.mark.parametrize("status", [400, 404, 500, 501, 505, 506, 507])
def test_an_answer_that_is_not_in_on_status_is_final(status: int) -> None:
    assert len(Stage(3).play([answer(status)]).attempts) == 1


def test_on_status_is_a_setting() -> None:
    assert len(Stage(3, retry=Retry(on_status={500})).play([answer(500), OK]).attempts) == 2
    assert len(Stage(3, retry=Retry(on_status={500})).play([UNAVAILABLE]).attempts) == 1
    assert len(Stage(3, retry=Retry(on_status={429})).play([answer(429), OK]).attempts) == 2


@pytest.mark.parametrize("status", [408, 425, 501])
def test_every_status_that_is_taken_as_on_status_is_retried(status: int) -> None:
    assert len(Stage(3, retry=Retry(on_status={status})).play(iter([answer(status), OK])).attempts) == 2


# C8


def test_C8_a_dead_kept_connection_costs_one_free_transparent_retry_to_the_same_endpoint() -> None:
    stage = Stage(3, retry=Retry(max_attempts=1))
    played = stage.play([STALE, OK])
    assert played.kinds == ["first", "transparent"]
    assert played.places == [1, 1]
    assert played.waits == [0.0]
    assert stage.tokens == 500
    assert (stage.nodes[0].failures, stage.nodes[0].breaker.failures_in_a_row) == (0, 0)


def test_C8_it_is_free_once_the_second_time_it_is_a_retry_like_any_other() -> None:
    stage = Stage(3)
    assert stage.play([STALE, STALE, UNAVAILABLE, UNAVAILABLE]).kinds == ["first", "transparent", "retry", "retry"]
    assert stage.tokens == 500 - 2 * 14
    assert Stage(3, retry=Retry(max_attempts=1)).play([STALE, STALE]).kinds == ["first", "transparent"]


@pytest.mark.parametrize("repeatable", [False, True])
def test_S2_who_is_somebody_else_gets_no_second_attempt_of_a_call(repeatable: bool) -> None:
    """Misses both uses of `Attempt.met_stranger`; one of them is enough, and the other spares a wait for nothing."""
    assert Stage(1).play([STRANGER], repeatable=repeatable).kinds == ["first"]
    assert Stage(2).play([STRANGER, OK], repeatable=repeatable).kinds == ["first", "failover"]
    assert Stage(2).play([STRANGER, STRANGER], repeatable=repeatable).places == [1, 2]


def test_S2_the_others_are_tried_again_and_the_stranger_is_not() -> None:
    """Misses `strangers` in `choosing.anywhere`."""
    assert Stage(2).play([STRANGER, UNAVAILABLE, UNAVAILABLE, UNAVAILABLE]).places == [1, 2, 2, 2]
    assert Stage(2).play([UNAVAILABLE, STRANGER, OK]).places == [1, 2, 1]


def test_C8_is_free_even_when_the_budget_is_dry() -> None:
    stage = Stage(2, retry=Retry(budget=Budget(capacity=1)))
    assert stage.play([STALE, OK]).kinds == ["first", "transparent"]


def test_C8_is_not_for_a_POST_that_was_sent() -> None:
    assert Stage(3).play([STALE], repeatable=False).kinds == ["first"]


def test_C8_is_for_a_POST_of_which_no_byte_was_written() -> None:
    played = Stage(3).play([broke(End.stale, sent=False), OK], repeatable=False)
    assert played.kinds == ["first", "transparent"]
    assert played.places == [1, 1]


def test_C8_a_stale_retry_is_repeated_without_counting_or_paying_again() -> None:
    stage = Stage(3)
    played = stage.play([UNAVAILABLE, STALE, UNAVAILABLE, UNAVAILABLE])
    assert played.kinds == ["first", "retry", "transparent", "retry"]
    assert played.places == [1, 2, 2, 3]
    assert stage.tokens == 500 - 2 * 14


def test_C8_a_probe_on_a_dead_kept_connection_is_repeated_as_the_probe() -> None:
    stage = Stage(2)
    stage.eject(1)
    stage.clock.advance(2.0)
    assert stage.play([STALE, OK]).places == [1, 1]
    assert stage.nodes[0].breaker.state == "closed"


def test_C8_the_transparent_retry_of_a_second_visit_goes_to_the_same_endpoint() -> None:
    played = Stage(2, retry=Retry(max_attempts=4)).play([UNAVAILABLE, UNAVAILABLE, STALE, OK])
    assert played.places == [1, 2, 1, 1]


# C9


@pytest.mark.parametrize("status", [429, 503])
def test_C9_retry_after_is_honoured(status: int) -> None:
    played = Stage(3).play([answer(status, retry_after=2.5), OK])
    assert played.kinds == ["first", "retry"]
    assert played.waits == [2.5]
    assert played.attempts[0].retry_after == 2.5
    assert played.attempts[1].waited == 2.5


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("retry_after", [29.99, 30.0, 3600.0])
def test_C9_a_retry_after_beyond_the_deadline_is_final_at_once(status: int, retry_after: float) -> None:
    stage = Stage(3)
    before = stage.clock()
    played = stage.play([answer(status, retry_after=retry_after)])
    assert stage.clock() - before == pytest.approx(0.01), "the answer is returned at once"
    assert played.attempts[0].retry_after == retry_after
    assert stage.tokens == 500


def test_C9_a_retry_after_just_within_the_deadline_is_waited_for() -> None:
    assert Stage(1).play([answer(503, retry_after=29.98), OK]).waits == [29.98]


def test_C9_a_retry_after_of_nothing_is_an_invitation() -> None:
    assert Stage(1).play([answer(503, retry_after=0.0), OK]).waits == [0.0]


def test_C9_a_429_without_retry_after_is_final() -> None:
    assert len(Stage(3).play([answer(429)]).attempts) == 1


def test_C9_is_for_429_and_503_alone() -> None:
    for status in (400, 408, 500, 507):
        assert len(Stage(3).play([answer(status, retry_after=0.1)]).attempts) == 1


def test_C9_counts_to_max_attempts() -> None:
    assert len(Stage(3).play([answer(429, retry_after=0.1)] * 3).attempts) == 3


def test_C9_a_503_with_retry_after_is_retried_whatever_on_status_says() -> None:
    assert len(Stage(3, retry=Retry(on_status={502})).play(iter([answer(503, retry_after=0.1), OK])).attempts) == 2


# Waits


def test_there_is_no_wait_before_the_first_retry_on_another_endpoint() -> None:
    assert Stage(2).play([UNAVAILABLE, OK]).waits == [0.0]


def test_there_is_no_wait_before_a_failover() -> None:
    assert Stage(4).play([REFUSED, REFUSED, REFUSED, OK]).waits == [0.0] * 3


def test_the_first_retry_after_failovers_does_not_wait_either() -> None:
    assert Stage(4).play([REFUSED, REFUSED, LOST, OK]).waits == [0.0] * 3


def test_waits_after_the_first_retry_are_full_jitter_below_a_doubling_bound() -> None:
    played = Stage(6, retry=Retry(max_attempts=7), rng=Draws(1.0)).play([UNAVAILABLE] * 7)
    assert played.waits == pytest.approx([0.0, 0.05, 0.1, 0.2, 0.25, 0.25])
    assert [attempt.waited for attempt in played.attempts] == [0.0, *played.waits]


def test_a_single_endpoint_is_waited_for_even_before_the_first_retry() -> None:
    assert Stage(1, rng=Draws(1.0)).play([LOST, LOST, OK]).waits == pytest.approx([0.025, 0.05])
    assert Stage(1, rng=Draws(0.0)).play([LOST, LOST, OK]).waits == [0.0, 0.0]


def test_when_every_other_endpoint_is_ejected_the_first_retry_waits() -> None:
    stage = Stage(2, rng=Draws(1.0))
    stage.eject(2)
    assert stage.play([UNAVAILABLE, OK]).waits == pytest.approx([0.025])


# Budget


def test_B1_retries_and_failovers_are_paid() -> None:
    stage = Stage(3, retry=Retry(max_attempts=3))
    stage.play([REFUSED, UNAVAILABLE, UNAVAILABLE, UNAVAILABLE])
    assert stage.tokens == 500 - 3 * 14


@pytest.mark.parametrize("status", [429, 503])
def test_B1_a_retry_after_a_throttling_answer_costs_5(status: int) -> None:
    stage = Stage(3, retry=Retry(max_attempts=2))
    stage.play([answer(status, retry_after=0.1), UNAVAILABLE])
    assert stage.tokens == 495


def test_B1_an_empty_bucket_ends_retries_and_failovers() -> None:
    for step in (UNAVAILABLE, LOST, REFUSED):
        stage = Stage(3, retry=Retry(budget=Budget(capacity=20)))
        assert len(stage.play([step, step]).attempts) == 2
        assert len(stage.play([step]).attempts) == 1
        assert stage.tokens == 6


def test_B1_a_success_after_a_retry_gives_its_cost_back() -> None:
    stage = Stage(3)
    stage.play([UNAVAILABLE, UNAVAILABLE, OK])
    assert stage.tokens == 500 - 14
    stage.play([REFUSED, OK])
    assert stage.tokens == 500 - 14


def test_B1_a_success_gives_back_what_all_failovers_since_the_last_retry_have_cost() -> None:
    stage = Stage(4)
    stage.play([REFUSED, REFUSED, REFUSED, OK])
    assert stage.tokens == 500, "what was not sent was no work to anybody"
    stage.play([LOST, REFUSED, REFUSED, OK])
    assert stage.tokens == 500
    stage.play([REFUSED, UNAVAILABLE, UNAVAILABLE, OK])
    assert stage.tokens == 500 - 2 * 14, "one retry comes back"


def test_B1_a_success_after_a_throttled_retry_gives_back_what_that_cost() -> None:
    stage = Stage(3, retry=Retry(max_attempts=2))
    stage.play([UNAVAILABLE, UNAVAILABLE])
    stage.play([answer(429, retry_after=0.1), OK])
    assert stage.tokens == 500 - 14


def test_B1_a_success_at_the_first_try_gives_1_and_a_final_failure_nothing() -> None:
    stage = Stage(3, retry=Retry(max_attempts=2))
    stage.play([UNAVAILABLE, UNAVAILABLE])
    assert stage.tokens == 486
    stage.play([answer(500)])
    assert stage.tokens == 486
    stage.play([answer(404)])
    assert stage.tokens == 487, "an answer the caller asked for is a success of the service"


def test_B1_a_final_answer_that_on_status_names_is_a_final_failure() -> None:
    stage = Stage(3, retry=Retry(max_attempts=2, on_status={404}))
    assert len(stage.play([answer(404), answer(404)]).attempts) == 2
    assert stage.tokens == 486


def test_B1_a_retry_of_an_answer_that_on_status_names_is_refunded_once() -> None:
    stage = Stage(3, retry=Retry(max_attempts=2, on_status={404}))
    stage.play([LOST, LOST])
    assert stage.tokens == 486
    stage.play([answer(404), OK])
    assert stage.tokens == 486


def test_B1_a_transparent_retry_that_succeeds_counts_as_the_first_try() -> None:
    stage = Stage(3, retry=Retry(max_attempts=2))
    stage.play([UNAVAILABLE, UNAVAILABLE])
    stage.play([STALE, OK])
    assert stage.tokens == 487


# Deadline


def test_an_attempt_ends_with_its_own_time_or_the_calls_whichever_is_first() -> None:
    stage = Stage(1, timeout=Timeout(attempt=10.0))
    for total, expected in ((30.0, 10.0), (4.0, 4.0)):
        attempt = stage.call(total=total).begin(stage.clock())
        assert attempt is not None
        assert attempt.deadline - attempt.started == pytest.approx(expected)


def test_the_time_of_an_attempt_may_be_the_calls_own() -> None:
    stage = Stage(1, timeout=Timeout(attempt=10.0))
    attempt = stage.call(attempt_timeout=0.5).begin(stage.clock())
    assert attempt is not None
    assert attempt.deadline - attempt.started == pytest.approx(0.5)


def test_after_the_deadline_nothing_begins() -> None:
    stage = Stage(1)
    call = stage.call(total=1.0)
    assert not call.is_expired(stage.clock.advance(0.99))
    assert call.is_expired(stage.clock.advance(0.01))
    assert call.begin(stage.clock()) is None
    assert call.report.attempts == []


def test_a_call_whose_time_ran_out_in_an_attempt_has_no_other() -> None:
    for step in (UNAVAILABLE, LOST, REFUSED):
        stage = Stage(3)
        assert len(stage.play([Step(**{**vars(step), "lasts": 1.0})], total=1.0).attempts) == 1
        assert stage.tokens == 500


def test_no_wait_reaches_beyond_the_deadline() -> None:
    stage = Stage(1, rng=Draws(1.0))
    played = stage.play([answer(503, lasts=0.98)], total=1.0)
    assert played.waits == []
    assert stage.tokens == 500, "what is not made is not paid"


def test_the_time_left_is_used_for_another_attempt() -> None:
    assert len(Stage(2).play([answer(503, lasts=0.9), OK], total=1.0).attempts) == 2


def test_a_timer_that_went_off_a_moment_before_the_deadline_is_the_end_of_the_call() -> None:
    stage = Stage(2)
    assert len(stage.play(iter([broke(End.timeout, lasts=2.0), OK]), total=2.0 + TIMER_SLACK / 2).attempts) == 1


# The end of a response


def test_a_body_that_dies_later_adds_one_failure_to_the_node_and_to_the_report() -> None:
    stage = Stage(1)
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    stage.settle(call, attempt, OK)
    assert (stage.nodes[0].failures, attempt.outcome, attempt.is_over) == (0, "ok", False)
    for _ in range(3):
        call.release(attempt, stage.clock(), died="ReadError: reset")
    assert stage.nodes[0].failures == 1
    assert stage.nodes[0].breaker.failures_in_a_row == 1
    assert stage.nodes[0].in_flight == 0
    assert attempt.is_over
    assert attempt.outcome == "failed"
    assert attempt.error == "ReadError: reset"
    assert attempt.status == 200


def test_a_body_that_dies_after_it_was_closed_blames_nobody() -> None:
    stage = Stage(1)
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    stage.settle(call, attempt, OK)
    call.release(attempt, stage.clock())
    call.release(attempt, stage.clock(), died="ReadError: reset")
    assert (stage.nodes[0].failures, stage.nodes[0].in_flight, attempt.outcome) == (0, 0, "ok")


def test_a_rejected_answer_whose_body_dies_is_not_counted_twice() -> None:
    stage = Stage(1, retry=Retry(max_attempts=1))
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    stage.settle(call, attempt, UNAVAILABLE)
    call.release(attempt, stage.clock(), died="ReadError: reset")
    assert (stage.nodes[0].failures, attempt.outcome) == (1, "rejected")


def test_a_body_that_died_before_an_ejection_changes_nothing_after_it() -> None:
    stage = Stage(2)
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    stage.settle(call, attempt, OK)
    stage.eject(1)
    stage.clock.advance(2.0)
    assert stage.play([OK]).places == [1]
    call.release(attempt, stage.clock(), died="ReadError: reset")
    assert (stage.nodes[0].breaker.state, stage.nodes[0].breaker.failures_in_a_row) == ("closed", 0)


def test_B2_a_node_whose_every_body_dies_is_ejected() -> None:
    stage = Stage(2)
    for _ in range(20):
        call = stage.call()
        attempt = call.begin(stage.clock())
        assert attempt is not None
        stage.settle(call, attempt, OK)
        call.release(attempt, stage.clock(), died="ReadError: reset")
    assert stage.nodes[0].breaker.state == "open"


# Everything at once

ANY_STEP = st.sampled_from([row[1] for row in TABLE] + [answer(503, retry_after=0.5), answer(429, retry_after=40.0)])
SENT_KINDS = {"ok", "rejected", "failed"}


def holds(stage: Stage, script: list[Step], *, repeatable: bool, max_attempts: int) -> None:
    """Play one call by a script that repeats itself, and hold what became of it against the rules."""
    attempts = stage.play((step for _ in repeat(None) for step in script), repeatable=repeatable, total=8.0).attempts
    kinds = [attempt.kind for attempt in attempts]
    count = len(stage.nodes)
    assert len(attempts) <= max_attempts + count + 1
    assert kinds[0] == "first"
    assert "first" not in kinds[1:]
    assert kinds.count("retry") < max_attempts
    assert kinds.count("transparent") <= 1
    assert kinds.count("failover") <= count
    for before, attempt in pairwise(attempts):
        assert attempt.started < attempt.deadline <= before.started + 8.0 + 10.0
        assert attempt.waited == pytest.approx(attempt.started - before.started - before.seconds, abs=1e-6)
        assert before.outcome not in ("ok", "abandoned")
        assert repeatable or before.outcome == "not_sent"
        assert (attempt.kind == "failover") <= (before.outcome == "not_sent")
    assert 0 <= stage.tokens <= 500


@PROPERTY
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.lists(ANY_STEP, min_size=1, max_size=8),
    st.sampled_from([LeastRequest(), RoundRobin()]),
    st.integers(0, 2**32),
)
def test_C2_attempts_are_bounded_by_max_attempts_and_the_number_of_nodes(
    count: int, max_attempts: int, repeatable: bool, script: list[Step], balancer: Any, seed: int
) -> None:
    stage = Stage(count, balancer=balancer, rng=random.Random(seed), retry=Retry(max_attempts=max_attempts))
    holds(stage, script, repeatable=repeatable, max_attempts=max_attempts)


ANY_CALLS = st.lists(st.lists(ANY_STEP, min_size=1, max_size=6), min_size=2, max_size=12)


@PROPERTY
@given(st.integers(2, 5), ANY_CALLS, st.integers(0, 2**32))
def test_a_call_always_finds_a_node_whatever_has_been_ejected(count: int, scripts: list[list[Step]], seed: int) -> None:
    stage = Stage(count, balancer=LeastRequest(), rng=random.Random(seed))
    for script in scripts:
        assert stage.play(step for _ in repeat(None) for step in script).attempts
        assert sum(node.breaker.state != "closed" for node in stage.nodes) <= max(1, count // 2)


@PROPERTY
@given(st.integers(2, 5), st.lists(ANY_STEP, min_size=1, max_size=6), st.integers(0, 2**32))
@example(2, [CONNECT_TIMEOUT], 2)  # the other endpoint becomes due while this one hangs
def test_C2_attempts_are_bounded_whatever_has_been_ejected(count: int, script: list[Step], ejected: int) -> None:
    stage = Stage(count)
    stage.eject(1 + (ejected - 1) % count)
    assert len(stage.play(step for _ in repeat(None) for step in script).attempts) <= 3 + count + 1


@PROPERTY
@given(st.integers(2, 5), st.lists(st.sampled_from([LOST, UNAVAILABLE, REFUSED]), min_size=12, max_size=12))
def test_C2_no_endpoint_is_tried_twice_before_all_were_tried_once(count: int, script: list[Step]) -> None:
    places = Stage(count, retry=Retry(max_attempts=4)).play(iter(script)).places
    assert len(set(places[:count])) == len(places[:count])


# The report


def test_the_report_lists_every_attempt_with_what_it_was_and_what_became_of_it() -> None:
    stage = Stage(3, rng=Draws(1.0))
    played = stage.play([REFUSED, answer(503, retry_after=0.25, lasts=0.2), OK])
    report = played.call.report
    assert report.service == "orders"
    first, second, third = report.attempts
    assert (first.kind, first.outcome, first.status, first.error) == (
        "first",
        "not_sent",
        None,
        "ConnectError: refused",
    )
    assert (second.kind, second.outcome, second.status, second.error) == ("failover", "rejected", 503, None)
    assert (third.kind, third.outcome, third.status, third.error) == ("retry", "ok", 200, None)
    assert [attempt.seconds for attempt in report.attempts] == pytest.approx([0.01, 0.2, 0.01])
    assert [attempt.retry_after for attempt in report.attempts] == [None, 0.25, None]
    assert [attempt.waited for attempt in report.attempts] == [0.0, 0.0, 0.25]
    assert [attempt.endpoint for attempt in report.attempts] == [node.endpoint for node in stage.nodes]
    assert all(attempt.is_over for attempt in report.attempts)


def test_the_report_reads_as_a_sentence() -> None:
    played = Stage(2).play([REFUSED, answer(503, retry_after=0.25, lasts=0.2), OK])
    assert str(played.call.report) == (
        "orders: 3 attempts: "
        "first at 10.0.0.1:80 (InOrder): not_sent in 10 ms, ConnectError: refused; "
        "failover at 10.0.0.2:80 (InOrder): rejected in 200 ms, status 503, Retry-After 0.25 s; "
        "retry at 10.0.0.1:80 after waiting 250 ms (again): ok in 10 ms, status 200"
    )
    assert repr(played.call.report) == f"<Report {played.call.report}>"
    assert repr(played.attempts[0]) == f"<Attempt {played.attempts[0]}>"
    assert str(Stage(1).play([OK]).call.report).startswith("orders: 1 attempt: first at")
    assert str(Stage(1).call().report) == "orders: no attempt"
