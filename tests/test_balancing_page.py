"""What the page on balancing shows works as it says."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "balancing.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_balancer_of_ones_own_and_its_test_run() -> None:
    [block] = re.findall(r"```python\n(.*?)```", section("A balancer of your own"), re.DOTALL)
    assert block.count("assert") == 3
    exec(compile(block, "balancing.md", "exec", dont_inherit=True), {"__name__": "balancing_page"})


def test_the_chart_shows_what_the_table_says() -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in section("How they compare").splitlines()]
    p99 = [row[4] for row in rows if len(row) > 6 and row[4].isdigit()]
    assert len(p99) == 24
    chart = (DOCS / "balancing.svg").read_text(encoding="utf-8")
    drawn = re.findall(r">(\d+)</text>", chart)
    assert [figure for figure in drawn if figure in p99][-24:] == p99, "they were not made together"
    assert len(chart) < 60_000
