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
from scraped import Workers

from components.absence import demanded
from components.prometheus import Prometheus, program, promtool
from meshlib.cli.faults import Stage, Step
from meshlib.testing import upstreams

pytestmark = pytest.mark.once

FOLDER = Path(__file__).parents[2] / "docs" / "observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
ALERTS = FOLDER / "alerts.yml"
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
RULES = re.findall(r"expr: (?:[|]\n((?: {10}.*\n)+)|(.+))", ALERTS.read_text(encoding="utf-8"))
WORDS = set(
    re.findall(r"\w+", "and avg avg_over_time by count group_left histogram_quantile increase max min on or rate sum")
)
"""PromQL's own, as far as it is used."""

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
        self._search, self._even, self._odd, self._gone = stack.enter_context(upstreams(4))
        self._users = stack.enter_context(upstreams(2, delay=0.08))

    @property
    def places(self) -> dict[str, list[str]]:
        told = {"orders": self._orders, "search": [self._search], "users": self._users}
        told |= {"mail": [self._even, self._odd], "bills": [self._even, self._gone]}
        told |= {"stock": [self._even], "parts": [self._even], "rates": self._users}
        return {service: [each.address for each in each_of] for service, each_of in told.items()}

    def trouble(self) -> None:
        """Have one of `orders` killed and one stopped, as in the demo, and the last answer with 503; and more."""
        stage = Stage(self._orders)
        stage.perform(Step(0, "kill"))
        stage.perform(Step(0, "stop"))
        self._orders[2].script(then={"status": 503})
        self._search.script(then={"status": 429})
        # A kept connection that dies at the request costs an attempt of its own; the answer to that breaks off. The
        # rest is what is retried and failed over for as long as the test lasts: the first burst may be over before a
        # scrape has seen the series that it begins, and then no rate shows it.
        self._odd.script(*[{}, {"fault": "close"}, {"fault": "cut"}, {"status": 503}] * 1000)
        self._gone.kill()


