"""OpenTelemetry's SDK in one line, for programs that have not set it up otherwise.

Decides which exporters there are, what is told of the process, and which boundaries the durations of HTTP get. It is
the one place that touches the SDK. It sets the process's providers, so it is for a program to call, once, and never for
a library.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import TracebackType
from typing import Any

from meshlib.telemetry.providers import recording
from meshlib.telemetry.watch import look_all
from meshlib.validation import ConfigError, Fault

DURATIONS = "http.*.request.duration"
"""Of this library and of others, which do not all say which boundaries they want."""

EVERY_MILLISECONDS = 10_000
"""From one export of metrics to the next: OpenTelemetry's own minute is long while something breaks."""


class Running:
    """What `setup` has started. It is flushed at the interpreter's exit by itself.

    Args:
        providers: those that were set.
        server: what Prometheus reads from, and its thread.

    Attributes:
        prometheus_port: where it listens; None if it does not.
    """

    def __init__(self, providers: list[Any], server: tuple[Any, Any] | None) -> None:
        self._providers = providers
        self._server = server
        self.prometheus_port: int | None = None if server is None else server[0].server_port

    def flush(self, timeout: float = 10.0) -> bool:
        """Export what was recorded so far, within so many seconds; returns whether that went well."""
        went_well = [provider.force_flush(int(timeout * 1000)) for provider in self._providers]
        return all(went_well)

    def shutdown(self) -> None:
        """Flush, and end. A process's providers can be set only once, so there is no starting again."""
        providers, self._providers = self._providers, []
        for provider in providers:
            provider.shutdown()
        server, self._server = self._server, None
        if server is not None:
            server[0].shutdown()
            server[0].server_close()
            server[1].join()

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()


def setup(
    service_name: str, prometheus_port: int | None = None, otlp: str | bool | None = None, console: bool = False
) -> Running:
    """Set up OpenTelemetry's SDK for this process; every mesh in it is seen from then on.

    Args:
        service_name: what this process is, for who looks at its metrics and traces.
        prometheus_port: where Prometheus reads metrics from, at `/metrics` on all addresses; 0 for a free port.
        otlp: where metrics and traces are sent to by OTLP over HTTP: a collector's base URL, such as
            `http://127.0.0.1:4318`, or True for what `OTEL_EXPORTER_OTLP_ENDPOINT` says.
        console: whether metrics and traces are printed.

    Returns:
        What can be flushed and shut down.

    Raises:
        ConfigError: for arguments that cannot be, or none of the last three.
        ImportError: if an exporter is not installed; it says what to install.
        OSError: if the port is taken; another one may be tried.
        RuntimeError: if the process has a provider already.
    """
    _check(service_name, prometheus_port, otlp, console)
    from opentelemetry.metrics import set_meter_provider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.trace import set_tracer_provider

    _refuse_a_second()
    processors, readers = _exporting(prometheus_port, otlp, console)
    try:
        server = None if prometheus_port is None else _serve(prometheus_port)
    except OSError:  # the port is taken; who tries the next one must not be read twice
        for each in (*processors, *readers):
            each.shutdown()
        raise
    resource = Resource.create({"service.name": service_name})
    providers = [_meters(resource, readers)]
    set_meter_provider(providers[0])
    if processors:
        providers.append(_tracers(resource, processors))
        set_tracer_provider(providers[1])
    look_all()
    return Running(providers, server)


def _check(service_name: Any, prometheus_port: Any, otlp: Any, console: bool) -> None:
    faults: list[Fault] = []
    if not isinstance(service_name, str) or not service_name:
        faults.append(Fault("setup.service_name", f"must be text, for example 'checkout', got {service_name!r}"))
    is_port = isinstance(prometheus_port, int) and 0 <= prometheus_port < 65536
    if prometheus_port is not None and not is_port:
        faults.append(Fault("setup.prometheus_port", f"must be a port, for example 9464, got {prometheus_port!r}"))
    if isinstance(otlp, str) and not otlp.startswith(("http://", "https://")):
        faults.append(Fault("setup.otlp", "must be a URL, for example 'http://127.0.0.1:4318'"))
    if prometheus_port is None and not otlp and not console:
        faults.append(Fault("setup", "nobody would see anything: give prometheus_port, otlp or console"))
    if faults:
        raise ConfigError(faults)


def _refuse_a_second() -> None:
    for module, getter in (
        ("opentelemetry.metrics", "get_meter_provider"),
        ("opentelemetry.trace", "get_tracer_provider"),
    ):
        if recording(None, module, getter) is not None:
            raise RuntimeError(f"OpenTelemetry is set up already ({module}.{getter}()); a mesh uses that by itself")


def _exporting(prometheus_port: int | None, otlp: str | bool | None, console: bool) -> tuple[list[Any], list[Any]]:
    """What takes spans, and what reads metrics."""
    processors, readers = [], []
    if prometheus_port is not None:
        exporter = _extra("opentelemetry.exporter.prometheus", "prometheus")
        readers.append(exporter.PrometheusMetricReader())
    if otlp:
        spans = _extra("opentelemetry.exporter.otlp.proto.http.trace_exporter", "otlp")
        metrics = _extra("opentelemetry.exporter.otlp.proto.http.metric_exporter", "otlp")
        processors.append(_batched(spans.OTLPSpanExporter(**_at(otlp, "traces"))))
        readers.append(_periodic(metrics.OTLPMetricExporter(**_at(otlp, "metrics"))))
    if console:
        from opentelemetry.sdk.metrics.export import ConsoleMetricExporter
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

        processors.append(SimpleSpanProcessor(ConsoleSpanExporter()))
        readers.append(_periodic(ConsoleMetricExporter()))
    return processors, readers


def _extra(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: pip install 'meshlib-http[{extra}]'") from error


def _at(otlp: str | bool, signal: str) -> dict[str, str]:
    return {"endpoint": f"{otlp.rstrip('/')}/v1/{signal}"} if isinstance(otlp, str) else {}


def _batched(exporter: Any) -> Any:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(exporter)


def _periodic(exporter: Any) -> Any:
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    return PeriodicExportingMetricReader(exporter, EVERY_MILLISECONDS)


def _serve(port: int) -> tuple[Any, Any]:
    start: Callable[[int], tuple[Any, Any]] = _extra("prometheus_client", "prometheus").start_http_server
    return start(port)


def _meters(resource: Any, readers: list[Any]) -> Any:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View

    from meshlib.telemetry.recorded import SECONDS

    boundaries = ExplicitBucketHistogramAggregation(SECONDS)
    return MeterProvider(readers, resource, views=[View(instrument_name=DURATIONS, aggregation=boundaries)])


def _tracers(resource: Any, processors: list[Any]) -> Any:
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(resource=resource)
    for each in processors:
        provider.add_span_processor(each)
    return provider
