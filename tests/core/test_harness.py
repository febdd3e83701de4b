"""`BalancerHarness`: any balancer without a mesh, driven as a service drives it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted import PROPERTY, InOrder

from meshlib import ConfigError, Endpoint, LeastRequest, PeakEwma, RoundRobin
from meshlib.core.node import Node
from meshlib.testing import BalancerHarness

pytestmark = pytest.mark.once

A, B, C = ADDRESSES = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]
a, b, c = (Endpoint.parse(each) for each in ADDRESSES)
OURS: list[Any] = [PeakEwma(), LeastRequest(), RoundRobin()]


def in_order(*addresses: str | Endpoint) -> BalancerHarness:
    return BalancerHarness(InOrder(), addresses or ADDRESSES)


def node(harness: BalancerHarness, endpoint: Endpoint) -> Node:
    return next(each for each in harness.nodes if each.endpoint.place == endpoint.place)


def test_a_pick_is_in_flight_until_it_is_done() -> None:
    harness = in_order()
    assert harness.pick(now=1.0) == a
    assert (node(harness, a).in_flight, node(harness, a).oldest_open) == (1, 1.0)
    harness.done(a, now=1.25, latency=0.25)
    assert (node(harness, a).in_flight, node(harness, a).oldest_open) == (0, None)
    assert (node(harness, a).ewma, node(harness, a).attempts, node(harness, a).failures) == (0.25, 1, 0)


def test_the_best_that_is_not_excluded_is_picked_and_the_best_of_all_if_all_are() -> None:
    harness = in_order()
    assert harness.pick(1.0, exclude=[a]) == b
    assert harness.pick(1.0, exclude=(b, a)) == c
    assert harness.pick(1.0, None, {a, b, c}) == a
    assert [each.in_flight for each in harness.nodes] == [1, 1, 1], "who is passed over is not picked"


@pytest.mark.parametrize("balancer", OURS)
def test_excluding_all_but_one_leaves_that_one(balancer: Any) -> None:
    harness = BalancerHarness(balancer, ADDRESSES, random.Random(1))
    for endpoint in [a, b, c] * 3:
        assert harness.pick(1.0, exclude={a, b, c} - {endpoint}) == endpoint


def test_an_excluded_endpoint_is_known_by_its_place() -> None:
    assert in_order().pick(1.0, exclude=[Endpoint("10.0.0.1", 80, weight=7)]) == b


def test_a_failure_counts_as_the_balancer_has_it() -> None:
    harness = BalancerHarness(PeakEwma(penalty=3.0), [A])
    harness.done(harness.pick(1.0), 1.01, latency=0.01, failed=True)
    assert (node(harness, a).ewma, node(harness, a).failures) == (3.0, 1)


def test_of_several_under_way_the_one_ends_that_started_as_long_ago_as_is_told() -> None:
    harness = in_order()
    for now in (1.0, 2.0, 3.0):
        harness.pick(now)
    harness.done(a, now=3.5, latency=1.5)
    assert node(harness, a).oldest_open == 1.0
    harness.done(a, now=3.5, latency=2.5)
    assert (node(harness, a).oldest_open, node(harness, a).in_flight) == (3.0, 1)
    assert list(node(harness, a).latencies) == [1.5, 2.5]


def test_the_latency_that_is_told_counts_though_time_stood_still() -> None:
    harness = in_order()
    harness.done(harness.pick(1.0), 1.0, latency=0.5)
    assert node(harness, a).ewma == 0.5


def test_an_update_keeps_what_was_learned_and_takes_over_what_is_new() -> None:
    harness = in_order(A, B)
    harness.done(harness.pick(1.0), 1.5, latency=0.5)
    harness.pick(2.0)
    known = node(harness, a)
    harness.update([C, Endpoint("10.0.0.1", 80, weight=5)])
    assert [each.endpoint for each in harness.nodes] == [c, Endpoint("10.0.0.1", 80, weight=5)]
    assert node(harness, a) is known
    assert (known.ewma, known.in_flight, known.effective_weight) == (0.5, 1, 5.0)
    assert harness.pick(3.0) == c, "the balancer was prepared anew"


def test_what_is_under_way_on_an_endpoint_that_has_gone_ends_without_a_trace() -> None:
    harness = in_order(A, B)
    gone = harness.pick(1.0)
    harness.update([B])
    harness.done(gone, 1.5, latency=0.5)
    assert [(each.in_flight, each.attempts) for each in harness.nodes] == [(0, 0)]
    with pytest.raises(ValueError, match=r"no attempt is under way on 10\.0\.0\.1:80"):
        harness.done(gone, 1.5, latency=0.5)


def test_an_endpoint_that_has_gone_and_come_back_is_a_new_one() -> None:
    harness = in_order(A, B)
    gone = harness.pick(1.0)
    harness.update([B])
    harness.update([A, B])
    harness.done(gone, 1.5, latency=0.5)
    assert (node(harness, a).in_flight, node(harness, a).ewma) == (0, 0.0)


def test_done_without_a_pick_is_an_error_that_says_so() -> None:
    harness = in_order()
    for endpoint in (a, Endpoint("10.9.9.9", 80)):
        with pytest.raises(ValueError, match=f"no attempt is under way on {endpoint}: it was not picked, or is done"):
            harness.done(endpoint, 1.0, latency=0.5)
    harness.done(harness.pick(1.0), 1.5, latency=0.5)
    with pytest.raises(ValueError, match="no attempt is under way"):
        harness.done(a, 1.5, latency=0.5)
    assert node(harness, a).in_flight == 0


def test_a_balancer_needs_an_endpoint_and_an_empty_update_changes_nothing() -> None:
    with pytest.raises(ValueError, match="at least one endpoint"):
        BalancerHarness(RoundRobin(), [])
    harness = in_order()
    with pytest.raises(ValueError, match="at least one endpoint"):
        harness.update(iter(()))
    with pytest.raises(ConfigError, match="host:port"):
        harness.update([B, "10.0.0.4"])
    assert [each.endpoint for each in harness.nodes] == [a, b, c]
    assert harness.pick(1.0) == a


def test_a_balancer_that_offers_nothing_is_named() -> None:
    class Nobody:
        def prepare(self, nodes: Sequence[Node], rng: Any) -> Callable[[float, str | None], Iterator[Node]]:
            return lambda now, key: iter(())

        def __repr__(self) -> str:
            return "Nobody()"

    with pytest.raises(ValueError, match=r"Nobody\(\) offers no endpoint"):
        BalancerHarness(Nobody(), ADDRESSES).pick(1.0)


def test_the_time_and_the_key_reach_the_balancer() -> None:
    class ByKey:
        def prepare(self, nodes: Sequence[Node], rng: Any) -> Callable[[float, str | None], Iterator[Node]]:
            def candidates(now: float, key: str | None) -> Iterator[Node]:
                start = int(now) if key is None else int(key)
                yield from [*nodes[start:], *nodes[:start]]

            return candidates

    harness = BalancerHarness(ByKey(), ADDRESSES)
    assert [harness.pick(0.0, key) for key in ("2", "0", "1")] == [c, a, b]
    assert harness.pick(0.0, key="2", exclude=[c]) == a
    assert harness.pick(now=1.0) == b


@pytest.mark.parametrize("balancer", OURS)
def test_the_same_seed_picks_the_same_endpoints(balancer: Any) -> None:
    def picks() -> list[str]:
        harness = BalancerHarness(balancer, ADDRESSES, random.Random(4))
        return [str(harness.pick(float(now))) for now in range(50)]

    assert picks() == picks()


@settings(PROPERTY, max_examples=40)
class Drives(RuleBasedStateMachine):
    """Picks, ends and updates in any order: a node's calls in flight are those that nobody has ended."""

    @initialize(balancer=st.sampled_from(OURS), seed=st.integers(0, 99))
    def begin(self, balancer: Any, seed: int) -> None:
        self.harness = BalancerHarness(balancer, ADDRESSES, random.Random(seed))
        self.now = 0.0
        self.open: list[tuple[Endpoint, Node, float]] = []

    @rule(excluded=st.sets(st.sampled_from([a, b, c])))
    def pick(self, excluded: set[Endpoint]) -> None:
        self.now += 0.1
        endpoint = self.harness.pick(self.now, exclude=excluded)
        present = {each.endpoint for each in self.harness.nodes}
        assert endpoint in (present - excluded or present)
        self.open.append((endpoint, node(self.harness, endpoint), self.now))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), failed=st.booleans())
    def end(self, data: st.DataObject, failed: bool) -> None:
        self.now += 0.05
        endpoint, _, started = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.harness.done(endpoint, self.now, self.now - started, failed)

    @rule(kept=st.lists(st.sampled_from(ADDRESSES), min_size=1, unique=True))
    def update(self, kept: list[str]) -> None:
        self.harness.update(kept)
        assert [str(each.endpoint) for each in self.harness.nodes] == kept

    @invariant()
    def in_flight_is_what_is_open(self) -> None:
        for each in getattr(self, "harness", in_order(A)).nodes:
            mine = [started for _, owner, started in getattr(self, "open", []) if owner is each]
            assert each.in_flight == len(mine)
            assert each.oldest_open == (min(mine) if mine else None)


TestDrives = Drives.TestCase
