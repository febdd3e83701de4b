"""How the answer of a resolver is shown: a table, drawn by rich on a terminal and in plain lines elsewhere, or JSON.

Decides the columns and the words. What is found comes from outside: none of it may move the cursor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from meshlib.cli.screen import aligned, can_draw
from meshlib.discovery.resolver import Resolution
from meshlib.endpoint import Endpoint
from meshlib.plain import printable

HEADINGS = ("place", "priority", "weight", "zone", "metadata")
_NUMBERS = ("priority", "weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one question led to.

    Attributes:
        at: seconds from the start to the answer.
        took: seconds that the answer took.
        answer: None where there is none.
        error: why there is none.
    """

    at: float
    took: float
    answer: Resolution | None
    error: str = ""

    @property
    def news(self) -> object:
        """What differs from the finding before if there is something to show."""
        return (frozenset(self.answer.endpoints), self.answer.warnings) if self.answer else self.error


def shown_as(source: str, *, wants_json: bool, is_watching: bool) -> Callable[[Finding], None]:
    """What shows the findings of a resolver.

    Args:
        source: of the resolver.
        wants_json: JSON, for programs, instead of tables.
        is_watching: there is more to come.
    """
    if wants_json:
        return lambda finding: _show_json(source, finding, is_watching=is_watching)
    return lambda finding: _show(source, finding, is_watching=is_watching)


def _show_json(source: str, finding: Finding, *, is_watching: bool) -> None:
    if is_watching:
        print(json.dumps({"at": round(finding.at, 3), **_document(source, finding)}, default=str), flush=True)
    elif finding.answer is not None:
        print(json.dumps(_document(source, finding), indent=2, default=str), flush=True)
    else:
        print(f"meshlib resolve: {printable(finding.error)}", file=sys.stderr)


def _document(source: str, finding: Finding) -> dict[str, Any]:
    document: dict[str, Any] = {"source": source, "seconds": round(finding.took, 6)}
    if (answer := finding.answer) is None:
        return {**document, "error": finding.error}
    return {
        **document,
        "ttl": answer.ttl,
        "index": _index(answer),
        "warnings": list(answer.warnings),
        "endpoints": [
            {
                "host": endpoint.host,
                "port": endpoint.port,
                "weight": endpoint.weight,
                "priority": endpoint.priority,
                "zone": endpoint.zone,
                "metadata": dict(endpoint.metadata),
            }
            for endpoint in answer.endpoints
        ],
    }


def _show(source: str, finding: Finding, *, is_watching: bool) -> None:
    when = f"{finding.at:.1f} s: " if is_watching else ""
    if (answer := finding.answer) is None:
        sys.stdout.flush()
        print(f"meshlib resolve: {when}{printable(finding.error)}", file=sys.stderr, flush=True)
        return
    rows = [_cells(endpoint) for endpoint in answer.endpoints]
    if rows and can_draw():
        _draw(rows)
    elif rows:
        print(*aligned(HEADINGS, rows, _NUMBERS), sep="\n")
    for warning in answer.warnings:
        print(f"warning: {printable(warning)}")
    print(f"{when}{_summary(source, finding.took, answer)}", *([""] if is_watching else []), sep="\n", flush=True)


def _cells(endpoint: Endpoint) -> tuple[str, ...]:
    metadata = " ".join(f"{name}={value}" for name, value in endpoint.metadata.items())
    words = (str(endpoint), str(endpoint.priority), f"{endpoint.weight:g}", endpoint.zone, metadata)
    return tuple(map(printable, words))


def _summary(source: str, took: float, answer: Resolution) -> str:
    count = len(answer.endpoints)
    words = [f"{count or 'no'} endpoint{'s' * (count != 1)} from {printable(source)}"]
    words.append("waits for changes" if answer.ttl is None else f"ttl {answer.ttl:g} s")
    if (index := _index(answer)) is not None:
        words.append(f"index {printable(str(index))}")
    return "; ".join([*words, f"took {took * 1000:.1f} ms"])


def _index(answer: Resolution) -> int | str | None:
    """The index where it says something to people; otherwise it is the resolver's own business."""
    return answer.index if isinstance(answer.index, int | str) else None


def _draw(rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="underline")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
