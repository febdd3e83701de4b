"""What a service looks like at one instant, as frozen values.

Decides the shape that people, status pages and tests read. It never changes anything and keeps no reference to live
state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meshlib.core.breaker import State


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSnapshot:
    """One node.

    Attributes:
        endpoint: `host:port`.
        state: of its breaker.
        eligible: whether the next call may use it.
        why: why it is eligible or not.
        in_flight: attempts whose response has not ended.
        attempts: attempts ever made.
        failures: those that ended badly.
        ewma: weighted latency in seconds, 0 until the first answer.
        weight: what the balancer works with.
        rate: attempts per second of late.
        p50, p99: quantiles of the last latencies in seconds, None until there is one.
    """

    endpoint: str
    state: State
    eligible: bool
    why: str
    in_flight: int
    attempts: int
    failures: int
    ewma: float
    weight: float
    rate: float
    p50: float | None
    p99: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values that `json.dumps` takes."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSnapshot:
    """One service.

    Attributes:
        name: its name.
        nodes: all of its nodes.
        in_flight: attempts whose response has not ended.
        panic: whether breakers are ignored because too few nodes are healthy.
        budget_tokens: what is left of the retry budget.
        source: where the endpoints came from.
        age: seconds since they were last confirmed; 0 before they are known.
        warnings: what people should know of the endpoints and where they come from.
    """

    name: str
    nodes: tuple[NodeSnapshot, ...]
    in_flight: int
    panic: bool
    budget_tokens: float
    source: str
    age: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values that `json.dumps` takes."""
        return {**asdict(self), "nodes": [node.to_dict() for node in self.nodes], "warnings": list(self.warnings)}


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The nearest-rank quantile of values in ascending order; None if there are none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
