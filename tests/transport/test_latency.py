"""What a node is remembered for is what its answers take, and neither its connections nor our own queue."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from conftest import Colour, Secured
from meshes import mesh_of
from meshlib import Connections
from meshlib.core.node import Node
from meshlib.testing import Upstream


def test_a_new_connection_does_not_make_a_node_slow(
    colour: Colour, secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = secured.mesh()
    connected: list[float] = []
    plainly = Node.restart
    monkeypatch.setattr(Node, "restart", lambda node, number, now: (connected.append(now), plainly(node, number, now)))

    async def script(client: Any) -> None:
        for _ in range(3):
            await client.get("/")

    colour.run(mesh, script)
    assert len(connected) == 1, "once for the connection that all three used"


def test_a_place_in_our_own_queue_does_not_make_a_node_slow(upstream: Upstream) -> None:
    upstream.script(then={"delay": 0.1})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1))

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            await asyncio.gather(*(client.get("/") for _ in range(5)))

    asyncio.run(main())
    assert mesh.snapshot()["orders"].nodes[0].p99 < 0.3, "each took 0.1 s, and the last waited for four others"