@contextmanager
def checkout(places: dict[str, list[str]], *arguments: str) -> Iterator[int]:
    """The program, and the port that it is scraped at."""
    command = [sys.executable, str(Path(__file__).with_name("checkout.py")), json.dumps(places), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait until it is so; the test goes on to say what is not, if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.5)


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

        unseen = set(QUERIES)

        def all_were_seen() -> bool:
            unseen.difference_update({name for name in unseen if shows(prometheus, QUERIES[name], started)})
            return not unseen

        wait_until(lambda: firing(prometheus, started) >= EXPECTED)
        wait_until(all_were_seen)
        assert firing(prometheus, started) >= EXPECTED
        assert unseen == set()
        assert len(prometheus.during('service:meshlib_workers:count{job="well"}', started, time.time())) == 8
        assert prometheus.during('ALERTS{job!="troubled"}', started, time.time()) == []
        said = [(each["labels"]["server_address"], str(each["annotations"])) for each in prometheus.alerts()]
        assert [text for service, text in said if service not in text or "<error" in text] == []
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


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert DASHBOARD["schemaVersion"] >= 38
    assert set(VARIABLES) == {"datasource", "job", "service"}
    for asking in [*PANELS, VARIABLES["job"], VARIABLES["service"]]:
        assert asking["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == grouped - {"le"}, panel["title"]
            assert target["expr"].count("{") == target["expr"].count('{job=~"$job", server_address=~"$service"')


def test_no_panel_hides_another() -> None:
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_page_tells_of_each_alert_what_it_is() -> None:
    page = FOLDER.with_suffix(".md").read_text(encoding="utf-8")
    rules = re.findall(
        r"alert: (\w+)\n.*?for: (\d+)m\n.*?severity: (\w+)", ALERTS.read_text(encoding="utf-8"), re.DOTALL
    )
    told = re.findall(r"^\| `(\w+)` \| .*for (\d+) minutes? \| (\w+) \|$", page, re.MULTILINE)
    assert sorted(told) == sorted(rules)
    assert set(re.findall(r"^### (\w+)$", page, re.MULTILINE)) == {alert for alert, _, _ in rules}
    named = re.findall(r'"([A-Z][^"]+)"', re.sub(r"```.*?```", "", page, flags=re.DOTALL) + ALERTS.read_text("utf-8"))
    assert {" ".join(name.split()) for name in named} <= {panel["title"] for panel in PANELS}


def test_the_rules_and_the_dashboard_speak_of_what_meshlib_exports() -> None:
    queries = [*QUERIES.values(), VARIABLES["job"]["definition"], VARIABLES["service"]["definition"]]
    queries += [block or line for block, line in RULES]
    used = {word for query in queries for word in names_in(query)}
    with ExitStack() as stack:
        fleet = Fleet(stack)
        port = stack.enter_context(checkout(fleet.places, "astray"))
        fleet.trouble()
        wait_until(lambda: used <= known(exported(port)))
        told = exported(port)
    assert used - known(told) == set()
    for query in queries:
        for metric, selected in re.findall(r"(\w+){([^}]*)}", query):
            assert set(re.findall(r"(\w+) ?(?:=~|!~|!=|=)", selected)) <= told[metric] | {"job"}, query
    assert set(re.findall(r"[$]labels[.](\w+)", ALERTS.read_text(encoding="utf-8"))) <= known(told)


def names_in(query: str) -> set[str]:
    """Metrics and labels of a query, but those that a rule has recorded."""
    bare = re.sub(r'"[^"]*"|\[[^]]*\]|label_values', " ", query)
    return {word for word in re.findall(r"[a-z_][\w:]*", bare) if ":" not in word} - WORDS


def exported(port: int) -> dict[str, set[str]]:
    """The labels of each metric that the process tells."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+){(.*)} ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def known(told: dict[str, set[str]]) -> set[str]:
    """All names there are; Prometheus itself adds two labels."""
    return {"job", "instance", *told, *(label for labels in told.values() for label in labels)}


@pytest.mark.component
def test_the_alerts_hold_for_one_worker_and_for_fifty(tmp_path: Path) -> None:
    demanded("Prometheus", program)
    assert "12 rules found" in promtool("check", "rules", ALERTS)
    cases = [case for count in (1, 50) for case in situations(Workers(count))]
    (tmp_path / "cases.yml").write_text(json.dumps({"rule_files": [str(ALERTS)], "tests": cases}))
    promtool("test", "rules", tmp_path / "cases.yml")


def situations(workers: Workers) -> Iterator[dict[str, Any]]:
    """What may happen, and which alerts there are after half an hour of it."""
    busy, is_alone = workers.calls(60), workers.count == 1
    ejected = {"meshlib_endpoint_state": "open"}
    yield workers.case("all is well", busy, workers.gauge("meshlib_endpoints", 3, meshlib_endpoint_state="closed"))
    yield workers.case(
        "one endpoint is out", busy, workers.gauge("meshlib_endpoints", 1, **ejected), alerts={"MeshEndpointOut"}
    )
    yield workers.case(
        "one endpoint is out, at the first worker alone",
        busy,
        workers.gauge("meshlib_endpoints", 1, only=1, **ejected),
        alerts={"MeshEndpointOut"} if is_alone else set(),
    )
    yield workers.case(
        "three endpoints restart, one after the other",
        busy,
        workers.series("meshlib_endpoints", "0x20 1x2 0x40", **ejected),
    )
    yield workers.case("all is lost", busy, workers.gauge("meshlib_panic", 1), alerts={"MeshPanic"})
    yield workers.case(
        "the first worker has lost all",
        busy,
        workers.gauge("meshlib_panic", 1, only=1),
        workers.ended(60, only=1, meshlib_call_outcome="not_sent"),
        workers.ended(60, after=1, meshlib_call_outcome="ok"),
        alerts={"MeshPanic", "MeshServiceFailing"} if is_alone else set(),
    )
    yield workers.case(
        "nobody has called since all was lost",
        workers.calls(0),
        workers.gauge("meshlib_panic", 1),
        workers.gauge("meshlib_endpoints", 3, **ejected),
    )
    yield workers.case(
        "all but the first worker have been silent since they lost all",
        workers.calls(60, only=1),
        workers.gauge("meshlib_panic", 1, after=1),
        workers.gauge("meshlib_endpoints", 3, after=1, **ejected),
    )
    by = {"meshlib_ejection_method": "consecutive", "meshlib_enforced": "true"}
    yield workers.case(
        "endpoints are ejected now and then", busy, workers.series("meshlib_ejections_total", "0+0.9x60", **by)
    )
    yield workers.case(
        "endpoints are ejected all the time",
        busy,
        workers.series("meshlib_ejections_total", "0+2x60", **by),
        alerts={"MeshEndpointFlapping"},
    )
    unpaid = {"meshlib_retry_decision": "no_budget"}
    yield workers.case(
        "retries are not paid for",
        busy,
        workers.series("meshlib_retry_decisions_total", "0+6x60", **unpaid),
        alerts={"MeshRetryBudgetExhausted"},
    )
    yield workers.case(
        "retries follow",
        busy,
        workers.series("meshlib_retry_decisions_total", "0+6x60", meshlib_retry_decision="retried"),
    )
    yield workers.case(
        "one call in ten fails",
        busy,
        workers.ended(54, meshlib_call_outcome="ok"),
        workers.ended(6, meshlib_call_outcome="rejected"),
        alerts={"MeshServiceFailing"},
    )
    yield workers.case(
        "callers give up, and get what they should not have asked for",
        busy,
        workers.ended(30, meshlib_call_outcome="abandoned", error_type="cancelled"),
        workers.ended(30, meshlib_call_outcome="ok", error_type="404"),
    )
    yield workers.case(
        "callers run out of time",
        busy,
        workers.ended(60, meshlib_call_outcome="abandoned", error_type="deadline"),
        alerts={"MeshServiceFailing"},
    )
    yield workers.case(
        "all of very few calls fail", workers.calls(1, only=1), workers.ended(1, only=1, meshlib_call_outcome="failed")
    )
    yield workers.case(
        "the first worker hears nothing from its resolver",
        busy,
        workers.series("meshlib_resolver_staleness_seconds", "0+60x60", only=1),
        alerts={"MeshDiscoveryStale"},
    )
    failed = {"meshlib_resolver_result": "failed"}
    nobody = workers.gauge("meshlib_endpoints", 0, only=1, meshlib_endpoint_state="closed")
    yield workers.case(
        "nobody has asked for endpoints", nobody, workers.gauge("meshlib_resolver_updates_total", 0, **failed)
    )
    yield workers.case(
        "the first worker has never heard of endpoints",
        nobody,
        workers.series("meshlib_resolver_updates_total", "0+6x60", only=1, **failed),
        alerts={"MeshNoEndpoints"},
    )
    refused = {"meshlib_refused_by": "throttle", "meshlib_enforced": "true"}
    would = {**refused, "meshlib_enforced": "false"}
    yield workers.case(
        "the throttle refuses a tenth",
        busy,
        workers.series("meshlib_refused_calls_total", "0+7x60", **refused),
        alerts={"MeshCallsRefused"},
    )
    yield workers.case(
        "the throttle would refuse", busy, workers.series("meshlib_refused_calls_total", "0+7x60", **would)
    )
