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
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import trio
import trustme

from conftest import DESCRIPTORS, Colour
from meshes import mesh_of, outcomes
from meshlib import TLS, Connections, Timeout
from meshlib.testing import Upstream

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


@contextmanager
def warned(of_client: bool) -> Iterator[None]:
    """Told off for an unclosed client or not; beyond that only Python's own words about what was not closed.

    Trio has such words for every async generator that was not run to its end, as a body is that was read in part.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    said = [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    assert any(each.startswith("ResourceWarning: unclosed client of a mesh") for each in said) is of_client, said
    assert all(each.startswith(("ResourceWarning: unclosed ", "ResourceWarning: Async generator ")) for each in said), (
        said
    )


@contextmanager
def silent() -> Iterator[None]:
    """Not a word, but for trio's on a generator deep inside httpcore, which nobody but httpcore could close."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    said = [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    assert [each for each in said if "HTTP11Connection._receive_response_body" not in each] == []


def descriptors() -> int:
    return len(os.listdir(DESCRIPTORS))


def until_closed(upstream: Upstream) -> None:
    """Wait until the upstream has seen all of its clients leave."""
    deadline = time.monotonic() + 10
    while upstream.stats()["connections_open"]:
        assert time.monotonic() < deadline, upstream.stats()
        time.sleep(0.01)


async def turns(colour: Colour, count: int = 10) -> None:
    """Let the loop go on."""
    if colour.name == "asyncio":
        for _ in range(count):
            await asyncio.sleep(0)
    elif colour.name == "trio":
        for _ in range(count):
            await trio.lowlevel.checkpoint()


def request_of(path: str = "/") -> httpx.Request:
    return httpx.Request("GET", f"http://orders{path}")


# Clients


def test_an_unclosed_sync_client_frees_its_sockets(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    before = descriptors()
    with warned(of_client=True):
        client = mesh_of(upstream, **tls).client("orders")
        client.get("/")
        assert descriptors() > before
        del client
        gc.collect()
        assert descriptors() == before
    until_closed(upstream)


def test_an_unclosed_asyncio_client_frees_its_sockets_while_the_loop_runs(
    secured: tuple[Upstream, dict[str, TLS]],
) -> None:
    upstream, tls = secured

    async def main() -> None:
        before = descriptors()
        client = mesh_of(upstream, **tls).async_client("orders")
        await asyncio.gather(*(client.get("/") for _ in range(4)))
        assert descriptors() > before
        del client
        await asyncio.sleep(0)  # until then the loop holds the results of what was gathered
        gc.collect()
        for _ in range(10):
            await asyncio.sleep(0)
        assert descriptors() == before

    with warned(of_client=True):
        asyncio.run(main())
    until_closed(upstream)


def test_an_unclosed_asyncio_client_frees_its_sockets_after_its_loop(
    secured: tuple[Upstream, dict[str, TLS]],
) -> None:
    """Whether with the loop, then in silence, or with the client."""
    upstream, tls = secured
    before = descriptors()
    clients = [mesh_of(upstream, **tls).async_client("orders")]

    async def main() -> None:
        [client] = clients
        await asyncio.gather(*(client.get("/") for _ in range(4)))

    asyncio.run(main())
    held = descriptors() - before
    with warned(of_client=held > 0):
        clients.clear()
        gc.collect()
        assert descriptors() == before
    until_closed(upstream)


def test_an_unclosed_trio_client_frees_its_sockets(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured

    async def main() -> None:
        before = descriptors()
        client = mesh_of(upstream, **tls).async_client("orders")
        await client.get("/")
        assert descriptors() > before
        del client
        gc.collect()
        assert descriptors() == before

    with warned(of_client=True):
        trio.run(main)
    until_closed(upstream)


def test_a_client_that_never_called_is_not_told_off(no_leaks: None) -> None:
    with silent():
        mesh = mesh_of("127.0.0.1:1")
        mesh.client("orders")
        mesh.async_client("orders")
        mesh.transport()


def test_S3_a_client_collected_in_another_thread_frees_its_sockets(no_leaks: None, upstream: Upstream) -> None:
    async def main() -> None:
        before = descriptors()
        client = mesh_of(upstream).async_client("orders")
        await client.get("/")
        held = [client]
        del client

        def collect() -> None:
            held.clear()
            gc.collect()

        await asyncio.to_thread(collect)
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert descriptors() == before

    loop = asyncio.new_event_loop()  # its own, so that the helper thread is gone with it
    with warned(of_client=True):
        loop.run_until_complete(main())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


# Responses


@pytest.mark.parametrize("read", ["nothing", "a part"])
def test_C6_a_response_thrown_away_frees_its_connection_and_its_count(
    colour: Colour, secured: tuple[Upstream, dict[str, TLS]], read: str
) -> None:
    upstream, tls = secured
    upstream.script({"size": 3_000_000}, then={})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1), timeout=Timeout(total=10), **tls)

    async def script(client: Any) -> None:
        before = descriptors()
        response = await client.send(request_of(), stream=True)
        reading = await begin(colour, response) if read == "a part" else None
        assert mesh.snapshot()["orders"].in_flight == 1
        assert descriptors() == before + 1
        del response, reading
        gc.collect()
        await turns(colour)
        assert mesh.snapshot()["orders"].in_flight == 0
        assert descriptors() == before
        answer = await client.get("/")
        assert (answer.status_code, outcomes(answer)) == (200, [("first", "ok")])
        assert mesh.snapshot()["orders"].in_flight == 0

    with warned(of_client=False):
        colour.run(mesh, script)
    assert [request.connection for request in upstream.log()] == [1, 2]
    until_closed(upstream)


