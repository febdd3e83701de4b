"""Endpoints from the DNS: the addresses of a name, or what its SRV records lead to.

Decides how these resolvers are written, and what an answer means for a service. The queries are in `nameservers`, both
families of a name in `addresses`, the targets of SRV records in `targets`, priorities and weights in `srv`. It never
keeps an answer: `previous` is all it knows of before, and only what is missing from an answer is taken from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Self

import dns.exception
import dns.name

from meshlib.discovery import hosts, srv, urls
from meshlib.discovery.addresses import bounded, look_up
from meshlib.discovery.nameservers import Answer, Nameservers
from meshlib.discovery.resolver import Resolution
from meshlib.discovery.targets import Known, addresses_of
from meshlib.endpoint import Endpoint, joined
from meshlib.errors import ResolveError
from meshlib.validation import is_host_name

PARAMETERS = ("nameserver", "tcp")
EXAMPLE = "dns://users.internal:8080?nameserver=10.0.0.53:53"
SRV_EXAMPLE = "dns+srv://_http._tcp.users.internal?nameserver=10.0.0.53:53"

SHOWN = 5
"""Warnings of one kind that are spelt out."""


@dataclass(frozen=True)
class Dns:
    """The addresses of a name, IPv4 and IPv6, all with one port.

    Args:
        name: a host name. One that ends in a dot is looked up as it is, without the system's search list.
        port: 1 to 65535.
        nameserver: the address of a nameserver, or several in order of preference, each with or without a port:
            "10.0.0.53:53", "[fd00::53]". By default the system's, after the hosts file.
        tcp: ask by TCP at once, and not only for an answer that was cut.

    Raises:
        ConfigError: if a part is not usable; it names the part.
    """

    name: str
    port: int
    _: KW_ONLY
    nameserver: str | Sequence[str] | None = None
    tcp: bool = False
    _asked: tuple[tuple[str, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        urls.gather(lambda: _settle(self, EXAMPLE), lambda: _check_port(self.port))

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read `dns://name:port?nameserver=ip:port&tcp=true`.

        Raises:
            ConfigError: if a part is missing or not usable; it names the part.
        """
        parts = urls.split(url, "dns", EXAMPLE)
        port = urls.port_of(parts, EXAMPLE)
        if port is None:
            urls.refuse(f"the port is missing, as A and AAAA records have none: write {EXAMPLE!r}")
        return cls(parts.hostname or "", port, **_options(parts.query))

    @property
    def source(self) -> str:
        """The URL of this resolver."""
        return f"dns://{self.name}:{self.port}{_query(self)}"

    @property
    def watch_key(self) -> Dns:
        """Itself: equal ones find the same."""
        return self

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        """Find the endpoints; those of a family that is not answered stay as they were in `previous`.

        Raises:
            ResolveError: if there is no such name or no answer.
        """
        if not self._asked and (listed := hosts.addresses(self.name)):
            return Resolution(self._endpoints(listed), hosts.TTL)
        known = [endpoint.host for endpoint in previous.endpoints] if previous else []
        try:
            found = await look_up(Nameservers(self._asked, tcp=self.tcp), self.name, known)
        except ResolveError as error:
            raise ResolveError(f"{self.source}: {error}") from error
        ttl = bounded([found.ttl], incomplete=bool(found.warnings))
        return Resolution(self._endpoints(found.hosts), ttl, warnings=found.warnings)

    def _endpoints(self, found: Sequence[str]) -> list[Endpoint]:
        # Sorted, as many nameservers turn the order with each answer.
        return [Endpoint(host, self.port) for host in sorted(set(found))]


