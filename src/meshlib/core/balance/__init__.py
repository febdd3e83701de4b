"""Balancers: which node is best for one attempt, and which after that.

A balancer is a frozen setting. `prepare` looks at the nodes once per view and returns `candidates`, which is asked
once per call and yields nodes, best first, lazily and never the same twice. So failover and an open breaker are both
just the next `next()`. Health, priorities, zones and ramps are settled before: a balancer sees the nodes it may use
and their effective weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from meshlib.core.chance import Rng
    from meshlib.core.node import Node

Candidates: TypeAlias = "Callable[[float, str | None], Iterator[Node]]"
"""`candidates(now, key)`: the nodes for one call, best first, each at most once."""


class Balancer(Protocol):
    """What a balancer of one's own must offer."""

    def prepare(self, nodes: Sequence[Node], rng: Rng) -> Candidates:
        """Look at the nodes of a view once.

        Args:
            nodes: those that may be used; never empty. A node shows `endpoint`, `in_flight`, `ewma`, `oldest_open` and
                `effective_weight`; nothing of it is to be changed.
            rng: the only source of chance.
        """
        ...
