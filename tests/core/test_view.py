"""What the view makes of its nodes: the cap on ejections and panic (B3), levels and zones (D6), ramps (B2)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import LOST, OK, PROPERTY, REFUSED, UNAVAILABLE, Draws, InOrder, Stage

from meshlib import Breaker, ConsistentHash, Endpoint, LeastRequest, PeakEwma, Random, RoundRobin, Service
from meshlib.core.breaker import UNHEARD
from meshlib.core.cluster import CROWD, MOMENT
from meshlib.core.node import Node
from meshlib.core.report import Attempt
from meshlib.core.view import Levels, View


@dataclass(frozen=True)
class Counting(InOrder):
    """Counts how often a view is prepared, and keeps the weights it was prepared with."""

    weights: list[list[float]] = field(default_factory=list)

    def prepare(self, nodes: Sequence[Node], rng: Any) -> Callable[[float, str | None], Iterator[Node]]:
        self.weights.append([node.effective_weight for node in nodes])
        return super().prepare(nodes, rng)


def levels(*priorities: int, **settings: Any) -> Stage:
    """10.0.0.1 and so on, with these priorities."""
    stage = Stage(1, **settings)
    stage.publish(*(Endpoint(f"10.0.0.{n + 1}", 80, priority=each) for n, each in enumerate(priorities)))
    return stage


def zones(*theirs: str, ours: str = "a", **settings: Any) -> Stage:
    """10.0.0.1 and so on, in these zones."""
    stage = Stage(1, zone=ours, **settings)
    stage.publish(*(Endpoint(f"10.0.0.{n + 1}", 80, zone=each) for n, each in enumerate(theirs)))
    return stage


def order(stage: Stage) -> list[int]:
    """The last number of each address in the order of the candidates."""
    stage.cluster.refresh(stage.clock())
    return [int(node.endpoint.host.rpartition(".")[2]) for node in stage.cluster.view.candidates(stage.clock(), None)]


def fail(stage: Stage, *positions: int, times: int = 5) -> None:
    """Verdicts of calls that failed at these nodes, one node after the other; the first is 1."""
    for node in (stage.nodes[position - 1] for position in positions):
        for _ in range(times):
            stage.cluster.record(node, node.breaker.generation, False, stage.clock())


def check(stage: Stage, healthy: bool, *positions: int) -> None:
    """What health checks have come to about these nodes."""
    for position in positions:
        stage.cluster.heard(stage.nodes[position - 1].endpoint.place, healthy, stage.clock())


def states(stage: Stage) -> str:
    """The first letter of each breaker's state."""
    return "".join(node.breaker.state[0] for node in stage.nodes)


def panics(stage: Stage) -> bool:
    return stage.cluster.snapshot(stage.clock()).panic


def begin(stage: Stage) -> tuple[Any, Attempt]:
    """A call and its first attempt."""
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    return call, attempt


# Rule B3: how many may be ejected at once


@pytest.mark.parametrize(
    ("count", "max_ejected", "most"),
    [
        (1, 0.5, 0),  # never the last
        (1, 1.0, 0),
        (2, 0.5, 1),
        (3, 0.5, 1),
        (4, 0.5, 2),
        (5, 0.5, 2),
        (8, 0.5, 4),
        (2, 0.0, 1),  # always one
        (10, 0.0, 1),
        (10, 0.1, 1),
        (10, 0.3, 3),
        (10, 1.0, 9),
    ],
)
def test_B3_half_of_the_nodes_may_be_ejected_always_one_never_the_last(
    count: int, max_ejected: float, most: int
) -> None:
    stage = Stage(count, breaker=Breaker(max_ejected=max_ejected))
    for node in stage.nodes:
        for _ in range(20):
            stage.cluster.record(node, node.breaker.generation, False, stage.clock())
    assert [node.breaker.state for node in stage.nodes] == ["open"] * most + ["closed"] * (count - most)
    assert [node.breaker.is_refused for node in stage.nodes] == [False] * most + [True] * (count - most)


def test_B3_a_node_that_is_probed_still_counts_as_ejected() -> None:
    stage = Stage(2)
    stage.eject(1)
    stage.clock.advance(2.0)
    probe = stage.nodes[0].breaker.admit(stage.clock(), stage.clock() + 10)
    assert probe is not None
    broken = stage.nodes[1]
    for _ in range(10):
        stage.cluster.record(broken, broken.breaker.generation, False, stage.clock())
    assert broken.breaker.state == "closed"
    stage.cluster.record(stage.nodes[0], probe, True, stage.clock())
    stage.cluster.record(broken, broken.breaker.generation, False, stage.clock())
    assert broken.breaker.state == "open"