@dataclass(frozen=True)
class DnsSrv:
    """What the SRV records of a name lead to: addresses and ports, with priorities and weights.

    Args:
        name: the name that has the records: "_http._tcp.users.internal". One that ends in a dot is looked up as it is,
            without the system's search list.
        nameserver: the address of a nameserver, or several in order of preference, each with or without a port:
            "10.0.0.53:53", "[fd00::53]". By default the system's.
        tcp: ask by TCP at once, and not only for an answer that was cut: Consul cuts answers without saying so.

    Raises:
        ConfigError: if a part is not usable; it names the part.
    """

    name: str
    _: KW_ONLY
    nameserver: str | Sequence[str] | None = None
    tcp: bool = False
    _asked: tuple[tuple[str, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _settle(self, SRV_EXAMPLE)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read `dns+srv://_http._tcp.name?nameserver=ip:port&tcp=true`.

        Raises:
            ConfigError: if a part is missing or not usable; it names the part.
        """
        parts = urls.split(url, "dns+srv", SRV_EXAMPLE)
        if urls.port_of(parts, SRV_EXAMPLE) is not None:
            urls.refuse(f"a dns+srv URL has no port, as SRV records bring theirs: write {SRV_EXAMPLE!r}")
        return cls(parts.hostname or "", **_options(parts.query))

    @property
    def source(self) -> str:
        """The URL of this resolver."""
        return f"dns+srv://{self.name}{_query(self)}"

    @property
    def watch_key(self) -> DnsSrv:
        """Itself: equal ones find the same."""
        return self

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        """Find the endpoints; a target that cannot be looked up keeps the addresses it had in `previous`.

        Raises:
            ResolveError: if there is no such name or no answer, or if no target has an address.
        """
        try:
            return await self._resolve(Nameservers(self._asked, tcp=self.tcp), _by_target(previous))
        except ResolveError as error:
            raise ResolveError(f"{self.source}: {error}") from error

    async def _resolve(self, asked: Nameservers, known: Known) -> Resolution:
        answer = await asked.ask(self.name, "SRV")
        records, warnings = _usable(answer)
        targets = sorted({record.target for record in records})
        found = await addresses_of(targets, answer, asked, known)
        warnings += [warning for each in found for warning in each.warnings]
        endpoints = srv.endpoints(records, {t: each.hosts for t, each in zip(targets, found, strict=True)})
        if warnings and not endpoints:
            raise ResolveError(f"no target has an address: {'; '.join(_few(warnings))}")
        ttl = bounded([answer.ttl, *(each.ttl for each in found)], incomplete=bool(warnings))
        return Resolution(endpoints, ttl, warnings=_few(warnings))


def _settle(resolver: Dns | DnsSrv, example: str) -> None:
    """Write a resolver's settings in the one way that lets equal ones be equal."""
    given = resolver.nameserver
    given = [] if given is None else [given] if isinstance(given, str) else list(given)
    asked: list[tuple[str, int]] = []
    urls.gather(
        lambda: object.__setattr__(resolver, "name", _normal(resolver.name, example, absolute=bool(given))),
        *(lambda each=each: asked.append(urls.nameserver(each)) for each in given),
        lambda: _check_tcp(resolver.tcp),
    )
    object.__setattr__(resolver, "_asked", tuple(dict.fromkeys(asked)))
    object.__setattr__(resolver, "nameserver", tuple(joined(*each) for each in resolver._asked) or None)


def _check_tcp(tcp: Any) -> None:
    if not isinstance(tcp, bool):
        urls.refuse(f"tcp must be True or False, got {tcp!r}")


def _check_port(port: Any) -> None:
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        urls.refuse(f"port must be 1 to 65535, for example {EXAMPLE!r}, got {port!r}")


def _normal(name: Any, example: str, *, absolute: bool) -> str:
    """A name in lower case and ASCII; its last dot stays where it means something, before a search list."""
    if not isinstance(name, str) or not name:
        urls.refuse(f"the name is missing: write {example!r}")
    try:
        text = dns.name.from_text(name, None, dns.name.IDNA_2008_Practical).canonicalize().to_text()
    except (dns.exception.DNSException, ValueError):
        text = ""
    bare = text.removesuffix(".")
    if not is_host_name(bare) or bare.rpartition(".")[2].isdigit():
        shown = name.partition("?")[0].rpartition("@")[2]  # no credentials in an error
        urls.refuse(f"the name must be a host name, for example {example!r}, got {shown!r}")
    return bare if absolute else text


def _options(query: str) -> dict[str, Any]:
    found = urls.parameters(query, PARAMETERS)
    return {"nameserver": found.get("nameserver"), "tcp": urls.flag("tcp", found.get("tcp", []))}


def _query(resolver: Dns | DnsSrv) -> str:
    parts = [f"nameserver={joined(*each)}" for each in resolver._asked] + ["tcp=true"] * resolver.tcp
    return "?" + "&".join(parts) if parts else ""


def _by_target(previous: Resolution | None) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    for endpoint in previous.endpoints if previous else ():
        known.setdefault(endpoint.metadata.get("name", ""), []).append(endpoint.host)
    return known


def _usable(answer: Answer) -> tuple[list[srv.Record], list[str]]:
    """The records that name a place, and a warning for each that tries to and does not; "." means there is none."""
    named = [
        srv.Record(each.priority, each.weight, each.port, each.target.canonicalize().to_text(True))
        for each in answer.records
        if each.target != dns.name.root
    ]
    bad = [f"the record for {each.target} has port 0" for each in named if not each.port]
    return [each for each in named if each.port], sorted(bad)


def _few(warnings: Sequence[str]) -> list[str]:
    more = len(warnings) - SHOWN
    return [*warnings[:SHOWN], f"and {more} more"] if more > 0 else list(warnings)
