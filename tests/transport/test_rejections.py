"""Answers that stand between two attempts (C5): drained if they are short, else their connection is closed."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import anyio.lowlevel
import httpx
import pytest

from conftest import Colour
from meshes import mesh_of, outcomes
from meshlib import Connections, DeadlineExceeded, Mesh, RoundRobin, Service, Timeout, options
from meshlib.testing import Upstream
from payloads import BUSY, Wrapped, arrived, unexhausted
from waiting import until


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("GET", {"size": 0}),
        ("GET", {"size": 65_536}),
        ("GET", {"size": 65_536, "chunked": True}),
        ("HEAD", {"size": 10}),
    ],
)
def test_C5_a_rejection_of_up_to_64_KiB_keeps_its_connection(
    colour: Colour, fleet: list[Upstream], method: str, step: dict[str, Any]
) -> None:
    fleet[0].script({"status": 503, **step})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.request(method, "/")

    assert outcomes(colour.run(mesh_of(fleet[0]), script)) == [("first", "rejected"), ("retry", "ok")]
    assert len({request.connection for request in fleet[0].log()}) == 1


LONG_REJECTIONS: dict[str, dict[str, Any]] = {
    "over the limit": {"status": 503, "size": 200_000},
    "chunks": {"status": 503, "size": 10 << 30, "chunked": True},
    "drip": {"status": 503, "fault": "drip", "size": 10_000},
    "silence": {"status": 503, "size": 10, "headers": {"content-length": "20"}},
    "tiny chunks": {"status": 503, "fault": "tiny_chunks", "size": 1_000_000},
}


@pytest.mark.parametrize("fault", LONG_REJECTIONS)
def test_C5_a_long_rejection_neither_delays_the_retry_nor_stays(
    colour: Colour, fleet: list[Upstream], fault: str
) -> None:
    """Nor does it leave a task or a generator: in trio that is a ResourceWarning, in asyncio it is another task."""
    fleet[0].script(then=LONG_REJECTIONS[fault])
    mesh = mesh_of(*fleet[:2], balancer=RoundRobin(), connections=Connections(max_per_endpoint=1))

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        responses = [await client.get(f"/{number}") for number in range(4)]
        gc.collect()
        if colour.name == "asyncio":
            assert asyncio.all_tasks() == {asyncio.current_task()}
        await anyio.lowlevel.checkpoint()
        until(lambda: fleet[0].stats()["connections_open"] == 0)  # while the client is open
        return responses

    responses = colour.run(mesh, script)
    assert [response.status_code for response in responses] == [200] * 4
    rejected = [number for number, response in enumerate(responses) if len(outcomes(response)) == 2]
    assert rejected
    for number in rejected:
        first, second = arrived(fleet, f"/{number}")
        assert second.at - first.at < 0.1 + BUSY
    snapshot = mesh.snapshot()["orders"]
    assert snapshot.in_flight == 0
    assert snapshot.nodes[1].failures == 0


@unexhausted
def test_C5_an_inner_transports_rejection_is_drained_too(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script({"status": 503, "body": "busy"}, {}, {"status": 503, "size": 1_000_000})
    inner = httpx.HTTPTransport if colour.is_sync else httpx.AsyncHTTPTransport if colour.name == "asyncio" else Wrapped
    mesh = Mesh(Service("orders", [fleet[0].address]), inner=lambda endpoint: inner())

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(2)]

    responses = colour.run(mesh, script)
    assert [outcomes(response) for response in responses] == [[("first", "rejected"), ("retry", "ok")]] * 2
    assert [request.connection for request in fleet[0].log()][:3] == [fleet[0].log()[0].connection] * 3


def test_C4_a_drain_ends_at_the_deadline_even_where_a_body_may_run_on(
    colour: Colour, fleet: list[Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshlib.transport.exchange.DRAIN_TIME", 10.0)
    for each in fleet[:2]:
        each.script(then=LONG_REJECTIONS["silence"])
    mesh = mesh_of(*fleet[:2], timeout=Timeout(total=0.3))

    async def script(client: httpx.AsyncClient) -> None:
        started = time.monotonic()
        with options(body_deadline=False), pytest.raises(DeadlineExceeded):
            await client.get("/")
        assert time.monotonic() - started < 0.3 + BUSY

    colour.run(mesh, script)
    assert mesh.snapshot()["orders"].in_flight == 0
