"""Backup requests over real connections: who wins, what becomes of the loser, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import anyio
import httpx
import pytest
from doubles import Factory

from conftest import Colour
from meshes import get_or_error, mesh_of, over
from meshlib import TLS, Budget, Endpoint, Hedge, Mesh, Retry, RoundRobin, Service, Timeout, options, report
from meshlib.core.call import Call
from meshlib.testing import Upstream, upstreams
from meshlib.transport import race_sync
from meshlib.transport.stack import Connection

SLOW = {"delay": 1.0}
HANG = {"fault": "hang"}
BUSY = {"status": 503}
LATER = 0.25
"""Seconds after which an answer comes when a backup is under way."""


def in_order(*fleet: Upstream, **settings: Any) -> Mesh:
    """A mesh whose calls go to these in this order: the first, its backup, and then a retry."""
    endpoints = [Endpoint(each.host, each.port, priority=number) for number, each in enumerate(fleet)]
    return Mesh(Service("orders", endpoints, **{"hedge": Hedge(after=0.05), **settings}))


def soon(holds: Callable[[], bool], within: float = 3.0) -> bool:
    deadline = time.monotonic() + within
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def hedge_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "meshlib-hedge"]


def told(result: Any) -> list[tuple[str, str, object]]:
    return [(each.kind, str(each.outcome), each.status) for each in report(result).attempts]


@pytest.fixture(scope="module")
def started() -> Iterator[list[Upstream]]:
    """Starting three processes takes as long as three of these tests."""
    with upstreams(3) as fleet:
        yield fleet


@pytest.fixture
def three(started: list[Upstream], request: pytest.FixtureRequest) -> list[Upstream]:
    for each in started:
        each.script()
        each.clear()
    request.getfixturevalue("no_leaks")  # now that the control connections are there
    return started


@pytest.fixture
def pair(three: list[Upstream]) -> list[Upstream]:
    return three[:2]


def test_a_slow_endpoint_makes_no_GET_slow(pair: list[Upstream], colour: Colour) -> None:
    slow = {"delay": 5.0}
    pair[0].script(then=slow)
    mesh = mesh_of(*pair, balancer=RoundRobin(), hedge=Hedge(after=0.05))

    async def script(client: Any) -> tuple[list[float], list[Any]]:
        took, results = [], []
        for _ in range(20):
            started = time.monotonic()
            results.append(await client.get("/"))
            took.append(time.monotonic() - started)
        return took, results

    took, results = colour.run(mesh, script)
    assert max(took) < slow["delay"] / 2
    assert {result.status_code for result in results} == {200}
    # On a busy machine the other one may be late as well, and have a backup.
    hedged = [told(result) for result in results if report(result).attempts[0].endpoint.port == pair[0].port]
    assert len(hedged) >= 8
    assert all(each == [("first", "abandoned", None), ("hedge", "ok", 200)] for each in hedged)
    snapshot = mesh.snapshot()["orders"]
    assert snapshot.in_flight == sum(node.in_flight for node in snapshot.nodes) == 0
    assert {node.state for node in snapshot.nodes} == {"closed"}, "nobody is blamed"
    assert soon(lambda: pair[0].stats()["connections_open"] == 0, within=15.0)


def test_C1_a_POST_is_not_hedged_nor_is_a_body_that_is_no_bytes(pair: list[Upstream], colour: Colour) -> None:
    for each in pair:
        each.script(then={"delay": 0.12})
    mesh = in_order(*pair)

    async def script(client: Any) -> list[Any]:
        with options(retry=False):
            alone = await client.get("/")
        body = iter([b"x"]) if colour.is_sync else stream()
        return [alone, await client.post("/", content=b"x"), await client.put("/", content=body)]

    async def stream() -> Any:
        yield b"x"

    for result in colour.run(mesh, script):
        assert told(result) == [("first", "ok", 200)]
    assert pair[1].log() == []


WON = ("hedge", "ok", 200)
LOST = ("first", "abandoned", None)

SCRIPTS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str, object]], Any]] = {
    "the first wins": ([{"delay": LATER}, HANG, {}], [("first", "ok", 200), ("hedge", "abandoned", None)], 200),
    "the backup wins": ([HANG, {}, {}], [LOST, WON], 200),
    "a bad answer waits for the other": (
        [{"delay": LATER, **BUSY}, {"delay": 2 * LATER}, {}],
        [("first", "rejected", 503), WON],
        200,
    ),
    "so does a 500, which is not retried": (
        [{"delay": 2 * LATER}, {"status": 500}, {}],
        [("first", "ok", 200), ("hedge", "rejected", 500)],
        200,
    ),
    "the backup is lost": (
        [{"delay": LATER}, {"fault": "reset"}, {}],
        [("first", "ok", 200), ("hedge", "failed", None)],
        200,
    ),
    "both fail, and there is one retry": (
        [{"delay": LATER, **BUSY}, BUSY, {}],
        [("first", "rejected", 503), ("hedge", "rejected", 503), ("retry", "ok", 200)],
        200,
    ),
    "both are lost": (
        [{"delay": 2 * LATER, "fault": "reset"}, {"delay": LATER, "fault": "reset"}, {"fault": "reset"}],
        [("first", "failed", None), ("hedge", "failed", None), ("retry", "failed", None)],
        httpx.ReadError,
    ),
    "the bad answer is better than none": (
        [{"delay": LATER, **BUSY}, {"delay": 2 * LATER, "fault": "reset"}, {"fault": "reset"}],
        [("first", "rejected", 503), ("hedge", "failed", None), ("retry", "failed", None)],
        503,
    ),
}


def test_what_a_strategy_raises_about_the_backup_leaves_the_call(pair: list[Upstream], colour: Colour) -> None:
    class Mine(Exception):
        pass

    def raising(state: Any) -> bool:
        raise Mine

    pair[0].script(then={"delay": LATER, **BUSY})
    pair[1].script(then={"delay": 2 * LATER, **BUSY})
    mesh = in_order(*pair, retry=Retry(stop=raising), timeout=Timeout(total=5, attempt=2))

    async def script(client: Any) -> BaseException:
        with pytest.raises(Mine) as caught, nullcontext() if colour.is_sync else anyio.fail_after(10):
            await client.get("/")
        return caught.value

    assert told(colour.run(mesh, script)) == [("first", "rejected", 503), ("hedge", "rejected", 503)]
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_colour_runs_a_race_alike(three: list[Upstream], colour: Colour, script: str) -> None:
    steps, attempts, ends = SCRIPTS[script]
    for each, step in zip(three, steps, strict=True):
        each.script(then=step)
    mesh = in_order(*three, retry=Retry(max_attempts=2))
    started = time.monotonic()
    result = colour.run(mesh, get_or_error)
    assert told(result) == attempts
    assert (result.status_code if isinstance(result, httpx.Response) else type(result)) == ends
    assert time.monotonic() - started < 5
    assert mesh.snapshot()["orders"].in_flight == 0
    assert soon(lambda: not hedge_threads(), 0.5), "the thread of a backup that loses is free at once"


def test_over_TLS_a_loser_is_dropped_as_well(colour: Colour, certificates: tuple[str, str]) -> None:
    bundle, certificate = certificates
    with upstreams(2, cert=certificate) as pair:
        pair[0].script(then=HANG)
        mesh = in_order(*pair, tls=TLS(verify=bundle))
        result = colour.run(mesh, get_or_error)
        assert told(result) == [LOST, WON]
        assert mesh.snapshot()["orders"].in_flight == 0
        assert soon(lambda: pair[0].stats()["connections_open"] == 0)


def test_the_deadline_ends_both(pair: list[Upstream], colour: Colour) -> None:
    for each in pair:
        each.script(then=HANG)
    mesh = in_order(*pair, timeout=Timeout(total=0.3))
    started = time.monotonic()
    error = colour.run(mesh, get_or_error)
    assert time.monotonic() - started < 1.5
    assert type(error).__name__ == "DeadlineExceeded"
    assert [each[0] for each in told(error)] == ["first", "hedge"]
    assert mesh.snapshot()["orders"].in_flight == 0
    assert soon(lambda: [each.stats()["connections_open"] for each in pair] == [0, 0])


def test_what_the_decision_on_a_retry_raises_ends_the_call(
    pair: list[Upstream], colour: Colour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a user's own function, called for the last of the two, in whichever thread that is."""

    def raises(*args: Any) -> None:
        raise LookupError("the user's own")

    monkeypatch.setattr(Call, "_follow", raises)
    pair[0].script(then={"delay": LATER, **BUSY})
    pair[1].script(then={"delay": 2 * LATER, **BUSY})
    mesh = in_order(*pair)
    assert type(colour.run(mesh, get_or_error)) is LookupError
    assert mesh.snapshot()["orders"].in_flight == 0


