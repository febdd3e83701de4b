"""C6 and C7: a call that is cancelled, at whatever point, leaks nothing and counts once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import httpx
import pytest

from meshes import mesh_of
from meshlib import Budget, Connections, Mesh, Retry, Timeout, options
from meshlib.testing import Upstream

TURNS = 400
"""More turns of the event loop than any of these calls takes."""

Use = Callable[[httpx.AsyncClient], Awaitable[object]]


async def get(client: httpx.AsyncClient) -> object:
    return await client.get("/")


async def read_slowly(client: httpx.AsyncClient) -> object:
    async with client.stream("GET", "/") as response:
        return [chunk async for chunk in response.aiter_raw(64)]


async def leave_early(client: httpx.AsyncClient) -> object:
    async with client.stream("GET", "/") as response:
        return response.status_code


async def upload(client: httpx.AsyncClient) -> object:
    async def body() -> object:
        for _ in range(5):
            await asyncio.sleep(0)
            yield b"x" * 20_000

    return await client.put("/", content=body())  # type: ignore[arg-type]


async def after_turns(turns: int, use: Use, client: httpx.AsyncClient) -> bool:
    """Cancel the use after so many turns of the loop; whether it had not ended by then."""
    task = asyncio.ensure_future(use(client))
    for _ in range(turns):
        await asyncio.sleep(0)
    was_running = task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return was_running


def connections_in_use(client: httpx.AsyncClient) -> int:
    """Connections that are neither idle nor closed."""
    stacks = client._transport._stacks  # type: ignore[attr-defined]
    return sum(stack.size - len(stack._idle) for stack in stacks._all_stacks())


def settled(mesh: Mesh, client: httpx.AsyncClient) -> tuple[int, int]:
    return mesh.snapshot()["orders"].in_flight, connections_in_use(client)


SCENARIOS: dict[str, tuple[Use, list[dict[str, object]]]] = {
    "get": (get, []),
    "body": (read_slowly, [{"size": 300_000, "chunked": True}]),
    "early close": (leave_early, [{"size": 3_000_000}]),
    "upload": (upload, []),
    "retry": (get, [{"status": 503, "body": "busy"}] * 2),
    "retry wait": (get, [{"status": 503, "headers": {"Retry-After": "1"}}]),
    "dead connection": (get, [{"fault": "reset"}]),
    "drip": (get, [{"fault": "drip", "size": 1000}]),
}


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_C7_a_call_cancelled_after_any_number_of_turns_leaks_nothing(
    no_leaks: None, upstream: Upstream, scenario: str, is_warm: bool
) -> None:
    use, steps = SCENARIOS[scenario]
    retry = Retry(budget=Budget(capacity=100_000))  # a cancelled retry is not paid back, and there are many
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1), retry=retry)

    async def cancelled_after(turns: int) -> bool:
        upstream.script()
        async with mesh.async_client("orders") as client:
            if is_warm:
                await client.get("/")
            upstream.script(*steps)
            was_running = await after_turns(turns, use, client)
            assert settled(mesh, client) == (0, 0), f"after {turns} turns"
            upstream.script()
            assert (await client.get("/")).status_code == 200, f"after {turns} turns"
            assert settled(mesh, client) == (0, 0), f"after {turns} turns"
        return was_running

    async def main() -> int:
        turns = 0
        while await cancelled_after(turns) and turns < TURNS:
            turns += 1 if turns < 60 else 20
        return turns

    assert asyncio.run(main()) >= 3
    [node] = mesh.snapshot()["orders"].nodes
    assert node.state == "closed", "the caller's own leaving blames nobody"


def test_C7_waiting_for_a_slot_is_cancelled_without_losing_it(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"delay": 0.05})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1))

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            for turns in range(30):
                holder = asyncio.ensure_future(client.get("/"))
                await asyncio.sleep(0)
                waiters = [asyncio.ensure_future(client.get("/")) for _ in range(3)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                waiters[0].cancel()
                await holder
                waiters[1].cancel()  # it may have been woken by now, and must pass its turn on
                results = await asyncio.gather(*waiters, return_exceptions=True)
                assert isinstance(results[2], httpx.Response), results
                assert settled(mesh, client) == (0, 0)

    asyncio.run(main())


def test_C7_a_storm_of_cancellations_loses_no_slot(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"delay": 0.001})
    mesh = mesh_of(
        upstream,
        connections=Connections(max_per_endpoint=10),
        timeout=Timeout(total=20),
        retry=Retry(max_attempts=1),
    )
    chance = random.Random(7)

    async def one(client: httpx.AsyncClient) -> str:
        task = asyncio.ensure_future(client.get("/"))
        if chance.random() < 1 / 3:
            asyncio.get_running_loop().call_later(chance.random() * 0.03, task.cancel)
        await asyncio.wait([task])
        return "cancelled" if task.cancelled() else str(task.result().status_code)

    async def main() -> tuple[list[str], list[str]]:
        async with mesh.async_client("orders") as client:
            stormy: list[str] = []
            for _ in range(50):
                stormy += await asyncio.gather(*(one(client) for _ in range(100)))
            assert settled(mesh, client) == (0, 0)
            calm = [
                str(response.status_code) for response in await asyncio.gather(*(client.get("/") for _ in range(100)))
            ]
            return stormy, calm

    stormy, calm = asyncio.run(main())
    assert len(stormy) == 5000
    assert stormy.count("cancelled") > 500
    assert set(stormy) == {"cancelled", "200"}
    assert calm == ["200"] * 100
    assert mesh.snapshot()["orders"].nodes[0].state == "closed"


def test_C7_a_coroutine_that_is_closed_cleans_up_without_a_loop(no_leaks: None, upstream: Upstream) -> None:
    """What is pending when a loop is thrown away is closed, not cancelled: the clean-up must not await anything."""
    upstream.script(then={"fault": "hang"})
    mesh = mesh_of(upstream)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            call = client.get("/")
            task = asyncio.ensure_future(call)
            await asyncio.sleep(0.05)
            assert mesh.snapshot()["orders"].in_flight == 1
            call.close()
            assert settled(mesh, client) == (0, 0)
            task.cancel()
            await asyncio.wait([task])  # it finds its coroutine gone; how that ends is not ours to say
            task.cancelled() or task.exception()

    asyncio.run(main())


def test_C7_a_thread_that_is_interrupted_in_its_wait_leaks_nothing(
    no_leaks: None, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.script({"status": 503, "headers": {"Retry-After": "5"}})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1))

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with mesh.client("orders") as client:
        monkeypatch.setattr("time.sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.get("/")
        assert mesh.snapshot()["orders"].in_flight == 0
        assert client.get("/").status_code == 200


def test_C7_trio_cancels_without_leaks(no_leaks: None, upstream: Upstream) -> None:
    import trio

    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1))

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            for checkpoints in range(40):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(client.get, "/")
                        for _ in range(checkpoints):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()
                assert settled(mesh, client) == (0, 0)
            assert (await client.get("/")).status_code == 200

    trio.run(main)


def test_in_trio_a_response_that_another_task_closes_wakes_its_reader(no_leaks: None, upstream: Upstream) -> None:
    """Else the reader waits on, and for whoever has the descriptor next."""
    import trio

    upstream.script({"fault": "drip", "interval": 3600}, then={"delay": 0.05})
    mesh = mesh_of(upstream, timeout=Timeout(total=30))

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            with options(body_deadline=False):
                response = await client.send(client.build_request("GET", "/"), stream=True)

            async def read() -> None:
                with pytest.raises(httpx.TransportError):
                    await response.aread()

            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read)
                    await trio.sleep(0.1)
                    await response.aclose()
                assert [(await client.get("/")).status_code for _ in range(2)] == [200, 200]
            assert settled(mesh, client) == (0, 0)

    trio.run(main)
