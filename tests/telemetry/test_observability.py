"""The dashboard and the alerts of the documentation: made of what meshlib tells, and right about what happens."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.absence import demanded
from components.prometheus import Prometheus, program, promtool
from meshlib.cli.faults import Stage, Step
from meshlib.testing import Upstream, upstreams

pytestmark = pytest.mark.once

FOLDER = Path(__file__).parents[2] / "docs" / "observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
ALERTS = FOLDER / "alerts.yml"
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
QUERIES = {
    f"{panel['title']} {target['refId']}": str(target["expr"]) for panel in PANELS for target in panel["targets"]
}

PATIENCE = 40.0
"""Seconds for all of it to show: a few scrapes, on a machine that has much else to do."""

EXPECTED = {
    ("MeshServiceFailing", "orders"),
    ("MeshServiceFailing", "search"),
    ("MeshServiceFailing", "parts"),
    ("MeshPanic", "orders"),
    ("MeshEndpointOut", "orders"),
    ("MeshEndpointFlapping", "mail"),
    ("MeshRetryBudgetExhausted", "orders"),
    ("MeshCallsRefused", "search"),
    ("MeshDiscoveryStale", "stock"),
    ("MeshNoEndpoints", "parts"),
}
"""What fires at least: the faults of `Fleet.trouble` and of `checkout.py`, by alert and service."""


class Fleet:
    """Upstreams for every service of `checkout.py`, and what is done to them."""

    def __init__(self, stack: ExitStack) -> None:
        self._orders = stack.enter_context(upstreams(3))
        self._search, self._even, self._odd = stack.enter_context(upstreams(3))
        self._users = stack.enter_context(upstreams(2, delay=0.08))

    @property
    def places(self) -> dict[str, list[str]]:
        told = {"orders": self._orders, "search": [self._search], "users": self._users, "mail": [self._even, self._odd]}
        told |= {"stock": [self._even], "parts": [self._even], "rates": self._users}
        return {service: [each.address for each in each_of] for service, each_of in told.items()}

    def trouble(self) -> None:
        """Have one of `orders` killed and one stopped, as in the demo, and the last answer with 503; and more."""
        stage = Stage(self._orders)
        stage.perform(Step(0, "kill"))
        stage.perform(Step(0, "stop"))
        self._orders[2].script(then={"status": 503})
        self._search.script(then={"status": 429})
        # A kept connection that dies at the request costs an attempt of its own; the answer to that breaks off.
        self._odd.script(*[{}, {"fault": "close"}, {"fault": "cut"}] * 1000)


@contextmanager
def checkout(places: dict[str, list[str]], *arguments: str) -> Iterator[int]:
    """The program, and the port that it is scraped at."""
    command = [sys.executable, str(Path(__file__).with_name("checkout.py")), json.dumps(places), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait until it is so; the test goes on to say what is not, if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.3)


def asked(query: str) -> str:
    """A query as Grafana asks it."""
    for name, value in (("$__rate_interval", "15s"), ("$job", "troubled"), ("$service", ".*")):
        query = query.replace(name, value)
    assert "$" not in query
    return query


@pytest.mark.component
def test_a_real_prometheus_sees_every_fault_and_none_where_all_is_well(tmp_path: Path) -> None:
    """Two processes are scraped: one whose services are well, and one that meets every fault."""
    demanded("Prometheus", program)
    rules = tmp_path / "alerts.yml"
    rules.write_text(re.sub(r"\bfor: \w+", "for: 1s", ALERTS.read_text(encoding="utf-8")))
    with ExitStack() as stack:
        well, troubled = Fleet(stack), Fleet(stack)
        targets = {
            "well": stack.enter_context(checkout(well.places)),
            "troubled": stack.enter_context(checkout(troubled.places, "astray")),
        }
        prometheus = stack.enter_context(Prometheus(tmp_path, targets, [rules]))
        started = time.time()
        troubled.trouble()

        def shown() -> dict[str, bool]:
            return {name: shows(prometheus, query, started) for name, query in QUERIES.items()}

        wait_until(lambda: firing(prometheus, started) >= EXPECTED and all(shown().values()))
        assert firing(prometheus, started) >= EXPECTED
        assert [name for name, is_shown in shown().items() if not is_shown] == []
        assert {service for _, service in EXPECTED} <= set(prometheus.ask("label/server_address/values"))
        assert prometheus.during('ALERTS{job!="troubled"}', started, time.time()) == []
        assert all(each["labels"]["server_address"] in str(each["annotations"]) for each in prometheus.alerts())
        listed = prometheus.ask("rules")["groups"][0]["rules"]
        assert [rule["name"] for rule in listed if rule["health"] != "ok"] == []
        assert {rule["name"] for rule in listed if rule["type"] == "alerting"} == {alert for alert, _ in EXPECTED}
        assert recorded_without_data(prometheus, listed, started) == []


def firing(prometheus: Prometheus, started: float) -> set[tuple[str, str]]:
    """What has fired so far of the process in trouble."""
    found = prometheus.during('ALERTS{job="troubled", alertstate="firing"}', started, time.time())
    return {(labels["alertname"], labels["server_address"]) for labels, _ in found}


def shows(prometheus: Prometheus, query: str, started: float) -> bool:
    """Whether there was anything to see: a number that is not 0."""
    found = prometheus.during(asked(query), started, time.time())
    return any(math.isfinite(value) and value > 0 for _, values in found for value in values)


def recorded_without_data(prometheus: Prometheus, rules: list[dict[str, Any]], started: float) -> list[str]:
    names = [rule["name"] for rule in rules if rule["type"] == "recording"]
    assert len(names) > 2
    return [name for name in names if not shows(prometheus, f'{name}{{job="troubled"}}', started)]
