"""Says in the log, once, what does not go well together: settings, and the traffic they meet.

Decides when that is looked at, and that nothing is said twice; what there is to say is found in `meshlib.core.doubts`.
It never raises: a setting that can have no effect still has none.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection

from meshlib.core.cluster import Cluster

EVERY = 60.0
"""Seconds from one look to the next."""

logger = logging.getLogger("meshlib.settings")


def review(cluster: Cluster, now: float) -> None:
    """Say what is new."""
    for doubt in cluster.doubts(now):
        if doubt.about not in cluster.doubted:
            cluster.doubted.add(doubt.about)
            logger.warning("%s: %s", cluster.service.name, doubt.text)


def reviewing(clusters: Collection[Cluster], clock: Callable[[], float]) -> Callable[[], Awaitable[None]]:
    """A job for the control plane."""

    async def look() -> None:
        import asyncio  # it is heavy, and a mesh without a control plane does without it

        while True:
            await asyncio.sleep(EVERY)
            for cluster in list(clusters):  # more may come
                review(cluster, clock())

    return look
