"""One mesh, many threads and event loops (rule S3): right answers, nothing left over, no "event loop is closed"."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import httpx
import pytest
import trio
import trustme

from conftest import DESCRIPTORS
from meshes import mesh_of, outcomes
from meshlib import TLS, Connections, DeadlineExceeded, Mesh, RoundRobin, Timeout, options
from meshlib.testing import Upstream, upstreams

T = TypeVar("T")

BOUND = 60.0


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("papers")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "bundle.pem"))
    authority.issue_cert("orders").private_key_and_cert_chain_pem.write_to_path(str(folder / "orders.pem"))
    return {"bundle": str(folder / "bundle.pem"), "cert": str(folder / "orders.pem")}


@pytest.fixture(params=["plain", "tls"])
def secured(
    request: pytest.FixtureRequest, no_leaks: None, papers: dict[str, str]
) -> Iterator[tuple[Upstream, dict[str, TLS]]]:
    """An upstream, and the setting that a service over it needs."""
    tls = request.param == "tls"
    with Upstream("a", cert=papers["cert"] if tls else None) as upstream:
        yield upstream, {"tls": TLS(verify=papers["bundle"])} if tls else {}


def wrong_of(client: httpx.Client, who: object, count: int) -> int:
    """Ask for paths of our own; how many answers were to somebody else's."""
    paths = [f"/{who}/{number}" for number in range(count)]
    return sum(client.get(path).json()["path"] != path for path in paths)


async def wrong_of_async(client: httpx.AsyncClient, who: object, count: int) -> int:
    """See `wrong_of`; one call after the other."""
    wrong = 0
    for number in range(count):
        path = f"/{who}/{number}"
        wrong += (await client.get(path)).json()["path"] != path
    return wrong


