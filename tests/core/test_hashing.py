"""Consistent hash: the documented mapping, even shares, and that nothing moves which need not."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any
from zlib import crc32

import mmh3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import PROPERTY, Stage

from meshlib import Breaker, ConsistentHash, Endpoint, PeakEwma
from meshlib.core.balance.ring import Ring, ring_of
from meshlib.core.node import Node

pytestmark = pytest.mark.once

PAGE = Path(__file__).parents[2] / "docs" / "balancing.md"
SCHEMES = ("rendezvous", "ring")
KEYS = [f"user-{number}" for number in range(20_000)]
WEIGHTS: dict[str, float] = {f"10.0.0.{number}:80": 1 for number in range(5)}
UNEVEN: dict[str, float] = {f"10.0.0.{number}:80": weight for number, weight in enumerate([1, 3, 2, 1, 0.5])}


def nodes_of(weights: dict[str, float]) -> list[Node]:
    return [Node(Endpoint.parse(place, weight=weight), Breaker()) for place, weight in weights.items()]


def candidates_of(nodes: list[Node], scheme: str, **more: Any) -> Callable[[str], Iterator[Node]]:
    candidates = ConsistentHash(scheme=scheme, **more).prepare(nodes, random.Random(1))
    return lambda key: candidates(1000.0, key)


def homes(weights: dict[str, float], scheme: str, keys: list[str] = KEYS) -> list[str]:
    """The place of each key."""
    candidates = candidates_of(nodes_of(weights), scheme)
    return [str(next(candidates(key)).endpoint) for key in keys]


def orders(weights: dict[str, float], scheme: str, keys: list[str]) -> list[list[str]]:
    candidates = candidates_of(nodes_of(weights), scheme)
    return [[str(node.endpoint) for node in candidates(key)] for key in keys]


def without(weights: dict[str, float], place: str) -> dict[str, float]:
    return {each: weight for each, weight in weights.items() if each != place}


# The mapping


def test_the_hash_is_murmur3() -> None:
    """Its author's verification: hashes of 0, 1, 2 ... 255 bytes under falling seeds, hashed once more.

    aappleby/smhasher, src/main.cpp and KeysetTest.cpp: `VerificationTest`, Murmur3A, 0xB0F57EE3.
    """
    hashes = b"".join(
        mmh3.hash(bytes(range(length)), 256 - length, False).to_bytes(4, "little") for length in range(256)
    )
    assert mmh3.hash(hashes, 0, False) == 0xB0F57EE3
    assert mmh3.hash(hashes) == 0xB0F57EE3 - 2**32


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "weights",
    [
        WEIGHTS,
        UNEVEN,
        {"[2001:db8::a]:443": 1, "10.0.0.1:80": 1, "10.0.0.1:8080": 1, "users.internal:80": 1},
        {"10.0.0.1:80": 100, "10.0.0.2:80": 10, "10.0.0.3:80": 0.001},
    ],
    ids=["alike", "uneven", "names", "heavy"],
)
def test_the_order_is_the_documented_one(scheme: str, weights: dict[str, float]) -> None:
    page: dict[str, Any] = {}
    [program] = re.findall(
        r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8").partition("### The mapping")[2], re.DOTALL
    )
    exec(program, page)
    keys = [*KEYS[:200], "", " ", "日本語", "a" * 300]
    assert orders(weights, scheme, keys[:200]) == [page[scheme](key, weights) for key in keys[:200]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_order_of_one_key_is_written_on_the_page(scheme: str) -> None:
    """So that another language has something to compare with, and no release of ours moves a key."""
    [order] = orders({f"10.0.0.{number}:80": 1 for number in (1, 2, 3)}, scheme, ["u1"])
    said = ", ".join(place.partition(":")[0].rpartition(".")[2] for place in order)
    assert f"{said} ({scheme})" in " ".join(PAGE.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_neither_the_order_of_the_endpoints_nor_the_process_matters(scheme: str) -> None:
    expected = homes(UNEVEN, scheme, KEYS[:300])
    assert homes(dict(reversed(UNEVEN.items())), scheme, KEYS[:300]) == expected
    program = f"from test_hashing import *; print(crc32(repr(homes(UNEVEN, {scheme!r}, KEYS[:300])).encode()))"
    for seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert int(ran.stdout) == crc32(repr(expected).encode())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_string_is_a_key(scheme: str) -> None:
    """Of a header of any bytes, a surrogate for one."""
    candidates = candidates_of(nodes_of(WEIGHTS), scheme)
    for key in ("ключ", "\ud800", "\0", "a" * 100_000):
        assert len({*candidates(key)}) == 5


# Shares


@pytest.mark.parametrize("weights", [WEIGHTS, UNEVEN], ids=["alike", "uneven"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shares_are_as_the_weights(scheme: str, weights: dict[str, float]) -> None:
    """Within 3.5 standard deviations: those of a draw of so many keys, and on the ring those of its points as well."""
    found = Counter(homes(weights, scheme))
    for place, weight in weights.items():
        share = weight / sum(weights.values())
        variance = len(KEYS) * share * (1 - share)
        if scheme == "ring":
            variance += (len(KEYS) * share) ** 2 * (1 - share) / (160 * weight)
        assert abs(found[place] - len(KEYS) * share) < 3.5 * variance**0.5, place


# What moves


@pytest.mark.parametrize("weights", [WEIGHTS, UNEVEN], ids=["alike", "uneven"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_endpoint_lost_or_added_moves_its_own_keys_and_no_others(scheme: str, weights: dict[str, float]) -> None:
    """Seen either way: between the orders of a key with the endpoint and without it there is no other difference."""
    keys = KEYS[:300]
    whole = orders(weights, scheme, keys)
    for place in weights:
        left = [[each for each in order if each != place] for order in whole]
        assert orders(without(weights, place), scheme, keys) == left


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_endpoint_lost_or_added_moves_its_share_of_the_keys(scheme: str) -> None:
    """At most 1.06/N. On the ring an endpoint's share is within some 8 %, so there it is the mean of all."""
    before = homes(WEIGHTS, scheme)
    shares = []
    for place in WEIGHTS:
        after = homes(without(WEIGHTS, place), scheme)
        moved = [one for one, other in zip(before, after, strict=True) if one != other]
        assert set(moved) == {place}
        shares.append(len(moved) / len(KEYS))
    largest = max(shares) if scheme == "rendezvous" else sum(shares) / len(shares)
    assert largest <= 1.06 / len(WEIGHTS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_weight_takes_keys_and_moves_none_between_others(scheme: str) -> None:
    before = homes(WEIGHTS, scheme)
    after = homes({**WEIGHTS, "10.0.0.3:80": 2}, scheme)
    assert {other for one, other in zip(before, after, strict=True) if one != other} == {"10.0.0.3:80"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_B2_on_a_ramp_keys_come_home_share_by_share_each_of_them_once(scheme: str) -> None:
    nodes, keys = nodes_of(WEIGHTS), KEYS[:2000]
    back = nodes[2]

    def places() -> list[Node]:
        candidates = candidates_of(nodes, scheme)
        return [next(candidates(key)) for key in keys]

    at_home = places()
    walks = map(candidates_of(nodes, scheme), keys)
    last = [next(node for node in walk if node is not back) for walk in walks]
    for step in range(1, 11):
        back.effective_weight = step / 10
        now = places()
        assert all(one is other or other is back for one, other in zip(last, now, strict=True))
        assert now.count(back) / at_home.count(back) == pytest.approx(step / 10, abs=0.08)
        last = now
    assert last == at_home


# The ring


def colliding(text: str) -> int:
    """A hash with few values, so that many points are at the same place."""
    return crc32(text.encode()) % 16 * 2**28 - 2**31


@PROPERTY
@given(st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 6), min_size=1), min_size=1, max_size=5))
def test_a_ring_that_was_changed_is_like_a_new_one(history: list[dict[str, int]]) -> None:
    ring = Ring(8)
    for counts in history:
        ring = ring.changed(counts, colliding)
    points = sorted((colliding(f"{place}-{number}"), place) for place, n in counts.items() for number in range(n))
    for start in (-(2**31), -1, 0, colliding("x"), colliding("y") + 1, 2**31 - 1):
        round_it = [place for point, place in points if point >= start] + [place for _, place in points]
        assert [ring.places[number] for number in ring.walk(start)] == list(dict.fromkeys(round_it))
    assert len(ring.places) == max(map(len, history))


