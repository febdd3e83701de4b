"""What a service looks like, as frozen values: each node at one instant.

Decides the shape that people, status pages and tests read. It never changes anything and keeps no reference to live
state.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from meshlib.core.breaker import NodeBreaker, State
from meshlib.core.node import Node
from meshlib.core.quantile import quantile


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
        failures: those that ended badly. A 429, a cancelled one and others that say nothing of the node are not among
            them, and neither are slow answers, though `Breaker.slow_call` may count those.
        ewma: what balancers know of its latency, in seconds: a peak counts in full and fades, a failure counts as the
            balancer's `penalty`, if it has one. 0 until the first answer.
        weight: what the balancer works with.
        rate: attempts per second, of some ten seconds: it rises from 0, and is too low in the first 30.
        p50, p99: quantiles of the last 256 latencies in seconds, those of failures too; None until there is one.
        priority, zone: those of the endpoint.
        check: what its last health check has found, such as `failed: status 500`; empty before the first one.
        last_error: what its last failure was, such as `ReadTimeout: the read timed out` or `status 503`; empty if there
            was none.
        last_error_age: seconds since then; None if there was none.
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
    priority: int
    zone: str
    check: str
    last_error: str
    last_error_age: float | None

    @classmethod
    def of(cls, node: Node, is_offered: bool, panics: bool, now: float) -> NodeSnapshot:
        """What a node looks like.

        Args:
            node: the node.
            is_offered: whether it is a candidate of the view.
            panics: whether that is so whatever its breaker and its checks say.
            now: the time.
        """
        latencies = sorted(node.latencies)
        return cls(
            endpoint=str(node.endpoint),
            state=node.breaker.state,
            eligible=panics or (is_offered and node.is_usable) or node.is_due(now),
            why=_why(node, is_offered, panics, now),
            in_flight=node.in_flight,
            attempts=node.attempts,
            failures=node.failures,
            ewma=node.ewma,
            weight=node.effective_weight,
            rate=node.rate(now),
            p50=quantile(latencies, 0.50),
            p99=quantile(latencies, 0.99),
            priority=node.endpoint.priority,
            zone=node.endpoint.zone,
            check=node.finding,
            last_error=node.last_error,
            last_error_age=now - node.failed_at if node.last_error else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values that `json.dumps` takes."""
        return {each.name: getattr(self, each.name) for each in fields(self)}  # `asdict` takes ten times as long


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSnapshot:
    """One service.

    Attributes:
        name: its name.
        nodes: all of its nodes.
        in_flight: attempts whose response has not ended.
        panic: whether breakers are ignored because too few nodes are healthy.
        panics: how often that has begun.
        budget_tokens: what is left of the retry budget.
        budget_capacity: what it holds at most.
        throttle_share: the share of the calls that the throttle refuses at present, or would.
        limit: how many attempts may be in flight at once; None for no limit.
        balancer: its name.
        source: where the endpoints come from.
        age: seconds since the resolver last confirmed them; of several resolvers or names, the longest; None before the
            first answer.
        warnings: what is wrong now with finding the endpoints, or with the settings in the light of the traffic.
    """

    name: str
    nodes: tuple[NodeSnapshot, ...]
    in_flight: int
    panic: bool
    panics: int
    budget_tokens: float
    budget_capacity: float
    throttle_share: float
    limit: int | None
    balancer: str
    source: str
    age: float | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values that `json.dumps` takes."""
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**told, "nodes": [node.to_dict() for node in self.nodes], "warnings": list(self.warnings)}


def _why(node: Node, is_offered: bool, panics: bool, now: float) -> str:
    """Why a node is eligible or not, in words."""
    if node.is_barred:
        return "taken out by hand"
    if node.is_waiting and not is_offered:
        return "its first check is still to come"
    said = "its checks fail" if node.health is False else _why_by_breaker(node.breaker, now)
    return f"called in panic ({said})" if panics and not node.is_usable else said


def _why_by_breaker(breaker: NodeBreaker, now: float) -> str:
    if breaker.state == "half_open":
        return "a probe is due" if breaker.is_eligible(now) else "a probe is under way"
    if breaker.state == "open":
        return "the next call is the probe" if breaker.is_eligible(now) else f"ejected after {breaker.why}"
    if breaker.is_refused:
        return f"not ejected after {breaker.why}: too many others are"
    if (share := breaker.share(now)) < 1.0:
        return f"closed, on its ramp: {share:.0%} of its weight"
    if breaker.unenforced:
        return f"closed; would have been ejected {breaker.unenforced} times, at last after {breaker.why}"
    return "closed"
