"""How a `consul://` URL is written.

Decides which parts and parameters there are and what each may hold. It reads them into the settings of a resolver, or
of an agent alone, and never asks Consul. What could be a secret is never repeated in a complaint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from meshlib.validation import ConfigError, Fault, meant

EXAMPLE = "'consul://127.0.0.1:8500/orders?tag=v2'"
AGENT_EXAMPLE = "'consul://127.0.0.1:8500'"

PARAMETERS = ("tag", "dc", "near", "stale", "warning", "wait", "ca_file", "token_file")
OF_AN_AGENT = ("ca_file", "token_file")
NOT_OF_A_QUERY = ("tag", "wait")
"""A prepared query has its own tags, and cannot be waited for."""

TOKEN_HINT = (
    "must hold no token, for URLs are logged and shown: give ?token_file=/path/of/the/token, or set "
    "CONSUL_HTTP_TOKEN_FILE or CONSUL_HTTP_TOKEN in the environment"
)

_SECRETS = {"token", "secret", "password", "acl_token", "x-consul-token", "http_token", "secretid", "secret_id"}
_HAS_SECRET = re.compile(r"[^a-z_](token|secret|password)=", re.IGNORECASE)
"""Wherever it stands: a '?' may be missing, or a ';' or another '?' stand for '&'."""

_WORD = re.compile(r"[a-z_-]{1,20}\Z", re.IGNORECASE)
_DECIMAL = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?\Z")
_SCHEMES = {"consul": "http", "consul+https": "https"}


def read(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the agent and those of the resolver.

    Raises:
        ConfigError: naming every part that is wrong.
    """
    parts = _split(url)
    faults: list[str] = []
    name, is_query = _name(parts.path, faults)
    given = _parameters(parts.query, PARAMETERS, faults)
    agent = _agent(parts, given, faults)
    faults += [f"must not give {each!r} for a prepared query" for each in NOT_OF_A_QUERY if is_query and each in given]
    resolver: dict[str, Any] = {"name": name, "is_query": is_query, "tags": tuple(given.get("tag", ()))}
    for each in ("dc", "near", "stale", "warning", "wait"):
        if each in given:
            resolver[each] = _value(each, _single(given, each, faults))
    if faults:
        raise refused(faults)
    return agent, resolver


def read_agent(url: str) -> dict[str, Any]:
    """The settings of the agent in a URL that names no service, for who does not ask but tells.

    Raises:
        ConfigError: naming every part that is wrong.
    """
    try:
        parts = _split(url)
    except ConfigError as error:
        complaints = [fault.message.removesuffix(f"; for example {EXAMPLE}") for fault in error.faults]
        raise refused(complaints, "at", AGENT_EXAMPLE) from None
    faults = [] if parts.path in ("", "/") else ["must have nothing between the address and a '?'"]
    agent = _agent(parts, _parameters(parts.query, OF_AN_AGENT, faults), faults)
    if faults:
        raise refused(faults, "at", AGENT_EXAMPLE)
    return agent


def refused(complaints: list[str], path: str = "resolver", example: str = EXAMPLE) -> ConfigError:
    """The complaints about a URL, with an example after the last."""
    complaints = [*complaints[:-1], f"{complaints[-1]}; for example {example}"]
    return ConfigError(Fault(path, complaint) for complaint in complaints)


def _agent(parts: SplitResult, given: dict[str, list[str]], faults: list[str]) -> dict[str, Any]:
    agent = {"scheme": _SCHEMES[parts.scheme], "host": parts.hostname or "", "port": _port(parts, faults)}
    if not agent["host"]:
        faults.append("must name the host of a Consul agent")
    if "ca_file" in given and parts.scheme != "consul+https":
        faults.append("must be of the scheme consul+https where ca_file is given")
    return agent | {each: _single(given, each, faults) for each in OF_AN_AGENT if each in given}


def _split(url: str) -> SplitResult:
    # `urlsplit` drops line ends and tabs without a word.
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
        raise refused(["must be a URL of printable ASCII characters without spaces"])
    try:
        parts = urlsplit(url)
    except ValueError:
        raise refused(["must have an address before the path; an IPv6 address stands in brackets"]) from None
    if parts.scheme not in _SCHEMES:
        raise refused(["must begin with consul:// or consul+https://"])
    if "@" in parts.netloc or _HAS_SECRET.search(url):
        raise refused([TOKEN_HINT])
    if "#" in url:
        raise refused(["must have no fragment: a '#' in a value is written %23"])
    return parts


def _port(parts: SplitResult, faults: list[str]) -> int:
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        faults.append("must have a port between 1 and 65535, or none for 8500")
    return port or 8500


def _name(path: str, faults: list[str]) -> tuple[str, bool]:
    segments = path.removeprefix("/").split("/")
    is_query = len(segments) == 2 and segments[0] == "query"
    if len(segments) > 1 and not is_query:
        faults.append("must have one name after the address, or query/ and the name of a prepared query")
    return unquote(segments[-1], errors="surrogateescape"), is_query


def _parameters(query: str, known: Sequence[str], faults: list[str]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        faults.append("must have a query of at most 100 parameters in UTF-8")
        return {}
    for name, value in pairs:
        if name in known:
            given.setdefault(name, []).append(value)
        elif name.lower() in _SECRETS:
            faults.append(TOKEN_HINT)
        else:
            faults.append(_unknown(name, known))
    return given


def _unknown(name: str, known: Sequence[str]) -> str:
    # Anything but a word might be a secret that lost its name.
    shown = f", got {name!r}{meant(name.lower(), known)}" if _WORD.match(name) else ""
    return f"must have no parameters but {', '.join(known)}{shown}"


def _single(given: dict[str, list[str]], name: str, faults: list[str]) -> str:
    if len(given[name]) > 1:
        faults.append(f"must give {name!r} once")
    if not given[name][0]:
        faults.append(f"must give {name!r} a value, or leave it out")
    return given[name][0]


def _value(name: str, text: str) -> Any:
    """What a text stands for; one that stands for nothing stays a text, and the rules of the setting refuse it."""
    if name in ("stale", "warning") and text in ("true", "false"):
        return text == "true"
    if name in ("stale", "wait") and _DECIMAL.match(text):
        return float(text)
    return text
