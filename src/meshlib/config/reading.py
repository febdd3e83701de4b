"""Services from tables: what a configuration comes to, or all that is wrong with it.

Decides how a value of a file becomes a setting. Which settings there are and what they may be is theirs to say (see
`tables`); here are only the words for what a file cannot hold. Nothing is left out silently: a key that is not known is
a fault. It reads no file itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import quote

from meshlib.config.tables import BALANCERS, Key, Options, balancer_named, keys_of
from meshlib.discovery.file import endpoints_in
from meshlib.policy import TLS
from meshlib.service import Service
from meshlib.validation import ConfigError, Fault, meant

LARGEST_WHOLE = 2**63
"""Whole numbers of TOML have 64 bits."""

LONGEST = 300
"""Characters of a fault: a value may be a page long."""

SECRET = 4
"""Characters from which on a value of the environment is hidden wherever it stands: fewer are in any sentence."""

EXAMPLE = "for example resolver = ['10.0.0.1:8080']"

PLACEHOLDER = ("127.0.0.1:1",)
"""Stands in for endpoints that are at fault, so that the other settings are looked at all the same."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_FILE = re.compile(r"((?:\A|\||failover:)\s*file:)(?![/~]|%2F|%7E)(?=[^|\s])", re.IGNORECASE)
_NAMED_FILE = re.compile(r"([?&](?:token|ca)_file=)(?![/~]|%2F|%7E)(?=[^|&\s])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Text:
    """A value from the environment: text, or what TOML makes of it where the setting takes something else."""

    text: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a configuration comes to.

    Attributes:
        services: as they are set.
        options: what holds for all of them: keywords of `Mesh`.
    """

    services: tuple[Service, ...]
    options: dict[str, Any]


def configured(
    document: Any,
    *,
    folder: Path | None = None,
    environ: Mapping[str, str] | None = None,
    origins: Any = None,
    example: str = "[services.orders]",
) -> Configuration:
    """Read a configuration.

    Args:
        document: a mapping with the tables `services` and, where wanted, `mesh`.
        folder: what relative paths in it are relative to. Default the current directory.
        environ: what `${NAME}` in a value stands for. Default the process's environment.
        origins: where values came from that are not the file's, by their path.
        example: how a service is set, for who has set none.

    Raises:
        ConfigError: with every fault, in the order of the document.
    """
    reader = _Reader(folder, os.environ if environ is None else environ, example)
    try:
        found = reader.document(document)
    except RecursionError:
        raise ConfigError([Fault("configuration", "must not be nested that deeply")]) from None
    if reader.faults:
        raise ConfigError(_with_origin(reader.hidden(fault), origins or {}) for fault in reader.faults)
    return found


class _Reader:
    """Reads one document, and gathers its faults."""

    def __init__(self, folder: Path | None, environ: Mapping[str, str], example: str) -> None:
        self.faults: list[Fault] = []
        self._folder = folder
        self._environ = environ
        self._example = example
        self._secrets: dict[str, str] = {}

    def document(self, document: Any) -> Configuration:
        table = self._table("", document)
        self.faults += [_stray(name, table[name]) for name in table if name not in ("mesh", "services")]
        options: dict[str, Any] = {}
        services: list[Service] = []
        for name in table:  # in the order of the document
            if name == "mesh":
                options = self._options(self._table("mesh", table[name]))
            if name == "services":
                services = self._services(self._table("services", table[name]))
        if not table.get("services"):
            self._fault("services", f"must name at least one, for example {self._example}")
        return Configuration(tuple(services), options)

    def _options(self, table: Mapping[Any, Any]) -> dict[str, Any]:
        before = len(self.faults)
        given = self._given(Options, table, "mesh")
        self._made(lambda: Options(**given), "mesh", table, before)
        return given

    def hidden(self, fault: Fault) -> Fault:
        """The fault without what came from the environment, which may be a secret."""
        message = fault.message
        for value in sorted(self._secrets, key=len, reverse=True):  # one may hold another
            written = self._secrets[value]
            message = message.replace(repr(value), repr(written))
            for shown in _shown(value) if len(value) >= SECRET else ():
                message = message.replace(shown, written)
        return Fault(fault.path, message if len(message) <= LONGEST else f"{message[: LONGEST - 3]}...")

    def _services(self, table: Mapping[Any, Any]) -> list[Service]:
        found = []
        for name, each in table.items():
            path = _inside("services", name)
            service = self._service(name, self._table(path, each), path, [other for other in table if other != name])
            if service is not None:
                found.append(service)
        return found

    def _service(self, name: Any, table: Mapping[Any, Any], path: str, others: list[Any]) -> Service | None:
        before = len(self.faults)
        usable = self._made(lambda: Service(name, PLACEHOLDER), path, {}) and name
        given = self._given(Service, table, path)
        if "resolver" not in table:
            near = get_close_matches(str(name), [str(other) for other in others], n=1)
            meant = f"; did you mean {_inside('services', near[0])}?" if near else ""
            self._fault(f"{path}.resolver", f"must be given, {EXAMPLE}{meant}")
        given.setdefault("resolver", PLACEHOLDER)
        made: Service | None = self._made(lambda: Service(usable or "orders", **given), path, table, before)
        tls = given.get("tls")
        if isinstance(tls, TLS):  # whatever else is wrong with the service: all faults are told at once
            from meshlib.transport.tls import context_for

            self._made(lambda: context_for(tls), f"{path}.tls", table)
        return made if len(self.faults) == before else None

    def _given(self, kind: type, table: Mapping[Any, Any], path: str) -> dict[str, Any]:
        """The settings of a class that a table gives, without those at fault."""
        keys, given = keys_of(kind), dict[str, Any]()
        for name, raw in table.items():
            inside = _inside(path, name)
            if name not in keys:
                self.faults.append(_unknown(inside, name, keys))
                continue
            before = len(self.faults)
            value = self._value(keys[name], raw, inside)
            if len(self.faults) == before:
                given[name] = value
        return given

    def _value(self, key: Key, raw: Any, path: str) -> Any:
        raw = self._plain(key, raw)
        if key.name == "resolver":
            return self._resolver(raw, path)
        if key.name == "balancer":
            return self._balancer(raw, path)
        if isinstance(raw, Mapping):
            return self._settings(key, raw, path)
        if isinstance(raw, list | tuple):
            return self._list(key, raw, path)
        if _is_toml(raw) and (key.table is not None or key.is_code):
            known = "" if key.table is None else f"a table{_example_of(key)} (known: {', '.join(keys_of(key.table))})"
            return self._fault(path, f"must be {known or 'set in code: it is a function'}, got {raw!r:.100}")
        if isinstance(raw, str):
            return self._path_or_text(key, self._text(raw, path))
        if key.name == "wait" and isinstance(raw, int | float) and not isinstance(raw, bool):
            return self._fixed(raw, path)
        return raw if self._fits(raw, path) else None

    def _plain(self, key: Key, raw: Any) -> Any:
        """What the environment says, as a file would: text where the setting takes no other."""
        if not isinstance(raw, Text):
            return raw
        is_text = key.takes == {str} and key.name != "resolver"
        return raw.text if is_text and not raw.text.startswith(('"', "'")) else in_toml(raw.text)

    def _settings(self, key: Key, raw: Mapping[Any, Any], path: str) -> Any:
        if key.table is None:
            return self._fault(path, f"must not be a table{_example_of(key)}")
        kind = key.table
        before = len(self.faults)
        given = self._given(kind, raw, path)
        for each in keys_of(kind).values():
            if each.is_required and each.name not in given:
                given[each.name] = "/" if str in each.takes else 1  # so that the others are looked at all the same
                if each.name not in raw:
                    self._fault(f"{path}.{each.name}", "must be given")
        made = self._made(lambda: kind(**given), path, raw, before)
        return made if len(self.faults) == before else None

    def _list(self, key: Key, raw: Sequence[Any], path: str) -> Any:
        if key.items is None:
            return self._fault(path, f"must not be a list{_example_of(key)}")
        if any(isinstance(each, Mapping | list | tuple) for each in raw):
            return self._fault(path, f"must be a list of values, not of lists or tables{_example_of(key)}")
        if not all(self._fits(each, path) for each in raw):
            return None
        return [self._text(each, path) if isinstance(each, str) else each for each in raw]

    def _resolver(self, raw: Any, path: str) -> Any:
        if isinstance(raw, str):
            return self._anchored(self._text(raw, path))
        if not isinstance(raw, list | tuple):
            if isinstance(raw, Mapping) or _is_toml(raw):
                self._fault(path, f"must be a URL, or a list of addresses, tables or URLs, {EXAMPLE}")
            return raw
        if any(isinstance(each, list | tuple) for each in raw):
            return self._fault(path, f"must be a list of addresses, tables or URLs, not of lists, {EXAMPLE}")
        entries = [self._entry(each, path) for each in raw]
        if not any(isinstance(each, dict) for each in entries):
            return entries
        try:
            return endpoints_in([each if isinstance(each, str | dict) else str(each) for each in entries])
        except ConfigError as error:
            for fault in error.faults:
                self._fault(f"{path}{fault.path.removeprefix('endpoints')}", fault.message)
        return None

    def _entry(self, raw: Any, path: str) -> Any:
        if isinstance(raw, str):
            return self._anchored(self._text(raw, path))
        if isinstance(raw, Mapping):
            return {name: self._text(each, path) if isinstance(each, str) else each for name, each in raw.items()}
        return raw

    def _balancer(self, raw: Any, path: str) -> Any:
        if not isinstance(raw, str | Mapping):
            if _is_toml(raw):
                self._fault(path, f"must be the name of a balancer ({', '.join(BALANCERS)}), or a table with its type")
            return raw
        table = {"type": raw} if isinstance(raw, str) else raw
        name = self._text(table.get("type"), f"{path}.type")
        if not isinstance(name, str) or name not in BALANCERS:
            where = path if isinstance(raw, str) else f"{path}.type"
            shown = f", got {name!r}" if "type" in table else ""  # as a whole: a part of a secret is not known for one
            return self._fault(where, f"must be one of {', '.join(BALANCERS)}{shown}{_meant(str(name), BALANCERS)}")
        kind: type = balancer_named(name)
        before = len(self.faults)
        given = self._given(kind, {key: value for key, value in table.items() if key != "type"}, path)
        return self._made(lambda: kind(**given), path, table, before)

    def _fixed(self, seconds: float, path: str) -> Any:
        if not 0 <= seconds <= 3600:
            return self._fault(path, f"must be seconds from 0 to 3600, got {seconds!r:.100}")
        return Fixed(float(seconds))

    def _path_or_text(self, key: Key, text: str) -> str:
        is_path = key.is_path and text not in ("", "system")
        return str(self._folder / text) if is_path and self._folder is not None else text

    def _anchored(self, url: str) -> str:
        """A resolver URL whose relative paths begin at the folder."""
        if self._folder is None:
            return url
        here = quote(f"{self._folder.absolute()}/", safe="/")
        return _NAMED_FILE.sub(rf"\g<1>{here}", _FILE.sub(rf"\g<1>{here}", url))

    def _text(self, text: Any, path: str) -> Any:
        """A text with what the environment says in the place of `${NAME}`."""
        if not isinstance(text, str) or "${" not in text:
            return text

        def value(match: re.Match[str]) -> str:
            if (found := self._environ.get(match[1])) is None:
                self._fault(path, f"must name a variable that is set in the environment, got {match[0]!r}")
            elif found:
                self._secrets[found] = match[0]
            return found or ""

        return _VARIABLE.sub(value, text)

    def _fits(self, value: Any, path: str) -> bool:
        if isinstance(value, int) and not -LARGEST_WHOLE <= value < LARGEST_WHOLE:
            self._fault(path, "must be a number that fits 64 bits")
            return False
        return True

    def _table(self, path: str, raw: Any) -> Mapping[Any, Any]:
        if isinstance(raw, Text):
            raw = in_toml(raw.text)
        if isinstance(raw, Mapping):
            return raw
        example = "services.orders" if path in ("", "services") else path
        self._fault(path or "configuration", f"must be a table, for example [{example}], got {type(raw).__name__}")
        return {}

    def _unknown(self, path: str, table: Mapping[Any, Any], known: Iterable[str]) -> None:
        self.faults += [_unknown(_inside(path, name), name, known) for name in table if name not in known]

    def _made(self, make: Callable[[], Any], path: str, given: Mapping[Any, Any], since: int | None = None) -> Any:
        """What `make` makes; its faults stand with those found since, in the order of the table."""
        try:
            return make()
        except ConfigError as error:
            self.faults += [Fault(_moved(each.path, path), each.message) for each in error.faults]
        if since is not None:
            order = {_inside(path, name): position for position, name in enumerate(given)}
            found = self.faults[since:]
            self.faults[since:] = sorted(found, key=lambda each: order.get(_first(each.path, path), len(order)))
        return None

    def _fault(self, path: str, message: str) -> None:
        self.faults.append(Fault(path, message))


@dataclass(frozen=True, slots=True)
class Fixed:
    """A strategy for `Retry.wait`: always as long."""

    seconds: float

    def __call__(self, state: Any) -> float:
        return self.seconds


def in_toml(text: str) -> Any:
    """A value in TOML, or the text as it is if it is none."""
    import tomllib

    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if found.keys() == {"value"} else text


def _example_of(key: Key) -> str:
    """How its value is written: as its default, or, of a table, with the first setting in it."""
    if key.table is not None:
        first = next(iter(keys_of(key.table).values()))
        needed = "'/healthz'" if str in first.takes else 100
        return f", for example {key.name} = {{{first.name} = {needed if first.is_required else repr(first.default)}}}"
    if isinstance(key.default, frozenset):
        return f", for example {key.name} = {sorted(key.default)}"
    is_telling = isinstance(key.default, str | int | float) and not isinstance(key.default, bool) and key.default != ""
    return f", for example {key.name} = {key.default!r}" if is_telling else ""


def _shown(value: str) -> tuple[str, ...]:
    """A text as it may stand in a complaint: as it is, or within a longer one that is quoted so or so."""
    both = "'\""  # then the one kind of quotes is escaped
    return value, repr(value)[1:-1], repr(both + value)[len(repr(both)) - 1 : -1]


def _is_toml(value: Any) -> bool:
    """Whether it could stand in a file; other objects, given in code, are held to the rules of the settings as is."""
    return isinstance(value, str | int | float | list) or type(value).__module__ == "datetime"


def _unknown(path: str, name: Any, known: Iterable[str]) -> Fault:
    known = tuple(known)
    return Fault(path, f"must not be there{_meant(str(name), known)} (known: {', '.join(known)})")


def _stray(name: Any, value: Any) -> Fault:
    """What is neither `mesh` nor `services`, and may be a service."""
    if isinstance(value, Mapping) and "resolver" in value:
        return Fault(_inside("", name), f"must be a table in services; did you mean [{_inside('services', name)}]?")
    return _unknown(_inside("", name), name, ("mesh", "services"))


def _meant(name: str, known: Iterable[str]) -> str:
    return meant(name.lower().replace("-", "_"), known)


def _inside(path: str, name: Any) -> str:
    shown = name if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name) else f"{name!r:.80}"
    return f"{path}.{shown}" if path else shown


def _moved(path: str, to: str) -> str:
    """`retry.max_attempts` and `services.orders.host`, as they stand under `to`."""
    if path.startswith("services."):
        return f"{to}.{path.removeprefix('services.').partition('.')[2]}"
    return f"{to}.{path.partition('.')[2] or path}"


def _first(path: str, under: str) -> str:
    """The part of a path that is the key of the table at `under`."""
    return f"{under}.{re.split(r'[.[]', path.removeprefix(f'{under}.'), maxsplit=1)[0]}"


def _with_origin(fault: Fault, origins: Mapping[str, str]) -> Fault:
    """A fault of what a variable says names the variable, and does not show what it says, which may be a secret."""
    for path, name in origins.items():
        if fault.path == path or fault.path.startswith((f"{path}.", f"{path}[")):
            return replace(fault, message=f"{fault.message.partition(', got ')[0]} (from {name})")
    return fault
