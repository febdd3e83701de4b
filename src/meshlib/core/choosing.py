"""Which node an attempt may be made at, beside the walk along the balancer's order that every call begins with.

Decides who gets a probe, whether a node has room and its breaker admits a call, and where a call goes that has been
everywhere. It never decides whether there is an attempt at all, and it does not judge how one ended. All of it happens
under the cluster's lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from math import inf

from meshlib.core.breaker import UNHEARD
from meshlib.core.cluster import Cluster
from meshlib.core.node import Node
from meshlib.core.report import Attempt

RESERVED = 5.0
"""Seconds that a probe which is due waits for a call that may be repeated, before another has to make it."""

FEW = 32
"""Nodes among which a retry looks for one that is well: where there are thousands, maybe none of them is."""

LAPSE = 1.0
"""Seconds after its deadline at which an attempt that never reported is taken for lost."""


def attempt_at(cluster: Cluster, node: Node, why: str, now: float, deadline: float) -> Attempt | None:
    """An attempt on this very node, if it has room and its breaker admits the call, or a panic does."""
    if node.in_flight >= cluster.most_each:
        return None
    was = node.breaker.state
    permit = node.breaker.admit(now, deadline + LAPSE)
    if permit is None:
        return Attempt(node, UNHEARD, "panic", now, deadline) if node in cluster.view.panicking else None
    if was == "closed":
        return Attempt(node, permit, why, now, deadline)
    cluster.ejections.probed(node, was, now)
    return Attempt(node, permit, "probe", now, deadline)


def probe(cluster: Cluster, repeatable: bool, now: float, deadline: float) -> Attempt | None:
    """An attempt on an ejected node that is due for its probe, if there is one.

    Balancers would come to it late: they remember its failures. It is better made by a call that can go on to another
    endpoint when it fails, one that is `repeatable`, so the others leave it to those for a while.
    """
    due, soonest = now if repeatable else now - RESERVED, inf
    if due < cluster.ejections.probes_at:
        return None
    for node in cluster.view.ejected:
        if node.is_due(due) and (attempt := attempt_at(cluster, node, "probe", now, deadline)) is not None:
            return attempt
        soonest = min(soonest, node.breaker.next_probe_at)
    cluster.ejections.probes_at = soonest
    return None


def well_first(walk: Iterator[Node]) -> Iterator[Node]:
    """The same order, but of the next few those that something speaks against come last."""
    unwell = []
    for node in islice(walk, FEW):
        if node.is_healthy:
            yield node
        else:
            unwell.append(node)
    yield from chain(unwell, walk)


def anywhere(
    cluster: Cluster, key: str | None, attempts: Sequence[Attempt], now: float, deadline: float
) -> Attempt | None:
    """The walk is over: a node that has come or come back since it began, else the best of all once more.

    But none that has not proved to be who it should be: it is asked once by a call (rule S2).
    """
    view, tried, strangers = cluster.view, [attempt.node for attempt in attempts], _strangers(attempts)
    for node in sorted([*view.candidates(now, key), *view.ejected], key=tried.__contains__):
        if node in strangers:
            continue
        why = "again" if node in tried else "late"
        if (attempt := attempt_at(cluster, node, why, now, deadline)) is not None:
            return attempt
    return None


def is_among_strangers(cluster: Cluster, attempts: Sequence[Attempt]) -> bool:
    """Whether none of the nodes there are has proved to this call to be who it should be."""
    strangers, view = _strangers(attempts), cluster.view
    return bool(strangers) and all(node in strangers for node in chain(view.offered, view.ejected))


def _strangers(attempts: Sequence[Attempt]) -> list[Node]:
    return [attempt.node for attempt in attempts if attempt.met_stranger]


def has_untried(cluster: Cluster, attempts: Sequence[Attempt], now: float) -> bool:
    """Whether there is a usable node with room to which none of these went. The balancer may not offer it."""
    tried, view, most = [attempt.node for attempt in attempts], cluster.view, cluster.most_each
    return any(
        node not in tried and node.in_flight < most and (node.breaker.is_eligible(now) or node in view.panicking)
        for node in chain(view.offered, view.ejected)
    )