def test_B3_a_failure_refused_by_the_cap_ejects_at_the_next_failure_after_another_node_has_come_back() -> None:
    stage = Stage(2)
    stage.eject(1)
    healthy, broken = stage.nodes
    for _ in range(9):
        stage.cluster.record(broken, broken.breaker.generation, False, stage.clock())
    assert broken.breaker.state == "closed"
    stage.clock.advance(2.0)
    probe = healthy.breaker.admit(stage.clock(), stage.clock() + 10)
    stage.cluster.record(healthy, probe or 0, True, stage.clock())
    stage.cluster.record(broken, broken.breaker.generation, False, stage.clock())
    assert broken.breaker.state == "open"


def test_B3_the_last_is_not_ejected_even_when_the_others_are_removed() -> None:
    stage = Stage(4)
    stage.eject(1, 2)
    stage.publish("10.0.0.1:80", "10.0.0.2:80")
    assert stage.call().begin(stage.clock()) is not None


@PROPERTY
@given(
    st.integers(1, 8),
    st.floats(0, 1),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from([True, False, False, False, None]), st.floats(0, 3))),
)
def test_B3_the_number_of_ejected_nodes_is_never_above_the_cap(
    count: int, max_ejected: float, acts: list[tuple[int, bool | None, float]]
) -> None:
    stage = Stage(count, breaker=Breaker(max_ejected=max_ejected, consecutive=1), rng=random.Random(3))
    cap = min(count - 1, max(1, int(count * max_ejected)))
    for position, verdict, seconds in acts:
        node = stage.nodes[position % count]
        now = stage.clock.advance(seconds)
        permit = node.breaker.admit(now, now + 1)
        if permit is not None:
            stage.cluster.record(node, permit, verdict, now)
        assert sum(node.breaker.state != "closed" for node in stage.nodes) <= cap
        assert any(node.breaker.is_eligible(now) for node in stage.nodes), "a call always finds a node"


@pytest.mark.parametrize("first", [(4, 5, 6, 7), (1, 2, 3)], ids=["lower level first", "upper level first"])
def test_B3_the_cap_counts_for_each_level_and_only_for_the_last_one_that_has_a_node_to_go_to(
    first: tuple[int, ...],
) -> None:
    stage = levels(0, 0, 0, 1, 1, 1, 1)
    fail(stage, *first, times=20)
    fail(stage, *{1, 2, 3, 4, 5, 6, 7}.difference(first), times=20)
    assert states(stage) == "ooo" + "oocc"


@pytest.mark.parametrize("gone", ["taken out", "fails its checks", "ejected"])
def test_B3_a_lower_level_without_an_eligible_node_lifts_no_cap(gone: str) -> None:
    stage = levels(0, 0, 1)
    lower = stage.nodes[2]
    if gone == "taken out":
        stage.cluster.bar(lower.endpoint.place, stage.clock())
    elif gone == "fails its checks":
        check(stage, False, 3)
    else:  # as if it had been when there was a level below it
        now = stage.clock()
        assert lower.breaker._open(now, stage.rng)
    fail(stage, 1, 2)
    assert states(stage)[:2] == "oc"
    stage.clock.advance(2.0)  # from now on the ejected one may be probed, which is somewhere to go
    fail(stage, 2)
    assert states(stage)[:2] == ("oo" if gone == "ejected" else "oc")


def test_B3_nodes_taken_out_by_hand_are_no_part_of_their_level() -> None:
    stage = Stage(8)
    for position in (5, 6, 7, 8):
        stage.cluster.bar(stage.nodes[position - 1].endpoint.place, stage.clock())
    order(stage)
    fail(stage, 1, 2, 3, 4)
    assert states(stage)[:4] == "oocc", "half of the four that are left"
    pair = Stage(2)
    pair.cluster.bar(pair.nodes[1].endpoint.place, pair.clock())
    fail(pair, 1)
    assert states(pair) == "cc", "the last one that is called was ejected"


# Rule B3: panic


