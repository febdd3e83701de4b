"""One call: which endpoint its next attempt uses, what an attempt's end means, and whether there is another one.

This is the step object that both drivers turn: `begin` an attempt, do the I/O, `settle` it, and either return or begin
again; `release` when the response has ended. It decides everything that can be decided without I/O and does none: the
sync and the async driver differ only in how they wait.

    begin -> (I/O) -> settle -> None: final
                             -> seconds: wait that long, then begin
    release: once per attempt, when its response has ended in whatever way

Two attempts are under way at once when the first takes long and its service is hedged: `begin_hedge` starts the second.
The first of them to `settle` badly then decides nothing, the last does; and when one has a good answer, the other is
told to `lose`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain, islice
from math import inf
from typing import TYPE_CHECKING

from meshlib.core.backoff import Evidence, advised, delay_before, is_asked_for
from meshlib.core.breaker import UNHEARD
from meshlib.core.cluster import Cluster
from meshlib.core.node import Node
from meshlib.core.outcome import (
    REJECTING,
    End,
    Outcome,
    is_throttling,
    outcome_of_end,
    outcome_of_status,
    verdict_of,
)
from meshlib.core.report import Attempt, Kind, Report
from meshlib.core.tally import Decision
from meshlib.core.view import View

if TYPE_CHECKING:
    from meshlib.service import Service

TIMER_SLACK = 0.002
"""Seconds by which a timer may go off before the instant it was set for."""

OK = Outcome.ok  # an enum's member costs more to find than the rest of the line that needs it

LONGEST_SHUN = 10.0
"""Seconds that balancers take a `Retry-After` for, at most: it is one server's word, and forgotten only slowly."""

STALLED = 0.25
"""Seconds after its own deadline at which an attempt's end tells of us rather than of its node (rule B6): a timer that
goes off so late was kept by a blocked event loop, or by a machine that was suspended."""

RESERVED = 5.0
"""Seconds that a probe which is due waits for a call that may be repeated, before another has to make it."""

FEW = 32
"""Nodes among which a retry looks for one that is well: where there are thousands, maybe none of them is."""

