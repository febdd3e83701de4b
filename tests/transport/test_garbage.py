"""What nobody closed: the garbage collector gives its sockets back and sets the counts right, from wherever it runs.

Clients that were not closed are told off with a `ResourceWarning`; responses that were not closed are not, as in httpx.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import pytest

from conftest import DESCRIPTORS, Colour, Secured
from meshes import mesh_of, outcomes
from meshlib import Connections, Hedge, Timeout
from meshlib.testing import Upstream

BOUND = 60.0


@contextmanager
def saying(*expected: str) -> Iterator[None]:
    """Exactly these warnings, by how they begin.

    Not counted are trio's words on async generators that were not run to their end, as those of a body that was read
    in part are: httpx leaves its own, and so ours, half-way.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    said = [str(warning.message) for warning in caught]
    said = [each for each in said if not each.startswith("Async generator ")]
    assert [each[: len(expected[0]) if expected else None] for each in said] == list(expected)


def descriptors() -> int:
    return len(os.listdir(DESCRIPTORS))


def until_closed(upstream: Upstream) -> None:
    """Wait until the upstream has seen all of its clients leave."""
    deadline = time.monotonic() + 10
    while upstream.stats()["connections_open"]:
        assert time.monotonic() < deadline, upstream.stats()
        time.sleep(0.01)


async def turns(colour: Colour) -> None:
    """Let the loop go on."""
    if not colour.is_sync:
        for _ in range(10):
            await anyio.lowlevel.checkpoint()


async def opened(client: Any) -> httpx.Response:
    """A response whose body is still to come."""
    response = client.send(httpx.Request("GET", "http://orders/"), stream=True)
    return response if isinstance(response, httpx.Response) else await response


# Clients


def test_an_unclosed_client_frees_its_sockets(colour: Colour, secured: Secured) -> None:
    mesh = secured.mesh()

    async def script(_: Any) -> None:
        before = descriptors()
        client: Any = mesh.client("orders") if colour.is_sync else mesh.async_client("orders")
        for _ in range(2):
            response = await opened(client)
            response.read() if colour.is_sync else await response.aread()
        assert descriptors() == before + 1
        del client, response
        gc.collect()
        await turns(colour)
        assert descriptors() == before

    with saying("unclosed client of a mesh"):
        colour.run(mesh, script)
    until_closed(secured.upstream)


def test_C6_what_a_loop_that_is_over_left_open_holds_nothing(secured: Secured) -> None:
    secured.upstream.script({}, then={"size": 3_000_000})
    before = descriptors()
    with saying():
        mesh = secured.mesh()
        client = mesh.async_client("orders")
        asyncio.run(client.get("/"))
        response = asyncio.run(opened(client))
        assert descriptors() == before
        del client, response
        gc.collect()
        assert mesh.snapshot()["orders"].in_flight == 0
    until_closed(secured.upstream)


DRIP = {"fault": "drip", "interval": 1.0}


@pytest.mark.parametrize(
    ("step", "hedge"),
    [
        ({"fault": "hang"}, None),
        ({"fault": "hang"}, Hedge(after=5.0)),
        ({"status": 503, "headers": {"retry-after": "5"}, **DRIP}, None),
        (DRIP, None),
    ],
    ids=["headers", "hedged", "back-off", "body"],
)
def test_C6_a_call_of_a_loop_that_is_over_is_collected_amid_the_lock(
    upstream: Upstream, step: dict[str, Any], hedge: Hedge | None
) -> None:
    upstream.script(then=step)
    mesh = mesh_of(upstream, hedge=hedge)
    tasks: list[Any] = []

    async def main() -> None:
        tasks.append(asyncio.ensure_future(mesh.async_client("orders").get("/")))
        while not mesh.snapshot()["orders"].in_flight or not upstream.log():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    cluster = mesh._clusters["orders"]

    def collect() -> None:
        tasks.clear()
        gc.collect()

    with cluster.lock, warnings.catch_warnings(action="ignore"):
        collecting = threading.Thread(target=collect, daemon=True)
        collecting.start()
        collecting.join(10)
        assert not collecting.is_alive(), "it waits for the lock, which its own thread might hold"
    assert mesh.snapshot()["orders"].in_flight == 0
    assert [node.oldest_open for node in cluster.view.nodes] == [None], "or it would look slower and slower"


def test_a_client_that_never_called_is_not_told_off(no_leaks: None) -> None:
    with saying():
        mesh_of("127.0.0.1:1").client("orders")
        mesh_of("127.0.0.1:1").async_client("orders")


