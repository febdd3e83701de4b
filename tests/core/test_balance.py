"""Balancers: every node once, best first, lazily, and in the right proportions."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice, permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import PROPERTY, Draws

from meshlib import Breaker, Endpoint, LeastRequest, PeakEwma, Random, RoundRobin
from meshlib.core.balance.draws import draw
from meshlib.core.node import Node

BALANCERS = [PeakEwma(), PeakEwma(choices=2), LeastRequest(), LeastRequest(choices=5), RoundRobin(), Random()]


def nodes_of(*weights: float) -> list[Node]:
    return [Node(Endpoint("10.0.0.1", port + 1, weight=weight), Breaker()) for port, weight in enumerate(weights)]


def turns(balancer: Any, nodes: list[Node], count: int, seed: int = 1) -> list[int]:
    """Who is first in `count` calls, by position."""
    candidates = balancer.prepare(nodes, random.Random(seed))
    return [nodes.index(next(candidates(1000.0, None))) for _ in range(count)]


@PROPERTY
@given(
    st.sampled_from(BALANCERS),
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=12),
    st.integers(0, 2**32),
    st.integers(1, 4),
)
def test_candidates_never_repeat_a_node_and_cover_all(
    balancer: Any, shape: list[tuple[int, int]], seed: int, calls: int
) -> None:
    nodes = nodes_of(*(weight for weight, _ in shape))
    for node, (_, in_flight) in zip(nodes, shape, strict=True):
        node.in_flight = in_flight
    candidates = balancer.prepare(nodes, random.Random(seed))
    for _ in range(calls):
        walked = list(candidates(1000.0, None))
        assert len(walked) == len(nodes)
        assert set(walked) == set(nodes)


@PROPERTY
@given(st.sampled_from(BALANCERS), st.integers(2, 6), st.integers(0, 2**32), st.data())
def test_walks_of_several_calls_at_once_do_not_disturb_each_other(
    balancer: Any, count: int, seed: int, data: st.DataObject
) -> None:
    nodes = nodes_of(*[1] * count)
    candidates = balancer.prepare(nodes, random.Random(seed))
    walks = [candidates(1000.0, None) for _ in range(3)]
    walked: list[list[Node]] = [[], [], []]
    for turn in data.draw(st.permutations([0, 1, 2] * count)):
        walked[turn].append(next(walks[turn]))
    assert [set(each) for each in walked] == [set(nodes)] * 3


@pytest.mark.parametrize("balancer", BALANCERS)
def test_the_same_seed_gives_the_same_order(balancer: Any) -> None:
    nodes = nodes_of(1, 2, 3, 4, 5)
    runs = [
        [list(candidates(1000.0, None)) for _ in range(20)]
        for candidates in (balancer.prepare(nodes, random.Random(9)) for _ in range(2))
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("balancer", BALANCERS)
def test_a_balancer_changes_nothing_of_a_node(balancer: Any) -> None:
    nodes = nodes_of(1, 2, 3)
    order = list(nodes)
    list(balancer.prepare(nodes, random.Random(1))(1000.0, None))
    assert nodes == order
    assert [(node.in_flight, node.attempts) for node in nodes] == [(0, 0)] * 3


# Least request


def test_the_better_of_two_draws_goes_first() -> None:
    nodes = nodes_of(1, 1, 1, 1)
    for node, load in zip(nodes, [5, 0, 9, 0], strict=True):
        node.in_flight = load
    drawn = LeastRequest().prepare(nodes, Draws(0.0))  # draws in order: 0 and 1 are compared
    assert [nodes.index(node) for node in drawn(1000.0, None)] == [1, 0, 3, 2]


@PROPERTY
@given(st.lists(st.integers(0, 50), min_size=2, max_size=10), st.integers(0, 2**32))
def test_with_as_many_choices_as_nodes_the_order_is_by_load(loads: list[int], seed: int) -> None:
    nodes = nodes_of(*[1] * len(loads))
    for node, load in zip(nodes, loads, strict=True):
        node.in_flight = load
    walked = LeastRequest(choices=10).prepare(nodes, random.Random(seed))(1000.0, None)
    assert [node.in_flight for node in walked] == sorted(loads)


def test_load_is_calls_in_flight_for_the_weight() -> None:
    light, heavy = nodes_of(1, 3)
    light.in_flight, heavy.in_flight = 1, 4  # (1+1)/1 = 2 against (4+1)/3 = 1.67
    balancer = LeastRequest()
    assert next(balancer.prepare([light, heavy], Draws(0.0))(1000.0, None)) is heavy
    heavy.in_flight = 6  # (6+1)/3 = 2.33
    assert next(balancer.prepare([light, heavy], Draws(0.0))(1000.0, None)) is light


def test_least_request_counts_the_load_at_the_time_of_the_call() -> None:
    nodes = nodes_of(1, 1)
    candidates = LeastRequest().prepare(nodes, Draws(0.0))
    assert next(candidates(1000.0, None)) is nodes[0]
    nodes[0].in_flight = 1
    assert next(candidates(1000.0, None)) is nodes[1]


def test_equal_nodes_get_equal_shares() -> None:
    shares = Counter(turns(LeastRequest(), nodes_of(1, 1, 1, 1), 8000))
    assert all(share == pytest.approx(2000, rel=0.1) for share in shares.values())
    assert len(shares) == 4


def test_the_worst_node_is_not_first_as_long_as_another_is_drawn() -> None:
    nodes = nodes_of(1, 1, 1)
    nodes[0].in_flight = 1
    assert 0 not in turns(LeastRequest(), nodes, 300)


def test_idle_nodes_get_shares_by_their_weights() -> None:
    shares = Counter(turns(LeastRequest(), nodes_of(3, 1), 8000))
    assert shares[0] == pytest.approx(6000, rel=0.1)


def test_a_walk_is_lazy() -> None:
    rng = Draws(0.0)
    candidates = LeastRequest().prepare(nodes_of(*[1] * 1000), rng)
    walk = candidates(1000.0, None)
    assert rng.drawn == 0
    next(walk)
    assert rng.drawn == 2
    next(walk)
    assert rng.drawn == 3


@PROPERTY
@given(st.integers(1, 30), st.integers(0, 2**32))
def test_a_draw_is_a_permutation_and_leaves_the_nodes_as_they_were(count: int, seed: int) -> None:
    nodes = nodes_of(*[1] * count)
    before = list(nodes)
    drawn = list(draw(nodes, random.Random(seed)))
    assert nodes == before
    assert sorted(map(nodes.index, drawn)) == list(range(count))


def test_every_order_is_drawn_equally_often() -> None:
    nodes, rng = nodes_of(1, 1, 1), random.Random(2)
    orders = Counter(tuple(map(nodes.index, draw(nodes, rng))) for _ in range(6000))
    assert len(orders) == 6
    assert all(count == pytest.approx(1000, rel=0.12) for count in orders.values())


# Round robin


def test_equal_endpoints_take_turns() -> None:
    order = turns(RoundRobin(), nodes_of(1, 1, 1), 9)
    assert order[:3] * 3 == order
    assert set(order) == {0, 1, 2}


@PROPERTY
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**32))
def test_a_round_gives_every_endpoint_its_weight_in_turns(weights: list[int], seed: int) -> None:
    rounds = 4
    shares = Counter(turns(RoundRobin(), nodes_of(*weights), rounds * sum(weights), seed))
    for position, weight in enumerate(weights):
        assert abs(shares[position] - rounds * weight) <= 1


def test_the_turns_of_a_heavy_endpoint_are_spread_out() -> None:
    order = turns(RoundRobin(), nodes_of(10, *[1] * 10), 200)
    longest = max(len(run) for run in "".join("x" if turn == 0 else " " for turn in order).split())
    assert longest <= 6  # one between any two of the others would be even; ten in a row are a burst


def test_the_first_turn_is_at_a_random_endpoint() -> None:
    nodes = nodes_of(1, 1, 1, 1)
    starts = Counter(turns(RoundRobin(), nodes, 1, seed)[0] for seed in range(400))
    assert all(starts[position] > 60 for position in range(4))


def test_what_a_walk_has_passed_over_is_not_the_next_calls_first() -> None:
    nodes = nodes_of(1, 1, 1)
    candidates = RoundRobin().prepare(nodes, random.Random(1))
    first, second = islice(candidates(1000.0, None), 2)
    assert next(candidates(1000.0, None)) not in (first, second)


def test_the_next_endpoint_is_found_in_few_steps_however_unequal_the_weights() -> None:
    heavy, light = nodes_of(10_000, 1)
    asked = 0

    class Weighing(Node):
        __slots__ = ()

        @property
        def effective_weight(self) -> float:
            nonlocal asked
            asked += 1
            return 10_000.0

        @effective_weight.setter
        def effective_weight(self, value: float) -> None: ...

    counted = Weighing(heavy.endpoint, Breaker())
    walk = RoundRobin().prepare([counted, light], Draws(0.0))(1000.0, None)
    assert [next(walk), next(walk)] == [counted, light]
    assert asked < 100


# Random


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 2, 1)])
def test_every_order_of_a_random_walk_is_as_likely_as_the_weights_say(weights: tuple[int, ...]) -> None:
    """Each place is drawn by weight from who is left: 3, 2, 1 come in this order in 3/6 * 2/3 of the walks."""
    nodes, walks = nodes_of(*weights), 6000
    candidates = Random().prepare(nodes, random.Random(5))
    orders = Counter(tuple(map(nodes.index, candidates(1000.0, None))) for _ in range(walks))
    for order in permutations(range(3)):
        one, two, _ = (weights[position] for position in order)
        share = one / sum(weights) * two / (sum(weights) - one)
        assert abs(orders[order] - walks * share) < 4 * (walks * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("weights", [[1] * 1000, [1, 2] * 500], ids=["alike", "weighted"])
def test_the_first_of_a_random_walk_costs_one_draw(weights: list[float]) -> None:
    rng = Draws(0.999999)
    next(Random().prepare(nodes_of(*weights), rng)(1000.0, None))
    assert rng.drawn == 1
