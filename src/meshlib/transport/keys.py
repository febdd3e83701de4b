"""The key of a request: what a consistent hash goes by.

Decides where in a request it is, once per service. A key may be a person's name or a session, so nothing here says it:
neither an error nor a log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

import httpx

from meshlib.core.balance.hashing import ConsistentHash

KeyOf = Callable[[httpx.Request], "str | None"]


def key_of(balancer: Any) -> KeyOf | None:
    """How a service's requests are read; None if its balancer goes by no key."""
    if not isinstance(balancer, ConsistentHash):
        return None
    if balancer.key is None:
        return lambda request: None
    if not isinstance(balancer.key, str):
        return _checked(balancer.key)
    kind, _, name = balancer.key.partition(":")
    return _READERS[kind](name)


def _checked(given: Callable[[httpx.Request], Any]) -> KeyOf:
    def read(request: httpx.Request) -> str | None:
        key = given(request)
        if key is None or isinstance(key, str):
            return key
        raise TypeError(f"the function of ConsistentHash(key=...) must return a str or None, got {type(key).__name__}")

    return read


def _header(name: str) -> KeyOf:
    wanted = name.lower().encode("ascii")
    return lambda request: _value(request, wanted)


def _value(request: httpx.Request, wanted: bytes) -> str:
    """A header, or "". httpx would decode it in whatever way all headers of the request can be, so not always alike."""
    value = b", ".join(value for name, value in request.headers.raw if name.lower() == wanted)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _cookie(name: str) -> KeyOf:
    def read(request: httpx.Request) -> str | None:
        for pair in _value(request, b"cookie").split(";"):
            found, _, value = pair.strip().partition("=")
            if found == name:
                return value.strip('"')
        return None

    return read


def _query(name: str) -> KeyOf:
    def read(request: httpx.Request) -> str | None:
        params: Mapping[str, str] = request.url.params
        return params.get(name)

    return read


def _path(position: str) -> KeyOf:
    number = int(position) + 1  # a path begins with a slash

    def read(request: httpx.Request) -> str | None:
        # Taken apart before it is decoded: a slash that is written as %2F belongs to its segment.
        segments = request.url.raw_path.partition(b"?")[0].split(b"/")
        return unquote(segments[number].decode("ascii")) if number < len(segments) else None

    return read


_READERS: dict[str, Callable[[str], KeyOf]] = {"header": _header, "cookie": _cookie, "query": _query, "path": _path}
