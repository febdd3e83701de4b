"""What people are told of a service: what it looks like now, and why no call can be made.

Decides words and figures alone. It changes nothing; it takes the cluster's lock for a moment at a time, since there may
be thousands of nodes and calls go on meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlib.core.snapshot import NodeSnapshot, ServiceSnapshot

if TYPE_CHECKING:
    from meshlib.core.cluster import Cluster

SHOWN = 5
"""Warnings and endpoints that an error lists; there may be a thousand names that cannot be looked up."""


def snapshot_of(cluster: Cluster, now: float) -> ServiceSnapshot:
    """The state of a service as frozen values."""
    view = cluster.view
    offered, nodes = set(view.offered), []
    for node in view.nodes:
        with cluster.lock:
            nodes.append(NodeSnapshot.of(node, node in offered, node in view.panicking, now))
    with cluster.lock:
        return ServiceSnapshot(
            name=cluster.service.name,
            nodes=tuple(nodes),
            in_flight=cluster.in_flight,
            panic=view.panic,
            panics=cluster.panics,
            budget_tokens=cluster.bucket.tokens,
            budget_capacity=cluster.bucket.capacity,
            throttle_share=cluster.shedder.share(now),
            limit=None if cluster.service.limit is None else cluster.service.limit.max_in_flight,
            balancer=cluster.view.balancer,
            source=cluster.source,
            age=now - cluster.known_at if cluster.is_known else None,
            warnings=(*cluster.warnings, *(doubt.text for doubt in cluster.doubts(now))),
        )


def why_empty(cluster: Cluster, now: float) -> str:
    """Why there is no endpoint to call, in words."""
    said = "; ".join(cluster.warnings[:SHOWN])
    if (more := len(cluster.warnings) - SHOWN) > 0:
        said = f"{said}; and {more} more"
    said = f" ({said})" if said else ""
    if not cluster.is_known:
        return f"its endpoints are not known yet{said}"
    if cluster.view.nodes:
        shown = [f"{each.endpoint}: {each.why}" for each in cluster.snapshot(now).nodes[:SHOWN]]
        return f"no endpoint is to be called now ({'; '.join(shown)})"
    return f"it has no endpoint, as of {now - cluster.known_at:.0f} s ago{said or f' ({cluster.source})'}"