@pytest.mark.parametrize(
    ("count", "unhealthy", "panic", "expected"),
    [
        (4, 2, 0.5, False),  # exactly half is not under half
        (4, 3, 0.5, True),
        (3, 1, 0.5, False),
        (3, 2, 0.5, True),
        (2, 1, 0.5, False),
        (1, 1, 0.5, True),
        (2, 0, 1.0, False),
        (20, 1, 1.0, True),
        (4, 3, 0.25, False),
        (4, 4, 0.25, True),
        (4, 4, 0.0, False),
    ],
)
def test_B3_panic_is_when_less_than_the_share_is_healthy(
    count: int, unhealthy: int, panic: float, expected: bool
) -> None:
    stage = Stage(count, breaker=Breaker(panic=panic))
    check(stage, False, *range(1, unhealthy + 1))
    shown = stage.cluster.snapshot(stage.clock())
    assert (shown.panic, stage.cluster.panics) == (expected, int(expected))
    everybody, well = list(range(1, count + 1)), list(range(unhealthy + 1, count + 1))
    assert order(stage) == (everybody if expected else well)
    assert [node.eligible for node in shown.nodes] == [n in order(stage) for n in everybody]


def test_B3_without_panic_a_service_whose_checks_all_fail_has_nobody_to_call() -> None:
    stage = Stage(2, breaker=Breaker(panic=0))
    check(stage, False, 1, 2)
    assert stage.call().begin(stage.clock()) is None
    said = "no endpoint is to be called now (10.0.0.1:80: its checks fail; 10.0.0.2:80: its checks fail)"
    assert stage.cluster.why_empty(stage.clock()) == said


def test_B3_a_node_refused_by_the_cap_counts_as_unhealthy() -> None:
    stage = Stage(3)
    fail(stage, 1, 2)
    assert states(stage) == "occ"
    assert panics(stage)
    assert [node.why for node in stage.cluster.snapshot(stage.clock()).nodes] == [
        "called in panic (ejected after 5 failures in a row)",
        "not ejected after 5 failures in a row: too many others are",
        "closed",
    ]
    assert order(stage) == [1, 2, 3]


def test_B3_breakers_checks_and_refusals_add_up() -> None:
    stage = Stage(8)
    fail(stage, 1, 2, 3)
    assert not panics(stage)
    check(stage, False, 4)
    assert not panics(stage), "four of eight"
    fail(stage, 5)
    assert panics(stage)
    other = Stage(2)
    fail(other, 1, 2)
    check(other, False, 2)  # refused by the cap, and failing its checks: one node all the same
    assert [panics(other), states(other)] == [True, "oc"]


def test_B3_panic_is_counted_when_it_begins_and_ends_when_nodes_are_back() -> None:
    stage = Stage(3)
    for times in (1, 2):
        fail(stage, 1, 2)
        assert [panics(stage), panics(stage), stage.cluster.panics] == [True, True, times]
        stage.cluster.record(stage.nodes[1], stage.nodes[1].breaker.generation, True, stage.clock())
        assert not panics(stage), "two of three are well"
        assert order(stage) == [2, 3]
        stage.clock.advance(2.0)
        assert stage.play([OK]).places == [1]
        assert states(stage) == "ccc"
        stage.clock.advance(60.0)  # what it failed before is forgotten


def test_B3_checks_end_a_panic_too() -> None:
    stage = Stage(3)
    check(stage, False, 1, 2, 3)
    assert panics(stage)
    assert [node.why for node in stage.cluster.snapshot(stage.clock()).nodes] == [
        "called in panic (its checks fail)"
    ] * 3
    check(stage, True, 1)
    assert panics(stage)
    check(stage, True, 2)
    assert [panics(stage), order(stage)] == [False, [1, 2]]


def test_B3_nodes_taken_out_by_hand_never_come_back_by_panic() -> None:
    stage = Stage(4)
    first, last = stage.nodes[0].endpoint.place, stage.nodes[3].endpoint.place
    stage.cluster.bar(first, stage.clock())
    stage.cluster.bar(last, stage.clock())
    check(stage, False, 2, 3)
    shown = stage.cluster.snapshot(stage.clock())
    assert [(node.eligible, node.why) for node in shown.nodes] == [
        (False, "taken out by hand"),
        (True, "called in panic (its checks fail)"),
        (True, "called in panic (its checks fail)"),
        (False, "taken out by hand"),
    ]
    assert shown.panic
    stage.play([REFUSED, REFUSED, REFUSED, REFUSED])
    assert [node.attempts for node in stage.nodes] == [0, 3, 1, 0]
    stage.cluster.unbar(last, stage.clock())
    assert [panics(stage), order(stage)] == [True, [2, 3, 4]]


