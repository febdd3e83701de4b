"""Paired measurement: contestants take turns in one process, and what counts is the CPU time that each turn burned.

Decides how long a turn is, in which order turns are taken, and how they are compared. Machines are noisy and differ;
two turns that follow each other on one machine meet the same noise. So ratios (or differences) are formed within a
round, and their median is the figure. Time that others burn, the upstream above all, is never counted.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Costs = Mapping[str, Sequence[float]]
"""CPU seconds per call, one value per round, by contestant."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rounds: how often every contestant takes its turn.
        seconds: CPU time that a turn is to last; it never has fewer calls than run side by side.
        most: bound on the calls of a turn, for tests.
        is_quick: whether to leave out what takes minutes.
    """

    rounds: int
    seconds: float
    most: int
    is_quick: bool


@dataclass(frozen=True)
class Contestant:
    """Somebody whose turns are measured.

    Attributes:
        name: what the results call it.
        run: makes that many calls.
        least: calls of the shortest turn that makes sense.
        warm_up: calls before anything is measured, for connections to be opened.
    """

    name: str
    run: Callable[[int], object]
    least: int = 1
    warm_up: int = 0


def measure(contestants: Sequence[Contestant], sizes: Sizes, *, rounds: int | None = None) -> Costs:
    """Let everybody take a turn, over and over.

    Args:
        contestants: who is compared; the order of their turns.
        sizes: how much is measured.
        rounds: instead of the usual number.
    """
    calls = [_calls_of_a_turn(each, sizes) for each in contestants]
    costs: dict[str, list[float]] = {each.name: [] for each in contestants}
    for _ in range(rounds or sizes.rounds):
        for each, count in zip(contestants, calls, strict=True):
            costs[each.name].append(_turn(each, count) / count)
    return costs


def ratio(costs: Costs, one: str, other: str) -> tuple[float, float, list[float]]:
    """How `one` compares to `other`: the median of the rounds' ratios, the ratio of the cheapest turns, all ratios."""
    ratios = [mine / theirs for mine, theirs in zip(costs[one], costs[other], strict=True)]
    return statistics.median(ratios), min(costs[one]) / min(costs[other]), ratios


def excess(costs: Costs, one: str, other: str) -> tuple[float, float, list[float]]:
    """What a call costs `one` above `other`, in microseconds: median, from the cheapest turns, all."""
    extra = [(mine - theirs) * 1e6 for mine, theirs in zip(costs[one], costs[other], strict=True)]
    return statistics.median(extra), (min(costs[one]) - min(costs[other])) * 1e6, extra


def _calls_of_a_turn(contestant: Contestant, sizes: Sizes) -> int:
    """Warm it up, and find out by that how many calls fill a turn."""
    if contestant.warm_up:
        contestant.run(min(contestant.warm_up, sizes.most))
    calls = min(max(contestant.least, 50), sizes.most)
    while (took := _turn(contestant, calls)) < sizes.seconds / 2 and calls < sizes.most:
        calls = min(calls * 2, sizes.most)
    return min(max(contestant.least, int(calls * sizes.seconds / took)), sizes.most)


def _turn(contestant: Contestant, calls: int) -> float:
    gc.collect()  # everybody starts with the same debts, and pays those it makes
    start = time.process_time()
    contestant.run(calls)
    return time.process_time() - start
