"""One stay at the registry: from the application's first answer to its leaving.

Decides what is done next: wait for the application's port, for the part of the owner, register, keep the heartbeat,
register again when forgotten, and at last take the registration back, or leave it to another worker of this host.
Runs on the control plane; whatever the registry does, it goes on trying, and the application never hears of it.

    waiting ─► standby ─► registered ◄─► lost        the registry does not answer, or refuses
                  ▲            │
                  └─ critical ◄┘                      the application does not answer; any ─► closed

Who is critical gives up the part of the owner: another worker of the same host, on the same port, may be well.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from meshlib.consul import ConsulError
from meshlib.control import Control
from meshlib.core.chance import Rng
from meshlib.registry.entry import Entry
from meshlib.registry.liveness import Liveness
from meshlib.registry.ownership import Ownership, ownership_of
from meshlib.registry.pulse import Pulse
from meshlib.registry.readiness import answers

LOOK_EVERY = 0.1
"""Seconds between looks at the application's own port, at first."""

WORTH_A_WORD = 10.0
"""Seconds without an answer there from which it is said, and looked for a tenth as often."""

CLAIM_EVERY = 0.5
"""Seconds between tries to become the owner, give or take a half of it."""

ANSWER_WITHIN = 1.0
"""Seconds in which the application has to answer before it becomes the owner."""

ASK_EVERY = 1.0
"""Seconds between questions to an application that said it was not well, at most."""

PATIENCE = 5.0
"""Seconds for an answer of the registry, at most."""

LEAVE_WITHIN = 1.0
"""Seconds for its answer when we leave."""

logger = logging.getLogger("meshlib.registry")