def test_B3_a_service_whose_nodes_were_all_taken_out_by_hand_calls_nobody_and_is_in_no_panic() -> None:
    stage = Stage(2)
    for node in stage.nodes:
        stage.cluster.bar(node.endpoint.place, stage.clock())
    assert stage.call().begin(stage.clock()) is None
    assert not panics(stage)


def test_B3_draining_nodes_never_come_back_by_panic() -> None:
    stage = Stage(3)
    check(stage, False, 1, 2, 3)
    call, attempt = begin(stage)
    assert stage.settle(call, attempt, UNAVAILABLE) is not None
    drained = stage.nodes[1]
    stage.publish("10.0.0.1:80", "10.0.0.3:80")
    assert panics(stage)
    following = call.begin(stage.clock())
    assert following is not None
    assert following.node is not drained, "its walk began before"
    assert (drained.attempts, order(stage)) == (0, [1, 3])


def test_B3_a_call_in_panic_is_not_judged_by_an_open_breaker_and_its_probe_still_takes_place() -> None:
    stage = Stage(2)
    fail(stage, 1, 2)
    assert (states(stage), panics(stage)) == ("oc", True)
    broken = stage.nodes[0].breaker
    call, attempt = begin(stage)
    assert (attempt.node, attempt.why, attempt.permit) == (stage.nodes[0], "panic", UNHEARD)
    stage.settle(call, attempt, OK)
    assert broken.state == "open", "a success in panic is no probe"
    assert stage.nodes[0].ewma == pytest.approx(0.01), "but the balancer goes by it"
    for _ in range(10):
        stage.play([UNAVAILABLE], retries=False)
    assert (broken.ejections, broken.is_eligible(stage.clock())) == (1, False)
    stage.clock.advance(2.0)
    probing, probe = begin(stage)
    assert (probe.node, probe.why) == (stage.nodes[0], "probe")
    beside, late = begin(stage)
    assert (late.node, late.why, late.permit) == (stage.nodes[0], "panic", UNHEARD)
    stage.settle(beside, late, UNAVAILABLE)
    assert broken.state == "half_open"
    stage.settle(probing, probe, OK)
    assert (broken.state, panics(stage)) == ("closed", False)


def test_B3_in_panic_a_probe_that_is_due_is_made_before_the_balancer_is_asked() -> None:
    stage = Stage(2)
    fail(stage, 2, 1)
    assert (states(stage), panics(stage)) == ("co", True)
    stage.clock.advance(2.0)
    assert [stage.play([OK]).places for _ in range(2)] == [[2], [1]]


def test_B2_a_node_that_fails_its_checks_or_was_taken_out_by_hand_is_not_probed() -> None:
    stage = Stage(2)
    stage.eject(1)
    check(stage, False, 1)
    stage.clock.advance(2.0)
    assert stage.play([OK]).places == [2]
    stage.cluster.bar(stage.nodes[0].endpoint.place, stage.clock())
    check(stage, True, 1)
    assert stage.play([OK]).places == [2]
    stage.nodes[0].is_barred = False
    stage.cluster._change(stage.clock())
    assert stage.play([OK]).places == [1]


def test_B5_a_breaker_that_is_not_enforced_ejects_nobody_and_causes_no_panic_and_checks_still_count() -> None:
    stage = Stage(3, breaker=Breaker(enforce=False))
    fail(stage, 1, 2, 3, times=10)
    assert (states(stage), panics(stage), order(stage)) == ("ccc", False, [1, 2, 3])
    why = "closed; would have been ejected 2 times, at last after 5 failures in a row"
    assert [node.why for node in stage.cluster.snapshot(stage.clock()).nodes] == [why] * 3
    check(stage, False, 1)
    assert order(stage) == [2, 3]
    check(stage, False, 2)
    assert panics(stage)


# Rule D6: levels


def test_D6_the_lowest_number_comes_first_whatever_the_order() -> None:
    assert order(levels(7, 0, 7, 3)) == [2, 4, 1, 3]


def test_D6_a_level_with_too_few_that_may_be_used_comes_last() -> None:
    stage = levels(0, 0, 1, 1, min_healthy=2)
    assert order(stage) == [1, 2, 3, 4]
    stage.eject(1)
    assert order(stage) == [3, 4, 2]
    stage.clock.advance(2.0)
    assert order(stage) == [3, 4, 2]
    assert stage.play([OK]).places == [1], "its probe is due"
    assert order(stage) == [1, 2, 3, 4]


