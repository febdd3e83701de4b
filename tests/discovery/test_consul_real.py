"""The Consul resolver on real Consul agents: one, one with ACLs, two datacenters, three servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.absence import demanded
from components.consul import Agent, binary, cluster
from meshlib.consul import ConsulError
from meshlib.discovery import Consul, Resolution

pytestmark = pytest.mark.component

PATIENCE = 10.0
"""Seconds in which what was registered has to be seen, on a machine that has much else to do."""


@pytest.fixture(scope="session", autouse=True)
def _consul_is_there() -> None:
    demanded("Consul", binary)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONSUL_HTTP_TOKEN", "CONSUL_HTTP_TOKEN_FILE", "CONSUL_CACERT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def agent(_consul_is_there: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """One agent for all tests that share it; each has services of its own."""
    with Agent(tmp_path_factory.mktemp("consul"), config={"node_meta": {"zone": "rack-7"}}) as started:
        yield started


def consul_of(agent: Agent, rest: str) -> Consul:
    return Consul.from_url(f"consul://{agent.address}/{rest}")


def ports(resolution: Resolution) -> set[int]:
    return {endpoint.port for endpoint in resolution.endpoints}


async def follow(consul: Consul, wanted: set[int], previous: Resolution | None = None) -> Resolution:
    """Watch until exactly these ports are seen."""
    async with asyncio.timeout(PATIENCE):
        while previous is None or ports(previous) != wanted:
            if previous is not None and previous.ttl is not None:
                await asyncio.sleep(min(previous.ttl, 0.1))
            previous = await consul.resolve("web", previous)
    return previous


def seen(consul: Consul, wanted: set[int]) -> Resolution:
    return asyncio.run(follow(consul, wanted))


def now(consul: Consul) -> Resolution:
    return asyncio.run(consul.resolve("web", None))


def test_D4_a_blocked_query_returns_at_once_when_an_instance_comes_or_goes(agent: Agent) -> None:
    consul = consul_of(agent, "changing?wait=60")

    async def main() -> None:
        resolution = await consul.resolve("web", None)
        changes = [
            (agent.register, 8001, {8001}),
            (agent.register, 8002, {8001, 8002}),
            (agent.deregister, 8001, {8002}),
        ]
        for change, port, wanted in changes:
            waiting = asyncio.create_task(follow(consul, wanted, resolution))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            changed = time.monotonic()
            await asyncio.to_thread(change, "changing", port)
            resolution = await waiting
            assert time.monotonic() - changed < 1
        assert resolution.index.known_leader is True

    asyncio.run(main())


def test_D4_a_query_that_saw_no_change_returns_with_the_same(agent: Agent) -> None:
    agent.register("quiet", 8001)
    consul = consul_of(agent, "quiet?wait=1")
    last, took, deadline = seen(consul, {8001}), 0.0, time.monotonic() + PATIENCE
    while took < 0.9:  # until what else a registration changes is over
        assert time.monotonic() < deadline
        before, began = last, time.monotonic()
        last = asyncio.run(consul.resolve("web", before))
        took = time.monotonic() - began
    assert (last.endpoints, last.index) == (before.endpoints, before.index)


def test_D4_checks_and_maintenance_decide_who_is_seen(agent: Agent) -> None:
    usual, lenient = consul_of(agent, "states?wait=60"), consul_of(agent, "states?wait=60&warning=true")
    for port in (8001, 8002, 8003, 8004):
        agent.register("states", port, Weights={"Passing": 10, "Warning": 2})
    seen(usual, {8001, 8002, 8003, 8004})
    agent.mark("states", 8002, "warn")
    agent.mark("states", 8003, "fail")
    agent.put("agent/service/maintenance/states-8004?enable=true&reason=test")
    assert {endpoint.weight for endpoint in seen(usual, {8001}).endpoints} == {10}
    both = seen(lenient, {8001, 8002})
    assert {endpoint.port: endpoint.weight for endpoint in both.endpoints} == {8001: 10, 8002: 2}
    for port in (8002, 8003):
        agent.mark("states", port, "pass")
    agent.put("agent/service/maintenance/states-8004?enable=false")
    seen(usual, {8001, 8002, 8003, 8004})


def test_D4_an_instance_shows_its_weight_tags_metadata_and_zone(agent: Agent) -> None:
    agent.register("shown", 8001, Tags=["v1"])
    agent.register("shown", 8002, Tags=["v2", "blue"], Weights={"Passing": 7, "Warning": 1}, Meta={"version": "2.1"})
    agent.register("shown", 8003, Tags=["v2"], Address="", Meta={"zone": "rack-8"})
    seen(consul_of(agent, "shown?near=_agent"), {8001, 8002, 8003})
    seen(consul_of(agent, "shown?tag=v2"), {8002, 8003})
    (one,) = seen(consul_of(agent, "shown?tag=blue&tag=v2"), {8002}).endpoints
    assert (one.weight, one.zone) == (7, "rack-7")
    assert dict(one.metadata) == {"version": "2.1", "tags": "v2,blue", "node": "n1", "dc": "dc1"}
    other = next(each for each in now(consul_of(agent, "shown?tag=v2")).endpoints if each.port == 8003)
    assert (str(other), other.zone) == ("127.0.0.1:8003", "rack-8")


def test_D4_a_prepared_query_is_executed(agent: Agent) -> None:
    agent.register("asked", 8001, Tags=["v1"])
    agent.register("asked", 8002, Tags=["v2"])
    told = {"Name": "asked-v2", "Service": {"Service": "asked", "Tags": ["v2"]}, "DNS": {"TTL": "3s"}}
    made = agent.put_new("query", told)
    resolution = seen(consul_of(agent, "query/asked-v2"), {8002})
    assert (resolution.ttl, resolution.index.index) == (3, 0)
    agent.delete(f"query/{made['ID']}")
    with pytest.raises(ConsulError, match="404: Query not found"):
        now(consul_of(agent, "query/asked-v2"))


def test_D4_what_consul_refuses_is_an_error(agent: Agent) -> None:
    with pytest.raises(ConsulError, match="500: No path to datacenter"):
        now(consul_of(agent, "web?dc=nowhere"))


def test_D4_after_a_restart_the_index_begins_anew(tmp_path: Path) -> None:
    with Agent(tmp_path) as agent:
        agent.register("web", 8001)
        for number in range(50):
            agent.put(f"kv/{number}", number)  # indexes are the cluster's: what comes next has a higher one
        agent.register("web", 8002)
        consul = consul_of(agent, "web?wait=2")
        before = seen(consul, {8001, 8002})
        agent.kill()
        with pytest.raises(ConsulError, match="no answer from"):
            now(consul)
        agent.start()
        agent.register("web", 9001)
        after = asyncio.run(consul.resolve("web", before))
        assert (ports(after), after.index.index) == ({9001}, 0)
        plain = asyncio.run(consul.resolve("web", after))
        assert 0 < plain.index.index < before.index.index


def test_D4_a_query_that_waits_ends_with_its_agent(tmp_path: Path) -> None:
    with Agent(tmp_path) as agent:
        agent.register("web", 8001)
        consul = consul_of(agent, "web?wait=600")

        async def main() -> None:
            waiting = asyncio.create_task(follow(consul, set(), await follow(consul, {8001})))
            await asyncio.sleep(0.3)
            agent.kill()
            async with asyncio.timeout(5):
                await waiting

        with pytest.raises(ConsulError, match="no answer from"):
            asyncio.run(main())


def test_D4_tokens_under_acls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"acl": {"enabled": True, "default_policy": "deny"}}
    with Agent(tmp_path, config=config) as agent:
        root = agent.put("acl/bootstrap")["SecretID"]
        rules = 'service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }'
        agent.put("acl/policy", {"Name": "reading", "Rules": rules}, token=root)
        token = agent.put("acl/token", {"Policies": [{"Name": "reading"}]}, token=root)
        agent.register("web", 8001, token=root)
        file = tmp_path / "token"
        file.write_text(token["SecretID"] + "\n")
        by_file, by_environment = consul_of(agent, f"web?token_file={file}"), consul_of(agent, "web")

        seen(by_file, {8001})
        nothing = now(by_environment)
        assert nothing.endpoints == ()
        assert "no token was sent" in nothing.warnings[0]
        monkeypatch.setenv("CONSUL_HTTP_TOKEN", token["SecretID"])
        assert ports(now(by_environment)) == {8001}

        agent.delete(f"acl/token/{token['AccessorID']}", token=root)
        with pytest.raises(ConsulError, match="403: ACL not found") as caught:
            follow_until_refused(by_file)
        assert token["SecretID"] not in str(caught.value)
        file.write_text(root)
        assert ports(now(by_file)) == {8001}


def follow_until_refused(consul: Consul) -> None:
    """A server keeps what it knows of a token for a while."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        now(consul)
        time.sleep(0.1)


