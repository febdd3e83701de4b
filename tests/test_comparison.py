"""The comparison with a sidecar says what its figures say. No Envoy is needed, and nobody's speed is looked at."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from meshlib import Breaker, Retry

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
TURN = {"round": 0, "fault": "none", "failed": 0, "slow": 0, "p99": 0.1, "client": 700e-6, "sidecar": 0.0}


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[Callable[[str], Any]]:
    """Imports a module of the benchmarks."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def turns(**meshed: Any) -> list[dict[str, Any]]:
    """A round in which meshlib is exactly as good as it has to be, but for what is given."""
    envoy = {"failed": 2, "slow": 16, "sidecar": 100e-6}
    return [
        {**TURN, "who": "httpx"},
        {**TURN, "who": "httpx and Envoy", **envoy},
        {**TURN, "who": "meshlib", "failed": 2, "slow": 16, "client": 734.9e-6, **meshed},
    ]


@pytest.mark.parametrize(
    ("meshed", "verdict"),
    [
        ({}, "ok"),
        ({"failed": 3}, "over: failed"),
        ({"slow": 17}, "over: slow"),
        ({"client": 735.1e-6}, "over: CPU"),
        ({"client": 300e-6}, "ok"),
        ({"failed": 3, "slow": 17}, "over: failed, slow"),
    ],
)
def test_who_is_behind_is_said(benchmarks: Callable[[str], Any], meshed: dict[str, Any], verdict: str) -> None:
    _, row = benchmarks("standings").verdicts(turns(**meshed))
    assert row[-1] == verdict


def test_one_failed_call_in_one_of_many_rounds_is_told(benchmarks: Callable[[str], Any]) -> None:
    many = [{**turn, "round": number, "failed": 0} for number in range(3) for turn in turns()]
    many[-1]["failed"] = 1
    standings = benchmarks("standings")
    assert [row[2] for row in standings.rows(many)] == ["failed", "0", "0", "1"]
    assert list(standings.verdicts(many))[1][1:] == ["1 / 0", "16 / 16", "35 / 100", "0.35", "over: failed"]


def test_the_page_shows_the_tables_of_its_results(benchmarks: Callable[[str], Any]) -> None:
    comparison = benchmarks("comparison")
    page, results = comparison.PAGE.read_text(encoding="utf-8"), json.loads(comparison.RESULTS.read_bytes())
    assert comparison.renewed(page, results) == page
    assert {turn["fault"] for turn in results["turns"]} == {"none", "kill", "hang", "503"}
    with pytest.raises(ValueError, match="no place for tables"):
        comparison.renewed("a page", results)


def test_envoy_is_given_what_the_mesh_has_by_default(benchmarks: Callable[[str], Any]) -> None:
    told = json.loads(json.dumps(benchmarks("sidecar").bootstrap(["127.0.0.1:7001", "127.0.0.1:7002"])))
    [cluster], [listener] = (told["static_resources"][kind] for kind in ("clusters", "listeners"))
    [endpoints] = cluster["load_assignment"]["endpoints"]
    ports = [each["endpoint"]["address"]["socket_address"]["port_value"] for each in endpoints["lb_endpoints"]]
    assert ports == [7001, 7002]
    outliers, breaker = cluster["outlier_detection"], Breaker()
    assert outliers["consecutive_5xx"] == breaker.consecutive
    assert outliers["base_ejection_time"] == f"{breaker.open_for:g}s"
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    route = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    assert route["cluster"] == cluster["name"]
    assert route["timeout"] == "5s"
    assert route["retry_policy"]["per_try_timeout"] == "0.5s"
    assert route["retry_policy"]["num_retries"] == Retry().max_attempts - 1


def test_a_turn_counts_failed_calls_from_half_way_on(
    no_leaks: None, benchmarks: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = benchmarks("comparison")
    monkeypatch.setattr(comparison, "WARM_UP", comparison.CONCURRENCY)

    @contextlib.asynccontextmanager
    async def to_the_one_that_breaks(addresses: Sequence[str]) -> AsyncIterator[Any]:
        async with comparison.plain(addresses[1:]) as caller:
            yield caller

    calls, at_a_time = 96, comparison.CONCURRENCY
    told = comparison.turn(to_the_one_that_breaks, "503", calls)
    # Of those that were begun sooner, some may not have arrived by then.
    assert calls // 2 <= told["failed"] < calls // 2 + at_a_time
    assert told["client"] > 0
    assert comparison.turn(comparison.meshed, "kill", calls)["failed"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads another process's clock as Linux numbers it")
def test_the_cpu_time_of_a_sidecar_is_its_own(benchmarks: Callable[[str], Any]) -> None:
    burn = "import time\nwhile (burned := time.process_time()) < 0.1: pass\nprint(burned, flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", burn], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        burned = float(process.stdout.readline())
        read = benchmarks("sidecar").Sidecar("", process.pid).cpu_seconds()
        process.communicate("\n")
    assert burned <= read < burned + 0.1


def test_without_an_envoy_that_is_what_is_said(
    benchmarks: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = benchmarks("comparison")
    monkeypatch.setattr(sys, "argv", ["comparison.py"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="nothing to compare with: Envoy is not installed"):
        comparison.main()
