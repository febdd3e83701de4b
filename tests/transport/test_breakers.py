"""Breakers, panic and ejections by hand on real sockets: what a caller sees of broken endpoints, which is nothing."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import httpx
import pytest

from conftest import Colour
from meshes import get_or_error, mesh_of
from meshlib import (
    Breaker,
    ConsistentHash,
    LeastRequest,
    Mesh,
    PeakEwma,
    Random,
    RoundRobin,
    Timeout,
    UnknownService,
    options,
    report,
)
from meshlib.testing import Upstream, upstreams

BALANCERS = [PeakEwma(), LeastRequest(), RoundRobin(), Random(), ConsistentHash()]
CONCURRENCY = 16


async def load(mesh: Mesh, calls: int, at: dict[int, Any] | None = None) -> list[Any]:
    """What so many GETs at 16 end with; before some of them something happens."""
    numbers, results = iter(range(calls)), []

    async def work(client: httpx.AsyncClient) -> None:
        for number in numbers:
            if at and number in at:
                at[number]()
            with options(hash_key=str(number)):
                results.append(await get_or_error(client))

    async with mesh.async_client("orders") as client:
        await asyncio.gather(*(work(client) for _ in range(CONCURRENCY)))
    return results


def bad(results: list[Any]) -> list[Any]:
    """Those that brought no good answer."""
    return [each for each in results if isinstance(each, Exception) or each.status_code != 200]


@pytest.mark.parametrize("balancer", BALANCERS, ids=lambda balancer: type(balancer).__name__)
@pytest.mark.parametrize(("count", "dead"), [(3, 2), (8, 4)])
def test_B3_no_GET_fails_when_half_of_the_endpoints_and_more_are_killed_at_once(
    no_leaks: None, balancer: Any, count: int, dead: int
) -> None:
    with upstreams(count, delay=0.002) as fleet:
        mesh = mesh_of(*fleet, balancer=balancer, timeout=Timeout(attempt=0.5, total=5))

        def kill() -> None:
            for victim in fleet[:dead]:
                victim.kill()

        results = asyncio.run(load(mesh, 500, {150: kill}))
        shown = mesh.snapshot()["orders"]
    assert len(results) == 500
    assert bad(results) == []
    assert shown.in_flight == 0


def test_B2_an_endpoint_that_fails_30_percent_of_its_calls_is_seen_by_nobody() -> None:
    rng = random.Random(7)
    with upstreams(3) as fleet:
        fleet[0].script(*({"status": 503 if rng.random() < 0.3 else 200} for _ in range(2000)))
        mesh = mesh_of(*fleet, breaker=Breaker(open_for=0.2, ramp=1.0))
        results = asyncio.run(load(mesh, 2000))
        shown = mesh.snapshot()["orders"].nodes[0]
    assert len(bad(results)) <= 2
    assert shown.failures >= 3, "it was called, and failed"
    assert shown.attempts < 400, "of some 667 that would have been its share"


def test_B2_at_most_one_probe_is_under_way_with_50_callers(fleet: list[Upstream]) -> None:
    victim = fleet[0]
    mesh = mesh_of(*fleet, breaker=Breaker(consecutive=2, open_for=0.2))
    victim.script(then={"status": 503})

    async def call() -> list[Any]:
        async with mesh.async_client("orders") as client:
            while mesh.snapshot()["orders"].nodes[0].state == "closed":
                await client.get("/")
            victim.script(then={"delay": 0.5})
            victim.clear()
            await asyncio.sleep(0.31)
            return await asyncio.gather(*(client.get("/") for _ in range(50)))

    results = asyncio.run(call())
    assert [each.status_code for each in results] == [200] * 50
    assert len(victim.log()) == 1
    assert [report(each).attempts[0].why for each in results].count("probe") == 1


def test_an_endpoint_slower_than_slow_call_is_ejected_though_it_answers(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script(then={"delay": 0.15})
    mesh = mesh_of(*fleet, balancer=RoundRobin(), breaker=Breaker(slow_call=0.1, consecutive=3, open_for=30.0))

    async def script(client: Any) -> None:
        for _ in range(20):
            assert (await client.get("/")).status_code == 200

    colour.run(mesh, script)
    nodes = mesh.snapshot()["orders"].nodes
    assert [node.state for node in nodes] == ["open", "closed", "closed"]
    assert nodes[0].attempts == 3
    assert nodes[0].why == "ejected after 3 failures in a row"


def test_B6_a_blocked_event_loop_ejects_nobody() -> None:
    with upstreams(2, delay=0.05) as fleet:
        mesh = mesh_of(*fleet, timeout=Timeout(attempt=0.3, total=10.0), breaker=Breaker(consecutive=2))

        async def main() -> list[Any]:
            async with mesh.async_client("orders") as client:
                await asyncio.gather(*(client.get("/") for _ in range(20)))
                calls = [asyncio.ensure_future(get_or_error(client)) for _ in range(20)]
                await asyncio.sleep(0.03)
                time.sleep(0.9)  # noqa: ASYNC251  # this is the fault
                return await asyncio.gather(*calls)

        results = asyncio.run(main())
        nodes = mesh.snapshot()["orders"].nodes
    assert bad(results) == []
    assert [node.state for node in nodes] == ["closed", "closed"]


def test_what_is_taken_out_by_hand_gets_no_call_until_it_is_restored(colour: Colour, fleet: list[Upstream]) -> None:
    mesh = mesh_of(*fleet, balancer=RoundRobin())

    async def script(client: Any) -> None:
        mesh.eject("orders", fleet[0].address)
        mesh.eject("orders", ("127.0.0.1", fleet[1].port))
        for _ in range(6):
            await client.get("/")
        assert [len(each.log()) for each in fleet] == [0, 0, 6]
        assert mesh.snapshot()["orders"].nodes[0].why == "taken out by hand"
        mesh.eject("orders", fleet[2].address)
        error = await get_or_error(client)
        assert "no endpoint is to be called now" in str(error)
        mesh.restore("orders", fleet[0].address)
        await client.get("/")
        assert [len(each.log()) for each in fleet] == [1, 0, 6]

    colour.run(mesh, script)


def test_restoring_closes_a_breaker(fleet: list[Upstream]) -> None:
    mesh = mesh_of(*fleet, balancer=RoundRobin(), breaker=Breaker(open_for=60.0))
    fleet[0].script(*[{"status": 503}] * 5)
    with mesh.client("orders") as client:
        while mesh.snapshot()["orders"].nodes[0].state == "closed":
            client.get("/")
        mesh.restore("orders", fleet[0].address)
        node = mesh.snapshot()["orders"].nodes[0]
    assert (node.state, node.eligible, node.why) == ("closed", True, "closed, on its ramp: 10% of its weight")


def test_an_endpoint_or_service_that_is_not_there_is_an_error() -> None:
    mesh = mesh_of("127.0.0.1:1")
    with pytest.raises(ValueError, match=r"orders has no endpoint 127\.0\.0\.1:2 now \(known: 127\.0\.0\.1:1\)"):
        mesh.eject("orders", "127.0.0.1:2")
    with pytest.raises(UnknownService, match="no service 'order' in this mesh; did you mean 'orders'"):
        mesh.restore("order", "127.0.0.1:1")
