"""The retry budget of a service: how much extra work a bad time may cause.

Decides whether an extra attempt can be paid for. It knows neither time nor nodes: failures drain the bucket, successes
refill it, so that in a total outage the extra attempts dry up whatever the load is, and come back with the answers.
"""

from __future__ import annotations

from meshlib.policy import Budget


class Bucket:
    """The tokens of one service.

    Args:
        settings: its size and prices.

    Attributes:
        capacity: how many tokens it holds.
        tokens: how many are left.
        is_exhausted: whether it could not pay for something, and was not half full since.
    """

    __slots__ = ("_settings", "capacity", "is_exhausted", "tokens")

    def __init__(self, settings: Budget) -> None:
        self._settings = settings
        self.capacity = settings.capacity
        self.tokens = float(settings.capacity)
        self.is_exhausted = False

    def adopt(self, settings: Budget) -> None:
        """Go by other settings: it stays as full as it is."""
        share = self.tokens / self.capacity
        self._settings, self.capacity = settings, settings.capacity
        self.tokens = settings.capacity * share

    def pay(self, *, throttled: bool) -> float:
        """Take the price of an extra attempt; 0 if it cannot be paid, and then nothing is taken."""
        cost = self._settings.throttle_cost if throttled else self._settings.retry_cost
        if cost > self.tokens:
            self.is_exhausted = True
            return 0.0
        if 2 * self.tokens >= self.capacity:
            self.is_exhausted = False
        self.tokens -= cost
        return cost

    def succeeded(self, paid: float) -> None:
        """A call succeeded; `paid` is what it gets back, 0 if it needed no extra attempt."""
        self.tokens = min(self.capacity, self.tokens + (paid or self._settings.refund))
