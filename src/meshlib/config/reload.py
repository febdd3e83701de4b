"""A mesh follows the file that it was made from.

Decides when the file is looked at and whether it has changed; what a change comes to is decided by `Mesh.update`: all
of it is made, or none. A file that cannot be used changes nothing, and is complained of once, with every fault. A
service that is no longer in the file stays as it is: half a file is a file too, and calls that go well are not to fail
for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import weakref
from collections.abc import Callable
from typing import Any

from meshlib.config.reading import Configuration
from meshlib.config.sources import Source
from meshlib.validation import ConfigError

EVERY = 1.0
"""Seconds from one look at the file to the next."""

SHOWN = 20
"""Faults that a warning tells; `meshlib check` tells all of them."""

logger = logging.getLogger("meshlib.config")

Update = Callable[..., None]


class Reload:
    """Follows one file.

    Args:
        source: the configuration.
        content: the file that the mesh was made from.
        found: what that came to.
        update: takes the services of a new one; a bound method, held weakly, so that the mesh can go.

    Attributes:
        warnings: what people should know of the file as it is now.
    """

    def __init__(self, source: Source, content: bytes, found: Configuration, update: Update) -> None:
        self.warnings: tuple[str, ...] = ()
        self._source = source
        self._digest = _digest_of(content)
        self._mark: object = None
        self._taken: object = None
        self._options = found.options
        self._names = {service.name for service in found.services}
        self._update = weakref.WeakMethod(update)

    async def run(self) -> None:
        """Look at the file for ever, beside the loop: a folder may be on another machine."""
        while True:
            await asyncio.get_running_loop().run_in_executor(None, self.look)
            await asyncio.sleep(EVERY)

    def look(self) -> None:
        """Take over the file if it has changed, once it is found twice in the same state: by then it is written."""
        mark = self._marked()
        is_settled, self._mark = mark == self._mark, mark
        if not is_settled or mark == self._taken:
            return
        self._taken = mark
        try:
            content = self._source.content()
        except (OSError, ConfigError) as error:
            self._refuse(str(error))
            return
        if (digest := _digest_of(content)) != self._digest:
            self._digest = digest
            self._take(content)

    def _take(self, content: bytes) -> None:
        try:
            found = self._source.read(content)
            update: Any = self._update()
            if update is not None:
                update(*found.services)
        except ConfigError as error:
            shown = [str(fault) for fault in error.faults[:SHOWN]]
            more = [f"and {len(error.faults) - SHOWN} more"] if len(error.faults) > SHOWN else []
            self._refuse("; ".join(shown + more))
            return
        self.warnings = tuple(self._unheeded(found))
        logger.info("%s was read again", self._source.path)
        for each in self.warnings:
            logger.warning("%s", each)
        self._names |= {service.name for service in found.services}

    def _unheeded(self, found: Configuration) -> list[str]:
        """What the file says that takes effect at the next start."""
        said = [f"{self._source.path}: mesh.{name} takes effect at the next start" for name in self._other(found)]
        gone = sorted(self._names - {service.name for service in found.services})
        return said + [
            f"{self._source.path}: services.{name} is gone from it, and can be called until the end" for name in gone
        ]

    def _other(self, found: Configuration) -> list[str]:
        names = [*self._options, *(name for name in found.options if name not in self._options)]
        return [name for name in names if self._options.get(name) != found.options.get(name)]

    def _refuse(self, why: str) -> None:
        self._digest = b""  # whatever comes back is looked at; it may be the same, if a certificate was missing
        said = f"{self._source.path} is not taken over: {why}"
        if self.warnings != (said,):
            logger.warning("%s", said)
            self.warnings = (said,)

    def _marked(self) -> object:
        """What tells one state of the file from another. It may be reached by links, which are swapped as a whole."""
        assert self._source.path is not None
        try:
            state = self._source.path.stat()
        except OSError as error:
            return error.errno
        return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino, state.st_dev


def _digest_of(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
