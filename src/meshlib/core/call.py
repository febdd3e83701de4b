"""One call: the order in which it is all decided, from its first attempt to its last.

This is the step object that both drivers turn: `begin` an attempt, do the I/O, `settle` it, and either return or begin
again; `release` when the response has ended. It does no I/O: the drivers, sync and async, differ only in how they wait.

    begin -> (I/O) -> settle -> None: final
                             -> seconds: wait that long, then begin
    release: once per attempt, when its response has ended in whatever way

What nearly every call needs is here: the walk along the balancer's order, and a good answer. The rest is decided in
rooms of its own: whether it is let in (`gate`), who is probed (`choosing`), what a bad end means (`ending`) and what
follows it (`following`).

Two attempts are under way at once when the first takes long and its service is hedged: `begin_hedge` starts the second
(`backup`). The first of them to `settle` badly then decides nothing, the last does; and when one has a good answer, the
other is told to `lose`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import inf
from typing import TYPE_CHECKING

from meshlib.core.backoff import advised
from meshlib.core.backup import backup
from meshlib.core.choosing import anywhere, attempt_at, probe, well_first
from meshlib.core.cluster import Cluster
from meshlib.core.ending import Ending, drop, judge, spoil
from meshlib.core.following import CallState, another
from meshlib.core.node import Node
from meshlib.core.outcome import REJECTING, End, Outcome
from meshlib.core.report import Attempt, Kind, Report
from meshlib.core.tally import Decision
from meshlib.core.view import View

if TYPE_CHECKING:
    from meshlib.service import Service

TIMER_SLACK = 0.002
"""Seconds by which a timer may go off before the instant it was set for."""

OK = Outcome.ok  # an enum's member costs more to find than the rest of the line that needs it


class Call:
    """One logical request to a service.

    Args:
        cluster: the service's live state.
        repeatable: whether the request may be executed twice (rule C1).
        deadline: when the call is given up, on the mesh's clock.
        attempt_timeout: seconds for each attempt.
        retries: whether there may be more than one attempt, apart from a transparent one.
        on_behalf: whether the caller is itself at work for a retry: then what was sent is not sent again (rule C10).
        key: what a consistent hash goes by.

    Attributes:
        service: the settings that it began with. What concerns this call alone goes by them to its end; what all calls
            share, the view, breakers, budget, throttle and limit, is the cluster's and as it is set by then.
        refused: why the call was not let in, in words; empty if it was.
    """

    # Where a call stands before its first attempt; most calls stay there.
    _kind: Kind = "first"
    _retries = True
    _on_behalf = False
    _key: str | None = None
    _walk: Iterator[Node] = iter(())
    _walked: View | None = None
    _well_first: View | None = None
    _counted = 1
    _paid = 0.0
    _waited = 0.0
    _stale_at: Node | None = None
    refused = ""
    _is_hedged = False
    service: Service

    def __init__(
        self,
        cluster: Cluster,
        *,
        repeatable: bool,
        deadline: float,
        attempt_timeout: float | None = None,
        retries: bool = True,
        on_behalf: bool = False,
        key: str | None = None,
    ) -> None:
        service = cluster.service
        given = service.timeout.attempt if attempt_timeout is None else attempt_timeout
        self.service = service
        self._set_out(cluster, service.name, repeatable, deadline, given)
        self._retries = retries
        self._on_behalf = on_behalf
        self._key = key

    def _set_out(self, cluster: Cluster, name: str, repeatable: bool, deadline: float, attempt_timeout: float) -> None:
        """What every call begins with."""
        self.cluster = cluster
        self.repeatable = repeatable
        self.deadline = deadline
        self.report = Report(name)
        self._attempt_timeout = attempt_timeout

    def begin(self, now: float) -> Attempt | None:
        """Start the next attempt.

        Returns:
            The attempt, with its node and deadline; None if no node may be used, no time is left, or the call is not
            let in: then `refused` says why.
        """
        deadline = now + self._attempt_timeout
        if deadline > self.deadline:
            if now >= self.deadline:
                return None
            deadline = self.deadline
        cluster = self.cluster
        if now >= cluster.changes_at:
            cluster.refresh(now)
        with cluster.lock:
            if cluster.orphans:
                cluster.collect_orphans()
            if self._kind != "first":
                attempt = self._choose_next(now, deadline)
            elif (cluster.shedder.is_awake or cluster.in_flight >= cluster.most) and (
                why := cluster.gate.refusal(cluster.in_flight, now)
            ):
                self.refused = why
                return None
            else:
                attempt = self._choose(now, deadline)
                if attempt is None and cluster.view.offered:
                    self.refused = cluster.gate.fullness()
            if attempt is not None:
                cluster.in_flight += 1
                self.report.attempts.append(attempt)
        return attempt

    def restart(self, attempt: Attempt, now: float) -> None:
        """The attempt's own work begins only now: what kept it was not its endpoint."""
        with self.cluster.lock:
            attempt.node.restart(attempt.number, now)
        attempt.started = now
        attempt.deadline = min(now + self._attempt_timeout, self.deadline)

    def connected(self, attempt: Attempt, now: float, *, queued: bool = False) -> None:
        """The attempt has waited for its connection and has it: what its node is remembered for begins here.

        A new connection costs several times what an answer does, and a place in our own queue says nothing of the node;
        balancers would avoid whoever was connected to last.

        Args:
            attempt: it.
            now: the time.
            queued: whether it has waited for a connection of ours, rather than for a new one.
        """
        with self.cluster.lock:
            attempt.node.restart(attempt.number, now)

    def settle(self, attempt: Attempt, now: float, ending: Ending) -> float | None:
        """Judge an attempt by its headers, or by its end without any, and decide what follows.

        Args:
            attempt: what `begin` returned.
            now: the time.
            ending: how it ended.

        Returns:
            None if this was the last attempt; else the seconds to wait before the next `begin`.

        Raises:
            Exception: a strategy's own; the attempt is settled by then.
        """
        if ending.retry_after is not None:
            attempt.retry_after = ending.retry_after
        status, cluster = ending.status, self.cluster
        if ending.end is None and status not in REJECTING and status not in self.service.retry.on_status:
            assert status is not None
            self.succeed(attempt, now, status, ending.whole)
            return None
        if ending.end is End.timeout and self.is_expired(now):
            ending = ending._replace(end=End.deadline)
        with cluster.lock:
            judge(cluster, attempt, ending, now)
            cluster.cut_short += ending.end is End.deadline and self._kind == "first"
            goes_on = self._is_hedged and self._goes_on_without(attempt)
        if goes_on or ending.end is End.caller:
            return None
        return self._follow(attempt, ending, now)

    def succeed(self, attempt: Attempt, now: float, status: int, whole: bool) -> None:
        """What `settle` does about an answer that is neither a rejection nor worth a retry, as most are.

        A driver that knows as much may come here straight away.
        """
        attempt.status = status
        attempt.seconds = now - attempt.started
        attempt.outcome = OK
        node, cluster = attempt.node, self.cluster
        with cluster.lock:
            node.settle(attempt.number, now, True)
            breaker = node.breaker
            if attempt.seconds > cluster.slow_call:
                cluster.record(node, attempt.permit, False, now)
            elif now < breaker.quiet_until and attempt.permit == breaker.generation:
                breaker.successes += 1
            else:
                cluster.record(node, attempt.permit, True, now)
            if whole:
                cluster.in_flight -= attempt.finish()
            if cluster.shedder.is_awake:
                cluster.shedder.accepted(now)
            bucket = cluster.bucket
            if bucket.tokens < bucket.capacity:  # else there is nothing to give back
                bucket.succeeded(self._paid)

    def release(self, attempt: Attempt, now: float, *, died: str | None = None) -> None:
        """An attempt's response has ended; counts once, however often it is said.

        Args:
            attempt: a settled attempt.
            now: the time.
            died: what killed the body, in words, if it did not end well: one more failure of the node.
        """
        cluster = self.cluster
        with cluster.lock:
            if not attempt.finish():
                return
            cluster.in_flight -= 1
            if died is not None and attempt.outcome is Outcome.ok:
                spoil(cluster, attempt, died, now)

    @property
    def may_be_hedged(self) -> bool:
        """Whether the attempt that has just begun may get a backup, for all that is known of the call."""
        may_repeat = self.repeatable and self._retries and not self._on_behalf
        return may_repeat and self._kind == "first" and self.cluster.hedging is not None

    def hedge_delay(self) -> float:
        """Seconds after which it may; infinite while too little is known. To be asked once for a call: it counts."""
        hedging = self.cluster.hedging
        with self.cluster.lock:
            delay = None if hedging is None else hedging.delay()
        return inf if delay is None else delay

    def begin_hedge(self, now: float) -> Attempt | None:
        """Start a second attempt beside the first.

        Returns:
            The attempt, at an endpoint that is well and not the first one's; None if there is no such endpoint, no
            time, nothing to pay it with, or if a call would not be let in.
        """
        cluster, attempts = self.cluster, self.report.attempts
        deadline = min(now + self._attempt_timeout, self.deadline)
        if deadline <= now:
            return None
        with cluster.lock:
            found = backup(cluster, self._key, attempts, now, deadline)
            if found is None:
                return None
            attempt, self._paid = found
            self._is_hedged = True
            cluster.in_flight += 1
            attempts.append(attempt)
        return attempt

    def lose(self, attempt: Attempt, now: float) -> None:
        """The other attempt has answered, and this one is dropped."""
        with self.cluster.lock:
            drop(self.cluster, attempt, now)
            if attempt.kind == "hedge":
                self._paid = 0.0  # it was the first try that succeeded

    def observe(self, attempt: Attempt) -> None:
        """The attempt that might have been hedged is over; its service learns how long such ones take."""
        hedging = self.cluster.hedging
        if hedging is not None:
            with self.cluster.lock:
                hedging.observe(attempt.seconds, attempt.outcome is OK)

    def is_expired(self, now: float) -> bool:
        """Whether the total time has run out."""
        return now >= self.deadline - TIMER_SLACK

    def _choose_next(self, now: float, deadline: float) -> Attempt | None:
        """Another attempt: a transparent one where the last was, else see `_choose`."""
        attempt = None
        if self._kind == "transparent" and self._stale_at is not None:
            attempt = attempt_at(self.cluster, self._stale_at, "again", now, deadline)
        attempt = attempt or self._choose(now, deadline, self._tried())
        if attempt is not None:
            attempt.kind, attempt.waited = self._kind, self._waited
        return attempt

    def _choose(self, now: float, deadline: float, tried: Collection[Node] = ()) -> Attempt | None:
        """An attempt on the next node that may be called: one not tried yet, else the best again (C2)."""
        view = self.cluster.view
        if self._walked is not view:  # what was removed meanwhile gets no attempt
            self._walk, self._walked = view.candidates(now, self._key), view
        if view.ejected and not tried and (attempt := probe(self.cluster, self.repeatable, now, deadline)) is not None:
            return attempt
        if tried and view.panicking and self._well_first is not view:  # the first attempt has spared the survivors
            self._walk, self._well_first = well_first(self._walk), view
        for node in self._walk:
            if node in tried:
                continue
            breaker = node.breaker
            if breaker.state == "closed":  # nearly always
                return Attempt(node, breaker.generation, view.balancer, now, deadline)
            if (attempt := attempt_at(self.cluster, node, view.balancer, now, deadline)) is not None:
                return attempt
        return anywhere(self.cluster, self._key, self.report.attempts, now, deadline)

    def _goes_on_without(self, attempt: Attempt) -> bool:
        """Whether the other attempt is under way, so that it has the last word. Under the lock."""
        if attempt.kind == "hedge":
            self._paid = 0.0  # it was in vain
        return any(each.outcome is None for each in self.report.attempts)

    def _tried(self) -> list[Node]:
        """The nodes this call has been to."""
        return [attempt.node for attempt in self.report.attempts]

    def _follow(self, attempt: Attempt, ending: Ending, now: float) -> float | None:
        """Go on with another attempt, if there may be one, there is time for it and it can be paid for."""
        cluster, retry, attempts = self.cluster, self.service.retry, self.report.attempts
        with cluster.lock:
            found = another(cluster, self._state(now), attempt, ending, now)
        if isinstance(found, str):
            return self._stop(attempt, found)
        kind, wait = found
        if kind == "transparent":
            self._stale_at = attempt.node
            return self._go_on(attempt, kind, wait)
        if kind == "retry":
            advice = advised(retry, attempts, self._counted, now, wait, ending.evidence)
            if advice is None:
                return self._stop(attempt, "strategy")
            wait = advice
        if self.is_expired(now + wait):
            return self._stop(attempt, "deadline")
        with cluster.lock:
            paid = cluster.gate.pay(kind, attempt, now)
            if not isinstance(paid, str):
                self._paid = paid + self._paid if kind == "failover" else paid  # what was not sent was nobody's work
        if isinstance(paid, str):
            return self._stop(attempt, paid)
        self._counted += kind == "retry"
        return self._go_on(attempt, kind, wait)

    def _state(self, now: float) -> CallState:
        return CallState(
            retry=self.service.retry,
            repeatable=self.repeatable,
            retries=self._retries,
            on_behalf=self._on_behalf,
            attempts=self.report.attempts,
            counted=self._counted,
            is_expired=self.is_expired(now),
        )

    def _go_on(self, attempt: Attempt, kind: Kind, wait: float) -> float:
        """There is to be another attempt, after so many seconds."""
        self._kind, self._waited = kind, wait
        self._decided(attempt, "retried")
        return wait

    def _stop(self, attempt: Attempt, why: Decision) -> float | None:
        """There is to be none."""
        self._decided(attempt, why)
        return None

    def _decided(self, attempt: Attempt, decision: Decision) -> None:
        attempt.decision = decision
        with self.cluster.lock:
            self.cluster.tally.decisions[decision] += 1
