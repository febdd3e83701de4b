"""What does not go well together: a service's settings with each other, and with the traffic they meet.

Decides what people should be told of it, in words. It never changes anything: a setting that can have no effect is
still the user's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from meshlib.core.balance.hashing import ConsistentHash
from meshlib.core.node import Node

if TYPE_CHECKING:
    from meshlib.service import Service

LONG = 10
"""Windows of a breaker's that its traffic is looked at for, before it is said never to fill one."""


class Traffic(NamedTuple):
    """What a service has met.

    Attributes:
        seconds: since its endpoints are known.
        keyless: calls that brought no key to a balancer that goes by one.
        cut_short: calls that came to their deadline in their first attempt, since that might have taken longer.
        shed: what the throttle has to say, in words; empty if it lets all calls in.
    """

    seconds: float
    keyless: int
    cut_short: int
    shed: str


class Doubt(NamedTuple):
    """One of them: `about` is the setting, and the same as long as the doubt is; `text` may count."""

    about: str
    text: str


def doubts_about(service: Service, nodes: Sequence[Node], traffic: Traffic) -> Iterator[Doubt]:
    """All that is doubtful now.

    Args:
        service: the settings.
        nodes: those of its view.
        traffic: what they have met.
    """
    yield from _of_settings(service)
    if traffic.shed:
        yield Doubt("throttle", traffic.shed)
    if traffic.keyless:
        yield Doubt("balancer.key", f"{_calls(traffic.keyless)} had no hash key")
    if isinstance(service.balancer, ConsistentHash):
        yield from (Doubt("balancer.scheme", text) for text in service.balancer.doubts(len(nodes)))
    if traffic.cut_short and len(nodes) > 1:
        yield Doubt(
            "timeout.attempt",
            f"{_calls(traffic.cut_short)} came to the deadline in the first attempt, which had up to "
            f"{service.timeout.attempt:g} s (timeout.attempt): no other endpoint could be tried",
        )
    yield from _of_window(service, nodes, traffic.seconds)


def _of_settings(service: Service) -> Iterator[Doubt]:
    timeout, budget = service.timeout, service.retry.budget
    if timeout.attempt > timeout.total:
        yield Doubt(
            "timeout.total",
            f"timeout.attempt, {timeout.attempt:g} s, is longer than timeout.total, {timeout.total:g} s: "
            "an endpoint that hangs takes the whole call",
        )
    if budget.capacity < budget.retry_cost:
        yield Doubt(
            "retry.budget",
            f"retry.budget holds {budget.capacity:g} and an extra attempt costs {budget.retry_cost:g}: there will be "
            "no retry, no failover and no backup",
        )


def _of_window(service: Service, nodes: Sequence[Node], seconds: float) -> Iterator[Doubt]:
    """Whether the success rate can ever be judged. Failures in a row are, whatever the traffic."""
    breaker = service.breaker
    busiest = max((node.attempts for node in nodes), default=0)
    if not busiest or not breaker.success_rate or seconds < LONG * breaker.window:
        return
    within = busiest / seconds * breaker.window
    if within < breaker.min_calls:
        yield Doubt(
            "breaker.window",
            f"breaker.success_rate has no effect: its busiest endpoint gets {within:.2g} calls in "
            f"{breaker.window:g} s (breaker.window), and {breaker.min_calls} are needed (breaker.min_calls)",
        )


def _calls(count: int) -> str:
    return f"{count} call{'' if count == 1 else 's'}"
