"""What Consul is told of the running process.

Decides what may be said, by which id, and how it is written for Consul. It never tells anybody.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

from meshlib.consul import ConsulAgent
from meshlib.consul_url import read_agent
from meshlib.endpoint import Endpoint
from meshlib.forbidden import is_forbidden
from meshlib.validation import ConfigError, Fault, check, number, ruled, whole

CHECKS = ("ttl", "http", "tcp")

SHORTEST_TTL, LONGEST_TTL = 1.0, 3600.0
"""Seconds without a heartbeat after which an instance may be called critical."""

SHORTEST_REAPING, LONGEST_REAPING = 60.0, 365 * 86400.0
"""Seconds that one may be critical before it is forgotten. Consul takes less for a minute."""

Alive = Callable[[], bool | Awaitable[bool]]
"""Whether the application is well."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?\Z")
_META_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
LONGEST_META = 512
MOST_META = 64
RESERVED = "consul-"
"""What Consul allows, and keeps to itself."""


def _name_rule(value: Any) -> str | None:
    usable = isinstance(value, str) and _NAME.match(value)
    return None if usable else "must be 1 to 128 letters, digits, '-', '_' and '.', for example 'orders'"


def _tags_rule(value: Any) -> str | None:
    usable = not isinstance(value, str) and isinstance(value, Sequence) and all(map(_is_text, value))
    return None if usable else "must be a list of texts, for example ['v2']"


def _meta_rule(value: Any) -> str | None:
    usable = (
        isinstance(value, Mapping)
        and len(value) <= MOST_META
        and all(isinstance(key, str) and _META_KEY.match(key) for key in value)
        and all(isinstance(text, str) and _length(text) <= LONGEST_META for text in value.values())
    )
    if usable and any(key.lower().startswith(RESERVED) for key in value):
        return f"must have no name that begins with {RESERVED!r}, for Consul keeps these to itself"
    wanted = f"at most {MOST_META} texts of at most {LONGEST_META} bytes, by names of letters, digits, '-' and '_'"
    return None if usable else f"must be {wanted}, for example {{'version': '2.1'}}"


def _length(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()


def _path_rule(value: Any) -> str | None:
    usable = isinstance(value, str) and value.startswith("/") and value.isascii() and value.isprintable()
    return None if usable and " " not in value else "must be a path, for example '/healthz'"


def _alive(value: Any) -> str | None:
    return None if value is None or callable(value) else "must be a function that is true while the application is well"


def _one_of(*words: str) -> Any:
    return lambda value: None if value in words else f"must be one of {', '.join(map(repr, words))}"


@dataclass(frozen=True)
class Entry:
    """One process, or several workers on one port, as Consul lists them; see `Mesh.register` for what each means.

    Raises:
        ConfigError: with every fault, as `register.<argument>`.
    """

    name: str = ruled(_name_rule)
    _: KW_ONLY
    port: int = ruled(whole(at_least=1, at_most=65535))
    host: str | None = None
    tags: Sequence[str] = ruled(_tags_rule, default=())
    meta: Mapping[str, str] = ruled(_meta_rule, default_factory=dict, repr=False)
    weight: int = ruled(whole(at_least=1, at_most=65535), default=1)
    check: str = ruled(_one_of(*CHECKS), default="ttl")
    at: str = "consul://127.0.0.1:8500"
    ttl: float = ruled(number(at_least=SHORTEST_TTL, at_most=LONGEST_TTL), default=10.0)
    alive: Alive | None = ruled(lambda value: _alive(value), default=None)
    check_path: str = ruled(_path_rule, default="/healthz", repr=False)
    check_interval: float = ruled(number(at_least=1, at_most=3600), default=10.0)
    deregister_after: float = ruled(number(at_least=SHORTEST_REAPING, at_most=LONGEST_REAPING), default=60.0)
    drain: float = ruled(number(at_least=0, at_most=600), default=0.3)
    agent: ConsulAgent = field(init=False)

    def __post_init__(self) -> None:
        faults: list[Fault] = []
        if self.alive is not None and self.check != "ttl":
            faults.append(Fault("alive", "must be left out where Consul checks by itself: it is asked for heartbeats"))
        for settle in (self._settle_host, self._settle_agent):
            try:
                settle()
            except ConfigError as error:
                faults += error.faults
        try:
            check(self, faults)
        except ConfigError as error:
            raise ConfigError(
                Fault(f"register.{each.path.rpartition('.')[2]}", each.message) for each in error.faults
            ) from None

    def _settle_host(self) -> None:
        if self.host is None:
            return
        try:
            host = Endpoint(self.host, 1).host
        except ConfigError as error:
            raise ConfigError(Fault("host", each.message) for each in error.faults) from None
        if is_forbidden(host):
            instead = "leave it out for that of Consul's agent"
            raise ConfigError([Fault("host", f"must be an address that others can call; {instead}, got {self.host!r}")])
        object.__setattr__(self, "host", host)

    def _settle_agent(self) -> None:
        settings = read_agent(self.at)
        try:
            object.__setattr__(self, "agent", ConsulAgent(**settings))
        except ConfigError as error:
            raise ConfigError(Fault("at", each.message) for each in error.faults) from None

    @cached_property
    def id(self) -> str:
        """The same at every registration: `name-host-port`, with this machine's name where no host was given."""
        return f"{self.name}-{self.host or socket.gethostname()}-{self.port}"

    @property
    def where(self) -> str:
        """The registry, for people."""
        return f"{'consul+https' if self.agent.scheme == 'https' else 'consul'}://{self.agent}"

    def told(self) -> dict[str, Any]:
        """The body of a registration. Without an address, Consul lists that of its agent."""
        check = {
            "Name": f"{self.name}: {self.check}",
            "Status": "passing",  # else it would be critical until its first check
            "DeregisterCriticalServiceAfter": _duration(self.deregister_after),
        }
        return {
            "ID": self.id,
            "Name": self.name,
            "Port": self.port,
            "Tags": list(self.tags),
            "Meta": dict(self.meta),
            "Weights": {"Passing": self.weight, "Warning": 1},
            "Check": check | self._check(),
        } | ({"Address": self.host} if self.host else {})

    def _check(self) -> dict[str, str]:
        if self.check == "ttl":
            return {"TTL": _duration(self.ttl)}
        place = str(Endpoint(self.host or "127.0.0.1", self.port))
        target = {"HTTP": f"http://{place}{self.check_path}"} if self.check == "http" else {"TCP": place}
        return target | {
            "Interval": _duration(self.check_interval),
            "Timeout": _duration(min(self.check_interval, 5.0)),
        }


def _duration(seconds: float) -> str:
    """As Go reads it, which knows no exponents."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
