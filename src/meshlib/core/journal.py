"""What has happened to a service and was not told yet.

Decides what is kept, in which order, and how much of it: events are noted under the cluster's lock, and told by
whoever caused them once that thread has left every lock. It never tells anything itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from meshlib.events import Event, Missed

if TYPE_CHECKING:
    from meshlib.core.cluster import Cluster

MOST = 10_000
"""Events that wait at once: those of some thousand endpoints that come with one answer."""

Facts = ParamSpec("Facts")


class Backlog:
    """Events that wait to be told, oldest first. One that finds it full is dropped and counted, as are those after it:
    what waits is taken all at once, and one `Missed` stands at its end, where they are missing.

    Args:
        most: how many may wait.

    Attributes:
        waiting: those that do.
    """

    def __init__(self, most: int = MOST) -> None:
        self.waiting: deque[Event] = deque()
        self._missed: dict[str, Missed] = {}
        self._most = most

    def add(self, event: Event) -> None:
        """One more."""
        if len(self.waiting) >= self._most:
            before = self._missed.get(event.service)
            lost = event.count if isinstance(event, Missed) else 1
            lost += before.count if before is not None else 0
            self._missed[event.service] = Missed(event.service, event.at, lost)
        else:
            self.waiting.append(event)

    def add_all(self, events: Sequence[Event]) -> None:
        """More, in their order."""
        if len(self.waiting) + len(events) <= self._most:
            self.waiting.extend(events)
        else:
            for event in events:
                self.add(event)

    def take(self) -> list[Event]:
        """All of them; none waits any more."""
        taken = [*self.waiting, *self._missed.values()]
        self.clear()
        return taken

    def clear(self) -> None:
        """None waits any more."""
        self.waiting.clear()
        self._missed.clear()


class Journal(Backlog):
    """The events of one service.

    Args:
        service: its name.

    Attributes:
        hears: whether anybody wants to hear of this class of events; asked under the lock, so it only computes.
        deliver: tells what waits; called by those who use the cluster, after every lock, and never in here.
        telling: held by who tells, so that events are told in their order.
    """

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service
        self.hears: Callable[[Any], bool] = _nobody_hears
        self.deliver: Callable[[Cluster], None] = _nobody_tells
        self.telling = Lock()

    def note(
        self, kind: Callable[Concatenate[str, float, Facts], Event], at: float, *args: Facts.args, **facts: Facts.kwargs
    ) -> None:
        """Something has happened. Under the lock."""
        if self.hears(kind):
            self.add(kind(self._service, at, *args, **facts))

    def forget(self) -> None:
        """After a fork, in the child: what waits is told by the parent."""
        self.telling = Lock()
        self.clear()


def _nobody_hears(kind: Any) -> bool:
    return False


def _nobody_tells(cluster: Cluster) -> None:
    """What nobody hears of does not wait either."""
