"""Beside other instrumentation: what we make a span of, nobody makes a second one of (rule T2)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.trace import format_span_id
from seen import Seen

from conftest import Colour
from meshlib import HealthCheck, Mesh, Service
from meshlib.testing import Upstream


@pytest.fixture
def upstream(two: list[Upstream]) -> Upstream:
    return two[0]


@pytest.fixture
def seen() -> Iterator[Seen]:
    told = Seen()
    instrumentor = HTTPXClientInstrumentor()
    instrumentor.instrument(tracer_provider=told.tracers, meter_provider=told.meters)
    yield told
    instrumentor.uninstrument()


def transports(colour: Colour) -> Any:
    return (lambda endpoint: httpx.HTTPTransport()) if colour.is_sync else (lambda endpoint: httpx.AsyncHTTPTransport())


@pytest.mark.parametrize("is_inner", [False, True], ids=["own", "inner"])
def test_T2_no_span_is_doubled(colour: Colour, upstream: Upstream, seen: Seen, is_inner: bool) -> None:
    mesh = seen.mesh(upstream, inner=transports(colour) if is_inner else None)
    headers = {"TraceParent": "00-00000000000000000000000000000001-0000000000000001-01"}
    assert colour.run(mesh, lambda client: client.get("/", headers=headers)).status_code == 200
    assert [span.name for span in seen.spans] == ["GET orders", "GET"]
    assert len(seen.points("http.client.request.duration")) == 1
    assert {(span.attributes or {})["server.address"] for span in seen.spans} == {"orders"}
    [told] = upstream.log()[0].values("traceparent")
    attempt = seen.attempts[0].context
    assert attempt is not None
    assert format_span_id(attempt.span_id) in told


def test_the_instrumentation_works_where_there_is_no_mesh(upstream: Upstream, seen: Seen) -> None:
    with httpx.Client(trust_env=False) as client:
        client.get(f"http://{upstream.address}/")
    assert [span.name for span in seen.spans] == ["GET"]


def test_T2_what_we_ask_ourselves_makes_no_spans(upstream: Upstream, seen: Seen, no_leaks: None) -> None:
    """A query to Consul waits for minutes, and comes again and again; a check comes every second."""
    told = {"X-Consul-Index": "1", "X-Consul-KnownLeader": "true", "X-Consul-LastContact": "0"}
    entry = {"Node": {"Address": "127.0.0.1"}, "Service": {"ID": "x", "Port": upstream.port}, "Checks": []}
    upstream.script({"body": json.dumps([entry]), "headers": told}, {}, then={"fault": "hang"})
    orders = Service("orders", f"consul://{upstream.address}/orders", health=HealthCheck("/healthz", timeout=0.2))
    with Mesh(orders, **seen.told_to()) as mesh:
        mesh.wait_ready(20.0)
        until = time.monotonic() + 20
        while not any(request.target == "/healthz" for request in upstream.log()):
            assert time.monotonic() < until
            time.sleep(0.02)
    assert len(upstream.log()) > 1
    assert seen.spans == []
    assert seen.points("http.client.request.duration") == []
