"""The nodes of a service that are taken out, by their breakers or by hand.

Decides whether one more may be ejected (rule B3) and how soon they are probed, counts how often their states change,
and notes it. It tells breakers their verdicts, but what is too bad is theirs to decide; and it never builds a view: it
says when there is reason to. All of it happens under the cluster's lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from math import inf
from typing import TYPE_CHECKING

from meshlib.core.chance import Rng
from meshlib.core.journal import Journal
from meshlib.core.node import Node
from meshlib.core.tally import Tally
from meshlib.core.view import View, most_ejected
from meshlib.endpoint import Place
from meshlib.events import Ejected, Probing, Restored

if TYPE_CHECKING:
    from meshlib.policy import Breaker

HURRY = 15.0
"""Seconds to the next probe of a node, at most, while calls run on a level below it (rule B2)."""


class Ejections:
    """What is known of them.

    Args:
        settings: those of the service's breakers.
        journal: where it notes what has happened.
        tally: where it counts it.
        rng: the only source of chance.

    Attributes:
        probes_at: no ejected node of the view is due for a probe before; where many are, nobody looks at each for each
            call.
    """

    def __init__(self, settings: Breaker, journal: Journal, tally: Tally, rng: Rng) -> None:
        self._settings = settings
        self._journal = journal
        self._tally = tally
        self._rng = rng
        self._nodes: Mapping[Place, Node] = {}
        self._called = 0
        self._sizes: Counter[int] = Counter()
        self._ejected: Counter[int] = Counter()
        self.probes_at = -inf

    def adopt(self, settings: Breaker, now: float) -> None:
        """Go by other settings; see `NodeBreaker.adopt`. Where none is to be ejected, all are let go."""
        self._settings = settings
        for node in self._nodes.values():
            node.breaker.adopt(settings, now)
            was = node.breaker.state
            if not settings.enforce and node.breaker.close(now):
                self._has_turned(node, was, now)
                if not node.is_barred:
                    self._journal.note(Restored, now, node.endpoint, "hand")
        self.probes_at = -inf

    def count(self, nodes: Mapping[Place, Node], view: View, now: float) -> None:
        """There is a new view of these nodes."""
        self._nodes, self._called = nodes, view.priority
        present = [node for node in view.nodes if not node.is_barred]
        self._sizes = Counter(node.endpoint.priority for node in present)
        self._ejected = Counter(node.endpoint.priority for node in present if node.breaker.state != "closed")
        for node in view.ejected:
            self._hurry(node, now)
        self.probes_at = -inf

    def record(self, node: Node, permit: int, success: bool | None, now: float) -> bool:
        """Tell a node's breaker a verdict. Returns whether that makes a new view necessary."""
        breaker = node.breaker
        was, was_healthy, is_probe = breaker.state, breaker.is_healthy, permit == breaker.generation
        unenforced = breaker.unenforced
        if breaker.record(permit, success, now, partial(self._may_eject, node, now), self._rng):
            self._has_turned(node, was, now)
            self._tell_of(node, was, now)
        elif breaker.unenforced != unenforced:
            self._tally.ejections[breaker.fault, False] += 1
        if is_probe and was == "half_open":
            self.probes_at = -inf  # the next one may come at once
        return breaker.is_healthy != was_healthy

    def probed(self, node: Node, was: str, now: float) -> None:
        """A call has become the probe of a node whose breaker was in this state."""
        self._tally.turns["half_open"] += was == "open"
        self._journal.note(Probing, now, node.endpoint)

    def bar(self, node: Node, now: float) -> None:
        """Take a node out by hand, until `unbar`."""
        if not node.is_barred:
            self._tally.ejections["manual", True] += 1
            self._journal.note(Ejected, now, node.endpoint, "hand", "by hand", None)
        node.is_barred = True

    def unbar(self, node: Node, now: float) -> None:
        """Let a node come back, whatever has taken it out."""
        was = node.breaker.state
        if was != "closed" or node.is_barred:
            self._journal.note(Restored, now, node.endpoint, "hand")
        if node.breaker.close(now):
            self._has_turned(node, was, now)
        elif node.is_barred:
            node.breaker.start_ramp(now)
        node.is_barred = False

    def _may_eject(self, node: Node, now: float) -> bool:
        """Whether one more node may be ejected (rule B3)."""
        priority, nodes = node.endpoint.priority, self._nodes.values()
        if any(level > priority for level in self._sizes) and any(
            each.endpoint.priority > priority and each.may_serve(now) for each in nodes
        ):
            return True
        if self._ejected[priority] >= most_ejected(self._sizes[priority], self._settings.max_ejected):
            return False
        others = (each for each in nodes if each is not node and each.endpoint.priority == priority)
        return any(each.is_usable and not each.is_barred for each in others)

    def _has_turned(self, node: Node, was: str, now: float) -> None:
        """A node's breaker has opened or closed."""
        priority, breaker = node.endpoint.priority, node.breaker
        self._tally.turns[breaker.state] += 1
        if breaker.state == "closed":
            self._ejected[priority] -= 1
            node.recover(now)
        else:
            self._ejected[priority] += was == "closed"
            self._hurry(node, now)
            self.probes_at = -inf

    def _tell_of(self, node: Node, was: str, now: float) -> None:
        """A verdict has changed the state of a node's breaker: count it and note it."""
        breaker = node.breaker
        self._tally.ejections[breaker.fault, True] += was == "closed"
        if self._nodes.get(node.endpoint.place) is not node or node.is_barred:
            return  # nobody calls it in any case
        if breaker.state == "closed":
            self._journal.note(Restored, now, node.endpoint, "probe")
        else:
            seconds = breaker.seconds_left(now)
            self._journal.note(Ejected, now, node.endpoint, "breaker", breaker.why, seconds, was == "half_open")

    def _hurry(self, node: Node, now: float) -> None:
        """While calls run on a level below it, a node is not left alone for long."""
        if node.endpoint.priority < self._called:
            node.breaker.probe_by(now + HURRY)
