"""Picking an endpoint and being done with it, by the default balancer, however many endpoints there are.

Decides what belongs to a pick: to take the balancer's first candidate, and to count the attempt in and out of its node.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

from figure import Figure, microseconds
from paired import Contestant, Sizes, measure
from parts import cluster_of

ENDPOINTS = (3, 1000, 10000)


def figures(sizes: Sizes) -> Iterator[Figure]:
    """Microseconds per pick and done."""
    costs = measure([Contestant(str(count), _picking(count)) for count in ENDPOINTS], sizes)
    for name, seconds in costs.items():
        values = [value * 1e6 for value in seconds]
        yield microseconds(f"pick: {name} endpoints", (statistics.median(values), min(values), values))


def _picking(count: int) -> Callable[[int], None]:
    candidates = cluster_of(count, None).view.candidates

    def run(calls: int) -> None:
        now = 0.0
        for _ in range(calls):
            now += 0.001
            node = next(candidates(now, None))
            number = node.start(now)
            node.settle(number, now + 0.01, success=True)
            node.finish()

    return run
