"""Latency first: the endpoint whose next answer is likely to come soonest.

A few nodes are drawn, and the cheapest goes first. A node's cost is what its answers have taken of late, times the
calls that are ahead of one more, over its weight. The average is sensitive to peaks (as in Twitter's Finagle, "Peak
EWMA"): a slow answer counts at once and in full, and is forgotten over `decay` seconds. An error counts as an answer of
`penalty` seconds, so that an endpoint that fails fast does not look like a fast one; an answer that is still to come
counts as what it has taken so far.

What is known of a node fades without calls, towards the median of the others: a node that was slow is tried again, and
one that was fast is not trusted for ever. A node of which nothing is known is taken for a usual one.

Five are drawn rather than two: with many processes per endpoint a process's own calls in flight say almost nothing, and
what it remembers of latencies says more the more of them are compared (docs/balancing.md has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp, inf
from typing import TYPE_CHECKING

from meshlib.core.balance.draws import draw
from meshlib.validation import check, ruled, seconds, whole

if TYPE_CHECKING:
    from meshlib.core.balance import Candidates
    from meshlib.core.chance import Rng
    from meshlib.core.node import Node

ASKED = 31
"""Nodes whose median stands for that of all: as good as any for what it is used for, and quick to find."""

EVERY = 1.0
"""Seconds after which it is found anew."""

ALIKE = 1.5
"""Idle nodes whose latencies differ by less than this share the calls by weight. Without it a caller that makes one
call at a time would always go to the node that is faster by a hair."""

LEAST = 1e-6
"""Seconds: no answer is taken to come sooner, or the calls in flight would not count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakEwma:
    """Prefers the endpoint that answers soonest.

    Args:
        choices: how many distinct endpoints are compared. Default 5.
        decay: seconds after which a latency has lost all but 1/e of its weight. Default 10.
        penalty: seconds that an error counts for at least. Default 1.

    Raises:
        ConfigError: if `choices` is less than 2, or one of the others is not above 0.
    """

    choices: int = ruled(whole(at_least=2), default=5)
    decay: float = seconds(10.0)
    penalty: float = seconds(1.0)

    def __post_init__(self) -> None:
        check(self)

    def prepare(self, nodes: Sequence[Node], rng: Rng) -> Candidates:
        """See `Balancer`."""
        choices, decay = min(self.choices, len(nodes)), self.decay
        typical = Typical(nodes, decay)

        def cost(node: Node, now: float, usual: float) -> float:
            latency = usual + (node.ewma - usual) * exp((node.observed_at - now) / decay)
            if node.in_flight:
                started = node.oldest_open
                if started is not None and now - started > latency:
                    latency = now - started
                return (latency or LEAST) * (node.in_flight + 1) / node.effective_weight
            return (latency or LEAST) / node.effective_weight

        def candidates(now: float, key: str | None) -> Iterator[Node]:
            usual = typical.latency(now)
            drawn = draw(nodes, rng)
            pool = [(cost(node, now, usual), node) for node in islice(drawn, choices)]
            while pool:
                best = _best(pool, rng)
                pool.remove(best)
                yield best[1]
                pool += [(cost(node, now, usual), node) for node in islice(drawn, 1)]

        return candidates


def _best(pool: Sequence[tuple[float, Node]], rng: Rng) -> tuple[float, Node]:
    """The cheapest; of idle nodes that are alike, one by chance, in proportion to their weights."""
    best = pool[0]
    for each in pool:
        if each[0] < best[0]:
            best = each
    if best[1].in_flight:
        return best
    latency = best[0] * best[1].effective_weight * ALIKE
    alike = [each for each in pool if not each[1].in_flight and each[0] * each[1].effective_weight <= latency]
    if len(alike) == 1:
        return best
    left = rng.random() * sum(each[1].effective_weight for each in alike)
    for each in alike:
        left -= each[1].effective_weight
        if left < 0:
            return each
    return best


class Typical:
    """The median latency of the nodes that were heard of lately, found anew now and then.

    Those that have been silent for long do not count, as long as there are others: where most nodes were slow, they
    would hold each other at what they were then, and none of them would ever be tried again.

    Args:
        nodes: all of them.
        lately: in seconds.
    """

    __slots__ = ("_lately", "_nodes", "_until", "_value")

    def __init__(self, nodes: Sequence[Node], lately: float) -> None:
        self._nodes = nodes[:: -(-len(nodes) // ASKED)]
        self._lately = lately
        self._until = -inf
        self._value = 0.0

    def latency(self, now: float) -> float:
        """In seconds; 0 while nothing is known."""
        if now >= self._until:
            known = [node for node in self._nodes if node.observed_at > -inf]
            heard = [node for node in known if now - node.observed_at <= self._lately]
            latencies = sorted(node.ewma for node in heard or known)
            self._value = latencies[(len(latencies) - 1) // 2] if latencies else 0.0
            self._until = now + EVERY
        return self._value
