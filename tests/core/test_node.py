"""What a node remembers, and its count of calls in flight under any interleaving."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from scripted import LOST, OK, PROPERTY, REFUSED, STALE, UNAVAILABLE, Stage, Step, broke

from meshlib import Breaker, Endpoint
from meshlib.core.call import Call
from meshlib.core.node import MEMORY, REMEMBERED, Node
from meshlib.core.outcome import End
from meshlib.core.report import Attempt


@pytest.fixture
def node() -> Node:
    return Node(Endpoint("10.0.0.1", 80, weight=3), Breaker())


def tried(node: Node, started: float, lasted: float, success: bool | None = True) -> None:
    node.settle(node.start(started), started + lasted, success=success)


def test_a_new_node_knows_nothing(node: Node) -> None:
    assert (node.in_flight, node.attempts, node.failures, node.ewma) == (0, 0, 0, 0.0)
    assert node.oldest_open is None
    assert node.rate(1000.0) == 0.0
    assert node.effective_weight == 3.0
    assert node.breaker.state == "closed"


def test_an_attempt_is_in_flight_until_its_response_has_ended(node: Node) -> None:
    number = node.start(1000.0)
    assert (node.in_flight, node.attempts) == (1, 1)
    node.settle(number, 1001.0, success=True)
    assert node.in_flight == 1, "the headers are not the end"
    node.finish()
    assert (node.in_flight, node.attempts) == (0, 1)


def test_oldest_open_is_the_earliest_attempt_without_headers(node: Node) -> None:
    numbers = [node.start(1000.0 + step) for step in range(3)]
    assert node.oldest_open == 1000.0
    node.settle(numbers[1], 1003.0, success=True)
    assert node.oldest_open == 1000.0
    node.settle(numbers[0], 1003.0, success=None)
    assert node.oldest_open == 1002.0
    node.settle(numbers[2], 1003.0, success=False)
    assert node.oldest_open is None


def test_only_a_failure_is_counted_as_one(node: Node) -> None:
    for success in (True, None, False, False, True):
        tried(node, 1000.0, 0.1, success)
    assert (node.attempts, node.failures) == (5, 2)


def test_the_first_latency_is_taken_as_it_is(node: Node) -> None:
    tried(node, 1000.0, 0.25)
    assert node.ewma == pytest.approx(0.25)


def test_a_latency_weighs_by_the_time_since_the_last(node: Node) -> None:
    tried(node, 1000.0, 1.0)
    tried(node, 1001.0, 0.0)  # an instant answer: no time has passed, it weighs nothing
    assert node.ewma == pytest.approx(1.0)
    tried(node, 1001.0 + MEMORY, 0.0)
    assert node.ewma == pytest.approx(0.3679, abs=1e-4), "1/e is left of the old one"
    tried(node, 1001.0 + 100 * MEMORY, 0.2)
    assert node.ewma == pytest.approx(0.2), "what is long ago is forgotten"


def test_an_attempt_that_says_nothing_leaves_no_latency(node: Node) -> None:
    tried(node, 1000.0, 7.0, success=None)
    assert node.ewma == 0.0
    assert not node.latencies


def test_a_lower_bound_only_ever_raises_the_latency(node: Node) -> None:
    tried(node, 1000.0, 1.0)
    node.give_up(0.5, 1010.0)
    assert (node.ewma, node.usual, len(node.latencies)) == (pytest.approx(1.0), pytest.approx(1.0), 1)
    node.give_up(3.0, 1020.0)
    assert (node.ewma, node.usual, len(node.latencies)) == (3.0, pytest.approx(1.0), 2)


def test_a_slow_answer_counts_at_once_and_fades(node: Node) -> None:
    tried(node, 1000.0, 0.1)
    tried(node, 1000.0 + MEMORY, 2.0)
    assert node.ewma == 2.0
    assert 0.1 < node.usual < 2.0
    tried(node, 1002.0 + 2 * MEMORY, 0.0)
    assert node.ewma == pytest.approx(2.0 * 0.3679, abs=1e-3), "1/e is left"


def test_a_failure_counts_as_its_penalty_and_is_shown_as_it_was() -> None:
    node = Node(Endpoint("10.0.0.1", 80), Breaker(), decay=5.0, penalty=1.0)
    tried(node, 1000.0, 0.001, success=False)
    assert (node.ewma, node.usual, list(node.latencies)) == (1.0, pytest.approx(0.001), [pytest.approx(0.001)])
    tried(node, 1005.0, 0.001)
    assert node.ewma == pytest.approx(0.001 + 0.999 * 0.3679, abs=1e-3), "1/e is left after `decay`"
    tried(node, 1006.0, 4.0, success=False)
    assert node.ewma == 4.0, "a slow failure counts in full"


def test_a_node_that_is_shunned_is_expected_to_be_slow(node: Node) -> None:
    node.shun(7.0, 1000.0)
    assert (node.ewma, node.observed_at, node.usual, len(node.latencies)) == (7.0, 1000.0, 0.0, 0)
    node.shun(3.0, 1001.0)
    assert node.ewma == 7.0


def test_a_bounded_number_of_latencies_is_kept(node: Node) -> None:
    for step in range(REMEMBERED + 50):
        tried(node, 1000.0 + step, 0.001 * step)
    assert len(node.latencies) == REMEMBERED
    assert min(node.latencies) == pytest.approx(0.050)


def test_the_rate_is_attempts_per_second_of_late(node: Node) -> None:
    for step in range(600):
        tried(node, 1000.0 + step / 10, 0.01)
    assert node.rate(1060.0) == pytest.approx(10.0, rel=0.05)
    rates = [node.rate(1060.0 + wait) for wait in (0, 1, 10, 100)]
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert rates[2] == pytest.approx(rates[0] / 2.71828, rel=1e-3)
    assert rates[3] < 0.01


STEPS = [
    OK,
    UNAVAILABLE,
    REFUSED,
    LOST,
    STALE,
    broke(End.caller),
    broke(End.no_slot, sent=False),
    broke(End.timeout, lasts=2.0),
]


def test_what_is_heard_of_an_attempt_that_is_over_does_not_open_it_again() -> None:
    stage = Stage(1)
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    call.lose(attempt, stage.clock())
    call.connected(attempt, stage.clock())  # in its own thread, which does not know yet
    assert stage.nodes[0].oldest_open is None


class AnyInterleaving(RuleBasedStateMachine):
    """Calls that begin, settle, are released, released again, forgotten, while endpoints come and go."""

    running = Bundle("running")
    settled = Bundle("settled")

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(3)
        self.nodes: set[Node] = set(self.stage.nodes)
        self.open: dict[Attempt, Node] = {}
        """The attempts whose response has not ended, as this test counts them."""
        self.forgotten: list[Attempt] = []

    @rule(target=running, repeatable=st.booleans())
    def call(self, repeatable: bool) -> Any:
        call = self.stage.call(repeatable=repeatable)
        return call, self.begin(call)

    def begin(self, call: Call) -> Attempt | None:
        attempt = call.begin(self.stage.clock())
        for orphan in self.forgotten:
            self.open.pop(orphan, None)
        self.forgotten.clear()
        if attempt is not None:
            self.open[attempt] = attempt.node
        return attempt

    @rule(target=settled, which=consumes(running), step=st.sampled_from(STEPS))
    def settle(self, which: tuple[Call, Attempt | None], step: Step) -> Any:
        call, attempt = which
        if attempt is not None:
            again = self.stage.settle(call, attempt, step)
            if step.end is not None:
                self.open.pop(attempt)
            if again is not None:
                self.stage.clock.advance(again)
                following = self.begin(call)
                if following is not None:
                    self.stage.settle(call, following, OK)
                    call.release(following, self.stage.clock())
                    self.open.pop(following)
        return which

    @rule(which=settled, died=st.sampled_from([None, None, "ReadError"]), times=st.integers(1, 3))
    def release(self, which: tuple[Call, Attempt | None], died: str | None, times: int) -> None:
        call, attempt = which
        if attempt is not None:
            for _ in range(times):
                call.release(attempt, self.stage.clock(), died=died)
            self.open.pop(attempt, None)

    @rule(which=settled)
    def forget(self, which: tuple[Call, Attempt | None]) -> None:
        """The response is garbage-collected; a finalizer only notes it."""
        _, attempt = which
        if attempt is not None and not attempt.is_over:
            self.stage.cluster.orphans.append(attempt)
            self.forgotten.append(attempt)

    @rule(hosts=st.sets(st.integers(1, 5), min_size=1))
    def publish(self, hosts: set[int]) -> None:
        self.stage.publish(*(f"10.0.0.{host}:80" for host in hosts))
        self.nodes.update(self.stage.nodes)

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.stage.clock.advance(seconds)

    @invariant()
    def in_flight_is_what_has_not_ended(self) -> None:
        for node in self.nodes:
            assert node.in_flight == sum(where is node for where in self.open.values()) >= 0

    def teardown(self) -> None:
        for attempt in self.open:
            self.stage.cluster.orphans.append(attempt)
        self.stage.cluster.snapshot(self.stage.clock())
        assert [node.in_flight for node in self.nodes] == [0] * len(self.nodes)


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = PROPERTY
