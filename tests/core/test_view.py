"""Rule B3, as far as it exists: how many nodes may be ejected at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import OK, PROPERTY, Stage

from meshlib import Breaker, Endpoint, Service
from meshlib.core.view import View


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


def test_a_view_without_nodes_offers_none() -> None:
    view = View.build((), Service("orders", ["10.0.0.1:80"]), random.Random(1), "", 1000.0)
    assert list(view.candidates(1000.0, None)) == []
    assert (view.offered, view.ejected, view.panic) == ((), (), False)


def test_a_view_says_its_balancers_name() -> None:
    assert Stage(1).cluster.view.balancer == "InOrder"


# Rule D6: levels


def levels(*priorities: int, **settings: object) -> Stage:
    """10.0.0.1 and so on, with these priorities."""
    stage = Stage(1, **settings)
    stage.publish(*(Endpoint(f"10.0.0.{n + 1}", 80, priority=each) for n, each in enumerate(priorities)))
    return stage


def order(stage: Stage) -> list[int]:
    """The last number of each address in the order of the candidates."""
    stage.cluster.refresh(stage.clock())
    return [int(node.endpoint.host[-1]) for node in stage.cluster.view.candidates(stage.clock(), None)]


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


def zones(*theirs: str, ours: str = "a", **settings: object) -> Stage:
    """10.0.0.1 and so on, in these zones."""
    stage = Stage(1, zone=ours, **settings)
    stage.publish(*(Endpoint(f"10.0.0.{n + 1}", 80, zone=each) for n, each in enumerate(theirs)))
    return stage


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
