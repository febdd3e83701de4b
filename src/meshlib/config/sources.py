"""Where a configuration comes from: a file in TOML, the environment, or both, of which the environment wins.

Decides which variable is which setting, and what a file has to be. What the values come to is decided in `reading`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from meshlib.config.reading import Configuration, Text, configured, in_toml
from meshlib.validation import ConfigError, Fault

LARGEST = 4 << 20
"""Bytes of a file. It is meant to be read by people."""

TABLES = ("MESH", "SERVICES")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a mesh is configured by.

    Args:
        path: the file; None for none.
        environ: the environment, if it counts for more than what `${NAME}` stands for.
        prefix: what the names of its variables begin with.
    """

    path: Path | None = None
    environ: Mapping[str, str] | None = None
    prefix: str = "MESHLIB_"

    def content(self) -> bytes:
        """The file as it is now; nothing if there is none.

        Raises:
            OSError: if it cannot be read.
            ConfigError: if it is none, or far too long.
        """
        if self.path is None:
            return b""
        if self.path.exists() and not self.path.is_file():
            raise ConfigError([Fault(self.path.name, "must be a file")])
        with self.path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ConfigError([Fault(self.path.name, f"must be no larger than {LARGEST >> 20} MiB")])
        return content

    def read(self, content: bytes) -> Configuration:
        """What the file with this content comes to, under the environment.

        Raises:
            ConfigError: with every fault.
        """
        document = _parsed(content)
        faults: list[Fault] = []
        origins: dict[str, str] = {}
        if self.environ is not None:
            faults += _overlay(document, self.environ, self.prefix, origins)
        folder = None if self.path is None else self.path.parent
        example = f"{self.prefix}SERVICES__ORDERS__RESOLVER" if self.path is None else "[services.orders]"
        try:
            found = configured(document, folder=folder, origins=origins, example=example)
        except ConfigError as error:
            raise ConfigError([*faults, *error.faults]) from None
        if faults:
            raise ConfigError(faults)
        return found


def of_file(path: str | os.PathLike[str]) -> Source:
    """A file, and nothing else."""
    return Source(path=_absolute(path))


def of_environment(prefix: str) -> Source:
    """The environment, over the file that its variable `CONFIG` names, if it does."""
    environ = dict(os.environ)
    path = environ.get(f"{prefix}CONFIG", "")
    return Source(path=_absolute(path) if path else None, environ=environ, prefix=prefix)


def _absolute(path: str | os.PathLike[str]) -> Path:
    """The path as it stays when the process goes to another folder. Links are followed at each look."""
    return Path(path).expanduser().absolute()


def _parsed(content: bytes) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ConfigError([Fault("TOML", "must not be nested that deeply")]) from None
    except ValueError as error:
        raise ConfigError([Fault("TOML", f"must be well-formed: {error}")]) from None


def _overlay(document: dict[str, Any], environ: Mapping[str, str], prefix: str, origins: dict[str, str]) -> list[Fault]:
    """Put what the environment says into the document; returns what is wrong with the names."""
    faults = []
    for name in sorted(environ):
        if not name.startswith(prefix) or "__" not in name:
            continue
        table, *parts = name.removeprefix(prefix).split("__")
        if table not in TABLES:
            near = get_close_matches(table, TABLES, n=1)
            meant = f"; did you mean {prefix}{near[0]}__...?" if near else ""
            faults.append(Fault(name, f"must begin with {prefix}SERVICES__ or {prefix}MESH__{meant}"))
        elif not all(parts) or (table == "SERVICES" and len(parts) < 2):
            faults.append(Fault(name, f"must name a setting, for example {prefix}SERVICES__ORDERS__RESOLVER"))
        else:
            path = _put(document, [table.lower(), *(part.lower() for part in parts)], Text(environ[name]))
            origins[path] = name
    return faults


def _put(document: dict[str, Any], path: list[str], value: Text) -> str:
    """Set one value, and whatever tables it takes; returns its path."""
    table: dict[str, Any] = document
    names: list[str] = []
    for depth, part in enumerate(path):
        name = _known(table, part) if path[0] == "services" and depth == 1 else part
        names.append(name)
        if depth == len(path) - 1:
            table[name] = value
            break
        inner = table.get(name)
        if isinstance(inner, Text):  # a variable gives the table, and another one a value in it
            inner = in_toml(inner.text)
        if name == "balancer" and isinstance(inner, str):
            inner = {"type": inner}
        table[name] = table = dict(inner) if isinstance(inner, dict) else {}
    return ".".join(names)


def _known(services: Mapping[str, Any], part: str) -> str:
    """The service that a part of a variable's name means: `-` and `.` cannot stand there, so `_` does for them."""
    return next((name for name in services if re.sub(r"[.-]", "_", str(name)) == part), part)
