"""The tax: what the mesh itself adds to a call, with a transport below it that answers at once and without a network.

Decides what that transport answers. The same httpx client calls it with and without a mesh in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
from contestants import MESHED, PLAIN, spread
from figure import Figure, microseconds, ratios
from paired import Contestant, Costs, Sizes, excess, measure, ratio
from subject import SUBJECT, URL
from upstream import BODY, check

ADDRESSES = [f"127.0.0.1:{port}" for port in (1, 2, 3)]


class Null(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Answers everything, of either colour."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=BODY)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=BODY)


def figures(sizes: Sizes) -> Iterator[Figure]:
    """Microseconds per call, and what they are beside the plain call, which says how fast the machine is."""
    mesh = SUBJECT.mesh(ADDRESSES, inner=lambda endpoint: Null())
    with httpx.Client(transport=Null(), trust_env=False) as client, mesh.client() as through:
        costs = measure([_sync(PLAIN, client), _sync(MESHED, through)], sizes)
    yield from _told("sync", costs)
    with asyncio.Runner() as runner:
        client, through = httpx.AsyncClient(transport=Null(), trust_env=False), mesh.async_client()
        costs = measure([_async(PLAIN, client, runner), _async(MESHED, through, runner)], sizes)
        for each in (client, through):
            runner.run(each.aclose())
    yield from _told("async", costs)


def _told(colour: str, costs: Costs) -> Iterator[Figure]:
    yield microseconds(f"tax: {colour}", excess(costs, MESHED, PLAIN))
    yield ratios(f"tax: {colour}: meshed / httpx", ratio(costs, MESHED, PLAIN))


def _sync(name: str, client: httpx.Client) -> Contestant:
    def run(calls: int) -> None:
        for _ in range(calls):
            response = client.get(URL)
            check(response.status_code, response.content)

    return Contestant(name, run)


def _async(name: str, client: httpx.AsyncClient, runner: asyncio.Runner) -> Contestant:
    async def call() -> None:
        response = await client.get(URL)
        check(response.status_code, response.content)

    return Contestant(name, lambda calls: runner.run(spread(call, calls, 1)))
