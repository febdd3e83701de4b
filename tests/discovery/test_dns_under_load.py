"""A warm mesh fails no call, whatever the DNS does (rules D1, D3)."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest
from load import Answering, Load
from toy_dns import ToyDns

from meshlib import Mesh, RoundRobin, Service
from meshlib.discovery import nameservers
from waiting import until

pytestmark = pytest.mark.usefixtures("no_leaks")

SRV = "_http._tcp.orders.test"
ADDRESSES = [f"127.0.1.{number}" for number in range(1, 31)]


@pytest.fixture
def answering() -> Iterator[Answering]:
    with Answering(ADDRESSES) as started:
        yield started


@pytest.fixture
def dns() -> Iterator[ToyDns]:
    with ToyDns() as started:
        yield started


def scale(dns: ToyDns, port: int, addresses: list[str], ttl: int = 1) -> None:
    """The service has these endpoints."""
    for number, address in enumerate(addresses):
        dns.set(f"h{number}.{address}.test", "A", address, ttl=ttl)
    dns.set(SRV, "SRV", *(f"0 1 {port} h{n}.{a}.test." for n, a in enumerate(addresses)), ttl=ttl)


def mesh_over(dns: ToyDns) -> Mesh:
    return Mesh(Service("orders", f"dns+srv://{SRV}?nameserver={dns.place}", balancer=RoundRobin()))


def at_most_one_a_second(dns: ToyDns) -> None:
    times = defaultdict(list)
    for query in dns.queries:
        times[query.name, query.kind, query.transport].append(query.at)
    for what, asked in times.items():
        gaps = [later - sooner for sooner, later in itertools.pairwise(asked)]
        assert min(gaps, default=9) > 0.95, (what, gaps)


def test_D1_no_fault_of_the_dns_fails_a_call(
    answering: Answering, dns: ToyDns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nameservers, "LIFETIME", 1.2)
    three = [f"{address}:{answering.port}" for address in ADDRESSES[:3]]
    scale(dns, answering.port, ADDRESSES[:3], ttl=0)
    with mesh_over(dns) as mesh, Load(mesh) as load:
        load.wait_for(*three)
        for fault in ("SERVFAIL", "REFUSED", "NXDOMAIN", "NODATA", "silence", "wrong id", "garbage"):
            seen = len(dns.queries)
            dns.fail(fault, SRV, "SRV")
            until(lambda seen=seen: len(dns.queries) > seen, 10)  # type: ignore[misc]
            dns.fail(None, SRV, "SRV")
            load.wait_for(*three)
            seen = len(dns.queries)
            until(lambda seen=seen: len(dns.queries) > seen, 10)  # type: ignore[misc]
    assert load.failed == []
    assert set(load.answered) == set(three)
    at_most_one_a_second(dns)


def test_D3_scale_from_3_to_30_to_1_under_load(answering: Answering, dns: ToyDns) -> None:
    places = [f"{address}:{answering.port}" for address in ADDRESSES]
    scale(dns, answering.port, ADDRESSES[:3])
    with mesh_over(dns) as mesh, Load(mesh) as load:
        load.wait_for(*places[:3])
        scale(dns, answering.port, ADDRESSES)
        assert load.wait_for(*places) < 4
        scale(dns, answering.port, ADDRESSES[:1])
        until(lambda: len(mesh.snapshot()["orders"].nodes) == 1)
        answering.close(ADDRESSES[1:])
        gone = time.monotonic()
        load.wait_for(places[0])
        time.sleep(0.5)
    assert load.failed == []
    assert max(load.last[place] for place in places[1:]) < gone
    at_most_one_a_second(dns)
    assert {query.transport for query in dns.queries} == {"udp", "tcp"}, "thirty records do not fit into a datagram"
