"""What a mesh has told OpenTelemetry, in memory."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from meshlib import Endpoint, Mesh, Service
from meshlib.testing import Upstream


class Seen:
    """Providers for one test, and what they were told."""

    def __init__(self, sampler: Any = None) -> None:
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider(metric_readers=[self._reader])
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(sampler=sampler)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))

    def mesh(
        self, *fleet: Upstream | str, inner: Any = None, tell: dict[str, Any] | None = None, **settings: Any
    ) -> Mesh:
        """A mesh whose calls go to these in this order."""
        places = [Endpoint.parse(each.address if isinstance(each, Upstream) else each) for each in fleet]
        endpoints = [Endpoint(each.host, each.port, priority=number) for number, each in enumerate(places)]
        return Mesh(Service("orders", endpoints, **settings), inner=inner, **self.told_to(tell))

    def told_to(self, tell: dict[str, Any] | None = None) -> dict[str, Any]:
        """The arguments that a mesh needs for it."""
        return {"meter_provider": self.meters, "tracer_provider": self.tracers, **(tell or {})}

    @property
    def spans(self) -> list[ReadableSpan]:
        """All of them, by their start."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    @property
    def attempts(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.kind is SpanKind.CLIENT]

    @property
    def calls(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.kind is SpanKind.INTERNAL]

    def metrics(self) -> dict[str, Any]:
        """All of them by name."""
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """Attributes and point of one metric."""
        found = self.metrics()
        return [(dict(point.attributes), point) for point in found[name].data.data_points] if name in found else []

    def value(self, name: str, **wanted: Any) -> Any:
        """The one value with these attributes, whose dots are written as `__`; None if there is none."""
        expected = {key.replace("__", "."): value for key, value in wanted.items()}
        fits = [point for attributes, point in self.points(name) if expected.items() <= attributes.items()]
        assert len(fits) < 2, f"{name} has several points with {expected}"
        return getattr(fits[0], "value", getattr(fits[0], "count", None)) if fits else None
