"""The gate of a service: what may be sent to it.

Decides whether one more call is let in, by the limit and the throttle, and whether an extra attempt can be paid for. It
counts what it refuses and notes what people want to hear of. It never looks at a node, and it does not count what is in
flight. All of it happens under the cluster's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlib.core.budget import Bucket
from meshlib.core.chance import Rng
from meshlib.core.journal import Journal
from meshlib.core.report import Attempt, Kind
from meshlib.core.tally import Decision, Tally
from meshlib.core.throttle import Shedder
from meshlib.events import BudgetExhausted, OverloadBegan, OverloadEnded

if TYPE_CHECKING:
    from meshlib.service import Service

CALM = 5.0
"""Seconds without a refused call after which an overload is over."""


class Gate:
    """What limit, throttle and budget of a service say.

    Args:
        service: the settings.
        journal: where it notes what has happened.
        tally: where it counts what it refuses.
        rng: the only source of chance.

    Attributes:
        bucket: the retry budget.
        shedder: what the throttle has heard.
    """

    def __init__(self, service: Service, journal: Journal, tally: Tally, rng: Rng) -> None:
        self.bucket = Bucket(service.retry.budget)
        self.shedder = Shedder(service.throttle)
        self._limit = service.limit
        self._journal = journal
        self._tally = tally
        self._rng = rng
        self._refused_at: float | None = None

    def adopt(self, service: Service) -> None:
        """Go by other settings; what was heard and paid so far stays."""
        self.bucket.adopt(service.retry.budget)
        self.shedder.adopt(service.throttle)
        self._limit = service.limit

    def refusal(self, in_flight: int, now: float) -> str:
        """Why one more call is not let in, in words; empty if it is."""
        if self._limit is not None and in_flight >= self._limit.max_in_flight:
            self._tally.refusals["limit"] += 1
            return f"it has {in_flight} in flight, which is its limit"
        if self.shedder.is_awake and not self._admits(now):
            self._tally.refusals["throttle"] += 1
            return f"it is overloaded, and {self.shedder.share(now):.0%} of the calls are refused here"
        return ""

    def fullness(self) -> str:
        """That every endpoint is at its limit, in words; empty if there is none."""
        if self._limit is None or self._limit.per_endpoint is None:
            return ""
        self._tally.refusals["limit"] += 1
        return f"each of its endpoints has {self._limit.per_endpoint} in flight, which is their limit"

    def pay(self, kind: Kind, after: Attempt, now: float) -> float | Decision:
        """Pay for another attempt after one that ended badly; returns what it cost, or why there is to be none."""
        if kind == "retry" and self.shedder.is_awake and not self._admits(now):
            return "throttled"
        return self._take(now, throttled=after.throttled) or "no_budget"

    def has_spare(self, in_flight: int) -> bool:
        """Whether there is room for a request that nothing has failed for.

        A service that sheds calls, or has as many as it may, needs a second request for one of them least of all; and
        half of the budget is kept for those that would fail without it.
        """
        is_full = self._limit is not None and in_flight >= self._limit.max_in_flight
        return not self.shedder.is_awake and not is_full and self.bucket.tokens >= self.bucket.capacity / 2

    def pay_for_backup(self, now: float) -> float:
        """Pay for a second attempt beside the first; returns what it cost, 0 for none."""
        return self._take(now, throttled=False)

    def _admits(self, now: float) -> bool:
        """Whether the throttle, which is awake, lets one more attempt go."""
        if self.shedder.admits(now, self._rng):
            if self._refused_at is not None and now - self._refused_at >= CALM:
                self._refused_at = None
                self._journal.note(OverloadEnded, now)
            return True
        if self._refused_at is None:
            self._journal.note(OverloadBegan, now, self.shedder.share(now))
        self._refused_at = now
        return False

    def _take(self, now: float, *, throttled: bool) -> float:
        """What an extra attempt costs, out of the bucket; 0 if it has not so much."""
        was_exhausted = self.bucket.is_exhausted
        paid = self.bucket.pay(throttled=throttled)
        if self.bucket.is_exhausted and not was_exhausted:
            self._journal.note(BudgetExhausted, now)
        return paid
