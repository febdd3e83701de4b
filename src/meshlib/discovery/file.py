"""Endpoints written down in a TOML or JSON file, which is read again when it has changed.

Decides what such a file may say, and when it is another than before. It never keeps the last good content of one that
is broken: whoever watches it does. A fault is shown with its place in the file and its value, and nothing around it.
"""

from __future__ import annotations

import json
import os
import stat
import time
import tomllib
from codecs import BOM_UTF8
from collections.abc import Hashable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from meshlib.discovery.resolver import Resolution
from meshlib.endpoint import Endpoint, Place
from meshlib.errors import ResolveError
from meshlib.validation import ConfigError, Fault, meant

EXAMPLE = "for example 'file:endpoints.toml' or 'file:///etc/orders.json'"

TTL = 1.0
"""Seconds between two looks at the file, which cost a few microseconds while it stays as it is."""

LARGEST = 4 << 20
"""Bytes; a file of tens of thousands of endpoints. What is larger is not the file that was meant."""

SETTLED = 2.0
"""Seconds. A file changed since may change again without a new time stamp, which some systems keep no finer."""

SHOWN_FAULTS = 20
SHOWN_LENGTH = 200
"""Characters of one fault."""

_PARTS = ("host", "port", "weight", "priority", "zone", "metadata")


class File:
    """The endpoints in a file.

    In TOML `endpoints = ["10.0.0.1:8080"]`, or a table `[[endpoints]]` for each with `host`, `port` and, where wanted,
    `weight`, `priority`, `zone` and `metadata`. In JSON the same, or the list alone.

    Args:
        path: of the file, which need not be there yet; its name ends in `.toml` or `.json`. A relative one counts from
            the working directory of this moment; `~` is the home directory.

    Raises:
        ConfigError: if it cannot be the path of such a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path):
            raise ConfigError([Fault("resolver", f"must be a path, {EXAMPLE}, got {path!r}")])
        if Path(path).suffix not in (".toml", ".json"):
            raise ConfigError(
                [Fault("resolver", f"must be a file that ends in .toml or .json, {EXAMPLE}, got {_shown(path)!r}")]
            )
        try:
            self.path = Path(path).expanduser().absolute()
        except RuntimeError as error:
            raise ConfigError([Fault("resolver", f"must be a path that can be found, got {path!r}: {error}")]) from None

    @classmethod
    def from_url(cls, url: str) -> File:
        """Read `file:endpoints.toml`, relative, or `file:/etc/orders.toml` and `file:///etc/orders.toml`.

        Raises:
            ConfigError: naming the part that is wrong.
        """
        path, mark, _ = url.removeprefix("file:").partition("?")
        if mark:
            raise ConfigError([Fault("resolver", f"must have no parameters, {EXAMPLE}; a '?' in a path is '%3F'")])
        if path.startswith("//"):
            host, slash, path = path[2:].partition("/")
            if host not in ("", "localhost") or not slash:
                raise ConfigError([Fault("resolver", f"must have no host, {EXAMPLE}, got {host.rpartition('@')[2]!r}")])
            path = f"/{path}"
        return cls(unquote(path))

    @property
    def source(self) -> str:
        """Where the answers come from, for people."""
        return f"file:{self.path}"

    @property
    def watch_key(self) -> Hashable:
        """Equal for two that read the same file."""
        return ("file", str(self.path))

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        """Read the file, unless it is the one that `previous` was read from.

        Raises:
            ResolveError: if it cannot be read, with every fault in it.
        """
        try:
            mark, content = self._content(None if previous is None else previous.index)
        except OSError as error:
            raise ResolveError(f"{self.source}: {error.strerror or error}") from error
        if previous is not None and content is None:
            return Resolution(previous.endpoints, TTL, mark)
        return Resolution(self._read(content or b""), TTL, mark)

    def __repr__(self) -> str:
        return f"File({str(self.path)!r})"

    def _content(self, before: object) -> tuple[Hashable, bytes | None]:
        """The file's mark, and its content if the mark is another than before."""
        with open(self.path, "rb", opener=_opened) as file:
            state = os.fstat(file.fileno())
            mark = _mark(state)
            if mark is not None and mark == before:
                return mark, None
            if not stat.S_ISREG(state.st_mode):
                raise ResolveError(f"{self.source}: must be a file")
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ResolveError(f"{self.source}: must be no larger than {LARGEST >> 20} MiB")
        return mark, content

    def _read(self, content: bytes) -> tuple[Endpoint, ...]:
        try:
            return endpoints_in(_parsed(content, self.path.suffix))
        except ConfigError as error:
            faults = [str(fault) for fault in error.faults]
            shown = [_brief(fault) for fault in faults[:SHOWN_FAULTS]]
            if len(faults) > SHOWN_FAULTS:
                shown.append(f"and {len(faults) - SHOWN_FAULTS} more")
            raise ResolveError(f"{self.source}: {'; '.join(shown)}") from None