def test_D6_levels_that_are_all_too_small_keep_their_order() -> None:
    assert order(levels(2, 0, 1, min_healthy=2)) == [2, 3, 1]


def test_D6_a_call_goes_down_a_level_and_comes_back() -> None:
    stage = levels(0, 1)
    stage.eject(1)
    assert stage.play([OK]).places == [2]
    stage.clock.advance(2.0)
    assert stage.play([OK]).places == [1], "the probe"
    assert stage.play([OK]).places == [1]


def test_D6_checks_count_for_the_levels() -> None:
    stage = levels(0, 0, 1)
    check(stage, False, 1)
    assert order(stage) == [2, 3]
    check(stage, False, 2)
    assert [order(stage), panics(stage)] == [[3], False]
    check(stage, True, 1)
    assert order(stage) == [1, 3]


def test_D6_nodes_refused_by_the_cap_are_none_of_the_healthy_ones_that_a_level_needs() -> None:
    stage = levels(0, 0, 1)
    check(stage, False, 3)
    fail(stage, 1, 2)
    assert (states(stage), panics(stage)) == ("occ", True)
    check(stage, True, 3)
    assert [order(stage), panics(stage)] == [[3, 2], False]


def test_D6_when_all_levels_are_too_small_the_first_is_called_and_each_may_panic() -> None:
    stage = levels(0, 0, 0, 1, 1, min_healthy=3)
    check(stage, False, 1)
    assert [order(stage), panics(stage)] == [[2, 3, 4, 5], False]
    check(stage, False, 2)
    assert [order(stage), panics(stage)] == [[1, 2, 3, 4, 5], True]
    check(stage, False, 4, 5)
    assert order(stage) == [1, 2, 3, 4, 5]
    check(stage, True, 1, 2)
    assert [order(stage), panics(stage)] == [[1, 2, 3], False], "there is a level to go to"


def test_D6_panic_at_the_second_level_does_not_bring_back_the_first() -> None:
    stage = levels(0, 0, 1, 1, 1)
    check(stage, False, 1, 2)
    check(stage, False, 3, 4)
    shown = stage.cluster.snapshot(stage.clock())
    assert (shown.panic, stage.cluster.view.priority, stage.cluster.panics) == (True, 1, 1)
    assert order(stage) == [3, 4, 5]
    assert [node.eligible for node in shown.nodes] == [False, False, True, True, True]
    check(stage, False, 5)
    assert [order(stage), stage.cluster.view.priority] == [[1, 2, 3, 4, 5], 0], "nobody is well: the first in panic"
    assert stage.cluster.panics == 1, "it is the same panic"


def test_D6_a_small_rest_of_the_first_level_is_no_panic_while_there_is_a_second_one() -> None:
    stage = levels(*[0] * 9, 1)
    check(stage, False, *range(1, 9))
    assert [order(stage), panics(stage)] == [[9, 10], False]


@pytest.mark.parametrize("failure", [REFUSED, LOST, UNAVAILABLE], ids=["refused", "lost", "503"])
def test_D6_a_call_goes_on_to_the_next_level_at_once(failure: Any) -> None:
    stage = levels(0, 0, 1, 1)
    played = stage.play([failure, failure, OK])
    assert played.places == [1, 2, 3]
    assert sum(played.waits) < 0.25
    assert states(stage) == "cccc", "no breaker was needed for it"


def test_D6_back_within_25_s_of_its_recovery_however_long_it_was_away() -> None:
    stage = levels(0, 1, rng=Draws(0.999))  # the longest ejections there are
    dead_until = stage.clock() + 200.0
    used: list[tuple[float, int]] = []
    while stage.clock() < dead_until + 30.0:
        call, attempt = begin(stage)
        is_first = attempt.endpoint.priority == 0
        if is_first and stage.clock() < dead_until:
            stage.settle(call, attempt, REFUSED)
            attempt = call.begin(stage.clock())
            assert attempt is not None
        used.append((stage.clock(), attempt.endpoint.priority))
        stage.settle(call, attempt, OK)
        call.release(attempt, stage.clock())
        stage.clock.advance(0.5)
    assert {priority for at, priority in used if at < dead_until} == {1}
    assert {priority for at, priority in used if at > dead_until + 25.0} == {0}


# Rule D6: zones


