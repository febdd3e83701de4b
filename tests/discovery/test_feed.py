"""Several resolvers, levels and names as one set of addresses."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest
from played import Played

from meshlib import Endpoint, Mesh, ResolveError, Service, report
from meshlib.control import Control
from meshlib.discovery import Failover, feed, hosts
from meshlib.discovery.feed import Membership
from meshlib.discovery.watch import Watches
from meshlib.testing import Upstream
from waiting import until

pytestmark = pytest.mark.usefixtures("hurry", "no_leaks")

A, B, C = "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"


def places(mesh: Mesh, name: str = "orders") -> list[str]:
    return [node.endpoint for node in mesh.snapshot()[name].nodes]


def priorities(mesh: Mesh) -> dict[str, int]:
    return {str(node.endpoint): node.endpoint.priority for node in mesh._clusters["orders"].view.nodes}


def test_a_failover_is_the_union_with_priorities_by_position() -> None:
    first, second = Played(A), Played(B, A)
    with Mesh(Service("orders", Failover(first, second))) as mesh:
        mesh.wait_ready(5)
        until(lambda: priorities(mesh) == {A: 0, B: 1})
        first.say(C)
        until(lambda: priorities(mesh) == {C: 0, A: 1, B: 1})
        assert mesh.snapshot()["orders"].source == "failover:played|played"


def test_D1_each_part_of_a_failover_keeps_its_own_last_good_set() -> None:
    first, second = Played(A), Played(B, source="second")
    with Mesh(Service("orders", Failover(first, second))) as mesh:
        until(lambda: _ready(mesh) and priorities(mesh) == {A: 0, B: 1})
        second.fail(OSError("refused"))
        first.say(C)
        until(lambda: priorities(mesh) == {C: 0, B: 1})
        until(lambda: mesh.snapshot()["orders"].warnings == ("second: OSError: refused",))


def _ready(mesh: Mesh) -> bool:
    mesh.wait_ready(5)
    return True


def test_only_a_failover_has_parts() -> None:
    class Own(Played):
        parts = ("of", "my", "own")

    with Mesh(Service("orders", Own(A))) as mesh:
        mesh.wait_ready(5)
        assert places(mesh) == [A]


def test_a_preferred_part_is_waited_for_until_it_has_had_its_say() -> None:
    first, second = Played(A), Played(B)
    first.hangs = True
    with Mesh(Service("orders", Failover(first, second))) as mesh:
        with pytest.raises(ResolveError):
            mesh.wait_ready(0.3)
        first.fail(OSError("refused"))
        first.hangs = False
        mesh.wait_ready(5)
        assert priorities(mesh) == {B: 0}
        first.say(A)
        until(lambda: priorities(mesh) == {A: 0, B: 1})


def test_a_preferred_part_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "HEAD_START", 0.2)
    first, second = Played(A), Played(B)
    first.hangs = True
    with Mesh(Service("orders", Failover(first, second))) as mesh:
        mesh.wait_ready(5)
        assert priorities(mesh) == {B: 0}
        first.hangs = False
        until(lambda: priorities(mesh) == {A: 0, B: 1})


def test_a_part_that_is_not_preferred_is_not_waited_for() -> None:
    first, second = Played(A), Played(B)
    second.hangs = True
    with Mesh(Service("orders", Failover(first, second))) as mesh:
        mesh.wait_ready(5)
        assert priorities(mesh) == {A: 0}


def test_D6_a_lower_level_is_called_when_those_above_it_are_not_to_be_called(fleet: list[Upstream]) -> None:
    first, second, third = fleet
    spare = Endpoint("127.0.0.1", third.port, priority=7)
    resolver = Played(first.address, second.address, spare)
    with Mesh(Service("orders", resolver)) as mesh, mesh.client("orders") as client:
        calls = [report(client.get("/")).attempts[-1].endpoint.port for _ in range(30)]
        assert third.port not in calls
        first.kill()
        second.kill()
        response = client.get("/")
        assert response.status_code == 200
        assert [each.endpoint.port for each in report(response).attempts][-1] == third.port


def test_names_are_looked_up_with_all_that_belongs_to_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hosts, "FILE", tmp_path / "hosts")
    monkeypatch.setattr(hosts, "TTL", 0.02)
    (tmp_path / "hosts").write_text("10.0.0.1 users.internal\n::1 users.internal\n10.0.0.2 old.internal\n")
    named = Endpoint("users.internal", 80, weight=3, zone="a", priority=1, metadata={"tags": "v2"})
    resolver = Played(named, "old.internal:81", "10.0.0.9:82")
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        until(lambda: len(places(mesh)) == 4)
        found = {str(node.endpoint): node.endpoint for node in mesh._clusters["orders"].view.nodes}
        assert set(found) == {"10.0.0.1:80", "[::1]:80", "10.0.0.2:81", "10.0.0.9:82"}
        first = found["10.0.0.1:80"]
        assert (first.weight, first.zone, first.priority) == (3, "a", 1)
        assert dict(first.metadata) == {"name": "users.internal", "tags": "v2"}
        (tmp_path / "hosts").write_text("10.0.0.7 users.internal\n10.0.0.2 old.internal\n")
        until(lambda: set(places(mesh)) == {"10.0.0.7:80", "10.0.0.2:81", "10.0.0.9:82"})
        resolver.say("10.0.0.9:82")
        until(lambda: places(mesh) == ["10.0.0.9:82"])
        assert not mesh.snapshot()["orders"].warnings


def test_names_in_a_list_are_looked_up_before_the_first_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, upstream: Upstream
) -> None:
    monkeypatch.setattr(hosts, "FILE", tmp_path / "hosts")
    (tmp_path / "hosts").write_text("127.0.0.1 users.internal\n")
    with Mesh(Service("users", [f"users.internal:{upstream.port}"])) as mesh, mesh.client("users") as client:
        assert client.get("/").status_code == 200
        assert places(mesh, "users") == [upstream.address]


def test_a_thousand_endpoints_do_not_hold_up_the_application() -> None:
    """Its loop does not pause for over 50 ms while sets of a thousand are compared and published."""
    import asyncio

    sets = [[f"10.{number}.{each // 250}.{each % 250 + 1}:80" for each in range(1000)] for number in (1, 2)]
    made = [[Endpoint.parse(each) for each in addresses] for addresses in sets]
    resolver = Played(*made[0])
    pauses: list[float] = []

    async def main() -> None:
        async with Mesh(Service("orders", resolver)) as mesh:
            await mesh.await_ready(10)
            for turn in range(6):
                seen = mesh._clusters["orders"].view
                resolver.say(*made[(turn + 1) % 2])
                end = time.monotonic() + 10
                while mesh._clusters["orders"].view is seen:
                    before = time.monotonic()
                    await asyncio.sleep(0.001)
                    pauses.append(time.monotonic() - before)
                    assert before < end

    asyncio.run(main())
    # A busy machine pauses, too; were it our doing, every one of the six would show.
    assert sum(pause > 0.05 for pause in pauses) < 5


async def _ended_with_news() -> bool:
    """Whether a feed ends that is told to in the moment in which there is news."""
    control, resolver = Control(random.Random(0)), Played(A, ttl=None)
    watches = Watches(control, time.monotonic, random.Random(0))
    told: list[Membership] = []
    following = feed.Feed(Service("orders", [A]), resolver, watches, told.append, time.monotonic)
    task = asyncio.create_task(following.run())
    while not told:
        await asyncio.sleep(0.01)
    await asyncio.sleep(feed.EVERY + 0.1)  # it waits for news again
    following._stir(True)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=1)
    return bool(done) and not watches._running


def test_a_feed_ends_even_if_there_is_news_in_that_moment() -> None:
    assert asyncio.run(_ended_with_news())
