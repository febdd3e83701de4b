"""What outlives a change of the endpoints, and what a snapshot shows."""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import threading
from math import inf
from typing import Any, ClassVar

import pytest
from scripted import LOST, OK, REFUSED, UNAVAILABLE, InOrder, Stage, Step, answer, broke

from meshlib import Breaker, Endpoint, LeastRequest, Service
from meshlib.core.cluster import Cluster
from meshlib.core.ending import Ending
from meshlib.core.outcome import End
from meshlib.core.quantile import quantile
from meshlib.core.snapshot import NodeSnapshot, ServiceSnapshot


def test_D2_a_place_that_stays_keeps_its_node() -> None:
    stage = Stage(3)
    stage.eject(1)
    kept = stage.nodes[0]
    stage.publish(Endpoint("10.0.0.1", 80, weight=7, metadata={"version": "v2"}), "10.0.0.9:80")
    assert stage.nodes[0] is kept
    assert kept.breaker.state == "open"
    assert kept.effective_weight == 7.0
    assert kept.endpoint.metadata == {"version": "v2"}
    assert [str(node.endpoint) for node in stage.nodes] == ["10.0.0.1:80", "10.0.0.9:80"]


def test_D2_a_place_that_went_and_came_back_is_a_new_node() -> None:
    stage = Stage(2)
    gone = stage.nodes[1]
    stage.publish("10.0.0.1:80")
    stage.publish("10.0.0.1:80", "10.0.0.2:80")
    assert stage.nodes[1] is not gone


def test_another_port_is_another_place() -> None:
    stage = Stage(1)
    before = stage.nodes[0]
    stage.publish("10.0.0.1:81")
    assert stage.nodes[0] is not before


