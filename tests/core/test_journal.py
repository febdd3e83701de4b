"""Which events a service notes, once each and in their order; and what is kept of them."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from scripted import LOST, OK, UNAVAILABLE, Draws, Stage, answer, broke

from meshlib import Breaker, Budget, Endpoint, HealthCheck, Retry, Throttle, events
from meshlib.core.gate import CALM
from meshlib.core.journal import Backlog
from meshlib.core.outcome import End
from meshlib.events import (
    BudgetExhausted,
    ConfigChanged,
    DiscoveryRecovered,
    DiscoveryStale,
    Ejected,
    EndpointAdded,
    EndpointRemoved,
    Event,
    HealthChanged,
    Missed,
    OverloadBegan,
    OverloadEnded,
    PanicBegan,
    PanicEnded,
    Probing,
    Restored,
)

FIRST, SECOND = Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 80)

ALONE = Retry(max_attempts=1)


def heard(count: int = 3, **settings: Any) -> Stage:
    """A service whose every event is noted from now on."""
    stage = Stage(count, **settings)
    stage.cluster.journal.hears = lambda kind: True
    return stage


def noted(stage: Stage) -> list[Event]:
    return stage.cluster.journal.take()


def play(stage: Stage, *steps: Any) -> None:
    for step in steps:
        stage.play([step])


def test_what_a_breaker_does_is_noted_with_the_reason_and_for_how_long() -> None:
    stage = heard(2, retry=ALONE)
    play(stage, *[LOST] * 5)
    out = stage.clock()
    assert noted(stage) == [Ejected("orders", out, FIRST, "breaker", "5 failures in a row", 2.0)]
    stage.clock.advance(2.0)
    probed = stage.clock()
    play(stage, LOST)
    again = Ejected("orders", stage.clock(), FIRST, "breaker", "5 failures in a row", 4.0, again=True)
    assert noted(stage) == [Probing("orders", probed, FIRST), again]
    stage.clock.advance(4.0)
    probed = stage.clock()
    play(stage, OK, OK)
    assert noted(stage) == [Probing("orders", probed, FIRST), Restored("orders", probed + 0.01, FIRST, "probe")]


def test_by_hand_each_change_is_noted_once() -> None:
    stage = heard(2)
    for _ in range(2):
        stage.cluster.bar(FIRST.place, 1.0)
    for _ in range(2):
        stage.cluster.unbar(FIRST.place, 2.0)
    stage.eject(2)
    stage.cluster.unbar(SECOND.place, 3.0)
    by_hand = [Ejected("orders", 1.0, FIRST, "hand", "by hand", None), Restored("orders", 2.0, FIRST, "hand")]
    ejected, restored = noted(stage)[2:]
    assert isinstance(ejected, Ejected)
    assert restored == Restored("orders", 3.0, SECOND, "hand")
    stage.cluster.bar(FIRST.place, 1.0)
    stage.cluster.unbar(FIRST.place, 2.0)
    assert noted(stage) == by_hand


def test_a_probe_of_what_was_taken_out_by_hand_or_is_gone_restores_nobody() -> None:
    for takes_out in (
        lambda stage: stage.cluster.bar(FIRST.place, stage.clock()),
        lambda stage: stage.publish("10.0.0.2:80"),
    ):
        stage = heard(2)
        stage.eject(1)
        stage.clock.advance(2.0)
        call = stage.call()
        probe = call.begin(stage.clock())
        assert probe is not None
        takes_out(stage)
        noted(stage)
        stage.settle(call, probe, OK)
        assert noted(stage) == []


def test_B5_a_breaker_that_only_counts_ejects_nobody() -> None:
    stage = heard(2, retry=ALONE, breaker=Breaker(enforce=False))
    play(stage, *[LOST] * 5)
    assert noted(stage) == []


def test_endpoints_come_and_go_in_the_order_of_the_resolver_and_no_other_change_is_noted() -> None:
    stage = heard(2)
    stage.publish(Endpoint("10.0.0.2", 80, weight=5), "10.0.0.3:80", "10.0.0.4:80")
    gone, *came = noted(stage)
    assert gone == EndpointRemoved("orders", stage.clock(), FIRST)
    assert [(type(each), str(each.endpoint)) for each in came if isinstance(each, EndpointAdded)] == [
        (EndpointAdded, "10.0.0.3:80"),
        (EndpointAdded, "10.0.0.4:80"),
    ]
    stage.publish(Endpoint("10.0.0.2", 80, weight=6), "10.0.0.3:80", "10.0.0.4:80")
    assert noted(stage) == []
    now = stage.clock.advance(60.0)
    stage.cluster.publish([FIRST], "paper", now, known_at=now - 6.0)
    assert {event.at for event in noted(stage)} == {now}
    assert stage.cluster.snapshot(now).age == 6.0


def test_B3_a_panic_is_noted_when_it_begins_and_when_it_ends() -> None:
    stage = heard(4, breaker=Breaker(max_ejected=0.9, ramp=0))
    stage.eject(1, 2, 3)
    noted(stage)
    for _ in range(2):
        stage.cluster.refresh(stage.clock.advance(0.1))
    assert noted(stage) == [PanicBegan("orders", stage.clock() - 0.1, 1, 4)]
    for node in stage.nodes[:2]:
        stage.cluster.unbar(node.endpoint.place, stage.clock())
    noted(stage)
    stage.cluster.refresh(stage.clock())
    assert noted(stage) == [PanicEnded("orders", stage.clock())]


def test_that_a_node_is_well_from_the_first_is_no_news() -> None:
    stage = heard(2, health=HealthCheck("/"))
    for healthy in (True, True, False, False, True):
        stage.cluster.heard(FIRST.place, healthy, 1.0, "status 200" if healthy else "ConnectError")
    stage.cluster.heard(SECOND.place, False, 2.0, "status 503")
    stage.cluster.heard(("10.0.0.9", 80), False, 2.0, "status 503")
    assert noted(stage) == [
        HealthChanged("orders", 1.0, FIRST, False, "ConnectError"),
        HealthChanged("orders", 1.0, FIRST, True, "status 200"),
        HealthChanged("orders", 2.0, SECOND, False, "status 503"),
    ]


def test_discovery_grows_stale_once_and_recovers_once() -> None:
    stage = heard(1)
    known = stage.clock()
    for why in ("", "consul: refused", "consul: refused", "consul: timed out", "", ""):
        stage.cluster.set_trouble(why, stage.clock.advance(1.0))
    assert noted(stage) == [
        DiscoveryStale("orders", known + 2.0, "consul: refused", 2.0),
        DiscoveryRecovered("orders", known + 5.0),
    ]


def test_B1_the_budget_is_exhausted_once_in_an_episode() -> None:
    stage = heard(2, breaker=Breaker(enforce=False), retry=Retry(budget=Budget(capacity=40, retry_cost=14)))
    for _ in range(9):
        stage.play([LOST, LOST, LOST] if stage.tokens >= 28 else [LOST, LOST] if stage.tokens >= 14 else [LOST])
    assert [type(each) for each in noted(stage)] == [BudgetExhausted]
    play(stage, *[OK] * 3)
    assert 14 <= stage.tokens < 20
    stage.play([LOST, LOST])
    stage.play([LOST])
    assert noted(stage) == []  # it was not half full in between
    play(stage, *[OK] * 40)
    stage.play([LOST, LOST, LOST])
    stage.play([LOST])
    assert [type(each) for each in noted(stage)] == [BudgetExhausted]


def test_B4_an_overload_begins_with_a_refused_call_and_ends_after_a_calm() -> None:
    stage = heard(1, rng=Draws(0.0), retry=ALONE)
    for _ in range(100):
        call = stage.call()
        if (attempt := call.begin(stage.clock())) is None:
            break
        stage.settle(call, attempt, answer(429))
    [began] = noted(stage)
    assert isinstance(began, OverloadBegan)
    assert 0 < began.share <= 0.9
    assert stage.call().begin(stage.clock()) is None
    assert noted(stage) == []
    stage.clock.advance(CALM - 1.0)
    play(stage, OK)
    assert noted(stage) == []
    stage.clock.advance(1.0)
    play(stage, OK)
    assert noted(stage) == [OverloadEnded("orders", stage.clock() - 0.01)]


def test_B5_a_throttle_that_only_counts_overloads_nobody() -> None:
    stage = heard(1, rng=Draws(0.0), retry=ALONE, throttle=Throttle(enforce=False))
    play(stage, *[answer(429)] * 40)
    assert stage.cluster.shedder.would_refuse
    assert noted(stage) == []


def test_what_nobody_hears_of_is_not_even_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(Event, "__init__", lambda self, *args: made.append(self))
    stage = Stage(3, retry=ALONE)
    play(stage, *[broke(End.lost), UNAVAILABLE] * 3)
    stage.publish("10.0.0.3:80")
    assert stage.cluster.journal.waiting == type(stage.cluster.journal.waiting)()
    stage.cluster.journal.hears = lambda kind: kind is EndpointAdded
    stage.publish("10.0.0.1:80")
    assert [type(each) for each in noted(stage)] == [EndpointAdded]


def test_what_finds_no_room_is_counted_where_it_is_missing() -> None:
    backlog = Backlog(2)
    for service, count in (("a", 4), ("b", 1)):
        for at in range(count):
            backlog.add(PanicEnded(service, float(at)))
    backlog.add_all([Missed("a", 9.0, 5)])
    assert backlog.take() == [
        PanicEnded("a", 0.0),
        PanicEnded("a", 1.0),
        Missed("a", 9.0, 7),
        Missed("b", 0.0, 1),
    ]
    backlog.add_all([PanicEnded("a", 10.0), PanicEnded("a", 11.0)])
    assert backlog.take() == [PanicEnded("a", 10.0), PanicEnded("a", 11.0)]
    backlog.add_all([PanicEnded("b", float(at)) for at in range(3)])
    assert backlog.take()[2:] == [Missed("b", 2.0, 1)]


EXAMPLES = {
    EndpointAdded("orders", 1.5, FIRST): "orders: 10.0.0.1:80 was added",
    EndpointRemoved("orders", 1.5, FIRST): "orders: 10.0.0.1:80 was removed",
    Ejected("orders", 1.5, FIRST, "breaker", "50% success in 12 calls", 2.04): (
        "orders: 10.0.0.1:80 was ejected for 2.0 s (50% success in 12 calls)"
    ),
    Ejected("orders", 1.5, FIRST, "breaker", "5 failures in a row", 4.0, again=True): (
        "orders: 10.0.0.1:80 stays ejected for 4.0 s (5 failures in a row)"
    ),
    Ejected("orders", 1.5, FIRST, "hand", "by hand", None): (
        "orders: 10.0.0.1:80 was ejected until it is restored (by hand)"
    ),
    Probing("orders", 1.5, FIRST): "orders: 10.0.0.1:80 is probed by a call",
    Restored("orders", 1.5, FIRST, "probe"): "orders: 10.0.0.1:80 was restored (its probe succeeded)",
    Restored("orders", 1.5, FIRST, "hand"): "orders: 10.0.0.1:80 was restored (by hand)",
    HealthChanged("orders", 1.5, FIRST, False, "status 503"): "orders: 10.0.0.1:80 is unhealthy (status 503)",
    HealthChanged("orders", 1.5, FIRST, True, "status 200"): "orders: 10.0.0.1:80 is healthy again (status 200)",
    PanicBegan("orders", 1.5, 1, 4): "orders: panic: 1 of 4 endpoints are healthy, so all are called",
    PanicEnded("orders", 1.5): "orders: the panic is over",
    DiscoveryStale("orders", 1.5, "consul: refused", 12.4): "orders: its endpoints are 12 s old (consul: refused)",
    DiscoveryStale("orders", 1.5, "consul: refused", None): (
        "orders: its endpoints are not known yet (consul: refused)"
    ),
    DiscoveryRecovered("orders", 1.5): "orders: its endpoints are up to date again",
    BudgetExhausted("orders", 1.5): "orders: the retry budget is exhausted: calls that fail are not repeated",
    OverloadBegan("orders", 1.5, 0.25): "orders: it is overloaded: 25% of the calls are refused here",
    OverloadEnded("orders", 1.5): "orders: calls are no longer refused here",
    ConfigChanged("orders", 1.5, ("retry", "timeout")): "orders: other settings now: retry, timeout",
    ConfigChanged("orders", 1.5, ()): "orders: a service from now on",
    Missed("orders", 1.5, 3): "orders: 3 events were dropped: whoever is told takes too long",
}


def test_every_event_reads_as_a_sentence_and_as_plain_data_and_is_frozen() -> None:
    assert {type(each).__name__ for each in EXAMPLES} == {*events.__all__} - {"Event"}
    for event, sentence in EXAMPLES.items():
        assert str(event) == sentence
        plain = json.loads(json.dumps(event.to_dict()))
        assert (plain.pop("event"), plain.pop("service"), plain.pop("at")) == (type(event).__name__, "orders", 1.5)
        assert plain.get("endpoint", "10.0.0.1:80") == "10.0.0.1:80"
        with pytest.raises((FrozenInstanceError, TypeError)):
            event.at = 0.0  # type: ignore[misc]
    assert Ejected("orders", 1.5, FIRST, "hand", "by hand", None).to_dict() == {
        "event": "Ejected",
        "service": "orders",
        "at": 1.5,
        "endpoint": "10.0.0.1:80",
        "by": "hand",
        "why": "by hand",
        "seconds": None,
        "again": False,
    }
