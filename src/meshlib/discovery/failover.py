"""Several resolvers, in the order in which their endpoints are preferred.

Decides how the answers of several resolvers become one set: an endpoint's priority is the position of its resolver,
then its own. It keeps no answer. Who watches it watches its `parts`, each with a last good answer of its own, and puts
them together with `merged`; its own `resolve` is for those who ask by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshlib.discovery.resolver import Resolution, Resolver, source_of, wrong_with
from meshlib.discovery.schemes import resolver_of
from meshlib.endpoint import Endpoint, Place
from meshlib.errors import ResolveError
from meshlib.validation import ConfigError, Fault

EXAMPLE = "for example 'failover:consul://127.0.0.1:8500/orders|static:10.0.0.1:8080'"

TTL = 5.0
"""Seconds after which a part that waits for news is asked again by hand: here nobody waits for one of several."""


class Failover:
    """The endpoints of several resolvers, those of the first preferred.

    Args:
        resolvers: resolvers and resolver URLs, at least one. A `Failover` among them stands for its parts.

    Raises:
        ConfigError: with every fault, by its position.
    """

    parts: tuple[Resolver, ...]
    """The resolvers, none of them a `Failover`."""

    def __init__(self, *resolvers: Resolver | str) -> None:
        parts: list[Resolver] = []
        faults: list[Fault] = []
        for position, resolver in enumerate(resolvers):
            try:
                part = _read(resolver)
            except ConfigError as error:
                faults += [_at(position, fault) for fault in error.faults]
            else:
                parts += part.parts if isinstance(part, Failover) else [part]
        if not resolvers:
            faults.append(Fault("resolver", f"must name at least one resolver, {EXAMPLE}, got none"))
        if faults:
            raise ConfigError(faults)
        self.parts = tuple(parts)

    @classmethod
    def from_url(cls, url: str) -> Failover:
        """Read `failover:URL|URL`; a bar inside one of them is written `%7C`.

        Raises:
            ConfigError: naming the part that is wrong, by its position.
        """
        body = url.removeprefix("failover:")
        parts = body.split("|") if body.strip() else []
        try:
            return cls(*(part.replace("%7C", "|").replace("%7c", "|") for part in parts))
        except RecursionError:
            raise ConfigError([Fault("resolver", "must not be nested that deeply")]) from None

    @property
    def source(self) -> str:
        """Where the answers come from, for people."""
        return f"failover:{'|'.join(map(source_of, self.parts))}"

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        """Ask all parts at once; those that fail are named in the warnings, as long as one answers.

        Raises:
            ResolveError: if none does.
        """
        import asyncio

        before = previous.index if previous is not None and isinstance(previous.index, tuple) else ()
        before = before if len(before) == len(self.parts) else (None,) * len(self.parts)
        asked = (_ask(part, service, last) for part, last in zip(self.parts, before, strict=True))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        good = [answer if isinstance(answer, Resolution) else None for answer in answers]
        warnings = [
            warning for part, answer in zip(self.parts, answers, strict=True) for warning in _said(part, answer)
        ]
        if not any(good):
            raise ResolveError(f"none of {len(good)} resolvers answered: {'; '.join(warnings)}")
        endpoints = merged([answer.endpoints if answer else () for answer in good])
        ttl = min(TTL if answer is None or answer.ttl is None else answer.ttl for answer in good)
        return Resolution(endpoints, ttl, tuple(good), warnings=warnings)

    def __repr__(self) -> str:
        return f"Failover({', '.join(map(repr, self.parts))})"


def merged(answers: Sequence[Sequence[Endpoint]]) -> tuple[Endpoint, ...]:
    """One set out of the answers of several resolvers, in their order.

    An endpoint that several know counts where it is first. Priorities are counted anew, without gaps.
    """
    first: dict[Place, tuple[int, Endpoint]] = {}
    for position, endpoints in enumerate(answers):
        for endpoint in endpoints:
            first.setdefault(endpoint.place, (position, endpoint))
    levels = sorted({(position, endpoint.priority) for position, endpoint in first.values()})
    rank = {level: number for number, level in enumerate(levels)}
    return tuple(
        endpoint
        if rank[position, endpoint.priority] == endpoint.priority
        else replace(endpoint, priority=rank[position, endpoint.priority])
        for position, endpoint in first.values()
    )


async def _ask(part: Resolver, service: str, before: Resolution | None) -> Resolution:
    # One that waits for something newer would hold up all the others.
    answer = await part.resolve(service, None if before is None or before.ttl is None else before)
    if not isinstance(answer, Resolution):
        raise ResolveError(f"answered with a {type(answer).__name__}, not with a Resolution")
    return answer


def _said(part: Resolver, answer: Resolution | BaseException) -> list[str]:
    if isinstance(answer, Resolution):
        return [f"{source_of(part)}: {warning}" for warning in answer.warnings]
    return [f"{source_of(part)}: {str(answer) or type(answer).__name__}"]


def _read(resolver: Resolver | str) -> Resolver:
    if isinstance(resolver, str):
        return resolver_of(resolver)
    if wrong := wrong_with(resolver):
        raise ConfigError([Fault("resolver", wrong)])
    return resolver


def _at(position: int, fault: Fault) -> Fault:
    """The fault of a part, seen from the whole."""
    inner = fault.path.removeprefix("resolver")
    gap = "" if fault.path != inner else "."
    return Fault(f"resolver[{position}]{gap}{inner}", fault.message)