def test_a_large_ring_is_sorted_in_small_parts_and_changed_in_few() -> None:
    """So that no thread waits long for the one that makes it."""
    hashed = 0

    def point_of(text: str) -> int:
        nonlocal hashed
        hashed += 1
        return mmh3.hash(text)

    weights = {f"10.0.{number // 250}.{number % 250}:80": 1.0 for number in range(1001)}
    ring = ring_of(without(weights, "10.0.1.1:80"), point_of)
    assert max(map(len, ring._buckets)) < 250
    hashed = 0
    more = ring_of(weights, point_of)
    assert hashed == 160
    assert sum(one is not other for one, other in zip(ring._buckets, more._buckets, strict=True)) <= 160
    assert ring_of(weights, point_of) is more


# Walks


@PROPERTY
@given(
    st.sampled_from(SCHEMES),
    st.sampled_from([None, 1.0, 1.25]),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.sampled_from([0.1, 1.0])), min_size=1, max_size=8),
    st.text(max_size=8),
)
def test_a_walk_has_every_node_once_and_is_the_same_again(
    scheme: str, bounded_load: float | None, shape: list[tuple[int, int, float]], key: str
) -> None:
    nodes = nodes_of({f"10.0.0.{number}:80": weight for number, (weight, _, _) in enumerate(shape)})
    for node, (_, in_flight, ramp) in zip(nodes, shape, strict=True):
        node.in_flight = in_flight
        node.effective_weight *= ramp
    candidates = candidates_of(nodes, scheme, bounded_load=bounded_load)
    walked = list(candidates(key))
    assert len(walked) == len(nodes)
    assert set(walked) == set(nodes)
    assert not key or list(candidates(key)) == walked


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_calls_are_balanced(key: str | None) -> None:
    nodes = nodes_of(WEIGHTS)
    candidates = ConsistentHash().prepare(nodes, random.Random(1))
    for node in nodes[1:]:
        node.in_flight = 9
    firsts = Counter(next(candidates(1000.0, key)) for _ in range(1000))
    by_default = PeakEwma().prepare(nodes, random.Random(1))
    assert firsts == Counter(next(by_default(1000.0, None)) for _ in range(1000))


