"""What happens to the connections of an endpoint that its service has no longer (rule D2).

Decides that they close when they are idle, and 30 s later whatever is still in use. That no new call goes there is the
view's doing. It never decides which endpoints go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

from meshlib.endpoint import Place

GRACE = 30.0
"""Seconds that a response may still take."""

Cut = Callable[[], None]


class Stacks(Protocol):
    """The connections of one client."""

    def drain(self, service: str, place: Place) -> Cut:
        """Close what is idle, and what is in use when it comes back; from any thread.

        Returns:
            What closes the rest, wherever its response is.
        """
        ...

    def __hash__(self) -> int: ...


class Clients:
    """The connections of all clients of a mesh."""

    def __init__(self) -> None:
        self._stacks: WeakSet[Stacks] = WeakSet()

    def add(self, stacks: Stacks) -> None:
        """A client comes; it goes by itself."""
        self._stacks.add(stacks)

    def drain(self, service: str, place: Place) -> Cut:
        """See `Stacks.drain`."""
        cuts = [stacks.drain(service, place) for stacks in list(self._stacks)]

        def cut() -> None:
            for each in cuts:
                each()

        return cut
