"""Endpoints from the DNS, against a server that breaks in every way (rules D1 and D3)."""

from __future__ import annotations

import asyncio
import gc
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import dns.asyncbackend
import dns.asyncresolver
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_dns import ToyDns

from meshlib import Endpoint
from meshlib.discovery import Dns, DnsSrv, Resolution, Resolver, hosts, nameservers, srv, targets
from meshlib.errors import ConfigError, ResolveError

SRV = "_http._tcp.users.internal"

BOUND = 30.0
"""Seconds after which a resolver is taken for one that never answers."""


@pytest.fixture
def server(no_leaks: None) -> Iterator[ToyDns]:
    """Two addresses of one name, and three instances behind SRV records."""
    with ToyDns() as server:
        server.set("users.internal", "A", "10.0.0.1", "10.0.0.2")
        server.set("users.internal", "AAAA", "fd00::1", ttl=20)
        server.set(SRV, "SRV", "10 60 9001 a.internal.", "10 40 9002 b.internal.", "20 1 9003 c.internal.")
        for number, name in enumerate("abc", 1):
            server.set(f"{name}.internal", "A", f"10.1.0.{number}")
        yield server


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence costs less than half a second; for tests in which nobody has to answer in time."""
    monkeypatch.setattr(nameservers, "TIMEOUT", 0.15)
    monkeypatch.setattr(nameservers, "LIFETIME", 0.3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence costs little more than a second, which is time enough for an answer."""
    monkeypatch.setattr(nameservers, "TIMEOUT", 0.6)
    monkeypatch.setattr(nameservers, "LIFETIME", 1.2)


def users(server: ToyDns, **settings: bool) -> Dns:
    return Dns("users.internal", 8080, nameserver=server.place, **settings)


def behind(server: ToyDns, **settings: bool) -> DnsSrv:
    return DnsSrv(SRV, nameserver=server.place, **settings)


def resolve(resolver: Resolver, previous: Resolution | None = None) -> Resolution:
    return asyncio.run(asyncio.wait_for(resolver.resolve("users", previous), BOUND))


def error_of(resolver: Resolver, previous: Resolution | None = None) -> str:
    with pytest.raises(ResolveError) as caught:
        resolve(resolver, previous)
    return str(caught.value)


def places(resolution: Resolution) -> list[str]:
    return [str(endpoint) for endpoint in resolution.endpoints]


def weights(resolution: Resolution) -> dict[str, tuple[int, float]]:
    return {str(each): (each.priority, each.weight) for each in resolution.endpoints}


def before(*texts: str) -> Resolution:
    return Resolution([Endpoint.parse(text) for text in texts], 30)


# Addresses


def test_D3_both_families_are_found_and_hold_as_long_as_the_shorter(server: ToyDns) -> None:
    found = resolve(users(server))
    assert places(found) == ["10.0.0.1:8080", "10.0.0.2:8080", "[fd00::1]:8080"]
    assert (found.ttl, found.warnings) == (20, ())
    assert server.asked() == [("users.internal", "A", "udp"), ("users.internal", "AAAA", "udp")]
    assert {query.payload for query in server.queries} == {1232}


@pytest.mark.parametrize(("said", "held"), [(0, 1), (1, 1), (299, 299), (86400, 300)])
def test_D3_a_ttl_is_held_between_a_second_and_five_minutes(server: ToyDns, said: int, held: float) -> None:
    server.set("users.internal", "A", "10.0.0.1", ttl=said)
    server.set("users.internal", "AAAA")
    server.soa = 3600
    server.set(SRV, "SRV", "0 0 9001 users.internal.", ttl=3600)
    assert resolve(users(server)).ttl == resolve(behind(server)).ttl == held


def test_D1_a_name_that_is_not_there_is_an_error(server: ToyDns) -> None:
    said = error_of(Dns("no.internal", 80, nameserver=server.place), before("10.0.0.1:80"))
    assert said.startswith(f"dns://no.internal:80?nameserver={server.place}: NXDOMAIN, there is no no.internal")


