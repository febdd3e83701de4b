"""The addresses of a name: both families, from the DNS.

Decides what holds when one family is answered and the other is not, and for how long. It never knows ports or weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshlib.discovery.nameservers import Answer, Nameservers
from meshlib.errors import ResolveError

SHORTEST, LONGEST = 1.0, 300.0
"""Bounds of a TTL in seconds: no name is worth more than a query per second, and five minutes may be too late."""

DEFAULT_TTL = 5.0
"""Seconds that hold when no record says how long."""

INCOMPLETE = 10.0
"""The longest TTL of an answer of which a part is missing, so that it is soon asked for again."""

FAMILIES = ("A", "AAAA")


@dataclass(frozen=True)
class Addresses:
    """What was found.

    Args:
        hosts: the addresses, each once.
        ttl: seconds they hold, before any bounds; None if nothing says so.
        warnings: what is missing, or kept from before.
    """

    hosts: tuple[str, ...]
    ttl: float | None
    warnings: tuple[str, ...] = ()


def bounded(ttls: Iterable[float | None], *, incomplete: bool = False) -> float:
    """The TTL of an answer made from parts with these."""
    shortest = min((each for each in ttls if each is not None), default=DEFAULT_TTL)
    return max(SHORTEST, min(shortest, INCOMPLETE if incomplete else LONGEST))


async def look_up(nameservers: Nameservers, name: str, known: Sequence[str]) -> Addresses:
    """Ask for both families at once.

    A family that is not answered keeps its `known` addresses while the other is answered.

    Raises:
        ResolveError: if neither is, or if there is no address because one is not.
    """
    answers = await asyncio.gather(*(_ask(nameservers, name, family) for family in FAMILIES))
    failed = {
        family: str(answer)
        for family, answer in zip(FAMILIES, answers, strict=True)
        if isinstance(answer, ResolveError)
    }
    kept = [host for host in known if _family(host) in failed]
    hosts = [record.address for answer in answers if isinstance(answer, Answer) for record in answer.records]
    if len(failed) == len(FAMILIES) or (failed and not hosts + kept):
        raise ResolveError(_all_of(failed))
    return Addresses(
        tuple(dict.fromkeys(hosts + kept)),
        min((answer.ttl for answer in answers if isinstance(answer, Answer) and answer.ttl is not None), default=None),
        tuple(f"{family} of {name}: {why}{_instead(family, kept)}" for family, why in failed.items()),
    )


async def _ask(nameservers: Nameservers, name: str, family: str) -> Answer | ResolveError:
    try:
        return await nameservers.ask(name, family)
    except ResolveError as error:
        return error


def _family(host: str) -> str:
    return "AAAA" if ":" in host else "A"


def _instead(family: str, kept: Sequence[str]) -> str:
    return "; the addresses of before stay" if any(_family(host) == family for host in kept) else ""


def _all_of(failed: dict[str, str]) -> str:
    if len(set(failed.values())) == 1:
        return next(iter(failed.values()))
    return "; ".join(f"{family}: {why}" for family, why in failed.items())
