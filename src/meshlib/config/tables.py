"""Which settings a table may hold, and what each of them takes: all of it as the dataclasses of the settings say.

Decides nothing of its own but the names that balancers have in a file. It never looks at a configuration.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from inspect import cleandoc
from types import UnionType
from typing import Any, NamedTuple

from meshlib.core.balance import Balancer
from meshlib.policy import TLS, Retry
from meshlib.service import Service
from meshlib.validation import Told, check, choice, instance, ruled

BALANCERS = {
    "peak_ewma": ("peak_ewma", "PeakEwma"),
    "least_request": ("least_request", "LeastRequest"),
    "round_robin": ("round_robin", "RoundRobin"),
    "random": ("lottery", "Random"),
    "consistent_hash": ("hashing", "ConsistentHash"),
}
"""Module of `meshlib.core.balance` and class by name in a file."""

_ARGUMENT = re.compile(r" {4}(\w[\w, ]*): ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What holds for all services of a mesh.

    Args:
        passthrough: whether requests to hosts that are no services go out as plain httpx would send them.
        zone: where this process is. Endpoints of the same zone are called before others of their priority.
        send_deadline: whether the next hop is told what is left of a call's time.
        spans: what of a call is traced: "both" itself and its attempts, only the "call", only each "attempt", or "off".
        endpoint_attributes: whether the duration of attempts is told apart by endpoint in metrics.
        call_duration: whether the duration of calls is recorded beside it.
    """

    passthrough: bool = ruled(instance(bool, "False"), default=False)
    zone: str = ruled(instance(str, "'eu-west-1a'"), default="")
    send_deadline: bool = ruled(instance(bool, "False"), default=True)
    spans: str = ruled(choice("both", "call", "attempt", "off"), default="both")
    endpoint_attributes: bool = ruled(instance(bool, "False"), default=False)
    call_duration: bool = ruled(instance(bool, "False"), default=True)

    def __post_init__(self) -> None:
        check(self)


class Key(NamedTuple):
    """One setting.

    Attributes:
        name: its key.
        takes: the types of its value, without None; of a collection, that of its items stands in `items`.
        items: the type of a collection's items; None if it takes no collection.
        table: the settings that it takes a table of; None if it takes none.
        default: what holds if it is left out.
        is_required: whether it cannot be.
        is_path: whether it is a path, unless it is a word that stands for something else.
        schema: what its rule says in the words of JSON Schema, if it does.
        text: what it is for.
    """

    name: str
    takes: frozenset[type]
    items: type | None
    table: type | None
    default: Any
    is_required: bool
    is_path: bool
    schema: Mapping[str, Any] | None
    text: str

    @property
    def is_code(self) -> bool:
        """Whether no value of a file can be one."""
        return not self.takes and self.items is None and self.table is None


@cache
def keys_of(kind: type) -> dict[str, Key]:
    """The settings of a class, by name and in the order of its fields."""
    hints = typing.get_type_hints(kind, localns={"Resolver": object})  # which is known to type checkers alone
    texts = _texts(kind)
    return {
        each.name: _key(kind, each, hints[each.name], texts.get(each.name, ""))
        for each in fields(kind)
        if each.init and each.name != "_" and not (kind is Service and each.name == "name")
    }


@cache
def balancer_named(name: str) -> type[Balancer]:
    """The class of a balancer."""
    module, kind = BALANCERS[name]
    found: type[Balancer] = getattr(import_module(f"meshlib.core.balance.{module}"), kind)
    return found


def summary_of(kind: type) -> str:
    """What a class of settings is for, in a sentence."""
    return " ".join(cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())


def _key(kind: type, field: Any, hint: Any, text: str) -> Key:
    parts = _parts(hint)
    rule = field.metadata.get("rule")
    table = next((part for part in parts if is_dataclass(part) and isinstance(part, type)), None)
    collection = next((part for part in parts if typing.get_origin(part) is Collection), None)
    takes = frozenset(part for part in parts if part in (str, int, float, bool))
    if kind is Retry and field.name == "wait":
        takes = frozenset({float})
    return Key(
        field.name,
        takes,
        None if collection is None else typing.get_args(collection)[0],
        table,
        field.default,
        field.default is MISSING and field.default_factory is MISSING,
        kind is TLS and field.name in ("verify", "cert", "key"),
        rule.schema if isinstance(rule, Told) else None,
        text,
    )


def _parts(hint: Any) -> list[Any]:
    is_union = isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union
    return [part for part in (typing.get_args(hint) if is_union else (hint,)) if part is not type(None)]


def _texts(kind: type) -> dict[str, str]:
    """What the docstring says of each argument."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    section = cleandoc(kind.__doc__ or "").partition("Args:\n")[2]
    for line in section.splitlines():
        if not line.startswith(" "):
            break
        if match := _ARGUMENT.match(line):
            names = [name.strip() for name in match[1].split(",")]
            line = line[match.end() :]
        for name in names:
            found.setdefault(name, []).append(line.strip())
    return {name: " ".join(part for part in parts if part) for name, parts in found.items()}
