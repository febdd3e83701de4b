"""What a run of the demo came to, and what that says.

Decides which calls count as failed, slow or wasted on the killed endpoint, and whether the demo succeeded. Pure: it
reads the records of calls that are over, and prints nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from meshlib.cli.faults import Death
from meshlib.cli.load import Record
from meshlib.core.quantile import quantile
from meshlib.policy import Budget, Retry

SLOW = 0.45
"""Seconds: nearly an attempt's whole timeout, so a call that took longer sat out the stop of an endpoint."""

WIDTH = 80
"""Columns of a terminal."""

LATE = 0.5
"""Seconds after a kill by when nobody but a probe has business there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What the calls of one run came to.

    Attributes:
        calls: how many were made.
        failed: those without a good answer.
        failures: the same by exception class or status.
        unpaid: failed ones that still had attempts left, and nothing in the retry budget to pay for them.
        retries: attempts beyond the first.
        reached_dead: attempts sent to the killed endpoint while its process was dead.
        probes: those of them that were a breaker's probe.
        late: those of them that were not, and came more than 0.5 s after the kill.
        slow: calls that took longer than 0.45 s.
        p50, p99: of whole calls, in seconds.
        seconds: from the first call's start to the last one's end.
    """

    calls: int
    failed: int
    failures: dict[str, int]
    unpaid: int
    retries: int
    reached_dead: int
    probes: int
    late: int
    slow: int
    p50: float
    p99: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values that `json.dumps` takes."""
        return asdict(self)


def tally(records: Sequence[Record], victim: str, death: Death) -> Tally:
    """Count the calls of one run.

    Args:
        records: at least one.
        victim: the endpoint that was killed.
        death: from when to when it was dead.
    """
    latencies = sorted(record.seconds for record in records)
    failures = Counter(record.failure for record in records if record.failure is not None)
    wasted = [
        visit
        for record in records
        for visit in record.visits
        if visit.endpoint == victim and death.begin <= visit.started < death.end
    ]
    return Tally(
        calls=len(records),
        failed=failures.total(),
        failures=dict(failures.most_common()),
        unpaid=sum(record.failure is not None and len(record.visits) < Retry().max_attempts for record in records),
        retries=sum(len(record.visits) - 1 for record in records),
        reached_dead=len(wasted),
        probes=sum(visit.is_probe for visit in wasted),
        late=sum(visit.started > death.begin + LATE and not visit.is_probe for visit in wasted),
        slow=sum(latency > SLOW for latency in latencies),
        p50=quantile(latencies, 0.50) or 0.0,
        p99=quantile(latencies, 0.99) or 0.0,
        seconds=max(record.started + record.seconds for record in records) - min(r.started for r in records),
    )


def status(mesh: Tally) -> int:
    """The exit status: 0 only if nothing failed through the mesh."""
    return 1 if mesh.failed else 0


def sentence(mesh: Tally, plain: Tally) -> str:
    """The verdict."""
    beside = f"{plain.failed:,} of {plain.calls:,} failed through plain httpx."
    if not mesh.failed:
        return f"No call failed through the mesh; {beside}"
    said = f"{mesh.failed:,} of {mesh.calls:,} calls failed through the mesh ({_kinds(mesh)}); {beside}"
    if not mesh.unpaid:
        return said
    budget = Budget()
    paid = int(budget.capacity // budget.retry_cost)
    return f"{said} The retry budget, which pays for {paid} retries at once, had run dry for {mesh.unpaid:,} of them."


def lines(mesh: Tally, plain: Tally) -> list[str]:
    """Both runs side by side, and the verdict."""
    rows = [
        ("", "mesh", "plain httpx"),
        ("calls", f"{mesh.calls:,}", f"{plain.calls:,}"),
        ("failed", f"{mesh.failed:,}", f"{plain.failed:,}"),
        ("retries", f"{mesh.retries:,}", "-"),
        ("reached the killed endpoint while it was dead", f"{mesh.reached_dead:,}", f"{plain.reached_dead:,}"),
        ("  of these, its breaker's probes", f"{mesh.probes:,}", "-"),
        (f"  others, more than {LATE:g} s after the kill", f"{mesh.late:,}", f"{plain.late:,}"),
        (f"slower than {SLOW * 1000:.0f} ms", f"{mesh.slow:,}", f"{plain.slow:,}"),
        ("p50 of a call, ms", f"{mesh.p50 * 1000:.0f}", f"{plain.p50 * 1000:.0f}"),
        ("p99 of a call, ms", f"{mesh.p99 * 1000:.0f}", f"{plain.p99 * 1000:.0f}"),
        ("seconds", f"{mesh.seconds:.1f}", f"{plain.seconds:.1f}"),
    ]
    table = [f"{label:<46}{left:>9}{right:>13}" for label, left, right in rows]
    kinds = wrap(f"plain httpx failed with {_kinds(plain)}", WIDTH, subsequent_indent="  ") if plain.failed else []
    return [*table, *kinds, "", sentence(mesh, plain)]


def _kinds(counted: Tally) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counted.failures.items())
