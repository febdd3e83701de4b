"""The backup of a call's first attempt, which takes long: whether there is one, where it goes, and what it costs.

Decides that alone. When it may be made and how many calls may have one is decided in `hedge`; which of the two attempts
is the call's, by its driver. All of it happens under the cluster's lock.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshlib.core.cluster import Cluster
from meshlib.core.report import Attempt


def backup(
    cluster: Cluster, key: str | None, attempts: Sequence[Attempt], now: float, deadline: float
) -> tuple[Attempt, float] | None:
    """A second attempt and what it has cost. It is to answer soon: so it is no probe, and goes to nobody twice.

    Args:
        cluster: the service's live state.
        key: what a consistent hash goes by.
        attempts: the call's.
        now: the time.
        deadline: the second attempt's.

    Returns:
        None if no other endpoint is well, if there is nothing to pay it with, or if a call would not be let in.
    """
    hedging, gate, view = cluster.hedging, cluster.gate, cluster.view
    if hedging is None or not hedging.is_affordable or not gate.has_spare(cluster.in_flight):
        return None
    tried, order = [attempt.node for attempt in attempts], view.candidates(now, key)
    node = next((node for node in order if node not in tried and node.breaker.state == "closed"), None)
    if node is None or not (paid := gate.pay_for_backup(now)):
        return None
    hedging.spend()
    attempt = Attempt(node, node.breaker.generation, view.balancer, now, deadline)
    attempt.kind = "hedge"
    return attempt, paid