class Stay:
    """See the module.

    Attributes:
        state: "waiting", "standby", "registered", "lost", "critical" or "closed".
        why: what was wrong last, for people.
        left: set when all is over.
        then: called after that, in the control thread.
    """

    def __init__(
        self, entry: Entry, liveness: Liveness, clock: Callable[[], float], rng: Rng, counts: Counter[str]
    ) -> None:
        self._entry, self._liveness, self._clock, self._rng, self._counts = entry, liveness, clock, rng, counts
        self._pulse = Pulse(entry.ttl, rng, clock())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving = asyncio.Event()
        self._is_asked = False
        self._ownership: Ownership | None = None
        self._has_joined = False
        self._said: tuple[str, object] = ("waiting", None)
        self._jobs: list[asyncio.Task[None]] = []
        self._asked: asyncio.Task[None] | None = None
        self.state, self.why = "waiting", ""
        self.left = threading.Event()
        self.then: deque[Callable[[], None]] = deque()

    def begin(self, control: Control) -> None:
        """Begin; on the loop of the control plane."""
        self._ownership = ownership_of(f"{self._entry.where} {self._entry.id}")
        serving = control.supervise(f"the registration of {self._entry.name}", self._serve)
        self._jobs = [serving, asyncio.get_running_loop().create_task(self._leave_when_asked(serving, self._ownership))]
        self._loop = asyncio.get_running_loop()
        if self._is_asked:
            self._leaving.set()

    def ask_to_leave(self) -> None:
        """Have it end soon; from any thread and from signal handlers, for it takes no locks."""
        self._is_asked = True
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._leaving.set)
            except RuntimeError:
                pass  # the mesh was closed, which has ended it

    def forget(self) -> None:
        """After a fork, in the child: the parent's it stays."""
        if self._ownership is not None:
            self._ownership.close()

    async def _serve(self) -> None:
        assert self._ownership is not None
        await self._until_ready()
        while not self._ownership.join():  # noqa: ASYNC110  # a file lock tells nobody
            await asyncio.sleep(LOOK_EVERY)
        self._has_joined = True
        while True:
            await self._until_owner(self._ownership)
            await self._register()
            await self._keep(self._ownership)

    async def _until_ready(self) -> None:
        begun, every = self._clock(), LOOK_EVERY
        while not await answers(self._entry):
            if self._clock() - begun > WORTH_A_WORD:
                self._turn("waiting", f"nothing answers on port {self._entry.port} so far")
                every = LOOK_EVERY * 10
            await asyncio.sleep(every)

    async def _until_owner(self, ownership: Ownership) -> None:
        while True:
            if not ownership.claim():
                self._turn("standby")
            elif await self._is_well_within(ANSWER_WITHIN):
                return
            else:
                ownership.give_up()
            await asyncio.sleep(CLAIM_EVERY * (0.5 + self._rng.random()))

    async def _is_well_within(self, seconds: float) -> bool:
        done, _ = await asyncio.wait({self._asking()}, timeout=seconds)
        return bool(done)

    def _asking(self) -> asyncio.Task[None]:
        """Ends when the application is well. There is one at a time: a function that hangs holds a thread."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.get_running_loop().create_task(self._until_well())
        return self._asked

    async def _until_well(self) -> None:
        complained: set[str] = set()
        while True:
            try:
                if await self._liveness.is_well():
                    return
            except (Exception, asyncio.CancelledError, SystemExit, KeyboardInterrupt) as error:  # the user's function
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                if type(error).__name__ not in complained:
                    complained.add(type(error).__name__)
                    logger.exception("%s: asking the application whether it is alive failed", self._entry.name)
            await asyncio.sleep(min(ASK_EVERY, self._entry.ttl / 5))

    async def _register(self) -> None:
        while True:
            await self._asking()
            told = self._clock()
            try:
                await self._tell("service", "register", data=self._entry.told())
                if self._entry.check == "ttl":  # one that is known already keeps its state, which may be critical
                    await self._beat()
            except ConsulError as error:
                await self._trouble(error)
            else:
                self._counts["registered"] += 1
                self._pulse.beat(told)
                self._turn("registered")
                return

    async def _keep(self, ownership: Ownership) -> None:
        """Keep the heartbeat, until the registry has forgotten us, or the application does not answer."""
        while True:
            await asyncio.sleep(max(0.0, self._pulse.due - self._clock()))
            if self._entry.check == "ttl" and not await self._answers_in_time(ownership):
                return
            told = self._clock()
            try:
                await self._beat()
            except ConsulError as error:
                if means_forgotten(error):
                    self._counts["forgotten"] += 1
                    self._turn("lost", "Consul has forgotten it")
                    return
                await self._trouble(error)
            else:
                self._counts["heartbeats"] += 1
                self._pulse.beat(told)
                self._turn("registered")

    async def _answers_in_time(self, ownership: Ownership) -> bool:
        """Wait until the application answers; False if the registry has called it critical by then."""
        # That time may have passed already, where it was the registry that did not answer.
        if await self._is_well_within(max(self._pulse.runs_out - self._clock(), self._entry.ttl / 3)):
            return True
        self._turn("critical", f"the application has not answered for {self._entry.ttl:g} s that it is well")
        ownership.give_up()
        await self._asking()
        return False

    async def _beat(self) -> None:
        if self._entry.check == "ttl":
            await self._tell("check", "pass", f"service:{self._entry.id}")
        else:
            await self._entry.agent.get(["v1", "agent", "service", self._entry.id], (), timeout=self._patience)

    async def _tell(self, *way: str, data: Any = None) -> None:
        await self._entry.agent.put(["v1", "agent", *way], data, timeout=self._patience)

    @property
    def _patience(self) -> float:
        return min(PATIENCE, max(1.0, self._entry.ttl / 3))

    async def _trouble(self, error: ConsulError) -> None:
        self._counts["errors"] += 1
        self._turn("lost", error.reason, error.status)
        self._pulse.failed(self._clock())
        await asyncio.sleep(max(0.0, self._pulse.due - self._clock()))

    async def _leave_when_asked(self, serving: asyncio.Task[None], ownership: Ownership) -> None:
        try:
            await self._leaving.wait()
            serving.cancel()
            await asyncio.wait({serving})
            if self._has_joined:
                await self._leave(ownership)
        finally:
            if self._asked is not None:
                self._asked.cancel()
            self.state = "closed"
            ownership.close()
            self.left.set()
            while self.then:
                self.then.popleft()()

    async def _leave(self, ownership: Ownership) -> None:
        if not ownership.leave():
            logger.info("%s: %s is left to another worker", self._entry.name, self._entry.id)
            return
        try:
            way = ["v1", "agent", "service", "deregister", self._entry.id]
            await self._entry.agent.put(way, timeout=LEAVE_WITHIN)
        except ConsulError as error:
            if not means_forgotten(error):
                reason = f"{self._entry.where}: {error.reason}"
                logger.warning("%s: %s could not be deregistered (%s)", self._entry.name, self._entry.id, reason)
                return
        logger.info("%s: %s is deregistered", self._entry.name, self._entry.id)
        await asyncio.sleep(self._entry.drain)

    def _turn(self, state: str, why: str = "", status: object = None) -> None:
        """Take a state, and say so once."""
        self.state, self.why = state, why
        if (state, status) == self._said and not (state == "waiting" and why):
            return
        is_well = state in ("registered", "standby")
        self._said = (state, status if state != "waiting" else why)
        words = {
            "waiting": "is not registered yet",
            "standby": "is registered by another worker of this host",
            "registered": f"is registered at {self._entry.where}",
            "lost": f"is not known to be registered at {self._entry.where}",
            "critical": "is critical",
        }[state] + (f": {why}" if why else "")
        logger.log(logging.INFO if is_well else logging.WARNING, "%s: %s %s", self._entry.name, self._entry.id, words)


def means_forgotten(error: ConsulError) -> bool:
    """Consul up to 1.9 says 500 where later ones say 404."""
    return error.status == 404 or (error.status == 500 and "does not have associated TTL" in error.reason)