def endpoints_in(document: Any) -> tuple[Endpoint, ...]:
    """The endpoints that a document names: a list of them, or a table that holds one under `endpoints`.

    Raises:
        ConfigError: with every fault, by its place in the document.
    """
    faults: list[Fault] = []
    if isinstance(document, dict):
        faults += _unknown("", document, ("endpoints",))
        if "endpoints" not in document:
            faults.append(Fault("endpoints", "must be given, for example endpoints = ['10.0.0.1:8080']"))
        document = document.get("endpoints", [])
    if not isinstance(document, list):
        faults.append(Fault("endpoints", f"must be a list, for example ['10.0.0.1:8080'], got {_kind(document)}"))
        document = []
    found: dict[Place, Endpoint] = {}
    for position, entry in enumerate(document):
        path = f"endpoints[{position}]"
        endpoint, wrong = _entry(path, entry)
        if endpoint is not None and endpoint.place in found:
            wrong.append(Fault(path, f"must be listed once: {endpoint} is there already"))
        elif endpoint is not None:
            found[endpoint.place] = endpoint
        faults += wrong
    if faults:
        raise ConfigError(faults)
    return tuple(found.values())


def _opened(path: str, flags: int) -> int:
    # Without waiting: a pipe in the file's place would hold up everything.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _mark(state: os.stat_result) -> Hashable:
    """What tells one state of the file from another; None while it may change without telling."""
    changed = max(state.st_mtime_ns, state.st_ctime_ns)
    if time.time_ns() - changed < SETTLED * 1e9:
        return None
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _parsed(content: bytes, suffix: str) -> Any:
    try:
        text = content.removeprefix(BOM_UTF8).decode()
        return json.loads(text) if suffix == ".json" else tomllib.loads(text)
    except RecursionError:
        raise ConfigError([Fault(suffix[1:].upper(), "must not be nested that deeply")]) from None
    except ValueError as error:
        raise ConfigError([Fault(suffix[1:].upper(), f"must be well-formed: {error}")]) from None


def _entry(path: str, entry: Any) -> tuple[Endpoint | None, list[Fault]]:
    """One endpoint, and what is wrong with it; with a part missing, the others are checked all the same."""
    if not isinstance(entry, str | dict):
        return None, [Fault(path, f"must be 'host:port' or a table with host and port, got {_kind(entry)}")]
    faults: list[Fault] = []
    if isinstance(entry, dict):
        faults += _unknown(path, entry, _PARTS)
        faults += [Fault(f"{path}.{name}", "must be given") for name in ("host", "port") if name not in entry]
        faults += _bad_metadata(f"{path}.metadata", entry.get("metadata"))
    try:
        if isinstance(entry, str):
            endpoint = Endpoint.parse(entry)
        else:
            endpoint = Endpoint(**{"host": "localhost", "port": 1, **{k: entry[k] for k in _PARTS if k in entry}})
    except ConfigError as error:
        return None, faults + [
            Fault(f"{path}{each.path.removeprefix('endpoint')}", each.message) for each in error.faults
        ]
    return None if faults else endpoint, faults


def _bad_metadata(path: str, metadata: Any) -> list[Fault]:
    if not isinstance(metadata, dict):
        return []  # the endpoint says so
    return [
        Fault(_inside(path, name), f"must be a string, got {value!r}")
        for name, value in metadata.items()
        if not isinstance(value, str)
    ]


def _unknown(path: str, table: dict[str, Any], known: tuple[str, ...]) -> list[Fault]:
    faults = [
        Fault(_inside(path, name), f"must not be there{meant(name, known)} (known: {', '.join(known)})")
        for name in table.keys() - set(known)
    ]
    return sorted(faults, key=str)


def _inside(path: str, name: str) -> str:
    shown = name if name.isidentifier() else repr(name)
    return f"{path}.{shown}" if path else shown


def _kind(value: Any) -> str:
    """A value for an error; of one that holds others only what it is."""
    if isinstance(value, dict):
        return "a table"
    return "a list" if isinstance(value, list) else repr(value)


def _shown(path: str | os.PathLike[str]) -> str:
    return os.fspath(path).rpartition("@")[2]  # it may be another URL, with credentials


def _brief(text: str) -> str:
    return text if len(text) <= SHOWN_LENGTH else f"{text[: SHOWN_LENGTH - 3]}..."
