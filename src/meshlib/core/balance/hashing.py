"""Consistent hash: the same key goes to the same endpoint, and a change of the endpoints moves as few keys as can be.

Decides whose a key is, by nothing but the key and the places and weights of the endpoints, so that every process comes
to the same answer; docs/balancing.md says how another language does. It never changes the scheme by itself, which would
move nearly every key, and never looks for a key: what a request's key is, is found in `meshlib.transport.keys`.

Rendezvous: every endpoint draws a number for the key, and the best draw wins. Shares are exact, and a key moves only
when its own endpoint goes or a better one comes; the price is a hash per endpoint and call.

Ring: every endpoint has 160 points per weight on a circle of 2**32, and a key is the endpoint's whose point comes next.
A call costs the same however many endpoints there are, and shares are within some 8 %.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from inspect import iscoroutinefunction
from itertools import repeat
from math import ceil, log
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from meshlib.core.balance.peak_ewma import PeakEwma
from meshlib.core.balance.ring import ring_of
from meshlib.validation import check, number, optional, ruled

if TYPE_CHECKING:
    from meshlib.core.balance import Candidates
    from meshlib.core.chance import Rng
    from meshlib.core.node import Node

    Order = Callable[[bytes], Iterator[Node]]
    """All nodes in a key's order."""

FALLBACK = PeakEwma()
"""Where calls without a key go."""

SCHEMES = ("rendezvous", "ring")
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
KINDS = {
    "header": (_TOKEN, "x-user-id"),
    "cookie": (_TOKEN, "sid"),
    "query": (".+", "tenant"),
    "path": ("[0-9]{1,3}", "0"),
}
"""Where a key may be in a request: what it is called there, and an example."""

MANY = 256
"""Endpoints from which on the hash per endpoint and call is worth a warning."""

