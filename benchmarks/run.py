"""The benchmarks: prints the figures that meshlib promises to hold, each beside its bar (docs/design.md).

The rule: ratios are compared, never absolute times. A microsecond here is another one there; what a meshed call costs
beside a plain one, in the same process and the same minute, holds on every machine. The figures that are microseconds
by their nature (the tax, the parts, the pick) are to be compared within one run.

Decides which sections run and how long. A slow figure is no failure; an answer that is not the upstream's is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from figure import Figure, table
from machine import described
from paired import Sizes
from subject import SUBJECT

SECTIONS = ("calls", "flatness", "threads", "tax", "telemetry", "parts", "picks", "imports")
RULE = "Ratios of CPU time of the client process, paired within rounds. Compare ratios, never absolute times."


def main() -> None:
    """Measure, print, and write the results if asked to."""
    options = _options()
    sizes = Sizes(options.rounds, options.seconds, options.calls, options.quick)
    start, found = time.monotonic(), []
    print(RULE, end="\n\n")
    for line in table(_kept(_figures(options.only or SECTIONS, sizes), found)):
        print(line, flush=True)
    print(f"\n{time.monotonic() - start:.0f} s")
    if options.json is not None:
        results = {"rule": RULE, **described(), "subject": SUBJECT.described(), "figures": found}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Print the figures that meshlib promises to hold.")
    parser.add_argument("--quick", action="store_true", help="about a minute: short turns, and one figure less")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--rounds", type=int, help="turns of every contestant (9; quick: 3)")
    parser.add_argument("--seconds", type=float, help="CPU time of a turn (1.0; quick: 0.1)")
    parser.add_argument("--calls", type=int, default=sys.maxsize, help="at most so many calls in a turn")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.seconds = options.seconds or (0.1 if options.quick else 1.0)
    return options


def _figures(sections: Iterable[str], sizes: Sizes) -> Iterator[Figure]:
    for section in sections:
        yield from importlib.import_module(section).figures(sizes)


def _kept(figures: Iterable[Figure], found: list[dict[str, object]]) -> Iterator[Figure]:
    for figure in figures:
        found.append(figure.to_dict())
        yield figure


if __name__ == "__main__":
    main()