@pytest.mark.parametrize(("soa", "ttl"), [(7, 7), (0, 1), (9000, 300), (None, 5)])
def test_D1_a_name_without_addresses_is_an_empty_answer(server: ToyDns, soa: int | None, ttl: float) -> None:
    server.soa = soa
    server.fail("NODATA")
    for resolver in (users(server), behind(server)):
        assert resolve(resolver, before("10.0.0.1:8080")) == Resolution((), ttl)


@pytest.mark.parametrize("code", ["SERVFAIL", "REFUSED", "FORMERR"])
def test_D1_a_nameserver_that_refuses_is_an_error_in_plain_words(server: ToyDns, code: str) -> None:
    server.fail(code)
    for resolver in (users(server), behind(server)):
        assert f"{server.place} answered {code}" in error_of(resolver, before("10.0.0.1:8080"))


@pytest.mark.parametrize("fault", ["silence", "wrong id", "garbage"])
def test_D1_a_nameserver_that_says_nothing_of_use_is_an_error_in_plain_words(
    server: ToyDns, hasty: None, fault: str
) -> None:
    server.fail(fault)
    for resolver in (users(server), behind(server)):
        assert f"{server.place} did not answer" in error_of(resolver, before("10.0.0.1:8080"))


def test_D1_tcp_that_fails_is_an_error_in_plain_words(server: ToyDns) -> None:
    server.fail("hang up")
    assert f"{server.place} could not be reached" in error_of(users(server, tcp=True))
    with ToyDns() as gone:
        place = gone.place
    said = error_of(DnsSrv(SRV, nameserver=place, tcp=True))
    assert f"{place} could not be reached (Connection refused)" in said


@pytest.mark.parametrize("fault", ["SERVFAIL", "silence", "NXDOMAIN"])
def test_D1_a_family_that_is_not_answered_stays_as_it_was(server: ToyDns, quick: None, fault: str) -> None:
    server.fail(fault, kind="AAAA")
    found = resolve(users(server), before("[fd00::9]:8080", "10.0.0.9:8080"))
    assert places(found) == ["10.0.0.1:8080", "10.0.0.2:8080", "[fd00::9]:8080"]
    assert found.ttl == 10, "what is missing is asked for again soon"
    assert len(found.warnings) == 1
    assert "AAAA of users.internal: " in found.warnings[0]
    assert "the addresses of before stay" in found.warnings[0]
    assert places(resolve(users(server))) == ["10.0.0.1:8080", "10.0.0.2:8080"]


def test_D1_a_service_is_not_empty_because_its_only_family_fails(server: ToyDns) -> None:
    server.set("users.internal", "AAAA")
    server.fail("SERVFAIL", kind="A")
    assert "SERVFAIL" in error_of(users(server))
    assert places(resolve(users(server), before("10.0.0.9:8080"))) == ["10.0.0.9:8080"]


def test_D1_one_query_a_second_and_time_for_the_second_nameserver(server: ToyDns) -> None:
    """With the real times: one nameserver is silent, for one asker it is the only one."""
    with ToyDns() as silent:
        silent.fail("silence")

        async def main() -> float:
            start = time.monotonic()
            alone = asyncio.create_task(Dns("alone.internal", 80, nameserver=silent.place).resolve("users", None))
            both = Dns("users.internal", 80, nameserver=[silent.place, server.place])
            assert len((await both.resolve("users", None)).endpoints) == 3
            assert time.monotonic() - start < 4
            with pytest.raises(ResolveError, match="did not answer"):
                await alone
            return time.monotonic() - start

        assert asyncio.run(main()) < 9
        for kind in ("A", "AAAA"):
            times = [query.at for query in silent.queries if (query.name, query.kind) == ("alone.internal", kind)]
            assert len(times) >= 2, "a lost datagram is sent again"
            assert all(later - earlier >= 1 for earlier, later in pairwise(times))


