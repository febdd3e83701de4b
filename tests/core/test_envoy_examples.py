"""Envoy's documented examples: where we do the same, and where we differ on purpose.

From its documentation, "Upstream clusters": "Priority levels", "Panic threshold", "Zone aware routing", "Locality
weighted load balancing", "Slow start mode" and "Outlier detection", and from the reference of `OutlierDetection`. What
is said here of Envoy is what stands there. docs/balancing.md lists the differences with their reasons.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from scripted import Stage

from meshlib import Breaker, Endpoint, LeastRequest, Random

pytestmark = pytest.mark.once

OF_A_LEVEL = 100
"""Endpoints of each level in the examples, which speak of percentages."""

HALF = OF_A_LEVEL // 2


def levels(*healthy: int, **settings: Any) -> Stage:
    """Levels of a hundred endpoints, so many of which pass their checks."""
    stage = Stage(1, rng=random.Random(1), **{"balancer": Random(), **settings})
    places = [(level, number) for level in range(len(healthy)) for number in range(OF_A_LEVEL)]
    stage.publish(*(Endpoint(f"10.0.{level}.{number}", 80, priority=level) for level, number in places))
    for node, (level, number) in zip(stage.nodes, places, strict=True):
        stage.cluster.heard(node.endpoint.place, number < healthy[level], stage.clock())
    stage.cluster.refresh(stage.clock.advance(1.0))
    return stage


def traffic(stage: Stage) -> list[int]:
    """Percent of the calls that each level gets at the first try; one level at a time means that some calls tell."""
    candidates = stage.cluster.view.candidates
    first = Counter(next(candidates(stage.clock(), None)).endpoint.priority for _ in range(50))
    return [2 * first[level] for level in sorted({node.endpoint.priority for node in stage.nodes})]


def panicking(stage: Stage) -> list[bool]:
    """Whether each level is in panic."""
    view = stage.cluster.view
    by_level = {node.endpoint.priority: node in view.panicking for node in view.nodes}
    return [by_level[level] for level in sorted(by_level)]


def share_of(stage: Stage, zone: str, picks: int = 4000) -> float:
    candidates = stage.cluster.view.candidates
    return sum(next(candidates(stage.clock(), None)).endpoint.zone == zone for _ in range(picks)) / picks


# Priority levels


@pytest.mark.parametrize(
    ("healthy", "expected"),
    [
        ((100, 100), [100, 0]),
        ((72, 100), [100, 0]),
        ((0, 100), [0, 100]),
        ((72, 72), [100, 0]),
        ((100, 100, 100), [100, 0, 0]),
        ((72, 72, 100), [100, 0, 0]),
    ],
)
def test_D6_rows_of_priority_levels_where_one_level_gets_all(healthy: tuple[int, ...], expected: list[int]) -> None:
    assert traffic(levels(*healthy)) == expected


@pytest.mark.parametrize("min_healthy", [1, 72])
@pytest.mark.parametrize(
    ("healthy", "envoy"),
    [((71, 100), [99, 1]), ((50, 100), [70, 30]), ((25, 100), [35, 65]), ((25, 100, 100), [35, 65, 0])],
)
def test_D6_rows_of_priority_levels_where_envoy_spills_over_and_we_call_one_level(
    healthy: tuple[int, ...], envoy: list[int], min_healthy: int
) -> None:
    """With `min_healthy` at what Envoy's factor of 1.4 comes to, we leave the level where Envoy begins to."""
    ours = traffic(levels(*healthy, min_healthy=min_healthy))
    assert ours == ([100, 0, 0] if min_healthy == 1 else [0, 100, 0])[: len(healthy)]
    assert ours != envoy


# Panic threshold


@pytest.mark.parametrize("healthy", [72, 71, 50, 25, 0])
@pytest.mark.parametrize("min_healthy", [1, HALF])
def test_B3_no_panic_above_a_level_that_is_well(healthy: int, min_healthy: int) -> None:
    assert panicking(levels(healthy, 100, min_healthy=min_healthy)) == [False, False]


@pytest.mark.parametrize(
    ("healthy", "expected"),
    [
        ((72, 72), [False, False]),
        ((71, 71), [False, False]),
        ((50, 60), [False, False]),
        ((25, 100), [False, False]),
        ((25, 25), [True, True]),
    ],
)
def test_B3_rows_of_panic_threshold_with_half_as_what_a_level_needs(
    healthy: tuple[int, ...], expected: list[bool]
) -> None:
    assert panicking(levels(*healthy, min_healthy=HALF)) == expected


def test_B3_with_one_node_as_what_a_level_needs_it_is_called_without_panic_where_envoy_panics() -> None:
    stage = levels(25, 25, min_healthy=1)
    assert (traffic(stage), panicking(stage)[0]) == ([100, 0], False)


def test_B3_of_two_levels_that_are_not_well_we_call_the_one_that_has_what_it_needs() -> None:
    """The row 5 % and 65 %, where Envoy sends 7 % to the first level, in panic."""
    stage = levels(5, 65, min_healthy=HALF)
    assert (traffic(stage), panicking(stage)) == ([0, 100], [False, False])


def test_B3_all_unhealthy_means_panic_on_the_first_level() -> None:
    stage = levels(0, 0)
    assert (traffic(stage), panicking(stage)[0]) == ([100, 0], True)


def test_B3_a_threshold_of_0_means_no_panic_and_nobody_to_call() -> None:
    stage = levels(0, 0, breaker=Breaker(panic=0))
    assert panicking(stage) == [False, False]
    assert stage.call().begin(stage.clock()) is None


