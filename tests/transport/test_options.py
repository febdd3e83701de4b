"""`options` and `deadline`: what holds for the calls inside a block, a function, a task or a thread."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import httpx
import pytest

from conftest import Colour
from meshes import mesh_of, outcomes, refusing
from meshlib import (
    ConfigError,
    Connections,
    DeadlineExceeded,
    Mesh,
    RoundRobin,
    Service,
    Timeout,
    deadline,
    options,
    report,
)
from meshlib.scope import NOTHING, current_scope
from meshlib.testing import Upstream

HEADER = "x-meshlib-deadline-ms"
BUSY = 1.5
"""Seconds that a busy machine may add."""


@pytest.fixture
def hanging(upstream: Upstream) -> Upstream:
    """An upstream that never answers, so that a call lasts as long as its timeout."""
    upstream.script(then={"fault": "hang"})
    return upstream


async def seconds_of(doing: Awaitable[Any]) -> float:
    """How long a call lasted that ran out of time, to a tenth of a second if the machine is not busy."""
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await doing
    return time.monotonic() - began


def told(upstream: Upstream) -> list[int]:
    """What the requests said of the time left, in milliseconds; each says it once."""
    values = [request.values(HEADER) for request in upstream.log()]
    assert all(len(value) == 1 for value in values), values
    return [int(value) for [value] in values]


# Where options may stand


def test_options_hold_inside_a_block_and_not_outside(colour: Colour, hanging: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with options(timeout=0.2):
            assert 0.19 < await seconds_of(client.get("/")) < 0.2 + BUSY
            assert 0.19 < await seconds_of(client.get("/")) < 0.2 + BUSY  # for each call, not for the block
        assert current_scope().options == {}
        hanging.script()
        await client.get("/")

    colour.run(mesh_of(hanging, timeout=Timeout(total=30)), script)
    assert [left <= 200 for left in told(hanging)] == [True, True, False]


def test_options_decorate_a_function(no_leaks: None, hanging: Upstream) -> None:
    with mesh_of(hanging).client("orders") as client:

        @options(timeout=0.2)
        def get(path: str, *, query: str) -> httpx.Response:
            """Get it."""
            return client.get(path, params={"q": query})

        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                get("/x", query="1")
        assert current_scope().options == {}
    assert (get.__name__, get.__doc__) == ("get", "Get it.")
    assert [request.target for request in hanging.log()] == ["/x?q=1"] * 2
    assert max(told(hanging)) <= 200


def test_options_decorate_a_coroutine_function(no_leaks: None, hanging: Upstream) -> None:
    @options(timeout=0.2)
    async def get(client: httpx.AsyncClient, path: str) -> httpx.Response:
        """Get it."""
        await asyncio.sleep(0.01)  # what holds, holds after a switch of tasks too
        return await client.get(path)

    async def main() -> None:
        async with mesh_of(hanging).async_client("orders") as client:
            pending = get(client, "/x")
            assert current_scope().options == {}  # nothing holds before it is awaited
            assert 0.19 < await seconds_of(pending) < 0.2 + BUSY
            assert current_scope().options == {}

    asyncio.run(main())
    assert (get.__name__, get.__doc__) == ("get", "Get it.")
    assert asyncio.iscoroutinefunction(get)


def test_options_decorate_methods(no_leaks: None, hanging: Upstream) -> None:
    class Shop:
        def __init__(self, client: Any) -> None:
            self.client = client

        @options(timeout=0.2)
        def sync(self, path: str) -> None:
            self.client.get(path)

        @options(timeout=0.2)
        async def later(self, path: str) -> None:
            await self.client.get(path)

        @classmethod
        @options(timeout=0.3)
        def seen_by_class(cls) -> Any:
            return cls, current_scope().options["timeout"]

        @staticmethod
        @options(timeout=0.4)
        def seen_by_all() -> Any:
            return current_scope().options["timeout"]

    async def main() -> None:
        async with mesh_of(hanging).async_client("orders") as client:
            await seconds_of(Shop(client).later("/b"))

    with mesh_of(hanging).client("orders") as client, pytest.raises(DeadlineExceeded):
        Shop(client).sync("/a")
    asyncio.run(main())
    assert max(told(hanging)) <= 200
    assert Shop.seen_by_class() == (Shop, 0.3)
    assert Shop.seen_by_all() == 0.4


def test_options_decorate_an_object_that_is_called_and_awaited(no_leaks: None) -> None:
    class Handler:
        async def __call__(self) -> Any:
            await asyncio.sleep(0)
            return dict(current_scope().options)

    decorated: Callable[[], Any] = options(timeout=0.2)(Handler())
    assert asyncio.run(decorated()) == {"timeout": 0.2}


def test_options_leave_what_a_function_returns_and_raises_alone() -> None:
    @options(idempotent=True)
    def fail() -> None:
        raise KeyError("mine")

    @options(idempotent=True)
    async def later() -> int:
        return 7

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert current_scope().options == {}
    assert asyncio.run(later()) == 7


def test_options_end_with_a_function_that_is_cancelled() -> None:
    seen: list[Any] = []

    @options(timeout=0.2)
    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(current_scope().options)

    async def main() -> None:
        try:
            async with asyncio.timeout(0.05):
                await wait()
        except TimeoutError:
            seen.append(current_scope().options)

    asyncio.run(main())
    assert seen == [{"timeout": 0.2}, {}]


def test_options_refuse_generators() -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def later() -> AsyncIterator[int]:
        yield 1

    for function in (generator, later):
        for block in (options(timeout=1.0), deadline(1.0)):
            with pytest.raises(TypeError, match=rf"cannot decorate the generator .*{function.__name__}"):
                block(function)


# Which one wins


def test_a_request_wins_over_a_block_and_a_block_over_the_service(colour: Colour, hanging: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        await seconds_of(client.get("/service"))
        with options(timeout=0.2):
            await seconds_of(client.get("/block"))
            await seconds_of(client.get("/request", extensions={"meshlib": {"timeout": 0.3}}))
        await seconds_of(client.get("/request-alone", extensions={"meshlib": {"timeout": 0.3}}))

    colour.run(mesh_of(hanging, timeout=Timeout(total=0.4)), script)
    service, block, request, alone = told(hanging)
    assert 300 < service <= 400
    assert 100 < block <= 200
    assert 200 < request <= 300
    assert 200 < alone <= 300


def test_the_nearest_block_wins_and_the_outer_one_holds_again(colour: Colour, upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with options(timeout=20.0, idempotent=True):
            with options(timeout=40.0):
                await client.get("/")
                assert dict(current_scope().options) == {"timeout": 40.0, "idempotent": True}
            await client.get("/")
            with options(timeout=10.0), options(retry=False):
                await client.get("/")

    colour.run(mesh_of(upstream), script)
    inner, outer, third = told(upstream)
    assert 38_000 < inner <= 40_000  # a nearer block may allow more: only deadlines add up
    assert 18_000 < outer <= 20_000
    assert 8_000 < third <= 10_000


def test_a_decorator_inside_a_block_is_nearer(colour: Colour, upstream: Upstream) -> None:
    @options(timeout=40.0)
    async def inner(client: httpx.AsyncClient) -> None:
        await client.get("/")

    async def script(client: httpx.AsyncClient) -> None:
        with options(timeout=20.0):
            await inner(client)
            await client.get("/")

    colour.run(mesh_of(upstream), script)
    inside, outside = told(upstream)
    assert 38_000 < inside <= 40_000
    assert 18_000 < outside <= 20_000


def test_a_timeout_may_be_whole_settings(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"delay": 60})
    mesh = mesh_of(upstream, timeout=Timeout(total=30, attempt=30))

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        with options(timeout=Timeout(total=20.0, attempt=0.3)):
            return await client.get("/")

    assert outcomes(colour.run(mesh, script)) == [("first", "failed"), ("retry", "ok")]


def test_a_timeout_in_seconds_leaves_the_services_other_bounds(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"delay": 60})
    mesh = mesh_of(upstream, timeout=Timeout(total=30, attempt=0.3))

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        with options(timeout=20.0):
            return await client.get("/")

    assert outcomes(colour.run(mesh, script)) == [("first", "failed"), ("retry", "ok")]


def test_an_option_of_a_request_adds_to_those_of_the_block(colour: Colour, fleet: list[Upstream]) -> None:
    for upstream in fleet[:2]:
        upstream.script({"fault": "reset"})

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        with options(timeout=20.0):
            return [
                await client.post("/", content=b"x", extensions={"meshlib": {"idempotent": True}}) for _ in range(3)
            ]

    responses = colour.run(mesh_of(*fleet, balancer=RoundRobin()), script)
    assert any(len(report(response).attempts) > 1 for response in responses)
    assert max(max(told(upstream), default=0) for upstream in fleet) <= 20_000


# idempotent and retry


def test_C1_a_block_may_mark_requests_as_repeatable(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"fault": "reset"}, {}, {}, {"fault": "reset"})

    async def script(client: httpx.AsyncClient) -> None:
        with options(idempotent=True):
            assert outcomes(await client.post("/", content=b"x"))[0] == ("first", "failed")
        await client.get("/", headers={"connection": "close"})
        with pytest.raises(httpx.TransportError):
            await client.post("/", content=b"x")

    colour.run(mesh_of(upstream), script)
    assert len(upstream.log()) == 4


def test_C1_a_block_may_mark_requests_as_not_repeatable(colour: Colour, upstream: Upstream) -> None:
    upstream.script(then={"fault": "reset"})

    async def script(client: httpx.AsyncClient) -> None:
        with options(idempotent=False):
            for more in ({}, {"headers": {"idempotency-key": "1"}}):
                with pytest.raises(httpx.TransportError) as caught:
                    await client.get("/", **more)
                assert outcomes(caught.value) == [("first", "failed")]
            with pytest.raises(httpx.TransportError) as caught:
                await client.get("/", extensions={"meshlib": {"idempotent": True}})
            assert len(outcomes(caught.value)) == 3

    colour.run(mesh_of(upstream), script)
    assert len(upstream.log()) == 5


@pytest.mark.parametrize(
    "step", [{"status": 503}, {"fault": "reset"}, {"status": 429, "headers": {"retry-after": "0"}}]
)
def test_without_retry_what_may_have_arrived_is_not_repeated(
    colour: Colour, fleet: list[Upstream], step: dict[str, Any]
) -> None:
    for upstream in fleet:
        upstream.script(then=step)

    async def script(client: httpx.AsyncClient) -> Any:
        with options(retry=False):
            try:
                return await client.get("/")
            except httpx.TransportError as error:
                return error

    assert len(outcomes(colour.run(mesh_of(*fleet), script))) == 1
    assert sum(len(upstream.log()) for upstream in fleet) == 1


def test_without_retry_there_is_a_single_attempt_and_no_failover(colour: Colour, upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> list[Any]:
        results: list[Any] = []
        for _ in range(2):
            with options(retry=False):
                try:
                    results.append(await client.get("/"))
                except httpx.ConnectError as error:
                    results.append(error)
        return results

    with refusing() as dead:
        results = colour.run(mesh_of(dead, upstream, balancer=RoundRobin()), script)
    assert sorted(map(outcomes, results)) == [[("first", "not_sent")], [("first", "ok")]]


# Deadlines


def test_of_nested_deadlines_the_earliest_holds(colour: Colour, hanging: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with deadline(0.3):
            with deadline(60.0):
                assert await seconds_of(client.get("/")) < 0.3 + BUSY
            with deadline(0.0), pytest.raises(DeadlineExceeded):
                await client.get("/")
        with deadline(60.0), deadline(0.2):
            assert await seconds_of(client.get("/")) < 0.2 + BUSY

    colour.run(mesh_of(hanging), script)
    first, second = told(hanging)
    assert first <= 300
    assert second <= 200


def test_a_deadline_is_for_all_calls_of_its_block_together(colour: Colour, hanging: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        with deadline(0.4):
            await seconds_of(client.get("/", extensions={"meshlib": {"timeout": 0.2}}))
            await seconds_of(client.get("/"))
            await seconds_of(client.get("/"))
        assert 0.39 < time.monotonic() - began < 0.4 + BUSY

    colour.run(mesh_of(hanging), script)
    first, second = told(hanging)
    assert first <= 200
    assert second <= 200


def test_a_deadline_that_has_passed_allows_no_attempt(colour: Colour, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)

    async def script(client: httpx.AsyncClient) -> None:
        with deadline(0.05):
            await anyio.sleep(0.1)
            began = time.monotonic()
            for request in ({}, {"extensions": {"meshlib": {"timeout": 60.0}}}):
                with pytest.raises(DeadlineExceeded) as caught:
                    await client.get("/", **request)
                assert report(caught.value).attempts == []
                assert "-" not in str(caught.value), "less than no time is nonsense"
            assert time.monotonic() - began < BUSY
        assert (await client.get("/")).status_code == 200

    colour.run(mesh, script)
    assert len(upstream.log()) == 1
    assert mesh.snapshot()["orders"].nodes[0].attempts == 1


def test_a_deadline_and_a_timeout_bound_together(colour: Colour, upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with deadline(20.0), options(timeout=60.0):
            await client.get("/")
        with options(timeout=20.0), deadline(60.0):
            await client.get("/")
        with deadline(20.0):
            await client.get("/", extensions={"meshlib": {"timeout": 60.0}})

    colour.run(mesh_of(upstream), script)
    assert all(18_000 < left <= 20_000 for left in told(upstream))


def test_a_deadline_decorates_and_runs_from_the_call_on(no_leaks: None, upstream: Upstream) -> None:
    @deadline(20.0)
    def sync(client: httpx.Client) -> None:
        client.get("/")

    @deadline(20.0)
    async def later(client: httpx.AsyncClient) -> None:
        await client.get("/")

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            await later(client)

    mesh = mesh_of(upstream)
    time.sleep(0.2)
    with mesh.client("orders") as client:
        sync(client)
    asyncio.run(main())
    assert all(19_000 < left <= 20_000 for left in told(upstream))


def test_a_deadline_is_for_every_service(no_leaks: None, fleet: list[Upstream]) -> None:
    mesh = Mesh(*(Service(name, [each.address]) for name, each in zip(("orders", "users"), fleet, strict=False)))
    with mesh.client() as client, deadline(20.0):
        client.get("http://orders/")
        client.get("http://users/")
    assert [told(upstream)[0] <= 20_000 for upstream in fleet[:2]] == [True, True]


# Threads and tasks


def test_blocks_are_seen_in_threads_that_were_given_the_context(no_leaks: None, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)

    def call(path: str) -> None:
        with mesh.client("orders") as client:
            client.get(path)

    async def main() -> None:
        with options(timeout=20.0), deadline(10.0):
            await asyncio.to_thread(call, "/to_thread")
            await anyio.to_thread.run_sync(call, "/anyio")
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, contextvars.copy_context().run, call, "/copied")
            await loop.run_in_executor(None, call, "/bare")

    asyncio.run(main())
    left = {request.target: int(request.values(HEADER)[0]) for request in upstream.log()}
    assert left.pop("/bare") > 20_000
    assert set(left) == {"/to_thread", "/anyio", "/copied"}
    assert max(left.values()) <= 10_000


def test_blocks_are_seen_in_tasks_started_inside(no_leaks: None, upstream: Upstream) -> None:
    async def main() -> None:
        async with mesh_of(upstream).async_client("orders") as client:

            async def later(path: str) -> None:
                await asyncio.sleep(0.05)
                await client.get(path)

            with options(timeout=20.0):
                inside = asyncio.create_task(later("/inside"))
            outside = asyncio.create_task(later("/outside"))
            await asyncio.gather(inside, outside)  # by now the block is over

    asyncio.run(main())
    left = {request.target: int(request.values(HEADER)[0]) for request in upstream.log()}
    assert left["/inside"] <= 20_000 < left["/outside"]


def test_blocks_are_seen_in_the_tasks_of_trio(no_leaks: None, upstream: Upstream) -> None:
    import trio

    async def main() -> None:
        async with mesh_of(upstream).async_client("orders") as client, trio.open_nursery() as nursery:
            with options(timeout=20.0):
                nursery.start_soon(client.get, "/inside")
            nursery.start_soon(client.get, "/outside")

    trio.run(main)
    left = {request.target: int(request.values(HEADER)[0]) for request in upstream.log()}
    assert left["/inside"] <= 20_000 < left["/outside"]


def test_a_task_changes_nothing_for_the_others() -> None:
    async def one(seconds: float) -> None:
        with options(timeout=seconds):
            for _ in range(20):
                assert current_scope().options["timeout"] == seconds
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(one(float(number)) for number in range(1, 50)))
        assert current_scope().options == {}

    asyncio.run(main())


def test_a_block_that_is_left_before_those_inside_it_does_not_come_back() -> None:
    def within(*blocks: Any) -> Generator[None, None, None]:
        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block)
            yield

    def run() -> None:
        first, second = within(deadline(5.0), options(timeout=1.0)), within(options(retry=False))
        next(first)
        next(second)
        with options(idempotent=True):
            first.close()
        assert current_scope().options == {"timeout": 1.0, "retry": False}
        second.close()
        assert current_scope() is NOTHING

    contextvars.copy_context().run(run)


def test_a_block_that_is_left_in_another_context_ends_nobody_elses() -> None:
    block = options(timeout=1.0)

    async def enter() -> None:
        block.__enter__()

    async def main() -> None:
        with deadline(5.0):
            ours = current_scope()
            await asyncio.create_task(enter())
            block.__exit__(None, None, None)
            assert current_scope() is ours
        assert current_scope().deadline == float("inf")

    asyncio.run(main())


def test_one_object_may_be_used_by_many_at_once(no_leaks: None) -> None:
    shared, shared_deadline = options(timeout=3.0), deadline(9.0)

    @shared
    async def decorated(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
            assert current_scope().options["timeout"] == 3.0

    async def one(turns: int) -> None:
        with options(idempotent=True), shared, shared_deadline:
            for _ in range(turns):
                await asyncio.sleep(0)
                assert dict(current_scope().options) == {"idempotent": True, "timeout": 3.0}
            with options(timeout=1.0), shared:
                assert current_scope().options["timeout"] == 3.0
        assert current_scope().options == {}
        await decorated(turns)
        assert current_scope().options == {}

    async def main() -> None:
        await asyncio.gather(*(one(turns % 7) for turns in range(100)))

    def in_a_thread(turns: int) -> None:
        for _ in range(turns):
            with shared, shared:
                assert current_scope().options["timeout"] == 3.0
        assert current_scope().options == {}

    asyncio.run(main())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(in_a_thread, range(100)))


def test_a_shared_deadline_runs_anew_each_time() -> None:
    shared = deadline(5.0)
    with shared:
        first = current_scope().deadline
        time.sleep(0.02)
        with shared:
            assert current_scope().deadline == first
    with shared:
        assert current_scope().deadline > first


# What is refused


def test_an_unknown_option_is_a_type_error_that_names_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"options\(\) has no option 'timout'; known: timeout, idempotent"):
        options(timout=1.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"timeout": 0}, "timeout: must be > 0"),
        ({"timeout": -1.0}, "timeout: must be > 0"),
        ({"timeout": float("nan")}, "timeout: must be a finite number"),
        ({"timeout": float("inf")}, "timeout: must be a finite number"),
        ({"timeout": "2"}, "timeout: must be a finite number (seconds), or a Timeout, got '2'"),
        ({"timeout": True}, "timeout: must be a finite number"),
        ({"idempotent": "yes"}, "idempotent: must be True or False, got 'yes'"),
        ({"idempotent": 1}, "idempotent: must be True or False"),
        ({"retry": None}, "retry: must be True or False"),
        ({"body_deadline": 5}, "body_deadline: must be True or False"),
        ({"hash_key": 5}, "hash_key: must be a string"),
    ],
)
def test_a_bad_value_is_refused_where_it_is_written(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(**given)
    assert said in str(caught.value)


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        options(timeout=0, retry="no")
    assert [fault.path for fault in caught.value.faults] == ["timeout", "retry"]


@pytest.mark.parametrize("seconds", [-0.001, float("nan"), float("inf"), "1", None, True])
def test_a_bad_deadline_is_refused(seconds: Any) -> None:
    with pytest.raises(ConfigError, match=r"deadline\.seconds: must be"):
        deadline(seconds)


@pytest.mark.parametrize(
    ("given", "error"),
    [({"timeout": 0}, ConfigError), ({"idempotant": True}, TypeError), ({"retry": 1}, ConfigError)],
)
def test_a_bad_option_of_a_request_is_refused_before_it_is_sent(
    colour: Colour, upstream: Upstream, given: dict[str, Any], error: type[Exception]
) -> None:
    mesh = mesh_of(upstream)

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(error):
            await client.get("/", extensions={"meshlib": given})

    colour.run(mesh, script)
    assert upstream.log() == []
    assert mesh.snapshot()["orders"].in_flight == 0


# What the next hop is told


def test_the_next_hop_is_told_what_is_left(colour: Colour, upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        await client.get("/")
        with options(timeout=2.5):
            await client.get("/")

    colour.run(mesh_of(upstream, timeout=Timeout(total=20)), script)
    first, second = told(upstream)
    assert 18_000 < first <= 20_000
    assert 500 < second <= 2_500


def test_what_is_told_shrinks_from_attempt_to_attempt(colour: Colour, fleet: list[Upstream]) -> None:
    for upstream in fleet:
        upstream.script(then={"fault": "hang"})
    mesh = mesh_of(*fleet, timeout=Timeout(total=0.7, attempt=0.25))

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(DeadlineExceeded) as caught:
            await client.get("/")
        assert len(report(caught.value).attempts) == 3

    colour.run(mesh, script)
    requests = sorted((request for upstream in fleet for request in upstream.log()), key=lambda request: request.at)
    first, second, third = (int(request.values(HEADER)[0]) for request in requests)
    assert 0 < third <= 200
    assert third < second <= 450
    assert second < first <= 700


def test_what_is_told_is_always_more_than_nothing(no_leaks: None, upstream: Upstream) -> None:
    with mesh_of(upstream).client("orders") as client:
        client.get("/")
        for _ in range(20):
            with deadline(0.001):
                try:
                    client.get("/")
                except DeadlineExceeded:
                    pass
    assert min(told(upstream)) >= 1


def test_what_is_told_replaces_what_was_passed_in(colour: Colour, upstream: Upstream) -> None:
    given = [{HEADER: "5"}, {HEADER.title(): "999999999"}, [(HEADER, "1"), (HEADER.upper(), "2")]]

    async def script(client: httpx.AsyncClient) -> None:
        for headers in given:
            await client.get("/", headers=headers)

    colour.run(mesh_of(upstream, timeout=Timeout(total=20)), script)
    assert all(18_000 < left <= 20_000 for left in told(upstream))


def test_what_is_told_does_not_count_the_time_spent_in_our_own_queue(no_leaks: None, upstream: Upstream) -> None:
    upstream.script({"delay": 1.0})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1), timeout=Timeout(total=20))

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            await asyncio.gather(client.get("/"), client.get("/"))

    asyncio.run(main())
    assert told(upstream)[1] <= 19_050


def test_what_is_told_does_not_count_the_time_spent_on_draining(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script(then={"status": 503, "fault": "drip", "size": 1000})
    mesh = mesh_of(*fleet[:2], balancer=RoundRobin(), timeout=Timeout(total=20))

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(2):
            await client.get("/")

    colour.run(mesh, script)
    assert min(told(fleet[1])) <= 19_910  # a drip is drained for 0.1 s, on the next attempt's time


def test_nothing_is_told_where_that_is_turned_off(colour: Colour, upstream: Upstream) -> None:
    mesh = Mesh(Service("orders", [upstream.address]), send_deadline=False)

    async def script(client: httpx.AsyncClient) -> None:
        await client.get("/")
        with deadline(5.0), options(timeout=3.0):
            await client.get("/")
        await client.get("/", headers={HEADER: "77"})  # what an application sends by itself is its own business

    colour.run(mesh, script)
    assert [request.values(HEADER) for request in upstream.log()] == [[], [], ["77"]]


def test_the_callers_request_is_left_as_it_was(colour: Colour, upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        response = await client.get("/", headers={"x-a": "b"}, extensions={"meshlib": {"timeout": 5.0}})
        assert HEADER not in response.request.headers
        assert response.request.headers["host"] == "orders"
        assert response.request.extensions["meshlib"] == {"timeout": 5.0}
        assert str(response.url) == "http://orders/"

    colour.run(mesh_of(upstream), script)


def test_what_a_request_brings_must_be_a_dict(upstream: Upstream) -> None:
    with (
        mesh_of(upstream).client("orders") as client,
        pytest.raises(TypeError, match=r"must be a dict of options, .* int"),
    ):
        client.get("/", extensions={"meshlib": 5})
