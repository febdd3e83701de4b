"""What the tests of discovery share: a resolver whose answers the test plays, and a control plane in a hurry."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from meshlib import Endpoint
from meshlib.discovery import Resolution


class Played:
    """A resolver that answers what it is told, at once or when there is something newer.

    Args:
        endpoints: what it answers; strings or `Endpoint`s.
        ttl: None for one that waits for news.
        key: its watch key.

    Attributes:
        asked: what `previous` was at every question.
        times: when they came.
        under_way: questions not answered yet.
    """

    def __init__(self, *endpoints: Endpoint | str, ttl: float | None = 0.02, source: str = "played", key: Any = None):
        self.source = source
        self.ttl = ttl
        self.asked: list[Resolution | None] = []
        self.services: list[str] = []
        self.times: list[float] = []
        self.under_way = 0
        self.hangs = False
        self.error: BaseException | None = None
        self.warnings: tuple[str, ...] = ()
        self._version = 0
        if key is not None:
            self.watch_key = key
        self.say(*endpoints)

    def say(self, *endpoints: Endpoint | str) -> None:
        """Answer this from now on."""
        self.endpoints = [each if isinstance(each, Endpoint) else Endpoint.parse(each) for each in endpoints]
        self.error = None
        self._version += 1

    def fail(self, error: BaseException) -> None:
        """Raise this from now on."""
        self.error = error
        self._version += 1

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        self.asked.append(previous)
        self.services.append(service)
        self.times.append(time.monotonic())
        self.under_way += 1
        try:
            while self.hangs or (self.ttl is None and previous is not None and previous.index == self._version):
                await asyncio.sleep(0.005)
            await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
            return Resolution(self.endpoints, self.ttl, self._version, warnings=self.warnings)
        finally:
            self.under_way -= 1
