"""What `meshlib.testing` gives to users' own tests: faults below a mesh, a clock, a resolver and no waits."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from conftest import Colour, Secured
from meshes import get_or_error, mesh_of, outcomes, over, post_or_error, refusing
from meshlib import (
    Breaker,
    ConfigError,
    DeadlineExceeded,
    Hedge,
    Mesh,
    NoEndpoints,
    ResolveError,
    Retry,
    RoundRobin,
    Service,
    Timeout,
    UnknownService,
    report,
)
from meshlib.core.call import Call
from meshlib.testing import ManualClock, ManualResolver, Upstream, faults, no_backoff, upstreams
from meshlib.transport.connections import AsyncStacks, SyncStacks
from meshlib.transport.inner import AsyncInnerStacks, InnerStacks

NOWHERE = ["127.0.0.1:1", "127.0.0.2:1", "127.0.0.3:1"]

BEFORE = [vars(each)["take"] for each in (SyncStacks, AsyncStacks, InnerStacks, AsyncInnerStacks)]


def nowhere(**settings: Any) -> Mesh:
    """A mesh whose endpoints are called in turn, and refuse all connections."""
    return Mesh(Service("orders", NOWHERE, **{"balancer": RoundRobin(), **settings}))


@pytest.fixture(scope="module")
def started() -> Iterator[list[Upstream]]:
    with upstreams(3) as fleet:
        for each in fleet:
            each.script()  # opens what it is told things by, which is no leak of the first test that looks for some
        yield fleet


@pytest.fixture
def fleet(started: list[Upstream]) -> list[Upstream]:
    """Three upstreams that have forgotten the test before."""
    for each in started:
        each.script()
        each.clear()
    return started


@pytest.fixture
def upstream(fleet: list[Upstream]) -> Upstream:
    return fleet[0]


# Faults


@pytest.mark.parametrize(
    ("played", "kinds"),
    [
        ({"fail": 1.0}, ["failed"] * 3),
        ({"fail": 1.0, "status": 503}, ["rejected"] * 3),
        ({"hang": 1.0}, ["failed"] * 3),
        ({"refuse": 1.0}, ["not_sent"] * 5),
    ],
    ids=str,
)
def test_an_attempt_that_is_played_ends_as_a_real_one(colour: Colour, played: Any, kinds: list[str]) -> None:
    mesh = nowhere(timeout=Timeout(total=5, attempt=0.05))
    with faults(mesh, "orders", **played) as found, no_backoff():
        result = colour.run(mesh, get_or_error)
        once = colour.run(mesh, post_or_error)
    assert [outcome for _, outcome in outcomes(result)] == kinds
    assert [outcome for _, outcome in outcomes(once)] == (kinds if played.get("refuse") else kinds[:1])
    errors = {"fail": httpx.ReadError, "hang": httpx.ReadTimeout, "refuse": httpx.ConnectError}
    if "status" in played:
        assert result.status_code == 503
    else:
        assert type(result) is errors[next(iter(played))]
    assert found.attempts == found.hit == len(outcomes(result)) + len(outcomes(once))


def test_breakers_and_the_snapshot_see_it(colour: Colour) -> None:
    mesh = nowhere(retry=Retry(max_attempts=1), breaker=Breaker(consecutive=2))

    async def script(client: Any) -> None:
        with contextlib.ExitStack() as stack:
            for place, given in zip(NOWHERE, ({}, {"status": 200}, {"status": 404}), strict=True):
                stack.enter_context(faults(mesh, "orders", fail=1.0, endpoint=place, **given))
            for _ in range(6):
                await get_or_error(client)

    colour.run(mesh, script)
    after = mesh.snapshot()["orders"]
    states = {str(node.endpoint): node.state for node in after.nodes}
    assert [states[place] for place in NOWHERE] == ["open", "closed", "closed"]
    assert after.nodes[0].failures == 2
    assert after.in_flight == 0


def test_a_share_of_attempts_fails_the_same_in_each_run(upstream: Upstream, no_leaks: None) -> None:
    def run(**given: Any) -> list[int]:
        with (
            mesh_of(upstream, retry=Retry(max_attempts=1), breaker=Breaker(enforce=False)) as mesh,
            mesh.client("orders") as client,
            faults(mesh, "orders", fail=0.3, status=500, **given),
        ):
            return [client.get("/").status_code for _ in range(100)]

    first, again, other = run(), run(), run(rng=random.Random(7))
    assert first == again != other
    assert 20 <= first.count(500) <= 40
    assert first.count(200) == 100 - first.count(500)


def test_a_late_attempt_is_made_for_real_and_seen_as_slow(colour: Colour, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)

    async def script(client: Any) -> list[Any]:
        before = await client.get("/")
        with faults(mesh, "orders", latency=0.5):
            slow = await client.get("/")
        return [before, slow, await client.get("/")]

    before, slow, after = colour.run(mesh, script)
    seconds = [report(each).attempts[0].seconds for each in (before, slow, after)]
    assert seconds[1] > 0.49 > max(seconds[0], seconds[2])
    assert len({each.connection for each in upstream.log()}) == 1


def test_what_is_later_than_its_time_is_a_timeout_of_what_was_sent(colour: Colour, upstream: Upstream) -> None:
    mesh = mesh_of(upstream, timeout=Timeout(total=5, attempt=0.05), retry=Retry(max_attempts=1))
    with faults(mesh, "orders", latency=1.0):
        late = colour.run(mesh, post_or_error)
    assert type(late) is httpx.ReadTimeout
    assert outcomes(late) == [("first", "failed")]
    mesh = mesh_of(upstream, timeout=Timeout(total=30), retry=Retry(max_attempts=1))
    with faults(mesh, "orders", hang=1.0):
        late = colour.run(mesh, get_or_error, timeout=httpx.Timeout(None, read=0.02))
    assert report(late).attempts[0].seconds < 5, "the client's own, where the mesh would allow 10"


def test_what_TLS_sends_by_itself_does_not_make_an_attempt_less_late(secured: Secured) -> None:
    with secured.mesh() as mesh, mesh.client("orders") as client, faults(mesh, "orders", latency=0.1):
        assert [report(client.get("/")).attempts[0].seconds > 0.09 for _ in range(2)] == [True, True]


def test_the_deadline_of_a_call_ends_a_hang(colour: Colour) -> None:
    mesh = nowhere(timeout=Timeout(total=0.1))
    started = time.monotonic()
    with faults(mesh, "orders", hang=1.0):
        late = colour.run(mesh, get_or_error)
    assert type(late) is DeadlineExceeded
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("played", [{"hang": 1.0}, {"latency": 5.0}], ids=str)
def test_a_hedge_answers_for_an_endpoint_that_is_slow(colour: Colour, fleet: list[Upstream], played: Any) -> None:
    mesh = mesh_of(*fleet[:2], balancer=RoundRobin(), hedge=Hedge(after=0.05))

    async def script(client: Any) -> list[Any]:
        with faults(mesh, "orders", endpoint=fleet[0].address, **played):
            return [await client.get("/") for _ in range(4)]

    started = time.monotonic()
    answers = colour.run(mesh, script)
    assert [each.status_code for each in answers] == [200] * 4
    assert ("hedge", "ok") in [each for answer in answers for each in outcomes(answer)]
    assert time.monotonic() - started < 4.9
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_faults_are_played_over_inner_transports_as_well(is_async: bool) -> None:
    mesh = over("127.0.0.1:1", inner=lambda endpoint: httpx.MockTransport(lambda request: httpx.Response(200)))
    colour = Colour("asyncio" if is_async else "sync")

    async def script(client: Any) -> list[Any]:
        with faults(mesh, "orders", fail=1.0, status=500):
            failed = await client.get("/")
        with faults(mesh, "orders", latency=0.05):
            late = await client.get("/")
        return [failed.status_code, late.status_code, report(late).attempts[0].seconds >= 0.045]

    assert colour.run(mesh, script) == [500, 200, True]


def test_faults_reach_one_service_of_one_mesh_and_add_up() -> None:
    def answering(endpoint: Any) -> Any:
        return httpx.MockTransport(lambda request: httpx.Response(200))

    mesh = Mesh(Service("orders", ["127.0.0.1:1"]), Service("users", ["127.0.0.1:2"]), inner=answering)
    other = Mesh(Service("orders", ["127.0.0.1:1"]), inner=answering)
    with mesh.client() as client, other.client("orders") as elsewhere:

        def told() -> list[int]:
            return [client.get("http://orders/").status_code, client.get("http://users/").status_code]

        with faults(mesh, "orders", fail=1.0, status=500), faults(mesh, "users", fail=1.0, status=501) as users:
            assert (told(), elsewhere.get("/").status_code) == ([500, 501], 200)
            with faults(mesh, "orders", latency=0.03), faults(mesh, "orders", latency=0.03, fail=1.0, status=505):
                failed = client.get("http://orders/")
        assert failed.status_code == 500
        assert report(failed).attempts[0].seconds >= 0.055
        assert users.attempts == users.hit == 1
        assert told() == [200, 200]


def test_nothing_of_it_is_left_outside() -> None:
    mesh = nowhere()
    with pytest.raises(ZeroDivisionError), faults(mesh, "orders", fail=1.0), no_backoff():
        1 / 0  # noqa: B018
    first, second = faults(mesh, "orders", fail=1.0), faults(mesh, "orders", hang=1.0)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert [vars(each)["take"] for each in (SyncStacks, AsyncStacks, InnerStacks, AsyncInnerStacks)] == BEFORE
    assert Call._go_on.__module__ == "meshlib.core.call"


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({}, ConfigError, r"faults: nothing is to go wrong: give fail=, hang= or refuse=, .* or latency=.*fail=0\.3"),
        ({"endpoint": "10.0.0.1:80"}, ConfigError, r"faults: nothing is to go wrong"),
        (
            {"fail": 1.5},
            ConfigError,
            r"faults\.fail: must be <= 1 \(a share of the attempts: 1 is all of them\), got 1\.5",
        ),
        ({"fail": 0.6, "hang": 0.6}, ConfigError, r"must be 1 at most together, got 1\.2"),
        ({"status": 503}, ConfigError, r"faults\.status: says how attempts fail: give fail="),
        ({"fail": 1, "status": 99}, ConfigError, r"faults\.status: must be from 200 to 599, got 99"),
        ({"latency": -1}, ConfigError, r"faults\.latency: must be >= 0 \(seconds\), got -1"),
        ({"fail": 1, "endpoint": "127.0.0.9:1"}, ValueError, r"orders has no endpoint 127\.0\.0\.9:1 \(known: 127\."),
    ],
)
def test_faults_that_cannot_be_say_why(given: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said), faults(nowhere(), "orders", **given):
        pass
    with faults(nowhere(), "orders", fail=0.0):
        pass  # the first of several shares that are tried
    with pytest.raises(UnknownService), faults(nowhere(), "ordrs", fail=1.0):
        pass


def test_cancelling_a_played_hang_leaves_nothing(no_leaks: None) -> None:
    mesh = nowhere()

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            with faults(mesh, "orders", hang=1.0), pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.get("/")

    asyncio.run(main())
    gc.collect()
    assert mesh.snapshot()["orders"].in_flight == 0


# No waits


def test_without_backoff_retries_follow_at_once(colour: Colour, upstream: Upstream) -> None:
    mesh = mesh_of(upstream, retry=Retry(wait=lambda state: 8.0, max_attempts=3))
    upstream.script({"status": 503}, {"status": 503})
    started = time.monotonic()
    with no_backoff():
        with no_backoff():
            pass
        answer = colour.run(mesh, get_or_error)
    assert answer.status_code == 200
    assert [each.waited for each in report(answer).attempts] == [0.0, 0.0, 0.0]
    assert time.monotonic() - started < 4


def test_without_backoff_what_does_not_fit_into_the_deadline_does_not_follow(upstream: Upstream) -> None:
    upstream.script(then={"status": 503, "headers": {"retry-after": "60"}})
    with no_backoff(), mesh_of(upstream).client("orders") as client:
        assert outcomes(client.get("/")) == [("first", "rejected")]


# The clock


def test_by_a_clock_that_is_turned_by_hand_a_breakers_minute_takes_no_time(colour: Colour, upstream: Upstream) -> None:
    clock = ManualClock()
    once = Retry(max_attempts=1)
    mesh = Mesh(Service("orders", [upstream.address, NOWHERE[0]], retry=once, balancer=RoundRobin()), clock=clock)
    upstream.script(*[{"status": 500}] * 5)

    async def script(client: Any) -> list[str]:
        states = []
        with faults(mesh, "orders", fail=1.0, status=404, endpoint=NOWHERE[0]):
            for seconds in (0.0, 1.0, 60.0):
                clock.advance(seconds)
                for _ in range(10):
                    await client.get("/")
                states.append(mesh.snapshot()["orders"].nodes[0].state)
        return states

    assert colour.run(mesh, script) == ["open", "open", "closed"]


def test_by_that_clock_a_hang_takes_no_time(colour: Colour) -> None:
    clock = ManualClock()
    mesh = Mesh(Service("orders", NOWHERE, timeout=Timeout(total=300, attempt=100)), clock=clock)
    started = time.monotonic()
    with faults(mesh, "orders", hang=1.0), no_backoff():
        late = colour.run(mesh, get_or_error)
    assert type(late) is DeadlineExceeded
    assert [round(each.seconds) for each in report(late).attempts] == [100, 100, 100]
    assert clock() == pytest.approx(1300)
    assert time.monotonic() - started < 5


# The resolver


def test_endpoints_that_are_set_are_called_at_once(no_leaks: None, fleet: list[Upstream]) -> None:
    resolver = ManualResolver([fleet[0].address])
    with Mesh(Service("orders", resolver)) as mesh, mesh.client("orders") as client:
        started = time.monotonic()
        for number in [0, 1, 2] * 5:
            resolver.set([fleet[number].address])
            assert client.get("/").headers["x-upstream"] == fleet[number].name
        resolver.set([])
        with pytest.raises(NoEndpoints):
            client.get("/")
        resolver.set([fleet[0].address])
        assert client.get("/").status_code == 200
        assert time.monotonic() - started < 5


def test_D5_endpoints_that_are_refused_are_answered_once(no_leaks: None) -> None:
    # The guard: `_is_refused`; without it they are answered again and again, and `set` waits in vain.
    resolver = ManualResolver(["127.0.0.1:9"])
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        began = time.monotonic()
        resolver.set(["169.254.169.254:80"])
        assert time.monotonic() - began < 4
        found = mesh.snapshot()["orders"]
        assert [node.endpoint for node in found.nodes] == ["127.0.0.1:9"]
        assert "none of its endpoints may be called" in str(found.warnings)
        resolver.set(["127.0.0.1:10"])
        assert [node.endpoint for node in mesh.snapshot()["orders"].nodes] == ["127.0.0.1:10"]


def test_an_error_of_the_resolver_keeps_what_was_known(upstream: Upstream, no_leaks: None) -> None:
    resolver = ManualResolver([upstream.address])
    with Mesh(Service("orders", resolver), Service("again", resolver)) as mesh, mesh.client("orders") as client:
        assert client.get("/").status_code == client.get("http://again/").status_code == 200
        resolver.fail(OSError("down"))
        assert "OSError: down" in str(mesh.snapshot()["orders"].warnings)
        assert client.get("/").status_code == 200
        resolver.set([upstream.address])
        assert mesh.snapshot()["orders"].warnings == ()
        assert mesh.snapshot()["again"].warnings == ()


def test_an_error_from_the_start_leaves_nobody_to_call(no_leaks: None) -> None:
    resolver = ManualResolver()
    resolver.fail(OSError("down"))
    with Mesh(Service("orders", resolver, timeout=Timeout(total=0.2))) as mesh, mesh.client("orders") as client:
        with pytest.raises(DeadlineExceeded, match="OSError: down"):
            client.get("/")
        with pytest.raises(ResolveError, match="OSError: down"):
            mesh.wait_ready(0.1)
        with refusing() as address:
            resolver.set([address])
            with pytest.raises(httpx.ConnectError):
                client.get("/")