def test_D1_a_nameserver_that_refuses_leaves_the_answer_to_the_next(server: ToyDns) -> None:
    with ToyDns() as bad:
        bad.fail("REFUSED")
        assert len(resolve(Dns("users.internal", 80, nameserver=[bad.place, server.place])).endpoints) == 3
        assert len(bad.queries) == 2


# Size


def test_D3_an_answer_that_was_cut_is_asked_for_again_by_tcp(server: ToyDns) -> None:
    server.fail("truncated", kind="A")
    assert len(resolve(users(server)).endpoints) == 3
    assert server.asked() == [
        ("users.internal", "A", "tcp"),
        ("users.internal", "A", "udp"),
        ("users.internal", "AAAA", "udp"),
    ]


def test_D3_tcp_outright_finds_what_is_cut_without_a_word(server: ToyDns) -> None:
    server.set("users.internal", "A", *(f"10.0.1.{number}" for number in range(40)))
    server.fail("cut")
    assert len(resolve(users(server)).endpoints) == 4
    server.queries.clear()
    assert len(resolve(users(server, tcp=True)).endpoints) == 41
    assert {query.transport for query in server.queries} == {"tcp"}


@pytest.mark.parametrize(("count", "additional"), [(1000, True), (100, False)])
def test_D3_a_thousand_records(server: ToyDns, count: int, additional: bool) -> None:
    names = [f"n{number}.internal" for number in range(count)]
    server.set(SRV, "SRV", *(f"1 1 {9000 + number} {name}." for number, name in enumerate(names)))
    for number, name in enumerate(names):
        server.set(name, "A", f"10.2.{number // 250}.{number % 250}")
    server.additional = additional
    found = resolve(behind(server))
    assert len(found.endpoints) == count
    assert {each.weight for each in found.endpoints} == {1}
    assert len(server.queries) == (2 if additional else 2 + 2 * count)


# Aliases


def test_D3_aliases_are_followed_and_their_ttl_counts(server: ToyDns) -> None:
    server.set("www.internal", "CNAME", "alias.internal.", ttl=9)
    server.set("alias.internal", "CNAME", "users.internal.", ttl=12)
    server.set("_http._tcp.www.internal", "CNAME", f"{SRV}.", ttl=8)
    found = resolve(Dns("www.internal", 80, nameserver=server.place))
    assert (len(found.endpoints), found.ttl) == (3, 9)
    found = resolve(DnsSrv("_http._tcp.www.internal", nameserver=server.place))
    assert (len(found.endpoints), found.ttl) == (3, 8)


def test_D3_an_alias_is_followed_from_one_answer_to_the_next(server: ToyDns) -> None:
    server.chase = False
    server.set("www.internal", "CNAME", "users.internal.", ttl=9)
    found = resolve(Dns("www.internal", 80, nameserver=server.place))
    assert (len(found.endpoints), found.ttl) == (3, 9)


def test_D3_an_alias_of_a_name_without_addresses_is_no_further_question(server: ToyDns) -> None:
    server.set("www.internal", "CNAME", "users.internal.")
    server.set("users.internal", "AAAA")
    assert len(resolve(Dns("www.internal", 80, nameserver=server.place)).endpoints) == 2
    assert len(server.queries) == 2


@pytest.mark.parametrize("chase", [True, False])
def test_D3_aliases_that_lead_in_a_circle_or_for_ever_are_an_error(server: ToyDns, chase: bool) -> None:
    server.chase = chase
    for number in range(30):
        server.set(f"w{number}.internal", "CNAME", f"w{number + 1}.internal.")
    server.set("x.internal", "CNAME", "y.internal.")
    server.set("y.internal", "CNAME", "x.internal.")
    for name in ("w0.internal", "x.internal"):
        assert name in error_of(Dns(name, 80, nameserver=server.place))
    assert len(server.queries) <= 2 * (9 + 2)


