"""What a program holds of its registration.

Decides when a stay at the registry begins and ends, from any thread, and that it ends with the process. The rest is
done on the control plane, by `stay`.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

import anyio

from meshlib.control import Control
from meshlib.core.chance import Rng
from meshlib.fork import inherit, strays
from meshlib.registry.departure import Departure
from meshlib.registry.entry import Entry
from meshlib.registry.liveness import Liveness
from meshlib.registry.stay import LEAVE_WITHIN, Stay

SLACK = 0.3
"""Seconds more than leaving itself may take, for whoever waits for it."""

logger = logging.getLogger("meshlib.registry")


class Registration:
    """The registration of the running process; see `Mesh.register`, which makes one.

    Usable as a context manager, sync and async, again and again.

    Attributes:
        id: by which Consul knows it.
        counts: how often it was "registered", sent "heartbeats", was "forgotten", met "errors".
    """

    def __init__(
        self,
        entry: Entry,
        control: Control,
        *,
        clock: Callable[[], float],
        rng: Rng,
        owner: object,
    ) -> None:
        self._entry, self._control, self._clock, self._rng = entry, control, clock, rng
        self._owner = owner  # the mesh: without it the control plane would end
        self._stay: Stay | None = None
        self._departure: Departure | None = None
        self._patience = LEAVE_WITHIN + entry.drain + SLACK
        self.counts: Counter[str] = Counter()
        inherit(self, Registration._forget)

    @property
    def name(self) -> str:
        """The service that this process is registered for."""
        return self._entry.name

    @property
    def id(self) -> str:
        """By which Consul knows it: `name-host-port`."""
        return self._entry.id

    @property
    def state(self) -> str:
        """What has come of it so far.

        "waiting" for the application's own port; "standby" while another worker of this host registers for all;
        "registered"; "lost" while the registry does not answer or refuses; "critical" while the application does not
        answer; "closed" before it began and after it ended.
        """
        return "closed" if self._stay is None else self._stay.state

    @property
    def why(self) -> str:
        """What is wrong, if something is."""
        return "" if self._stay is None else self._stay.why

    def start(self) -> None:
        """Begin, and return at once: it registers as soon as the application's port answers. Twice is once.

        Called on an asyncio loop, that loop is asked whether the application is alive. Called in the main thread, it
        leaves in time at SIGTERM and SIGINT.
        """
        if self._stay is not None and not self._stay.left.is_set():
            return
        liveness = Liveness(self._entry, None, None)
        if self._entry.check == "ttl":
            liveness = Liveness(self._entry, _running_loop(), self._entry.alive)
        stay = Stay(self._entry, liveness, self._clock, self._rng, self.counts)
        if not self._control.post(lambda: stay.begin(self._control)):
            logger.warning("%s: %s is not registered: the mesh is closed", self._entry.name, self._entry.id)
            return
        self._stay = stay
        _started.add(self)
        # A new one each time: the one of before may still be called, by whoever has put a handler before it.
        self._departure = Departure(self._leave_then, self._wait)
        self._departure.hook()

    def close(self) -> None:
        """Take the registration back, and wait for that, two seconds at most. Twice is once."""
        self.ask_to_leave()
        self._wait()
        self._end()

    async def aclose(self) -> None:
        """See `close`; on asyncio and trio."""
        self.ask_to_leave()
        try:
            with anyio.move_on_after(self._patience, shield=True):  # a scope that is cancelled ends like any other
                while self._stay is not None and not self._stay.left.is_set():  # noqa: ASYNC110  # a thread sets it
                    await anyio.sleep(0.005)
        finally:
            self._end()

    def ask_to_leave(self) -> None:
        """Have it end soon, and do not wait."""
        if self._stay is not None:
            self._stay.ask_to_leave()

    def __enter__(self) -> Registration:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Registration:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Registration {self.id}: {self.state}>"

    def _forget(self) -> None:
        """After a fork, in the child. The parent's it stays; `start` begins one of the child's."""
        stay, self._stay = self._stay, None
        _started.discard(self)
        if stay is not None:
            strays.append(stay)
            stay.forget()

    def _leave_then(self, then: Callable[[], None]) -> bool:
        stay = self._stay
        if stay is None or stay.left.is_set():
            return False
        stay.then.append(then)
        for each in tuple(_started):  # at the same time: a registry that hangs takes each of them a second
            each.ask_to_leave()
        if stay.left.is_set():  # meanwhile; then nobody else may have seen it
            try:
                stay.then.remove(then)
            except ValueError:
                return True
            return False
        return True

    def _wait(self) -> None:
        if self._stay is not None:
            self._stay.left.wait(self._patience)

    def _end(self) -> None:
        self._stay = None
        _started.discard(self)
        if self._departure is not None:
            self._departure.unhook()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_started: set[Registration] = set()
"""Held until they end: a program may keep no more than the block that it entered."""


@atexit.register
def _exit() -> None:
    """Leave with the process, all at once; before the control planes end, which were there first."""
    registrations = list(_started)
    for each in registrations:
        each.ask_to_leave()
    until = time.monotonic() + max((each._patience for each in registrations), default=0.0)
    for each in registrations:
        if each._stay is not None:
            each._stay.left.wait(max(0.0, until - time.monotonic()))
