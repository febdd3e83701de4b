"""A service's instances, as Consul's health checks know them.

Decides which query is asked and when its answer may be believed. A service is asked for by blocking queries, which
return when something changes; prepared queries cannot block and are asked again after their time to live. It never
keeps an answer: all that one query knows of the one before is the index in `previous`. It never tries again, either:
what cannot be believed is an error, and whoever watches keeps the last good answer.

The laws of the index, without which a watch sleeps through changes or spins:

- it is used only if it is 1 or more, and comes from an answer with status 200;
- one that is smaller than the one before is forgotten, and the next query returns at once;
- after an error there is none, for then `previous` is None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from meshlib.consul import Answer, ConsulAgent, ConsulError
from meshlib.consul_url import read, refused
from meshlib.discovery.consul_entries import Found, Unusable, found_in
from meshlib.discovery.resolver import Resolution
from meshlib.validation import ConfigError, check, instance, number, ruled

__all__ = ["Consul", "ConsulIndex"]

STALE = 30.0
"""Seconds that an answer of a server that is not the leader may be behind it, unless the URL says otherwise."""

PATIENCE = 10.0
"""Seconds for an answer that is not waited for: without a leader, a server tries for 7 s before it gives up."""

POLL_EVERY = 5.0
"""Seconds between queries where there is no index to wait with."""

PREPARED_TTL = 10.0
"""Seconds that the answer of a prepared query holds if it does not say so itself."""

LONGEST_TTL = 300.0
"""Seconds that it holds at most, whatever it says."""

WORTH_A_WORD = 1.0
"""Seconds without contact to the leader from which an answer says so. Followers hear from it several times a second."""

_NUMBER = re.compile(r"[0-9]{1,19}\Z")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class ConsulIndex:
    """What an answer says of itself; it stands in `Resolution.index`.

    Attributes:
        index: to wait for something newer with; 0 if there is none, and the next query returns at once.
        known_leader: whether the server that answered knows a leader; None if it does not say.
        last_contact: seconds since that server heard from the leader; None if it does not say.
    """

    index: int
    known_leader: bool | None = None
    last_contact: float | None = None

    def is_within(self, bound: float) -> bool:
        """Whether the answer is no older than `bound` seconds, as far as that can be known."""
        if self.last_contact is None:
            return self.known_leader is not False
        return self.last_contact <= bound

    def warnings(self) -> list[str]:
        """What people should know of it."""
        ago = "last contact unknown" if self.last_contact is None else f"last contact {self.last_contact:.1f} s ago"
        if self.known_leader is False:
            return [f"no known leader, {ago}"]
        return [f"the server is behind its leader, {ago}"] if not self.is_within(WORTH_A_WORD) else []


def _name_rule(value: Any) -> str | None:
    usable = isinstance(value, str) and 0 < len(value) <= 255 and value not in (".", "..")
    if usable and all("!" <= letter <= "~" and letter not in "/?#%\\" for letter in value):
        return None
    return "must be 1 to 255 printable ASCII characters other than / ? # % \\ and spaces"


def _text_rule(value: Any) -> str | None:
    usable = isinstance(value, str) and len(value) <= 255 and value.isprintable()
    return None if usable else "must be a text of at most 255 printable characters"


def _tags_rule(value: Any) -> str | None:
    usable = isinstance(value, tuple) and all(tag and _text_rule(tag) is None for tag in value)
    return None if usable else "must be a tuple of texts, for example ('v2',)"


def _stale_rule(value: Any) -> str | None:
    wrong = None if isinstance(value, bool) else number(above=0, at_most=3600)(value)
    return f"{wrong}, or true or false" if wrong else None


@dataclass(frozen=True)
class Consul:
    """The instances of a service whose checks pass, or what a prepared query finds.

    Args:
        agent: which Consul is asked, and how.
        name: of the service in Consul, or of the prepared query.
        is_query: whether it is a prepared query. Default no.
        tags: instances have all of these. Default none.
        dc: the datacenter to look in. Default the agent's own.
        near: a node, or `"_agent"`: instances are listed in the order of their distance to it.
        stale: True (default) takes answers of servers that are not the leader, if these heard from it in the last 30 s;
            a number sets another bound; False lets the leader answer, so that there is no answer while there is none.
        warning: whether instances with a warning are taken too, with their weight for that. Default no.
        wait: seconds that a query waits for a change; 1 to 600, default 30.

    Raises:
        ConfigError: if a value is not usable.
    """

    agent: ConsulAgent = ruled(instance(ConsulAgent, "ConsulAgent('127.0.0.1')"))
    name: str = ruled(_name_rule)
    _: KW_ONLY
    is_query: bool = ruled(instance(bool, "True"), default=False)
    tags: tuple[str, ...] = ruled(_tags_rule, default=())
    dc: str = ruled(_text_rule, default="")
    near: str = ruled(_text_rule, default="")
    stale: bool | float = ruled(_stale_rule, default=True)
    warning: bool = ruled(lambda value: None if isinstance(value, bool) else "must be true or false", default=False)
    wait: float = ruled(number(at_least=1, at_most=600), default=30.0)

    def __post_init__(self) -> None:
        check(self)
        # Written alike, so that those who mean the same are equal.
        object.__setattr__(self, "tags", tuple(sorted(set(self.tags))))
        object.__setattr__(self, "stale", STALE if self.stale is True else self.stale)

    @classmethod
    def from_url(cls, url: str) -> Consul:
        """Read `consul://host:port/service?tag=&dc=&near=&stale=&warning=&wait=&token_file=`.

        `consul+https://` asks over TLS and may have `ca_file=`; `consul://host:port/query/name` is a prepared query.

        Raises:
            ConfigError: naming the part that is wrong.
        """
        agent, settings = read(url)
        try:
            return cls(ConsulAgent(**agent), **settings)
        except ConfigError as error:
            complaints = [f"{fault.path.rpartition('.')[2]} {fault.message}" for fault in error.faults]
        raise refused(complaints)

    @property
    def source(self) -> str:
        """Where the answers come from, for people: the URL without its parameters."""
        scheme = "consul+https" if self.agent.scheme == "https" else "consul"
        return f"{scheme}://{self.agent}/{'query/' if self.is_query else ''}{self.name}"

    @property
    def watch_key(self) -> Consul:
        """Equal settings, which name the token file, ask for the same with the same token.

        What the environment says of tokens is the same for all.
        """
        return self

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        """Ask, and wait for something newer than `previous`, if that came with an index.

        Raises:
            ConsulError: if there is no answer, or none that could be believed.
        """
        asked_for = 0 if self.is_query or previous is None else _index_of(previous)
        answer = await self._ask(asked_for, stale=self.stale is not False)
        seen = _read(answer.headers)
        if is_old := self.stale is not False and not seen.is_within(self.stale):
            answer = await self._ask(0, stale=False)
        found = self._found_in(answer)
        warnings = [*seen.warnings(), *found.warnings()]
        if not found.endpoints and not answer.had_token:
            warnings.append("no instances, and no token was sent: with ACLs, Consul shows nothing without one")
        # The server that waits for changes is not the one that knows them, so there is nothing to wait with.
        may_wait = not self.is_query and not is_old
        index = seen.index if may_wait and seen.index >= asked_for else 0
        return Resolution(
            list(found.endpoints.values()),
            self._ttl(answer, can_wait=may_wait and seen.index > 0),
            ConsulIndex(index, seen.known_leader, seen.last_contact),
            warnings=warnings,
        )

    async def _ask(self, index: int, *, stale: bool) -> Answer:
        params = [("tag", tag) for tag in self.tags]
        params += [(name, value) for name, value in (("dc", self.dc), ("near", self.near)) if value]
        if stale:
            params.append(("stale", "true"))
        if not self.is_query and not self.warning:
            params.append(("passing", "true"))
        if index:
            params += [("index", str(index)), ("wait", f"{self.wait:g}s")]
        # A server adds up to a sixteenth to the wait, so that not all come back at once.
        timeout = self.wait * 17 / 16 + PATIENCE if index else PATIENCE
        path = ("v1", "query", self.name, "execute") if self.is_query else ("v1", "health", "service", self.name)
        return await self.agent.get(path, params, timeout=timeout)

    def _found_in(self, answer: Answer) -> Found:
        if answer.headers.get("x-consul-results-filtered-by-acls", "").lower() == "true":
            raise ConsulError("Consul left out instances that the token may not see", 200)
        entries = answer.data
        if self.is_query:
            entries = entries.get("Nodes") if isinstance(entries, dict) else None
        try:
            return found_in(entries, with_warnings=self.warning)
        except Unusable as why:
            raise ConsulError(f"Consul's answer cannot be used: {why}", 200) from None

    def _ttl(self, answer: Answer, *, can_wait: bool) -> float | None:
        if self.is_query:
            dns = answer.data.get("DNS")
            return _seconds(dns.get("TTL") if isinstance(dns, dict) else None)
        return None if can_wait else POLL_EVERY


def _index_of(previous: Resolution) -> int:
    return previous.index.index if isinstance(previous.index, ConsulIndex) else 0


def _read(headers: Mapping[str, str]) -> ConsulIndex:
    index, contact = headers.get("x-consul-index", ""), headers.get("x-consul-lastcontact", "")
    leader = {"true": True, "false": False}.get(headers.get("x-consul-knownleader", "").lower())
    return ConsulIndex(
        int(index) if _NUMBER.match(index) else 0, leader, int(contact) / 1000 if _NUMBER.match(contact) else None
    )


def _seconds(duration: Any) -> float:
    """How long a duration in Go's notation is, as far as an answer may live."""
    parts = _DURATION.findall(duration) if isinstance(duration, str) else []
    if not parts or "".join(map("".join, parts)) != duration:
        return PREPARED_TTL
    return min(sum(float(count) * _UNITS[unit] for count, unit in parts), LONGEST_TTL) or PREPARED_TTL
