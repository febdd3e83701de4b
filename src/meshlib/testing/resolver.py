"""A resolver that answers what it is told to.

Decides nothing: what a mesh makes of its answers and errors is what it makes of everybody's. But it does so at once: a
change is in force when `set` or `fail` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterable

from meshlib.discovery.resolver import Resolution
from meshlib.endpoint import Endpoint
from meshlib.forbidden import is_forbidden
from meshlib.fork import inherit

PATIENCE = 5.0
"""Seconds that `set` and `fail` wait at most."""

TURNS = 20
"""Turns of the control plane's loop from an answer to the calls that see it: four or five, by Python's version."""


class Follower:
    """A service that asks.

    Args:
        loop: where it does.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.told = self.in_force = -1
        self.stirred = asyncio.Event()


class ManualResolver:
    """Endpoints that are set by hand, also while a mesh is running.

    Args:
        endpoints: the first ones, as `Endpoint`s or `"host:port"` strings with addresses. Default none.

    Example:
        >>> orders = ManualResolver(["10.0.0.1:8080"])
        >>> mesh = Mesh(Service("orders", orders))
        >>> orders.set(["10.0.0.1:8080", "10.0.0.2:8080"])
        >>> orders.fail(OSError("the registry is down"))
    """

    source = "manual"
    pace = 0.0

    def __init__(self, endpoints: Iterable[Endpoint | str] = ()) -> None:
        self._endpoints = _read(endpoints)
        self._error: Exception | None = None
        self._version = 0
        self._forget()
        inherit(self, ManualResolver._forget)

    def set(self, endpoints: Iterable[Endpoint | str]) -> None:
        """From now on there are these; none is an answer, too."""
        self._change(_read(endpoints), None)

    def fail(self, error: Exception) -> None:
        """From now on there is this error instead of an answer, until `set`."""
        self._change(self._endpoints, error)

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        """See `meshlib.discovery.Resolver`."""
        loop = asyncio.get_running_loop()
        follower = self._followers.setdefault((loop, service), Follower(loop))
        while True:
            follower.stirred.clear()
            version, endpoints, error = self._version, self._endpoints, self._error
            # Who has our answer, and asks without it, does not believe it yet: an empty one has to be repeated. But one
            # that is refused as a whole (rule D5) would be for ever.
            if follower.told != version or (previous is None and error is None and not _is_refused(endpoints)):
                follower.told = version
                if error is not None:
                    raise error
                return Resolution(endpoints, None)
            try:
                await self._next(follower)
            except BaseException:
                self._followers.pop((loop, service), None)
                raise

    def _forget(self) -> None:
        """After a fork, in the child: who has asked is the parent's."""
        self._changed = threading.Condition()
        self._followers: dict[tuple[asyncio.AbstractEventLoop, str], Follower] = {}

    async def _next(self, follower: Follower) -> None:
        """What was answered is in force; wait for something newer."""
        for _ in range(TURNS):
            await asyncio.sleep(0)
        with self._changed:
            follower.in_force = follower.told
            self._changed.notify_all()
        await follower.stirred.wait()

    def _change(self, endpoints: tuple[Endpoint, ...], error: Exception | None) -> None:
        until = time.monotonic() + PATIENCE
        with self._changed:
            self._endpoints, self._error, self._version = endpoints, error, self._version + 1
            for follower in self._present():
                with contextlib.suppress(RuntimeError):  # it is being closed
                    follower.loop.call_soon_threadsafe(follower.stirred.set)
            while not self._is_in_force() and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def _is_in_force(self) -> bool:
        return all(each.in_force == self._version for each in self._present())

    def _present(self) -> list[Follower]:
        return [each for each in list(self._followers.values()) if not each.loop.is_closed()]


def _read(endpoints: Iterable[Endpoint | str]) -> tuple[Endpoint, ...]:
    return tuple(each if isinstance(each, Endpoint) else Endpoint.parse(each) for each in endpoints)


def _is_refused(endpoints: tuple[Endpoint, ...]) -> bool:
    return bool(endpoints) and all(is_forbidden(each.host) for each in endpoints)