def test_S3_a_client_collected_in_another_thread_frees_its_sockets(no_leaks: None, upstream: Upstream) -> None:
    async def main() -> None:
        before = descriptors()
        held = [mesh_of(upstream).async_client("orders")]
        await held[0].get("/")
        collector = threading.Thread(target=lambda: [held.clear(), gc.collect()])
        collector.start()
        collector.join()
        while descriptors() > before:
            await asyncio.sleep(0.001)

    with saying("unclosed client of a mesh"):
        asyncio.run(asyncio.wait_for(main(), BOUND))


# Responses


@pytest.mark.parametrize("read", ["nothing", "a part"])
def test_C6_a_response_thrown_away_frees_its_connection_and_its_count(
    colour: Colour, secured: Secured, read: str
) -> None:
    secured.upstream.script({"size": 3_000_000}, then={})
    mesh = secured.mesh(connections=Connections(max_per_endpoint=1), timeout=Timeout(total=10))

    async def script(client: Any) -> None:
        before = descriptors()
        response = await opened(client)
        chunks: Any = None
        if read == "a part":
            chunks = response.iter_raw() if colour.is_sync else response.aiter_raw()
            assert next(chunks) if colour.is_sync else await anext(chunks)
        assert (mesh.snapshot()["orders"].in_flight, descriptors()) == (1, before + 1)
        del response, chunks
        gc.collect()
        await turns(colour)
        assert (mesh.snapshot()["orders"].in_flight, descriptors()) == (0, before)
        answer = await client.get("/")
        assert (answer.status_code, outcomes(answer)) == (200, [("first", "ok")])
        assert mesh.snapshot()["orders"].in_flight == 0

    with saying():
        colour.run(mesh, script)
    assert [request.connection for request in secured.upstream.log()] == [1, 2]
    until_closed(secured.upstream)


def test_C6_a_response_thrown_away_lets_those_who_wait_go_on(
    colour: Colour, no_leaks: None, upstream: Upstream
) -> None:
    upstream.script({"size": 3_000_000}, then={})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1), timeout=Timeout(total=20))
    answers: list[int] = []

    async def script(_: Any) -> None:
        client: Any = mesh.client("orders") if colour.is_sync else mesh.async_client("orders")

        async def wait() -> None:
            get = anyio.to_thread.run_sync(client.get, "/") if colour.is_sync else client.get("/")
            answers.append((await get).status_code)

        held = [await opened(client)]
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(wait)
            while mesh.snapshot()["orders"].in_flight < 4:
                await anyio.sleep(0.001)
            await anyio.sleep(0.05)  # from the count to the queue
            held.clear()
            gc.collect()
            with anyio.fail_after(5):
                while len(answers) < 3:
                    await anyio.sleep(0.01)
        client.close() if colour.is_sync else await client.aclose()

    colour.run(mesh, script)
    assert answers == [200] * 3


def test_C6_a_client_closed_while_a_response_is_open(colour: Colour, no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"size": 3_000_000})
    mesh = mesh_of(upstream)

    async def script(client: Any) -> None:
        before = descriptors()
        read, thrown_away = [await opened(client) for _ in range(2)]
        await (client.close() if colour.is_sync else client.aclose())
        assert mesh.snapshot()["orders"].in_flight == 2
        assert len(read.read() if colour.is_sync else await read.aread()) == 3_000_000
        del thrown_away
        gc.collect()
        await turns(colour)
        assert (mesh.snapshot()["orders"].in_flight, descriptors()) == (0, before)

    with saying():
        colour.run(mesh, script)
    until_closed(upstream)


def test_nothing_is_said_when_everything_is_closed(colour: Colour, secured: Secured) -> None:
    secured.upstream.script(
        {}, {"size": 500_000}, {"status": 503, "size": 500_000}, {"fault": "cut"}, {"fault": "reset"}, then={}
    )

    async def script(client: Any) -> None:
        for _ in range(8):
            response = await opened(client)
            try:
                response.read() if colour.is_sync else await response.aread()
            except httpx.TransportError:
                pass
            response.close() if colour.is_sync else await response.aclose()

    with saying():
        colour.run(secured.mesh(), script)
    until_closed(secured.upstream)


# Programs


