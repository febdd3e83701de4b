"""Nameservers: one question to the DNS, one answer or an error in plain words.

Decides whom to ask, how long to wait and how to word what went wrong; dnspython sends the queries, reads the answers
and asks again by TCP where one was cut. It never caches, and it never says what an answer means for a service.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import dns.asyncbackend
import dns.asyncresolver
import dns.exception
import dns.message
import dns.name
import dns.rdatatype
import dns.resolver
import dns.rrset
import dns.ttl
from dns.nameserver import Do53Nameserver, Nameserver

from meshlib.endpoint import joined
from meshlib.errors import ResolveError

TIMEOUT = 1.5
"""Seconds that one nameserver has for an answer. More than 1, as the same one is then asked again."""

LIFETIME = 5.0
"""Seconds for a question in all: three tries, or one of each of three nameservers."""

PAUSE = 3.0
"""Seconds that dnspython may take beyond that: it looks at its clock only after it paused, for up to 2."""

PAYLOAD = 1232
"""Bytes of an answer by UDP: what goes through every network in one piece."""

CONFIGURATION = "/etc/resolv.conf"

AT_ONCE = 64
"""Questions under way to the same nameservers: each takes a file descriptor of the application's."""

LONGEST_CHAIN = 8
"""Aliases that lead from one nameserver's answer to a further question."""

BACKEND = dns.asyncbackend.get_backend("asyncio")

for _kind in ("IN.A", "IN.AAAA", "IN.SRV", "ANY.CNAME", "ANY.SOA", "ANY.OPT"):
    # dnspython imports them as they come; a child forked amid that would wait for the rest of it for ever.
    import_module(f"dns.rdtypes.{_kind}")


@dataclass(frozen=True)
class Answer:
    """What a nameserver said.

    Args:
        records: the records asked for; none means that the name has none of this type.
        ttl: seconds it holds, by the records it consists of; None for a "none" that does not say how long.
        additional: what the nameserver sent along without being asked.
    """

    records: tuple[Any, ...]
    ttl: float | None
    additional: Sequence[dns.rrset.RRset] = ()


class Nameservers:
    """The nameservers given, or the system's as they are configured now, with its search list.

    Raises:
        ResolveError: if the system's configuration names none.
    """

    def __init__(self, given: Sequence[tuple[str, int]], *, tcp: bool) -> None:
        self._tcp = tcp
        self._search = not given
        self._room = _room(tuple(given))
        try:
            self._resolver = dns.asyncresolver.Resolver(CONFIGURATION, configure=self._search)
        except (dns.exception.DNSException, ValueError) as error:
            raise ResolveError(f"the system's DNS configuration is of no use ({error})") from error
        if given:
            self._resolver.nameservers = [Do53Nameserver(address, port) for address, port in given]
        self._resolver.timeout, self._resolver.lifetime = TIMEOUT, LIFETIME
        self._resolver.cache = None
        self._resolver.use_edns(0, 0, PAYLOAD)

    async def ask(self, name: str, kind: str) -> Answer:
        """Ask for the records of one type.

        Raises:
            ResolveError: if there is no such name, or no answer to be used; it says what each nameserver did.
        """
        asked, ttls, current = set[dns.name.Name](), list[float](), dns.name.from_text(name, None)
        while True:
            found = await self._query(current, kind)
            chain = found.chaining_result
            if found.rrset is not None or found.canonical_name == found.qname or _says_none(found):
                return Answer(tuple(found.rrset or ()), _ttl(found, ttls), found.response.additional)
            # The alias leads out of what this nameserver knows.
            asked.add(found.qname)
            ttls += [float(alias.ttl) for alias in chain.cnames]
            current = found.canonical_name
            if current in asked or len(asked) > LONGEST_CHAIN:
                raise ResolveError(f"{name} is an alias that leads nowhere (at {current.to_text(True)})")

    async def _query(self, name: dns.name.Name, kind: str) -> dns.resolver.Answer:
        try:
            # dnspython bounds itself by the time of day, which may be set back.
            async with self._room, asyncio.timeout(LIFETIME + PAUSE):
                return await self._resolver.resolve(
                    name,
                    kind,
                    tcp=self._tcp,
                    raise_on_no_answer=False,
                    search=self._search,
                    backend=BACKEND,
                )
        except dns.resolver.NXDOMAIN as error:
            raise ResolveError(self._nxdomain(error)) from error
        except (dns.exception.DNSException, OSError, EOFError) as error:
            raise ResolveError(self._no_answer(error)) from error

    def _nxdomain(self, error: dns.resolver.NXDOMAIN) -> str:
        names = ", ".join(name.to_text(True) for name in error.kwargs["qnames"])
        return f"NXDOMAIN, there is no {names} (says {self._everybody()})"

    def _no_answer(self, error: Exception) -> str:
        errors = error.kwargs.get("errors") or () if isinstance(error, dns.exception.DNSException) else ()
        did = dict.fromkeys(f"{_place(server, port)} {_deed(what)}" for server, _, port, what, _ in errors)
        if did:
            return "no answer: " + "; ".join(did)
        if isinstance(error, dns.exception.Timeout | TimeoutError):
            return f"no answer from {self._everybody()} in {LIFETIME:g} s"
        return f"no answer from {self._everybody()} ({_said(error)})"

    def _everybody(self) -> str:
        return ", ".join(
            _place(str(each), each.answer_port()) if isinstance(each, Nameserver) else str(each)
            for each in self._resolver.nameservers
        )


_rooms: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[object, asyncio.Semaphore]] = WeakKeyDictionary()


def _room(given: tuple[tuple[str, int], ...]) -> asyncio.Semaphore:
    """Where the questions of the running loop to these nameservers find room."""
    for loop in [reference() for reference in _rooms.keyrefs()]:
        if loop is not None and loop.is_closed():
            _rooms.pop(loop, None)  # a semaphore that somebody has waited for holds its loop, which is the key
    return _rooms.setdefault(asyncio.get_running_loop(), {}).setdefault(given, asyncio.Semaphore(AT_ONCE))


def _says_none(found: dns.resolver.Answer) -> bool:
    """Whether an answer without records means that there are none, and not only that this nameserver has none."""
    return any(each.rdtype == dns.rdatatype.SOA for each in found.response.authority)


def _ttl(found: dns.resolver.Answer, before: Sequence[float]) -> float | None:
    if found.rrset is None and not _says_none(found):
        return None
    return float(min(found.chaining_result.minimum_ttl, *before, dns.ttl.MAX_TTL))


def _place(server: str, port: int) -> str:
    return joined(server.rpartition("@")[0].partition(":")[2] or server, port)


def _deed(what: Any) -> str:
    """What a nameserver did, from dnspython's record of it: an exception, or the name of the answer's code."""
    if isinstance(what, str):
        return f"answered {what}"
    if isinstance(what, dns.message.Truncated):
        return "answered with more than fits into UDP"
    if isinstance(what, dns.exception.Timeout):
        return f"did not answer in {TIMEOUT:g} s"
    if isinstance(what, OSError | EOFError):
        return f"could not be reached ({_said(what)})"
    return f"answered what cannot be used ({_said(what)})"


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error).rstrip(".") or type(error).__name__
