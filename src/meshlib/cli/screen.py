"""How a run is shown while it goes on: a table in place on a terminal, plain lines anywhere else, or nothing.

Decides the layout only. It never gathers a figure, and never reads from the terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from meshlib.cli.progress import Frame, Row

if TYPE_CHECKING:
    from rich.console import Group

HEADINGS = ("endpoint", "state", "process", "in flight", "calls", "failures", "p50 ms", "p99 ms")
SHOWN_EVENTS = 4

_WIDTHS = (15, 9, 7, 9, 6, 8, 6, 6)  # with a gap of two, just the 80 columns of a terminal
_COLOURS = {"closed": "green", "half_open": "yellow", "open": "red", "killed": "red", "stopped": "yellow"}


class Screen(AbstractContextManager["Screen"], Protocol):
    """Shows the frames of one run.

    Attributes:
        every: seconds between two frames.
    """

    every: float

    def show(self, frame: Frame) -> None:
        """Show a frame."""


class Silence:
    """Shows nothing."""

    every = 60.0

    def show(self, frame: Frame) -> None:
        """See `Screen`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves nothing behind."""


class Lines(Silence):
    """A few lines for every frame, for logs and pipes."""

    every = 0.5

    def __init__(self) -> None:
        self._title = ""
        self._told = 0

    def show(self, frame: Frame) -> None:
        """See `Screen`."""
        lines = [f"  {event}" for event in frame.events[self._told :]]
        self._told = len(frame.events)
        if frame.title != self._title:
            self._title = frame.title
            lines[:0] = ["", frame.title, _line(HEADINGS)]
        lines += [_line(cells(row)) for row in frame.rows]
        print(*lines, whole(frame), sep="\n", flush=True)


class Table:
    """A table that is drawn anew in its place, by rich."""

    every = 0.1

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(), auto_refresh=False)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._live)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def show(self, frame: Frame) -> None:
        """See `Screen`."""
        self._live.update(_drawn(frame), refresh=True)


def screen(*, is_silent: bool) -> Screen:
    """The screen for a run, by what standard output is."""
    if is_silent:
        return Silence()
    return Table() if can_draw() else Lines()


def can_draw() -> bool:
    """Whether standard output is a terminal, and rich is there to draw on it."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and find_spec("rich") is not None


def cells(row: Row) -> tuple[str, ...]:
    """A row in words, one for each of the headings."""
    return (
        row.endpoint,
        row.state or "-",
        row.process,
        "-" if row.in_flight is None else str(row.in_flight),
        f"{row.calls:,}",
        f"{row.failures:,}",
        _milliseconds(row.p50),
        _milliseconds(row.p99),
    )


def whole(frame: Frame) -> str:
    """The line for the whole of a run."""
    line = f"{frame.seconds:4.1f} s: {frame.calls:,} of {frame.of:,} calls done, {frame.failed:,} failed"
    if frame.retries is None or frame.tokens is None:
        return line
    return f"{line}, {frame.retries:,} retries, {frame.tokens:.0f} budget tokens"


def aligned(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str]) -> list[str]:
    """Lines of a table, for where nothing can be drawn.

    Args:
        headings: of the columns.
        rows: with a word for each of them.
        numbers: headings of the columns that stand on the right.
    """
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(_padded, words, widths, (name in numbers for name in headings))).rstrip() for words in lines]


def _padded(word: str, width: int, is_number: bool) -> str:
    return word.rjust(width) if is_number else word.ljust(width)


def _line(words: tuple[str, ...]) -> str:
    left = (word.ljust(width) for word, width in zip(words[:3], _WIDTHS[:3], strict=True))
    right = (word.rjust(width) for word, width in zip(words[3:], _WIDTHS[3:], strict=True))
    return "  ".join([*left, *right])


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f}"


def _drawn(frame: Frame) -> Group:
    from rich.console import Group
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="underline")
    for position, heading in enumerate(HEADINGS):
        grid.add_column(heading, justify="right" if position > 2 else "left", min_width=_WIDTHS[position])
    for row in frame.rows:
        grid.add_row(*(Text(word, _COLOURS.get(word, "")) for word in cells(row)))
    # Always as many lines, so that what stands below does not jump.
    events = [*frame.events[-SHOWN_EVENTS:], *[""] * (SHOWN_EVENTS - len(frame.events))]
    return Group(Text(frame.title, "bold"), grid, Text(whole(frame)), *(Text(f"  {event}", "dim") for event in events))
