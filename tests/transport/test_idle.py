"""Which idle connection a call gets, and how it is found out that one is dead."""

from __future__ import annotations

from typing import Any

import anyio
import httpx
import pytest

from conftest import Colour
from meshes import mesh_of, outcomes
from meshlib.testing import Upstream
from meshlib.transport import network


def test_C8_below_a_connection_that_has_died_the_next_one_is_used(colour: Colour, upstream: Upstream) -> None:
    upstream.script({}, {"fault": "close_after"}, then={})

    async def opened(client: Any) -> httpx.Response:
        request = client.build_request("GET", "/")
        answer: httpx.Response = await client.send(await request if colour.is_sync else request, stream=True)
        return answer

    async def script(client: Any) -> httpx.Response:
        for response in [await opened(client), await opened(client)]:  # the one that dies goes back last
            _ = response.read() if colour.is_sync else await response.aread()
        with anyio.fail_after(10):
            while upstream.stats()["connections_open"] > 1:
                await anyio.sleep(0.01)
        await anyio.sleep(0.05)  # from the server's end to ours
        answer: httpx.Response = await client.get("/")
        return answer

    assert outcomes(colour.run(mesh_of(upstream), script)) == [("first", "ok")]
    assert [request.connection for request in upstream.log()] == [1, 2, 1]


def test_a_look_at_an_idle_connection_keeps_no_other_thread_waiting(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []
    is_readable: Any = network.Stream.is_readable
    with mesh_of(upstream).client("orders") as client:
        lock = client._transport._stacks._lock  # type: ignore[attr-defined]

        def look(stream: network.Stream) -> bool:
            looks.append(lock.locked())
            return bool(is_readable.fget(stream))

        monkeypatch.setattr(network.Stream, "is_readable", property(look))
        for _ in range(3):
            assert client.get("/").status_code == 200
    assert looks == [False] * 2
