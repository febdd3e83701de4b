"""SRV records: how they become endpoints (RFC 2782).

Decides priorities and weights, and what holds when two records lead to one place. It never asks anybody: the addresses
of the targets come in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from meshlib.endpoint import Endpoint, Place

LITTLE = 0.01
"""What the records of weight 0 get together, measured by what the others get: "a very small chance", says the RFC."""


@dataclass(frozen=True)
class Record:
    """One SRV record, its target without the last dot."""

    priority: int
    weight: int
    port: int
    target: str


def shares(weights: Sequence[int]) -> list[float]:
    """The shares of one level's records, in proportion to their weights, each more than 0."""
    total = sum(weights)
    if not total:
        return [1.0] * len(weights)
    little = total * LITTLE / max(1, weights.count(0))
    return [float(weight) or little for weight in weights]


def endpoints(records: Sequence[Record], hosts: Mapping[str, Sequence[str]]) -> list[Endpoint]:
    """One endpoint for each place that the records lead to; the addresses of a target divide its share.

    Args:
        records: all of them.
        hosts: the addresses of each target; a record whose target has none is left out.
    """
    found: dict[Place, Endpoint] = {}
    for level in sorted({record.priority for record in records}):
        members = sorted(
            (each for each in records if each.priority == level and hosts.get(each.target)),
            key=lambda each: (each.target, each.port),
        )
        for record, share in zip(members, shares([each.weight for each in members]), strict=True):
            for host in hosts[record.target]:
                _add(found, record, host, share / len(hosts[record.target]))
    return sorted(found.values(), key=lambda each: (each.priority, each.place))


def _add(found: dict[Place, Endpoint], record: Record, host: str, weight: float) -> None:
    """Two records that lead to one place are one endpoint: on the better level, with what both get there."""
    new = Endpoint(host, record.port, weight=weight, priority=record.priority, metadata={"name": record.target})
    old = found.get(new.place)
    if old is None:
        found[new.place] = new
    elif old.priority == new.priority:
        found[new.place] = replace(old, weight=old.weight + weight)
