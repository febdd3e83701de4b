"""The metrics: which there are, what is on them, and that they are as few as their page says (rule T1)."""

from __future__ import annotations

import gc
import os
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.metrics import MeterProvider, NoOpMeterProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.metrics import http_metrics
from opentelemetry.trace import NoOpTracerProvider
from seen import Seen

from conftest import Colour
from meshes import get_or_error, refusing
from meshlib import Breaker, ConfigError, Endpoint, HealthCheck, Hedge, Limit, Mesh, Retry, Service
from meshlib.core.cluster import Cluster
from meshlib.core.tally import Decision
from meshlib.discovery import Resolution
from meshlib.telemetry.words import ERRORS
from meshlib.testing import Upstream

PAGE = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text(encoding="utf-8")

CONVENTIONAL = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)


@pytest.fixture
def seen() -> Seen:
    return Seen()


def table(name: str) -> list[list[str]]:
    """The rows of a table of the page."""
    lines = PAGE.partition(f"<!-- {name} -->\n")[2].splitlines()
    rows = [line.strip("|").split("|") for line in lines[: lines.index("")]]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def words(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


class Found:
    """A resolver with one answer."""

    def __init__(self, *fleet: Upstream) -> None:
        self._endpoints = [Endpoint.parse(each.address) for each in fleet]

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        return Resolution(self._endpoints, 60.0)


def test_T1_the_page_lists_every_metric_with_its_unit_and_attributes(
    two: list[Upstream], seen: Seen, no_leaks: None
) -> None:
    """Calls in which everything happens that a metric is about."""
    checked = Service("orders", Found(*two), health=HealthCheck("/"), limit=Limit(100))
    with Mesh(checked, **seen.told_to({"endpoint_attributes": True})) as mesh, mesh.client("orders") as client:
        client.get("/", extensions={"meshlib": {"url_template": "/{all}"}})
        two[0].script({"fault": "close"})
        two[1].script({"fault": "close"})
        client.get("/")  # a transparent one
        until = time.monotonic() + 5
        while not seen.value("meshlib.health_checks", meshlib__check__result="passed") and time.monotonic() < until:
            time.sleep(0.02)
        metrics = seen.metrics()
    two[0].script({"status": 503}, {"status": 503}, {"status": 404}, {"delay": 2.0})
    with (
        refusing() as address,
        seen.mesh(address, two[0], retry=Retry(wait=lambda state: 0.01)).client("orders") as client,
        (here := seen.mesh(*two, hedge=Hedge(after=0.05))).client("orders") as hedged,
    ):
        here.register("shop", port=1)
        client.get("/")  # a failover, and retries after a while
        client.get("/")
        hedged.get("/")
        metrics |= seen.metrics()
    told = {
        name: (metric.unit, {key for point in metric.data.data_points for key in point.attributes})
        for name, metric in metrics.items()
    }
    listed = {row[0].strip("`"): (row[1].strip("`"), words(row[2])) for row in table("recorded") + table("observed")}
    assert told == listed


def test_T1_the_words_of_the_page_are_those_there_are() -> None:
    assert [row[0].strip("`") for row in table("errors")] == list(ERRORS)
    assert [row[1] for row in table("errors")] == list(ERRORS.values())
    assert [row[0].strip("`") for row in table("decisions")] == list(Decision.__args__)  # type: ignore[attr-defined]


def test_T1_the_page_lists_what_is_on_a_span(two: list[Upstream], seen: Seen) -> None:
    two[0].script({"status": 503})
    with seen.mesh(*two).client("orders") as client:
        client.get("/5", extensions={"meshlib": {"url_template": "/{number}"}})
        two[1].script({"status": 503}, {"status": 503})
        two[0].script({"status": 503}, {"status": 503})
        client.get("/")
    on = {
        "call": {key for span in seen.calls for key in span.attributes or {}},
        "attempt": {key for span in seen.attempts for key in span.attributes or {}},
    }
    rows = {row[0].strip("`"): row[1] for row in table("spans")}
    for where, attributes in on.items():
        assert attributes == {name for name, said in rows.items() if said in ("both", where)}


def test_T1_a_call_with_one_attempt_is_recorded_twice(colour: Colour, two: list[Upstream], seen: Seen) -> None:
    colour.run(seen.mesh(two[0]), get_or_error)
    common = {"server.address": "orders", "url.scheme": "http", "http.request.method": "GET"}
    common |= {"http.response.status_code": 200}
    [(attributes, attempt)] = seen.points("http.client.request.duration")
    assert attributes == common
    assert (attempt.count, tuple(attempt.explicit_bounds)) == (1, CONVENTIONAL)
    [(attributes, call)] = seen.points("meshlib.client.call.duration")
    assert attributes == {**common, "meshlib.call.outcome": "ok"}
    assert tuple(call.explicit_bounds) == (*CONVENTIONAL, 20, 30, 60)
    assert 0 < attempt.sum <= call.sum
    recorded = {name for name in seen.metrics() if name.startswith("meshlib.client.call.")}
    assert recorded == {"meshlib.client.call.duration"}


def test_the_duration_of_calls_can_be_left_out(two: list[Upstream], seen: Seen) -> None:
    with seen.mesh(two[0], tell={"call_duration": False}).client("orders") as client:
        client.get("/")
    assert seen.value("http.client.request.duration") == 1
    assert "meshlib.client.call.duration" not in seen.metrics()


def test_T1_durations_have_their_spans_as_exemplars(colour: Colour, two: list[Upstream], seen: Seen) -> None:
    two[0].script({"status": 503})
    colour.run(seen.mesh(*two), get_or_error)
    attempts = {span.context.span_id for span in seen.attempts if span.context}
    metrics = seen.metrics()  # collecting takes the exemplars away
    told = {
        name: {each.span_id for point in metrics[name].data.data_points for each in point.exemplars}
        for name in ("http.client.request.duration", "meshlib.client.call.duration", "meshlib.client.call.retries")
    }
    call = seen.calls[0].context
    assert call is not None
    assert told == {
        "http.client.request.duration": attempts,
        "meshlib.client.call.duration": {call.span_id},
        "meshlib.client.call.retries": {call.span_id},
    }


def test_T1_a_service_of_3000_endpoints_has_fewer_than_100_points(seen: Seen, two: list[Upstream]) -> None:
    crowd = [f"10.{number // 250}.{number % 250}.1:80" for number in range(2999)]
    with refusing() as address, seen.mesh(address, two[0], *crowd).client("orders") as client:
        for method in ("GET", "POST", "BREW", "FIRST", "SECOND"):
            client.request(method, "/")
        points = sum(len(metric.data.data_points) for metric in seen.metrics().values())
    assert 30 < points < 100
    assert "127.0.0.1" not in str([metric.to_json() for metric in seen.metrics().values()])


def test_T1_endpoints_are_told_apart_if_asked_for(two: list[Upstream], seen: Seen) -> None:
    with seen.mesh(two[0], tell={"endpoint_attributes": True}).client("orders") as client:
        client.get("/")
    [(attributes, _)] = seen.points("http.client.request.duration")
    assert (attributes["network.peer.address"], attributes["network.peer.port"]) == ("127.0.0.1", two[0].port)


def test_T1_what_is_under_way_is_seen(two: list[Upstream], seen: Seen) -> None:
    two[0].script(then={"size": 3_000_000})
    with seen.mesh(two[0]).client("orders") as client:
        with client.stream("GET", "/"):
            assert seen.value("http.client.active_requests") == 1
            assert seen.value("http.client.open_connections", http__connection__state="active") == 1
        two[0].script()
        client.get("/")
        assert seen.value("http.client.active_requests") == 0
        assert seen.value("http.client.open_connections", http__connection__state="idle") == 1


def test_T1_ejections_are_counted_by_method_and_whether_they_are_enforced(two: list[Upstream], seen: Seen) -> None:
    two[0].script(then={"status": 500})
    enforced = seen.mesh(*two, breaker=Breaker(consecutive=2))
    lenient = seen.mesh(*two, breaker=Breaker(consecutive=2, enforce=False))
    with enforced.client("orders") as client, lenient.client("orders") as other:
        for _ in range(2):
            client.get("/")
            other.get("/")
        enforced.eject("orders", two[1].address)

        def ejections(method: str, enforced: bool) -> Any:
            return seen.value("meshlib.ejections", meshlib__ejection__method=method, meshlib__enforced=enforced)

        assert (ejections("consecutive", True), ejections("consecutive", False), ejections("manual", True)) == (1, 1, 1)
        assert ejections("success_rate", True) == 0
        assert seen.value("meshlib.endpoints", meshlib__endpoint__state="open") == 1
        assert seen.value("meshlib.endpoints", meshlib__endpoint__state="taken_out") == 1
        enforced.restore("orders", two[0].address)
        turns = [seen.value("meshlib.breaker.transitions", meshlib__breaker__state=to) for to in ("open", "closed")]
        assert turns == [1, 1]
        assert seen.value("meshlib.retry_decisions", meshlib__retry__decision="not_retryable") == 4


def test_T1_a_body_that_dies_after_its_headers_is_counted(colour: Colour, two: list[Upstream], seen: Seen) -> None:
    two[0].script(then={"fault": "cut"})
    mesh = seen.mesh(two[0])
    assert isinstance(colour.run(mesh, get_or_error), httpx.TransportError)
    assert seen.value("meshlib.client.body_failures") == 1
    assert seen.value("meshlib.client.call.duration", meshlib__call__outcome="ok") == 1


def test_T1_registrations_are_told_by_their_state(two: list[Upstream], seen: Seen) -> None:
    mesh = seen.mesh(two[0])
    with mesh.client("orders") as client:
        client.get("/")

    def standing() -> dict[str, int]:
        points = seen.points("meshlib.registrations")
        assert {each["meshlib.registration.name"] for each, _ in points} == {"shop"}
        return {each["meshlib.registration.state"]: point.value for each, point in points if point.value}

    with refusing() as ours:
        registration = mesh.register("shop", port=Endpoint.parse(ours).port, host="127.0.0.1", at=f"consul://{ours}")
        assert standing() == {"closed": 1}
        with registration:
            assert standing() == {"waiting": 1}
    assert seen.value("meshlib.registration.events", meshlib__registration__event="registered") == 0
    mesh.close()


def test_T1_metrics_do_not_keep_a_mesh_alive(two: list[Upstream], seen: Seen) -> None:
    mesh = seen.mesh(two[0])
    with mesh.client("orders") as client:
        client.get("/")
    assert seen.value("meshlib.panic") == 0
    del mesh, client
    gc.collect()
    assert seen.value("meshlib.panic") is None


def test_T1_meshes_of_one_provider_are_added_up(two: list[Upstream], seen: Seen) -> None:
    meshes = [seen.mesh(two[0]), seen.mesh(two[1])]
    for mesh in meshes:
        with mesh.client("orders") as client:
            client.get("/")
    assert seen.value("meshlib.endpoints", meshlib__endpoint__state="closed") == 2
    assert seen.value("http.client.request.duration") == 2
    assert seen.value("meshlib.retry_budget.tokens") == 500


def test_T1_meshes_that_share_a_provider_do_not_upset_it(
    two: list[Upstream], seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with seen.mesh(two[0]).client("orders") as client:
            client.get("/")
    seen.metrics()
    assert caplog.messages == []


def test_T1_what_the_conventions_name_is_as_they_have_it(two: list[Upstream], seen: Seen) -> None:
    """In the same words: where others record it as well, Prometheus would take two descriptions for two metrics."""
    with seen.mesh(two[0]).client("orders") as client:
        client.get("/")
    theirs = Seen()
    meter = theirs.meters.get_meter("conventions")
    http_metrics.create_http_client_request_duration(meter).record(0.1)
    http_metrics.create_http_client_active_requests(meter).add(1)
    http_metrics.create_http_client_open_connections(meter).add(1)
    found, expected = (
        {name: (each.unit, each.description, type(each.data)) for name, each in told.metrics().items()}
        for told in (seen, theirs)
    )
    assert {name: each for name, each in found.items() if name.startswith("http.")} == expected


@dataclass
class Wrapped(MeterProvider):
    """Some wrap a provider in what cannot be hashed, as Logfire does."""

    inner: Any

    def get_meter(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.get_meter(*args, **kwargs)


def test_T1_a_provider_need_not_be_hashable(two: list[Upstream], seen: Seen) -> None:
    provider = Wrapped(seen.meters)
    for _ in range(2):
        with seen.mesh(two[0], tell={"meter_provider": provider}).client("orders") as client:
            client.get("/")
    assert seen.value("http.client.request.duration") == 2
    assert seen.value("meshlib.panic") == 0


def test_T1_a_provider_that_cannot_be_used_harms_no_call(
    two: list[Upstream], seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    with seen.mesh(two[0], tell={"meter_provider": Wrapped(None)}).client("orders") as client:
        assert [client.get("/").status_code for _ in range(2)] == [200, 200]
    assert caplog.messages == ["OpenTelemetry's providers cannot be used; calls go unobserved"]


def test_what_is_no_provider_is_refused(seen: Seen) -> None:
    told = r"^meter_provider: must be one of OpenTelemetry's providers, got a TracerProvider"
    with pytest.raises(ConfigError, match=told):
        seen.mesh("127.0.0.1:1", tell={"meter_provider": seen.tracers})


def test_T1_a_service_that_comes_later_is_seen_as_well(two: list[Upstream], seen: Seen) -> None:
    mesh = seen.mesh(two[0])
    with mesh.client() as client:
        client.get("http://orders/")
        late = Cluster(Service("late", [two[1].address]), random.Random(1))
        late.publish([Endpoint.parse(two[1].address)], "a list", 0.0)
        mesh._clusters["late"] = late
        mesh._telemetry.lead(late)
        client.get("http://late/")
    assert seen.value("meshlib.client.call.duration", server__address="late") == 1
    assert seen.value("meshlib.endpoints", server__address="late", meshlib__endpoint__state="closed") == 1


def test_S3_a_forked_child_tells_of_its_own(two: list[Upstream], seen: Seen) -> None:
    two[0].script({}, then={"size": 3_000_000})
    with seen.mesh(two[0]).client("orders") as client:
        client.get("/")
        with client.stream("GET", "/"):
            child = os.fork()
            if child == 0:
                names = ("http.client.active_requests", "http.client.open_connections")
                os._exit(sum(point.value for name in names for _, point in seen.points(name)))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert seen.value("http.client.active_requests") == 1


def test_T1_providers_of_the_api_are_nowhere(two: list[Upstream]) -> None:
    silent = {"meter_provider": NoOpMeterProvider(), "tracer_provider": NoOpTracerProvider()}
    mesh = Seen(ALWAYS_OFF).mesh(two[0], tell=silent)
    with mesh.client("orders") as client:
        client.get("/")
    assert mesh._clusters["orders"].telemetry is None
