"""What others hang on the live state of a service, as it knows them: who its calls wait for, and who observes them.

Decides nothing: these are the shapes of what the control plane and telemetry bring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Pending(Protocol):
    """What a call waits for while nobody asks the service's resolver, or there is no answer yet."""

    def wait(self, left: float) -> None:
        """Wait `left` seconds at most."""
        ...

    async def wait_async(self, left: float) -> None:
        """See `wait`."""
        ...


class Observer(Protocol):
    """What the calls of a service are observed by."""

    def collect(self) -> None:
        """Do what was left undone about calls that were garbage-collected."""
        ...

    def begin(self, method: str, url: Callable[[], str]) -> Any:
        """A call begins; returns what hears of the rest."""
        ...