# Bounded load


@pytest.mark.parametrize("keys", [["u1"] * 300, KEYS[:300]], ids=["one key", "many keys"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_endpoint_is_above_its_bound(scheme: str, keys: list[str]) -> None:
    nodes = nodes_of(UNEVEN)
    candidates, whole = candidates_of(nodes, scheme, bounded_load=1.25), sum(UNEVEN.values())
    by_hash = candidates_of(nodes, scheme)
    for calls, key in enumerate(keys, 1):
        bounds = {node: ceil(1.25 * calls * node.endpoint.weight / whole) for node in nodes}
        node = next(candidates(key))
        assert node is next(each for each in by_hash(key) if each.in_flight < bounds[each])
        node.in_flight += 1
        assert node.in_flight <= bounds[node]


def test_those_at_their_bound_end_the_walk_in_the_keys_order() -> None:
    nodes = nodes_of(WEIGHTS)
    order = list(candidates_of(nodes, "rendezvous")("u1"))
    order[0].in_flight = order[1].in_flight = 3  # of 7 with this call, and of ceil(1.25 * 7 / 5) = 2
    assert list(candidates_of(nodes, "rendezvous", bounded_load=1.25)("u1")) == [*order[2:], *order[:2]]


# What the snapshot says


@pytest.mark.parametrize(
    ("scheme", "count", "said"), [("rendezvous", 256, 0), ("rendezvous", 257, 1), ("ring", 257, 0)]
)
def test_a_warning_suggests_the_ring_for_many_endpoints(scheme: str, count: int, said: int) -> None:
    stage = Stage(1, balancer=ConsistentHash(scheme=scheme))
    stage.publish(*(f"10.0.{number // 250}.{number % 250}:80" for number in range(count)))
    warnings = stage.cluster.snapshot(stage.clock()).warnings
    assert [text for text in warnings if "scheme='ring'" in text] == list(warnings)
    assert len(warnings) == said
