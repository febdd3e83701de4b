"""The live state of one service: its nodes, its view, its retry budget, and the one lock over them.

Decides which nodes survive a change of the endpoints, tells breakers their verdicts, and knows when what they have come
to makes a new view necessary, which it publishes by one assignment. It never resolves a name and never does I/O; the
lock is held for arithmetic only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from meshlib.core.budget import Bucket
from meshlib.core.chance import Rng
from meshlib.core.doubts import Doubt, Traffic, doubts_about
from meshlib.core.hedge import Hedging
from meshlib.core.journal import Journal
from meshlib.core.node import Node, remembering
from meshlib.core.report import Attempt
from meshlib.core.snapshot import NodeSnapshot, ServiceSnapshot
from meshlib.core.tally import Tally
from meshlib.core.throttle import Shedder
from meshlib.core.view import Level, Levels, View, most_ejected
from meshlib.endpoint import Endpoint, Place
from meshlib.events import (
    BudgetExhausted,
    ConfigChanged,
    DiscoveryRecovered,
    DiscoveryStale,
    Ejected,
    EndpointAdded,
    EndpointRemoved,
    Event,
    HealthChanged,
    OverloadBegan,
    OverloadEnded,
    PanicBegan,
    PanicEnded,
    Probing,
    Restored,
)

if TYPE_CHECKING:
    from meshlib.policy import HealthCheck
    from meshlib.service import Service


SHOWN = 5
"""Warnings that an error repeats; a list may hold a thousand names that cannot be looked up."""


HURRY = 15.0
"""Seconds to the next probe of a node, at most, while calls run on a level below it (rule B2)."""

SPARED = 0.1
"""The share of its weight that a node which is not healthy has in panic, as at the beginning of a ramp (rule B3: the
balancer still steers)."""

CALM = 5.0
"""Seconds without a refused call after which an overload is over."""

CROWD = 100
"""Nodes from which on changes of their health and steps of their ramps share a view, if they come within a moment."""

MOMENT = 2e-5
"""Seconds of such a moment, for each node: some ten times what a view takes to build."""


class Pending(Protocol):
    """What a call waits for while nobody asks the service's resolver, or there is no answer yet."""

    def wait(self, left: float) -> None:
        """Wait `left` seconds at most."""
        ...

    async def wait_async(self, left: float) -> None:
        """See `wait`."""
        ...


