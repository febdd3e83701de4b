"""A client for Consul's HTTP API, as small as discovery and registration need it.

Decides how one request is made: with the token of this moment, on a connection of its own, bounded in time and size;
and which answers are errors. It never keeps anything between two requests, never tries again, and says nothing of a
token, a header or a query in an error. There is no connection to reuse: queries wait for up to minutes, and come once a
second at most.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx

from meshlib.endpoint import Endpoint
from meshlib.policy import TLS
from meshlib.transport.tls import context_for
from meshlib.validation import ConfigError, Fault, check, instance, ruled, whole

__all__ = ["Answer", "ConsulAgent", "ConsulError"]

CONNECT_WITHIN = 2.0
"""Seconds for a connection, TLS included."""

LARGEST_ANSWER = 64 * 1024 * 1024
LARGEST_TOKEN = 4096
LONGEST_REASON = 200
"""Characters of the server's own words in an error."""

ENOUGH_FOR_A_REASON = 16 * 1024
"""Bytes of which these are looked for: pages of HTML begin with much white space."""


_BAD_HOST = "must be an address without a zone, or a host name"


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
    token_file: str = ruled(instance(str, "'/run/secrets/consul'"), default="")

    def __post_init__(self) -> None:
        try:
            host = Endpoint(self.host, 1).host
        except ConfigError:
            host = ""
        check(self, [] if host and "%" not in host else [Fault("consulagent.host", _BAD_HOST)])
        object.__setattr__(self, "host", host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

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
        return Answer(_json(body, token), headers, had_token=bool(token))

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
        request.extensions["timeout"] = {"connect": CONNECT_WITHIN}
        try:
            async with asyncio.timeout(timeout):
                return *await self._exchange(request, token), token
        except TimeoutError:
            raise ConsulError(f"no answer from {self} within {timeout:g} s") from None
        except (httpx.TransportError, OSError) as error:  # the oldest httpcore lets errors of TLS through as they are
            what = ": ".join(filter(None, (type(error).__name__, _quoted(str(error).encode(), token))))
            raise ConsulError(f"no answer from {self} ({what})") from error

    async def _exchange(self, request: httpx.Request, token: str) -> tuple[Mapping[str, str], bytes]:
        # Used by itself, a transport neither logs URLs nor looks for proxies in the environment, as a client does.
        transport = httpx.AsyncHTTPTransport(verify=self._context(), trust_env=False)
        try:
            response = await transport.handle_async_request(request)
            if response.status_code != HTTPStatus.OK:
                words = _quoted(await _start_of(response), token) or _phrase(response.status_code)
                raise ConsulError(f"Consul answered {response.status_code}: {words}", response.status_code)
            return response.headers, await _whole(response, token)
        finally:
            await transport.aclose()

    def _context(self) -> ssl.SSLContext:
        if self.scheme == "http":
            return _unused()
        bundle = self.ca_file or os.environ.get("CONSUL_CACERT") or "system"
        try:
            return context_for(TLS(verify=bundle))
        except ConfigError as error:
            raise ConsulError(f"the certificates in {bundle!r} cannot be used ({error.__cause__})") from error

    def _token(self) -> str:
        """The token of this moment, or "" if there is none."""
        if file := self.token_file or os.environ.get("CONSUL_HTTP_TOKEN_FILE", ""):
            token, where = _content(file), f"the token file {file!r}"
            if not token:
                raise ConsulError(f"{where} is empty")  # without a token, Consul would answer that there is nothing
        else:
            token, where = os.environ.get("CONSUL_HTTP_TOKEN", "").strip(), "CONSUL_HTTP_TOKEN"
        if len(token) > LARGEST_TOKEN or not all("!" <= letter <= "~" for letter in token):
            raise ConsulError(f"{where} holds what cannot be a token: it must be of printable ASCII and without spaces")
        return token


def _content(file: str) -> str:
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            raise ConsulError(f"the token file {file!r} is not a file")  # a pipe would hold everything up
        with path.open(encoding="utf-8") as opened:
            return opened.read(LARGEST_TOKEN + 2).strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConsulError(f"the token file {file!r} cannot be read ({reason})") from None


@cache
def _unused() -> ssl.SSLContext:
    """For plain HTTP: httpx would read the system's certificates all the same if it were given none."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


async def _whole(response: httpx.Response, token: str) -> bytes:
    if encoding := response.headers.get("content-encoding", ""):
        raise ConsulError(
            f"Consul's answer is encoded, though none was asked for ({_quoted(encoding.encode(), token)})"
        )
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > LARGEST_ANSWER:
            raise ConsulError(f"Consul's answer is longer than {LARGEST_ANSWER} bytes")
    return bytes(body)


async def _start_of(response: httpx.Response) -> bytes:
    body = b""
    async for piece in response.aiter_raw():
        body += piece
        if len(body) >= ENOUGH_FOR_A_REASON:
            break
    return body


def _json(body: bytes, token: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ConsulError(f"Consul's answer is not JSON: {_quoted(body, token) or 'it is empty'}", 200) from None


def _quoted(text: bytes, token: str = "") -> str:
    """The server's own words, short, on one line, and without the token that it may have repeated."""
    words = text[:ENOUGH_FOR_A_REASON].decode("utf-8", "replace")
    if token:
        words = words.replace(token, "***")
    printable = "".join(letter if letter.isprintable() else " " for letter in words)
    return " ".join(printable.split())[:LONGEST_REASON]


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no reason was given"
