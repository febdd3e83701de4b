"""What it costs to be observed: microseconds that a call takes more than in a mesh that knows of no telemetry at all.

Decides what is switched on. The transport below answers at once (see `tax`), so that little but our own work and the
SDK's is measured. Nothing is exported meanwhile: a reader in memory collects when it is asked to, which is never.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from contestants import one_by_one, one_by_one_async
from figure import Figure, microseconds
from paired import Contestant, Sizes, excess, measure
from subject import SUBJECT
from tax import ADDRESSES, Null

from meshlib import Mesh

UNOBSERVED = "no telemetry"


def _meters() -> Any:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    return MeterProvider(metric_readers=[InMemoryMetricReader()])


def _tracers(share: float) -> Any:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

    return TracerProvider(sampler=TraceIdRatioBased(share))


OBSERVED: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing configured": dict,
    "both histograms": lambda: {"meter_provider": _meters()},
    "attempts alone": lambda: {"meter_provider": _meters(), "call_duration": False},
    "traces of no call": lambda: {"tracer_provider": _tracers(0.0)},
    "traces of all calls": lambda: {"tracer_provider": _tracers(1.0)},
    "all of it": lambda: {"meter_provider": _meters(), "tracer_provider": _tracers(1.0)},
}
"""By what the figures call them."""


def figures(sizes: Sizes) -> Iterator[Figure]:
    """Microseconds per call, in both colours."""
    with contextlib.ExitStack() as clients:
        sync = [one_by_one(name, clients.enter_context(mesh.client())) for name, mesh in _meshes()]
        yield from _told("sync", sync, sizes)
    with asyncio.Runner() as runner:
        opened = [(name, mesh.async_client()) for name, mesh in _meshes()]
        yield from _told("async", [one_by_one_async(name, client, runner) for name, client in opened], sizes)
        for _, client in opened:
            runner.run(client.aclose())


def _meshes() -> Iterator[tuple[str, Mesh]]:
    mesh = Mesh(SUBJECT.service(ADDRESSES), inner=lambda endpoint: Null())
    mesh._telemetry = None  # type: ignore[assignment]
    yield UNOBSERVED, mesh
    for name, settings in OBSERVED.items():
        yield name, Mesh(SUBJECT.service(ADDRESSES), inner=lambda endpoint: Null(), **settings())


def _told(colour: str, contestants: list[Contestant], sizes: Sizes) -> Iterator[Figure]:
    costs = measure(contestants, sizes)
    for name in OBSERVED:
        yield microseconds(f"telemetry: {colour}: {name}", excess(costs, name, UNOBSERVED))
