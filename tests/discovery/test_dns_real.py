"""Endpoints from the DNS, against a real server (rules D1 and D3)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from components.absence import demanded
from components.knot import BROKEN, Knot, program
from meshlib.discovery import Dns, DnsSrv, Resolution, Resolver, nameservers
from meshlib.errors import ResolveError

pytestmark = pytest.mark.component


@pytest.fixture(scope="module")
def knot() -> Iterator[Knot]:
    """One server for all of them: each test has names of its own."""
    demanded("knot", program)
    with Knot() as started:
        yield started


def resolve(resolver: Resolver, previous: Resolution | None = None) -> Resolution:
    return asyncio.run(resolver.resolve("web", previous))


def error_of(resolver: Resolver) -> str:
    with pytest.raises(ResolveError) as caught:
        resolve(resolver)
    return str(caught.value)


def places(resolution: Resolution) -> list[str]:
    return [str(endpoint) for endpoint in resolution.endpoints]


def addresses(knot: Knot, name: str) -> Dns:
    return Dns(name, 80, nameserver=knot.place)


def records(knot: Knot, name: str, **settings: bool) -> DnsSrv:
    return DnsSrv(f"_http._tcp.{name}.mesh.test", nameserver=knot.place, **settings)


@pytest.mark.parametrize("name", ["web", "alias"])
def test_D3_srv_records_of_a_real_server(knot: Knot, name: str) -> None:
    found = resolve(records(knot, name))
    assert [(str(each), each.priority, each.weight, each.metadata["name"]) for each in found.endpoints] == [
        ("127.0.0.1:9001", 10, 60, "a.mesh.test"),
        ("127.0.0.2:9002", 10, 40, "b.mesh.test"),
        ("127.0.0.3:9003", 20, 1, "c.mesh.test"),
    ]
    assert (found.ttl, found.warnings) == (2, ())


def test_D3_both_families_and_aliases_of_a_real_server(knot: Knot) -> None:
    assert places(resolve(addresses(knot, "both.mesh.test"))) == ["127.0.0.4:80", "[::1]:80"]
    assert places(resolve(addresses(knot, "Alias.Mesh.Test."))) == ["127.0.0.4:80", "[::1]:80"]
    assert places(resolve(records(knot, "both"))) == ["127.0.0.4:9004", "[::1]:9004"]


def test_D1_what_a_real_server_says_where_there_is_nothing(knot: Knot) -> None:
    assert "NXDOMAIN, there is no no.mesh.test" in error_of(addresses(knot, "no.mesh.test"))
    assert "NXDOMAIN" in error_of(records(knot, "no"))
    assert resolve(addresses(knot, "empty.mesh.test")) == Resolution((), 1)
    assert resolve(DnsSrv("empty.mesh.test", nameserver=knot.place)) == Resolution((), 1)
    assert resolve(records(knot, "none")) == Resolution((), 2)
    assert "answered SERVFAIL" in error_of(addresses(knot, f"a.{BROKEN}"))
    assert "answered REFUSED" in error_of(addresses(knot, "elsewhere.example"))
    assert "answered REFUSED" in error_of(addresses(knot, "away.mesh.test")), "an alias out of its zone"


@pytest.mark.parametrize("tcp", [False, True])
def test_D3_what_does_not_fit_into_udp_comes_by_tcp(knot: Knot, tcp: bool) -> None:
    names = [f"big{number}" for number in range(60)]
    knot.set("_http._tcp.big", "SRV", *(f"1 1 {9100 + number} {name}" for number, name in enumerate(names)))
    for number, name in enumerate(names):
        knot.set(name, "A", f"127.0.1.{number}")
    assert len(resolve(records(knot, "big", tcp=tcp)).endpoints) == 60


def test_D1_updates_are_seen(knot: Knot) -> None:
    resolver = records(knot, "live")
    knot.set("_http._tcp.live", "SRV", "1 1 9001 a")
    first = resolve(resolver)
    assert places(first) == ["127.0.0.1:9001"]
    knot.set("_http._tcp.live", "SRV", "1 1 9001 a", "1 1 9002 new")
    found = resolve(resolver, first)
    assert places(found) == ["127.0.0.1:9001"]
    assert "NXDOMAIN, there is no new.mesh.test" in found.warnings[0]
    knot.set("new", "AAAA", "::2")
    assert places(resolve(resolver, found)) == ["127.0.0.1:9001", "[::2]:9002"]
    knot.set("_http._tcp.live", "SRV")
    assert "NXDOMAIN" in error_of(resolver)


def test_D1_a_server_that_is_stopped_and_started_again(knot: Knot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nameservers, "TIMEOUT", 0.2)
    monkeypatch.setattr(nameservers, "LIFETIME", 0.5)
    resolver, start = addresses(knot, "both.mesh.test"), time.monotonic()
    knot.stop()
    assert f"{knot.place} did not answer" in error_of(resolver)
    assert "Connection refused" in error_of(Dns("both.mesh.test", 80, nameserver=knot.place, tcp=True))
    assert time.monotonic() - start < 10
    knot.start()
    monkeypatch.undo()
    assert len(resolve(resolver).endpoints) == 2
