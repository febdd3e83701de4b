"""One resolver, asked again and again, for all the services that share it.

Decides when it is asked and with what, counts its errors, and says each kind of them once. What is believed of its
answers is decided in `meshlib.core.last_good`. It never touches a service.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING

from meshlib.core.chance import Rng
from meshlib.core.last_good import LastGood
from meshlib.discovery.admission import admitted, in_words
from meshlib.discovery.resolver import Resolution, Resolver, source_of
from meshlib.discovery.static import Static
from meshlib.endpoint import Endpoint
from meshlib.errors import ResolveError
from meshlib.plain import plain
from meshlib.validation import LARGEST

if TYPE_CHECKING:
    from meshlib.control import Control

PACE = 1.0
"""Seconds for one question on the average; one that waits for news may be followed by another at once."""

BURST = 2
"""Questions that may be asked at once by a resolver that waits for news; by one that polls, one."""

MOST_WARNINGS = 20

KINDS = 20
"""Kinds of errors that are said in one outage, and counted by name: words may differ each time."""

_URL = re.compile(r"(?<![a-z0-9+.-])([a-z0-9+.-]+://)(?:[^\s/@'\"]*@)?([^\s?#'\"]*)[?#]?[^\s'\"]*", re.IGNORECASE)

logger = logging.getLogger("meshlib.discovery")


class Watch:
    """What one resolver says.

    Args:
        resolver: who is asked.
        service: for which service, the first if they are several.
        clock: the mesh's.
        rng: for the jitter.

    Attributes:
        source: where the answers come from, for people.
        last_good: the answer in force.
        warnings: what the latest answer wants people to know.
        complaint: what is wrong now; empty if nothing is.
        failures: how often each kind of error came.
        dropped: how many endpoints were left out of its answers, since no resolver may send us there (rule D5).
        followers: told after every question whether it was answered.
    """

    def __init__(self, resolver: Resolver, service: str, clock: Callable[[], float], rng: Rng) -> None:
        self.source: str = source_of(resolver)
        self.last_good = LastGood()
        self.warnings: tuple[str, ...] = ()
        self.complaint = ""
        self.failures: Counter[str] = Counter()
        self.dropped = 0
        self.followers: list[Callable[[bool], None]] = []
        self._resolver = resolver
        self._service = service
        self._clock = clock
        self._rng = rng
        self._believed: Resolution | None = None
        self._previous: Resolution | None = None
        self._pace = Pace()
        self._said: set[str] = set()

    @property
    def has_spoken(self) -> bool:
        """Whether it has had its say: an answer that is believed, or an error."""
        return self.last_good.known_at is not None or bool(self.complaint)

    async def run(self) -> None:
        """Ask for ever, or until the task is cancelled, which a resolver may have swallowed."""
        task = asyncio.current_task()
        while task is None or not task.cancelling():
            delay = await self._ask()
            for tell in list(self.followers):
                tell(self.last_good.failing_since is None)
            # A resolver that waits for news is not late when it asks twice; who polls has all there is.
            burst = BURST if self._believed is not None and self._believed.ttl is None else 1
            loop_time = asyncio.get_running_loop().time()
            pace: float | None = getattr(self._resolver, "pace", None)
            await asyncio.sleep(max(delay, self._pace.wait(loop_time, burst)) if pace is None else pace)

    async def _ask(self) -> float:
        """Ask once; returns the seconds to the next time."""
        self._pace.spend(asyncio.get_running_loop().time())
        ttl = None
        try:
            found = self._admitted(_checked(await self._resolver.resolve(self._service, self._previous)))
        except BaseException as error:  # a library that calls `sys.exit` ends no watch, and so no control plane
            if _is_ending(error):
                raise
            self._failed(error)
        else:
            ttl = found.ttl
            self._answered(found)
        return self.last_good.delay(self._clock(), ttl, self._rng)

    def _admitted(self, found: Resolution) -> Resolution:
        """An answer without the endpoints that may not be called (rule D5).

        Raises:
            ResolveError: if there are no others: who lies like that shall not empty a set either.
        """
        if type(self._resolver) is Static:
            return found  # that is what the settings say; what is made from it may ask anybody
        kept, dropped = admitted(found.endpoints)
        if not dropped:
            return replace(found, endpoints=kept)
        self.dropped += len(dropped)
        words = in_words(dropped)
        if not kept:
            raise ResolveError(f"none of its endpoints may be called: {words}")
        if words not in self._said and len(self._said) < KINDS:
            self._said.add(words)
            logger.warning("%s: %s (said once)", self.source, words)
        return replace(found, endpoints=kept, warnings=(*found.warnings, words))

    def _answered(self, found: Resolution) -> None:
        if self.last_good.failing_since is not None:
            logger.info("%s answers again", self.source)
            self._said.clear()
        self.warnings = tuple(map(plain, found.warnings[:MOST_WARNINGS]))
        if self.last_good.answer(found.endpoints, self._clock(), found.ttl):
            self._believed = self._previous = found
            self.complaint = ""
        else:
            self._previous = self._to_compare_with()
            self._complain("an empty answer, not believed yet")

    def _failed(self, error: BaseException) -> None:
        self.last_good.fail(self._clock())
        self._previous = self._to_compare_with()
        self._complain(plain(self._words(error)))

    def _to_compare_with(self) -> Resolution | None:
        """After trouble: nothing, for a resolver that would wait for something newer and so not answer at once."""
        return self._believed if self._believed is not None and self._believed.ttl is not None else None

    def _complain(self, words: str) -> None:
        self.complaint = words
        kind = re.sub(r"[0-9]+", "0", words)
        self.failures[kind if kind in self.failures or len(self.failures) < KINDS else "others"] += 1
        if kind not in self._said and len(self._said) < KINDS:
            self._said.add(kind)
            stays = "the last good answer stays" if self.last_good.known_at is not None else "there was no answer yet"
            logger.warning("%s: %s (said once; %s)", self.source, words, stays)

    def _words(self, error: BaseException) -> str:
        words = _said(error).removeprefix(f"{self.source}: ")
        is_ours = type(error).__module__.partition(".")[0] == "meshlib" and words
        return words if is_ours else f"{type(error).__name__}: {words}".removesuffix(": ")


class Watches:
    """The watches of a mesh: one for each distinct source, however many services follow it.

    Args:
        control: runs them.
        clock: the mesh's.
        rng: for the jitter.
    """

    def __init__(self, control: Control, clock: Callable[[], float], rng: Rng) -> None:
        self._control = control
        self._clock = clock
        self._rng = rng
        self._running: dict[Hashable, tuple[Watch, asyncio.Task[None]]] = {}

    def follow(self, resolver: Resolver, service: str, tell: Callable[[bool], None]) -> Watch:
        """Take part in the watch of a resolver; it starts with its first follower."""
        key = _key_of(resolver, service)
        if key not in self._running:
            watch = Watch(resolver, service, self._clock, self._rng)
            task = self._control.supervise(f"watching {watch.source}", watch.run)
            self._running[key] = watch, task
        watch = self._running[key][0]
        watch.followers.append(tell)
        return watch

    def leave(self, watch: Watch, tell: Callable[[bool], None]) -> None:
        """Take part no longer; the watch ends with its last follower."""
        watch.followers.remove(tell)
        for key, (other, task) in list(self._running.items()):
            if other is watch and not watch.followers:
                del self._running[key]
                task.cancel()


class Pace:
    """A token bucket: so many questions at once, and one each `PACE` seconds."""

    def __init__(self) -> None:
        self._tokens = float(BURST)
        self._at = 0.0

    def spend(self, now: float) -> None:
        """A question is asked."""
        self._tokens = min(float(BURST), self._tokens + (now - self._at) / PACE) - 1
        self._at = now

    def wait(self, now: float, burst: int) -> float:
        """Seconds until the next one may be asked by who may ask `burst` at once."""
        missing = BURST - burst + 1 - (self._tokens + (now - self._at) / PACE)
        return max(0.0, missing * PACE)


def _key_of(resolver: Resolver, service: str) -> Hashable:
    key: Hashable = getattr(resolver, "watch_key", None)
    return (id(resolver), service) if key is None else (type(resolver), key)


def _said(error: BaseException) -> str:
    """An error's words on one line; of a URL that is not ours, nothing that could be a secret."""
    words = " ".join(str(error).split())
    return words if isinstance(error, ResolveError) else _URL.sub(r"\1\2", words)


def _checked(found: object) -> Resolution:
    if not isinstance(found, Resolution):
        raise TypeError(f"resolve must return a Resolution, got {type(found).__name__}")
    if wrong := [each for each in found.endpoints if not isinstance(each, Endpoint)]:
        raise TypeError(f"the endpoints of a Resolution must be Endpoints, got {type(wrong[0]).__name__}")
    ttl: object = found.ttl
    if ttl is not None and not (isinstance(ttl, int | float) and (abs(ttl) <= LARGEST or ttl == math.inf)):
        raise TypeError(f"the ttl of a Resolution must be seconds or None, got {ttl!r:.100}")
    if not all(isinstance(each, str) for each in found.warnings):
        raise TypeError("the warnings of a Resolution must be texts")
    return found


def _is_ending(error: BaseException) -> bool:
    """Whether it is not the resolver that failed, but the watch that is ended."""
    if isinstance(error, GeneratorExit):
        return True  # its loop is gone
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
