"""The process's own providers: found whenever they are set, and set in one line. Each test is a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from meshlib import ConfigError
from meshlib.telemetry import setup
from meshlib.testing import Upstream


@pytest.fixture
def upstream(two: list[Upstream]) -> Upstream:
    return two[0]


def run(script: str, *arguments: str) -> str:
    """Run a script; what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CALL = """
import sys, httpx, json
from meshlib import Mesh, Service, telemetry
mesh = Mesh(Service("orders", [sys.argv[1]]))
client = mesh.client("orders")
"""


def test_T1_without_a_provider_nothing_is_recorded_nor_loaded(upstream: Upstream) -> None:
    said = run(
        CALL
        + """
client.get("/")
print(mesh._clusters["orders"].telemetry, [name for name in sys.modules if name.startswith("opentelemetry")])
import opentelemetry.metrics, opentelemetry.trace
mesh._telemetry.look()
print(mesh._clusters["orders"].telemetry)
client.get("/")
client.close()
""",
        upstream.address,
    )
    assert said == "None []\nNone\n"
    assert [request.values("traceparent") for request in upstream.log()] == [[], []]


def test_T1_a_provider_that_is_set_later_is_found(upstream: Upstream) -> None:
    said = run(
        CALL
        + """
import time
client.get("/")
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
trace.set_tracer_provider(TracerProvider())
until = time.monotonic() + 5
while mesh._clusters["orders"].telemetry is None and time.monotonic() < until:
    time.sleep(0.05)
    client.get("/")
scope = reader.get_metrics_data().resource_metrics[0].scope_metrics[0]
print(scope.scope.name, {metric.name: metric for metric in scope.metrics}["http.client.request.duration"].unit)
client.close()
""",
        upstream.address,
    )
    assert said == "meshlib s\n"
    told = [len(request.values("traceparent")) for request in upstream.log()]
    assert (told[0], told[-1]) == (0, 1)


def test_setup_serves_prometheus(upstream: Upstream) -> None:
    said = run(
        CALL
        + """
client.get("/")
with telemetry.setup("checkout", prometheus_port=0) as running:
    client.get("/")  # though the next look for providers is not due yet
    print(httpx.get(f"http://127.0.0.1:{running.prometheus_port}/metrics", trust_env=False).text)
client.close()
""",
        upstream.address,
    )
    assert 'service_name="checkout"' in said
    assert "http_client_request_duration_seconds_bucket{" in said
    assert 'le="0.005"' in said
    assert "meshlib_retry_budget_tokens{" in said


def test_setup_may_try_one_port_after_the_other(upstream: Upstream) -> None:
    said = run(
        """
import logging, socket
said = []
class Kept(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.basicConfig(handlers=[Kept()])
taken = socket.socket()
taken.bind(("", 0))
"""
        + CALL
        + """
try:
    telemetry.setup("checkout", prometheus_port=taken.getsockname()[1])
except OSError as error:
    print(error.strerror)
taken.close()
with telemetry.setup("checkout", prometheus_port=0) as running:
    client.get("/")
    text = httpx.get(f"http://127.0.0.1:{running.prometheus_port}/metrics", trust_env=False).text
    print(text.count("target_info{"), said)
client.close()
""",
        upstream.address,
    )
    assert said == "Address already in use\n1 []\n"


class Sink(ThreadingHTTPServer):
    """Takes what is sent by OTLP, and keeps it as it came."""

    def __init__(self) -> None:
        self.taken: dict[str, bytes] = {}
        super().__init__(("127.0.0.1", 0), _Taking)


class _Taking(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        server.taken[self.path] = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_setup_sends_otlp(upstream: Upstream, sink: Sink) -> None:
    run(
        CALL
        + """
running = telemetry.setup("checkout", otlp=f"http://127.0.0.1:{sys.argv[2]}/")
client.get("/v1/7?token=hush")
assert running.flush()
client.close()
running.shutdown()
""",
        upstream.address,
        str(sink.server_port),
    )
    import gzip

    sent = {path: gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body for path, body in sink.taken.items()}
    assert set(sent) == {"/v1/traces", "/v1/metrics"}
    assert all(b"checkout" in body and b"hush" not in body for body in sent.values())
    assert b"http://orders/v1/7" in sent["/v1/traces"]
    assert b"meshlib.client.call.duration" in sent["/v1/metrics"]


def test_setup_prints(upstream: Upstream) -> None:
    said = run(
        CALL
        + """
with telemetry.setup("checkout", console=True) as running:
    client.get("/")
client.close()
""",
        upstream.address,
    )
    assert '"name": "GET orders"' in said
    assert json.dumps("http.client.request.duration") in said


def test_setup_says_what_is_missing_and_what_is_too_much() -> None:
    said = run(
        """
import sys
sys.modules["opentelemetry.exporter.prometheus"] = None
from meshlib import telemetry
try:
    telemetry.setup("checkout", prometheus_port=0)
except ImportError as error:
    print(error)
telemetry.setup("checkout", console=True)
try:
    telemetry.setup("checkout", console=True)
except RuntimeError as error:
    print(error)
import os
os._exit(0 if not sys.stdout.flush() else 1)
"""
    )
    missing, twice = said.splitlines()[:2]
    assert missing == "opentelemetry.exporter.prometheus is not installed: pip install 'meshlib-http[prometheus]'"
    assert twice.startswith("OpenTelemetry is set up already")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"service_name": "", "console": True}, "setup.service_name: must be text"),
        (
            {"service_name": "a", "prometheus_port": 70000},
            "setup.prometheus_port: must be a port, for example 9464, got 70000",
        ),
        ({"service_name": "a", "otlp": "collector:4318"}, "setup.otlp: must be a URL"),
        ({"service_name": "a"}, "setup: nobody would see anything"),
    ],
)
def test_setup_takes_no_nonsense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        setup(**given)
