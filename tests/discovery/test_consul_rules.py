"""The rules of the Consul resolver, against a Consul that does what a real one will not do on demand."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import ssl
import time
import traceback
from pathlib import Path
from typing import Any

import httpx
import pytest
from faulty_consul import Answer, FaultyConsul, Query

from meshlib import consul as client
from meshlib.consul import ConsulAgent, ConsulError
from meshlib.discovery import Consul, Resolution, Resolver
from meshlib.discovery import consul as resolver
from meshlib.discovery.consul import ConsulIndex
from meshlib.validation import ConfigError

HEALTHY = {"X-Consul-Index": "7", "X-Consul-KnownLeader": "true", "X-Consul-LastContact": "0"}
TOKEN = "a1b2c3d4-token"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONSUL_HTTP_TOKEN", "CONSUL_HTTP_TOKEN_FILE", "CONSUL_CACERT", "CONSUL_HTTP_ADDR"):
        monkeypatch.delenv(name, raising=False)


def entry(
    port: Any = 8001, *, checks: dict[str, str] | None = None, node: Any = None, **service: Any
) -> dict[str, Any]:
    """An instance as Consul lists it; `checks` are states by check id."""
    listed = [{"CheckID": name, "Status": status} for name, status in (checks or {"serfHealth": "passing"}).items()]
    return {
        "Node": {"Node": "n1", "Address": "10.0.0.1", "Datacenter": "dc1", "Meta": {}} | (node or {}),
        "Service": {"ID": f"web-{port}", "Service": "web", "Address": "127.0.0.1", "Port": port} | service,
        "Checks": listed,
    }


def answer(*entries: Any, **more: str) -> Answer:
    """Those instances, from a server that is well; `more` are headers, written with `_`."""
    return Answer(list(entries), headers=HEALTHY | {name.replace("_", "-"): value for name, value in more.items()})


def at(index: int, *entries: Any) -> Answer:
    return answer(*(entries or (entry(),)), X_Consul_Index=str(index))


def ask(*answers: Answer, url: str = "/web", times: int = 1) -> tuple[list[Resolution], list[Query]]:
    """Resolve so many times, each time with the answer before."""

    async def main() -> tuple[list[Resolution], list[Query]]:
        async with FaultyConsul(*answers) as faulty:
            consul = Consul.from_url(f"consul://{faulty.address}{url}")
            got: list[Resolution] = []
            for _ in range(times):
                got.append(await consul.resolve("web", got[-1] if got else None))
        return got, faulty.queries

    return asyncio.run(main())


def places(resolution: Resolution) -> list[str]:
    return [str(endpoint) for endpoint in resolution.endpoints]


def refusal(*answers: Answer, url: str = "/web") -> ConsulError:
    with pytest.raises(ConsulError) as caught:
        ask(*answers, url=url)
    return caught.value


# The queries


def test_D4_the_first_query_is_plain_and_the_next_waits_with_the_index() -> None:
    got, queries = ask(at(7), at(9), url="/web?wait=20", times=2)
    assert [query.path for query in queries] == ["/v1/health/service/web"] * 2
    assert queries[0].params == [("stale", "true"), ("passing", "true")]
    assert queries[1].params == [("stale", "true"), ("passing", "true"), ("index", "7"), ("wait", "20s")]
    assert [resolution.ttl for resolution in got] == [None, None]
    assert got[1].index == ConsulIndex(9, known_leader=True, last_contact=0)


def test_D4_every_parameter_reaches_consul() -> None:
    _, queries = ask(at(7), url="/we+b?tag=v2&tag=a%26b&dc=dc2&near=_agent&stale=false&warning=true")
    assert queries[0].path == "/v1/health/service/we+b"
    assert queries[0].params == [("tag", "a&b"), ("tag", "v2"), ("dc", "dc2"), ("near", "_agent")]


def test_D4_a_smaller_index_is_forgotten_and_the_next_query_is_plain() -> None:
    got, queries = ask(at(23), at(11, entry(8002)), at(12), at(13), times=4)
    assert [query["index"] for query in queries] == [None, "23", None, "12"]
    assert places(got[1]) == ["127.0.0.1:8002"]


@pytest.mark.parametrize("said", ["0", "-5", "abc", "7 8", "1e3", "9" * 30, None])
def test_D4_an_index_below_1_or_none_at_all_is_never_waited_with(said: str | None) -> None:
    headers = {name: value for name, value in HEALTHY.items() if name != "X-Consul-Index"}
    got, queries = ask(Answer([entry()], headers=headers | ({"X-Consul-Index": said} if said else {})), times=2)
    assert [query["index"] for query in queries] == [None, None]
    assert got[0].ttl == resolver.POLL_EVERY


def test_D4_an_index_that_stays_is_waited_with_again() -> None:
    """A return is not a change: Consul returns after the wait with what was there before."""
    got, queries = ask(at(7), times=3)
    assert [query["index"] for query in queries] == [None, "7", "7"]
    assert got[0] == got[1] == got[2]


def test_D4_an_answer_may_take_longer_than_the_wait_and_a_sixteenth(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    async def get(self: ConsulAgent, path: Any, params: Any, *, timeout: float) -> client.Answer:
        given.append(timeout)
        return client.Answer([entry()], httpx.Headers(HEALTHY), had_token=False)

    monkeypatch.setattr(ConsulAgent, "get", get)
    consul = Consul(ConsulAgent("127.0.0.1"), "web", wait=160)
    first = asyncio.run(consul.resolve("web", None))
    asyncio.run(consul.resolve("web", first))
    assert given[0] > 7.2  # as long as a server tries to find a leader
    assert given[1] > 170 + 2


def test_D4_an_index_of_someone_else_is_not_waited_with() -> None:
    async def main() -> list[Query]:
        async with FaultyConsul(at(7)) as faulty:
            await Consul.from_url(f"consul://{faulty.address}/web").resolve("web", Resolution([], None, index=99))
        return faulty.queries

    assert asyncio.run(main())[0]["index"] is None


# What is an error


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (Answer(status=403, raw=b"Permission denied"), "Consul answered 403: Permission denied"),
        (Answer(status=403, raw=b"ACL not found"), "Consul answered 403: ACL not found"),
        (Answer(status=429, raw=b""), "Consul answered 429: Too Many Requests"),
        (Answer(status=500, raw=b"No cluster leader", headers={"X-Consul-Index": "1"}), "500: No cluster leader"),
        (Answer(status=404, raw=b"<html><title>gone\x07\r\n  fishing"), "Consul answered 404: Not Found"),
        (Answer(status=500, raw=b"rpc error making call: permission denied"), "500: Permission denied"),
        (Answer(status=301, headers={"location": "/ui/"}), "Consul answered 301"),
        (Answer([entry()], status=204, raw=b""), "Consul answered 204: No Content"),
        (Answer(raw=b"<!DOCTYPE html><html>"), "not JSON: it may be HTML"),
        (Answer(raw=b""), "not JSON: it is empty"),
        (Answer(raw=b"\xff\xfe\x00"), "not JSON"),
        (Answer(raw=b"[" * 200_000), "not JSON"),
        (Answer({"Nodes": []}), "it should be a list of instances and is an object"),
        (Answer(None), "and is null"),
        (Answer("no"), "and is a text"),
        (Answer([None, 3]), "none of its instances can be used: an entry has no Node"),
        (Answer([entry(0), entry(None)]), "'web-0' has no port"),
        (Answer(raw=gzip.compress(b"[]"), headers={"content-encoding": "gzip"}), "is encoded, though none was asked"),
        (Answer([entry()], fault="cut"), "RemoteProtocolError"),
        (Answer(fault="close"), "RemoteProtocolError: the server closed the connection"),
        (Answer(fault="reset"), "no answer from 127.0.0.1"),
        (Answer(raw=b"", headers={"content-length": "nonsense"}), "RemoteProtocolError"),
    ],
)
def test_D4_what_cannot_be_believed_is_an_error(given: Answer, told: str, no_leaks: None) -> None:
    assert told in str(refusal(given))


def test_D4_an_answer_that_the_acls_have_shortened_is_an_error() -> None:
    error = refusal(answer(entry(), X_Consul_Results_Filtered_By_ACLs="true"))
    assert "the token may not see" in str(error)
    assert places(ask(answer(entry(), X_Consul_Results_Filtered_By_ACLs="false"))[0][0]) == ["127.0.0.1:8001"]


def test_D4_a_status_is_told_and_of_the_servers_words_only_those_it_is_known_for() -> None:
    error = refusal(Answer(status=500, raw=b"word " * 10_000))
    assert (error.status, str(error)) == (500, "Consul answered 500: Internal Server Error")


def test_D4_nobody_listens() -> None:
    async def main() -> None:
        async with FaultyConsul() as faulty:
            pass
        await Consul.from_url(f"consul://{faulty.address}/web").resolve("web", None)

    with pytest.raises(ConsulError, match=r"no answer from 127\.0\.0\.1:\d+ \(ConnectError"):
        asyncio.run(main())


@pytest.mark.parametrize("fault", ["hang", "drip", "endless"])
def test_D4_an_answer_is_bounded_in_time_and_size(fault: str, monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    monkeypatch.setattr(resolver, "PATIENCE", 0.3)
    monkeypatch.setattr(client, "LARGEST_ANSWER", 1_500_000)
    began = time.monotonic()
    error = refusal(Answer([entry() for _ in range(50)], fault=fault))
    assert ("is longer than" if fault == "endless" else "no answer from") in str(error)
    assert time.monotonic() - began < 5


def test_D4_a_resolve_that_is_cancelled_leaves_nothing_behind(no_leaks: None) -> None:
    async def main() -> None:
        async with FaultyConsul(Answer(fault="hang")) as faulty:
            asking = asyncio.create_task(Consul.from_url(f"consul://{faulty.address}/web").resolve("web", None))
            while not faulty.queries:
                await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert asyncio.all_tasks() - faulty._busy == {asyncio.current_task()}

    asyncio.run(main())


# Stale answers


def stale(contact: str, leader: str = "true") -> Answer:
    return answer(entry(), X_Consul_LastContact=contact, X_Consul_KnownLeader=leader)


def test_D4_stale_answers_say_how_old_they_are() -> None:
    (fresh,), _ = ask(stale("276"))
    assert (fresh.warnings, fresh.index) == ((), ConsulIndex(7, known_leader=True, last_contact=0.276))
    (behind,), queries = ask(stale("3200"))
    assert behind.warnings == ("the server is behind its leader, last contact 3.2 s ago",)
    assert len(queries) == 1
    (lost,), queries = ask(stale("16517", "false"))
    assert lost.warnings == ("no known leader, last contact 16.5 s ago",)
    assert lost.index == ConsulIndex(7, known_leader=False, last_contact=16.517)
    assert len(queries) == 1


@pytest.mark.parametrize(
    ("url", "old"),
    [
        ("/web", stale("30001", "false")),
        ("/web?stale=10", stale("10500")),
        ("/web", stale("9223372036854", "false")),  # a server that never heard of a leader
        ("/web", stale("unknown", "false")),
        ("/query/web", Answer({"Nodes": [entry()]}, headers=stale("31000").headers)),
    ],
)
def test_D4_an_answer_that_is_too_stale_is_asked_for_again_of_the_leader(url: str, old: Answer) -> None:
    new = answer(entry(8002)) if "query" not in url else Answer({"Nodes": [entry(8002)]}, headers=HEALTHY)
    (got,), queries = ask(old, new, url=url)
    assert places(got) == ["127.0.0.1:8002"]
    assert [query["stale"] for query in queries] == ["true", None]
    assert (queries[1]["index"], got.index.index) == (None, 0)
    assert got.ttl == (resolver.PREPARED_TTL if "query" in url else resolver.POLL_EVERY)
    assert str(refusal(old, Answer(status=500, raw=b"No cluster leader"), url=url)) == (
        "Consul answered 500: No cluster leader"
    )


def test_D4_without_stale_the_leader_answers() -> None:
    (got,), queries = ask(answer(entry()), url="/web?stale=false")
    assert queries[0]["stale"] is None
    assert got.ttl is None


# Instances


def test_D4_an_instance_becomes_an_endpoint() -> None:
    told = entry(
        8001,
        Tags=["v2", "blue"],
        Meta={"version": "2.1", "zone": "eu-1a"},
        Weights={"Passing": 3, "Warning": 2},
        node={"Meta": {"zone": "eu-1b"}},
    )
    nodes_own = entry(8002, Address="", Meta=None, Tags=None, node={"Meta": {"zone": "eu-1b"}})
    (got,), _ = ask(answer(told, nodes_own))
    first, second = got.endpoints
    assert (str(first), first.weight, first.zone) == ("127.0.0.1:8001", 3, "eu-1a")
    assert dict(first.metadata) == {
        "version": "2.1",
        "zone": "eu-1a",
        "tags": "v2,blue",
        "node": "n1",
        "dc": "dc1",
    }
    assert (str(second), second.weight, second.zone) == ("10.0.0.1:8002", 1, "eu-1b")
    assert dict(second.metadata) == {"node": "n1", "dc": "dc1"}


def test_D4_metadata_is_bounded() -> None:
    (got,), _ = ask(answer(entry(Meta={f"k{number}": "x" * 10_000 for number in range(500)} | {"odd": 3})))
    metadata = got.endpoints[0].metadata
    assert len(metadata) <= 70
    assert max(map(len, metadata.values())) == 512


@pytest.mark.parametrize(
    "weights", [None, {}, {"Passing": 0}, {"Passing": -1}, {"Passing": "3"}, {"Passing": True}, {"Passing": 1e999}, 5]
)
def test_D4_an_odd_weight_is_1(weights: Any) -> None:
    (got,), _ = ask(answer(entry(Weights=weights)))
    assert got.endpoints[0].weight == 1


@pytest.mark.parametrize(
    ("checks", "usual", "with_warnings"),
    [
        ({"serfHealth": "passing", "service:web": "passing"}, 5, 5),
        ({"serfHealth": "passing", "service:web": "warning"}, None, 2),
        ({"serfHealth": "warning", "service:web": "critical"}, None, None),
        ({"serfHealth": "critical", "service:web": "passing"}, None, None),
        ({"_node_maintenance": "passing"}, None, None),
        ({"_service_maintenance:web": "warning"}, None, None),
        ({"serfHealth": "a state of tomorrow"}, None, None),
    ],
)
def test_D4_checks_decide_who_may_be_called(
    checks: dict[str, str], usual: float | None, with_warnings: float | None
) -> None:
    """A server that ignores `passing` changes nothing."""
    given = answer(entry(checks=checks, Weights={"Passing": 5, "Warning": 2}))
    for url, expected in (("/web", usual), ("/web?warning=true", with_warnings)):
        (got,), queries = ask(given, url=url)
        assert [endpoint.weight for endpoint in got.endpoints] == ([expected] if expected else [])
        assert (queries[0]["passing"] is None) == (url != "/web")


def test_D4_a_warning_weight_of_0_means_no_calls() -> None:
    given = answer(entry(checks={"a": "warning"}, Weights={"Passing": 1, "Warning": 0}), entry(8002, Checks=None))
    assert places(ask(given, url="/web?warning=true")[0][0]) == ["127.0.0.1:8002"]


def test_D4_entries_that_say_too_little_are_left_out_and_told() -> None:
    nowhere = entry(8004, Address="", node={"Address": ""})
    bad = [
        entry(0),
        entry("8003"),
        nowhere,
        entry(8005, Address="http://x/"),
        {"Node": {}},
        entry(8006) | {"Checks": [1]},
        entry(8007) | {"Checks": 1},
    ]
    (got,), _ = ask(answer(*bad, entry(8001), entry(8001, Weights={"Passing": 9})))
    assert [(str(endpoint), endpoint.weight) for endpoint in got.endpoints] == [("127.0.0.1:8001", 1)]
    assert got.warnings == ("7 of its instances left out: 'web-0' has no port",)


def test_D4_an_empty_answer_is_an_answer_and_tells_of_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    (got,), _ = ask(answer())
    assert got.endpoints == ()
    assert got.index.index == 7
    assert "no token was sent" in got.warnings[0]
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", TOKEN)
    assert ask(answer())[0][0].warnings == ()


# Prepared queries


@pytest.mark.parametrize(
    ("dns", "ttl"),
    [
        ({"TTL": "15s"}, 15),
        ({"TTL": "1m0.5s"}, 60.5),
        ({"TTL": "500ms"}, 0.5),
        ({"TTL": "24h"}, 300),
        ({"TTL": ""}, 10),
        ({"TTL": "0s"}, 10),
        ({"TTL": "soon"}, 10),
        ({"TTL": "5s later"}, 10),
        ({"TTL": 7}, 10),
        (None, 10),
    ],
)
def test_D4_a_prepared_query_is_polled(dns: Any, ttl: float) -> None:
    given = Answer({"Service": "web", "Nodes": [entry()], "DNS": dns, "Datacenter": "dc2"}, headers=HEALTHY)
    got, queries = ask(given, url="/query/near-web?near=_agent", times=2)
    assert [query.path for query in queries] == ["/v1/query/near-web/execute"] * 2
    assert [query.params for query in queries] == [[("near", "_agent"), ("stale", "true")]] * 2
    assert (places(got[1]), got[1].ttl, got[1].index.index) == (["127.0.0.1:8001"], ttl, 0)


@pytest.mark.parametrize(
    "given", [Answer(status=404, raw=b"Query not found"), Answer([]), Answer({}), Answer({"Nodes": None})]
)
def test_D4_a_prepared_query_that_is_not_there_is_an_error(given: Answer) -> None:
    assert refusal(given, url="/query/none").status in (404, 200)


# Tokens


def tokens_of(*urls: str) -> list[str | None]:
    return [ask(at(7), url=url)[1][0].headers.get("x-consul-token") for url in urls]


def test_D4_the_token_comes_from_the_url_s_file_then_the_environment_s_file_then_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("of-my-file\n")
    (tmp_path / "env").write_text(" of-the-environments-file\r\n")
    mine = f"/web?token_file={tmp_path}/mine"
    assert tokens_of("/web", mine) == [None, "of-my-file"]
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "of-the-environment")
    assert tokens_of("/web", mine) == ["of-the-environment", "of-my-file"]
    monkeypatch.setenv("CONSUL_HTTP_TOKEN_FILE", str(tmp_path / "env"))
    assert tokens_of("/web", mine) == ["of-the-environments-file", "of-my-file"]
    (tmp_path / "mine").write_text("rotated")
    assert tokens_of(mine) == ["rotated"]


def test_D4_a_token_is_sent_as_a_header_and_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    (got,), (query,) = ask(at(7), url="/web?tag=private-tag")
    assert query.headers["x-consul-token"] == TOKEN
    assert TOKEN not in str((query.path, query.params))
    consul = Consul.from_url("consul://127.0.0.1/web?tag=private-tag")
    error = refusal(Answer(status=403, raw=f"token {TOKEN} is not known".encode()))
    assert str(error) == "Consul answered 403: Forbidden"
    assert TOKEN not in "".join([repr(got), repr(consul), consul.source, repr(error), caplog.text])
    assert "private-tag" not in consul.source
    assert "private-tag" not in caplog.text
    for odd in ({"content-encoding": TOKEN}, {"bad name": TOKEN}, {"content-length": TOKEN}):
        assert TOKEN not in "".join(traceback.format_exception(refusal(Answer(headers=odd))))
    assert TOKEN not in str(refusal(Answer(raw=TOKEN.encode())))
    assert [record.name for record in caplog.records if record.name.startswith("http")] == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"sec\xffret", "cannot be read (it is not text)"),
        (b"sec ret", "holds what cannot be a token"),
        (b"sec\r\nX-Other: ret", "holds what cannot be a token"),
        ("sec\u00e9ret".encode(), "holds what cannot be a token"),
        (b"secret" * 1000, "holds what cannot be a token"),
    ],
)
def test_D4_a_token_file_that_cannot_be_used_is_an_error_of_the_query(
    content: bytes | None, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    error = refusal(at(7), url=f"/web?token_file={file}")
    assert told in str(error)
    assert str(file) in str(error)
    assert "sec" not in str(error).replace(str(file), "")


@pytest.mark.parametrize("by", ["the URL", "the environment"])
def test_T3_a_token_in_the_place_of_its_file_is_not_told(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    # The guards: `consul._named`, and `repr=False` of `ConsulAgent.token_file`.
    monkeypatch.setenv("CONSUL_HTTP_TOKEN_FILE", TOKEN if by == "the environment" else "")
    url = f"/web?token_file={TOKEN}" if by == "the URL" else "/web"
    assert str(refusal(at(7), url=url)) == "the token file cannot be read (No such file or directory)"
    assert TOKEN not in repr(Consul.from_url(f"consul://h{url}"))


def test_D4_a_token_file_that_is_a_pipe_holds_nothing_up(tmp_path: Path) -> None:
    assert "is not a file" in str(refusal(at(7), url=f"/web?token_file={tmp_path}"))


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A server's side of TLS for 127.0.0.1, and the bundle to trust it by."""
    import trustme

    issuer = trustme.CA()
    bundle = tmp_path_factory.mktemp("authority") / "ca.pem"
    issuer.cert_pem.write_to_path(str(bundle))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issuer.issue_cert("127.0.0.1").configure_cert(context)
    return context, bundle