@pytest.mark.parametrize(("healthy", "expected"), [(50, False), (49, True)])
def test_B3_panic_begins_below_50_percent(healthy: int, expected: bool) -> None:
    assert panicking(levels(healthy)) == [expected]


# Zone aware routing, and locality weights


def zones(ours: int, ours_healthy: int, others: int, others_healthy: int, **weights: float) -> Stage:
    """Two zones, a (ours) and b, with so many endpoints, of which so many pass their checks."""
    stage = Stage(1, rng=random.Random(1), zone="a" if not weights else "", balancer=Random())
    members = [("a", number, number < ours_healthy) for number in range(ours)]
    members += [("b", number, number < others_healthy) for number in range(others)]
    stage.publish(
        *(Endpoint(f"{zone}{number}.test", 80, zone=zone, weight=weights.get(zone, 1)) for zone, number, _ in members)
    )
    for node, (_, _, healthy) in zip(stage.nodes, members, strict=True):
        stage.cluster.heard(node.endpoint.place, healthy, stage.clock())
    stage.cluster.refresh(stage.clock.advance(1.0))
    return stage


def test_D6_all_calls_stay_in_a_zone_that_can_take_them() -> None:
    assert share_of(zones(6, 6, 4, 4), "a", 200) == 1.0


def test_D6_a_zone_smaller_than_others_keeps_its_calls_where_envoy_sends_the_surplus_across() -> None:
    assert share_of(zones(2, 2, 8, 8), "a", 200) == 1.0


def test_D6_a_zone_with_less_than_half_of_its_endpoints_shares_with_all() -> None:
    assert share_of(zones(10, 5, 10, 10), "a", 200) == 1.0
    assert share_of(zones(10, 4, 10, 10), "a") == pytest.approx(4 / 14, abs=0.03)


def test_D6_panic_comes_before_zones() -> None:
    stage = zones(4, 3, 6, 1)
    assert stage.cluster.view.panic
    # All ten are called, those that are not healthy with a tenth of their weight.
    assert share_of(stage, "a") == pytest.approx(3.1 / 4.6, abs=0.03)


@pytest.mark.parametrize(("healthy", "percent"), [(100, 33), (0, 0)])
def test_localities_of_weight_1_and_2_get_a_third_and_two_thirds_and_the_dead_one_nothing(
    healthy: int, percent: int
) -> None:
    assert share_of(zones(100, healthy, 100, 100, a=1, b=2), "a") == pytest.approx(percent / 100, abs=0.03)


def test_a_locality_of_weight_1_gets_what_its_healthy_endpoints_weigh_where_envoy_has_weights_of_localities() -> None:
    share = share_of(zones(100, 50, 100, 100, a=1, b=2), "a")  # Envoy: 26 %, as if 70 of them were there
    assert share == pytest.approx(50 / 250, abs=0.03)


# Slow start


def test_B2_a_ramp_is_envoys_linear_slow_start_in_steps_of_a_tenth() -> None:
    """Its example: a window of 60 s, aggression 1, and 10 % at least."""
    stage = Stage(2, breaker=Breaker(ramp=60.0))
    stage.eject(1)
    stage.cluster.unbar(stage.nodes[0].endpoint.place, stage.clock())
    for second in range(61):
        stage.cluster.refresh(stage.clock())
        theirs = max(0.1, max(second, 1) / 60)
        ours = stage.nodes[0].effective_weight
        assert theirs - 1e-9 <= ours <= min(1.0, theirs + 0.1 + 1e-9), second
        stage.clock.advance(1.0)


# Outlier detection


def test_B2_five_failures_in_a_row_eject() -> None:
    stage, failures = Stage(3), 0
    node = stage.nodes[0]
    while node.breaker.state == "closed":
        stage.cluster.record(node, node.breaker.generation, False, stage.clock())
        failures += 1
    assert failures == Breaker().consecutive == 5


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_B3_one_may_be_ejected_whatever_the_share_says(count: int, share: float) -> None:
    """In Envoy likewise, of late with `always_eject_one_host`."""
    stage = Stage(count, breaker=Breaker(max_ejected=share))
    stage.eject(1)


def test_B3_of_ten_with_a_share_of_30_percent_three_are_ejected_and_no_fourth() -> None:
    stage = Stage(10, breaker=Breaker(max_ejected=0.3), balancer=LeastRequest())
    stage.eject(1, 2, 3)
    for _ in range(20):
        stage.cluster.record(stage.nodes[3], stage.nodes[3].breaker.generation, False, stage.clock())
    assert stage.nodes[3].breaker.state == "closed"
    stage.cluster.refresh(stage.clock())
    assert not stage.cluster.view.panic, "six of ten are well: the one that was refused is not"


def test_B2_the_time_of_an_ejection_is_over_when_a_call_has_shown_it_where_envoy_just_lets_calls_come_back() -> None:
    stage = Stage(2)
    stage.eject(1)
    stage.clock.advance(3600.0)
    stage.cluster.refresh(stage.clock())
    assert stage.nodes[0].breaker.state == "open"
    assert stage.nodes[0] not in stage.cluster.view.offered


def test_B2_a_check_that_passes_does_not_end_an_ejection_where_in_envoy_it_does() -> None:
    stage = Stage(2)
    stage.eject(1)
    for healthy in (False, True):
        stage.cluster.heard(stage.nodes[0].endpoint.place, healthy, stage.clock())
    stage.cluster.refresh(stage.clock())
    assert stage.nodes[0].breaker.state == "open"
    assert stage.nodes[0] not in stage.cluster.view.offered
