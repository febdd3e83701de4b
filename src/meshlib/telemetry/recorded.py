"""The metrics that calls record themselves: how long attempts and calls took, and what there was beside one attempt.

Decides their names, units, boundaries and attributes. An attempt and a call record once each; the rest is recorded only
where it is not zero, which for most calls it is. Every set of attributes is made once and shared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.metrics import Meter

from meshlib.telemetry.words import METHODS, OTHER

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from meshlib.core.report import Attempt

ATTEMPT = "http.client.request.duration"
CALL = "meshlib.client.call.duration"
RETRIES = "meshlib.client.call.retries"
FAILOVERS = "meshlib.client.call.failovers"
TRANSPARENT = "meshlib.client.call.transparent_retries"
HEDGES = "meshlib.client.call.hedges"
DELAY = "meshlib.client.call.retry_delay"

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""The boundaries that the semantic conventions ask for."""

CALL_SECONDS = (*SECONDS, 20, 30, 60)
"""A call may have several attempts, and by default half a minute."""

DELAY_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
COUNTS = (1, 2, 3, 4, 5, 10)

MOST_KEPT = 10_000
"""Sets of attributes: with endpoints among them there is no end to those."""

Attributes = dict[str, str | int]


class Instruments:
    """The instruments of one meter.

    What the semantic conventions name is described in their words: where other instrumentation has a metric of the same
    name, two descriptions would make it two metrics to some who read them.

    Args:
        meter: where they are made.
    """

    def __init__(self, meter: Meter) -> None:
        def histogram(name: str, unit: str, boundaries: Sequence[float], description: str) -> Any:
            return meter.create_histogram(
                name, unit, description, explicit_bucket_boundaries_advisory=[float(each) for each in boundaries]
            )

        self.attempt = histogram(ATTEMPT, "s", SECONDS, "Duration of HTTP client requests.")
        self.call = histogram(CALL, "s", CALL_SECONDS, "How long calls took until their headers, or their end.")
        self.extra = {
            "retry": histogram(RETRIES, "{retry}", COUNTS, "Retries of a call that had any."),
            "failover": histogram(FAILOVERS, "{failover}", COUNTS, "Failovers of a call that had any."),
            "transparent": histogram(TRANSPARENT, "{retry}", COUNTS, "Transparent retries of a call that had any."),
            "hedge": histogram(HEDGES, "{hedge}", COUNTS, "Hedges of a call that had any."),
        }
        self.delay = histogram(DELAY, "s", DELAY_SECONDS, "Back-off of a call that had any.")


class Recorder:
    """What the calls of one service record.

    Args:
        instruments: those of the mesh's meter.
        service: its name.
        scheme: what its endpoints are spoken to by.
        call_duration: whether calls are recorded as such.
        endpoint_attributes: whether the endpoint is an attribute of an attempt's.
    """

    def __init__(
        self, instruments: Instruments, service: str, scheme: str, *, call_duration: bool, endpoint_attributes: bool
    ) -> None:
        self._instruments = instruments
        self._common: Attributes = {"server.address": service, "url.scheme": scheme}
        self._calls = call_duration
        self._endpoints = endpoint_attributes
        self._kept: dict[object, Attributes] = {}

    def attempt(self, method: str, attempt: Attempt, error: str | None, context: Context) -> None:
        """An attempt has its headers, or has ended without."""
        endpoint = attempt.endpoint if self._endpoints else None
        key = method, attempt.status, error, endpoint and endpoint.place
        attributes = self._kept.get(key)
        if attributes is None:
            attributes = self._attributes(method, attempt.status, error)
            if endpoint is not None:
                attributes |= {"network.peer.address": endpoint.host, "network.peer.port": endpoint.port}
            self._keep(key, attributes)
        self._instruments.attempt.record(attempt.seconds, attributes, context=context)

    def call(
        self,
        method: str,
        seconds: float,
        outcome: str,
        status: int | None,
        error: str | None,
        context: Context,
        template: str | None = None,
    ) -> None:
        """A call has its answer, or an exception leaves it."""
        if not self._calls:
            return
        key = method, outcome, status, error, template
        attributes = self._kept.get(key)
        if attributes is None:
            attributes = {**self._attributes(method, status, error), "meshlib.call.outcome": outcome}
            if template is not None:
                attributes["url.template"] = template
            self._keep(key, attributes)
        self._instruments.call.record(seconds, attributes, context=context)

    def extra(self, method: str, attempts: Sequence[Attempt], context: Context) -> None:
        """A call has had more than one attempt."""
        attributes: Attributes = {**self._common, "http.request.method": method}
        for kind, count in Counter(attempt.kind for attempt in attempts[1:]).items():
            self._instruments.extra[kind].record(count, attributes, context=context)
        if (waited := sum(attempt.waited for attempt in attempts)) > 0:
            self._instruments.delay.record(waited, attributes, context=context)

    def _attributes(self, method: str, status: int | None, error: str | None) -> Attributes:
        attributes: Attributes = {**self._common, "http.request.method": method}
        if status is not None:
            attributes["http.response.status_code"] = status
        if error is not None:
            attributes["error.type"] = error
        return attributes

    def _keep(self, key: object, attributes: Attributes) -> None:
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        self._kept[key] = attributes


def known_method(method: str) -> str:
    """The method, if it is one that the conventions know."""
    return method if method in METHODS else OTHER
