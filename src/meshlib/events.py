"""What can happen to a service: the events that `Mesh.subscribe` gives, as frozen values.

Decides what each of them tells, as a value, as plain data and in a sentence, which is what the log says. It never
decides when one happens, nor who hears of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from meshlib.endpoint import Endpoint

__all__ = [
    "BudgetExhausted",
    "ConfigChanged",
    "DiscoveryRecovered",
    "DiscoveryStale",
    "Ejected",
    "EndpointAdded",
    "EndpointRemoved",
    "Event",
    "HealthChanged",
    "Missed",
    "OverloadBegan",
    "OverloadEnded",
    "PanicBegan",
    "PanicEnded",
    "Probing",
    "Restored",
]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened to a service.

    Attributes:
        service: its name.
        at: when, on the mesh's clock.
    """

    service: str
    at: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values that `json.dumps` takes; `event` is the name of the class, an endpoint is `host:port`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"event": type(self).__name__, **{name: _plain(part) for name, part in parts.items()}}

    def __str__(self) -> str:
        return f"{self.service}: {self._said}"

    @property
    def _said(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class EndpointAdded(Event):
    """The resolver names an endpoint that it did not name before.

    Attributes:
        endpoint: it.
    """

    endpoint: Endpoint

    @property
    def _said(self) -> str:
        return f"{self.endpoint} was added"


@dataclass(frozen=True, slots=True)
class EndpointRemoved(Event):
    """The resolver no longer names an endpoint: no new call goes there.

    Attributes:
        endpoint: it.
    """

    endpoint: Endpoint

    @property
    def _said(self) -> str:
        return f"{self.endpoint} was removed"


@dataclass(frozen=True, slots=True)
class Ejected(Event):
    """An endpoint was taken out: it gets no calls.

    Attributes:
        endpoint: it.
        by: `breaker`, or `hand` for `mesh.eject`.
        why: what made it so, in words.
        seconds: until its probe, or None: until `mesh.restore`.
        again: whether it was ejected already, and its probe has failed.
    """

    endpoint: Endpoint
    by: Literal["breaker", "hand"]
    why: str
    seconds: float | None
    again: bool = False

    @property
    def _said(self) -> str:
        until = "until it is restored" if self.seconds is None else f"for {self.seconds:.1f} s"
        return f"{self.endpoint} {'stays' if self.again else 'was'} ejected {until} ({self.why})"


@dataclass(frozen=True, slots=True)
class Probing(Event):
    """A call tries an endpoint that its breaker has ejected.

    Attributes:
        endpoint: it.
    """

    endpoint: Endpoint

    @property
    def _said(self) -> str:
        return f"{self.endpoint} is probed by a call"


@dataclass(frozen=True, slots=True)
class Restored(Event):
    """An endpoint is no longer ejected: calls come back, few at first.

    Attributes:
        endpoint: it.
        by: `probe`, or `hand` for `mesh.restore`.
    """

    endpoint: Endpoint
    by: Literal["probe", "hand"]

    @property
    def _said(self) -> str:
        return f"{self.endpoint} was restored ({'its probe succeeded' if self.by == 'probe' else 'by hand'})"


@dataclass(frozen=True, slots=True)
class HealthChanged(Event):
    """The checks of an endpoint have come to another result. That it is well from the first is no news.

    Attributes:
        endpoint: it.
        healthy: the result.
        why: the status or the kind of error that decided.
    """

    endpoint: Endpoint
    healthy: bool
    why: str

    @property
    def _said(self) -> str:
        return f"{self.endpoint} {'is healthy again' if self.healthy else 'is unhealthy'} ({self.why})"


@dataclass(frozen=True, slots=True)
class PanicBegan(Event):
    """Too few endpoints are healthy, and there is no lower level to go to: all are called, whatever breakers say.

    Attributes:
        healthy: how many are.
        known: of how many.
    """

    healthy: int
    known: int

    @property
    def _said(self) -> str:
        return f"panic: {self.healthy} of {self.known} endpoints are healthy, so all are called"


@dataclass(frozen=True, slots=True)
class PanicEnded(Event):
    """Enough endpoints are healthy again, or there is a lower level to go to."""

    @property
    def _said(self) -> str:
        return "the panic is over"


@dataclass(frozen=True, slots=True)
class DiscoveryStale(Event):
    """A resolver of the service fails: what it said last stays in force, if it said anything.

    Attributes:
        why: which one, and what its error was.
        age: seconds since the endpoints were last confirmed; None if they are not known yet.
    """

    why: str
    age: float | None

    @property
    def _said(self) -> str:
        since = "not known yet" if self.age is None else f"{self.age:.0f} s old"
        return f"its endpoints are {since} ({self.why})"


@dataclass(frozen=True, slots=True)
class DiscoveryRecovered(Event):
    """All resolvers of the service answer again."""

    @property
    def _said(self) -> str:
        return "its endpoints are up to date again"


@dataclass(frozen=True, slots=True)
class BudgetExhausted(Event):
    """The retry budget could not pay for another attempt. Told again only after it was half full."""

    @property
    def _said(self) -> str:
        return "the retry budget is exhausted: calls that fail are not repeated"


@dataclass(frozen=True, slots=True)
class OverloadBegan(Event):
    """The throttle refuses calls.

    Attributes:
        share: what share of them at first.
    """

    share: float

    @property
    def _said(self) -> str:
        return f"it is overloaded: {self.share:.0%} of the calls are refused here"


@dataclass(frozen=True, slots=True)
class OverloadEnded(Event):
    """The throttle has let every call go for some seconds."""

    @property
    def _said(self) -> str:
        return "calls are no longer refused here"


@dataclass(frozen=True, slots=True)
class ConfigChanged(Event):
    """The service was set anew by `mesh.update`, or is new itself.

    Attributes:
        changed: the names of the settings that are others now; none if the service is new.
    """

    changed: tuple[str, ...]

    @property
    def _said(self) -> str:
        return f"other settings now: {', '.join(self.changed)}" if self.changed else "a service from now on"


@dataclass(frozen=True, slots=True)
class Missed(Event):
    """Events were dropped in this place, because who was told those before took too long. `mesh.snapshot()` shows
    what it has come to.

    Attributes:
        count: how many.
    """

    count: int

    @property
    def _said(self) -> str:
        return f"{self.count} events were dropped: whoever is told takes too long"


def _plain(part: Any) -> Any:
    if isinstance(part, Endpoint):
        return str(part)
    return list(part) if isinstance(part, tuple) else part
