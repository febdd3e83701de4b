"""What most calls need is written out where it is needed; here it is held against the long way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import PROPERTY

from meshlib import Breaker, Endpoint, LeastRequest
from meshlib.core.balance.draws import draw
from meshlib.core.balance.least_request import is_better
from meshlib.core.node import MEMORY, Node


def by_the_book(nodes: list[Node], rng: random.Random) -> Iterator[Node]:
    """Two choices: the loser meets the next one drawn, for as long as there is one."""
    drawn = draw(nodes, rng)
    held = list(islice(drawn, 2))
    while held:
        best = held[0]
        for other in held[1:]:
            if is_better(other, best, rng):
                best = other
        held.remove(best)
        held += islice(drawn, 1)
        yield best


@PROPERTY
@given(
    st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 5]), st.integers(0, 3)), min_size=2, max_size=9),
    st.integers(0, 2**32),
)
def test_a_walk_of_two_choices_goes_by_the_book(made: list[tuple[int, int]], seed: int) -> None:
    nodes = [Node(Endpoint("10.0.0.1", port + 1, weight=weight), Breaker()) for port, (weight, _) in enumerate(made)]
    for node, (_, load) in zip(nodes, made, strict=True):
        node.in_flight = load
    walk = LeastRequest().prepare(nodes, random.Random(seed))(1000.0, None)
    assert list(walk) == list(by_the_book(nodes, random.Random(seed)))


def test_a_rate_that_counts_by_ticks_is_that_of_every_attempt_by_itself() -> None:
    node = Node(Endpoint("10.0.0.1", 80), Breaker())
    times = [1000.0 + step / 200 for step in range(2000)]
    for time in times:
        node.start(time)
    exact = sum(exp((time - 1010.0) / MEMORY) / MEMORY for time in times)
    assert node.rate(1010.0) == pytest.approx(exact, rel=0.01)
