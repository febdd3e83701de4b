"""How an attempt ended, as its driver tells it, and what its node, its breaker and the throttle hear of that.

Decides the attempt's outcome, and who is told what. It never decides what follows for the call. An answer that is
neither a rejection nor worth a retry, as most are, does not come here: see `Call.succeed`. All of it happens under
the cluster's lock.
"""

from __future__ import annotations

from typing import NamedTuple

from meshlib.core.backoff import Evidence
from meshlib.core.cluster import Cluster
from meshlib.core.outcome import End, Outcome, is_throttling, outcome_of_end, outcome_of_status, verdict_of
from meshlib.core.report import Attempt

LONGEST_SHUN = 10.0
"""Seconds that balancers take a `Retry-After` for, at most: it is one server's word, and forgotten only slowly."""

STALLED = 0.25
"""Seconds after its own deadline at which an attempt's end tells of us rather than of its node (rule B6): a timer that
goes off so late was kept by a blocked event loop, or by a machine that was suspended."""


class Ending(NamedTuple):
    """How an attempt ended: with the headers of an answer, or without any.

    Attributes:
        status: the answer's status.
        retry_after: the answer's `Retry-After` in seconds.
        end: what ended it, if there was no answer.
        error: the exception in words, for the report.
        sent: whether any request byte was written.
        resendable: whether the body can be sent whole again (rule C3).
        whole: whether the answer's body is here as well, so that the attempt is over and nobody will release it.
        overloaded: whether the answer says that its sender is.
        evidence: makes what the user's strategies are to see of the end, if they are asked.
    """

    status: int | None = None
    retry_after: float | None = None
    end: End | None = None
    error: str | None = None
    sent: bool = True
    resendable: bool = True
    whole: bool = False
    overloaded: bool = False
    evidence: Evidence = lambda: None

    @property
    def is_throttling(self) -> bool:
        """Whether it asks for fewer calls."""
        return self.overloaded or (self.status is not None and is_throttling(self.status, self.retry_after))


def judge(cluster: Cluster, attempt: Attempt, ending: Ending, now: float) -> None:
    """Find the outcome of an attempt, and tell node, breaker and throttle."""
    attempt.seconds = now - attempt.started
    attempt.status = ending.status
    if ending.error is not None:
        attempt.error = ending.error
    attempt.throttled = ending.is_throttling
    attempt.met_stranger = ending.end is End.identity
    attempt.outcome = _outcome(attempt, ending)
    _tell_node(cluster, attempt, ending, now)
    _tell_throttle(cluster, attempt, ending, now)
    if ending.whole or ending.end is not None:
        cluster.in_flight -= attempt.finish()


def drop(cluster: Cluster, attempt: Attempt, now: float) -> None:
    """An attempt is dropped since the other one has answered: nobody's fault, but so long it has taken already.

    Only a probe has failed: it was to show that its node is well. Else a node that hangs would have one by every call,
    each of which would be hedged.
    """
    attempt.seconds = now - attempt.started
    attempt.outcome, attempt.error = Outcome.abandoned, "the other attempt ended the call"
    node = attempt.node
    node.settle(attempt.number, now, None)
    node.give_up(attempt.seconds, now)
    cluster.record(node, attempt.permit, False if attempt.why == "probe" else None, now)
    cluster.in_flight -= attempt.finish()


def spoil(cluster: Cluster, attempt: Attempt, died: str, now: float) -> None:
    """The body of a good answer did not end well: one more failure of its node."""
    attempt.outcome, attempt.error = Outcome.failed, died
    cluster.tally.bodies_died += 1
    attempt.node.failures += 1
    attempt.node.blame(died, now)
    cluster.record(attempt.node, attempt.permit, False, now)


def _outcome(attempt: Attempt, ending: Ending) -> Outcome:
    if ending.end is None:
        assert ending.status is not None
        return outcome_of_status(ending.status)
    return outcome_of_end(ending.end, sent=ending.sent, lasted=attempt.seconds, usual=attempt.node.usual or None)


def _tell_node(cluster: Cluster, attempt: Attempt, ending: Ending, now: float) -> None:
    """What the node is remembered for, and what its breaker hears."""
    node, end, outcome = attempt.node, ending.end, attempt.outcome
    assert outcome is not None
    verdict = verdict_of(outcome, ending.status, end) if now <= attempt.deadline + STALLED else None
    node.settle(attempt.number, now, verdict)
    if verdict is False:
        node.blame(attempt.error or f"status {ending.status}", now)
    if verdict is None and end in (End.deadline, End.caller):
        node.give_up(attempt.seconds, now)  # nobody's fault, but so long it has taken already
    elif attempt.retry_after is not None:
        node.shun(min(attempt.retry_after, LONGEST_SHUN), now)
    cluster.record(node, attempt.permit, verdict, now)


def _tell_throttle(cluster: Cluster, attempt: Attempt, ending: Ending, now: float) -> None:
    """Timeouts and answers that say so are signs of overload; other answers of none. The rest says nothing."""
    end, shedder = ending.end, cluster.shedder
    timed_out = end is End.timeout or (end is End.deadline and attempt.outcome is Outcome.failed)
    if attempt.throttled or (timed_out and now <= attempt.deadline + STALLED):
        shedder.overloaded(now, cluster.in_flight)
    elif shedder.is_awake and attempt.status is not None:
        shedder.accepted(now)
