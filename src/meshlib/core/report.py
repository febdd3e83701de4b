"""What happened in a call: every attempt, in order.

Decides nothing; it is written by the call and read by people. `Attempt` is the very object that the call works with,
so a body that dies after its response was handed out still shows up in a report that somebody holds already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from meshlib.core.node import Node
    from meshlib.core.outcome import Outcome
    from meshlib.core.tally import Decision

Kind = Literal["first", "retry", "transparent", "failover", "hedge"]


class Attempt:
    """One try of a call on one endpoint.

    Attributes:
        endpoint: where it went.
        kind: why it was made: `first`, `retry`, `failover` (after `not_sent`), `transparent` (a kept connection had
            died) or `hedge` (the first took long, and went on).
        why: why this endpoint was chosen: the balancer's name, `probe`, `panic` when its breaker is open and ignored,
            `again` when every other one was tried, `late` when it came or came back while the call was under way.
        outcome: what happened; None while it is under way.
        status: the answer's status, if there was one.
        error: what ended it, if there was no answer; the class of the exception and its text.
        seconds: from its start to its headers or its end, without what the caller's own body took to come.
        waited: back-off before it, in seconds.
        retry_after: the answer's `Retry-After` in seconds, if it had one.
        decision: if it ended badly: whether another one followed, or why not; see `meshlib.core.tally.Decision`.
        started, deadline: on the mesh's clock; the attempt is given up at the latter.

    `node`, `number`, `permit`, `throttled` (the answer asked for fewer calls), `met_stranger` (the endpoint did not
    prove to be who it should be) and `is_over` belong to the call.
    """

    # What most attempts never get to know costs nothing until it is set.
    outcome: Outcome | None = None
    kind: Kind = "first"
    waited = 0.0
    status: int | None = None
    error: str | None = None
    seconds = 0.0
    retry_after: float | None = None
    decision: Decision | None = None
    throttled = met_stranger = False
    is_over = False

    def __init__(self, node: Node, permit: int, why: str, started: float, deadline: float) -> None:
        self.node = node
        self.permit = permit
        self.number = node.start(started)
        self.endpoint = node.endpoint
        self.why = why
        self.started = started
        self.deadline = deadline

    def finish(self) -> bool:
        """Its response has ended. Returns whether that counts: once, and not in a child. Under the cluster's lock."""
        if self.is_over:
            return False
        self.is_over = True
        node = self.node
        if self.number <= node.inherited:
            return False
        node.in_flight -= 1
        return True

    def to_dict(self) -> dict[str, Any]:
        """What is public of it, as plain values that `json.dumps` takes; the endpoint is `host:port`."""
        return {
            "endpoint": str(self.endpoint),
            "kind": self.kind,
            "why": self.why,
            "outcome": None if self.outcome is None else str(self.outcome),
            "status": self.status,
            "error": self.error,
            "seconds": self.seconds,
            "waited": self.waited,
            "retry_after": self.retry_after,
            "decision": self.decision,
        }

    def __str__(self) -> str:
        waited = f" after waiting {_in_units(self.waited)}" if self.waited else ""
        result = self.error if self.error is not None else f"status {self.status}"
        advice = "" if self.retry_after is None else f", Retry-After {self.retry_after:.3g} s"
        ended = (
            "under way" if self.outcome is None else f"{self.outcome} in {_in_units(self.seconds)}, {result}{advice}"
        )
        return f"{self.kind} at {self.endpoint}{waited} ({self.why}): {ended}"

    def __repr__(self) -> str:
        return f"<Attempt {self}>"


class Report:
    """What happened in a call.

    Attributes:
        service: the service's name.
        attempts: every attempt, in order.
    """

    __slots__ = ("attempts", "service")

    def __init__(self, service: str) -> None:
        self.service = service
        self.attempts: list[Attempt] = []

    def to_dict(self) -> dict[str, Any]:
        """As plain values that `json.dumps` takes."""
        return {"service": self.service, "attempts": [attempt.to_dict() for attempt in self.attempts]}

    def __str__(self) -> str:
        if not self.attempts:
            return f"{self.service}: no attempt"
        count = len(self.attempts)
        return f"{self.service}: {count} attempt{'' if count == 1 else 's'}: {'; '.join(map(str, self.attempts))}"

    def __repr__(self) -> str:
        return f"<Report {self}>"


def attach(error: BaseException, made: Report) -> None:
    """Have an exception carry the report of the call that it leaves, and list it in a note."""
    error.meshlib_report = made  # type: ignore[attr-defined]
    error.add_note(f"meshlib: {made}")


def report(result: Any) -> Report:
    """What happened in the call that brought `result`.

    Args:
        result: an `httpx.Response` from a client of a mesh, or an exception that left a call.

    Raises:
        ValueError: if `result` did not come out of a mesh.
    """
    found = getattr(result, "extensions", {}).get("meshlib") or getattr(result, "meshlib_report", None)
    if not isinstance(found, Report):
        raise ValueError(f"no report: this {type(result).__name__} did not come out of a call through a mesh")
    return found


def _in_units(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1.0 else f"{seconds * 1000:.3g} ms"
