"""What a run looks like while it goes on.

Decides which figures are shown of each endpoint and of the whole, and gathers them: from the mesh's snapshot where
there is a mesh, else from the records of the calls. It never prints; see `meshlib.cli.screen`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshlib.cli.faults import Stage
from meshlib.cli.load import Record
from meshlib.core.quantile import quantile
from meshlib.core.snapshot import ServiceSnapshot

REMEMBERED = 256
"""Calls whose latencies the quantiles are taken of; as many as a node remembers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One endpoint. `state` and `in_flight` are None where there is no mesh to know them; quantiles in seconds."""

    endpoint: str
    state: str | None = None
    process: str
    in_flight: int | None = None
    calls: int
    failures: int
    p50: float | None
    p99: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One picture of a run. `retries` and `tokens` are None where there is no mesh."""

    title: str
    seconds: float
    calls: int
    of: int
    failed: int
    retries: int | None = None
    tokens: float | None = None
    rows: tuple[Row, ...]
    events: tuple[str, ...]


@dataclass(slots=True)
class _Endpoint:
    calls: int = 0
    failures: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))


class Progress:
    """The figures of one run so far.

    Args:
        title: of the run.
        calls: how many there will be.
        stage: the processes.
        records: of the calls, growing while this looks on.
    """

    def __init__(self, title: str, calls: int, stage: Stage, records: Sequence[Record]) -> None:
        self._title = title
        self._calls = calls
        self._stage = stage
        self._records = records
        self._seen = 0
        self._counts = Counter[str]()
        self._endpoints = {address: _Endpoint() for address in stage.addresses}

    def frame(self, seconds: float, snapshot: ServiceSnapshot | None) -> Frame:
        """The picture of this moment.

        Args:
            seconds: since the run began.
            snapshot: of the mesh, if the run goes through one.
        """
        self._catch_up()
        return Frame(
            title=self._title,
            seconds=seconds,
            calls=self._seen,
            of=self._calls,
            failed=self._counts["failed"],
            retries=self._counts["retries"] if snapshot else None,
            tokens=snapshot.budget_tokens if snapshot else None,
            rows=self._rows_of(snapshot) if snapshot else self._rows(),
            events=tuple(self._stage.events),
        )

    def _catch_up(self) -> None:
        for record in self._records[self._seen :]:
            self._seen += 1
            self._counts["failed"] += record.failure is not None
            self._counts["retries"] += len(record.visits) - 1
            endpoint = self._endpoints[record.visits[-1].endpoint]
            endpoint.calls += 1
            endpoint.failures += record.failure is not None
            endpoint.latencies.append(record.seconds)

    def _rows_of(self, snapshot: ServiceSnapshot) -> tuple[Row, ...]:
        return tuple(
            Row(
                endpoint=node.endpoint,
                state=node.state,
                process=self._stage.condition(node.endpoint),
                in_flight=node.in_flight,
                calls=node.attempts,
                failures=node.failures,
                p50=node.p50,
                p99=node.p99,
            )
            for node in snapshot.nodes
        )

    def _rows(self) -> tuple[Row, ...]:
        return tuple(
            Row(
                endpoint=address,
                process=self._stage.condition(address),
                calls=endpoint.calls,
                failures=endpoint.failures,
                p50=quantile(sorted(endpoint.latencies), 0.5),
                p99=quantile(sorted(endpoint.latencies), 0.99),
            )
            for address, endpoint in self._endpoints.items()
        )
