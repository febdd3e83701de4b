"""How the endpoints of a running mesh are shown: drawn in place by rich on a terminal, in plain lines elsewhere.

Decides the columns, the words, and which endpoints are left out where there is no room for all: those without trouble.
What is told comes from outside: none of it may move the cursor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from meshlib.cli.screen import aligned, can_draw
from meshlib.plain import printable

if TYPE_CHECKING:
    from rich.console import ConsoleDimensions, RenderableType
    from rich.text import Text

_NUMBERS = ("weight", "in flight", "per s", "p50 ms", "p99 ms", "attempts", "failures")
HEADINGS = ("endpoint", "state", "eligible", *_NUMBERS, "why")
_DISPENSABLE = ("weight", "attempts", "in flight", "eligible", "per s")
"""Columns that a narrow terminal goes without, one after the other, until there is room for the last one."""

_REASON = 22
"""Room for that."""

_COLOURS = {"closed": "green", "half_open": "yellow", "open": "red", "no": "red"}

Show = Callable[["Overview", str], None]
"""Shows an overview; the text says why it is not a fresh one."""


@dataclass(frozen=True, slots=True)
class Line:
    """One endpoint: a word for each heading."""

    words: tuple[str, ...]
    is_eligible: bool
    is_closed: bool

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Self:
        """A node of a snapshot, as plain values; whatever is raised, it was none."""
        words = (
            node["endpoint"],
            node["state"],
            "yes" if node["eligible"] else "no",
            _few(node["weight"]),
            f"{node['in_flight']:,d}",
            _few(node["rate"]),
            _milliseconds(node["p50"]),
            _milliseconds(node["p99"]),
            f"{node['attempts']:,d}",
            f"{node['failures']:,d}",
            _reason(node),
        )
        return cls(tuple(map(printable, words)), bool(node["eligible"]), node["state"] == "closed")


@dataclass(frozen=True, slots=True)
class ServiceLines:
    """One service: its name, the figures of the whole, what is to be known of it, its endpoints."""

    name: str
    panic: bool
    figures: str
    warnings: tuple[str, ...]
    lines: tuple[Line, ...]

    @classmethod
    def of(cls, name: str, service: Mapping[str, Any]) -> Self:
        """A service of a snapshot, as plain values; whatever is raised, it was none."""
        lines = tuple(map(Line.of, service["nodes"]))
        age = service["age"]
        figures = (
            f"{sum(line.is_eligible for line in lines):,} of {len(lines):,} eligible",
            f"{_few(sum(node['rate'] for node in service['nodes']))} attempts per s",
            f"{service['in_flight']:,d}{_of(service['limit'])} in flight",
            f"{service['budget_tokens']:.0f} of {service['budget_capacity']:,.0f} budget tokens",
            *([f"{service['throttle_share']:.0%} refused here"] if service["throttle_share"] else []),
            *([f"{service['panics']:,d} panic{'s' * (service['panics'] != 1)}"] if service["panics"] else []),
            f"by {printable(service['balancer'])}",
            f"from {printable(service['source']) or '-'}",
            "no answer yet" if age is None else f"confirmed {age:.0f} s ago",
        )
        return cls(
            printable(name),
            bool(service["panic"]),
            ", ".join(figures),
            tuple(map(printable, service["warnings"])),
            lines,
        )

    def cut(self, most: int) -> tuple[Sequence[Line], int]:
        """`most` of its lines, those with trouble first, and how many more there are."""
        ordered = sorted(self.lines, key=lambda line: (line.is_eligible, line.is_closed))
        return (ordered, 0) if len(ordered) <= most else (ordered[:most], len(ordered) - most)


@dataclass(frozen=True, slots=True)
class Overview:
    """All services."""

    services: tuple[ServiceLines, ...]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """What a status page tells, as plain values.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: if it is something else.
        """
        return cls(tuple(ServiceLines.of(name, service) for name, service in told["services"].items()))


@contextmanager
def shown_on(source: str, *, is_once: bool) -> Iterator[Show]:
    """Gives what shows overviews.

    Args:
        source: whose they are.
        is_once: there will be one, which is shown whole and stays.
    """
    if not can_draw():
        yield lambda overview, why: _print(source, overview, why)
    elif is_once:
        yield lambda overview, _: _draw_once(overview)
    else:
        from rich.console import Console
        from rich.live import Live

        console = Console()
        with Live(console=console, screen=True, auto_refresh=False) as live:
            yield lambda overview, why: live.update(_fitted(source, overview, why, console.size), refresh=True)


def _print(source: str, overview: Overview, why: str) -> None:
    if why:
        print(f"{source}: {printable(why)}", file=sys.stderr, flush=True)
        return
    for service in overview.services:
        print(f"{service.name}: {'PANIC, ' * service.panic}{service.figures}")
        for warning in service.warnings:
            print(f"warning: {warning}")
        print(*aligned(HEADINGS, [line.words for line in service.lines], _NUMBERS), "", sep="\n")
    sys.stdout.flush()


def _draw_once(overview: Overview) -> None:
    from rich.console import Console

    console = Console()
    for service in overview.services:
        console.print(*_titles(service), _table(service.lines, console.width), "", sep="\n")


def _fitted(source: str, overview: Overview, why: str, size: ConsoleDimensions) -> RenderableType:
    """As much as a screen of this size can show."""
    from rich.console import Group
    from rich.text import Text

    status = Text(f"  {printable(why)}", "bold red") if why else Text("  live", "green")
    parts: list[RenderableType] = [Text.assemble((source, "bold"), status)]
    taken = 1 + sum(len(_titles(service)) + 3 for service in overview.services)
    room = max(1, (size.height - taken) // max(1, len(overview.services)))
    for service in overview.services:
        lines, more = service.cut(room)
        parts += [Text(), *_titles(service), _table(lines, size.width)]
        if more:
            parts.append(Text(f"and {more:,} more", "dim"))
    return Group(*parts)


def _titles(service: ServiceLines) -> list[Text]:
    from rich.text import Text

    panic = Text(" PANIC " if service.panic else "", "bold white on red")
    title = Text.assemble((service.name, "bold"), " ", panic, " ", (service.figures, "dim"), overflow="fold")
    return [title, *(Text(f"warning: {warning}", "yellow") for warning in service.warnings)]


def _table(lines: Sequence[Line], width: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    widths = [max(map(len, words)) for words in zip(HEADINGS, *(line.words for line in lines), strict=True)]
    shown = _columns(widths, width)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="underline")
    for index in shown:
        is_number = HEADINGS[index] in _NUMBERS
        least = None if HEADINGS[index] == "why" else widths[index]
        table.add_column(HEADINGS[index], justify="right" if is_number else "left", min_width=least)
    for line in lines:
        words = (line.words[index] for index in shown)
        table.add_row(*(Text(word, _COLOURS.get(word, "")) for word in words))
    return table


def _columns(widths: Sequence[int], width: int) -> list[int]:
    """Which columns there is room for, of those that would need these widths."""
    shown = list(range(len(HEADINGS)))
    for name in _DISPENSABLE:
        if sum(widths[index] + 2 for index in shown[:-1]) + _REASON <= width:
            break
        shown.remove(HEADINGS.index(name))
    return shown


def _reason(node: Mapping[str, Any]) -> str:
    """Why it is eligible or not; of one that is not, what its last failure was."""
    last = "" if node["eligible"] and node["state"] == "closed" else node["last_error"]
    return f"{node['why']} (last {last})" if last else node["why"]


def _of(limit: int | None) -> str:
    return "" if limit is None else f" of {limit:,d}"


def _few(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else _few(seconds * 1000)
