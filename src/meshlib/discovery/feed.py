"""What a service is told of its endpoints: the answers of its resolvers as one set of addresses.

Decides when there is a first answer, how several resolvers make one set, and that what changes often is told at most
twice a second. Names in the set are looked up here, each by a watch of its own. It never asks by itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

from meshlib.discovery.dns import Dns
from meshlib.discovery.failover import Failover, merged
from meshlib.discovery.resolver import Resolver
from meshlib.discovery.watch import Watch, Watches
from meshlib.endpoint import Endpoint, Place

if TYPE_CHECKING:
    from meshlib.service import Service

T = TypeVar("T")

EVERY = 0.5
"""Seconds from one publication to the next, at the least."""

HEAD_START = 3.0
"""Seconds that a preferred resolver has for its first answer, before the answers of the others are taken."""

LOOK = 10.0
"""Seconds after which the age of what is in force is looked at, at the latest."""

MOST_ENDPOINTS = 10_000
"""Endpoints of a service. Whoever answers with more has lost its way, or wants us to."""

MOST_NAMES = 256
"""Names among them that are looked up, each by a watch of its own."""

logger = logging.getLogger("meshlib.discovery")


@dataclass(frozen=True, slots=True)
class Membership:
    """What is in force for a service.

    Attributes:
        endpoints: all of them, addresses only; None while there is no first answer.
        known_at: when the oldest part of it was last confirmed.
        warnings: what people should know.
        trouble: what resolvers fail with now; empty if none does.
        holds_until: when part of it grows stale.
        answers, errors: how often resolvers have answered, and failed, since the last time this was told.
        dropped: how many endpoints were left out of their answers meanwhile; see `meshlib.discovery.admission`.
    """

    endpoints: tuple[Endpoint, ...] | None
    known_at: float
    warnings: tuple[str, ...]
    trouble: str
    holds_until: float
    answers: int
    errors: int
    dropped: int = 0


class Feed:
    """Follows the resolvers of one service.

    Args:
        service: its settings.
        resolver: the service's.
        watches: where its resolvers are watched.
        tell: hears what is in force, after every answer and error.
        clock: the mesh's.
    """

    def __init__(
        self,
        service: Service,
        resolver: Resolver,
        watches: Watches,
        tell: Callable[[Membership], None],
        clock: Callable[[], float],
    ) -> None:
        self.service = service
        self._resolver = resolver
        self._watches = watches
        self._tell = tell
        self._clock = clock
        self._parts: list[Watch] = []
        self._names: dict[Place, Watch] = {}
        self._stirred = asyncio.Event()
        self._heard: Counter[bool] = Counter()
        self._told_dropped: WeakKeyDictionary[Watch, int] = WeakKeyDictionary()
        self._patient_until = 0.0
        self._excess: dict[str, str] = {}
        self._said_excess: set[str] = set()

    async def run(self) -> None:
        """Follow for ever."""
        stir = self._stir
        self._patient_until = asyncio.get_running_loop().time() + HEAD_START
        try:
            for part in parts_of(self._resolver):
                self._parts.append(self._watches.follow(part, self.service.name, stir))
            patience = EVERY
            every: float = min(EVERY, *(getattr(part, "pace", EVERY) for part in parts_of(self._resolver)))
            while True:
                try:
                    async with asyncio.timeout(patience):  # `wait_for` may swallow the end of the task
                        await self._stirred.wait()
                except TimeoutError:
                    pass  # nothing new, but older
                self._stirred.clear()
                found = self._membership()
                self._tell(found)
                patience = EVERY if found.endpoints is None else LOOK
                if found.endpoints is not None:
                    await asyncio.sleep(every)
        finally:
            for watch in [*self._parts, *self._names.values()]:
                self._watches.leave(watch, stir)
            self._parts, self._names = [], {}

    def _membership(self) -> Membership:
        now = self._clock()
        answers = self._answers(now)
        endpoints = None if answers is None else self._addresses(_merged(answers), now)
        watches = [*self._parts, *self._names.values()]
        known = [watch.last_good.known_at for watch in watches if watch.last_good.known_at is not None]
        said = [f"{each.source}: {words}" for each in watches for words in self._said_of(each, now)]
        said += self._excess.values()
        trouble = "; ".join(f"{each.source}: {each.complaint}" for each in watches if each.complaint)
        until = min((watch.last_good.holds_until for watch in watches if watch.last_good.endpoints), default=math.inf)
        heard, self._heard = self._heard, Counter()
        oldest, dropped = min(known, default=now), sum(map(self._newly_dropped, watches))
        return Membership(endpoints, oldest, tuple(said), trouble, until, heard[True], heard[False], dropped)

    def _newly_dropped(self, watch: Watch) -> int:
        before = self._told_dropped.get(watch, 0)
        self._told_dropped[watch] = watch.dropped
        return watch.dropped - before

    def _stir(self, answered: bool) -> None:
        """A resolver has answered, or failed."""
        self._heard[answered] += 1
        self._stirred.set()

    def _said_of(self, watch: Watch, now: float) -> list[str]:
        """What people should know of a resolver's answers."""
        said = [words for words in (*watch.warnings, watch.complaint) if words]
        last, max_stale = watch.last_good, self.service.max_stale
        if last.known_at is None and not said:
            said.append("no answer yet")
        elif last.known_at is not None and last.endpoints and not last.current(now, max_stale):
            said.append(f"its last answer is too old, {now - last.known_at:.0f} s (max_stale={max_stale:g})")
        return said

    def _answers(self, now: float) -> list[tuple[Endpoint, ...]] | None:
        """The set of each resolver; None if it is too early to tell, since one that is preferred has not spoken."""
        answers: list[tuple[Endpoint, ...]] = []
        is_early = asyncio.get_running_loop().time() < self._patient_until
        for watch in self._parts:
            if is_early and not watch.has_spoken and not any(answers):
                return None
            answers.append(watch.last_good.current(now, self.service.max_stale))
        is_known = any(answers) or all(watch.last_good.known_at is not None for watch in self._parts)
        return answers if is_known else None

    def _addresses(self, endpoints: Sequence[Endpoint], now: float) -> tuple[Endpoint, ...] | None:
        """The set with addresses in the place of names; None if all are names of which nothing is known yet."""
        names = {each.place for each in endpoints if not each.is_address}
        self._look_up(set(self._bounded("names", sorted(names), MOST_NAMES)))
        found: dict[Place, Endpoint] = {}
        for endpoint in endpoints:
            if endpoint.is_address:
                found.setdefault(endpoint.place, endpoint)
                continue
            if endpoint.place not in self._names:
                continue
            for address in self._names[endpoint.place].last_good.current(now, self.service.max_stale):
                found.setdefault(address.place, replace(endpoint, host=address.host, metadata=_named(endpoint)))
        is_early = any(watch.last_good.known_at is None for watch in self._names.values())
        if len(found) > MOST_ENDPOINTS:  # the same ones next time, in whichever order they come
            found = dict(sorted(found.items(), key=lambda each: (each[1].priority, each[0])))
        addresses = self._bounded("endpoints", list(found.values()), MOST_ENDPOINTS)
        return None if is_early and not found else tuple(addresses)

    def _bounded(self, what: str, given: list[T], most: int) -> list[T]:
        """As many of them as there may be; that there are more is told, and said once."""
        if len(given) <= most:
            self._excess.pop(what, None)
            return given
        self._excess[what] = f"it has {len(given)} {what}, of which {most} are used"
        if what not in self._said_excess:
            self._said_excess.add(what)
            logger.warning("%s: %s (said once)", self.service.name, self._excess[what])
        return given[:most]

    def _look_up(self, names: set[Place]) -> None:
        """Watch these names, and no others."""
        for gone in self._names.keys() - names:
            self._watches.leave(self._names.pop(gone), self._stir)
        for host, port in names - self._names.keys():
            watch = self._watches.follow(Dns(host, port), self.service.name, self._stir)
            self._names[host, port] = watch


def parts_of(resolver: Resolver) -> tuple[Resolver, ...]:
    """The resolvers that are watched each on its own: those of a failover, else the resolver itself."""
    return resolver.parts if isinstance(resolver, Failover) else (resolver,)


def _merged(answers: Sequence[tuple[Endpoint, ...]]) -> Sequence[Endpoint]:
    if len(answers) == 1:
        return answers[0]
    return merged(answers)


def _named(endpoint: Endpoint) -> dict[str, str]:
    return {"name": endpoint.host, **endpoint.metadata}
