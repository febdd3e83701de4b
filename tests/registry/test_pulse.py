"""When heartbeats are due, by a clock of the test's own."""

from __future__ import annotations

import random

import pytest

from meshlib.registry.pulse import LONGEST, Pulse

pytestmark = pytest.mark.once


class Draw:
    """Chance that always says the same."""

    def __init__(self, value: float) -> None:
        self._value = value

    def random(self) -> float:
        return self._value


def test_G1_heartbeats_come_every_third_of_the_ttl_with_jitter() -> None:
    pulse = Pulse(9.0, random.Random(1), 100.0)
    assert pulse.due == 100.0
    waits = []
    now = 100.0
    for _ in range(300):
        pulse.beat(now)
        waits.append(pulse.due - now)
        now = pulse.due
    assert 2.7 <= min(waits) < 2.75
    assert 3.25 < max(waits) <= 3.3
    assert sum(waits) / 300 == pytest.approx(3.0, abs=0.05)


def test_G1_two_heartbeats_may_be_lost_before_the_ttl_runs_out() -> None:
    pulse = Pulse(9.0, Draw(0.999), 0.0)
    pulse.beat(0.0)
    assert pulse.due * 2 < pulse.runs_out == 9.0


def test_G1_after_errors_the_tries_come_further_apart_and_never_later_than_a_heartbeat() -> None:
    pulse = Pulse(9.0, Draw(1.0), 0.0)
    waits = []
    for _ in range(2000):
        pulse.failed(0.0)
        waits.append(pulse.due)
    assert waits[:4] == [0.5, 1.0, 2.0, 3.0]
    assert max(waits) == 3.0
    pulse.beat(0.0)
    pulse.failed(0.0)
    assert pulse.due == 0.5


def test_G1_a_long_outage_is_asked_about_at_random_times() -> None:
    pulse = Pulse(300.0, random.Random(2), 0.0)
    waits = []
    for _ in range(200):
        pulse.failed(0.0)
        waits.append(pulse.due)
    assert max(waits) <= LONGEST
    assert len({round(wait, 3) for wait in waits[10:]}) > 150


def test_G1_an_error_does_not_put_off_when_the_registry_calls_us_critical() -> None:
    pulse = Pulse(3.0, Draw(0.5), 10.0)
    pulse.beat(10.0)
    pulse.failed(12.0)
    assert pulse.runs_out == 13.0
