"""A figure: one measured number, and what was promised of it.

Decides the bars, which are those of section 6 of the design, and how a table of figures looks. It never measures, and a
figure over its bar is a word in the table, not an error: the machines this runs on are noisy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

BARS = {
    "calls: c=1: meshed / httpx": (0.90, 0.60),
    "calls: c=100: meshed / httpx": (0.40, 0.20),
    "flatness: c=500 / c=1": (1.15, 1.0),
    "flatness: 1000 / 1 endpoints": (1.15, 1.0),
    "threads: 20: meshed / httpx": (0.60, 0.40),
    "tax: sync": (10.0, 6.0),
    "tax: async": (10.0, 6.0),
    "telemetry: sync: nothing configured": (1.0, 0.3),
    "telemetry: async: nothing configured": (1.0, 0.3),
    "telemetry: sync: both histograms": (45.0, 25.0),
    "telemetry: async: both histograms": (45.0, 25.0),
    "telemetry: sync: attempts alone": (25.0, 15.0),
    "telemetry: async: attempts alone": (25.0, 15.0),
    "pick: 3 endpoints": (8.0, 4.0),
    "pick: 1000 endpoints": (8.0, 4.0),
    "pick: 10000 endpoints": (8.0, 4.0),
    "imports: meshlib / httpx": (1.35, 1.2),
}
"""Bar and stretch by figure."""


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        name: `<section>: <what>`.
        value: the median.
        least: the same from the cheapest turns alone, which noise can only have made dearer.
        unit: `""` for a ratio, or `us`.
        rounds: the value of every round.
    """

    name: str
    value: float
    least: float
    unit: str = ""
    rounds: Sequence[float] = field(default=(), repr=False)

    @property
    def verdict(self) -> str:
        """How it compares to its bar; nothing if it has none."""
        if self.name not in BARS:
            return ""
        bar, stretch = BARS[self.name]
        return "over" if self.value > bar else "stretch" if self.value <= stretch else "ok"

    def to_dict(self) -> dict[str, Any]:
        """The figure for JSON."""
        bar, stretch = BARS.get(self.name, (None, None))
        rounds = [_rounded(value) for value in self.rounds]
        return {
            "name": self.name,
            "value": _rounded(self.value),
            "least": _rounded(self.least),
            "unit": self.unit,
            "bar": bar,
            "stretch": stretch,
            "verdict": self.verdict,
            "rounds": rounds,
        }


def ratios(name: str, measured: tuple[float, float, list[float]]) -> Figure:
    """A figure without a unit, from `paired.ratio`."""
    return Figure(name, *measured[:2], rounds=measured[2])


def microseconds(name: str, measured: tuple[float, float, list[float]]) -> Figure:
    """A figure in microseconds, from `paired.excess` or the like."""
    return Figure(name, *measured[:2], unit="us", rounds=measured[2])


HEADLINE = f"{'figure':<58}{'median':>12}{'least':>12}{'bar':>8}{'stretch':>9}"


def table(figures: Iterable[Figure]) -> Iterable[str]:
    """The lines of the table, one by one as figures come in."""
    yield HEADLINE
    yield "-" * (len(HEADLINE) + 9)
    for figure in figures:
        bar, stretch = BARS.get(figure.name, ("", ""))
        value, least = (f"{_rounded(number):g} {figure.unit}".rstrip() for number in (figure.value, figure.least))
        yield f"{figure.name:<58}{value:>12}{least:>12}{bar:>8}{stretch:>9}  {figure.verdict}".rstrip()


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
