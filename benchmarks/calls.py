"""A call over real connections: the meshed client against plain httpx, and what else there is, by concurrency.

Decides nothing but who runs against whom. All have three endpoints. Plain httpx takes part twice: with its own limits
on connections, where it closes every idle one beyond the twentieth, and with those limits lifted, where it keeps them
all and looks through all of them several times per request. The first is far cheaper from fifty calls side by side on,
so it is the one that everybody is compared to; the second is compared to the meshed client alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from contestants import LIFTED, MESHED, OTHERS, PLAIN, RELATIVE, Field, is_installed, meshed, plain
from figure import Figure, ratios
from paired import Contestant, Sizes, measure, ratio
from subject import PATH, SERVICE
from upstream import answering

CONCURRENCIES = (1, 20, 100, 500)
DEAR = 500
"""Calls side by side from which on one costs httpx with lifted limits a fifth of a second, and a turn minutes."""

LIFTED_ROUNDS = 3
"""The ratios are so small that more would not tell more. Where they are dear, it is one."""


def figures(sizes: Sizes) -> Iterator[Figure]:
    """Ratios to plain httpx."""
    for concurrency in CONCURRENCIES:
        yield from _by_own_limits(concurrency, sizes)
        if concurrency > 1 and not (concurrency >= DEAR and sizes.is_quick):
            yield from _by_lifted_limits(concurrency, sizes)


def _by_own_limits(concurrency: int, sizes: Sizes) -> Iterator[Figure]:
    with answering(3) as addresses, asyncio.Runner() as runner, Field(runner) as field:
        costs = measure(list(_contestants(field, addresses, concurrency)), sizes)
    for name in costs:
        if name != PLAIN:
            yield ratios(f"calls: c={concurrency}: {name} / {PLAIN}", ratio(costs, name, PLAIN))


def _contestants(field: Field, addresses: Sequence[str], concurrency: int) -> Iterator[Contestant]:
    yield field.enter(PLAIN, lambda: plain(addresses), concurrency)
    yield field.enter(MESHED, lambda: meshed(addresses), concurrency)
    yield field.enter(RELATIVE, lambda: meshed(addresses, PATH, SERVICE), concurrency)
    for name, opened in OTHERS.items():
        if is_installed(name):
            yield field.enter(name, lambda opened=opened: opened(addresses), concurrency)


def _by_lifted_limits(concurrency: int, sizes: Sizes) -> Iterator[Figure]:
    with answering(3) as addresses, asyncio.Runner() as runner, Field(runner) as field:
        contestants = [
            field.enter(LIFTED, lambda: plain(addresses, lifted=True), concurrency),
            field.enter(MESHED, lambda: meshed(addresses), concurrency),
        ]
        rounds = 1 if concurrency >= DEAR else min(LIFTED_ROUNDS, sizes.rounds)
        costs = measure(contestants, sizes, rounds=rounds)
    yield ratios(f"calls: c={concurrency}: {MESHED} / {LIFTED}", ratio(costs, MESHED, LIFTED))
