"""Flatness: what a meshed call costs with many others under way, or with many endpoints, against one of each.

Decides nothing but the sizes that are compared. The meshed client runs against itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from contestants import Field, meshed
from figure import Figure, ratios
from paired import Sizes, measure, ratio
from upstream import answering

BUSY = 500
ENDPOINTS = (1, 10, 100, 1000)
WORKERS = 20
"""Calls side by side while endpoints are counted."""

COUPONS = 10
"""Calls per endpoint until, very likely, none is left without a connection (drawing n coupons takes n ln n)."""


def figures(sizes: Sizes) -> Iterator[Figure]:
    """Ratios to the smallest."""
    with answering(3) as addresses, asyncio.Runner() as runner, Field(runner) as field:
        contestants = [field.enter(f"c={count}", lambda: meshed(addresses), count) for count in (1, BUSY)]
        costs = measure(contestants, sizes)
    yield ratios(f"flatness: c={BUSY} / c=1", ratio(costs, f"c={BUSY}", "c=1"))
    with answering(max(ENDPOINTS)) as addresses, asyncio.Runner() as runner, Field(runner) as field:
        contestants = [
            field.enter(str(count), lambda count=count: meshed(addresses[:count]), WORKERS, COUPONS * count)
            for count in ENDPOINTS
        ]
        costs = measure(contestants, sizes)
    for count in ENDPOINTS[1:]:
        yield ratios(f"flatness: {count} / 1 endpoints", ratio(costs, str(count), "1"))
