"""The mesh that is measured: the one place for what about it may change from run to run.

Decides its settings. The mesh keeps as many connections as it opens: to wait for one, or to open one anew, is not what
is measured. So do the others, httpx excepted, which is the worse for it (see `calls`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meshlib import Connections, Mesh, Service

SERVICE = "orders"
PATH = "/v1/orders/5"
URL = f"http://{SERVICE}{PATH}"
PLENTY = 100_000
"""More connections than are ever opened."""

KEEPALIVE = 3600.0
"""Seconds for which an idle connection is kept: while others take their turn, none may grow too old."""


@dataclass(frozen=True)
class Subject:
    """How the measured mesh is set.

    Attributes:
        balancer: of its service; None for the service's default.
        histogram: whether calls and their attempts are recorded by OpenTelemetry's SDK, as most that are run are; the
            tax is without.
    """

    balancer: Any = None
    histogram: bool = True

    def service(self, addresses: Sequence[str]) -> Service:
        """The service over these addresses."""
        settings = {} if self.balancer is None else {"balancer": self.balancer}
        room = Connections(max_per_endpoint=PLENTY, max_idle=PLENTY, keepalive=KEEPALIVE, max_age=KEEPALIVE)
        return Service(SERVICE, addresses, connections=room, **settings)

    def mesh(self, addresses: Sequence[str], *, inner: Callable[..., Any] | None = None) -> Mesh:
        """A mesh with this service."""
        settings = {"meter_provider": _recording()} if self.histogram else {}
        return Mesh(self.service(addresses), inner=inner, **settings)

    def described(self) -> dict[str, Any]:
        """The settings, for the results."""
        return asdict(self) | {"balancer": type(self.service(["127.0.0.1:1"]).balancer).__name__}


def _recording() -> Any:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    return MeterProvider(metric_readers=[InMemoryMetricReader()])


SUBJECT = Subject()
"""What this run measures."""
