"""How long to wait before a retry."""

from __future__ import annotations

import random

import pytest
from scripted import Draws

from meshlib.core.backoff import delay_before


@pytest.mark.parametrize(
    ("retry", "bound"), [(1, 0.025), (2, 0.05), (3, 0.1), (4, 0.2), (5, 0.25), (6, 0.25), (10_000, 0.25)]
)
def test_the_bound_doubles_from_25_to_250_milliseconds(retry: int, bound: float) -> None:
    assert delay_before(retry, Draws(1.0)) == pytest.approx(bound)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.999])
def test_the_jitter_is_full(share: float) -> None:
    assert delay_before(1, Draws(share)) == pytest.approx(0.025 * share)


def test_the_draws_are_spread_over_the_whole_range() -> None:
    rng = random.Random(1)
    draws = [delay_before(4, rng) for _ in range(2000)]
    assert min(draws) < 0.01
    assert max(draws) > 0.19
    assert sum(draws) / len(draws) == pytest.approx(0.1, rel=0.05)
