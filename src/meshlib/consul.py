"""A client for Consul's HTTP API, as small as discovery and registration need it.

Decides how one request is made: with the token of this moment, on a connection of its own, bounded in time and size;
and which answers are errors. It never keeps anything between two requests, never tries again, and tells nothing of a
token, a header, a query or a body in an error or a log. There is no connection to reuse: queries wait for up to
minutes, and come once a second at most.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpcore
import httpx

from meshlib.endpoint import Endpoint, joined
from meshlib.policy import TLS
from meshlib.transport.http1 import AsyncBody
from meshlib.transport.network import Bounded, Dial
from meshlib.transport.network_asyncio import AsyncioStream, connect
from meshlib.transport.once import ask
from meshlib.transport.tls import context_for
from meshlib.validation import ConfigError, Fault, check, instance, ruled, shown, whole

__all__ = ["Answer", "ConsulAgent", "ConsulError"]

CONNECT_WITHIN = 2.0
"""Seconds for a connection, TLS included."""

LARGEST_ANSWER = 64 * 1024 * 1024
LARGEST_TOKEN = 4096
ENOUGH_FOR_A_REASON = 16 * 1024
"""Bytes in which the server's own words are looked for."""

KNOWN_REASONS = (
    "ACL not found",
    "ACL support disabled",
    "Permission denied",
    "No cluster leader",
    "No path to datacenter",
    "Query not found",
    "does not have associated TTL",
    "Unknown check",
    "Unknown service",
    "rate limit",
    "rpc error",
)
"""What Consul says when it refuses, the most telling first. Nothing else of a body is told: it may be a token that does
not exist, or the page of whoever sits in front (rule T3)."""


_BAD_HOST = "must be an address without a zone, or a host name, for example '127.0.0.1'"


