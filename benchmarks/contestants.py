"""The clients that are compared, each as somebody who knows it would set it up for many calls to the same addresses.

Decides their settings and how calls are spread over tasks. The unmeshed ones go round robin over the addresses. It
never measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx
from paired import Contestant
from subject import KEEPALIVE, PATH, SUBJECT, URL
from upstream import check

PLAIN, LIFTED = "httpx", "httpx, limits lifted"
MESHED, RELATIVE = "meshed", "meshed with base_url"
OVER_AIOHTTP, AIOHTTP = "httpx-aiohttp", "aiohttp"

PATIENCE = 3600.0
"""Seconds of timeout: a number, as everybody has one, but never reached."""

Call = Callable[[], Awaitable[None]]


def limits(*, lifted: bool = False) -> httpx.Limits:
    """httpx's own bounds on connections, 100 in all and 20 idle, or none."""
    if lifted:
        return httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE)
    return httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=KEEPALIVE)


class Field:
    """The async contestants of one section, on one event loop, with their clients.

    Args:
        runner: runs the loop; leaving it is up to who made it.
    """

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._clients = contextlib.AsyncExitStack()

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._clients.aclose())

    def enter(
        self,
        name: str,
        opened: Callable[[], contextlib.AbstractAsyncContextManager[Call]],
        concurrency: int,
        warm_up: int = 0,
    ) -> Contestant:
        """Open a client; gives the contestant that makes its calls `concurrency` side by side."""
        call = self._runner.run(self._clients.enter_async_context(opened()))
        return Contestant(name, lambda calls: self._runner.run(spread(call, calls, concurrency)), concurrency, warm_up)


def one_by_one(name: str, client: httpx.Client) -> Contestant:
    """A sync client that makes one call after another to `URL`."""

    def run(calls: int) -> None:
        for _ in range(calls):
            response = client.get(URL)
            check(response.status_code, response.content)

    return Contestant(name, run)


def one_by_one_async(name: str, client: httpx.AsyncClient, runner: asyncio.Runner) -> Contestant:
    """The same with an async client."""

    async def call() -> None:
        response = await client.get(URL)
        check(response.status_code, response.content)

    return Contestant(name, lambda calls: runner.run(spread(call, calls, 1)))


async def spread(call: Call, calls: int, concurrency: int) -> None:
    """Make the calls in so many tasks, each of which makes the next one as soon as it is done with the last."""
    left = iter(range(calls))

    async def work() -> None:
        for _ in left:
            await call()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, calls)):
            group.create_task(work())


@contextlib.asynccontextmanager
async def plain(addresses: Sequence[str], *, lifted: bool = False) -> AsyncIterator[Call]:
    """httpx with its own transport; see `limits`."""
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE, limits=limits(lifted=lifted)) as client:
        yield _httpx_call(client, addresses)


@contextlib.asynccontextmanager
async def over_aiohttp(addresses: Sequence[str]) -> AsyncIterator[Call]:
    """httpx over aiohttp, by httpx-aiohttp."""
    from httpx_aiohttp import AiohttpTransport

    transport = AiohttpTransport(client=_session)
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE, transport=transport) as client:
        yield _httpx_call(client, addresses)


@contextlib.asynccontextmanager
async def bare_aiohttp(addresses: Sequence[str]) -> AsyncIterator[Call]:
    """aiohttp without httpx."""
    urls = itertools.cycle(f"http://{address}{PATH}" for address in addresses)
    async with _session() as session:

        async def call() -> None:
            async with session.get(next(urls)) as response:
                check(response.status, await response.read())

        yield call


@contextlib.asynccontextmanager
async def meshed(addresses: Sequence[str], url: str = URL, service: str | None = None) -> AsyncIterator[Call]:
    """meshlib, called by absolute URL unless told otherwise."""
    async with SUBJECT.mesh(addresses) as mesh, mesh.async_client(service) as client:

        async def call() -> None:
            response = await client.get(url)
            check(response.status_code, response.content)

        yield call


OTHERS: dict[str, Callable[[Sequence[str]], contextlib.AbstractAsyncContextManager[Call]]] = {
    OVER_AIOHTTP: over_aiohttp,
    AIOHTTP: bare_aiohttp,
}
"""Those that take part where they are installed."""


def is_installed(name: str) -> bool:
    """Whether one of `OTHERS` can take part."""
    return importlib.util.find_spec(name.replace("-", "_")) is not None


def _session() -> Any:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE))


def _httpx_call(client: httpx.AsyncClient, addresses: Sequence[str]) -> Call:
    urls = itertools.cycle(f"http://{address}{PATH}" for address in addresses)

    async def call() -> None:
        response = await client.get(next(urls))
        check(response.status_code, response.content)

    return call
