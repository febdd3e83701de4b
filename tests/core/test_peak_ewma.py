"""PeakEwma: whose answer is likely to come soonest, and what becomes of those that were slow."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from math import exp, inf
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import OK, PROPERTY, Draws, Stage, Step, answer

from meshlib import Breaker, ConfigError, Endpoint, PeakEwma
from meshlib.core.balance.peak_ewma import ALIKE, LEAST
from meshlib.core.node import Node, remembering
from meshlib.testing import BalancerHarness

NOW = 1000.0


def a_node(
    latency: float | None = None, *, silent: float = 0.0, ages: tuple[float, ...] = (), weight: float = 1
) -> Node:
    """A node with this average, last heard of `silent` seconds ago, and attempts under way of these ages."""
    node = remembering(Endpoint("10.0.0.1", 80, weight=weight), Breaker(), PeakEwma())
    for age in ages:
        node.start(NOW - age)
    if latency is not None:
        node.ewma, node.observed_at = latency, NOW - silent
    return node


def order(nodes: list[Node], balancer: PeakEwma | None = None, now: float = NOW, rng: Any = None) -> list[int]:
    """The walk of one call, by position; nodes are drawn in their order unless told otherwise."""
    balancer = balancer or PeakEwma(choices=max(2, len(nodes)))
    return [nodes.index(node) for node in balancer.prepare(nodes, rng or Draws(0.0))(now, None)]


def firsts(nodes: list[Node], count: int = 4000) -> Counter[int]:
    candidates = PeakEwma().prepare(nodes, random.Random(3))
    return Counter(nodes.index(next(candidates(NOW, None))) for _ in range(count))


# Cost

NODES = st.builds(
    a_node,
    st.none() | st.floats(0, 10),
    silent=st.floats(0, 60),
    ages=st.lists(st.floats(0, 30), max_size=3).map(lambda ages: tuple(sorted(ages, reverse=True))),
    weight=st.floats(0.1, 10),
)


def costs(nodes: list[Node]) -> list[float]:
    """What the design page says, written out."""
    known = [node for node in nodes if node.observed_at > -inf]
    heard = [node for node in known if NOW - node.observed_at <= 10.0] or known
    latencies = sorted(node.ewma for node in heard)
    median = latencies[(len(latencies) - 1) // 2] if latencies else 0.0
    found = []
    for node in nodes:
        kept = exp((node.observed_at - NOW) / 10.0)
        latency = median + (node.ewma - median) * kept
        oldest = node.oldest_open
        latency = max(latency, 0.0 if oldest is None else NOW - oldest) or LEAST
        found.append(latency * (node.in_flight + 1) / node.effective_weight)
    return found


@PROPERTY
@given(st.lists(NODES, min_size=1, max_size=8), st.integers(0, 99))
def test_every_candidate_is_the_cheapest_left_or_idle_and_as_good(nodes: list[Node], seed: int) -> None:
    price, walked = costs(nodes), order(nodes, rng=random.Random(seed))
    assert sorted(walked) == list(range(len(nodes)))
    for step, chosen in enumerate(walked):
        best = min(walked[step:], key=price.__getitem__)
        if nodes[chosen].in_flight or nodes[best].in_flight:
            assert price[chosen] <= price[best] * (1 + 1e-9)
        else:
            latency, least = (price[each] * nodes[each].effective_weight for each in (chosen, best))
            assert latency <= least * ALIKE * (1 + 1e-9)


def test_of_those_drawn_the_cheapest_goes_first_and_the_next_one_drawn_joins_the_others() -> None:
    nodes = [a_node(latency, ages=(0.0,)) for latency in (0.5, 0.3, 0.4, 0.1, 0.2)]
    assert order(nodes, PeakEwma(choices=3)) == [1, 3, 4, 2, 0]


def test_latency_counts_times_the_calls_ahead_over_the_weight() -> None:
    fast, slow = a_node(0.1, ages=(0.0, 0.0)), a_node(0.2, ages=())
    assert order([fast, slow]) == [1, 0]  # 0.1 * 3 against 0.2 * 1
    slow.start(NOW)
    assert order([fast, slow]) == [0, 1]  # against 0.2 * 2
    slow.effective_weight = 2.0
    assert order([fast, slow]) == [1, 0]


def test_the_age_of_the_oldest_attempt_counts_once_it_is_above_the_average() -> None:
    hanging, slow = a_node(0.01, ages=(0.4, 0.0)), a_node(0.5, ages=(0.0, 0.0))
    assert order([slow, hanging]) == [1, 0]
    slow = a_node(0.5, ages=())
    assert order([hanging, slow]) == [1, 0]


def test_a_node_that_hangs_is_left_although_it_never_answers() -> None:
    """The frozen one is avoided from its first call on; its open attempt has not said anything yet."""
    harness = BalancerHarness(PeakEwma(), ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"], random.Random(1))
    now, hung = 0.0, 0
    for number in range(600):
        now += 0.01
        endpoint = harness.pick(now)
        if endpoint.host == "10.0.0.1" and number >= 300:
            hung += 1
        else:
            harness.done(endpoint, now + 0.01, latency=0.01)
    assert hung == 1


def test_a_failure_costs_the_penalty_so_that_failing_fast_is_not_fast() -> None:
    harness = BalancerHarness(PeakEwma(), ["10.0.0.1:80", "10.0.0.2:80"], random.Random(1))
    picked: Counter[str] = Counter()
    for step in range(500):
        now = step * 0.02
        endpoint = harness.pick(now)
        picked[endpoint.host] += 1
        broken = endpoint.host == "10.0.0.1"
        harness.done(endpoint, now + 0.02, latency=0.0001 if broken else 0.02, failed=broken)
    assert picked["10.0.0.1"] <= 1


# What is forgotten


def test_silence_leads_to_the_median_from_above_and_from_below() -> None:
    recent = [a_node(latency, ages=(0.0,)) for latency in (0.1, 0.1, 0.3)]
    was_slow, was_fast = a_node(1.0, ages=(0.0,)), a_node(0.01, ages=(0.0,))
    nodes = [*recent, was_slow, was_fast]
    assert order(nodes) == [4, 0, 1, 2, 3]
    was_slow.observed_at = NOW - 14.0  # 0.1 + 0.9 * exp(-1.4) = 0.32
    assert order(nodes) == [4, 0, 1, 2, 3]
    was_slow.observed_at = NOW - 16.0  # 0.1 + 0.9 * exp(-1.6) = 0.28
    assert order(nodes) == [4, 0, 1, 3, 2]
    recent[0].ewma, was_fast.observed_at = 0.09, NOW - 60.0
    assert order(nodes) == [0, 4, 1, 3, 2], "what was fast a minute ago is a usual one"


def test_decay_says_how_fast_it_is_forgotten() -> None:
    nodes = [a_node(0.1, ages=(0.0,)), a_node(0.3, ages=(0.0,)), a_node(1.0, silent=3.0, ages=(0.0,))]
    assert order(nodes, PeakEwma(decay=10.0)) == [0, 1, 2]
    assert order(nodes, PeakEwma(decay=1.0)) == [0, 2, 1]


def test_a_new_node_is_taken_for_a_usual_one() -> None:
    nodes = [a_node(latency, ages=(0.0,)) for latency in (0.1, 0.2, 0.3)]
    new = a_node(ages=(0.0,), weight=1.01)
    assert order([*nodes, new]) == [0, 3, 1, 2]


def test_the_median_is_found_anew_every_second() -> None:
    new, low, mid, high = nodes = [a_node(), *(a_node(latency) for latency in (0.1, 0.2, 0.4))]
    candidates = PeakEwma().prepare(nodes, Draws(0.0))
    assert list(candidates(NOW, None)) == [low, new, mid, high]
    mid.ewma = 0.01  # so that the median is 0.1
    assert list(candidates(NOW + 0.9, None)) == [mid, low, new, high]
    assert list(candidates(NOW + 1.1, None)) == [mid, new, low, high]


@pytest.mark.parametrize("slow", [1, 2, 4])
def test_nodes_that_were_slow_are_tried_again_even_where_most_were(slow: int) -> None:
    """The median must not be what they hold each other at; of two nodes it is not the slower one."""
    addresses = [f"10.0.0.{number}:80" for number in range(slow + 1)]
    harness = BalancerHarness(PeakEwma(), addresses, random.Random(1))
    back: Counter[str] = Counter()
    for step in range(12_000):
        now = step * 0.01
        endpoint = harness.pick(now)
        is_slow = endpoint.host != "10.0.0.0" and now < 1.0
        back[endpoint.host] += now > 90.0
        harness.done(endpoint, now + 0.01, latency=1.0 if is_slow else 0.01, failed=is_slow)
    assert min(back[address.partition(":")[0]] for address in addresses) > 3000 / (slow + 1) / 2


# Nodes that are alike


def test_idle_nodes_that_are_alike_share_by_weight() -> None:
    shares = firsts([a_node(0.010, weight=3), a_node(0.0099 * ALIKE), a_node(0.0101 * ALIKE)])
    assert shares[0] == pytest.approx(3000, rel=0.05), "the cheapest for its weight, and yet not always first"
    assert shares[1] == pytest.approx(1000, rel=0.1)
    assert shares[2] == 0


def test_a_busy_node_does_not_share_with_an_idle_one() -> None:
    busy, idle = a_node(0.1, ages=(0.0,)), a_node(0.2, weight=4)  # 0.1 * 2 is about as much as 0.2
    assert order([busy, idle]) == [1, 0]


def test_nothing_known_is_alike_and_a_busy_one_comes_after_the_idle() -> None:
    nodes = [a_node(weight=weight) for weight in (1, 2, 1)]
    shares = firsts(nodes)
    assert [shares[each] for each in range(3)] == [pytest.approx(share, rel=0.1) for share in (1000, 2000, 1000)]
    nodes[1].start(NOW)
    nodes[1].start(NOW)
    assert set(firsts(nodes)) == {0, 2}


@pytest.mark.parametrize("count", [3, 20])
def test_a_caller_that_makes_one_call_at_a_time_starves_nobody_alike(count: int) -> None:
    harness = BalancerHarness(PeakEwma(), [f"10.0.0.{number + 1}:80" for number in range(count)], random.Random(1))
    calls: Counter[str] = Counter()
    now = 0.0
    for _ in range(300 * count):
        endpoint = harness.pick(now)
        latency = 0.010 + 0.002 * int(endpoint.host.rpartition(".")[2]) / count  # a hair apart, and always the same
        now += latency
        harness.done(endpoint, now, latency)
        calls[endpoint.host] += 1
    assert len(calls) == count
    assert all(share == pytest.approx(300, rel=0.3) for share in calls.values())


# Retry-After, through a call


@pytest.mark.parametrize("status", [429, 503])
def test_C9_who_asks_for_time_gets_it(status: int) -> None:
    stage = Stage(3, balancer=PeakEwma(), rng=random.Random(1))
    for _ in range(30):
        stage.play([OK])
    [shunned] = stage.play([answer(status, retry_after=4.0)], repeatable=False).places
    places = Counter(place for _ in range(200) for place in stage.play([OK]).places)
    assert set(places) == {1, 2, 3} - {shunned}


def test_C9_a_retry_after_counts_for_ten_seconds_at_most_and_for_what_it_is_below() -> None:
    for told, expected in ((4.0, 4.0), (86_400.0, 10.0)):
        stage = Stage(1, balancer=PeakEwma())
        stage.play([answer(503, retry_after=told)], repeatable=False)
        assert stage.nodes[0].ewma == expected


# Price, and settings


def lines(act: Callable[[], object]) -> int:
    """How many lines of Python it runs; a line of a comprehension counts anew for each turn."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def test_a_pick_costs_the_same_at_any_number_of_endpoints() -> None:
    def price(count: int) -> tuple[int, int]:
        candidates = PeakEwma().prepare([a_node(0.01) for _ in range(count)], random.Random(1))
        with_median = lines(lambda: next(candidates(NOW, None)))
        return with_median, lines(lambda: next(candidates(NOW, None)))

    few, many = price(31), price(10_000)
    assert many[0] <= 1.2 * few[0]
    assert many[1] <= 1.2 * few[1]
    assert min(few) > 10, "nothing was counted"