def test_D4_two_datacenters(tmp_path: Path) -> None:
    here = Agent(tmp_path, "here", {"datacenter": "dc1"})
    there = Agent(tmp_path, "there", {"datacenter": "dc2", "retry_join_wan": [here.serf("wan")]})
    with here, there:
        there.register("web", 9001)
        deadline = time.monotonic() + PATIENCE
        while len(here.get("catalog/datacenters")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (remote,) = seen(consul_of(here, "web?dc=dc2"), {9001}).endpoints
        assert remote.metadata["dc"] == "dc2"
        assert now(consul_of(here, "web")).endpoints == ()
        failover = {"Service": "web", "Failover": {"Datacenters": ["dc2"]}}
        here.put_new("query", {"Name": "anywhere", "Service": failover})
        seen(consul_of(here, "query/anywhere"), {9001})
        there.kill()
        with pytest.raises(ConsulError, match=r"Consul answered 500: rpc error|500: No path"):
            now(consul_of(here, "web?dc=dc2"))


def test_D4_stale_answers_outlive_the_leader(tmp_path: Path) -> None:
    with cluster(tmp_path, 3) as (leader, follower, third):
        follower.register("web", 8001)
        consul = consul_of(follower, "web?wait=60")
        known = seen(consul, {8001})

        async def main() -> None:
            waiting = asyncio.create_task(follow(consul, {8001, 8002}, known))
            await asyncio.sleep(0.3)
            leader.kill()
            for _ in range(30):
                assert ports(await consul.resolve("web", None)) == {8001}
                await asyncio.sleep(0.1)
            assert not waiting.done()  # neither has the query that waits failed
            await asyncio.to_thread(third.wait_ready)
            await asyncio.to_thread(follower.wait_ready)
            await asyncio.to_thread(follower.register, "web", 8002)
            await waiting

        asyncio.run(main())
        third.kill()  # no quorum any more
        deadline = time.monotonic() + PATIENCE
        while (lost := now(consul)).index.known_leader or lost.index.last_contact < 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert ports(lost) == {8001, 8002}
        assert "no known leader, last contact" in lost.warnings[0]
        with pytest.raises(ConsulError, match="500: No cluster leader"):
            now(consul_of(follower, "web?stale=1"))
