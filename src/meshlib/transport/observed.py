"""A call that is observed: an exchange that tells its trail what happens.

Decides only which moment of a call is which of its trail's. What is made of it is up to `meshlib.telemetry`. A call
that nobody observes is a plain `Exchange`, and pays for none of this.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import httpx

from meshlib.core.outcome import Outcome, outcome_of_status
from meshlib.core.report import Attempt
from meshlib.transport import binding
from meshlib.transport.exchange import Exchange, Recorder
from meshlib.transport.terms import Route


class ObservedExchange(Exchange):
    """See `Exchange`."""

    trail: Any  # it has one

    def __init__(self, route: Route, request: httpx.Request, recorder: Recorder) -> None:
        super().__init__(route, request, recorder)
        observer = route.cluster.telemetry
        assert observer is not None
        self.trail = observer.begin(request.method, partial(binding.shown, request.url))
        if self.terms.template is not None:
            self.trail.goes_by(self.terms.template)

    def begin(self, now: float) -> Attempt | None:
        """See `Call.begin`."""
        waited = 0.0 if self.report.attempts else now - self.started  # else it is the very instant
        attempt = super().begin(now)
        if attempt is not None:
            self.trail.attempt_begins(attempt)
        if waited > 0.0:
            self.trail.waited("resolve", waited, attempt)
        return attempt

    def begin_hedge(self, now: float) -> Attempt | None:
        """See `Call.begin_hedge`."""
        attempt = super().begin_hedge(now)
        if attempt is not None:
            self.trail.attempt_begins(attempt)
        return attempt

    def connected(self, attempt: Attempt, now: float, *, queued: bool = False) -> None:
        """See `Call.connected`."""
        if queued:
            self.trail.waited("slot", now - attempt.started, attempt)
        super().connected(attempt, now)

    def head(self, attempt: Attempt) -> tuple[bytes, bytes, list[tuple[bytes, bytes]]]:
        """See `Exchange.head`."""
        method, target, headers = super().head(attempt)
        carried = self.trail.headers(attempt)
        return method, target, binding.carrying(headers, carried) if carried else headers

    def answered(self, attempt: Attempt, answer: binding.Answer) -> float | None:
        """See `Exchange.answered`."""
        try:
            return super().answered(attempt, answer)
        finally:
            self.trail.attempt_ends(attempt)

    def broke(self, attempt: Attempt, error: BaseException, connection: Any) -> float | None:
        """See `Exchange.broke`."""
        try:
            return super().broke(attempt, error, connection)
        finally:
            self.trail.attempt_ends(attempt, error, is_late=self.is_expired(self.clock()))

    def lose(self, attempt: Attempt, now: float) -> None:
        """See `Call.lose`."""
        super().lose(attempt, now)
        self.trail.attempt_ends(attempt)

    def deliver(self, reply: Any) -> httpx.Response:
        """See `Exchange.deliver`."""
        response = super().deliver(reply)
        status = response.status_code
        self._end(outcome_of_status(status), status)
        return response

    def left(self, error: BaseException) -> None:
        """See `Exchange.left`."""
        attempts = self.report.attempts
        self._end((attempts[-1].outcome or Outcome.abandoned) if attempts else Outcome.not_sent, error=error)

    def forsaken(self) -> None:
        """See `Exchange.forsaken`."""
        now, attempts = self.clock(), self.report.attempts
        under_way = [attempt for attempt in attempts if attempt.outcome is None]
        for attempt in under_way:
            attempt.outcome, attempt.seconds = Outcome.abandoned, now - attempt.started
        last = Outcome.abandoned if attempts else Outcome.not_sent
        self.trail.forsaken(attempts, under_way, now - self.started, str(last))

    def _end(self, outcome: Outcome, status: int | None = None, error: BaseException | None = None) -> None:
        self.trail.call_ends(self.report.attempts, self.clock() - self.started, str(outcome), status, error)