async def wrong_at_once(client: httpx.AsyncClient, who: object, count: int, lanes: int = 8) -> int:
    """See `wrong_of`; in lanes side by side, on whatever loop this is."""
    wrong: list[int] = []

    async def lane(number: int) -> None:
        wrong.append(await wrong_of_async(client, f"{who}-{number}", count // lanes))

    async with anyio.create_task_group() as group:
        for number in range(lanes):
            group.start_soon(lane, number)
    return sum(wrong)


def in_threads(*works: Callable[[], T]) -> list[T]:
    """Run all at once; what each returns, or the first exception."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(number: int, work: Callable[[], T]) -> None:
        try:
            barrier.wait()
            results[number] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
        assert not thread.is_alive(), "deadlocked"
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(works))]


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir(DESCRIPTORS))


# Threads


def test_S3_one_client_in_32_threads(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    mesh = mesh_of(upstream, **tls)
    with mesh.client("orders") as client:
        works = [lambda who=who: wrong_of(client, who, 40) for who in range(32)]
        assert in_threads(*works) == [0] * 32
        snapshot = mesh.snapshot()["orders"]
    assert (snapshot.in_flight, snapshot.nodes[0].attempts, snapshot.nodes[0].failures) == (0, 32 * 40, 0)
    assert len({request.connection for request in upstream.log()}) <= 32


def test_S3_32_threads_share_four_connections(no_leaks: None, upstream: Upstream) -> None:
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=4, max_idle=4))
    with mesh.client("orders") as client:
        works = [lambda who=who: wrong_of(client, who, 20) for who in range(32)]
        assert in_threads(*works) == [0] * 32
    assert len({request.connection for request in upstream.log()}) <= 4
    assert mesh.snapshot()["orders"].in_flight == 0


def test_S3_a_client_of_its_own_in_each_thread(no_leaks: None, fleet: list[Upstream]) -> None:
    mesh = mesh_of(*fleet, balancer=RoundRobin())

    def work(who: int) -> int:
        with mesh.client("orders") as client:
            return wrong_of(client, who, 30)

    assert in_threads(*[lambda who=who: work(who) for who in range(16)]) == [0] * 16
    snapshot = mesh.snapshot()["orders"]
    assert snapshot.in_flight == 0
    assert [node.attempts for node in snapshot.nodes] == [160] * 3, "they all take turns from one round"


# Loops, one after the other


def test_S3_one_async_client_over_two_loops(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    client = mesh_of(upstream, **tls).async_client("orders")
    assert asyncio.run(wrong_at_once(client, "first", 40)) == 0
    held = open_descriptors()
    assert asyncio.run(wrong_at_once(client, "second", 40)) == 0
    assert open_descriptors() == held, "the first loop's sockets are still there"
    log = upstream.log()
    first = {request.connection for request in log if request.target.startswith("/first")}
    second = {request.connection for request in log if request.target.startswith("/second")}
    assert not first & second
    asyncio.run(client.aclose())


def test_S3_one_async_client_over_many_loops(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    client = mesh_of(upstream, **tls).async_client("orders")
    counts = []
    for number in range(10):
        assert asyncio.run(wrong_of_async(client, number, 3)) == 0
        counts.append(open_descriptors())
    assert len(set(counts)) == 1
    asyncio.run(client.aclose())


def test_S3_a_client_closed_on_another_loop(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    before = open_descriptors()
    client = mesh_of(upstream, **tls).async_client("orders")
    asyncio.run(wrong_at_once(client, "first", 40))
    asyncio.run(client.aclose())
    assert open_descriptors() == before


def test_S3_a_response_read_after_its_loop(no_leaks: None, upstream: Upstream) -> None:
    """It cannot be read any more; that is said clearly, and nothing is left behind."""
    upstream.script({"size": 5_000_000}, then={})
    mesh = mesh_of(upstream)
    client = mesh.async_client("orders")

    async def start() -> httpx.Response:
        return await client.send(client.build_request("GET", "/"), stream=True)

    async def finish(response: httpx.Response) -> None:
        with pytest.raises(httpx.TransportError):
            await response.aread()
        assert (await client.get("/")).status_code == 200
        await client.aclose()

    response = asyncio.run(start())
    asyncio.run(finish(response))
    assert mesh.snapshot()["orders"].in_flight == 0


def test_S3_one_async_client_over_two_runs_of_trio(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    client = mesh_of(upstream, **tls).async_client("orders")
    assert trio.run(wrong_at_once, client, "first", 40) == 0
    held = open_descriptors()
    assert trio.run(wrong_at_once, client, "second", 40) == 0
    assert open_descriptors() == held, "the first run's sockets are still there"
    trio.run(client.aclose)


def test_S3_asyncio_and_then_trio_with_one_client(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    before = open_descriptors()
    mesh = mesh_of(upstream, **tls)
    client = mesh.async_client("orders")
    assert asyncio.run(wrong_at_once(client, "asyncio", 40)) == 0
    assert trio.run(wrong_at_once, client, "trio", 40) == 0
    assert asyncio.run(wrong_at_once(client, "again", 40)) == 0
    trio.run(client.aclose)
    assert open_descriptors() == before
    assert mesh.snapshot()["orders"].in_flight == 0


def test_S3_asyncio_trio_and_sync_one_after_the_other_with_one_mesh(no_leaks: None, fleet: list[Upstream]) -> None:
    mesh = mesh_of(*fleet)

    async def main() -> int:
        async with mesh.async_client("orders") as client:
            return await wrong_at_once(client, "x", 40)

    assert asyncio.run(main()) == 0
    assert trio.run(main) == 0
    with mesh.client("orders") as client:
        assert wrong_of(client, "sync", 40) == 0
    snapshot = mesh.snapshot()["orders"]
    assert (snapshot.in_flight, sum(node.attempts for node in snapshot.nodes)) == (0, 120)


# Loops, side by side


def test_S3_two_loops_and_sync_code_at_once_with_one_mesh(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    mesh = mesh_of(upstream, **tls)

    async def main(who: str) -> int:
        async with mesh.async_client("orders") as client:
            return await wrong_at_once(client, who, 240)

    def sync() -> int:
        with mesh.client("orders") as client:
            return wrong_of(client, "sync", 240)

    works = [lambda: asyncio.run(main("one")), lambda: asyncio.run(main("two")), sync, lambda: trio.run(main, "trio")]
    assert in_threads(*works) == [0] * 4
    snapshot = mesh.snapshot()["orders"]
    assert (snapshot.in_flight, snapshot.nodes[0].attempts, snapshot.nodes[0].failures) == (0, 960, 0)


def test_S3_one_async_client_on_two_loops_at_once(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    mesh = mesh_of(upstream, **tls)
    client = mesh.async_client("orders")
    works = [lambda who=who: asyncio.run(wrong_at_once(client, who, 160)) for who in ("one", "two", "three")]
    assert in_threads(*works) == [0] * 3
    asyncio.run(client.aclose())
    assert mesh.snapshot()["orders"].in_flight == 0


def test_S3_many_short_loops_on_one_async_client(no_leaks: None, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)
    client = mesh.async_client("orders")

    def work(who: int) -> int:
        return sum(asyncio.run(wrong_of_async(client, f"{who}-{number}", 3)) for number in range(10))

    assert in_threads(*[lambda who=who: work(who) for who in range(6)]) == [0] * 6
    asyncio.run(client.aclose())
    assert mesh.snapshot()["orders"].in_flight == 0


def test_S3_a_sync_client_called_from_a_loops_threads(no_leaks: None, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)

    async def main() -> list[int]:
        with mesh.client("orders") as client:
            return await asyncio.gather(*(asyncio.to_thread(wrong_of, client, who, 20) for who in range(8)))

    assert asyncio.run(main()) == [0] * 8


# Other ways to run a loop


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_S3_under_anyio(secured: tuple[Upstream, dict[str, TLS]], backend: str) -> None:
    upstream, tls = secured
    mesh = mesh_of(upstream, **tls)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            assert await wrong_at_once(client, "x", 80) == 0
            upstream.script(then={"fault": "hang"})
            with anyio.move_on_after(0.1) as scope:
                await client.get("/")
            assert scope.cancelled_caught
            with anyio.CancelScope() as scope:
                scope.cancel()
                await client.get("/")
            assert scope.cancelled_caught
            with options(timeout=0.1), pytest.raises(DeadlineExceeded):
                await client.get("/")
            upstream.script()
            assert await wrong_at_once(client, "x", 80) == 0
        assert mesh.snapshot()["orders"].in_flight == 0

    anyio.run(main, backend=backend)


def test_S3_under_a_loop_that_is_run_piece_by_piece(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    mesh = mesh_of(upstream, **tls)
    loop = asyncio.new_event_loop()
    client = mesh.async_client("orders")
    for number in range(10):
        assert loop.run_until_complete(wrong_of_async(client, number, 2)) == 0
    loop.run_until_complete(client.aclose())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert {request.connection for request in upstream.log()} == {1}


# uvloop


@asynccontextmanager
async def calling(mesh: Mesh) -> AsyncIterator[httpx.AsyncClient]:
    async with mesh.async_client("orders") as client:
        yield client
    await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def uvrun() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """`asyncio.run` on uvloop."""
    if sys.platform == "win32":
        pytest.skip("uvloop is not for Windows")
    import uvloop

    uvloop.run(asyncio.sleep(0))  # its first loop opens descriptors that stay for the life of the process
    return uvloop.run


def test_S3_uvloop_carries_calls(
    secured: tuple[Upstream, dict[str, TLS]], uvrun: Callable[[Coroutine[Any, Any, Any]], Any]
) -> None:
    upstream, tls = secured
    upstream.script({"size": 3_000_000}, then={})
    mesh = mesh_of(upstream, **tls)

    async def main() -> int:
        async with calling(mesh) as client:
            assert len((await client.post("/", content=bytes(3_000_000))).content) == 3_000_000
            return await wrong_at_once(client, "x", 160)

    assert uvrun(main()) == 0
    snapshot = mesh.snapshot()["orders"]
    assert (snapshot.in_flight, snapshot.nodes[0].failures) == (0, 0)
    assert upstream.log()[0].body_length == 3_000_000
    assert len({request.connection for request in upstream.log()}) <= 8


def test_S3_uvloop_fails_over_and_keeps_the_time(
    no_leaks: None, uvrun: Callable[[Coroutine[Any, Any, Any]], Any]
) -> None:
    with upstreams(3) as fleet:
        fleet[0].kill()
        fleet[1].script(then={"fault": "reset"})
        mesh = mesh_of(*fleet, timeout=Timeout(total=5, attempt=0.5))

        async def main() -> list[httpx.Response]:
            async with calling(mesh) as client:
                responses = [await client.get("/") for _ in range(20)]
                for upstream in fleet[1:]:
                    upstream.script(then={"fault": "hang"})
                with options(timeout=0.2), pytest.raises(DeadlineExceeded):
                    await client.get("/")
                task = asyncio.create_task(client.get("/"))
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                return responses

        responses = uvrun(main())
    assert {response.status_code for response in responses} == {200}
    assert any(("failover", "ok") in outcomes(response) for response in responses)
    assert mesh.snapshot()["orders"].in_flight == 0


def test_S3_one_async_client_over_two_uvloops(
    secured: tuple[Upstream, dict[str, TLS]], uvrun: Callable[[Coroutine[Any, Any, Any]], Any]
) -> None:
    upstream, tls = secured
    client = mesh_of(upstream, **tls).async_client("orders")
    for name in ("first", "second"):
        assert uvrun(wrong_at_once(client, name, 40)) == 0
    assert asyncio.run(wrong_at_once(client, "asyncio", 40)) == 0
    uvrun(client.aclose())


def test_S3_uvloop_handshakes_are_bounded(
    no_leaks: None, papers: dict[str, str], uvrun: Callable[[Coroutine[Any, Any, Any]], Any], tmp_path: Path
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        mesh = mesh_of(address, tls=TLS(verify=papers["bundle"]), timeout=Timeout(total=0.4))

        async def main() -> None:
            async with calling(mesh) as client:
                loop = asyncio.get_running_loop()
                started = loop.time()
                with pytest.raises(DeadlineExceeded):
                    await client.get("/")
                assert loop.time() - started < 0.9

        uvrun(main())
    assert mesh.snapshot()["orders"].in_flight == 0
