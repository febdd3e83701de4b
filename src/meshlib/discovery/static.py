"""A fixed set of endpoints, written down in the settings.

Decides how a list or a `static:` URL is read. It never resolves a name, and answers with those that it was given.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from meshlib.endpoint import Endpoint, Place
from meshlib.validation import ConfigError, Fault

if TYPE_CHECKING:
    from meshlib.discovery.resolver import Resolution

EXAMPLE = "for example ['10.0.0.1:8080', '10.0.0.2:8080']"

TTL = 300.0
"""Seconds; there is nothing to find out by asking again."""


class Static:
    """Always the same endpoints.

    Args:
        endpoints: `Endpoint`s and `"host:port"` strings, with addresses or names; at least one, none twice.
        source: where they were written down, for people. Default `"static"`.

    Raises:
        ConfigError: with every fault, by its position in the list.
    """

    def __init__(self, endpoints: Iterable[Endpoint | str], source: str = "static") -> None:
        self.source = source
        self.endpoints = _read(endpoints)

    @classmethod
    def from_url(cls, url: str) -> Static:
        """Read `static:host:port,host:port?weight=3`; several weights are given in the order of the endpoints.

        Raises:
            ConfigError: naming the part that is wrong.
        """
        body, _, query = url.removeprefix("static:").partition("?")
        addresses = [part for part in body.split(",") if part.strip()]
        weights = _weights(query, len(addresses))
        return cls(_read(addresses, weights), source="static:")

    @property
    def is_resolved(self) -> bool:
        """Whether all can be dialled as they are: addresses and `localhost`, no names."""
        return all(endpoint.is_address for endpoint in self.endpoints)

    @property
    def watch_key(self) -> Hashable:
        """Equal for two with the same endpoints."""
        return ("static", self.endpoints)

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        """Answer with the endpoints."""
        from meshlib.discovery.resolver import Resolution

        return Resolution(self.endpoints, TTL)

    def __repr__(self) -> str:
        return f"Static([{', '.join(repr(str(endpoint)) for endpoint in self.endpoints)}])"


def fixed(resolver: object) -> Static | None:
    """The resolver, if it holds its endpoints as they are dialled, so that nobody has to be asked.

    A subclass is asked: it may answer with others, which are not what the settings say (rule D5).
    """
    return resolver if type(resolver) is Static and resolver.is_resolved else None


def _read(entries: Iterable[Endpoint | str], weights: list[float] | None = None) -> tuple[Endpoint, ...]:
    endpoints: dict[Place, Endpoint] = {}
    faults: list[Fault] = []
    for position, entry in enumerate(entries):
        path = f"resolver[{position}]"
        try:
            weight = weights[position] if weights else 1
            endpoint = entry if isinstance(entry, Endpoint) else Endpoint.parse(entry, weight=weight)
        except ConfigError as error:
            faults += [Fault(path, str(fault)) for fault in error.faults]
            continue
        if endpoint.place in endpoints:
            faults.append(Fault(path, f"must be listed once: {endpoint} is there already"))
        endpoints[endpoint.place] = endpoint
    if not endpoints and not faults:
        faults.append(Fault("resolver", f"must name at least one endpoint, {EXAMPLE}, got none"))
    if faults:
        raise ConfigError(faults)
    return tuple(endpoints.values())


def _weights(query: str, count: int) -> list[float]:
    given = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(given.keys() - {"weight"})
    faults = [Fault("resolver", f"must have no parameter but 'weight', got {name!r}") for name in unknown]
    weights = [1.0] * count
    if "weight" in given:
        try:
            numbers = [float(part) for part in given["weight"].split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, count):
            wanted = "one weight, or one for each endpoint, for example 'static:10.0.0.1:8080,10.0.0.2:8080?weight=3,1'"
            faults.append(Fault("resolver", f"must give {wanted}, got {given['weight']!r}"))
        else:
            weights = numbers * (count if len(numbers) == 1 else 1)
    if faults:
        raise ConfigError(faults)
    return weights