# SRV


def test_D3_srv_priorities_and_weights(server: ToyDns) -> None:
    found = resolve(behind(server))
    assert weights(found) == {"10.1.0.1:9001": (10, 60), "10.1.0.2:9002": (10, 40), "10.1.0.3:9003": (20, 1)}
    assert [each.metadata["name"] for each in found.endpoints] == ["a.internal", "b.internal", "c.internal"]
    assert (found.ttl, found.warnings) == (30, ())


def test_D3_addresses_that_were_sent_along_cost_no_query(server: ToyDns) -> None:
    server.set("a.internal", "A", "10.1.0.1", ttl=4)
    assert resolve(behind(server)).ttl == 4
    assert server.asked() == [(SRV, "SRV", "udp")]


def test_D3_what_is_sent_along_from_another_world_is_not_used(server: ToyDns) -> None:
    """Addresses of another class than the internet's are not ours to read."""
    server.records["a.internal", "A"] = dns.rrset.from_text("a.internal.", 30, "CH", "A", "chaos. 0104")
    found = resolve(behind(server))
    assert places(found) == ["10.1.0.2:9002", "10.1.0.3:9003"]
    assert "target a.internal: it has no address" in found.warnings[0]


def test_D3_other_targets_are_looked_up_each_once(server: ToyDns) -> None:
    server.additional = False
    server.set(SRV, "SRV", "1 1 9001 A.internal.", "1 1 9002 a.INTERNAL.", "1 3 9003 users.internal.")
    assert weights(resolve(behind(server))) == {
        "10.1.0.1:9001": (1, 1),
        "10.1.0.1:9002": (1, 1),
        "10.0.0.1:9003": (1, 1),
        "10.0.0.2:9003": (1, 1),
        "[fd00::1]:9003": (1, 1),
    }
    assert server.asked() == [
        (SRV, "SRV", "udp"),
        ("a.internal", "A", "udp"),
        ("a.internal", "AAAA", "udp"),
        ("users.internal", "A", "udp"),
        ("users.internal", "AAAA", "udp"),
    ]


def test_D3_a_dot_means_that_there_is_no_service(server: ToyDns) -> None:
    server.set(SRV, "SRV", "0 0 0 .", ttl=12)
    assert resolve(behind(server)) == Resolution((), 12)
    assert len(server.queries) == 1


def test_D3_two_records_that_lead_to_one_place_are_one_endpoint(server: ToyDns) -> None:
    server.set("b.internal", "A", "10.1.0.1")
    server.set(SRV, "SRV", "1 60 9001 a.internal.", "1 40 9001 b.internal.", "2 9 9001 a.internal.")
    assert weights(resolve(behind(server))) == {"10.1.0.1:9001": (1, 100)}


@pytest.mark.parametrize("fault", ["SERVFAIL", "silence", "NXDOMAIN", "NODATA"])
def test_D1_a_target_that_cannot_be_looked_up_is_left_out(server: ToyDns, quick: None, fault: str) -> None:
    server.additional = False
    server.fail(fault, "a.internal")
    found = resolve(behind(server))
    assert places(found) == ["10.1.0.2:9002", "10.1.0.3:9003"]
    assert len(found.warnings) == 1
    assert "target a.internal: " in found.warnings[0]
    assert "left out" in found.warnings[0]


def test_D1_a_target_that_cannot_be_looked_up_keeps_the_addresses_it_had(server: ToyDns) -> None:
    server.additional, server.soa = False, 60
    previous = resolve(behind(server))
    server.fail("SERVFAIL", "a.internal")
    server.set(SRV, "SRV", "10 7 9009 a.internal.", "10 40 9002 b.internal.")
    found = resolve(behind(server), previous)
    assert weights(found) == {"10.1.0.1:9009": (10, 7), "10.1.0.2:9002": (10, 40)}
    assert found.ttl == 10
    assert "its addresses of before stay" in found.warnings[0]