# Cancelling


def test_C7_a_race_cancelled_after_any_number_of_turns_leaks_nothing(pair: list[Upstream]) -> None:
    plenty = 1e6
    mesh = in_order(*pair, hedge=Hedge(after=1e-5), retry=Retry(budget=Budget(capacity=plenty)))

    async def cancelled_after(client: httpx.AsyncClient, turns: int) -> bool:
        task = asyncio.ensure_future(client.get("/"))
        for _ in range(turns):
            await asyncio.sleep(0)
        was_running = task.cancel()
        await asyncio.wait([task])
        assert mesh.snapshot()["orders"].in_flight == 0, f"after {turns} turns"
        if was_running:
            assert task.cancelled()
        else:
            assert task.result().status_code == 200
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        stacks = list(client._transport._stacks._all_stacks())  # type: ignore[attr-defined]
        assert sum(stack.size - len(stack._idle) for stack in stacks) == 0, f"after {turns} turns"
        return was_running

    async def main() -> int:
        turns = 0
        while turns < 400:
            async with mesh.async_client("orders") as client:
                if not await cancelled_after(client, turns):
                    break
            turns += 1 if turns < 60 else 20
        return turns

    assert asyncio.run(main()) >= 3
    assert mesh.snapshot()["orders"].budget_tokens <= plenty - 14, "there were backups"


