"""The targets of SRV records: where their addresses come from.

Decides which targets are looked up, and what becomes of one that cannot be. It never weighs them: that is `srv`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import dns.rdataclass

from meshlib.discovery.addresses import FAMILIES, Addresses, look_up
from meshlib.discovery.nameservers import Answer, Nameservers
from meshlib.errors import ResolveError

AT_ONCE = 32
"""Targets that are looked up at the same time."""

PATIENCE = 15.0
"""Seconds that all targets have together, however many there are."""

Known = Mapping[str, Sequence[str]]
"""The addresses that targets had before."""


async def addresses_of(targets: Iterable[str], answer: Answer, asked: Nameservers, known: Known) -> list[Addresses]:
    """The addresses of each target: as sent along with the SRV records, or else looked up, each once.

    A target that cannot be looked up keeps its known addresses, with a warning; it may be left with none.
    """
    sent, room = _sent_along(answer), asyncio.Semaphore(AT_ONCE)
    end = asyncio.get_running_loop().time() + PATIENCE

    async def one(target: str) -> Addresses:
        if target in sent:
            return sent[target]
        before = known.get(target, ())
        try:
            async with asyncio.timeout_at(end), room:
                found = await look_up(asked, f"{target}.", before)
        except ResolveError as error:
            return _instead(target, str(error), before)
        except TimeoutError:
            return _instead(target, "there was no time left to look it up", before)
        return found if found.hosts else _instead(target, "it has no address", (), found.ttl)

    return await asyncio.gather(*map(one, targets))


def _sent_along(answer: Answer) -> dict[str, Addresses]:
    found: dict[str, Addresses] = {}
    for rrset in answer.additional:
        if rrset.rdclass == dns.rdataclass.IN and rrset.rdtype.name in FAMILIES:
            name = rrset.name.canonicalize().to_text(True)
            before = found.get(name, Addresses((), rrset.ttl))
            hosts = (*before.hosts, *(record.address for record in rrset))
            found[name] = Addresses(hosts, min(before.ttl or 0, rrset.ttl))
    return found


def _instead(target: str, why: str, before: Sequence[str], ttl: float | None = None) -> Addresses:
    fate = "its addresses of before stay" if before else "left out"
    return Addresses(tuple(before), ttl, (f"target {target}: {why}; {fate}",))