def test_a_new_view_is_published_whole_and_the_old_one_stays_as_it_was() -> None:
    stage = Stage(3)
    before = stage.cluster.view
    stage.publish("10.0.0.9:80")
    assert len(before.nodes) == 3
    assert [str(node.endpoint) for node in stage.cluster.view.nodes] == ["10.0.0.9:80"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.nodes = ()  # type: ignore[misc]


def test_what_a_balancer_refuses_is_not_taken_for_published() -> None:
    class Moody(LeastRequest):
        moods: ClassVar = [True, False, True, True]

        def prepare(self, nodes: Any, rng: Any) -> Any:
            if not nodes or self.moods.pop(0):
                return super().prepare(nodes, rng)
            raise ValueError("not these")

    cluster = Cluster(Service("orders", ["10.0.0.1:80"], balancer=Moody()), random.Random(1))
    first, second = (Endpoint("10.0.0.1", 80),), (Endpoint("10.0.0.1", 80, weight=2), Endpoint("10.0.0.2", 80))
    assert cluster.publish(first, "test", 0.0) == []
    with pytest.raises(ValueError, match="not these"):
        cluster.publish(second, "test", 1.0)
    assert [node.endpoint for node in cluster.view.nodes][1:] == []
    assert cluster.publish(second, "test", 2.0) == []
    assert len(cluster.view.nodes) == 2
    assert cluster.publish(second[1:], "test", 3.0) == [("10.0.0.1", 80)]


def test_calls_go_on_while_a_balancer_prepares() -> None:
    class Slow(LeastRequest):
        def prepare(self, nodes: Any, rng: Any) -> Any:
            held.append(cluster.lock.locked() if nodes else False)
            return super().prepare(nodes, rng)

    held: list[bool] = []
    cluster: Cluster = Cluster(Service("orders", ["10.0.0.1:80"], balancer=Slow()), random.Random(1))
    cluster.publish((Endpoint("10.0.0.1", 80),), "test", 0.0)
    assert held == [False]


def test_an_error_repeats_a_few_warnings() -> None:
    cluster = Cluster(Service("orders", ["10.0.0.1:80"]), random.Random(1))
    cluster.warnings = tuple(f"w{number}" for number in range(9))
    assert cluster.why_empty(0.0) == "its endpoints are not known yet (w0; w1; w2; w3; w4; and 4 more)"


def test_a_call_does_not_lose_its_count_when_its_node_is_removed_under_way() -> None:
    stage = Stage(1)
    node, call = stage.nodes[0], stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    stage.publish("10.0.0.9:80")
    assert stage.settle(call, attempt, OK) is None
    call.release(attempt, stage.clock())
    assert node.in_flight == 0


def test_an_orphan_is_counted_by_the_next_call_and_by_a_snapshot() -> None:
    stage = Stage(1)
    for look in (lambda: stage.cluster.snapshot(stage.clock()), lambda: stage.play([OK])):
        call = stage.call()
        attempt = call.begin(stage.clock())
        assert attempt is not None
        stage.settle(call, attempt, OK)
        stage.cluster.orphans.append(attempt)
        assert stage.in_flight == 1
        look()
        assert stage.in_flight == 0
        call.release(attempt, stage.clock())
        assert stage.in_flight == 0, "counted twice"


def test_calls_go_on_while_a_snapshot_looks_at_many_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(3)
    taken: list[int] = []

    class Counted:
        def __enter__(self) -> None:
            taken.append(0)

        def __exit__(self, *_: object) -> None:
            pass

    def of(*args: Any) -> Any:
        taken[-1] += 1
        return snapshot_of(*args)

    snapshot_of = NodeSnapshot.of
    monkeypatch.setattr(NodeSnapshot, "of", of)
    monkeypatch.setattr(stage.cluster, "lock", Counted())
    assert len(stage.cluster.snapshot(stage.clock()).nodes) == 3
    assert max(taken) == 1


def test_the_lock_is_free_after_every_step_even_one_that_raises() -> None:
    stage = Stage(2)
    stage.play([REFUSED, OK])
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    with pytest.raises(AssertionError):
        call.settle(attempt, stage.clock(), Ending())  # neither a status nor an end
    assert stage.cluster.lock.acquire(blocking=False)


def test_a_snapshot_shows_a_service() -> None:
    stage = Stage(2)
    stage.play([REFUSED, OK])
    stage.play([UNAVAILABLE, OK])
    stage.clock.advance(1.0)
    shown = stage.cluster.snapshot(stage.clock())
    assert shown.name == "orders"
    assert shown.source == "paper"
    assert shown.age == pytest.approx(1.04)
    assert shown.budget_tokens == 500
    assert shown.in_flight == 0
    assert shown.panic is False
    assert shown.warnings == ()
    first, second = shown.nodes
    assert (first.endpoint, first.attempts, first.failures) == ("10.0.0.1:80", 2, 2)
    assert (second.endpoint, second.attempts, second.failures) == ("10.0.0.2:80", 2, 0)
    assert second.ewma == pytest.approx(0.01)
    assert second.p50 == pytest.approx(0.01)
    assert second.weight == 1.0
    assert second.rate > 0


def test_a_snapshot_shows_what_is_in_flight() -> None:
    stage = Stage(2)
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    shown = stage.cluster.snapshot(stage.clock())
    assert shown.in_flight == 1
    assert [node.in_flight for node in shown.nodes] == [1, 0]
    assert shown.nodes[0].p50 is None


def test_a_snapshot_says_why_a_node_is_eligible_or_not() -> None:
    stage = Stage(2)
    seen = []

    def look() -> None:
        node = stage.cluster.snapshot(stage.clock()).nodes[0]
        seen.append((node.state, node.eligible, node.why))

    look()
    stage.eject(1)
    look()
    stage.clock.advance(2.0)
    look()
    assert stage.nodes[0].breaker.admit(stage.clock(), stage.clock() + 5.0) is not None
    look()
    stage.clock.advance(5.0)
    look()
    assert seen == [
        ("closed", True, "closed"),
        ("open", False, "ejected after 5 failures in a row"),
        ("open", True, "the next call is the probe"),
        ("half_open", False, "a probe is under way"),
        ("half_open", True, "a probe is due"),
    ]


def test_a_snapshot_is_frozen_and_json_able() -> None:
    stage = Stage(2)
    stage.play([LOST, OK])
    shown = stage.cluster.snapshot(stage.clock())
    with pytest.raises(dataclasses.FrozenInstanceError):
        shown.panic = True  # type: ignore[misc]
    read = json.loads(json.dumps(shown.to_dict()))
    assert set(read) == {field.name for field in dataclasses.fields(ServiceSnapshot)}
    assert set(read["nodes"][0]) == {field.name for field in dataclasses.fields(NodeSnapshot)}
    assert read["nodes"][0] == shown.nodes[0].to_dict()


def test_a_snapshot_tells_the_last_failure_and_the_last_check() -> None:
    stage = Stage(1)
    [node] = stage.cluster.snapshot(stage.clock()).nodes
    assert (node.last_error, node.last_error_age, node.check) == ("", None, "")
    stage.play([UNAVAILABLE, OK])
    stage.clock.advance(1.5)
    stage.cluster.checked(stage.cluster.view.nodes[0].endpoint.place, False, "status 500")
    [node] = stage.cluster.snapshot(stage.clock()).nodes
    assert (node.last_error, node.check) == ("status 503", "failed: status 500")
    assert node.last_error_age == pytest.approx(1.5, abs=0.1)


def test_a_snapshot_keeps_no_reference_to_live_state() -> None:
    stage = Stage(1)
    shown = stage.cluster.snapshot(stage.clock())
    before = shown.to_dict()
    stage.play([OK])
    assert shown.to_dict() == before


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(0, 0.5, None), (1, 0.5, 1), (1, 0.99, 1), (2, 0.5, 1), (4, 0.5, 2), (100, 0.5, 50), (100, 0.99, 99), (9, 0, 1)],
)
def test_quantiles_are_nearest_rank(count: int, share: float, expected: float | None) -> None:
    assert quantile([float(rank + 1) for rank in range(count)], share) == expected


