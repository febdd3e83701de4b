"""What editors are told of a configuration: a JSON Schema, made of the settings themselves.

Decides how a setting is told in its words. It says less than the rules do, and never refuses what they accept: that
two settings go together, or that a host name is one, is found out by `meshlib check`.

The file `meshlib/mesh.schema.json` is what `schema()` returns; a test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from meshlib.config.tables import BALANCERS, Key, Options, balancer_named, keys_of, summary_of
from meshlib.service import Service

_TYPES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}

_ENDPOINT = {
    "type": "object",
    "description": "One address:port of a service.",
    "additionalProperties": False,
    "required": ["host", "port"],
    "properties": {
        "host": {"type": "string", "description": "An IP address, or a name, which is looked up."},
        "port": {"type": "integer", "minimum": 1, "maximum": 65535},
        "weight": {"type": "number", "exclusiveMinimum": 0, "default": 1, "description": "Share of the calls."},
        "priority": {"type": "integer", "minimum": 0, "default": 0, "description": "0 is the preferred level."},
        "zone": {"type": "string", "default": "", "description": "Locality label."},
        "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def schema() -> dict[str, Any]:
    """The schema, as plain data."""
    services = {
        "type": "object",
        "description": "The services that may be called, by name.",
        "minProperties": 1,
        "additionalProperties": _table(Service),
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "meshlib",
        "description": "Services that meshlib calls. Lengths of time are seconds.",
        "type": "object",
        "additionalProperties": False,
        "required": ["services"],
        "properties": {"mesh": _table(Options), "services": services},
    }


def written() -> str:
    """The same, as the file holds it."""
    return f"{json.dumps(schema(), indent=2)}\n"


def _table(kind: type, **more: Any) -> dict[str, Any]:
    keys = [key for key in keys_of(kind).values() if not key.is_code or key.name == "balancer"]
    required = [key.name for key in keys if key.is_required]
    return {
        "type": "object",
        "description": summary_of(kind),
        "additionalProperties": False,
        **({"required": required} if required else {}),
        "properties": {**more, **{key.name: _setting(key) for key in keys}},
    }


def _setting(key: Key) -> dict[str, Any]:
    if key.name == "resolver":
        entries = {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, _ENDPOINT]}}
        return {"description": key.text, "anyOf": [{"type": "string"}, entries]}
    if key.name == "balancer":
        return {"description": key.text, "anyOf": [{"enum": list(BALANCERS)}, *map(_balancer, BALANCERS)]}
    if key.table is not None:
        return {**_table(key.table), "description": key.text}
    return {"description": key.text, **_shape(key), **_default(key)}


def _balancer(name: str) -> dict[str, Any]:
    table = _table(balancer_named(name), type={"const": name})
    return {**table, "required": ["type", *table.get("required", [])]}


def _shape(key: Key) -> dict[str, Any]:
    if key.schema is not None:
        return dict(key.schema)
    if key.items is not None:
        return {"type": "array", "items": {"type": _TYPES[key.items]}}
    if key.name == "wait":
        return {"type": "number", "minimum": 0, "maximum": 3600}
    return {"type": next(_TYPES[kind] for kind in _TYPES if kind in key.takes)}


def _default(key: Key) -> dict[str, Any]:
    """What holds without it, where that can be written down and is not a long list."""
    if isinstance(key.default, str | int | float):
        return {"default": key.default}
    if isinstance(key.default, Collection) and len(key.default) < 10:
        return {"default": sorted(key.default)}
    return {}