async def begin(colour: Colour, response: httpx.Response) -> Any:
    """Read some of the body; what would read the rest."""
    if colour.is_sync:
        chunks = response.iter_raw()
        assert next(chunks)
        return chunks
    reading = response.aiter_raw()
    assert await anext(reading)
    return reading


def test_C6_many_responses_thrown_away(colour: Colour, no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"size": 500_000})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=10), timeout=Timeout(total=10))

    async def script(client: Any) -> None:
        before = descriptors()
        for _ in range(5):
            for _ in range(10):
                await client.send(request_of(), stream=True)
            gc.collect()  # httpx ties a response and its stream into a cycle
        await turns(colour)
        assert mesh.snapshot()["orders"].in_flight == 0
        assert descriptors() == before

    with warned(of_client=False):
        colour.run(mesh, script)
    until_closed(upstream)


def test_C6_a_response_thrown_away_in_a_cycle(colour: Colour, no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"size": 500_000})
    mesh = mesh_of(upstream)

    async def script(client: Any) -> None:
        response = await client.send(request_of(), stream=True)
        response.extensions["itself"] = response
        del response
        assert mesh.snapshot()["orders"].in_flight == 1
        gc.collect()
        assert mesh.snapshot()["orders"].in_flight == 0

    with warned(of_client=False):
        colour.run(mesh, script)