def test_D4_https_is_verified_by_ca_file_or_the_environment(
    authority: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, bundle = authority

    async def main() -> None:
        async with FaultyConsul(at(7), tls=context) as faulty:
            url = f"consul+https://{faulty.address}/web"
            with pytest.raises(ConsulError, match=r"IdentityError: .* certificate verify failed"):
                await Consul.from_url(url).resolve("web", None)
            with pytest.raises(ConsulError, match="'/none' cannot be used"):
                await Consul.from_url(f"{url}?ca_file=/none").resolve("web", None)
            monkeypatch.setenv("CONSUL_CACERT", bundle.read_text())
            with pytest.raises(ConsulError, match="what looks like a certificate") as caught:
                await Consul.from_url(url).resolve("web", None)
            assert "-----BEGIN" not in str(caught.value)
            assert places(await Consul.from_url(f"{url}?ca_file={bundle}").resolve("web", None))
            monkeypatch.setenv("CONSUL_CACERT", str(bundle))
            assert places(await Consul.from_url(url).resolve("web", None))

    asyncio.run(main())


def test_D4_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert places(ask(at(7))[0][0]) == ["127.0.0.1:8001"]


# URLs


def test_a_url_is_read_whole() -> None:
    consul = Consul.from_url(
        "consul+https://[::1]:8501/web%2Bapi?tag=b&tag=a&dc=dc2&near=_agent&stale=10&warning=true&wait=60"
        "&ca_file=/etc/ca.pem&token_file=/run/token"
    )
    agent = ConsulAgent("::1", 8501, scheme="https", ca_file="/etc/ca.pem", token_file="/run/token")
    assert consul == Consul(agent, "web+api", tags=("a", "b"), dc="dc2", near="_agent", stale=10, warning=True, wait=60)
    assert consul.source == "consul+https://[::1]:8501/web+api"
    assert isinstance(consul, Resolver)


def test_a_url_may_say_little() -> None:
    consul = Consul.from_url("consul://Consul.Internal/web")
    assert (consul.source, consul.wait, consul.stale) == ("consul://consul.internal:8500/web", 30, 30)
    assert Consul.from_url("consul://h/query").is_query is False
    prepared = Consul.from_url("consul://h/query/near-web?stale=false")
    assert (prepared.source, prepared.is_query, prepared.stale) == ("consul://h:8500/query/near-web", True, False)


def test_D4_one_watch_for_what_is_the_same_with_the_same_token() -> None:
    def key(tail: str) -> object:
        return Consul.from_url(f"consul://127.0.0.1{tail}").watch_key

    assert key("/web?tag=a&tag=b&wait=30") == key(":8500/web?stale=true&tag=b&tag=a&tag=a")
    others = [
        "/web",
        "/web?token_file=/a",
        "/web?token_file=/b",
        "/api",
        "/query/web",
        "/web?dc=dc2",
        "/web?near=_agent",
    ]
    others += ["/web?stale=false", "/web?stale=1", "/web?warning=true", "/web?wait=31", ":8501/web", "/web?tag=a"]
    assert len({key(tail) for tail in others}) == len(others)
    assert hash(key("/web")) == hash(key("/web"))


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("consul://127.0.0.1:8500/", "name must be 1 to 255 printable ASCII characters"),
        ("consul://127.0.0.1:8500", "name must be"),
        ("consul:///web", "must name the host of a Consul agent"),
        ("consul://:8500/web", "must name the host of a Consul agent"),
        ("consul:web", "must name the host of a Consul agent"),
        ("consul://127.0.0.1/a/b", "must have one name after the address, or query/"),
        ("consul://127.0.0.1/query/a/b", "must have one name after the address, or query/"),
        ("consul://127.0.0.1/query/", "name must be"),
        ("consul://127.0.0.1/web/", "must have one name after the address"),
        ("consul://127.0.0.1/a%2Fb", "name must be"),
        ("consul://127.0.0.1/..", "name must be"),
        ("consul://127.0.0.1/%2e%2e", "name must be"),
        ("consul://127.0.0.1/%ff", "name must be"),
        ("consul://127.0.0.1/a%0ab", "name must be"),
        ("consul://127.0.0.1/a b", "must be a URL of printable ASCII characters without spaces"),
        ("consul://127.0.0.1/a\nb", "must be a URL of printable ASCII"),
        ("consul://127.0.0.1/\u00e4", "must be a URL of printable ASCII"),
        ("consul://127.0.0.1:0/web", "must have a port between 1 and 65535"),
        ("consul://127.0.0.1:99999/web", "must have a port between 1 and 65535"),
        ("consul://127.0.0.1:x/web", "must have a port between 1 and 65535"),
        ("consul://[::1/web", "an IPv6 address stands in brackets"),
        ("consul://[fe80::1%25eth0]/web", "host must be an address without a zone"),
        ("consul://1.2.3/web", "host must be an address without a zone, or a host name"),
        ("consul://a..b/web", "host must be an address without a zone, or a host name"),
        ("consul://127.0.0.1/web#frag", "must have no fragment"),
        ("consul+http://127.0.0.1/web", "must begin with consul:// or consul+https://"),
        ("consul://127.0.0.1/web?tags=v2", "got 'tags'; did you mean 'tag'?"),
        ("consul://127.0.0.1/web?datacenter=dc2", "got 'datacenter'"),
        ("consul://127.0.0.1/web?dc=a&dc=b", "must give 'dc' once"),
        ("consul://127.0.0.1/web?tag=", "tags must be a tuple of texts"),
        ("consul://127.0.0.1/web?dc=", "must give 'dc' a value, or leave it out"),
        ("consul://127.0.0.1/web?wait=0", "wait must be >= 1, got 0.0"),
        ("consul://127.0.0.1/web?wait=601", "wait must be <= 600"),
        ("consul://127.0.0.1/web?wait=30s", "wait must be a finite number, got '30s'"),
        ("consul://127.0.0.1/web?wait=nan", "wait must be a finite number"),
        ("consul://127.0.0.1/web?stale=0", "stale must be > 0, or true or false"),
        ("consul://127.0.0.1/web?stale=yes", "stale must be a finite number, or true or false, got 'yes'"),
        ("consul://127.0.0.1/web?warning=1", "warning must be true or false, got '1'"),
        ("consul://127.0.0.1/web?ca_file=/ca.pem", "must be of the scheme consul+https where ca_file is given"),
        ("consul://127.0.0.1/web?dc=%ff", "in UTF-8"),
        ("consul://127.0.0.1/query/a?tag=v2", "must not give 'tag' for a prepared query"),
        ("consul://127.0.0.1/query/a?wait=10", "must not give 'wait' for a prepared query"),
    ],
)
def test_a_bad_url_is_a_complaint_that_names_the_part_and_shows_an_example(url: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Consul.from_url(url)
    assert told in str(caught.value)
    assert "for example 'consul://127.0.0.1:8500/orders?tag=v2'" in str(caught.value)
    assert {fault.path for fault in caught.value.faults} == {"resolver"}


@pytest.mark.parametrize(
    "url",
    [
        "consul://user:hunter2@127.0.0.1/web",
        "consul://hunter2@127.0.0.1/web",
        "consul://127.0.0.1/web?token=hunter2",
        "consul://127.0.0.1/web?X-Consul-Token=hunter2",
        "consul://127.0.0.1/web?hunter2",
        "consul://127.0.0.1/web?tokn=hunter2",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Consul.from_url(url)
    assert "hunter2" not in str(caught.value)
    assert "token_file" in str(caught.value)


def test_settings_in_code_are_held_to_the_same_rules() -> None:
    with pytest.raises(ConfigError) as caught:
        Consul(ConsulAgent("127.0.0.1"), "a/b", wait=True, tags=["v2"])  # type: ignore[arg-type]
    assert [fault.path for fault in caught.value.faults] == ["consul.name", "consul.tags", "consul.wait"]
    with pytest.raises(ConfigError, match=r"consulagent\.host: .*consulagent\.port|consulagent\.port"):
        ConsulAgent("", 0)


def test_a_thousand_instances_take_little_time() -> None:
    entries = [entry(1000 + number, Meta={"version": "1"}, Tags=["a", "b"]) for number in range(1000)]
    body = json.dumps(entries).encode()
    (got,), _ = ask(Answer(raw=body, headers=HEALTHY))
    assert len(got.endpoints) == 1000


def test_D4_a_name_is_asked_at_each_of_its_addresses(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    """The first of them refuses."""

    def found(host: str, port: int, *more: Any, **options: Any) -> list[Any]:
        if host != "consul.test":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.9", "127.0.0.1")]

    async def main() -> Resolution:
        monkeypatch.setattr(socket, "getaddrinfo", found)
        async with FaultyConsul(at(7)) as faulty:
            port = faulty.address.rpartition(":")[2]
            with pytest.raises(ConsulError, match=r"no answer from other\.test:\d+ \(gaierror: .*not known\)"):
                await Consul.from_url(f"consul://other.test:{port}/web").resolve("web", None)
            return await Consul.from_url(f"consul://consul.test:{port}/web").resolve("web", None)

    assert places(asyncio.run(main())) == ["127.0.0.1:8001"]


def test_D4_a_name_that_nobody_finds_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CONNECT_WITHIN", 0.05)

    async def main() -> None:
        async def slow(*given: Any, **options: Any) -> Any:
            await asyncio.sleep(60)

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", slow)
        await Consul.from_url("consul://consul.test/web").resolve("web", None)

    with pytest.raises(ConsulError, match=r"\(ConnectTimeout: no address of consul\.test was found in time\)"):
        asyncio.run(main())