def test_a_walk_is_lazy() -> None:
    rng = Draws(0.0)
    nodes = [a_node(0.01, ages=(0.0,)) for _ in range(1000)]
    walk = PeakEwma().prepare(nodes, rng)(NOW, None)
    assert rng.drawn == 0
    next(walk)
    assert rng.drawn == 5
    next(walk)
    assert rng.drawn == 6


def test_more_choices_than_nodes_are_all_of_them() -> None:
    assert order([a_node(0.2, ages=(0.0,)), a_node(0.1, ages=(0.0,))], PeakEwma(choices=9)) == [1, 0]
    assert order([a_node()], PeakEwma()) == [0]


@pytest.mark.parametrize("setting", [{"choices": 1}, {"decay": 0}, {"penalty": 0.0}, {"penalty": float("nan")}])
def test_a_setting_out_of_range_is_told(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        PeakEwma(**setting)


def test_the_node_remembers_as_the_balancer_says() -> None:
    stage = Stage(1, balancer=PeakEwma(decay=5.0, penalty=2.0))
    stage.play([Step(status=500)], repeatable=False)
    assert stage.nodes[0].ewma == 2.0
    stage.clock.advance(5.0 - 0.01)
    stage.play([answer(200, lasts=0.01)])
    assert stage.nodes[0].ewma == pytest.approx(0.01 + 1.99 * exp(-1))
