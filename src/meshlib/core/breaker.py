"""The breaker of one node: when to stop calling it, and how to find out that it is well again.

Decides whether a call may use the node, and what a verdict does to its state. It never looks at other nodes: whether
one more may be ejected is told by the view. It never waits: time comes in as `now`.

    closed --[too many failures, and the view allows it]----------------> open
    open ----[its time has passed, one call asks]-----------------------> half_open, that call is the probe
    half_open --[the probe succeeds]------------------------------------> closed, on a ramp
    half_open --[the probe fails]---------------------------------------> open, for twice as long
    half_open --[the probe never reports, or learns nothing]------------> half_open, with a new probe
    half_open --[that one learns nothing either]------------------------> open, for twice as long

Too many are `consecutive` ones in a row, or a success rate below `success_rate` over the window. Failures in a row tell
at any traffic; the rate finds the node that fails every third call, once there are `min_calls` to judge by.

The law: a verdict counts only for the generation in which its permit was given; every change of state and every probe
starts a new generation. So a late answer from before an ejection can neither close nor reopen anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from typing import Literal

from meshlib.core.chance import Rng
from meshlib.policy import Breaker

State = Literal["closed", "open", "half_open"]

Fault = Literal["consecutive", "success_rate"]
"""What is found of a node that is too bad: failures in a row, or too low a rate of success."""

JITTER = 0.5
"""An ejection lasts its length +-50 %: callers that opened together must not probe together."""

SLICES = 10
"""The window moves on by a tenth of its length."""

STEPS = 10
"""A ramp has so many: each is a new view."""

UNHEARD = -1
"""A permit of no generation: what is called in spite of its breaker is not judged by it."""


class NodeBreaker:
    """The state machine on a node.

    Args:
        settings: when it opens and for how long.

    Attributes:
        state: what it is in.
        generation: what permits of now carry.
        failures_in_a_row: since the last success.
        is_refused: whether it would be open, had the view allowed it.
        why: what it opened for last, or would have, in words.
        fault: the same in one word.
        ejections: how often it has opened.
        unenforced: how often it would have, were it to be enforced.
        quiet_until: until then a success of this generation is nothing but one more in `successes`.
        successes: in the slice of the window that is under way.
    """

    __slots__ = (
        "_closed_at",
        "_failures",
        "_is_probed_in_vain",
        "_lapses_at",
        "_opened",
        "_opens_until",
        "_past",
        "_settings",
        "_slice_ends",
        "ejections",
        "failures_in_a_row",
        "fault",
        "generation",
        "is_refused",
        "quiet_until",
        "state",
        "successes",
        "unenforced",
        "why",
    )

    def __init__(self, settings: Breaker) -> None:
        self._settings = settings
        self.state: State = "closed"
        self.generation = 0
        self.why = ""
        self.fault: Fault = "consecutive"
        self.ejections = self.unenforced = 0
        self.is_refused = False
        self._opened = 0
        self._opens_until = self._lapses_at = 0.0
        self._closed_at = self._slice_ends = -inf
        self._start_afresh()

    def adopt(self, settings: Breaker, now: float) -> None:
        """Go by other settings: its state stays, and what it has counted, which fades within the new window.

        What a shorter `max_open_for` would not have allowed ends sooner.
        """
        if settings.window != self._settings.window:
            self._slice_ends = min(self._slice_ends, now + settings.window / SLICES)
        self._settings = settings
        self.quiet_until = -inf
        self.is_refused = self.is_refused and settings.enforce
        if self.state == "open":
            self.probe_by(now + settings.max_open_for * (1 + JITTER))

    @property
    def is_healthy(self) -> bool:
        """Whether it has nothing against its node."""
        return self.state == "closed" and not self.is_refused

    def is_eligible(self, now: float) -> bool:
        """Whether `admit` would give a permit."""
        return self.state == "closed" or now >= self.next_probe_at

    @property
    def next_probe_at(self) -> float:
        """From when on a call may be the probe, unless it is closed."""
        return self._opens_until if self.state == "open" else self._lapses_at

    def admit(self, now: float, lapses_at: float) -> int | None:
        """Ask to use the node.

        Args:
            now: the time.
            lapses_at: when an attempt with this permit will have ended in any case; a probe that has not reported by
                then is given up.

        Returns:
            A permit, to be handed back with the verdict; None if the node is not to be used.
        """
        if self.state == "closed":
            return self.generation
        if not self.is_eligible(now):
            return None
        self.state = "half_open"
        self._lapses_at = lapses_at
        self.generation += 1
        return self.generation

    def record(self, permit: int, success: bool | None, now: float, may_open: Callable[[], bool], rng: Rng) -> bool:
        """Hear the verdict of an attempt.

        Args:
            permit: what `admit` gave for it.
            success: None if the attempt says nothing about the node.
            now: the time.
            may_open: whether the view lets one more node be ejected; asked only if it matters.
            rng: for the jitter.

        Returns:
            Whether the state changed.
        """
        if permit != self.generation or self.state == "open":  # which gives no permits
            return False
        if success is None:
            return self.state == "half_open" and self._learned_nothing(now, rng)
        if self.state == "half_open":
            return self.close(now) if success else self._open(now, rng)
        self._count(success, now)
        fault = self._fault() if self.is_refused or not success else ""
        self.is_refused = False
        if fault and not success:
            self.why = fault
            self.fault = "consecutive" if self.failures_in_a_row >= self._settings.consecutive else "success_rate"
            if not self._settings.enforce:
                self.unenforced += 1
                self._start_afresh()
            elif may_open():
                return self._open(now, rng)
        self.is_refused = bool(fault) and self._settings.enforce
        if self.failures_in_a_row or self.is_refused:
            self.quiet_until = -inf
        return False

    def close(self, now: float) -> bool:
        """Let calls come back, few at first. Returns whether that is a change."""
        if self.state == "closed":
            return False
        self.state = "closed"
        self.generation += 1
        self._opened = 0
        self._start_afresh()
        self.start_ramp(now)
        return True

    def start_ramp(self, now: float) -> None:
        """Its node was called by nobody, and is to be called again."""
        self._closed_at = now

    def seconds_left(self, now: float) -> float:
        """How long there is no probe yet, while it is open."""
        return max(0.0, self._opens_until - now)

    def probe_by(self, latest: float) -> None:
        """Have the next probe come no later than that."""
        self._opens_until = min(self._opens_until, latest)

    def share(self, now: float) -> float:
        """How much of its weight the node is to have: less than 1 on its ramp."""
        ramp = self._settings.ramp
        if now >= self._closed_at + ramp:
            return 1.0
        done = int((now - self._closed_at) / ramp * STEPS + 1e-9)  # at the very instant of a step it is made
        return min(STEPS, 1 + done) / STEPS

    def next_step(self, now: float) -> float:
        """When `share` is more than now; infinite off the ramp."""
        share = self.share(now)
        return inf if share >= 1.0 or self.state != "closed" else self._closed_at + share * self._settings.ramp

    def _start_afresh(self) -> None:
        """Nothing has been heard yet."""
        self.failures_in_a_row = self.successes = self._failures = 0
        self.is_refused = self._is_probed_in_vain = False
        self._past: deque[tuple[int, int]] = deque(maxlen=SLICES - 1)
        self._slice_ends = self.quiet_until = -inf

    def _count(self, success: bool, now: float) -> None:
        """Put a verdict into the window."""
        if now >= self._slice_ends:
            self._turn(now)
        if success:
            self.successes += 1
            self.failures_in_a_row = 0
        else:
            self._failures += 1
            self.failures_in_a_row += 1
        self.quiet_until = self._slice_ends

    def _turn(self, now: float) -> None:
        """Begin another slice of the window; what nobody called in is empty."""
        length = self._settings.window / SLICES
        self._past.append((self.successes, self._failures))
        begins = now
        if self._slice_ends > -inf:  # slices follow each other without a gap, or a slow caller's window would be longer
            empty = (now - self._slice_ends) // length
            self._past.extend([(0, 0)] * int(min(empty, SLICES)))
            begins = self._slice_ends + empty * length
        self.successes = self._failures = 0
        self._slice_ends = begins + length

    def _fault(self) -> str:
        """What speaks for opening it; empty if nothing does."""
        settings, successes, failures = self._settings, self.successes, self._failures
        if self.failures_in_a_row >= settings.consecutive:
            return f"{self.failures_in_a_row} failures in a row"
        for past in self._past:
            successes += past[0]
            failures += past[1]
        calls = successes + failures
        if calls < settings.min_calls or successes >= settings.success_rate * calls:
            return ""
        return f"{successes / calls:.0%} success in {calls} calls"

    def _learned_nothing(self, now: float, rng: Rng) -> bool:
        """A probe whose caller left, say, makes room for the next one. Only once: where all leave before the node has
        answered, each call of those who make one at a time would be the next."""
        if self._is_probed_in_vain:
            return self._open(now, rng)
        self._is_probed_in_vain = True
        self._lapses_at = now
        return False

    def _open(self, now: float, rng: Rng) -> bool:
        length = min(self._settings.open_for * 2**self._opened, self._settings.max_open_for)
        self._opens_until = now + length * (1 - JITTER + 2 * JITTER * rng.random())
        self._opened = min(self._opened + 1, 30)  # the doubling ends at max_open_for long before 2**30
        self.state = "open"
        self.generation += 1
        self.ejections += 1
        self._start_afresh()
        return True
