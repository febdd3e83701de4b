"""The URLs of resolvers: how one is taken apart.

Decides what a part may look like and words the complaint, which names the part and shows a URL that works. It never
shows a part that may hold a secret: no credentials, and no value of a parameter that nobody knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import NoReturn
from urllib.parse import SplitResult, parse_qsl, urlsplit

from meshlib.validation import ConfigError, Fault, meant

PATH = "resolver"
"""Where a fault of a resolver is, in the user's words."""

_UNFIT = re.compile(r"[\x00-\x20\x7f]")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}\Z")
_NAMESERVER = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::([0-9]{1,5}))?\Z")


def refuse(*messages: str) -> NoReturn:
    """Raise a `ConfigError` with these complaints."""
    raise ConfigError(Fault(PATH, message) for message in messages)


def split(url: str, scheme: str, example: str) -> SplitResult:
    """Take `scheme://host:port?query` apart; nothing else may be in it.

    Raises:
        ConfigError: if something is, or if the URL is none; it shows `example`.
    """
    if not isinstance(url, str) or _UNFIT.search(url):
        refuse(f"a URL is text without spaces and control characters, for example {example!r}")
    try:
        parts = urlsplit(url)
    except ValueError:
        refuse(f"cannot be read as a URL; write it like {example!r}")
    if parts.scheme != scheme or not url[len(scheme) :].startswith("://"):
        refuse(f"must begin with '{scheme}://', for example {example!r}")
    if "@" in parts.netloc:
        refuse(f"a {scheme} URL takes no user and password; write it like {example!r}")
    if parts.path not in ("", "/") or parts.fragment:
        refuse(f"a {scheme} URL has no path and no '#'; write it like {example!r}")
    return parts


def port_of(parts: SplitResult, example: str) -> int | None:
    """The port of a URL, None if there is none.

    Raises:
        ConfigError: if what stands there is not a port.
    """
    try:
        return parts.port
    except ValueError:
        refuse(f"port must be 1 to 65535, for example {example!r}")


def parameters(query: str, known: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of a URL's query with their values, in order.

    Raises:
        ConfigError: if one is not among `known`; it suggests the one that was meant.
    """
    known, found, faults = tuple(known), dict[str, list[str]](), []
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            faults.append(f"unknown parameter{_shown(name)}{_hint(name, known)}")
        found.setdefault(name, []).append(value)
    if faults:
        refuse(*faults)
    return found


def flag(name: str, values: list[str]) -> bool:
    """A parameter that is `true` or `false`; false if it is not there.

    Raises:
        ConfigError: if it is anything else, or there twice.
    """
    if not values:
        return False
    if len(values) > 1 or values[0] not in ("true", "false"):
        refuse(f"parameter {name!r} must be true or false, for example '{name}=true'")
    return values[0] == "true"


def nameserver(text: str) -> tuple[str, int]:
    """Read the address of a nameserver, `10.0.0.53`, `10.0.0.53:8600` or `[fd00::53]:8600`; the port is 53 by default.

    Raises:
        ConfigError: if it is anything else.
    """
    match = _NAMESERVER.match(text) if isinstance(text, str) else None
    if match is not None:
        six, four, port = match.groups()
        if (address := _address(six or four)) is not None and 1 <= int(port or 53) <= 65535:
            return address, int(port or 53)
    refuse(
        "parameter 'nameserver' must be an IP address with or without a port, "
        "for example 'nameserver=10.0.0.53:53' or 'nameserver=[fd00::53]:53'"
    )


def gather(*checks: Callable[[], object]) -> None:
    """Run every check, and raise what all of them found.

    Raises:
        ConfigError: with the faults of all checks.
    """
    faults: list[Fault] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)


def _address(text: str) -> str | None:
    try:
        return str(ip_address(text))
    except ValueError:
        return None


def _shown(name: str) -> str:
    return f" {name!r}" if _WORD.match(name) else ""


def _hint(name: str, known: tuple[str, ...]) -> str:
    return meant(name, known) or f" (known: {', '.join(known)})"