@pytest.mark.parametrize("fault", ["SERVFAIL", "NODATA"])
def test_D1_no_target_with_an_address_is_an_error(server: ToyDns, fault: str) -> None:
    server.additional = False
    for name in "abc":
        server.fail(fault, f"{name}.internal")
    assert "no target has an address: target a.internal: " in error_of(behind(server))


def test_D1_targets_that_stay_unknown_share_one_limit(
    server: ToyDns, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "PATIENCE", 2.0)
    server.additional = False
    server.set(SRV, "SRV", "1 1 9001 a.internal.", *(f"1 1 80 silent{number}.internal." for number in range(200)))
    for number in range(200):
        server.fail("silence", f"silent{number}.internal")
    found = resolve(behind(server))
    assert places(found) == ["10.1.0.1:9001"]
    assert sum(query.name.startswith("silent") for query in server.queries) < 700, "not all of them were asked for"
    assert found.warnings[-1] == "and 195 more"


def test_D3_a_record_without_a_port_is_left_out(server: ToyDns) -> None:
    server.set(SRV, "SRV", "1 1 0 a.internal.", "1 1 9002 b.internal.")
    found = resolve(behind(server))
    assert places(found) == ["10.1.0.2:9002"]
    assert "a.internal has port 0" in found.warnings[0]


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=30))
def test_D3_shares_are_in_proportion_and_never_nothing(given: list[int]) -> None:
    shares = srv.shares(given)
    assert all(share > 0 for share in shares)
    if any(given):
        assert [share for share, weight in zip(shares, given, strict=True) if weight] == [w for w in given if w]
        little = sum(share for share, weight in zip(shares, given, strict=True) if not weight)
        assert little <= 0.0101 * sum(given)
    else:
        assert len(set(shares)) == 1


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.sampled_from("abcd")), min_size=1, max_size=12),
    st.permutations(range(12)),
)
def test_D3_the_order_of_the_records_is_of_no_account(given: list[tuple[int, int, str]], order: Sequence[int]) -> None:
    records = [srv.Record(priority, weight, 80, target) for priority, weight, target in given]
    turned = [records[index] for index in order if index < len(records)]
    addresses = {"a": ["10.0.0.1"], "b": ["10.0.0.2", "10.0.0.3"], "c": ["10.0.0.1"], "d": []}
    first, second = srv.endpoints(records, addresses), srv.endpoints(turned, addresses)
    assert [(each.place, each.priority) for each in first] == [(each.place, each.priority) for each in second]
    assert [each.weight for each in first] == pytest.approx([each.weight for each in second])
    assert len({each.place for each in first}) == len(first)


# The system's configuration


