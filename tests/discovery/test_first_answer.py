"""The first call waits for the first answer, within its deadline; nobody after it waits."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import pytest
from played import Played

from conftest import Colour
from meshes import get_or_error
from meshlib import DeadlineExceeded, Mesh, NoEndpoints, ResolveError, Service, Timeout, report
from meshlib.testing import Upstream
from waiting import until

SLACK = 0.5
"""Seconds that a busy machine may be late."""

pytestmark = pytest.mark.usefixtures("hurry")


def test_C4_the_first_call_waits_for_the_first_answer(colour: Colour, upstream: Upstream) -> None:
    resolver = Played(upstream.address)
    resolver.hangs = True
    threading.Timer(0.2, lambda: setattr(resolver, "hangs", False)).start()
    with Mesh(Service("orders", resolver)) as mesh:
        assert colour.run(mesh, get_or_error).status_code == 200


def test_C4_an_answer_that_does_not_come_ends_at_the_deadline(colour: Colour) -> None:
    resolver = Played("10.0.0.1:80")
    resolver.hangs = True
    with Mesh(Service("orders", resolver, timeout=Timeout(total=0.3))) as mesh:
        began = time.monotonic()
        error = colour.run(mesh, get_or_error)
        assert 0.3 <= time.monotonic() - began < 0.3 + SLACK
    assert isinstance(error, DeadlineExceeded)
    assert str(error) == "orders: no answer within 0.3 s: its endpoints are not known yet (played: no answer yet)"
    assert isinstance(error.__cause__, ResolveError)
    assert report(error).attempts == []


def test_C4_what_went_wrong_is_said_at_the_deadline(colour: Colour) -> None:
    resolver = Played(source="toy:orders")
    resolver.fail(OSError("refused"))
    with Mesh(Service("orders", resolver, timeout=Timeout(total=0.3))) as mesh:
        error = colour.run(mesh, get_or_error)
    assert isinstance(error, DeadlineExceeded)
    assert "toy:orders: OSError: refused" in str(error)


def test_errors_before_the_first_answer_are_waited_out(colour: Colour, upstream: Upstream) -> None:
    resolver = Played(upstream.address)
    resolver.fail(OSError("refused"))
    threading.Timer(0.2, lambda: resolver.say(upstream.address)).start()
    with Mesh(Service("orders", resolver)) as mesh:
        assert colour.run(mesh, get_or_error).status_code == 200


def test_a_service_without_endpoints_says_so_once_that_is_sure(colour: Colour) -> None:
    with Mesh(Service("orders", Played(source="toy:"))) as mesh:
        error = colour.run(mesh, get_or_error)
    assert isinstance(error, NoEndpoints)
    assert "orders: it has no endpoint, as of 0 s ago (toy:)" in str(error)


@pytest.mark.parametrize("colour", ["asyncio", "trio"], indirect=True)
def test_C7_cancelling_the_wait_leaves_nothing(colour: Colour) -> None:
    import anyio

    resolver = Played("10.0.0.1:80")
    resolver.hangs = True
    with Mesh(Service("orders", resolver)) as mesh:

        async def script(client: httpx.AsyncClient) -> None:
            for _ in range(3):
                with anyio.move_on_after(0.05):
                    await client.get("/")
                    raise AssertionError("there is no answer")

        colour.run(mesh, script)
        pending: Any = mesh._clusters["orders"].pending
        assert pending._waiting == set()
        assert mesh.snapshot()["orders"].in_flight == 0


def test_C7_a_loop_that_has_gone_is_not_woken(upstream: Upstream) -> None:
    resolver = Played(upstream.address)
    resolver.hangs = True
    with Mesh(Service("orders", resolver)) as mesh:

        async def give_up() -> None:
            async with mesh.async_client("orders") as client:
                call = asyncio.ensure_future(client.get("/"))
                await asyncio.sleep(0.05)
                call.cancel()

        asyncio.run(give_up())
        resolver.hangs = False
        with mesh.client("orders") as client:
            assert client.get("/").status_code == 200


def test_S3_threads_and_loops_wait_for_one_answer(upstream: Upstream) -> None:
    resolver = Played(upstream.address)
    resolver.hangs = True
    answers: list[int] = []
    mesh = Mesh(Service("orders", resolver))

    def call() -> None:
        with mesh.client("orders") as client:
            answers.append(client.get("/").status_code)

    async def call_async() -> None:
        async with mesh.async_client("orders") as client:
            answers.extend(each.status_code for each in await asyncio.gather(*(client.get("/") for _ in range(5))))

    threads = [threading.Thread(target=call) for _ in range(8)]
    threads += [threading.Thread(target=lambda: asyncio.run(call_async())) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: resolver.asked)
    time.sleep(0.1)
    assert answers == []
    resolver.hangs = False
    for thread in threads:
        thread.join(10)
    mesh.close()
    assert answers == [200] * 23
    assert resolver.asked.count(None) == 1


def test_wait_ready_names_what_is_missing_and_why(colour: Colour) -> None:
    silent, broken = Played("10.0.0.1:80"), Played(source="toy:")
    silent.hangs = True
    broken.fail(OSError("refused"))
    services = [
        Service("a", ["10.0.0.1:80"]),
        Service("b", silent),
        Service("c", broken),
        Service("d", Played("10.0.0.1:80")),
    ]
    with Mesh(*services) as mesh:

        async def script(client: Any) -> Exception:
            with pytest.raises(ResolveError) as caught:
                await _ready(mesh, colour, 0.2)
            return caught.value

        began = time.monotonic()
        error = colour.run(mesh, script, service=None)
        assert 0.2 <= time.monotonic() - began < 0.2 + SLACK
        assert str(error) == (
            "not ready after 0.2 s: b: its endpoints are not known yet (played: no answer yet), "
            "c: its endpoints are not known yet (toy:: OSError: refused)"
        )
        silent.hangs = False
        broken.say("10.0.0.1:80")
        colour.run(mesh, lambda client: _ready(mesh, colour, 5), service=None)


async def _ready(mesh: Mesh, colour: Colour, timeout: float) -> None:
    if colour.is_sync:
        mesh.wait_ready(timeout)
    else:
        await mesh.await_ready(timeout)


def test_a_mesh_of_addresses_is_ready_and_runs_nothing() -> None:
    mesh = Mesh(Service("orders", ["10.0.0.1:80"]))
    before = threading.active_count()
    mesh.wait_ready(0)
    assert threading.active_count() == before
