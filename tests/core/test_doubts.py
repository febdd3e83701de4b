"""What is said of settings that cannot have the effect they were made for."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from scripted import OK, Stage, broke

from meshlib import Breaker, Budget, Mesh, Retry, Service, Throttle, Timeout
from meshlib.core.outcome import End
from meshlib.testing import ManualClock

TIMEOUT = broke(End.timeout, error="ReadTimeout", lasts=0.5)


def said(stage: Stage) -> list[str]:
    return [doubt.about for doubt in stage.cluster.doubts(stage.clock())]


def test_the_defaults_raise_no_doubt() -> None:
    assert said(Stage(3)) == []


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({"timeout": Timeout(total=5.0)}, ["timeout.total"]),
        ({"timeout": Timeout(total=5.0, attempt=5.0)}, []),
        ({"retry": Retry(budget=Budget(capacity=13))}, ["retry.budget"]),
        ({"retry": Retry(budget=Budget(capacity=14))}, []),
        ({"retry": Retry(budget=Budget(capacity=1), max_attempts=1)}, ["retry.budget"]),
    ],
)
def test_settings_that_cannot_go_together(settings: dict[str, Any], about: list[str]) -> None:
    assert said(Stage(2, **settings)) == about


@pytest.mark.parametrize(("every", "about"), [(10.0, ["breaker.window"]), (1.0, [])])
def test_a_window_that_the_traffic_never_fills(every: float, about: list[str]) -> None:
    stage = Stage(1)
    for _ in range(int(290 / every)):
        stage.clock.advance(every)
        stage.play([OK])
        assert said(stage) == [], "it is too early to tell"
    stage.clock.advance(300.0 - (stage.clock() - 1000.0))
    stage.play([OK])
    assert said(stage) == about


def test_a_service_that_is_not_called_is_not_doubted() -> None:
    stage = Stage(1)
    stage.clock.advance(10_000.0)
    assert said(stage) == []


def test_a_rate_that_is_switched_off_is_not_missed() -> None:
    stage = Stage(1, breaker=Breaker(success_rate=0.0))
    stage.play([OK])
    stage.clock.advance(10_000.0)
    assert said(stage) == []


def test_calls_whose_first_attempt_takes_all_their_time() -> None:
    stage = Stage(2, timeout=Timeout(attempt=0.5))
    stage.play([TIMEOUT, OK])
    assert said(stage) == [], "there was time for another endpoint"
    stage.play([TIMEOUT], total=0.5)
    assert said(stage) == ["timeout.attempt"]
    assert "1 call came to the deadline" in stage.cluster.snapshot(stage.clock()).warnings[0]
    alone = Stage(1, timeout=Timeout(attempt=0.5))
    alone.play([TIMEOUT], total=0.5)
    assert said(alone) == [], "there is no other endpoint"


def test_a_throttle_that_refuses_says_so() -> None:
    for enforce, words in ((True, "are refused for overload, 0 so far"), (False, "would be refused as overload")):
        stage = Stage(1, throttle=Throttle(enforce=enforce))
        for _ in range(40):
            stage.cluster.shedder.overloaded(stage.clock())
        assert said(stage) == ["throttle"]
        assert words in stage.cluster.snapshot(stage.clock()).warnings[0]


def test_each_doubt_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    with caplog.at_level(logging.INFO, "meshlib"):
        mesh = Mesh(Service("orders", ["127.0.0.1:1"], timeout=Timeout(total=5.0)), clock=clock)
        first = [record.getMessage() for record in caplog.records]
        warnings = [mesh.snapshot()["orders"].warnings for _ in range(3)]
    assert len(first) == len(caplog.records) == 1
    assert "an endpoint that hangs takes the whole call" in first[0]
    assert warnings[0] == warnings[2] == (first[0].removeprefix("orders: "),)