@pytest.fixture
def system(server: ToyDns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a system whose only nameserver is the server."""

    class Configured(dns.asyncresolver.Resolver):
        def reset(self) -> None:
            super().reset()
            self.port = server.port

    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\nsearch a.test internal\noptions ndots:2 timeout:9\n")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    monkeypatch.setattr(dns.asyncresolver, "Resolver", Configured)
    monkeypatch.setattr(nameservers, "CONFIGURATION", str(tmp_path / "resolv.conf"))
    monkeypatch.setattr(hosts, "FILE", tmp_path / "hosts")
    return tmp_path


def test_D3_the_search_list_holds_but_for_a_name_with_a_last_dot(server: ToyDns, system: Path) -> None:
    assert len(resolve(Dns("Users", 80)).endpoints) == 3
    assert {query.name for query in server.queries} == {"users.a.test", "users.internal"}
    assert len(resolve(DnsSrv("_http._tcp.users")).endpoints) == 3
    server.queries.clear()
    assert "NXDOMAIN, there is no users (" in error_of(Dns("users.", 80))
    assert {query.name for query in server.queries} == {"users"}
    assert "there is no none.a.test, none.internal, none (" in error_of(Dns("none", 80))
    (system / "resolv.conf").write_text("search internal\n")
    assert "the system's DNS configuration is of no use" in error_of(Dns("users", 80))


def test_D1_the_hosts_file_comes_first(server: ToyDns, system: Path) -> None:
    (system / "hosts").write_text(
        "10.9.0.1 other\n10.9.0.2\tother Users.Internal # comment\n::9 users.internal\n"
        "users.internal\nx users.internal\n10.9.0.3 #users.internal\n"
    )
    assert resolve(Dns("users.internal", 80)) == Resolution(before("10.9.0.2:80", "[::9]:80").endpoints, hosts.TTL)
    assert server.queries == []
    assert len(resolve(users(server)).endpoints) == 3, "a nameserver that was given is asked"
    (system / "hosts").unlink()
    assert len(resolve(Dns("users.internal", 80)).endpoints) == 3


def test_S3_another_library_s_loop_is_of_no_account(server: ToyDns) -> None:
    """dnspython remembers the first event loop library it saw."""
    seen = dns.asyncbackend.get_default_backend() if dns.asyncbackend._default_backend else None
    try:
        dns.asyncbackend.set_default_backend("trio")
        assert len(resolve(users(server)).endpoints) == 3
    finally:
        dns.asyncbackend._default_backend = seen


def test_C7_a_question_that_is_cancelled_leaves_nothing(server: ToyDns) -> None:
    server.fail("silence")

    async def main() -> None:
        for resolver in (users(server), users(server, tcp=True), behind(server)):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(resolver.resolve("users", None), 0.1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


# How they are written


def test_many_names_take_few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[int] = [0]

    async def resolve(*_: object, **__: object) -> Any:
        under_way.append(under_way[-1] + 1)
        await asyncio.sleep(0.001)
        under_way.append(under_way[-1] - 1)
        raise OSError

    monkeypatch.setattr("dns.asyncresolver.Resolver.resolve", resolve)

    async def main() -> None:
        names = [Dns(f"n{number}.internal", 80, nameserver="127.0.0.1:9") for number in range(200)]
        errors = await asyncio.gather(*(name.resolve("orders", None) for name in names), return_exceptions=True)
        assert {type(error) for error in errors} == {ResolveError}

    for _ in range(3):
        asyncio.run(main())
    assert max(under_way) == nameservers.AT_ONCE
    gc.collect()
    assert len(nameservers._rooms) == 1, "a loop that is over is kept no longer than to the next one"


def test_D3_one_way_to_write_a_resolver() -> None:
    written = Dns.from_url("dns://Users.Internal:80?nameserver=10.0.0.53&nameserver=[FD00::53]:8600&tcp=true")
    made = Dns("users.internal.", 80, nameserver=["10.0.0.53:53", "[fd00:0::53]:8600", "10.0.0.53"], tcp=True)
    assert written == made
    assert written.watch_key == made.watch_key
    assert len({written.watch_key, made.watch_key, Dns("users.internal", 80).watch_key}) == 2
    assert written.source == "dns://users.internal:80?nameserver=10.0.0.53:53&nameserver=[fd00::53]:8600&tcp=true"
    assert Dns.from_url(written.source) == written == pickle.loads(pickle.dumps(written))
    named = DnsSrv.from_url("dns+srv://_http._tcp.Bücher.example./?tcp=false")
    assert named == DnsSrv("_http._tcp.xn--bcher-kva.example.")
    assert named.source == "dns+srv://_http._tcp.xn--bcher-kva.example."
    assert isinstance(named, Resolver)
    assert DnsSrv("users.internal").watch_key != DnsSrv("users.internal", tcp=True).watch_key


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("dns://users.internal", "the port is missing"),
        ("dns://users.internal:99999", "port must be 1 to 65535"),
        ("dns://users.internal:0", "port must be 1 to 65535"),
        ("dns://users.internal:http", "port must be 1 to 65535"),
        ("dns://:80", "the name is missing"),
        ("dns:users.internal:80", "must begin with 'dns://'"),
        ("dns://10.0.0.1:80", "must be a host name"),
        ("dns://-users:80", "must be a host name"),
        ("dns://us%41ers:80", "must be a host name"),
        ("dns://users.internal:80?nameserver=ns.internal", "'nameserver' must be an IP address"),
        ("dns://users.internal:80?nameserver=fd00::53", "'nameserver' must be an IP address"),
        ("dns://users.internal:80?nameserver=10.0.0.53:99999", "'nameserver' must be an IP address"),
        ("dns://users.internal:80?nameserver=", "'nameserver' must be an IP address"),
        ("dns://users.internal:80?namserver=10.0.0.53", "'namserver'; did you mean 'nameserver'?"),
        ("dns://users.internal:80?secret=secret", "unknown parameter 'secret' (known: nameserver, tcp)"),
        ("dns://users.internal:80?tcp=yes", "'tcp' must be true or false"),
        ("dns://users.internal:80?tcp=true&tcp=false", "'tcp' must be true or false"),
        ("dns://me:secret@users.internal:80", "takes no user and password"),
        ("dns://users.internal:80/path", "has no path"),
        ("dns://users.internal:80#x", "no '#'"),
        ("dns://users internal:80", "without spaces"),
        ("dns://[::1:80", "cannot be read as a URL"),
    ],
)
def test_D3_a_wrong_url_says_what_is_wrong_and_shows_a_right_one(url: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Dns.from_url(url)
    assert said in str(caught.value)
    assert all(fault.path == "resolver" for fault in caught.value.faults)
    assert "secret=secret" not in str(caught.value)
    assert "me:" not in str(caught.value)


def test_D3_a_wrong_srv_url_says_what_is_wrong() -> None:
    for url, said in [
        ("dns+srv://_http._tcp.users.internal:80", "has no port"),
        ("dns+srv://", "the name is missing"),
        ("dns://_http._tcp.users.internal", "must begin with 'dns+srv://'"),
    ]:
        with pytest.raises(ConfigError) as caught:
            DnsSrv.from_url(url)
        assert said in str(caught.value)


def test_D3_wrong_settings_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Dns("", 0, nameserver=["10.0.0.53", "x"], tcp="yes")  # type: ignore[arg-type]
    assert [fault.message.partition(" ")[0] for fault in caught.value.faults] == ["the", "parameter", "tcp", "port"]


@settings(max_examples=60)
@given(st.text(max_size=40), st.text(max_size=20))
def test_D3_any_text_is_a_resolver_or_a_config_error(name: str, query: str) -> None:
    for kind, url in ((Dns, f"dns://{name}:80?{query}"), (DnsSrv, f"dns+srv://{name}?{query}")):
        try:
            made = kind.from_url(url)
        except ConfigError:
            continue
        assert kind.from_url(made.source) == made


# Imports

READY = """
import sys
from meshlib import Mesh, Service

mesh = Mesh(Service("users", sys.argv[1]))
before = set(sys.modules)
mesh.wait_ready(30)
mesh.close()
print(sorted(sys.modules.keys() - before))
"""


def test_S3_an_answer_imports_nothing(server: ToyDns) -> None:
    """A child that is forked meanwhile would never have endpoints: its thread would wait for the import's end."""
    url = f"dns+srv://{SRV}?nameserver={server.place}"
    done = subprocess.run([sys.executable, "-c", READY, url], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_S3_names_of_any_resolver_are_looked_up_without_an_import() -> None:
    program = "import sys; from meshlib import Mesh, Service; Mesh(Service('users', ['users.internal:80']));"
    program += "print('meshlib.discovery.dns' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True\n", "")