def run(program: str, upstream: Upstream, bundle: str = "", *options: str) -> tuple[str, str]:
    """Run a program that finds its mesh as `mesh`; what it wrote to standard output and to standard error."""
    preamble = (
        "import asyncio, gc, sys, threading\n"
        "import httpx\n"
        "from meshlib import TLS, Connections, Mesh, Service\n"
        "tls = TLS(verify=sys.argv[2]) if sys.argv[2] else None\n"
        "mesh = Mesh(Service('orders', [sys.argv[1]], tls=tls, connections=Connections(max_per_endpoint=50)))\n"
    )
    command = [sys.executable, *options, "-c", preamble + textwrap.dedent(program), upstream.address, bundle]
    apart = ("PYTHONWARNINGS", "PYTHONDEVMODE", "PYTHONASYNCIODEBUG")
    environment = {name: value for name, value in os.environ.items() if name not in apart}
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


LEFT_OPEN = {
    "asyncio": """
        client = mesh.async_client("orders")
        print(asyncio.run(client.get("/")).status_code)
    """,
    "trio": """
        import trio

        client = mesh.async_client("orders")
        print(trio.run(client.get, "/").status_code)
    """,
    "a loop that is never closed": """
        client = mesh.async_client("orders")
        loop = asyncio.new_event_loop()
        print(loop.run_until_complete(client.get("/")).status_code)
    """,
}


@pytest.mark.parametrize("program", LEFT_OPEN)
def test_a_program_that_closes_nothing_ends_in_silence(no_leaks: None, upstream: Upstream, program: str) -> None:
    upstream.script(then={"size": 500_000})
    assert run(LEFT_OPEN[program], upstream) == ("200\n", "")


CLOSED = """
    async def main():
        asyncio.get_running_loop().slow_callback_duration = 60  # a busy machine is not what this is about
        async with mesh, mesh.async_client("orders") as client:
            await client.get("/")
            async with client.stream("GET", "/"):
                print("async")

    with mesh.client("orders") as client, client.stream("GET", "/"):
        print("sync")
    asyncio.run(main())
"""


def test_a_program_that_closes_everything_ends_in_silence_in_development_mode(secured: Secured) -> None:
    secured.upstream.script(then={"size": 500_000})
    told = run(CLOSED, secured.upstream, secured.bundle, "-X", "dev", "-W", "error")
    assert told == ("sync\nasync\n", "")


AMID_GARBAGE = """
    gc.set_threshold(3, 2, 2)
    sync, asynchronous = mesh.client("orders"), mesh.async_client("orders")
    request = httpx.Request("GET", "http://orders/")

    def work():
        for _ in range(60):
            response = sync.send(request, stream=True)
            response.extensions["itself"] = response  # only the collector gets rid of it
            del response
            sync.get("/")
            mesh.snapshot()

    async def work_async():
        for _ in range(60):
            response = await asynchronous.send(request, stream=True)
            response.extensions["itself"] = response
            del response
            await asynchronous.get("/")
            mesh.snapshot()

    async def main():
        async with asynchronous:
            await asyncio.gather(*(work_async() for _ in range(8)))
            gc.collect()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    asyncio.run(main())
    for thread in threads:
        thread.join()
    sync.close()
    gc.collect()
    print(mesh.snapshot()["orders"].in_flight)
"""


def test_C6_finalizers_inside_locked_sections_do_not_deadlock(no_leaks: None, upstream: Upstream) -> None:
    """The collector runs every few allocations, so also while its own thread holds one of our locks."""
    upstream.script(then={"size": 20_000})
    assert run(AMID_GARBAGE, upstream) == ("0\n", "")


UNDER_A_LOCK = """
    import faulthandler, time

    faulthandler.dump_traceback_later(20, exit=True)
    gc.disable()
    watched, found = [], []

    def clock():
        if any(lock.locked() for lock in watched):
            found.append(gc.collect() > 0)
        return time.monotonic()

    mesh = Mesh(Service("orders", [sys.argv[1]]), clock=clock)
    client = mesh.client("orders")
    client.get("/")
    response = client.send(httpx.Request("GET", "http://orders/"), stream=True)
    chunks = response.iter_raw(1024)
    next(chunks)
    cycle = [chunks]
    cycle.append(cycle)
    del chunks, cycle
    watched.append(client._transport._stacks._lock)
    print(client.get("/").status_code, any(found), mesh.snapshot()["orders"].in_flight)
    client.close()
"""


def test_C6_a_body_read_in_part_and_collected_under_a_lock_does_not_deadlock(
    no_leaks: None, upstream: Upstream
) -> None:
    """It is the body's generator that goes, with the response still held: that is an exit, not a finalizer."""
    upstream.script(then={"size": 300_000, "chunked": True})
    assert run(UNDER_A_LOCK, upstream) == ("200 True 0\n", "")
