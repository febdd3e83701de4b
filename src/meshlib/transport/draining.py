"""What happens to the connections of an endpoint that its service has no longer (rule D2).

Decides that they close when they are idle, and 30 s later whatever is still in use. That no new call goes there is the
view's doing. It never decides which endpoints go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

from meshlib.endpoint import Place

if TYPE_CHECKING:
    from meshlib.service import Service

GRACE = 30.0
"""Seconds that a response may still take."""

Cut = Callable[[], None]


class Stacks(Protocol):
    """The connections of one client."""

    def counts(self) -> Iterable[tuple[str, int, int]]:
        """Idle and used connections to each place, by service; from any thread."""
        ...

    def adopt(self, service: Service) -> None:
        """Go by other settings: what is open stays if it may, but not with another TLS; from any thread."""
        ...

    def drain(self, service: str, place: Place) -> Cut:
        """Close what is idle, and what is in use when it comes back; from any thread.

        Returns:
            What closes the rest, wherever its response is.
        """
        ...


class Clients:
    """The connections of all clients of a mesh."""

    def __init__(self) -> None:
        self._stacks: WeakValueDictionary[int, Stacks] = WeakValueDictionary()

    def add(self, stacks: Stacks) -> None:
        """A client comes; it goes by itself."""
        self._stacks[id(stacks)] = stacks

    def adopt(self, service: Service) -> None:
        """See `Stacks.adopt`."""
        for stacks in self._present():
            stacks.adopt(service)

    def drain(self, service: str, place: Place) -> Cut:
        """See `Stacks.drain`."""
        cuts = [stacks.drain(service, place) for stacks in self._present()]

        def cut() -> None:
            for each in cuts:
                each()

        return cut

    def counts(self) -> dict[str, tuple[int, int]]:
        """Idle and used connections by service."""
        found: dict[str, tuple[int, int]] = {}
        for stacks in self._present():
            for service, idle, used in stacks.counts():
                before = found.get(service, (0, 0))
                found[service] = before[0] + idle, before[1] + used
        return found

    def _present(self) -> list[Stacks]:
        # Clients come and go in other threads, which no iteration over what is weak survives: the references it gives.
        return [stacks for reference in self._stacks.valuerefs() if (stacks := reference()) is not None]