def test_D6_endpoints_of_our_zone_come_first() -> None:
    assert order(zones("b", "a", "", "a")) == [2, 4, 1, 3]
    assert order(zones("b", "a", "", "a", ours="")) == [1, 2, 3, 4]
    assert order(zones("b", "a", ours="c")) == [1, 2]
    assert order(zones("a", "a")) == [1, 2]


def test_D6_a_zone_with_less_than_half_of_its_endpoints_does_not_count() -> None:
    stage = zones("b", "a", "b", "a", "a", breaker=Breaker(max_ejected=1.0))
    stage.eject(2)
    assert order(stage) == [4, 5, 1, 3], "one of three"
    stage.eject(4)
    assert order(stage) == [1, 3, 5]
    stage.clock.advance(3.0)
    assert [stage.play([OK]).places for _ in range(2)] == [[2], [4]], "their probes"
    assert order(stage) == [2, 4, 5, 1, 3]


def test_D6_a_priority_counts_more_than_a_zone() -> None:
    stage = Stage(1, zone="a")
    spare = Endpoint("10.0.0.1", 80, zone="a", priority=1)
    stage.publish(spare, Endpoint("10.0.0.2", 80, zone="b"), Endpoint("10.0.0.3", 80, zone="a"))
    assert order(stage) == [3, 2, 1]


def test_D6_zones_do_not_count_in_panic() -> None:
    stage = zones("b", "a", "b", "b")
    assert order(stage) == [2, 1, 3, 4]
    check(stage, False, 1, 3)
    assert order(stage) == [2, 4], "half are well"
    check(stage, False, 4)
    assert [order(stage), panics(stage)] == [[1, 2, 3, 4], True]


def test_D6_a_zone_has_as_many_as_were_not_taken_out_by_hand() -> None:
    stage = zones("b", "a", "a", "a", "b")
    for position in (3, 4):
        stage.cluster.bar(stage.nodes[position - 1].endpoint.place, stage.clock())
    assert order(stage) == [2, 1, 5]


# Newcomers that wait for their first check


def awaiting(stage: Stage, *positions: int) -> None:
    """These have come lately to a service with checks."""
    for position in positions:
        stage.nodes[position - 1].awaits_check = True
    stage.cluster._change(stage.clock())


def test_a_newcomer_is_called_once_its_first_check_has_passed() -> None:
    stage = Stage(3)
    awaiting(stage, 2)
    shown = stage.cluster.snapshot(stage.clock()).nodes[1]
    assert (order(stage), shown.eligible, shown.why) == ([1, 3], False, "its first check is still to come")
    check(stage, True, 2)
    assert [order(stage), stage.cluster.snapshot(stage.clock()).nodes[1].why] == [[1, 2, 3], "closed"]
    other = Stage(3)
    awaiting(other, 2)
    check(other, False, 2)
    assert order(other) == [1, 3]


def test_newcomers_are_called_while_there_is_nobody_else() -> None:
    stage = Stage(3)
    awaiting(stage, 2, 3)
    assert [order(stage), panics(stage)] == [[1], False]
    check(stage, False, 1)
    assert order(stage) == [2, 3]
    check(stage, True, 1)
    assert order(stage) == [1]


def test_a_newcomer_does_not_bear_the_load_of_a_level_that_fails_its_checks() -> None:
    stage = Stage(5)
    awaiting(stage, 4, 5)
    check(stage, False, 1, 2, 3)
    assert [order(stage), panics(stage)] == [[1, 2, 3, 4, 5], True]


def test_newcomers_are_called_only_after_a_lower_level_that_is_well() -> None:
    stage = levels(0, 0, 1)
    awaiting(stage, 2)
    assert order(stage) == [1, 3]
    check(stage, False, 1)
    assert [order(stage), panics(stage)] == [[3, 2], False]
    check(stage, False, 3)
    assert [order(stage), panics(stage)] == [[2, 3], False]
    check(stage, True, 2, 3)
    assert order(stage) == [2, 3]


def test_newcomers_count_neither_as_healthy_nor_as_unhealthy() -> None:
    stage = Stage(8)
    awaiting(stage, 3, 4, 5, 6, 7, 8)
    assert not panics(stage), "two of two are well"
    check(stage, False, 1)
    assert not panics(stage), "one of two"
    check(stage, False, 3)
    assert panics(stage), "one of three: it is a newcomer no more"
    second = levels(0, 0, 0, 1, 1, min_healthy=2)
    awaiting(second, 2, 3)
    assert order(second) == [4, 5, 1], "one is known to be well, and two are asked for"


