"""A warm mesh over a real Consul fails no call, whatever happens to Consul, and sees changes within seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from load import Load

from components.absence import demanded
from components.consul import Agent, binary, cluster
from meshlib import Mesh, RoundRobin, Service
from meshlib.testing import Upstream, upstreams
from waiting import until

pytestmark = pytest.mark.component


@pytest.fixture(scope="module", autouse=True)
def _consul_is_there() -> None:
    demanded("Consul", binary)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with Agent(tmp_path) as started:
        yield started


def mesh_over(agent: Agent) -> Mesh:
    return Mesh(Service("orders", f"consul://{agent.address}/orders", balancer=RoundRobin()))


def places(mesh: Mesh) -> set[str]:
    return {node.endpoint for node in mesh.snapshot()["orders"].nodes}


def test_D4_consul_is_gone_for_20_s_and_comes_back_empty(agent: Agent) -> None:
    with upstreams(4) as started:
        old, new = started[:2], started[2:]
        for each in old:
            agent.register("orders", each.port)
        with mesh_over(agent) as mesh, Load(mesh) as load:
            load.wait_for(*(each.address for each in old))
            agent.kill()
            time.sleep(20)
            load.wait_for(*(each.address for each in old))
            assert 18 < mesh.snapshot()["orders"].age < 60
            agent.start()
            for each in new:
                agent.register("orders", each.port)
            took = load.wait_for(*(each.address for each in new), seconds=10)
            until(lambda: places(mesh) == {each.address for each in new})
            for each in old:
                each.kill()
            load.wait_for(*(each.address for each in new))
        assert load.failed == []
        assert took < 5
        assert len(load.answered) == 4


def test_D4_the_leader_is_lost(tmp_path: Path, fleet: list[Upstream]) -> None:
    with cluster(tmp_path, 3) as (leader, follower, _):
        for each in fleet[:2]:
            follower.register("orders", each.port)
        with mesh_over(follower) as mesh, Load(mesh) as load:
            load.wait_for(*(each.address for each in fleet[:2]))
            leader.kill()
            time.sleep(3)
            until(follower._has_leader, 20)
            follower.register("orders", fleet[2].port)
            load.wait_for(fleet[2].address, seconds=10)
        assert load.failed == []


def test_D4_what_comes_and_goes_is_seen_within_2_s(agent: Agent, fleet: list[Upstream]) -> None:
    first, second, third = fleet
    for each in fleet[:2]:
        agent.register("orders", each.port)
    with mesh_over(agent) as mesh, Load(mesh) as load:
        load.wait_for(first.address, second.address)
        agent.register("orders", third.port, Check={"TTL": "10m"})
        time.sleep(1)
        assert not load.answered[third.address], "it is critical until its check passes"
        agent.mark("orders", third.port, "pass")
        assert load.wait_for(third.address) < 2
        for leave in (
            lambda: agent.deregister("orders", first.port),
            lambda: agent.mark("orders", second.port, "fail"),
        ):
            leave()
            left = time.monotonic()
            time.sleep(2.5)
            gone = {first.address: first, second.address: second}.keys() - places(mesh)
            assert gone
            assert max(load.last[place] for place in gone) < left + 2
        assert places(mesh) == {third.address}
        agent.mark("orders", third.port, "fail")
        time.sleep(1)
        load.wait_for(third.address)  # the last one left is not believed to have gone at once (D1)
        agent.mark("orders", third.port, "pass")
        time.sleep(2.5)
        assert places(mesh) == {third.address}
    assert load.failed == []
