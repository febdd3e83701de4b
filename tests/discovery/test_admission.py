"""Where no resolver may send us (rule D5).

The guard is `Watch._admitted`, which asks `forbidden.is_forbidden`; each test that has another one says so.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

import pytest
from faulty_consul import Answer, FaultyConsul
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from played import Played
from toy_dns import ToyDns

from meshlib import ConfigError, Endpoint, HealthCheck, Mesh, ResolveError, Service
from meshlib.discovery import Resolution, Static, hosts
from meshlib.forbidden import is_forbidden
from meshlib.testing import Upstream
from waiting import until

pytestmark = pytest.mark.usefixtures("hurry", "no_leaks")

FORBIDDEN = (
    *("0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.0.1", "100.100.100.200", "168.63.129.16", "224.0.0.1"),
    *("239.255.255.255", "255.255.255.255", "::", "fe80::1", "fe80::1%eth0", "febf::1", "ff02::1", "fd00:ec2::254"),
    *("fd00:ec2::23", "fd20:ce::254", "::ffff:169.254.169.254", "::ffff:0.0.0.0", "::ffff:100.100.100.200"),
    *("::ffff:a9fe:a9fe", "::169.254.169.254", "::ffff:0:169.254.169.254", "64:ff9b::169.254.169.254"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b:1::169.254.169.254", "2002:a9fe:a9fe::1", "2001:db8::5efe:169.254.169.254"),
    *("64:ff9b:1:a9fe:a9:fe00:808:808", "64:ff9b:1:12a9:fe:a9fe::", "64:ff9b:1:1234:a9:fea9:fe00:0"),
    *("2001:db8::200:5efe:169.254.169.254", "2001:0:4136:e378:8000:63bf:5601:5601", "::ffff:224.0.0.1"),
)

ALLOWED = (
    *("127.0.0.1", "127.0.0.53", "::1", "::ffff:127.0.0.1", "10.0.0.1", "192.168.0.1", "172.16.0.1", "100.64.0.1"),
    *("8.8.8.8", "fd00::1", "2001:db8::1", "64:ff9b::8.8.8.8", "2002:808:808::1", "100.100.100.201", "localhost"),
    *("169.254.169.254.example.com", "64:ff9b:1:808:8:800::", "64:ff9b:1::8.8.8.8", "64:ff9b:1:2:8:808:800:0"),
)


def test_D5_what_is_forbidden_in_every_form() -> None:
    assert [host for host in FORBIDDEN if not is_forbidden(Endpoint(host, 80).host)] == []
    assert [host for host in ALLOWED if is_forbidden(Endpoint(host, 80).host)] == []


NETWORKS = [
    *map(ip_network, ("0.0.0.0/8", "169.254.0.0/16", "100.100.100.200", "168.63.129.16", "192.0.0.192", "224.0.0.0/4")),
    *map(ip_network, ("255.255.255.255", "fe80::/10", "fec0::/10", "ff00::/8", "fd00:ec2::/32", "fd20:ce::254")),
]


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_D5_a_network_is_forbidden_from_its_first_address_to_its_last(network: IPv4Network | IPv6Network) -> None:
    # The guard: `_Ranges`, which `ipaddress` is asked about here.
    ends = {int(network[0]) - 1, int(network[0]), int(network[-1]), int(network[-1]) + 1}
    beside = [type(network[0])(each) for each in ends if 0 <= each < 1 << network.max_prefixlen]
    wanted = [any(each in other for other in NETWORKS) for each in beside]
    assert [is_forbidden(str(each)) for each in beside] == wanted


def test_D5_an_answer_of_very_many_addresses_holds_nobody_up() -> None:
    # The guard: `_Ranges`. Lists of networks took 5 to 14 us for each address, and an answer may have any number.
    addresses = [f"2002:a00:{number:x}::1" for number in range(50_000)]
    began = time.process_time()
    assert not any(map(is_forbidden, addresses))
    took = time.process_time() - began
    began = time.process_time()
    assert all(map(ip_address, addresses))
    assert took < 2 * (time.process_time() - began)


@pytest.mark.parametrize(
    "host", ["127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "0xA9FEA9FE", "169.254.43518", "a.0x"]
)
def test_D5_an_odd_spelling_of_an_address_is_neither_address_nor_name(host: str) -> None:
    # The guard: `endpoint._NUMBER`. Others look such names up by `inet_aton`.
    with pytest.raises(ConfigError, match=r"endpoint\.host"):
        Endpoint(host, 80)


@pytest.fixture
def everywhere() -> Iterator[tuple[int, socket.socket]]:
    """A port at which every address of this machine would answer, and what listens there."""
    with socket.socket(socket.AF_INET6) as listening:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(("::", 0))
        listening.listen()
        listening.setblocking(False)
        yield listening.getsockname()[1], listening


def test_D5_nothing_connects_to_them(everywhere: tuple[int, socket.socket], upstream: Upstream) -> None:
    # 0.0.0.0 and :: reach this machine, so that a connection would be seen.
    port, listening = everywhere
    bad = [f"0.0.0.0:{port}", f"[::]:{port}", f"[::ffff:0.0.0.0]:{port}"]
    resolver = Played(*bad, upstream.address)
    service = Service("orders", resolver, health=HealthCheck("/", interval=0.05))
    with Mesh(service) as mesh, mesh.client("orders") as client:
        assert [client.get("/").status_code for _ in range(20)] == [200] * 20
        [node] = mesh.snapshot()["orders"].nodes
        assert node.endpoint == upstream.address
        resolver.say(*bad)
        until(lambda: "none of its endpoints may be called" in str(mesh.snapshot()["orders"].warnings))
        assert client.get("/").status_code == 200  # the last good answer stays
    with pytest.raises(BlockingIOError):
        listening.accept()


def test_D5_mixed_answers_lose_only_the_bad_ones_which_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    # The guards: `Feed._newly_dropped` counts, and `Watch._said` says it once.
    reader = InMemoryMetricReader()
    resolver = Played("10.0.0.1:80", "169.254.169.254:80", "[fe80::1]:80", "[::ffff:169.254.169.254]:80", ttl=None)
    told = "played: 3 left out, since no resolver may send us there: 169.254.169.254, ::ffff:169.254.169.254, fe80::1"
    provider = MeterProvider(metric_readers=[reader])
    with Mesh(Service("orders", resolver), meter_provider=provider) as mesh, mesh.client("orders"):
        mesh.wait_ready(5)
        snapshot = mesh.snapshot()["orders"]
        assert [node.endpoint for node in snapshot.nodes] == ["10.0.0.1:80"]
        assert [words.replace("::ffff:a9fe:a9fe", "::ffff:169.254.169.254") for words in snapshot.warnings] == [told]
        assert mesh._clusters["orders"].tally.dropped == 3
        resolver.say(*resolver.endpoints)
        until(lambda: mesh._clusters["orders"].tally.dropped == 6)
        mesh._telemetry.look()
        assert _value(reader, "meshlib.resolver.dropped") == 6
    provider.shutdown()
    assert caplog.text.count("left out") == 1


def test_D5_an_answer_of_nothing_else_is_an_error_from_the_first() -> None:
    told = r"none of its endpoints may be called: .*169\.254\.169\.254"
    with Mesh(Service("orders", Played("169.254.169.254:80"))) as mesh, pytest.raises(ResolveError, match=told):
        mesh.wait_ready(0.3)


def test_D5_answers_of_the_dns_and_of_the_hosts_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = tmp_path / "hosts"
    listed.write_text("169.254.169.254 listed\n10.0.0.4 listed\n")
    monkeypatch.setattr(hosts, "FILE", listed)
    with ToyDns() as server:
        server.set("a.test", "A", "10.0.0.1", "169.254.169.254")
        server.set("a.test", "AAAA", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2001:db8::1")
        server.set("_http._tcp.s.test", "SRV", "0 1 80 t.test.", "0 1 80 u.test.")
        server.set("t.test", "A", "10.0.0.2")
        server.set("u.test", "A", "100.100.100.200")
        services = {
            "name": f"dns://a.test:80?nameserver={server.place}",
            "srv": f"dns+srv://_http._tcp.s.test?nameserver={server.place}",
            "list": ["listed:80", "169.254.0.9:80"],  # what is written down itself is meant
        }
        with Mesh(*(Service(name, resolver) for name, resolver in services.items())) as mesh:
            mesh.wait_ready(5)
            wanted = {
                "name": {"10.0.0.1:80", "[2001:db8::1]:80"},
                "srv": {"10.0.0.2:80"},
                "list": {"10.0.0.4:80", "169.254.0.9:80"},
            }
            until(lambda: places(mesh) == wanted)


def test_D5_instances_of_consul_and_lines_of_a_file(tmp_path: Path) -> None:
    def instance(host: str) -> dict[str, object]:
        return {"Node": {"Address": "10.9.9.9"}, "Service": {"ID": host, "Address": host, "Port": 80}, "Checks": []}

    written = tmp_path / "endpoints.toml"
    written.write_text('endpoints = ["10.0.0.3:80", "169.254.169.254:80"]\n')
    entries = [instance(host) for host in ("10.0.0.1", "169.254.169.254", "0xa9fea9fe", "[::ffff:169.254.169.254]")]

    async def main() -> dict[str, set[str]]:
        consul = FaultyConsul(Answer(entries, headers={"x-consul-index": "7", "x-consul-knownleader": "true"}))
        async with consul:
            resolvers = {"consul": f"consul://{consul.address}/orders", "file": f"file:{written}"}
            async with Mesh(*(Service(name, resolver) for name, resolver in resolvers.items())) as mesh:
                await mesh.await_ready(5)
                return places(mesh)

    assert asyncio.run(main()) == {"consul": {"10.0.0.1:80"}, "file": {"10.0.0.3:80"}}


@pytest.mark.parametrize("held", ["orders.internal:80", "10.0.0.9:80"])
def test_D5_a_resolver_made_from_a_list_is_a_resolver(held: str) -> None:
    # The guards: `Watch._admitted` lets nothing pass but a list itself, and `fixed` takes nothing else for one.
    class Growing(Static):
        async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
            return Resolution([Endpoint("10.0.0.1", 80), Endpoint("169.254.169.254", 80)], 60.0)

    with Mesh(Service("orders", Growing([held]))) as mesh:
        mesh.wait_ready(5)
        assert places(mesh) == {"orders": {"10.0.0.1:80"}}


def places(mesh: Mesh) -> dict[str, set[str]]:
    return {name: {node.endpoint for node in each.nodes} for name, each in mesh.snapshot().items()}


def _value(reader: InMemoryMetricReader, name: str) -> object:
    data = reader.get_metrics_data()
    assert data is not None
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                if metric.name == name:
                    return metric.data.data_points[0].value  # type: ignore[union-attr]
    return None