LAPSE = 1.0
"""Seconds after its deadline at which an attempt that never reported is taken for lost."""


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
    _transparent_used = False
    _stale_at: Node | None = None
    _strangers: tuple[Node, ...] = ()
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
            elif (cluster.shedder.is_awake or cluster.in_flight >= cluster.most) and (why := cluster.refusal(now)):
                self.refused = why
                return None
            else:
                attempt = self._choose(now, deadline)
                if attempt is None:
                    self.refused = cluster.fullness()
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

    def settle(
        self,
        attempt: Attempt,
        now: float,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        end: End | None = None,
        error: str | None = None,
        sent: bool = True,
        resendable: bool = True,
        whole: bool = False,
        overloaded: bool = False,
        evidence: Evidence = lambda: None,
    ) -> float | None:
        """Judge an attempt by its headers, or by its end without any, and decide what follows.

        Args:
            attempt: what `begin` returned.
            now: the time.
            status: the answer's status.
            retry_after: the answer's `Retry-After` in seconds.
            end: what ended it, if there was no answer.
            error: the exception in words, for the report.
            sent: whether any request byte was written.
            resendable: whether the body can be sent whole again (rule C3).
            overloaded: whether the answer says that its sender is.
            whole: whether the answer's body is here as well, so that the attempt is over and nobody will `release` it.
            evidence: makes what the user's strategies are to see of the end, if they are asked.

        Returns:
            None if this was the last attempt; else the seconds to wait before the next `begin`.

        Raises:
            Exception: a strategy's own; the attempt is settled by then.
        """
        if retry_after is not None:
            attempt.retry_after = retry_after
        if end is None and status not in REJECTING and status not in self.service.retry.on_status:
            assert status is not None
            self.succeed(attempt, now, status, whole)
            return None
        attempt.seconds = now - attempt.started
        attempt.status = status
        if error is not None:
            attempt.error = error
        if end is End.timeout and now >= self.deadline - TIMER_SLACK:
            end = End.deadline
        with self.cluster.lock:
            attempt.outcome = self._judge(attempt, now, end, sent)
            attempt.throttled = overloaded or (status is not None and is_throttling(status, retry_after))
            self._tell_throttle(attempt, now, end)
            if whole or end is not None:
                self.cluster.in_flight -= attempt.finish()
            goes_on = self._is_hedged and self._goes_on_without(attempt)
        if goes_on or end is End.caller:
            return None
        if not resendable:
            return self._stop(attempt, "not_repeatable")
        if end is End.stale and not self._transparent_used and (self.repeatable or not sent):
            self._transparent_used, self._stale_at = True, attempt.node  # rule C8: nobody's fault, and free, once
            return self._go_on(attempt, "transparent", 0.0)
        if self.is_expired(now):
            return self._stop(attempt, "deadline")
        return self._follow(attempt, now, evidence) if self._retries else self._stop(attempt, "switched_off")

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
                attempt.outcome, attempt.error = Outcome.failed, died
                cluster.tally.bodies_died += 1
                attempt.node.failures += 1
                attempt.node.blame(died, now)
                cluster.record(attempt.node, attempt.permit, False, now)

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
        cluster, hedging = self.cluster, self.cluster.hedging
        deadline = min(now + self._attempt_timeout, self.deadline)
        if hedging is None or deadline <= now:
            return None
        with cluster.lock:
            # A service that sheds calls, or has as many as it may, needs a second request for one of them least of all;
            # and half of the budget is kept for those that would fail without it.
            has_room = not cluster.shedder.is_awake and cluster.in_flight < cluster.most
            has_room = has_room and cluster.bucket.tokens >= cluster.bucket.capacity / 2
            node = self._well_and_untried(now) if has_room and hedging.is_affordable else None
            if node is None or not (paid := cluster.pay(now, throttled=False)):
                return None
            hedging.spend()
            self._paid, self._is_hedged = paid, True
            attempt = Attempt(node, node.breaker.generation, cluster.view.balancer, now, deadline)
            attempt.kind = "hedge"
            cluster.in_flight += 1
            self.report.attempts.append(attempt)
        return attempt

    def lose(self, attempt: Attempt, now: float) -> None:
        """An attempt is dropped since the other one has answered: nobody's fault, but so long it has taken already.

        Only a probe has failed: it was to show that its node is well. Else a node that hangs would have one by every
        call, each of which would be hedged.
        """
        attempt.seconds = now - attempt.started
        attempt.outcome, attempt.error = Outcome.abandoned, "the other attempt ended the call"
        node = attempt.node
        with self.cluster.lock:
            node.settle(attempt.number, now, None)
            node.give_up(attempt.seconds, now)
            self.cluster.record(node, attempt.permit, False if attempt.why == "probe" else None, now)
            self.cluster.in_flight -= attempt.finish()
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
            attempt = self._attempt_at(self._stale_at, "again", now, deadline)
        attempt = attempt or self._choose(now, deadline, self._tried())
        if attempt is not None:
            attempt.kind, attempt.waited = self._kind, self._waited
        return attempt

    def _choose(self, now: float, deadline: float, tried: Collection[Node] = ()) -> Attempt | None:
        """An attempt on the next node that may be called: one not tried yet, else the best again (C2)."""
        view = self.cluster.view
        if self._walked is not view:  # what was removed meanwhile gets no attempt
            self._walk, self._walked = view.candidates(now, self._key), view
        if view.ejected and not tried and (attempt := self._probe(view, now, deadline)) is not None:
            return attempt
        if tried and view.panicking and self._well_first is not view:  # the first attempt has spared the survivors
            self._walk, self._well_first = _well_first(self._walk), view
        for node in self._walk:
            if node in tried:
                continue
            breaker = node.breaker
            if breaker.state == "closed":  # nearly always
                return Attempt(node, breaker.generation, view.balancer, now, deadline)
            if (attempt := self._attempt_at(node, view.balancer, now, deadline)) is not None:
                return attempt
        return self._choose_again(list(view.candidates(now, self._key)), now, deadline)

    def _probe(self, view: View, now: float, deadline: float) -> Attempt | None:
        """An attempt on an ejected node that is due for its probe, if there is one.

        Balancers would come to it late: they remember its failures. It is better made by a call that can go on to
        another endpoint when it fails, so the others leave it to those for a while.
        """
        due, soonest = now if self.repeatable else now - RESERVED, inf
        if due < self.cluster.probes_at:
            return None
        for node in view.ejected:
            if node.is_due(due) and (attempt := self._attempt_at(node, "probe", now, deadline)) is not None:
                return attempt
            soonest = min(soonest, node.breaker.next_probe_at)
        self.cluster.probes_at = soonest
        return None

    def _attempt_at(self, node: Node, why: str, now: float, deadline: float) -> Attempt | None:
        """An attempt on this very node, if it has room and its breaker admits the call, or a panic does."""
        if node.in_flight >= self.cluster.most_each:
            return None
        was = node.breaker.state
        permit = node.breaker.admit(now, deadline + LAPSE)
        if permit is None:
            if node not in self.cluster.view.panicking:
                return None
            return Attempt(node, UNHEARD, "panic", now, deadline)
        if was == "closed":
            return Attempt(node, permit, why, now, deadline)
        self.cluster.probed(node, was, now)
        return Attempt(node, permit, "probe", now, deadline)

    def _choose_again(self, nodes: list[Node], now: float, deadline: float) -> Attempt | None:
        """The walk is over: a node that has come or come back since it began, else the best of all once more."""
        tried = self._tried()
        for node in sorted([*nodes, *self.cluster.view.ejected], key=tried.__contains__):
            if node in self._strangers:
                continue
            why = "again" if node in tried else "late"
            if (attempt := self._attempt_at(node, why, now, deadline)) is not None:
                return attempt
        return None

    def _well_and_untried(self, now: float) -> Node | None:
        """The best node for a backup, which is to answer soon: so no probe, and nobody twice."""
        tried, order = self._tried(), self.cluster.view.candidates(now, self._key)
        return next((node for node in order if node not in tried and node.breaker.state == "closed"), None)

    def _goes_on_without(self, attempt: Attempt) -> bool:
        """Whether the other attempt is under way, so that it has the last word. Under the lock."""
        if attempt.kind == "hedge":
            self._paid = 0.0  # it was in vain
        return any(each.outcome is None for each in self.report.attempts)

    def _tried(self) -> list[Node]:
        """The nodes this call has been to."""
        return [attempt.node for attempt in self.report.attempts]

    def _judge(self, attempt: Attempt, now: float, end: End | None, sent: bool) -> Outcome:
        """Find the outcome, and tell node and breaker."""
        node = attempt.node
        if end is None:
            assert attempt.status is not None
            outcome = outcome_of_status(attempt.status)
        else:
            outcome = outcome_of_end(end, sent=sent, lasted=attempt.seconds, usual=node.usual or None)
        verdict = verdict_of(outcome, attempt.status, end) if now <= attempt.deadline + STALLED else None
        node.settle(attempt.number, now, verdict)
        if verdict is False:
            node.blame(attempt.error or f"status {attempt.status}", now)
        if end is End.identity:
            self._strangers += (node,)
        if end is End.deadline:
            self.cluster.cut_short += self._kind == "first"
        if verdict is None and end in (End.deadline, End.caller):
            node.give_up(attempt.seconds, now)  # nobody's fault, but so long it has taken already
        elif attempt.retry_after is not None:
            node.shun(min(attempt.retry_after, LONGEST_SHUN), now)
        self.cluster.record(node, attempt.permit, verdict, now)
        return outcome

    def _tell_throttle(self, attempt: Attempt, now: float, end: End | None) -> None:
        """Timeouts and answers that say so are signs of overload; other answers of none. The rest says nothing."""
        cluster, shedder = self.cluster, self.cluster.shedder
        timed_out = end is End.timeout or (end is End.deadline and attempt.outcome is Outcome.failed)
        if attempt.throttled or (timed_out and now <= attempt.deadline + STALLED):
            shedder.overloaded(now, cluster.in_flight)
        elif shedder.is_awake and attempt.status is not None:
            shedder.accepted(now)

    def _follow(self, attempt: Attempt, now: float, evidence: Evidence) -> float | None:
        """Whether there is another attempt to be paid for, of which kind, and after how long."""
        cluster = self.cluster
        with cluster.lock:
            kind: Kind = "failover" if self._fails_over(attempt, now) else "retry"
            forbidden = self._why_no_retry(attempt) if kind == "retry" else None
            wait: float | None = None if forbidden else self._wait_before(kind, attempt, now)
        if forbidden is not None:
            return self._stop(attempt, forbidden)
        if kind == "retry" and wait is not None:
            wait = advised(self.service.retry, self.report.attempts, self._counted, now, wait, evidence)
        if wait is None:
            return self._stop(attempt, "strategy")
        if self.is_expired(now + wait):
            return self._stop(attempt, "deadline")
        with cluster.lock:
            unpaid = self._pay(kind, attempt, now)
        if unpaid is not None:
            return self._stop(attempt, unpaid)
        self._counted += kind == "retry"
        return self._go_on(attempt, kind, wait)

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

    def _pay(self, kind: Kind, attempt: Attempt, now: float) -> Decision | None:
        """Pay for another attempt, unless the throttle forbids it; returns why not, if so. Under the lock."""
        cluster = self.cluster
        if kind == "retry" and cluster.shedder.is_awake and not cluster.admits(now):
            return "throttled"
        if not (paid := cluster.pay(now, throttled=attempt.throttled)):
            return "no_budget"
        self._paid = paid + self._paid if kind == "failover" else paid  # what was not sent was no work to anybody
        return None

    def _fails_over(self, attempt: Attempt, now: float) -> bool:
        """Whether another attempt would be a failover, which is no retry. Under the lock."""
        if attempt.outcome is not Outcome.not_sent:
            return False
        failovers = sum(each.kind == "failover" for each in self.report.attempts)
        return failovers < len(self.cluster.view.nodes) and self._untried(now)  # whom the balancer may not offer

    def _why_no_retry(self, attempt: Attempt) -> Decision | None:
        """Why there may be no retry, by the rules alone; None if there may."""
        retry = self.service.retry
        if self._strangers and self._strangers_alone():
            return "not_retryable"
        if attempt.outcome is not Outcome.not_sent:
            if not self.repeatable:
                return "not_repeatable"
            if self._on_behalf:
                return "on_behalf"
            if attempt.status is None:
                if attempt.outcome is not Outcome.failed:
                    return "deadline"  # which cut it short
            elif attempt.status not in retry.on_status and retry.on is None and not is_asked_for(attempt):
                return "not_retryable"
        return None if self._counted < retry.max_attempts else "attempts_exhausted"

    def _wait_before(self, kind: Kind, attempt: Attempt, now: float) -> float:
        """The server's word (rule C9); nothing before a failover or the first retry elsewhere; else the back-off."""
        if attempt.retry_after is not None:
            return attempt.retry_after
        if kind == "failover" or (self._counted == 1 and self._untried(now)):
            return 0.0
        return delay_before(self._counted, self.cluster.rng)

    def _strangers_alone(self) -> bool:
        """Whether all nodes there are have failed to prove who they are, to this very call. Under the lock."""
        view = self.cluster.view
        return all(node in self._strangers for node in chain(view.offered, view.ejected))

    def _untried(self, now: float) -> bool:
        """Whether there is a usable node with room this call has not been to."""
        tried, view, most = self._tried(), self.cluster.view, self.cluster.most_each
        return any(
            node not in tried and node.in_flight < most and (node.breaker.is_eligible(now) or node in view.panicking)
            for node in chain(view.offered, view.ejected)
        )


def _well_first(walk: Iterator[Node]) -> Iterator[Node]:
    """The same order, but of the next few those that something speaks against come last."""
    unwell = []
    for node in islice(walk, FEW):
        if node.is_healthy:
            yield node
        else:
            unwell.append(node)
    yield from chain(unwell, walk)