def test_the_99th_percentile_of_a_node_shows_its_slow_attempts() -> None:
    stage = Stage(1)
    for _ in range(98):
        stage.play([OK])
    for _ in range(2):
        stage.play([broke(End.timeout, lasts=3.0, resendable=False)])
    node = stage.cluster.snapshot(stage.clock()).nodes[0]
    assert node.p50 == pytest.approx(0.01)
    assert node.p99 == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("step", "total", "left"),
    [
        (broke(End.timeout, lasts=3.0), 30.0, 1),
        (broke(End.timeout, lasts=3.0), 3.0, 1),  # cut by the deadline, and blamed
        (broke(End.timeout, lasts=0.05), 0.05, 1),  # cut by the deadline, and not blamed: a lower bound either way
        (LOST, 30.0, 1),
        (UNAVAILABLE, 30.0, 1),
        (answer(429, lasts=3.0), 30.0, 0),
        (broke(End.caller, lasts=3.0), 30.0, 1),  # likewise
        (broke(End.caller, lasts=0.001), 30.0, 0),
        (broke(End.no_slot, sent=False, lasts=3.0), 30.0, 0),
        (broke(End.stale, lasts=3.0), 30.0, 0),
    ],
    ids=[
        "timeout",
        "deadline, blamed",
        "deadline",
        "lost",
        "503",
        "429",
        "cancelled",
        "cancelled early",
        "no slot",
        "stale",
    ],
)
def test_an_attempt_leaves_one_latency_or_none(step: Step, total: float, left: int) -> None:
    stage = Stage(1)
    stage.play([OK])
    stage.play([dataclasses.replace(step, resendable=False)], total=total)
    assert len(stage.nodes[0].latencies) == 1 + left