def test_D6_newcomers_of_our_zone_do_not_make_it_look_small() -> None:
    stage = zones("b", "a", "a", "a", "a")
    awaiting(stage, 3, 4, 5)
    assert order(stage) == [2, 1]
    check(stage, True, 3, 4, 5)
    assert order(stage) == [2, 3, 4, 5, 1]


# Ramps, and how often a view is built


def recovered(stage: Stage, position: int = 1) -> None:
    """Eject a node, and let its probe succeed."""
    stage.eject(position)
    stage.clock.advance(2.0)
    assert stage.play([OK]).places == [position]
    stage.cluster.refresh(stage.clock())


def test_B2_a_view_is_built_for_each_step_of_a_ramp_and_never_for_a_call() -> None:
    counting = Counting()
    stage = Stage(2, balancer=counting)
    recovered(stage)
    counting.weights[:] = counting.weights[-1:]
    for _ in range(1000):
        call = stage.call()
        attempt = call.begin(stage.clock())
        assert attempt is not None
        call.succeed(attempt, stage.clock(), 200, whole=True)
    assert counting.weights == [[0.1, 1.0]]
    start = stage.nodes[0].breaker._closed_at
    for tenth in range(1, 200):
        stage.clock.advance(start + tenth / 10 - stage.clock())
        stage.play([OK], retries=False)
    assert counting.weights == [[pytest.approx(step / 10), 1.0] for step in range(1, 11)]


def test_B2_no_ramp_at_all() -> None:
    counting = Counting()
    stage = Stage(2, balancer=counting, breaker=Breaker(ramp=0))
    recovered(stage)
    assert counting.weights[-1] == [1.0, 1.0]
    assert stage.cluster.changes_at == float("inf")


def test_B2_a_ramp_is_of_the_endpoints_own_weight() -> None:
    counting = Counting()
    stage = Stage(1, balancer=counting)
    stage.publish(Endpoint("10.0.0.1", 80, weight=30), Endpoint("10.0.0.2", 80, weight=10))
    recovered(stage)
    assert counting.weights[-1] == [3.0, 10.0]
    stage.publish(Endpoint("10.0.0.1", 80, weight=50), Endpoint("10.0.0.2", 80, weight=10))
    assert counting.weights[-1] == [5.0, 10.0]


def test_B2_an_ejection_ends_a_ramp() -> None:
    stage = Stage(3)
    recovered(stage)
    stage.eject(1)
    assert order(stage) == [2, 3]
    assert stage.cluster.changes_at == float("inf"), "a view would be built for steps that nobody sees"


@pytest.mark.parametrize(
    "balancer",
    [PeakEwma(), LeastRequest(), RoundRobin(), Random(), ConsistentHash(), ConsistentHash(scheme="ring")],
    ids=["PeakEwma", "LeastRequest", "RoundRobin", "Random", "rendezvous", "ring"],
)
def test_B2_every_balancer_gives_a_node_on_its_ramp_what_the_ramp_says(balancer: Any) -> None:
    stage = Stage(2, balancer=balancer, rng=random.Random(7))
    stage.eject(1)
    stage.clock.advance(3.0)
    played = stage.play([OK])
    assert (played.places, played.attempts[0].why) == ([1], "probe")
    picks = 3000
    before = 0
    for second in range(10):
        stage.cluster.refresh(stage.clock())
        candidates, weight = stage.cluster.view.candidates, min(1.0, (second + 1) / 10)
        assert stage.nodes[0].effective_weight == pytest.approx(weight)
        first = Counter(next(candidates(stage.clock(), f"u{number}")) for number in range(picks))[stage.nodes[0]]
        is_hash = isinstance(balancer, ConsistentHash)
        share = weight * (0.5 if is_hash else 1 / (1 + weight))
        assert abs(first / picks - share) < (0.07 if is_hash else 0.04)
        assert first >= before - 0.04 * picks
        before = first
        stage.clock.advance(1.0)


def test_calls_come_back_on_a_ramp_after_an_ejection_by_hand() -> None:
    counting = Counting()
    stage = Stage(2, balancer=counting)
    place = stage.nodes[0].endpoint.place
    stage.cluster.unbar(place, stage.clock())
    stage.cluster.refresh(stage.clock())
    assert counting.weights[-1] == [1.0, 1.0], "it was never taken out"
    stage.cluster.bar(place, stage.clock())
    assert order(stage) == [2]
    stage.cluster.unbar(place, stage.clock())
    assert [order(stage), counting.weights[-1]] == [[1, 2], [0.1, 1.0]]
    fail(stage, 2)
    stage.cluster.unbar(stage.nodes[1].endpoint.place, stage.clock())
    assert [order(stage), states(stage), counting.weights[-1]] == [[1, 2], "cc", [0.1, 0.1]]
    stage.clock.advance(9.0)
    assert [order(stage), counting.weights[-1]] == [[1, 2], [1.0, 1.0]]