class ConsulError(Exception):
    """Consul was not reached, or gave no answer that could be used.

    Args:
        reason: what happened, in one short line; never a token, a header or a query of ours.
        status: of the HTTP answer, if there was one.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        self.reason, self.status = reason, status
        super().__init__(reason)

    def __reduce__(self) -> tuple[type[ConsulError], tuple[str, int | None]]:
        return type(self), (self.reason, self.status)


@dataclass(frozen=True)
class Answer:
    """What Consul answered with status 200: the JSON, the headers, and whether the request had a token."""

    data: Any
    headers: Mapping[str, str]
    had_token: bool


@dataclass(frozen=True)
class ConsulAgent:
    """Where a Consul agent or server listens, and how it is asked.

    Args:
        host: an address or a host name.
        port: default 8500.
        scheme: "http" (default) or "https".
        ca_file: whom to trust over https: the path of a bundle of certificates. Default what `CONSUL_CACERT` names,
            else the system's.
        token_file: the path of a file that holds the ACL token. Default what `CONSUL_HTTP_TOKEN_FILE` names, else the
            token is that of `CONSUL_HTTP_TOKEN`, else there is none. It is read anew for every request.

    Raises:
        ConfigError: if a value is not usable.
    """

    host: str
    port: int = ruled(whole(at_least=1, at_most=65535), default=8500)
    _: KW_ONLY
    scheme: str = ruled(
        lambda value: None if value in ("http", "https") else "must be 'http' or 'https'", default="http"
    )
    ca_file: str = ruled(instance(str, "'/etc/consul/ca.pem'"), default="")
    token_file: str = ruled(instance(str, "'/run/secrets/consul'"), default="", repr=False)

    def __post_init__(self) -> None:
        try:
            host = Endpoint(self.host, 1).host
        except ConfigError:
            host = ""
        check(self, [] if host and "%" not in host else [Fault("consulagent.host", _BAD_HOST)])
        object.__setattr__(self, "host", host)

    def __str__(self) -> str:
        return joined(self.host, self.port)

    async def get(self, path: Sequence[str], params: Sequence[tuple[str, str]], *, timeout: float) -> Answer:
        """Ask for what is at a path.

        Args:
            path: its segments, each as it is, with nothing escaped.
            params: pairs of the query.
            timeout: seconds for everything, from the connection to the last byte.

        Raises:
            ConsulError: if no answer came, or one with a status other than 200, or one that is not JSON.
        """
        headers, body, token = await self._ask("GET", path, params, None, timeout)
        return Answer(_json(body), headers, had_token=bool(token))

    async def put(self, path: Sequence[str], data: Any = None, *, timeout: float) -> None:
        """Tell what is at a path.

        Args:
            path: its segments, as for `get`.
            data: what is told, as JSON; None for nothing.
            timeout: seconds for everything.

        Raises:
            ConsulError: if no answer came, or one with a status other than 200.
        """
        await self._ask("PUT", path, (), None if data is None else json.dumps(data).encode(), timeout)

    async def _ask(
        self, method: str, path: Sequence[str], params: Sequence[tuple[str, str]], content: bytes | None, timeout: float
    ) -> tuple[Mapping[str, str], bytes, str]:
        """The headers and the body of the answer, and the token that was sent."""
        token = self._token()
        way = "/".join(quote(segment, safe="") for segment in path)
        headers = {"accept-encoding": "identity", "connection": "close", "user-agent": "meshlib"}
        if token:
            headers["x-consul-token"] = token
        query = urlencode(params, quote_via=quote)
        request = httpx.Request(method, f"{self.scheme}://{self}/{way}?{query}", headers=headers, content=content)
        try:
            async with asyncio.timeout(timeout):
                return *await self._exchange(request), token
        except TimeoutError:
            raise ConsulError(f"no answer from {self} within {timeout:g} s") from None
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError, OSError) as error:
            raise ConsulError(f"no answer from {self} ({type(error).__name__}: {error})") from error

    async def _exchange(self, request: httpx.Request) -> tuple[Mapping[str, str], bytes]:
        stream = await self._connect()
        try:
            method, target = request.method.encode(), request.url.raw_path
            head, body = await ask(stream, method, target, request.headers.raw, request.content)
            if head.status_code != HTTPStatus.OK:
                reason = _reason(await _start_of(body), head.status_code)
                raise ConsulError(f"Consul answered {head.status_code}: {reason}", head.status_code)
            headers = httpx.Headers(head.headers.raw_items())
            if "content-encoding" in headers:
                raise ConsulError("Consul's answer is encoded, though none was asked for", HTTPStatus.OK)
            return headers, await _whole(body)
        finally:
            stream.abort()

    async def _connect(self) -> AsyncioStream:
        """A connection to the first of its addresses that takes one."""
        loop, tls = asyncio.get_running_loop(), self._tls()
        bounds = Bounded(loop.time, loop.time() + CONNECT_WITHIN)
        last: Exception = httpcore.ConnectTimeout(f"no address of {self.host} was found in time")
        for left, address in await self._addresses(loop, bounds.deadline):
            share = (bounds.deadline - loop.time()) / left  # so that one which does not answer leaves time for the next
            try:
                return await connect(Dial(address, self.port, tls, self.host), share, bounds)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        raise last

    async def _addresses(self, loop: asyncio.AbstractEventLoop, until: float) -> list[tuple[int, str]]:
        """What its name stands for, in order, each with how many are left; none if nobody knows by then."""
        try:
            async with asyncio.timeout_at(until):
                found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except TimeoutError:
            return []
        return [(len(found) - number, str(address[0])) for number, (*_, address) in enumerate(found)]

    def _tls(self) -> TLS | None:
        if self.scheme == "http":
            return None
        bundle = self.ca_file or os.environ.get("CONSUL_CACERT") or "system"
        try:
            context_for(tls := _trusting(bundle))
        except ConfigError as error:
            reason = error.__cause__ or error
            raise ConsulError(f"the certificates in {shown(bundle)} cannot be used ({reason})") from error
        return tls

    def _token(self) -> str:
        """The token of this moment, or "" if there is none."""
        if file := self.token_file or os.environ.get("CONSUL_HTTP_TOKEN_FILE", ""):
            token, where = _content(file), _named(file)
            if not token:
                raise ConsulError(f"{where} is empty")  # without a token, Consul would answer that there is nothing
        else:
            token, where = os.environ.get("CONSUL_HTTP_TOKEN", "").strip(), "CONSUL_HTTP_TOKEN"
        if len(token) > LARGEST_TOKEN or not all("!" <= letter <= "~" for letter in token):
            raise ConsulError(f"{where} holds what cannot be a token: it must be of printable ASCII and without spaces")
        return token


@lru_cache(maxsize=8)
def _trusting(bundle: str) -> TLS:
    """The same setting for every request: its context is kept for as long as it is."""
    return TLS(verify=bundle)


def _named(file: str) -> str:
    """A token file in an error. What has no folder may be the token itself, written where the file belongs."""
    return f"the token file {file!r}" if "/" in file or os.sep in file else "the token file"


def _content(file: str) -> str:
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            raise ConsulError(f"{_named(file)} is not a file")  # a pipe would hold everything up
        with path.open(encoding="utf-8") as opened:
            return opened.read(LARGEST_TOKEN + 2).strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConsulError(f"{_named(file)} cannot be read ({reason})") from None


async def _whole(pieces: AsyncBody) -> bytes:
    body = bytearray()
    async for piece in pieces:
        body += piece
        if len(body) > LARGEST_ANSWER:
            raise ConsulError(f"Consul's answer is longer than {LARGEST_ANSWER} bytes")
    return bytes(body)


async def _start_of(pieces: AsyncBody) -> bytes:
    body = b""
    async for piece in pieces:
        body += piece
        if len(body) >= ENOUGH_FOR_A_REASON:
            break
    return body


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        begins = body[:ENOUGH_FOR_A_REASON].lstrip()[:1]
        what = {b"": "it is empty", b"<": "it may be HTML"}.get(begins, f"{len(body)} bytes of something else")
        # Not "from" the error, which holds the whole of it.
        raise ConsulError(f"Consul's answer is not JSON: {what}", 200) from None


def _reason(body: bytes, status: int) -> str:
    """Why Consul refuses, if it says so in words that it is known for; else what the status means."""
    said = body.decode("utf-8", "replace").lower()
    return next((words for words in KNOWN_REASONS if words.lower() in said), "") or _phrase(status)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no reason was given"
