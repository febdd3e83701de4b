"""What Consul lists for a service, as endpoints.

Decides which instances may be called (their checks, maintenance), where they are, and their weight, zone and metadata.
An instance that is not told usably is left out and counted, never guessed at. It never asks Consul.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from meshlib.endpoint import Endpoint, Place
from meshlib.validation import LARGEST, ConfigError

LONGEST_VALUE = 512
MOST_VALUES = 64
"""What Consul itself allows in the metadata of a service."""

_MAINTENANCE = ("_node_maintenance", "_service_maintenance")


class Unusable(Exception):
    """An entry, or a whole answer, that does not say what it must."""


@dataclass
class Found:
    """The endpoints of an answer, and how many of its entries could not be used, with the first reason."""

    endpoints: dict[Place, Endpoint] = field(default_factory=dict)
    unusable: int = 0
    reason: str = ""

    def warnings(self) -> list[str]:
        """What people should know of it."""
        return [f"{self.unusable} of its instances left out: {self.reason}"] if self.unusable else []


def found_in(entries: Any, *, with_warnings: bool) -> Found:
    """Read the list of a health query or a prepared query.

    Args:
        entries: the list, as JSON was read.
        with_warnings: take instances with a warning too, at the weight that they have for this case.

    Raises:
        Unusable: if it is no list, or none of the instances that may be called says where it is.
    """
    if not isinstance(entries, list):
        raise Unusable(f"it should be a list of instances and is {_kind(entries)}")
    found = Found()
    for entry in entries:
        try:
            endpoint = _endpoint(entry, with_warnings)
        except Unusable as why:
            found.unusable += 1
            found.reason = found.reason or str(why)
            continue
        if endpoint is not None:
            found.endpoints.setdefault(endpoint.place, endpoint)
    if found.unusable and not found.endpoints:
        raise Unusable(f"none of its instances can be used: {found.reason}")
    return found


def _endpoint(entry: Any, with_warnings: bool) -> Endpoint | None:
    """The endpoint of an entry, or None if it may not be called."""
    node, service = _part(entry, "Node"), _part(entry, "Service")
    state = _state(entry.get("Checks"))
    if state == "critical" or (state == "warning" and not with_warnings):
        return None
    weight = _weight(service.get("Weights"), "Warning" if state == "warning" else "Passing")
    if not weight:
        return None
    host, port = service.get("Address") or node.get("Address"), service.get("Port")
    if not host or not port:
        raise Unusable(f"{_name(service)} has no {'port' if host else 'address'}")
    try:
        return Endpoint(host, port, weight=weight, zone=_zone(service, node), metadata=_metadata(service, node))
    except ConfigError:
        raise Unusable(f"{_name(service)} has no usable {'address' if _is_port(port) else 'port'}") from None


def _part(entry: Any, name: str) -> dict[str, Any]:
    part = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(part, dict):
        raise Unusable(f"an entry has no {name}")
    return part


def _state(checks: Any) -> str:
    """The worst of the checks, of the node and of the service. What is not known to be well is critical."""
    if checks is not None and not isinstance(checks, list):
        raise Unusable("an entry has checks that are no list")
    worst = "passing"
    for check in checks or ():
        if not isinstance(check, dict):
            raise Unusable("an entry has a check that is none")
        status = check.get("Status")
        if str(check.get("CheckID", "")).startswith(_MAINTENANCE) or status not in ("passing", "warning"):
            return "critical"
        worst = "warning" if status == "warning" else worst
    return worst


def _weight(weights: Any, state: str) -> float:
    """Consul allows a weight of 0 for an instance with a warning alone: it shall get no calls."""
    weight = weights.get(state) if isinstance(weights, dict) else None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= LARGEST:
        return 1
    return weight or (0 if state == "Warning" else 1)


def _zone(service: dict[str, Any], node: dict[str, Any]) -> str:
    zones = (_texts(service.get("Meta")).get("zone"), _texts(node.get("Meta")).get("zone"))
    return next(filter(None, zones), "")


def _metadata(service: dict[str, Any], node: dict[str, Any]) -> dict[str, str]:
    tags = service.get("Tags")
    ours = {
        "tags": ",".join(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else "",
        "node": node.get("Node"),
        "dc": node.get("Datacenter"),
    }
    told = _texts(service.get("Meta"))
    return dict(list(told.items())[:MOST_VALUES]) | {name: text for name, text in _texts(ours).items() if text}


def _texts(values: Any) -> dict[str, str]:
    if not isinstance(values, dict):
        return {}
    return {name: text[:LONGEST_VALUE] for name, text in values.items() if isinstance(text, str)}


def _is_port(port: Any) -> bool:
    return isinstance(port, int) and not isinstance(port, bool) and 1 <= port <= 65535


def _name(service: dict[str, Any]) -> str:
    return repr(str(service.get("ID") or service.get("Service") or "an instance")[:100])


def _kind(value: Any) -> str:
    return {dict: "an object", str: "a text", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