def test_there_is_no_ramp_for_new_nodes_nor_for_those_whose_checks_pass_again() -> None:
    counting = Counting()
    stage = Stage(2, balancer=counting)
    check(stage, False, 1)
    assert order(stage) == [2]
    check(stage, True, 1)
    assert [order(stage), counting.weights[-1]] == [[1, 2], [1.0, 1.0]]
    stage.publish("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80")
    assert counting.weights[-1] == [1.0, 1.0, 1.0]


def test_a_few_nodes_get_a_view_for_every_change() -> None:
    counting = Counting()
    stage = Stage(10, balancer=counting)
    counting.weights.clear()
    for position in range(1, 5):
        check(stage, False, position)
        stage.cluster.refresh(stage.clock())
    assert [len(weights) for weights in counting.weights] == [9, 8, 7, 6]


def test_changes_of_many_nodes_share_a_view() -> None:
    counting = Counting()
    stage = Stage(CROWD + 100, balancer=counting)
    moment = len(stage.nodes) * MOMENT
    stage.clock.advance(1.0)
    counting.weights.clear()
    check(stage, False, 1)
    stage.cluster.refresh(stage.clock())
    assert [len(weights) for weights in counting.weights] == [len(stage.nodes) - 1], "a single change is seen at once"
    for position in range(2, 92):
        check(stage, False, position)
        stage.clock.advance(moment / 10)
        stage.cluster.refresh(stage.clock())
    stage.clock.advance(moment)
    stage.cluster.refresh(stage.clock())
    assert 9 <= len(counting.weights) <= 12
    assert len(counting.weights[-1]) == len(stage.nodes) - 91
    assert stage.cluster.changes_at == float("inf")


def test_the_steps_of_many_ramps_share_a_view() -> None:
    counting = Counting()
    stage = Stage(CROWD + 100, balancer=counting)
    moment = len(stage.nodes) * MOMENT
    stage.eject(*range(1, 101))
    stage.clock.advance(1.0)
    for node in stage.nodes[:100]:  # all within a tenth of a second
        stage.cluster.unbar(node.endpoint.place, stage.clock.advance(0.001))
    stage.cluster.refresh(stage.clock.advance(0.5))
    counting.weights.clear()
    until = stage.clock() + 1.0
    while stage.clock() < until:
        stage.cluster.refresh(stage.clock.advance(0.0005))
    assert len(counting.weights) <= 0.1 / moment + 2
    assert counting.weights[-1][:100] == [pytest.approx(0.2)] * 100


# The rest


@pytest.mark.parametrize("balancer", [PeakEwma(), LeastRequest(), RoundRobin(), Random(), ConsistentHash()], ids=repr)
def test_B3_in_panic_calls_go_to_those_that_are_well_rather_than_to_the_others(balancer: Any) -> None:
    stage = Stage(3, rng=random.Random(5), balancer=balancer)
    fail(stage, 1, 2)
    assert panics(stage)
    assert [node.effective_weight for node in stage.nodes] == [0.1, 0.1, 1.0]
    calls = [stage.call(key=str(number)) for number in range(400)]
    places = [str(attempt.endpoint)[:8] for call in calls if (attempt := call.begin(stage.clock()))]
    least = 200 if isinstance(balancer, LeastRequest) else 300  # that one evens out what is in flight, by weight
    assert least < places.count("10.0.0.3") < 400


def test_B3_where_nobody_is_well_all_keep_their_weight() -> None:
    stage = Stage(1)
    fail(stage, 1)
    assert panics(stage)
    assert stage.nodes[0].effective_weight == 1.0


def test_a_view_without_nodes_offers_none() -> None:
    service = Service("orders", ["10.0.0.1:80"])
    view = View.build((), Levels.of((), service), service, random.Random(1), "", 1000.0)
    assert list(view.candidates(1000.0, None)) == []
    assert (view.offered, view.ejected, view.panic) == ((), (), False)


def test_a_view_says_its_balancers_name() -> None:
    assert Stage(1).cluster.view.balancer == "InOrder"