@pytest.mark.parametrize("name", ["asyncio", "trio"])
@pytest.mark.parametrize("first", [HANG, {"delay": LATER, **BUSY}], ids=["both under way", "one is in"])
def test_C7_cancelling_a_race_drops_both(pair: list[Upstream], name: str, first: dict[str, Any]) -> None:
    import anyio

    pair[0].script(then=first)
    pair[1].script(then=HANG)
    mesh = in_order(*pair)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            with anyio.move_on_after(0.3) as scope:
                await client.get("/")
            assert scope.cancelled_caught
            assert mesh.snapshot()["orders"].in_flight == 0
            await anyio.sleep(0.01)
            stacks = list(client._transport._stacks._all_stacks())  # type: ignore[attr-defined]
            assert [stack.size for stack in stacks] == [0, 0]

    anyio.run(main, backend=name)
    assert {node.state for node in mesh.snapshot()["orders"].nodes} == {"closed"}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Whatever started the tests: who is started in the background by a shell ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_C7_a_thread_that_is_interrupted_in_a_race_drops_both(interruptible: None, pair: list[Upstream]) -> None:
    for each in pair:
        each.script(then=HANG)
    mesh = in_order(*pair)
    with mesh.client("orders") as client:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            client.get("/")
        timer.join()
        assert mesh.snapshot()["orders"].in_flight == 0
        assert soon(lambda: not hedge_threads(), 0.5)


