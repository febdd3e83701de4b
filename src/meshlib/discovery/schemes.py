"""Which URL is read by which resolver.

Decides what is a resolver URL, and whose: a built-in scheme's, or one that an installed package brings through the
entry-point group `meshlib.resolvers`. It never reads what follows the scheme, and never shows it where it may hold a
secret.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from meshlib import discovery
from meshlib.discovery.resolver import Resolver, wrong_with
from meshlib.endpoint import Endpoint
from meshlib.validation import ConfigError, Fault

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

BUILT_IN = {
    "static": "Static",
    "file": "File",
    "dns": "Dns",
    "dns+srv": "DnsSrv",
    "consul": "Consul",
    "consul+https": "Consul",
    "failover": "Failover",
}
"""Classes of `meshlib.discovery` by scheme; each is imported when a URL asks for it."""

GROUP = "meshlib.resolvers"
"""An entry point here is named for its scheme, and loads what takes the URL and returns the resolver."""

EXAMPLE = "for example 'static:10.0.0.1:8080,10.0.0.2:8080'"

# What digits alone follow is host:port, whatever the host is called.
_URL = re.compile(r"([a-z][a-z0-9+.-]*):(?![0-9]+\Z)(.*)\Z", re.IGNORECASE | re.DOTALL)
_MAY_HOLD_SECRETS = re.compile(r"[@?#=]")


def is_url(text: str) -> bool:
    """Whether this is a resolver URL, rather than an address: a known scheme, and not followed by a port alone."""
    scheme, _ = _split(text)
    return scheme in BUILT_IN or (scheme != "" and bool(_registered(scheme)))


def resolver_of(url: str) -> Resolver:
    """Read a resolver URL of any scheme.

    Raises:
        ConfigError: if the scheme is not known, or what follows it is not usable; it names the part.
    """
    scheme, rest = _split(url)
    if scheme in BUILT_IN:
        resolver: Resolver = getattr(discovery, BUILT_IN[scheme]).from_url(f"{scheme}:{rest}")
        return resolver
    found = _registered(scheme) if scheme else []
    if not found:
        raise ConfigError([Fault("resolver", _unknown(url.strip(), scheme))])
    if len(found) > 1:
        names = " and ".join(sorted(entry.value for entry in found))
        raise ConfigError([Fault("resolver", f"must be of one package's scheme: {scheme!r} is {names}")])
    return _made(found[0], f"{scheme}:{rest}")


def _split(text: str) -> tuple[str, str]:
    """Scheme, in lower case, and rest; the scheme is "" if there is none."""
    match = _URL.match(text.strip())
    return (match[1].lower(), match[2]) if match else ("", text)


def _registered(scheme: str) -> list[EntryPoint]:
    """The entry points of a scheme, one for each that differs."""
    from importlib.metadata import entry_points  # takes milliseconds, and most URLs are of a built-in scheme

    return list({entry.value: entry for entry in entry_points(group=GROUP) if entry.name.lower() == scheme}.values())


def _made(entry: EntryPoint, url: str) -> Resolver:
    name = f"entry point {entry.name!r} of {GROUP} ({entry.value})"
    try:
        make = entry.load()
    except Exception as error:  # what a package raises while it is imported is up to it
        fault = Fault("resolver", f"must be of a scheme that can be loaded: {name} raised {type(error).__name__}")
        raise ConfigError([fault]) from error
    try:
        resolver: Any = make(url)
    except ConfigError:
        raise
    except Exception as error:  # likewise
        fault = Fault("resolver", f"must be a URL that {name} takes: it raised {type(error).__name__}")
        raise ConfigError([fault]) from error
    if wrong := wrong_with(resolver):
        raise ConfigError([Fault("resolver", f"{wrong} from {name}")])
    return resolver  # type: ignore[no-any-return]


def _unknown(url: str, scheme: str) -> str:
    from importlib.metadata import entry_points

    known = [*BUILT_IN, *sorted({entry.name for entry in entry_points(group=GROUP)} - BUILT_IN.keys())]
    shown = f"{scheme}:..." if scheme else "a text that is none"
    if not _MAY_HOLD_SECRETS.search(url):
        shown = repr(url)
    schemes = ", ".join(f"{each}:" for each in known)
    return f"must be a URL of a known scheme ({schemes}), {EXAMPLE}, got {shown}{_meant(url, scheme, known)}"


def _meant(url: str, scheme: str, known: list[str]) -> str:
    from difflib import get_close_matches

    if near := get_close_matches(scheme, known, n=1):
        return f"; did you mean '{near[0]}:'?"
    address = url.partition("//")[2].removesuffix("/") if scheme in ("http", "https") else url
    tls = " with tls=TLS()" if scheme == "https" else ""
    try:
        return f"; did you mean 'static:{Endpoint.parse(address)}'{tls}?"
    except ConfigError:
        return ""
