"""The tax: what the mesh itself adds to a call, with a transport below it that answers at once and without a network.

Decides what that transport answers, and who calls it: httpx's client, and a mesh's, which spares itself what httpx does
about cookies for every answer. A client of httpx's own over the mesh's transport shows what the transport costs alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import httpx
from contestants import MESHED, PLAIN, one_by_one, one_by_one_async
from figure import Figure, microseconds, ratios
from paired import Costs, Sizes, excess, measure, ratio
from subject import SUBJECT
from upstream import BODY

FOREIGN = "a client of httpx's own over the mesh"

ADDRESSES = [f"127.0.0.1:{port}" for port in (1, 2, 3)]


class Null(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Answers everything, of either colour."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=BODY)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=BODY)


def figures(sizes: Sizes) -> Iterator[Figure]:
    """Microseconds per call, and what they are beside the plain call, which says how fast the machine is."""
    mesh = replace(SUBJECT, histogram=False).mesh(ADDRESSES, inner=lambda endpoint: Null())
    with (
        httpx.Client(transport=Null(), trust_env=False) as client,
        mesh.client() as through,
        httpx.Client(transport=mesh.transport(), trust_env=False, timeout=None) as foreign,
    ):
        costs = measure([one_by_one(PLAIN, client), one_by_one(MESHED, through), one_by_one(FOREIGN, foreign)], sizes)
    yield from _told("sync", costs)
    with asyncio.Runner() as runner:
        clients = {
            PLAIN: httpx.AsyncClient(transport=Null(), trust_env=False),
            MESHED: mesh.async_client(),
            FOREIGN: httpx.AsyncClient(transport=mesh.async_transport(), trust_env=False, timeout=None),
        }
        costs = measure([one_by_one_async(name, client, runner) for name, client in clients.items()], sizes)
        for client in clients.values():
            runner.run(client.aclose())
    yield from _told("async", costs)


def _told(colour: str, costs: Costs) -> Iterator[Figure]:
    yield microseconds(f"tax: {colour}", excess(costs, MESHED, PLAIN))
    yield ratios(f"tax: {colour}: meshed / httpx", ratio(costs, MESHED, PLAIN))
    yield microseconds(f"tax: {colour}: {FOREIGN}", excess(costs, FOREIGN, PLAIN))