def test_C6_a_response_thrown_away_with_its_client(colour: Colour, secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    upstream.script(then={"size": 3_000_000})
    mesh = mesh_of(upstream, **tls)

    async def script(_: Any) -> None:
        before = descriptors()
        if colour.is_sync:
            response = mesh.client("orders").send(request_of(), stream=True)
        else:
            response = await mesh.async_client("orders").send(request_of(), stream=True)
        assert mesh.snapshot()["orders"].in_flight == 1
        del response
        gc.collect()
        await turns(colour)
        assert mesh.snapshot()["orders"].in_flight == 0
        assert descriptors() == before

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        colour.run(mesh, script)
    until_closed(upstream)


def test_C6_a_response_thrown_away_after_its_loop(secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    upstream.script(then={"size": 3_000_000})
    mesh = mesh_of(upstream, **tls)
    before = descriptors()
    client = mesh.async_client("orders")

    async def main() -> httpx.Response:
        return await client.send(request_of(), stream=True)

    with warned(of_client=False):
        response = asyncio.run(main())
        del response
        gc.collect()
        assert mesh.snapshot()["orders"].in_flight == 0
        assert descriptors() == before
        asyncio.run(client.aclose())
    until_closed(upstream)


# Closing


@pytest.mark.parametrize("ending", ["read", "close", "throw away"])
def test_a_client_closed_while_a_response_is_open(
    colour: Colour, secured: tuple[Upstream, dict[str, TLS]], ending: str
) -> None:
    upstream, tls = secured
    upstream.script(then={"size": 3_000_000})
    mesh = mesh_of(upstream, **tls)

    async def script(client: Any) -> None:
        before = descriptors()
        response = await client.send(request_of(), stream=True)
        await (client.close() if colour.is_sync else client.aclose())
        assert mesh.snapshot()["orders"].in_flight == 1
        if ending == "read":
            body = response.read() if colour.is_sync else await response.aread()
            assert len(body) == 3_000_000
        elif ending == "close":
            response.close() if colour.is_sync else await response.aclose()
        del response
        gc.collect()
        await turns(colour)
        assert mesh.snapshot()["orders"].in_flight == 0
        assert descriptors() == before

    with warned(of_client=False):
        colour.run(mesh, script)
    until_closed(upstream)


def test_closing_twice_is_fine(colour: Colour, no_leaks: None, upstream: Upstream) -> None:
    async def script(client: Any) -> None:
        await client.get("/")
        for _ in range(2):
            await (client.close() if colour.is_sync else client.aclose())

    with silent():
        colour.run(mesh_of(upstream), script)


def test_nothing_is_said_when_everything_is_closed(colour: Colour, secured: tuple[Upstream, dict[str, TLS]]) -> None:
    upstream, tls = secured
    upstream.script(
        {}, {"size": 500_000}, {"status": 503, "size": 500_000}, {"fault": "cut"}, {"fault": "reset"}, then={}
    )

    async def script(client: Any) -> None:
        for _ in range(8):
            response = await client.send(request_of(), stream=True)
            try:
                response.read() if colour.is_sync else await response.aread()
            except httpx.TransportError:
                pass
            response.close() if colour.is_sync else await response.aclose()
        response = await client.send(request_of(), stream=True)
        response.close() if colour.is_sync else await response.aclose()

    with silent():
        colour.run(mesh_of(upstream, **tls), script)
    until_closed(upstream)


# Programs


def run(program: str, upstream: Upstream, bundle: str = "", *options: str) -> tuple[str, str]:
    """Run a program that finds its service as `service`; what it wrote to standard output and to standard error."""
    preamble = (
        "import asyncio, gc, sys, threading\n"
        "import httpx\n"
        "from meshlib import TLS, Connections, Mesh, Service\n"
        "service = Service('orders', [sys.argv[1]], tls=TLS(verify=sys.argv[2]) if sys.argv[2] else None)\n"
        "mesh = Mesh(service)\n"
    )
    command = [sys.executable, *options, "-c", preamble + textwrap.dedent(program), upstream.address, bundle]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "PYTHONDEVMODE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


PROGRAMS = {
    "sync": """
        client = mesh.client("orders")
        print(client.get("/").status_code)
    """,
    "asyncio": """
        client = mesh.async_client("orders")


        async def main():
            print((await client.get("/")).status_code)


        asyncio.run(main())
    """,
    "trio": """
        import trio

        client = mesh.async_client("orders")


        async def main():
            print((await client.get("/")).status_code)


        trio.run(main)
    """,
    "an open response": """
        client = mesh.client("orders")
        response = client.send(httpx.Request("GET", "http://orders/"), stream=True)
        print(response.status_code)
    """,
    "an open response of a loop": """
        client = mesh.async_client("orders")


        async def main():
            return await client.send(httpx.Request("GET", "http://orders/"), stream=True)


        response = asyncio.run(main())
        print(response.status_code)
    """,
    "in a cycle": """
        class Holder:
            pass


        holder = Holder()
        holder.self, holder.client = holder, mesh.client("orders")
        print(holder.client.get("/").status_code)
        del holder
    """,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_closes_nothing_ends_in_silence(
    secured: tuple[Upstream, dict[str, TLS]], papers: dict[str, str], program: str
) -> None:
    upstream, tls = secured
    upstream.script(then={"size": 500_000})
    assert run(PROGRAMS[program], upstream, papers["bundle"] if tls else "") == ("200\n", "")


FORGETFUL = {
    "sync": """
        client = mesh.client("orders")
        print(client.get("/").status_code)
        del client
        gc.collect()
    """,
    "asyncio": """
        async def main():
            client = mesh.async_client("orders")
            print((await client.get("/")).status_code)
            del client
            gc.collect()


        asyncio.run(main())
    """,
}


@pytest.mark.parametrize("program", FORGETFUL)
def test_a_program_in_development_mode_is_told_of_its_client(
    secured: tuple[Upstream, dict[str, TLS]], papers: dict[str, str], program: str
) -> None:
    upstream, tls = secured
    out, err = run(FORGETFUL[program], upstream, papers["bundle"] if tls else "", "-X", "dev")
    assert out == "200\n"
    assert "ResourceWarning: unclosed client of a mesh" in err
    assert "Exception ignored" not in err
    assert "Traceback" not in err


CLOSED = """
    from contextlib import aclosing


    def sync():
        with mesh, mesh.client("orders") as client:
            for _ in range(3):
                client.get("/")
            with client.stream("GET", "/") as response:
                next(response.iter_raw())
        print("sync")


    async def main():
        asyncio.get_running_loop().slow_callback_duration = 60  # a busy machine is not what this is about
        async with mesh, mesh.async_client("orders") as client:
            for _ in range(3):
                await client.get("/")
            async with client.stream("GET", "/") as response, aclosing(response.aiter_raw()) as chunks:
                await anext(chunks)
        print("async")


    sync()
    asyncio.run(main())
"""


@pytest.mark.parametrize("options", [["-W", "error"], ["-X", "dev", "-W", "error"]])
def test_a_program_that_closes_everything_ends_in_silence(
    secured: tuple[Upstream, dict[str, TLS]], papers: dict[str, str], options: list[str]
) -> None:
    upstream, tls = secured
    upstream.script(then={"size": 500_000})
    assert run(CLOSED, upstream, papers["bundle"] if tls else "", *options) == ("sync\nasync\n", "")


def test_finalizers_inside_locked_sections_do_not_deadlock(no_leaks: None, upstream: Upstream) -> None:
    """The collector runs every few allocations, so also while its own thread holds one of our locks."""
    upstream.script(then={"size": 20_000})
    program = """
        mesh = Mesh(Service("orders", [sys.argv[1]], connections=Connections(max_per_endpoint=50)))
        gc.set_threshold(3, 2, 2)


        def work(client):
            for _ in range(60):
                response = client.send(httpx.Request("GET", "http://orders/"), stream=True)
                response.extensions["itself"] = response  # only the collector gets rid of it
                del response
                client.get("/")
                mesh.snapshot()


        with mesh.client("orders") as client:
            threads = [threading.Thread(target=work, args=(client,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            gc.collect()
            print(mesh.snapshot()["orders"].in_flight)
    """
    assert run(program, upstream) == ("0\n", "")


def test_finalizers_inside_a_loop_do_not_disturb_it(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"size": 20_000})
    program = """
        mesh = Mesh(Service("orders", [sys.argv[1]], connections=Connections(max_per_endpoint=50)))
        gc.set_threshold(3, 2, 2)


        async def work(client):
            for _ in range(60):
                response = await client.send(httpx.Request("GET", "http://orders/"), stream=True)
                response.extensions["itself"] = response
                del response
                await client.get("/")
                mesh.snapshot()


        async def main():
            asyncio.get_running_loop().slow_callback_duration = 60
            async with mesh.async_client("orders") as client:
                await asyncio.gather(*(work(client) for _ in range(8)))
                gc.collect()
            print(mesh.snapshot()["orders"].in_flight)


        asyncio.run(main())
    """
    assert run(program, upstream) == ("0\n", "")
