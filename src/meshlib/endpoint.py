"""An endpoint: one address that serves a service, as a frozen value.

Decides how an address is written and when two are the same. It never resolves a name and holds nothing that changes:
the live side of a place is a node (`meshlib.core.node`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import Any

from meshlib.validation import ConfigError, Fault, check, held_to, instance, is_host_name, number, ruled, whole

Place = tuple[str, int]
"""Where an endpoint listens, (host, port): what identifies a node over every change of its weight or metadata."""

_PORT = re.compile(r"[0-9]{1,5}\Z")
_NUMBER = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)\Z")
"""The last part of what other programs take for an IPv4 address, in one of its odd spellings: `127.1`, `0x7f000001`."""
_SCOPE = re.compile(r"[A-Za-z0-9._-]*\Z")


@dataclass(frozen=True)
class Endpoint:
    """One address:port of a service.

    Args:
        host: an IPv4 or IPv6 address (brackets allowed), or a host name.
        port: 1 to 65535.
        weight: share of the calls relative to the others of its priority; more than 0, default 1.
        priority: 0 (default) is the preferred level.
        zone: locality label, default none.
        metadata: anything the resolver knows, for people and for balancers; copied, read-only.

    Raises:
        ConfigError: if a part is not usable; it names the part.
    """

    host: str
    port: int = field(metadata=held_to(whole(at_least=1, at_most=65535)))
    _: KW_ONLY
    weight: float = ruled(number(above=0), default=1)
    priority: int = ruled(whole(at_least=0), default=0)
    zone: str = ruled(instance(str, "'eu-west-1a'"), default="")
    metadata: Mapping[str, str] = ruled(instance(Mapping, "{'version': 'v2'}"), default_factory=dict, hash=False)
    place: Place = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        host = _normal_host(self.host)
        check(self, [] if host else [_bad_host(self.host)])
        object.__setattr__(self, "host", host)
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
        object.__setattr__(self, "place", (host, self.port))

    @classmethod
    def parse(cls, text: str, *, weight: float = 1) -> Endpoint:
        """Read `host:port`; an IPv6 address stands in brackets: `[::1]:8080`.

        Args:
            text: the two of them.
            weight: see `Endpoint`.

        Raises:
            ConfigError: if a part is missing or not usable; it names the part.
        """
        host, colon, port = text.strip().rpartition(":") if isinstance(text, str) else ("", "", "")
        if not colon or not _PORT.match(port) or (":" in host and not host.startswith("[")):
            wrong = f"must be 'host:port', for example '10.0.0.1:8080' or '[::1]:8080', got {_shown(text)}"
            raise ConfigError([Fault("endpoint", wrong)])
        return cls(host, int(port), weight=weight)

    @property
    def is_address(self) -> bool:
        """Whether the host can be dialled as it is: an IP address or `localhost`, not a name to be resolved."""
        return self.host == "localhost" or _address(self.host) is not None

    def __str__(self) -> str:
        return joined(self.host, self.port)

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping does not pickle; an endpoint is rebuilt from what it was made of.
        parts = (self.host, self.port, self.weight, self.priority, self.zone, dict(self.metadata))
        return _rebuild, parts


def joined(host: str, port: int) -> str:
    """A host and a port as one, an IPv6 address in brackets; `Endpoint.parse` reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def place_of(given: Endpoint | Place | str) -> Place:
    """The place that an endpoint, `(host, port)` or `"host:port"` means.

    Raises:
        ConfigError: if it means none.
    """
    if isinstance(given, tuple) and len(given) == 2:
        given = Endpoint(*given)
    return (given if isinstance(given, Endpoint) else Endpoint.parse(given)).place


def _rebuild(host: str, port: int, weight: float, priority: int, zone: str, metadata: dict[str, str]) -> Endpoint:
    return Endpoint(host, port, weight=weight, priority=priority, zone=zone, metadata=metadata)


def _normal_host(host: Any) -> str:
    """The one way to write a host, or "" if it is none."""
    if not isinstance(host, str):
        return ""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if (address := _address(bare)) is not None:
        return str(address)
    name = host.lower().removesuffix(".")
    looks_numeric = _NUMBER.match(name.rpartition(".")[2])
    return name if looks_numeric is None and is_host_name(name) else ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    # `ipaddress` takes anything for the scope of an IPv6 address, line ends included.
    if not _SCOPE.match(host.partition("%")[2]):
        return None
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _bad_host(host: Any) -> Fault:
    return Fault("endpoint.host", f"must be an IP address or a host name, for example '10.0.0.1', got {_shown(host)}")


def _shown(given: Any) -> str:
    """What was given for an address, for an error: it may be a URL, with credentials or a query."""
    return repr(given.partition("?")[0].rpartition("@")[2] if isinstance(given, str) else given)
