"""What the demo does to its three upstream processes, and at which call.

Decides the schedule, by call numbers alone so that the same faults hit the same calls in every run, and keeps the
books on the processes. It never makes a call and never looks at how the calls fare.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from meshlib.testing.upstream import Upstream

Act = Literal["kill", "start", "stop", "continue"]
Condition = Literal["running", "killed", "stopped"]

STOPPED_AT_LEAST = 1.5
"""Seconds: three attempt timeouts, so that calls held by the stopped process run into them, however few they are."""


@dataclass(frozen=True, slots=True)
class Step:
    """One act, due before the call of this number (from 0) is made."""

    at: int
    act: Act


def schedule(calls: int) -> tuple[Step, ...]:
    """What is done in a run of so many calls.

    A breaker stays open for 1 to 3 s. The killed process listens again in less, so that the probe finds it alive; and
    the stop comes nearly 2.5 s after the kill, so that the probe has mostly been made by the time the stop shows. What
    is shown is then two faults, not their sum.
    """
    return (
        Step(calls // 3, "kill"),
        Step(calls * 17 // 40, "start"),
        Step(calls * 7 // 10, "stop"),
        Step(calls * 9 // 10, "continue"),
    )


@dataclass(frozen=True, slots=True)
class Death:
    """When the victim was dead, on the monotonic clock.

    Attributes:
        begin: when SIGKILL had done its work.
        end: when it listened again; infinite if it never did.
    """

    begin: float = float("inf")
    end: float = float("inf")


class Stage:
    """The upstream processes of a run.

    Args:
        upstreams: three that are started; the first is the victim of the kill, the second is stopped, the third is
            left alone.

    Attributes:
        death: of the victim.
        events: what was done so far, in words.
    """

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self._upstreams = tuple(upstreams)
        self._conditions: dict[str, Condition] = {upstream.address: "running" for upstream in upstreams}
        self._stopped_at = 0.0
        self.death = Death()
        self.events: list[str] = []

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the upstreams listen."""
        return tuple(self._conditions)

    @property
    def victim(self) -> str:
        """The address of the one that is killed."""
        return self.addresses[0]

    def condition(self, address: str) -> Condition:
        """What has been done to the process behind an address."""
        return self._conditions[address]

    def target(self, act: Act) -> str:
        """The address an act is done to."""
        return self.addresses[0 if act in ("kill", "start") else 1]

    def is_ready(self, step: Step) -> bool:
        """Whether a step that is due may be done yet."""
        return step.act != "continue" or time.monotonic() >= self._stopped_at + STOPPED_AT_LEAST

    def perform(self, step: Step) -> None:
        """Do a step."""
        victim, stalled, _ = self._upstreams
        if step.act == "kill":
            victim.kill()
            self.death = Death(begin=time.monotonic())
            self._note(step, "killed (SIGKILL)", "killed")
        elif step.act == "start":
            victim.start()
            self.death = Death(begin=self.death.begin, end=time.monotonic())
            self._note(step, "started again", "running")
        elif step.act == "stop":
            stalled.suspend()
            self._stopped_at = time.monotonic()
            self._note(step, "stopped (SIGSTOP)", "stopped")
        else:
            stalled.resume()
            self._note(step, "continued (SIGCONT)", "running")

    def kill(self) -> None:
        """Kill all of them, so that calls under way end at once."""
        for upstream in self._upstreams:
            upstream.kill()

    def _note(self, step: Step, done: str, condition: Condition) -> None:
        address = self.target(step.act)
        self._conditions[address] = condition
        self.events.append(f"call {step.at:,}: {address} {done}")