@pytest.mark.parametrize("status", [200, 404])
def test_a_slow_call_counts_as_a_failure_for_the_breaker_alone(status: int) -> None:
    stage = Stage(2, breaker=Breaker(slow_call=1.0))
    for _ in range(5):
        assert stage.play([answer(status, lasts=1.0)]).places == [1], "not slow: it took no more than that"
    for _ in range(5):
        assert stage.play([answer(status, lasts=1.1)]).outcomes == ["ok"]
    broken = stage.nodes[0]
    assert (broken.breaker.state, broken.failures) == ("open", 0)
    stage.clock.advance(2.0)
    assert stage.play([answer(status, lasts=1.1)]).places == [1], "the probe"
    assert broken.breaker.state == "open"
    stage.clock.advance(4.0)
    assert stage.play([answer(status, lasts=1.0)]).places == [1]
    assert broken.breaker.state == "closed"


def test_without_slow_call_no_answer_is_too_slow() -> None:
    stage = Stage(2)
    for _ in range(20):
        assert stage.play([answer(200, lasts=9.0)]).places == [1]


def test_a_forked_child_forgets_what_is_under_way_and_keeps_what_was_learned() -> None:
    stage = Stage(2)
    stage.eject(1)
    stage.play([OK])
    call = stage.call()
    attempt = call.begin(stage.clock())
    assert attempt is not None
    stage.cluster.orphans.append(attempt)
    node = stage.nodes[1]
    stage.cluster.lock.acquire()  # by a thread of the parent, which the child does not have
    stage.cluster.changes_at = inf  # by one that was building a view
    view = stage.cluster.view
    stage.cluster.forget()
    assert not stage.cluster.lock.locked()
    assert (stage.in_flight, node.oldest_open, len(stage.cluster.orphans)) == (0, None, 0)
    assert (stage.nodes[0].breaker.state, node.attempts) == ("open", 2)
    assert node.ewma > 0
    assert stage.play([OK]).places == [2]
    assert stage.in_flight == 0
    assert stage.cluster.view is not view


def test_many_threads_on_one_cluster_lose_no_count() -> None:
    service = Service("orders", ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"], balancer=LeastRequest())
    stage = Stage(1)
    stage.cluster = Cluster(service, random.Random(4))
    stage.publish("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80")
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for step in range(300):
                call = stage.call()
                attempt = call.begin(stage.clock())
                assert attempt is not None
                assert call.settle(attempt, stage.clock(), Ending(status=200 if step % 2 else 404)) is None
                call.release(attempt, stage.clock())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not errors
    assert sum(node.attempts for node in stage.nodes) == 8 * 300
    assert stage.in_flight == 0


def test_a_service_is_known_only_when_its_view_is_there() -> None:
    class Looking(LeastRequest):
        def prepare(self, nodes: Any, rng: Any) -> Any:
            seen.append(cluster.is_known)
            return super().prepare(nodes, rng)

    seen: list[bool] = []
    cluster = Cluster(Service("orders", ["10.0.0.1:80"], balancer=Looking()), random.Random(1))
    cluster.publish([Endpoint("10.0.0.1", 80)], "paper", 0.0)
    assert (seen, cluster.is_known) == ([False], True), "a call that waits for it would find no node"


def test_a_view_is_made_without_the_lock_that_calls_need() -> None:
    class Looking(LeastRequest):
        def prepare(self, nodes: Any, rng: Any) -> Any:
            locked.append(cluster.lock.locked())
            return super().prepare(nodes, rng)

    locked: list[bool] = []
    cluster = Cluster(Service("orders", ["10.0.0.1:80"], balancer=Looking()), random.Random(1))
    cluster.publish([Endpoint("10.0.0.1", 80)], "paper", 0.0)
    assert locked == [False]


def test_what_changes_while_a_view_cannot_be_built_is_not_forgotten() -> None:
    stage = Stage(2)

    class Failing:
        def prepare(self, nodes: Any, rng: Any) -> Any:
            stage.cluster.heard(("10.0.0.1", 80), False, stage.clock())
            raise RuntimeError("no order today")

    service = stage.cluster.service
    object.__setattr__(service, "balancer", Failing())
    with pytest.raises(RuntimeError, match="no order today"):
        stage.publish("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80")
    object.__setattr__(service, "balancer", InOrder())
    attempt = stage.call().begin(stage.clock())
    assert attempt is not None
    assert str(attempt.endpoint) == "10.0.0.2:80"
