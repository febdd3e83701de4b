"""The throttle of a service: how many calls are not even tried while it is overloaded.

Decides, from how attempts ended, what share of the calls is refused here. It never decides what a sign of overload is,
never waits and never looks at a node: time comes in as `now`, chance as `rng`.

    asleep -[a sign of overload]-> awake -[`window` without one, and a call asks]-> asleep, and all is forgotten

The law is that of client-side throttling in Google's "Site Reliability Engineering", chapter "Handling Overload": of
`requests`, of which `accepts` were not met by overload, the share

    (requests - k * accepts - FORGIVEN) / (requests - FORGIVEN)

is refused, and what is refused counts as a request. Three things differ, because two minutes of memory would neither
react nor let go within seconds, and because a Python worker makes a few calls per second:

- An attempt counts when it ends. One that takes long is not one that was not accepted.
- What is remembered fades within half a second, but by a twelfth per request at most: at thousands of calls per second
  the throttle goes by the last half second, at two by the last dozen calls, and a pause makes nothing fade.
- Some requests are forgiven: where few are remembered, an unlucky row of timeouts is no overload. With the default k,
  one attempt in three that times out, at random and at any rate, is next to never held for one.
- One endpoint that hangs may hold every caller, and then let them all go at once. So whatever is on its way when the
  throttle wakes is made up for by as many accepted requests: in its sleep it has counted none.

While a service answers, a throttle sleeps and costs its callers one look at `is_awake`.
"""

from __future__ import annotations

from math import exp

from meshlib.core.chance import Rng
from meshlib.policy import Throttle

MEMORY = 0.25
"""Seconds in which what is remembered fades to a third: on average it is as old as in a window of half a second."""

ENOUGH = 12.0
"""Requests that are remembered however few calls there are: so many does a refused share rest on."""

LEAST_KEPT = 1 - 1 / ENOUGH
"""What is kept of the past at each request, however long ago the last one was: just what keeps `ENOUGH` at `ENOUGH`."""

FORGIVEN = 8.0
"""Requests beyond the accepted ones that are no reason yet to refuse any.

With a third of all attempts timing out at random, one waking in a thousand refuses a call; with a fifth, none in 4,000.
More would leave too little of `ENOUGH` to tell an outage by.
"""

MOST = 0.9
"""The largest share that is refused: the rest finds out that the service is well again."""

SILENCE = 1.0
"""Seconds after the last admitted call when one is admitted in any case: of two calls per second, one in ten would find
out about a recovery after five seconds only, and by chance much later."""


class Shedder:
    """What a service's throttle has heard.

    Args:
        settings: how eager it is, for how long it remembers, and whether it acts.

    Attributes:
        is_awake: whether there is anything to ask or to tell it but a sign of overload.
        refused: calls that were refused.
        would_refuse: calls that would have been, with `enforce=False`.
    """

    __slots__ = (
        "_accepts",
        "_admitted_at",
        "_counted_at",
        "_heard_at",
        "_requests",
        "_settings",
        "is_awake",
        "refused",
        "would_refuse",
    )

    def __init__(self, settings: Throttle) -> None:
        self._settings = settings
        self.is_awake = False
        self.refused = 0
        self.would_refuse = 0
        self._requests = self._accepts = 0.0
        self._heard_at = self._counted_at = self._admitted_at = 0.0

    def adopt(self, settings: Throttle) -> None:
        """Go by other settings, and by what was heard so far."""
        self._settings = settings

    def overloaded(self, now: float, in_flight: int = 0) -> None:
        """An attempt ended with a sign of overload.

        Args:
            now: the time.
            in_flight: the service's attempts in flight; needed only if it is not awake.
        """
        if not self.is_awake:
            self.is_awake = True
            self._requests = self._accepts = float(in_flight)
            self._admitted_at = now
        self._heard_at = now
        self._count(now, 0.0)

    def accepted(self, now: float) -> None:
        """An attempt ended otherwise, in a way that says something; of interest only to one who `is_awake`."""
        self._count(now, 1.0)

    def admits(self, now: float, rng: Rng) -> bool:
        """Whether one more call may go out; a refusal is remembered."""
        if now - self._heard_at > self._settings.window:
            self.is_awake = False
            return True
        if rng.random() >= self.share(now) or now - self._admitted_at >= SILENCE:
            self._admitted_at = now
            return True
        if not self._settings.enforce:
            self.would_refuse += 1
            return True  # it goes out, and counts when it ends
        self.refused += 1
        self._count(now, 0.0)
        return False

    def share(self, now: float) -> float:
        """The share of the calls that is refused at present, or would be: 0 to `MOST`."""
        if not self.is_awake or now - self._heard_at > self._settings.window:
            return 0.0
        requests = self._requests
        unaccepted = requests - self._settings.k * self._accepts - FORGIVEN
        if unaccepted <= 0.0:
            return 0.0
        return min(MOST, unaccepted / (max(requests, ENOUGH) - FORGIVEN))

    def in_words(self, now: float) -> str:
        """What it does now and has done, for people; empty while it lets all calls in."""
        if not (share := self.share(now)):
            return ""
        if not self._settings.enforce:
            return f"throttle: {share:.0%} of the calls would be refused as overload, {self.would_refuse} so far"
        return f"throttle: {share:.0%} of the calls are refused for overload, {self.refused} so far"

    def _count(self, now: float, accepts: float) -> None:
        """Let fade what is remembered, unless it is little, and add a request to it."""
        requests, elapsed = self._requests, now - self._counted_at
        if elapsed > 0.0:  # callers on several threads may come in the wrong order
            self._counted_at = now
            if requests > ENOUGH:
                kept = max(exp(-elapsed / MEMORY), LEAST_KEPT)
                requests *= kept
                self._accepts *= kept
        self._requests = requests + 1.0
        self._accepts += accepts
