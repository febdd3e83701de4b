"""D3: SRV records of one priority share the calls by their weights (RFC 2782), and priorities are never mixed."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from scripted import REFUSED, Stage

from meshlib import ConsistentHash, LeastRequest, PeakEwma, Random, RoundRobin
from meshlib.discovery.srv import Record, endpoints

BALANCERS = {
    "Random": Random(),
    "RoundRobin": RoundRobin(),
    "LeastRequest": LeastRequest(),  # nothing is in flight here
    "PeakEwma": PeakEwma(),
    "rendezvous": ConsistentHash(),
}

PICKS = 6000

SLOW, FAST, SPARE, SERVER = "10.0.0.1", "10.0.0.2", "10.0.1.1", "10.0.1.2"

EXAMPLE = [
    Record(0, 1, 9, "old-slow-box.example.com"),
    Record(0, 3, 9, "new-fast-box.example.com"),
    Record(1, 0, 9, "sysadmins-box.example.com"),
    Record(1, 0, 9, "server.example.com"),
]
"""The one at the end of the RFC: three quarters go to the fast box; the others take over when both are down."""

ADDRESSES = dict(zip([record.target for record in EXAMPLE], [[SLOW], [FAST], [SPARE], [SERVER]], strict=True))


def service(records: list[Record], hosts: dict[str, list[str]], balancer: Any) -> Stage:
    stage = Stage(1, rng=random.Random(3), balancer=balancer)
    stage.publish(*endpoints(records, hosts))
    return stage


def shares(stage: Stage) -> dict[str, float]:
    """Who is first in how many of the calls."""
    candidates = stage.cluster.view.candidates
    first = Counter(next(candidates(stage.clock(), f"u{number}")).endpoint.host for number in range(PICKS))
    return {host: count / PICKS for host, count in first.items()}


def about(share: float) -> Any:
    """Within 3.5 standard deviations of a binomial."""
    return pytest.approx(share, abs=3.5 * (share * (1 - share) / PICKS) ** 0.5)


@pytest.mark.parametrize("balancer", BALANCERS.values(), ids=BALANCERS)
def test_D3_the_rfcs_example(balancer: Any) -> None:
    stage = service(EXAMPLE, ADDRESSES, balancer)
    assert shares(stage) == {SLOW: about(0.25), FAST: about(0.75)}
    for node in stage.nodes:
        if node.endpoint.priority == 0:
            stage.cluster.heard(node.endpoint.place, False, stage.clock())
    stage.cluster.refresh(stage.clock())
    assert shares(stage) == {SPARE: about(0.5), SERVER: about(0.5)}


@pytest.mark.parametrize("balancer", BALANCERS.values(), ids=BALANCERS)
def test_D3_one_of_weight_0_among_others_is_called_now_and_then(balancer: Any) -> None:
    records = [Record(0, weight, 80, f"{weight}.test") for weight in (0, 10, 30)]
    found = shares(service(records, {f"{weight}.test": [f"10.0.0.{weight}"] for weight in (0, 10, 30)}, balancer))
    assert 0 < found["10.0.0.0"] < 0.03
    assert found["10.0.0.10"] < found["10.0.0.30"]


@pytest.mark.parametrize("balancer", [each for name, each in BALANCERS.items() if name != "LeastRequest"])
def test_D3_three_weights_of_one_priority(balancer: Any) -> None:
    records = [Record(10, weight, 5060, f"box{number}") for number, weight in enumerate((60, 20, 20))]
    found = shares(service(records, {f"box{number}": [f"10.0.0.{number}"] for number in range(3)}, balancer))
    assert found == {"10.0.0.0": about(0.6), "10.0.0.1": about(0.2), "10.0.0.2": about(0.2)}


def test_D3_the_addresses_of_a_target_divide_its_share() -> None:
    records = [Record(0, 1, 80, "one"), Record(0, 3, 80, "three")]
    found = shares(service(records, {"one": [SLOW], "three": [FAST, SPARE, SERVER]}, Random()))
    assert found == {SLOW: about(0.25), FAST: about(0.25), SPARE: about(0.25), SERVER: about(0.25)}


def test_D3_a_call_tries_a_whole_priority_before_the_next() -> None:
    stage = service(EXAMPLE, ADDRESSES, Random())
    played = stage.play([REFUSED] * 6)
    assert [attempt.endpoint.priority for attempt in played.attempts[:4]] == [0, 0, 1, 1]
    assert len({attempt.endpoint for attempt in played.attempts[:4]}) == 4
