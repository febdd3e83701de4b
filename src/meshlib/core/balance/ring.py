"""The ring of a consistent hash: which place's point comes next on the circle.

Decides where points lie and whose the next one is; the hash comes in, and what is done about a place that may not be
used is the balancer's. A ring never changes: one place more or less makes another ring, which shares with the old one
all that stays as it is.

Points lie in buckets by their first bits, each sorted by itself. To sort all points of a thousand places in one go
would keep every other thread of the process waiting for a tenth of a second.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from weakref import WeakValueDictionary

PointOf = Callable[[str], int]
"""A hash of a text: a signed number of 32 bits."""

POINTS = 160
"""Points of a place of weight 1."""

HEAVIEST = 16
"""The largest weight that is taken as it is; that of an SRV record goes up to 65535."""

FULL = 64
"""About as many points are in a bucket when a ring is made."""

HALF = 2**31
"""Makes a signed number one from 0 on."""

OWNER = 24
"""Bits of an entry that say whose point it is; the point is above them, so that entries sort by it."""

OWNERS = (1 << OWNER) - 1


class Ring:
    """The points of some places.

    Args:
        bits: how many of a point's bits say which bucket it is in.

    Attributes:
        bits: see above.
        counts: how many points each place has.
        places: the places by their numbers; "" where one has gone and the number waits for the next.
    """

    __slots__ = ("__weakref__", "_buckets", "bits", "counts", "places")

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._buckets: list[array[int]] = [array("q")] * (1 << bits)
        self.counts: Mapping[str, int] = {}
        self.places: list[str] = []

    def walk(self, start: int) -> Iterator[int]:
        """The numbers of all places, by the first of their points at or after `start`, and round to it again."""
        bucket_at, buckets = (start + HALF) >> (32 - self.bits), self._buckets
        position = bisect_left(buckets[bucket_at], start << OWNER)
        met: set[int] = set()
        while len(met) < len(self.counts):
            bucket = buckets[bucket_at]
            while position < len(bucket):
                owner = bucket[position] & OWNERS
                position += 1
                if owner not in met:
                    met.add(owner)
                    yield owner
            bucket_at, position = (bucket_at + 1) % len(buckets), 0

    def changed(self, counts: Mapping[str, int], point_of: PointOf) -> Ring:
        """The ring with these counts; of two equal points the one of the lesser place comes first."""
        gone = [place for place, points in self.counts.items() if counts.get(place) != points]
        come = sorted(place for place, points in counts.items() if self.counts.get(place) != points)
        staying = counts.keys() - set(come)
        free = [number for number, place in enumerate(self.places) if place not in staying]
        ring = Ring(self.bits)
        ring.counts = counts
        ring.places = [place if place in staying else "" for place in self.places] + come[len(free) :]
        added: defaultdict[int, list[int]] = defaultdict(list)
        for place in gone:
            for point in points_of(place, self.counts[place], point_of):
                added[(point + HALF) >> (32 - self.bits)]  # looked up, so that the old entries are taken out there
        for number, place in zip(chain(free, count(len(self.places))), come, strict=False):
            ring.places[number] = place
            for point in points_of(place, counts[place], point_of):
                added[(point + HALF) >> (32 - self.bits)].append(point << OWNER | number)
        ring._buckets = self._with(added, frozenset(free), ring.places)
        return ring

    def _with(self, added: Mapping[int, list[int]], gone: frozenset[int], places: Sequence[str]) -> list[array[int]]:
        """The buckets with more entries, and without those of some numbers in the buckets that get any."""
        buckets = [*self._buckets]
        # The numbers of a new ring are in the order of the places, and so are equal points by themselves.
        by_place = (lambda entry: (entry >> OWNER, places[entry & OWNERS])) if self.counts else None
        for index, more in added.items():
            entries = [entry for entry in buckets[index] if entry & OWNERS not in gone] + more
            buckets[index] = array("q", sorted(entries, key=by_place))
        return buckets


def points_of(place: str, count: int, point_of: PointOf) -> Iterator[int]:
    """The points of a place; with a larger count, there are more after the same ones."""
    return (point_of(f"{place}-{number}") for number in range(count))


def counts_of(weights: Mapping[str, float]) -> dict[str, int]:
    """How many points each place has.

    That depends on its own weight alone: were it taken relative to the others, one change would move keys of all. Only
    where a weight is above `HEAVIEST` all are halved until none is.
    """
    largest, scale = max(weights.values()), 1
    while largest > HEAVIEST * scale:
        scale *= 2
    return {place: max(1, round(POINTS * weight / scale)) for place, weight in weights.items()}


def ring_of(weights: Mapping[str, float], point_of: PointOf) -> Ring:
    """The ring of these places; one in use that is nearly the same is taken for a start, or as it is.

    So a view that is rebuilt, and an endpoint that comes or goes, cost little, however many endpoints there are.
    """
    counts = counts_of(weights)
    bits = max(8, (sum(counts.values()) // FULL).bit_length())
    start, changes = Ring(bits), len(counts) // 2
    for reference in _in_use.valuerefs():
        ring = reference()
        if ring is not None and abs(ring.bits - bits) <= 1:
            differing = len(ring.counts.items() ^ counts.items())
            if not differing:
                return ring
            if differing < changes:
                start, changes = ring, differing
    ring = start.changed(counts, point_of)
    _in_use[id(ring)] = ring
    return ring


_in_use: WeakValueDictionary[int, Ring] = WeakValueDictionary()
"""The rings that a view holds."""
