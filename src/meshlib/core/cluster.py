"""The live state of one service: its nodes, its view, and the one lock over all that calls change.

Decides which nodes survive a change of the endpoints, and knows when what they have come to makes a new view necessary,
which it publishes by one assignment. What may be sent is up to its gate, who is taken out to its ejections. It never
resolves a name and never does I/O; the lock is held for arithmetic only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from threading import Lock
from typing import TYPE_CHECKING

from meshlib.core.chance import Rng
from meshlib.core.doubts import Doubt, Traffic, doubts_about
from meshlib.core.ejections import Ejections
from meshlib.core.gate import Gate
from meshlib.core.hedge import hedging_by
from meshlib.core.hooks import Observer, Pending
from meshlib.core.journal import Journal
from meshlib.core.news import note_panic, of_endpoints
from meshlib.core.node import Node, remembering
from meshlib.core.report import Attempt
from meshlib.core.snapshot import ServiceSnapshot
from meshlib.core.tally import Tally
from meshlib.core.telling import SHOWN, snapshot_of, why_empty
from meshlib.core.view import Levels, View
from meshlib.endpoint import Endpoint, Place
from meshlib.events import ConfigChanged, DiscoveryRecovered, DiscoveryStale, HealthChanged

if TYPE_CHECKING:
    from meshlib.policy import HealthCheck
    from meshlib.service import Service

SPARED = 0.1
"""The share of its weight that a node which is not healthy has in panic, as at the beginning of a ramp (rule B3: the
balancer still steers)."""

CROWD = 100
"""Nodes from which on changes of their health and steps of their ramps share a view, if they come within a moment."""

MOMENT = 2e-5
"""Seconds of such a moment, for each node: some ten times what a view takes to build."""


class Cluster:
    """The live state of a service.

    Args:
        service: its settings.
        rng: the only source of chance.
        zone: where this process is; endpoints there are preferred.

    Attributes:
        service: its settings, replaced by one assignment.
        view: what the request path reads, without the lock.
        pending: what a call waits for before it begins; None as a rule.
        source: where the endpoints come from, for people.
        is_known: whether there was a first answer, which may have been that there is no endpoint.
        known_at: when the endpoints were last confirmed.
        warnings: what people should know of the endpoints and where they come from.
        changes_at: when the view is to be built anew; see `refresh`.
        most, most_each: attempts that may be in flight at once, in all and on one node.
        slow_call: seconds after which an answer counts as a failure.
        in_flight: attempts whose response has not ended.
        panics: how often a panic has begun.
        tally: what else has happened.
        holds_until: when what is known of the endpoints grows stale; infinite if it never does.
        doubted: the settings of which something was said in the log.
        keyless, cut_short: see `Traffic`.
        gate: what may be sent.
        ejections: which nodes are taken out.
        bucket, shedder: the gate's, as every call reads them.
        telemetry: what begins the trails of observed calls; None while nobody observes them.
        hedging: when a call gets a backup request; None for never.
        journal: what has happened and was not told yet.
        publishing: held by who builds the view, which may take long.
        orphans: attempts that were garbage-collected, or their response was, without being ended. A finalizer may run
            while this very thread holds the lock, so it appends here and the next call does the counting.
    """

    def __init__(self, service: Service, rng: Rng, zone: str = "") -> None:
        self.service = service
        self._zone = zone
        self.rng = rng
        self.lock = Lock()
        self.publishing = Lock()
        self.hedging = hedging_by(service.hedge)
        self._set_bounds(service)
        self.journal = Journal(service.name)
        self.tally = Tally()
        self.gate = Gate(service, self.journal, self.tally, rng)
        self.ejections = Ejections(service.breaker, self.journal, self.tally, rng)
        self.bucket, self.shedder = self.gate.bucket, self.gate.shedder
        self.orphans: deque[Attempt] = deque()
        self._nodes: dict[Place, Node] = {}
        self._published: dict[Place, Endpoint] = {}
        self.source = ""
        self.known_at = self._known_since = 0.0
        self.pending: Pending | None = None
        self.is_known = False
        self.warnings: tuple[str, ...] = ()
        self.doubted: set[str] = set()
        self._is_stale = False
        self.in_flight = self.panics = self.keyless = self.cut_short = 0
        self.telemetry: Observer | None = None
        self.holds_until = inf
        self.changes_at, self._built_at = inf, -inf
        self.view = View.build((), Levels.of((), service), service, rng, zone, 0.0)

    def publish(
        self,
        endpoints: Sequence[Endpoint],
        source: str,
        now: float,
        *,
        known_at: float | None = None,
        found_by: object = None,
    ) -> list[Place]:
        """Take over a set of endpoints; places that stay keep their node.

        Args:
            endpoints: the whole set.
            source: where it came from, for people.
            now: the time.
            known_at: when it was last confirmed; default now.
            found_by: the resolver that was asked; if it is not the service's any more, nothing is done.

        Returns:
            The places that are no longer in it.
        """
        with self.publishing:
            if found_by is not None and found_by is not self.service.resolver:
                return []
            return self.take_over(endpoints, source, now, known_at)

    def take_over(self, endpoints: Sequence[Endpoint], source: str, now: float, known_at: float | None) -> list[Place]:
        """See `publish`, for one who holds the lock `publishing`."""
        wanted = {endpoint.place: endpoint for endpoint in endpoints}
        gone = [place for place in self._nodes if place not in wanted]
        if wanted != self._published:
            nodes = self._nodes_at(wanted, self.service)
            with self.lock:
                for node, endpoint in zip(nodes.values(), wanted.values(), strict=True):
                    node.endpoint = endpoint
            self._build(nodes, now)
            self._published = wanted
            self.tally.changes += 1
        self.source, self.known_at = source, now if known_at is None else known_at
        if not self.is_known:
            self._known_since = now
        self.is_known = True  # now that the view is there: who waits for this looks without the lock
        return gone

    def rehearse(self, service: Service, endpoints: Sequence[Endpoint] | None, now: float) -> None:
        """Build a view as it would be by other settings, of these endpoints or those there are, and throw it away.

        Raises:
            Exception: the balancer's own, which is the only one that may.
        """
        wanted = self._published if endpoints is None else {endpoint.place: endpoint for endpoint in endpoints}
        nodes = tuple(self._nodes_at(wanted, service).values())
        View.build(nodes, Levels.of(nodes, service), service, self.rng, self._zone, now)

    def adopt(self, service: Service, changed: tuple[str, ...], now: float) -> None:
        """Go by other settings from now on; what was learned stays. The next call builds the view that goes with them.

        Args:
            service: the settings.
            changed: the names of those that are others than before.
            now: the time.
        """
        with self.lock:
            self.service = service
            self._set_bounds(service)
            self.gate.adopt(service)
            self._forget_doubts(changed)
            for node in self._nodes.values():
                node.adopt(service.balancer)
                if service.health is None:
                    node.health, node.awaits_check = None, False
            self.ejections.adopt(service.breaker, now)
            self.hedging = hedging_by(service.hedge, self.hedging)
            self.journal.note(ConfigChanged, now, changed)
            self.changes_at = now

    def announce(self, now: float) -> None:
        """It is a service from now on."""
        with self.lock:
            self.journal.note(ConfigChanged, now, ())

    def refresh(self, now: float) -> None:
        """Build the view anew if a node's health has changed, or its ramp has come to the next step.

        Whoever comes here at or after `changes_at` does it, without the lock. If somebody else is at it, the view of
        before does for once: what is offered is held against the breakers in any case.
        """
        if now >= self.changes_at and self.publishing.acquire(blocking=False):
            try:
                self._build(self._nodes, now)
            finally:
                self.publishing.release()

    def heard(self, place: Place, healthy: bool, now: float, why: str = "", *, by: HealthCheck | None = None) -> None:
        """A check has come to know whether the endpoint is healthy, and why in a few words.

        What was checked `by` other settings than those of now does not count any more.
        """
        with self.lock:
            if by is not None and by != self.service.health:
                return
            node = self._nodes.get(place)
            if node is not None:
                was = node.health is False, node.is_waiting
                if node.health is not healthy and (node.health is not None or not healthy):
                    self.journal.note(HealthChanged, now, node.endpoint, healthy, why)
                node.health = healthy
                if was != (not healthy, False):  # that it is well from the first changes nothing
                    self._change(now)

    def set_trouble(self, why: str, now: float) -> None:
        """What its resolvers fail with, in words; empty if none does."""
        with self.lock:
            if why and not self._is_stale:
                self.journal.note(DiscoveryStale, now, why, now - self.known_at if self.is_known else None)
            elif self._is_stale and not why:
                self.journal.note(DiscoveryRecovered, now)
            self._is_stale = bool(why)

    def checked(self, place: Place, passed: bool, finding: str) -> None:
        """A check was made, and this is what it found; see `heard` for what they add up to."""
        with self.lock:
            self.tally.checks[passed] += 1
            if (node := self._nodes.get(place)) is not None:
                node.finding = f"{'passed' if passed else 'failed'}: {finding}"

    def asked(self, answers: int, errors: int, holds_until: float, dropped: int = 0) -> None:
        """Resolvers have answered so often and failed so often since the last time, and were not followed so often."""
        with self.lock:
            self.tally.dropped += dropped
            self.tally.answers[True] += answers
            self.tally.answers[False] += errors
            self.holds_until = holds_until

    def bar(self, place: Place, now: float) -> None:
        """Take an endpoint out by hand: it gets no call until `unbar`, whatever happens.

        Raises:
            ValueError: if there is no such endpoint now.
        """
        with self.lock:
            self.ejections.bar(self._at(place), now)
            self.changes_at = now  # nobody taken out by hand is called for another moment

    def unbar(self, place: Place, now: float) -> None:
        """End an ejection, be it by hand or by its breaker; see `bar`. Calls come back on a ramp."""
        with self.lock:
            self.ejections.unbar(self._at(place), now)
            self._change(now)

    def has(self, place: Place) -> bool:
        """Whether a place is one of its endpoints."""
        return place in self._nodes

    def why_empty(self, now: float) -> str:
        """Why there is no endpoint to call, in words."""
        return why_empty(self, now)

    def record(self, node: Node, permit: int, success: bool | None, now: float) -> None:
        """Tell a node's breaker a verdict. Under the lock."""
        if self.ejections.record(node, permit, success, now):
            self._change(now)

    def count_keyless(self) -> None:
        """A call has brought no key."""
        with self.lock:
            self.keyless += 1

    def collect_orphans(self) -> None:
        """Count the ends of what was garbage-collected. Under the lock."""
        while self.orphans:
            attempt = self.orphans.popleft()
            attempt.node.settle(attempt.number, 0.0, None)  # unless its answer had come
            self.in_flight -= attempt.finish()

    def _at(self, place: Place) -> Node:
        if (node := self._nodes.get(place)) is None:
            known = ", ".join(str(each.endpoint) for each in list(self._nodes.values())[:SHOWN])
            raise ValueError(
                f"{self.service.name} has no endpoint {place[0]}:{place[1]} now (known: {known or 'none'})"
            )
        return node

    def _set_bounds(self, service: Service) -> None:
        """What calls read of the settings, as they need it."""
        limit, slow_call = service.limit, service.breaker.slow_call
        self.most = inf if limit is None else limit.max_in_flight
        self.most_each = inf if limit is None or limit.per_endpoint is None else limit.per_endpoint
        self.slow_call = inf if slow_call is None else slow_call

    def _forget_doubts(self, changed: tuple[str, ...]) -> None:
        """What was said of settings that are others now may be said again, of what happens from now on."""
        self.doubted = {about for about in self.doubted if about.partition(".")[0] not in changed}
        if "balancer" in changed:
            self.keyless = 0
        if "timeout" in changed:
            self.cut_short = 0

    def _nodes_at(self, wanted: dict[Place, Endpoint], service: Service) -> dict[Place, Node]:
        """The nodes of these places; those there are, and new ones."""
        return {place: self._nodes.get(place) or self._newcomer(each, service) for place, each in wanted.items()}

    def _newcomer(self, endpoint: Endpoint, service: Service) -> Node:
        node = remembering(endpoint, service.breaker, service.balancer)
        node.awaits_check = self.is_known and service.health is not None
        return node

    def _build(self, nodes: dict[Place, Node], now: float) -> None:
        """Swap in a view of these nodes."""
        levels = Levels.of(tuple(nodes.values()), self.service)
        with self.lock:
            for node in nodes.values():
                share = SPARED if node in levels.spared else node.breaker.share(now)
                node.effective_weight = node.endpoint.weight * share
            was, self.changes_at = self.changes_at, inf  # until something changes while we build
        try:  # a balancer may take long, while calls go on
            view = View.build(tuple(nodes.values()), levels, self.service, self.rng, self._zone, now)
        except BaseException:  # the user's may raise
            with self.lock:
                self.changes_at = min(self.changes_at, was)  # and what has changed meanwhile is not forgotten
            raise
        news = of_endpoints(self.service.name, self._nodes, nodes, self.journal, now)
        with self.lock:
            self.journal.add_all(news)
            note_panic(self.view, view, self.journal, now)
            self.panics += view.panic and not self.view.panic
            self.view, self._nodes, self._built_at = view, nodes, now
            self.ejections.count(nodes, view, now)
            self.changes_at = min(self.changes_at, self._soonest(view.until))

    def _change(self, now: float) -> None:
        """The view is to be built anew. Under the lock."""
        self.changes_at = min(self.changes_at, self._soonest(now))

    def _soonest(self, wanted: float) -> float:
        """When a view that is wanted then may be built: a crowd's takes long, and is not built for every change."""
        crowd = len(self._nodes)
        return wanted if crowd <= CROWD else max(wanted, self._built_at + crowd * MOMENT)

    def forget(self) -> None:
        """After a fork, in the child: nobody holds the lock, and no attempt of the parent's is ours."""
        self.lock, self.publishing = Lock(), Lock()
        self.journal.forget()
        self.orphans.clear()
        self.in_flight = 0
        self.changes_at = -inf  # whoever was at it in the parent is not here
        for node in self._nodes.values():
            node.forget_open()

    def snapshot(self, now: float) -> ServiceSnapshot:
        """The state of the service as frozen values."""
        self.refresh(now)
        with self.lock:
            self.collect_orphans()
        return snapshot_of(self, now)

    def doubts(self, now: float) -> list[Doubt]:
        """What people should know of the settings in the light of the traffic."""
        seconds = now - self._known_since if self.is_known else 0.0
        traffic = Traffic(seconds, self.keyless, self.cut_short, self.shedder.in_words(now))
        return list(doubts_about(self.service, self.view.nodes, traffic))