def test_an_interrupt_at_the_very_moment_of_losing_is_not_lost(
    pair: list[Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Connection.send

    def interrupted(connection: Connection, exchange: Any, attempt: Any) -> Any:
        try:
            return send(connection, exchange, attempt)
        finally:
            if attempt.kind == "first":
                raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "send", interrupted)
    pair[0].script(then=HANG)
    mesh = in_order(*pair)
    with mesh.client("orders") as client:
        with pytest.raises(KeyboardInterrupt):
            client.get("/")
        assert mesh.snapshot()["orders"].in_flight == 0


def test_C7_a_backup_that_loses_while_it_connects_sends_nothing(pair: list[Upstream]) -> None:
    pair[0].script(then={"delay": LATER})
    mesh = in_order(*pair)
    with mesh.client("orders") as client:
        stacks = client._transport._stacks  # type: ignore[attr-defined]
        take = stacks.take

        def slowly(exchange: Any, attempt: Any) -> Any:
            if attempt.kind == "hedge":
                time.sleep(3 * LATER)
            return take(exchange, attempt)

        stacks.take = slowly
        assert told(client.get("/")) == [("first", "ok", 200), ("hedge", "abandoned", None)]
        assert mesh.snapshot()["orders"].in_flight == 0
        assert soon(lambda: not hedge_threads())
    assert pair[1].log() == []
    assert soon(lambda: pair[1].stats()["connections_open"] == 0)


def test_C7_a_race_whose_coroutine_is_closed_cleans_up_without_a_loop(pair: list[Upstream]) -> None:
    for each in pair:
        each.script(then=HANG)
    mesh = in_order(*pair)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            call = client.get("/")
            task = asyncio.ensure_future(call)
            await asyncio.sleep(0.2)
            assert mesh.snapshot()["orders"].in_flight == 2
            call.close()
            assert mesh.snapshot()["orders"].in_flight == 0
            stacks = list(client._transport._stacks._all_stacks())  # type: ignore[attr-defined]
            assert [stack.size for stack in stacks] == [0, 0]
            task.cancel()
            await asyncio.wait([task])
            task.cancelled() or task.exception()

    asyncio.run(main())


# Load


def test_a_fleet_that_is_slow_as_a_whole_gets_no_more_than_the_share(pair: list[Upstream]) -> None:
    share, calls = 0.05, 400
    mesh = mesh_of(*pair, hedge=Hedge(max_extra=share))

    async def main() -> list[Any]:
        async with mesh.async_client("orders") as client:
            results = [await client.get("/") for _ in range(60)]
            for each in pair:
                each.script(then={"delay": 0.1})
            numbers = iter(range(calls - 60))

            async def work() -> list[Any]:
                return [await client.get("/") for _ in numbers]

            return sum(await asyncio.gather(*(work() for _ in range(20))), results)

    results = asyncio.run(main())
    hedges = sum(attempt.kind == "hedge" for result in results for attempt in report(result).attempts)
    assert 2 <= hedges <= share * calls, "it does hedge those that take longer than they used to"
    assert sum(len(each.log()) for each in pair) <= calls + hedges
    assert mesh.snapshot()["orders"].in_flight == 0


def test_fifty_threads_hedge_at_once(pair: list[Upstream]) -> None:
    pair[0].script(then={"delay": 2.0})
    mesh = mesh_of(*pair, balancer=RoundRobin(), hedge=Hedge(after=0.05))
    took: list[float] = []

    def work(client: httpx.Client) -> None:
        for _ in range(4):
            started = time.monotonic()
            assert client.get("/").status_code == 200
            took.append(time.monotonic() - started)

    with mesh.client("orders") as client:
        threads = [threading.Thread(target=work, args=(client,)) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert mesh.snapshot()["orders"].in_flight == 0
        assert soon(lambda: not hedge_threads(), 0.5)
    assert len(took) == 200
    # The budget pays for some 35 backups at once, and for the next when those have been of use.
    assert sum(each > 1.5 for each in took) < 40


def test_where_there_is_no_thread_for_a_backup_the_call_goes_without(
    pair: list[Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair[0].script(then={"delay": 0.3})
    mesh = in_order(*pair)
    with mesh.client("orders") as client:
        with monkeypatch.context() as patch:
            patch.setattr(race_sync.room, "free", threading.Semaphore(0))
            assert told(client.get("/")) == [("first", "ok", 200)]
            patch.setattr(race_sync.room, "free", threading.Semaphore(1))

            def refused(thread: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", refused)
            assert told(client.get("/")) == [("first", "ok", 200), ("hedge", "abandoned", None)]
            assert race_sync.room.free._value == 1
        assert mesh.snapshot()["orders"].in_flight == 0
        assert told(client.get("/")) == [LOST, WON]


# Other transports


def test_over_an_inner_transport_async_calls_are_hedged_and_sync_ones_are_not(no_leaks: None) -> None:
    places = ["10.0.0.1:80", "10.0.0.2:80"]

    def slow(request: httpx.Request) -> httpx.Response:
        time.sleep(0.1)
        return httpx.Response(200)

    sync = over(*places, inner=Factory(dict.fromkeys(places, slow)), hedge=Hedge(after=0.01))
    with sync.client("orders") as client:
        assert told(client.get("/")) == [("first", "ok", 200)]

    async def main() -> None:
        factory = Factory()
        mesh = over(*places, inner=factory, hedge=Hedge(after=0.3))
        async with mesh.async_client("orders") as client:
            await client.get("/")
            factory.made[0]._hang = True  # and the other is next in turn
            results = [told(await client.get("/")) for _ in range(2)]
            assert results == [[("first", "ok", 200)], [LOST, WON]]
            assert factory.made[0].cancelled == 1
            assert mesh.snapshot()["orders"].in_flight == 0

    asyncio.run(main())
