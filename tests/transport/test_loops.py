"""One mesh, many threads and event loops (rule S3): right answers, nothing left over, no "event loop is closed"."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import anyio
import httpx
import pytest
import trio
from doubles import Factory

from conftest import DESCRIPTORS, Secured
from meshes import mesh_of, outcomes, over
from meshlib import TLS, DeadlineExceeded, Timeout, options
from meshlib.testing import Upstream, upstreams

T = TypeVar("T")

BOUND = 60.0


def test_S3_trio_as_the_guest_of_an_asyncio_loop() -> None:
    async def guest() -> int:
        async with mesh_of(upstream).async_client("orders") as client:
            return (await client.get("/")).status_code + (await client.get("/")).status_code

    async def host() -> int:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[int] = loop.create_future()
        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=lambda outcome: ended.set_result(outcome.unwrap()),
        )
        return await asyncio.wait_for(ended, BOUND)

    with upstreams(1) as (upstream,):
        assert asyncio.run(host()) == 400


def wrong_of(client: httpx.Client, who: object, count: int) -> int:
    """Ask for paths of our own; how many answers were to somebody else's."""
    paths = [f"/{who}/{number}" for number in range(count)]
    return sum(client.get(path).json()["path"] != path for path in paths)


async def wrong_at_once(client: httpx.AsyncClient, who: object, count: int, lanes: int = 8) -> int:
    """See `wrong_of`; in lanes side by side, on whatever loop this is."""
    wrong = 0

    async def lane(name: str) -> None:
        nonlocal wrong
        for number in range(count // lanes):
            path = f"/{name}/{number}"
            wrong += (await client.get(path)).json()["path"] != path

    async with anyio.create_task_group() as group:
        for number in range(lanes):
            group.start_soon(lane, f"{who}-{number}")
    return wrong


def in_threads(*works: Callable[[], T]) -> list[T]:
    """Run all at once; what each returns, or the first exception."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(BOUND) for future in [pool.submit(work) for work in works]]


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir(DESCRIPTORS))


# Threads


def test_S3_one_client_in_32_threads(secured: Secured) -> None:
    mesh = secured.mesh()
    with mesh.client("orders") as client:
        assert in_threads(*[lambda who=who: wrong_of(client, who, 40) for who in range(32)]) == [0] * 32
        snapshot = mesh.snapshot()["orders"]
    assert (snapshot.in_flight, snapshot.nodes[0].attempts, snapshot.nodes[0].failures) == (0, 32 * 40, 0)
    assert len({request.connection for request in secured.upstream.log()}) <= 32


# Loops, one after the other


RUNS: dict[str, Callable[..., Any]] = {
    "asyncio": lambda work, *args: asyncio.run(work(*args)),
    "trio": trio.run,
    "uvloop": lambda work, *args: uvrun()(work(*args)),
}


@pytest.fixture(scope="module", autouse=True)
def warmed_uvloop() -> None:
    """Its first loop opens descriptors that stay for the life of the process."""
    if sys.platform != "win32":
        uvrun()(asyncio.sleep(0))


def uvrun() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """`asyncio.run` on uvloop."""
    if sys.platform == "win32":
        pytest.skip("uvloop is not for Windows")
    import uvloop

    return uvloop.run


@pytest.mark.parametrize("turns", ["asyncio " * 4, "trio " * 4, "uvloop " * 3, "asyncio trio asyncio uvloop trio"])
def test_S3_one_async_client_over_consecutive_loops(secured: Secured, turns: str) -> None:
    libraries = turns.split()
    mesh = secured.mesh()
    client = mesh.async_client("orders")
    before = open_descriptors()
    for number, library in enumerate(libraries):
        assert RUNS[library](wrong_at_once, client, number, 40) == 0
        assert open_descriptors() == before, "the loop's sockets are still there"
    assert len(client._transport._stacks._loops) == 1, "loops that are over are remembered"
    RUNS[libraries[-1]](client.aclose)
    log = secured.upstream.log()
    used = [{each.connection for each in log if each.target[1] == str(number)} for number in range(len(libraries))]
    assert sum(map(len, used)) == len(set.union(*used)), "two loops shared a connection"
    assert (mesh.snapshot()["orders"].in_flight, mesh.snapshot()["orders"].nodes[0].failures) == (0, 0)


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_S3_inner_transports_of_loops_that_are_over_are_forgotten(library: str) -> None:
    factory = Factory()
    client = over("10.0.0.1:80", "10.0.0.2:80", inner=factory).async_client("orders")

    async def four() -> None:
        for _ in range(4):
            await client.get("/")

    for _ in range(3):
        RUNS[library](four)
    assert len(client._transport._stacks._transports) == 2
    assert [len(each.requests) for each in factory.made] == [2] * 6, "each loop has its own, and keeps them"
    RUNS[library](client.aclose)


def test_S3_a_response_read_after_its_loop(no_leaks: None, upstream: Upstream) -> None:
    """It cannot be read any more; that is said clearly, and nothing is left behind."""
    upstream.script({"size": 5_000_000}, then={})
    mesh = mesh_of(upstream)
    client = mesh.async_client("orders")

    async def finish(response: httpx.Response) -> None:
        with pytest.raises(httpx.TransportError):
            await response.aread()
        assert (await client.get("/")).status_code == 200
        await client.aclose()

    response = asyncio.run(client.send(client.build_request("GET", "/"), stream=True))
    asyncio.run(finish(response))
    assert mesh.snapshot()["orders"].in_flight == 0


def test_S3_a_loop_that_is_closed_without_a_word(secured: Secured) -> None:
    """Nothing was told to the loop's async generators, so its sockets are freed by the next loop."""
    before = open_descriptors()
    client = secured.mesh().async_client("orders")
    loop = asyncio.new_event_loop()
    for number in range(5):
        assert loop.run_until_complete(wrong_at_once(client, number, 2, 1)) == 0
    loop.close()
    del loop
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # asyncio's, on its own transport
        assert asyncio.run(wrong_at_once(client, "next", 16)) == 0
        assert open_descriptors() == before
    asyncio.run(client.aclose())
    log = secured.upstream.log()
    assert {request.connection for request in log if not request.target.startswith("/next")} == {1}


@pytest.mark.filterwarnings("ignore:asynchronous generator:ResourceWarning")  # httpx makes some for each call
@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_S3_a_generators_clean_up_at_the_end_of_its_loop_may_call(
    no_leaks: None, upstream: Upstream, library: str
) -> None:
    """It is in the middle of a call when the loop's connections are closed, if it came before: of eight, some do."""
    upstream.script(then={"delay": 0.1})
    client = mesh_of(upstream).async_client("orders")
    told: list[int] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield (await client.get("/")).status_code
        finally:
            with anyio.CancelScope(shield=True):
                told.append((await client.post("/over")).status_code)

    left = [numbers() for _ in range(8)]

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for each in left:
                group.start_soon(anext, each)

    RUNS[library](main)
    assert told == [200] * 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # asyncio's: it came too late to be closed with the loop
        RUNS[library](client.aclose)
        gc.collect()


# Loops, side by side


def test_S3_two_loops_trio_and_sync_code_at_once_with_one_mesh(secured: Secured) -> None:
    mesh = secured.mesh()

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


def test_S3_many_short_loops_at_once_on_one_async_client(secured: Secured) -> None:
    mesh = secured.mesh()
    client = mesh.async_client("orders")

    def work(who: int) -> int:
        return sum(asyncio.run(wrong_at_once(client, f"{who}-{number}", 6, 2)) for number in range(8))

    assert in_threads(*[lambda who=who: work(who) for who in range(6)]) == [0] * 6
    asyncio.run(client.aclose())
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_S3_a_client_closed_on_another_loop_while_its_own_runs(secured: Secured, library: str) -> None:
    before = open_descriptors()
    client = secured.mesh().async_client("orders")
    called, closed = threading.Event(), threading.Event()

    async def main() -> int:
        wrong = await wrong_at_once(client, "x", 40)
        held = len(os.listdir(DESCRIPTORS))
        called.set()
        with anyio.fail_after(10):
            while not closed.is_set() or len(os.listdir(DESCRIPTORS)) >= held:
                await anyio.sleep(0.01)
        return wrong

    def close() -> int:
        assert called.wait(BOUND)
        asyncio.run(client.aclose())
        closed.set()
        return 0

    assert in_threads(lambda: RUNS[library](main), close) == [0, 0]
    assert open_descriptors() == before


# uvloop


def test_S3_uvloop_fails_over_and_keeps_the_time(no_leaks: None) -> None:
    with upstreams(3) as fleet:
        fleet[0].kill()
        fleet[1].script(then={"fault": "reset"})
        mesh = mesh_of(*fleet, timeout=Timeout(total=5, attempt=0.5))

        async def main() -> list[httpx.Response]:
            async with mesh.async_client("orders") as client:
                responses = [await client.put("/", content=bytes(1_000_000)) for _ in range(20)]
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

        responses = uvrun()(main())
    assert {response.status_code for response in responses} == {200}
    assert any(("failover", "ok") in outcomes(response) for response in responses)
    assert mesh.snapshot()["orders"].in_flight == 0


def test_S3_uvloop_bounds_a_handshake(no_leaks: None, certificates: tuple[str, str]) -> None:
    async def main() -> None:
        async with mesh.async_client("orders") as client:
            with pytest.raises(DeadlineExceeded):
                await asyncio.wait_for(client.get("/"), 5)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        mesh = mesh_of(address, tls=TLS(verify=certificates[0]), timeout=Timeout(total=0.4))
        uvrun()(main())


# The end of the interpreter

LEFT_OPEN = """
import sys
import meshlib.transport.connections
from meshlib import Mesh, Service

sys.keeps = sys.modules["__main__"]  # so that it is emptied last, after our modules

mesh = Mesh(Service("orders", [sys.argv[1]]))
client, async_client = mesh.client("orders"), mesh.async_client("orders")
client.get("/")
answer = client.send(client.build_request("GET", "/"), stream=True)
body = answer.iter_raw()
next(body)
"""


def test_what_outlives_our_modules_at_the_end_of_the_interpreter_goes_in_silence() -> None:
    with upstreams(1) as (upstream,):
        upstream.script({}, then={"size": 1_000_000})
        command = [sys.executable, "-c", LEFT_OPEN, upstream.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False)
    assert (done.returncode, done.stderr) == (0, "")