RAMP_SEED = 1
"""Seed of the hash that says which share of the keys a key belongs to, while its endpoint is on a ramp."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistentHash:
    """Sends calls with the same key to the same endpoint.

    While that one is ejected, all calls of a key go to the same second choice.

    Args:
        key: where in a request its key is: `"header:x-user-id"`, `"cookie:sid"`, `"query:tenant"`, `"path:0"` (the
            path's first segment), or a function of the `httpx.Request` that returns a string, or None for no key; what
            it raises leaves the call. `options(hash_key=...)` wins over it, and is the only way where it is None, the
            default. Calls without a key, or with an empty one, are balanced as by default, and counted in the
            snapshot's warnings.
        scheme: `"rendezvous"` (default), or `"ring"` for hundreds of endpoints. Changing it moves nearly every key.
        bounded_load: how many times its fair share of the calls in flight an endpoint may have before a key's next
            choice gets the call; for example 1.25. Default None: any number.

    Raises:
        ConfigError: if a value is not usable; it names each.
    """

    key: str | Callable[[Any], str | None] | None = ruled(lambda value: _key(value), default=None)
    scheme: str = ruled(lambda value: _scheme(value), default="rendezvous")
    bounded_load: float | None = ruled(optional(number(at_least=1)), default=None)

    def __post_init__(self) -> None:
        check(self)

    def prepare(self, nodes: Sequence[Node], rng: Rng) -> Candidates:
        """See `Balancer`."""
        order = (_ring if self.scheme == "ring" else _rendezvous)(nodes)
        if any(node.effective_weight < node.endpoint.weight for node in nodes):
            order = _ramped(order, nodes)
        if self.bounded_load is not None:
            order = _bounded(order, nodes, self.bounded_load)
        without_key = FALLBACK.prepare(nodes, rng)

        def candidates(now: float, key: str | None) -> Iterator[Node]:
            return order(key.encode("utf-8", "surrogatepass")) if key else without_key(now, None)

        return candidates

    def doubts(self, count: int) -> list[str]:
        """What people should know of the setting with so many endpoints."""
        if self.scheme == "ring" or count <= MANY:
            return []
        return [f"each call hashes its key {count} times; above {MANY} endpoints take ConsistentHash(scheme='ring')"]


def _rendezvous(nodes: Sequence[Node]) -> Order:
    """Best draw first: -ln(u) / weight, where u is the key's hash under the seed of the place, as a share of 2**32.

    Of equal draws that of the lesser place is the better one.
    """
    from mmh3 import hash as murmur3

    by_place = {str(node.endpoint): node for node in nodes}
    by_weight: dict[float, list[str]] = {}
    for place in sorted(by_place):
        by_weight.setdefault(by_place[place].endpoint.weight, []).append(place)
    groups = [(weight, places, [murmur3(place, 0, False) for place in places]) for weight, places in by_weight.items()]

    def order(key: bytes) -> Iterator[Node]:
        drawn, best = [], []
        for weight, places, seeds in groups:
            hashes = list(map(murmur3, repeat(key), seeds, repeat(False)))
            largest = max(hashes)  # of equal weights it has the best draw, so that the others need no logarithm
            best.append((_draw(largest, weight), places[hashes.index(largest)]))
            drawn.append((weight, places, hashes))
        first = min(best)[1]
        yield by_place[first]
        scored = [
            (_draw(hashed, weight), place) for weight, *rest in drawn for place, hashed in zip(*rest, strict=True)
        ]
        scored.sort()
        yield from (by_place[place] for _, place in scored if place != first)

    return order


def _draw(hashed: int, weight: float) -> float:
    return -log((hashed + 0.5) / 2**32) / weight


def _ring(nodes: Sequence[Node]) -> Order:
    """As the points follow on the key's own."""
    from mmh3 import hash as murmur3

    by_place = {str(node.endpoint): node for node in nodes}
    ring = ring_of({place: node.endpoint.weight for place, node in by_place.items()}, murmur3)
    by_number: list[Any] = [by_place.get(place) for place in ring.places]  # None: no place has the number

    def order(key: bytes) -> Iterator[Node]:
        return map(by_number.__getitem__, ring.walk(murmur3(key)))

    return order


def _ramped(order: Order, nodes: Sequence[Node]) -> Order:
    """Endpoints on a ramp give up the share of their keys that it says, the same ones for as long as it lasts.

    Hashing with the lower weight instead would mean a new ring for each step. Either way a key comes home once, from
    the second choice it went to meanwhile.
    """
    from mmh3 import hash as murmur3

    shares = {
        node: node.effective_weight / node.endpoint.weight
        for node in nodes
        if node.effective_weight < node.endpoint.weight
    }

    def ramped(key: bytes) -> Iterator[Node]:
        part = murmur3(key, RAMP_SEED, False) / 2**32
        return _last(order(key), lambda node: part >= shares.get(node, 1.0))

    return ramped


def _bounded(order: Order, nodes: Sequence[Node], factor: float) -> Order:
    """Endpoints at their bound come last.

    It is ceil(factor * (calls in flight + 1) * weight / weight of all), so all together have room for one more call.
    """
    whole = sum(node.endpoint.weight for node in nodes)

    def bounded(key: bytes) -> Iterator[Node]:
        calls = 0

        def is_full(node: Node) -> bool:
            nonlocal calls
            if not node.in_flight:
                return False
            calls = calls or 1 + sum(map(_IN_FLIGHT, nodes))  # asked for only here: it costs as much as there are nodes
            return node.in_flight >= ceil(factor * calls * node.endpoint.weight / whole)

        return _last(order(key), is_full)

    return bounded


_IN_FLIGHT = attrgetter("in_flight")


def _last(order: Iterable[Node], is_spared: Callable[[Node], bool]) -> Iterator[Node]:
    """The same order, but those that are to be spared come after all others."""
    spared = []
    for node in order:
        if is_spared(node):
            spared.append(node)
        else:
            yield node
    yield from spared


def _key(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return None if _is_function(value) else f"must be {_KEYS}"
    kind, _, name = value.partition(":")
    if kind not in KINDS:
        return f"must be {_KEYS}{_meant(kind, KINDS, f':{name}')}"
    pattern, example = KINDS[kind]
    return None if re.fullmatch(pattern, name) else f"must be {_KEYS}, for example '{kind}:{example}'"


_KEYS = "'header:<name>', 'cookie:<name>', 'query:<name>', 'path:<number>' or a function of the request"


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type) and not iscoroutinefunction(value)


def _scheme(value: Any) -> str | None:
    if isinstance(value, str) and value in SCHEMES:
        return None
    return f"must be 'rendezvous' or 'ring'{_meant(value, SCHEMES) if isinstance(value, str) else ''}"


def _meant(value: str, known: Collection[str], rest: str = "") -> str:
    import difflib  # only a mistake pays for it

    near = difflib.get_close_matches(value.lower(), known, n=1)
    return f" (did you mean {near[0] + rest!r}?)" if near else ""
