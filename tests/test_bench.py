"""The benchmarks run and tell every figure. What the figures are is not looked at here: tests share their machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.once

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ("--calls", "50", "--rounds", "1", "--seconds", "0.01")

PROMISED = {
    "calls": {f"calls: c={count}: meshed / httpx" for count in (1, 20, 100, 500)},
    "flatness": {"flatness: c=500 / c=1", *(f"flatness: {count} / 1 endpoints" for count in (10, 100, 1000))},
    "threads": {"threads: 1: meshed / httpx", "threads: 20: meshed / httpx"},
    "tax": {"tax: sync", "tax: async"},
    "telemetry": {
        f"telemetry: {colour}: {what}"
        for colour in ("sync", "async")
        for what in ("nothing configured", "both histograms", "attempts alone")
    },
    "parts": {"parts: exchange", "parts: reply", "parts: connection, sync", "parts: connection, async"},
    "picks": {f"pick: {count} endpoints" for count in (3, 1000, 10000)},
    "imports": {"imports: meshlib / httpx"},
}


def run(*arguments: str, program: str = "run.main()") -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import run; {program}"
    command = [sys.executable, "-c", start, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def results(path: Path, *arguments: str) -> Any:
    done = run(*arguments, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("section", PROMISED)
def test_every_figure_of_a_section_is_there(section: str, tmp_path: Path) -> None:
    told = results(tmp_path / "results.json", *TINY, "--only", section)["figures"]
    assert PROMISED[section] <= {figure["name"] for figure in told}
    # These are differences: a mesh's client is cheaper than httpx's in some respects, and being seen may cost nothing.
    differences = PROMISED["tax"] | {figure["name"] for figure in told if section == "telemetry"}
    assert [figure for figure in told if not figure["value"] > 0 and figure["name"] not in differences] == []


def test_every_bar_belongs_to_a_figure_that_is_measured() -> None:
    done = run(program="import figure; print('\\n'.join(figure.BARS))")
    assert set(done.stdout.splitlines()) <= set().union(*PROMISED.values())


def test_the_results_tell_the_machine_and_name_nobody(tmp_path: Path) -> None:
    told = results(tmp_path / "results.json", *TINY, "--only", "picks")
    assert told["machine"].keys() == {"cpu", "cores", "system", "python"}
    assert {"meshlib-http", "httpx", "httpcore"} <= told["versions"].keys()
    assert told["subject"].keys() == {"balancer", "histogram"}


def test_a_slow_figure_is_a_word_in_the_table_and_no_failure() -> None:
    slow = "import figure; figure.BARS['pick: 3 endpoints'] = (1e-9, 1e-9); run.main()"
    done = run(*TINY, "--only", "picks", program=slow)
    assert done.returncode == 0
    assert next(line for line in done.stdout.splitlines() if line.startswith("pick: 3 ")).endswith("over")


def test_an_answer_that_is_not_the_upstreams_is_a_failure() -> None:
    done = run(*TINY, "--only", "threads", program="import upstream; upstream.BODY = b'other'; run.main()")
    assert done.returncode != 0
    assert "WrongAnswer: status 200" in done.stderr