class Observer(Protocol):
    """What the calls of a service are observed by."""

    def collect(self) -> None:
        """Do what was left undone about calls that were garbage-collected."""
        ...

    def begin(self, method: str, url: Callable[[], str]) -> Any:
        """A call begins; returns what hears of the rest."""
        ...


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
        probes_at: no ejected node of the view is due for a probe before; where many are, nobody looks at each for each
            call.
        shedder: what the throttle has heard.
        most, most_each: attempts that may be in flight at once, in all and on one node.
        slow_call: seconds after which an answer counts as a failure.
        in_flight: attempts whose response has not ended.
        panics: how often a panic has begun.
        tally: what else has happened.
        holds_until: when what is known of the endpoints grows stale; infinite if it never does.
        doubted: the settings of which something was said in the log.
        keyless, cut_short: see `Traffic`.
        bucket: the retry budget.
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
        self.bucket = Bucket(service.retry.budget)
        self.shedder = Shedder(service.throttle)
        self.hedging = None if service.hedge is None else Hedging(service.hedge)
        self._set_bounds(service)
        self.journal = Journal(service.name)
        self.orphans: deque[Attempt] = deque()
        self._nodes: dict[Place, Node] = {}
        self._published: dict[Place, Endpoint] = {}
        self._sizes: Counter[int] = Counter()
        self._ejected: Counter[int] = Counter()
        self.source = ""
        self.known_at = self._known_since = 0.0
        self.pending: Pending | None = None
        self.is_known = False
        self.warnings: tuple[str, ...] = ()
        self.doubted: set[str] = set()
        self._is_stale = False
        self._refused_at: float | None = None
        self.in_flight = self.panics = self.keyless = self.cut_short = 0
        self.tally = Tally()
        self.telemetry: Observer | None = None
        self.holds_until = inf
        self.changes_at, self._built_at = inf, -inf
        self.probes_at = -inf
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
            self.bucket.adopt(service.retry.budget)
            self.shedder.adopt(service.throttle)
            self._forget_doubts(changed)
            for node in self._nodes.values():
                node.adopt(service.balancer)
                node.breaker.adopt(service.breaker, now)
                if not service.breaker.enforce:
                    self._free(node, now)
                if service.health is None:
                    node.health, node.awaits_check = None, False
            self._adopt_hedge(service)
            self.probes_at = -inf
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
            node = self._at(place)
            if not node.is_barred:
                self.tally.ejections["manual", True] += 1
                self.journal.note(Ejected, now, node.endpoint, "hand", "by hand", None)
            node.is_barred = True
            self.changes_at = now  # nobody taken out by hand is called for another moment

    def unbar(self, place: Place, now: float) -> None:
        """End an ejection, be it by hand or by its breaker; see `bar`. Calls come back on a ramp."""
        with self.lock:
            node = self._at(place)
            was = node.breaker.state
            if was != "closed" or node.is_barred:
                self.journal.note(Restored, now, node.endpoint, "hand")
            if node.breaker.close(now):
                self._has_turned(node, was, now)
            elif node.is_barred:
                node.breaker.start_ramp(now)
            node.is_barred = False
            self._change(now)

    def has(self, place: Place) -> bool:
        """Whether a place is one of its endpoints."""
        return place in self._nodes

    def why_empty(self, now: float) -> str:
        """Why there is no endpoint to call, in words."""
        said = "; ".join(self.warnings[:SHOWN])
        if (more := len(self.warnings) - SHOWN) > 0:
            said = f"{said}; and {more} more"
        said = f" ({said})" if said else ""
        if not self.is_known:
            return f"its endpoints are not known yet{said}"
        if self._nodes:
            shown = [f"{each.endpoint}: {each.why}" for each in self.snapshot(now).nodes[:SHOWN]]
            return f"no endpoint is to be called now ({'; '.join(shown)})"
        return f"it has no endpoint, as of {now - self.known_at:.0f} s ago{said or f' ({self.source})'}"

    def record(self, node: Node, permit: int, success: bool | None, now: float) -> None:
        """Tell a node's breaker a verdict. Under the lock."""
        breaker = node.breaker
        was, was_healthy, is_probe = breaker.state, breaker.is_healthy, permit == breaker.generation
        unenforced = breaker.unenforced
        if breaker.record(permit, success, now, partial(self._may_eject, node, now), self.rng):
            self._has_turned(node, was, now)
            self._tell_of(node, was, now)
        elif breaker.unenforced != unenforced:
            self.tally.ejections[breaker.fault, False] += 1
        if is_probe and was == "half_open":
            self.probes_at = -inf  # the next one may come at once
        if breaker.is_healthy != was_healthy:
            self._change(now)

    def refusal(self, now: float) -> str:
        """Why one more call is not let in, in words; empty if it is. Under the lock."""
        if self.in_flight >= self.most:
            self.tally.refusals["limit"] += 1
            return f"it has {self.in_flight} in flight, which is its limit"
        if self.shedder.is_awake and not self.admits(now):
            self.tally.refusals["throttle"] += 1
            return f"it is overloaded, and {self.shedder.share(now):.0%} of the calls are refused here"
        return ""

    def admits(self, now: float) -> bool:
        """Whether the throttle, which is awake, lets one more attempt go. Under the lock."""
        if self.shedder.admits(now, self.rng):
            if self._refused_at is not None and now - self._refused_at >= CALM:
                self._refused_at = None
                self.journal.note(OverloadEnded, now)
            return True
        if self._refused_at is None:
            self.journal.note(OverloadBegan, now, self.shedder.share(now))
        self._refused_at = now
        return False

    def pay(self, now: float, *, throttled: bool) -> float:
        """Pay for an extra attempt; returns what it cost, 0 for none. Under the lock."""
        was_exhausted = self.bucket.is_exhausted
        paid = self.bucket.pay(throttled=throttled)
        if self.bucket.is_exhausted and not was_exhausted:
            self.journal.note(BudgetExhausted, now)
        return paid

    def probed(self, node: Node, was: str, now: float) -> None:
        """A call has become the probe of a node whose breaker was in this state. Under the lock."""
        self.tally.turns["half_open"] += was == "open"
        self.journal.note(Probing, now, node.endpoint)

    def fullness(self) -> str:
        """That every endpoint is at its limit, in words; empty if there is none. Under the lock."""
        limit = self.service.limit
        if limit is None or limit.per_endpoint is None or not self.view.offered:
            return ""
        self.tally.refusals["limit"] += 1
        return f"each of its endpoints has {limit.per_endpoint} in flight, which is their limit"

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

    def _adopt_hedge(self, service: Service) -> None:
        """Under the lock."""
        if service.hedge is None or self.hedging is None:
            self.hedging = None if service.hedge is None else Hedging(service.hedge)
        else:
            self.hedging.adopt(service.hedge)

    def _free(self, node: Node, now: float) -> None:
        """Its breaker, which ejects nobody any more, lets go of a node. Under the lock."""
        was = node.breaker.state
        if node.breaker.close(now):
            self._has_turned(node, was, now)
            if not node.is_barred:
                self.journal.note(Restored, now, node.endpoint, "hand")

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
        news = self._come_and_gone(nodes, now)
        with self.lock:
            self.journal.add_all(news)
            self._note_panic(view, now)
            self.panics += view.panic and not self.view.panic
            self.view, self._nodes, self._built_at = view, nodes, now
            present = [node for node in view.nodes if not node.is_barred]
            self._sizes = Counter(node.endpoint.priority for node in present)
            self._ejected = Counter(node.endpoint.priority for node in present if node.breaker.state != "closed")
            self.changes_at = min(self.changes_at, self._soonest(view.until))
            for node in view.ejected:
                self._hurry(node, now)
            self.probes_at = -inf

    def _come_and_gone(self, nodes: dict[Place, Node], now: float) -> list[Event]:
        """What is to be noted of these nodes in the place of those before. They may be thousands."""
        name, news = self.service.name, list[Event]()
        if nodes is not self._nodes:
            if self.journal.hears(EndpointRemoved):
                gone = [node for place, node in self._nodes.items() if place not in nodes]
                news += [EndpointRemoved(name, now, node.endpoint) for node in gone]
            if self.journal.hears(EndpointAdded):
                come = [node for place, node in nodes.items() if place not in self._nodes]
                news += [EndpointAdded(name, now, node.endpoint) for node in come]
        return news

    def _note_panic(self, view: View, now: float) -> None:
        """Note that a panic begins or ends with this view. Under the lock."""
        if view.panic and not self.view.panic:
            called = [node for node in view.nodes if node.endpoint.priority == view.priority]
            level = Level.of(view.priority, called)
            self.journal.note(PanicBegan, now, level.healthy, level.known)
        elif self.view.panic and not view.panic:
            self.journal.note(PanicEnded, now)

    def _tell_of(self, node: Node, was: str, now: float) -> None:
        """A verdict has changed the state of a node's breaker: count it and note it. Under the lock."""
        breaker = node.breaker
        self.tally.ejections[breaker.fault, True] += was == "closed"
        if self._nodes.get(node.endpoint.place) is not node or node.is_barred:
            return  # nobody calls it in any case
        if breaker.state == "closed":
            self.journal.note(Restored, now, node.endpoint, "probe")
        else:
            seconds = breaker.seconds_left(now)
            self.journal.note(Ejected, now, node.endpoint, "breaker", breaker.why, seconds, was == "half_open")

    def _change(self, now: float) -> None:
        """The view is to be built anew. Under the lock."""
        self.changes_at = min(self.changes_at, self._soonest(now))

    def _soonest(self, wanted: float) -> float:
        """When a view that is wanted then may be built: a crowd's takes long, and is not built for every change."""
        crowd = len(self._nodes)
        return wanted if crowd <= CROWD else max(wanted, self._built_at + crowd * MOMENT)

    def _may_eject(self, node: Node, now: float) -> bool:
        """Whether one more node may be ejected (rule B3). Under the lock."""
        priority, nodes = node.endpoint.priority, self._nodes.values()
        if any(level > priority for level in self._sizes) and any(
            each.endpoint.priority > priority and each.may_serve(now) for each in nodes
        ):
            return True
        if self._ejected[priority] >= most_ejected(self._sizes[priority], self.service.breaker.max_ejected):
            return False
        others = (each for each in nodes if each is not node and each.endpoint.priority == priority)
        return any(each.is_usable and not each.is_barred for each in others)

    def _has_turned(self, node: Node, was: str, now: float) -> None:
        """A node's breaker has opened or closed. Under the lock."""
        priority, breaker = node.endpoint.priority, node.breaker
        self.tally.turns[breaker.state] += 1
        if breaker.state == "closed":
            self._ejected[priority] -= 1
            node.recover(now)
        else:
            self._ejected[priority] += was == "closed"
            self._hurry(node, now)
            self.probes_at = -inf

    def _hurry(self, node: Node, now: float) -> None:
        """While calls run on a level below it, a node is not left alone for long. Under the lock."""
        if node.endpoint.priority < self.view.priority:
            node.breaker.probe_by(now + HURRY)

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
        """The state of the service as frozen values. Calls go on meanwhile: there may be thousands of nodes."""
        self.refresh(now)
        view = self.view
        offered, nodes = set(view.offered), []
        with self.lock:
            self.collect_orphans()
        for node in view.nodes:
            with self.lock:
                nodes.append(NodeSnapshot.of(node, node in offered, node in view.panicking, now))
        with self.lock:
            return ServiceSnapshot(
                name=self.service.name,
                nodes=tuple(nodes),
                in_flight=self.in_flight,
                panic=view.panic,
                panics=self.panics,
                budget_tokens=self.bucket.tokens,
                budget_capacity=self.bucket.capacity,
                throttle_share=self.shedder.share(now),
                limit=None if self.service.limit is None else self.service.limit.max_in_flight,
                balancer=self.view.balancer,
                source=self.source,
                age=now - self.known_at if self.is_known else None,
                warnings=(*self.warnings, *(doubt.text for doubt in self.doubts(now))),
            )

    def doubts(self, now: float) -> list[Doubt]:
        """What people should know of the settings in the light of the traffic."""
        seconds = now - self._known_since if self.is_known else 0.0
        return list(
            doubts_about(
                self.service,
                self.view.nodes,
                Traffic(seconds, self.keyless, self.cut_short, self.shedder.in_words(now)),
            )
        )
