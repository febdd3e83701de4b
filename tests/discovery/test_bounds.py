"""What whoever answers us can make us read, keep and show: so much and no more. Each test names its guard."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from faulty_consul import Answer, FaultyConsul
from played import Played

from meshlib import Endpoint, HealthCheck, Mesh, Service
from meshlib import consul as consul_client
from meshlib.consul import ConsulAgent, ConsulError
from meshlib.discovery import feed
from meshlib.health import Finding, check
from meshlib.plain import plain
from waiting import until

pytestmark = pytest.mark.usefixtures("hurry", "no_leaks")

EVIL = "eu\x1b[2J\r\nERROR all is lost\u202e\u2028\x00"


def talking(*pieces: bytes, then: bytes = b"") -> Callable[[Callable[[int], Awaitable[Any]]], Any]:
    """Run a coroutine function of the port of a server that says the pieces, and the last one over and over."""

    async def main(asked: Callable[[int], Awaitable[Any]]) -> Any:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.readuntil(b"\r\n\r\n")
                writer.writelines(pieces)
                while then:
                    writer.write(then)
                    await writer.drain()
                    await asyncio.sleep(0)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            return await asked(server.sockets[0].getsockname()[1])
        finally:
            server.close()

    return lambda asked: asyncio.run(main(asked))


INTERIM = b"HTTP/1.1 103 Early Hints\r\n\r\n"
ENDLESS = {
    "interim answers": ((), INTERIM * 10),
    "headers": ((b"HTTP/1.1 200 OK\r\n",), b"X-More: and more\r\n" * 100),
    "trailers": ((b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",), b"X-More: and more\r\n" * 100),
    "chunk extensions": ((b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",), b"x" * 1000),
    "body": ((b"HTTP/1.1 200 OK\r\n\r\n",), b"x" * 10_000),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_nothing_endless_is_read_to_its_timeout(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The guards: `once.MOST_INTERIM`, `head.LONGEST_HEAD`, `consul.LARGEST_ANSWER`, `health.LONGEST_BODY`.
    monkeypatch.setattr(consul_client, "LARGEST_ANSWER", 1 << 20)
    pieces, then = ENDLESS[what]

    async def asked(port: int) -> tuple[Finding | None, float]:
        began = time.monotonic()
        with pytest.raises(ConsulError) as caught:
            await ConsulAgent("127.0.0.1", port).get(["v1"], [], timeout=20)
        assert "within" not in str(caught.value)
        service, settings = Service("orders", [f"127.0.0.1:{port}"]), HealthCheck("/", timeout=20)
        return await check(service, settings, Endpoint("127.0.0.1", port)), time.monotonic() - began

    finding, took = talking(*pieces, then=then)(asked)
    assert took < 10
    assert finding == (Finding(True, "status 200") if what == "body" else Finding(False, "RemoteProtocolError"))


def test_some_interim_answers_are_fine() -> None:
    async def asked(port: int) -> Any:
        return (await ConsulAgent("127.0.0.1", port).get(["v1"], [], timeout=20)).data

    assert talking(INTERIM * 16, b"HTTP/1.1 200 OK\r\n\r\n[]")(asked) == []


@pytest.mark.parametrize(
    "raw",
    [b"[" * 500_000, b'{"a":' * 500_000, b"9" * 500_000, b'["' + b"\\ud800" * 9 + b'"]'],
    ids=["lists", "tables", "digits", "surrogates"],
)
def test_json_of_any_depth_is_an_error_or_no_list(raw: bytes) -> None:
    # The guard: `consul._json`, which takes a RecursionError for what it is.
    async def main() -> Any:
        async with FaultyConsul(Answer(raw=raw)) as server:
            host, _, port = server.address.partition(":")
            try:
                return (await ConsulAgent(host, int(port)).get(["v1"], [], timeout=20)).data
            except ConsulError as error:
                return str(error)

    assert "not JSON" in str(found := asyncio.run(main())) or isinstance(found, list)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_nothing_is_decoded(encoding: str) -> None:
    # The guard: `ConsulAgent._exchange` refuses what is encoded, so there is no ratio to bound.
    async def main() -> None:
        async with FaultyConsul(Answer(headers={"content-encoding": encoding})) as server:
            host, _, port = server.address.partition(":")
            await ConsulAgent(host, int(port)).get(["v1"], [], timeout=20)

    with pytest.raises(ConsulError, match="is encoded, though none was asked for"):
        asyncio.run(main())


def test_a_service_has_so_many_endpoints_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The guard: `Feed._bounded`.
    monkeypatch.setattr(feed, "MOST_ENDPOINTS", 10)
    every = [Endpoint(f"10.0.0.{number}", 80, priority=number % 2) for number in range(1, 31)]
    resolver = Played(*every)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        first = _places(mesh)
        assert len(first) == 10
        assert {each.priority for each in mesh.snapshot()["orders"].nodes} == {0}
        assert mesh.snapshot()["orders"].warnings == ("it has 30 endpoints, of which 10 are used",)
        asked = len(resolver.asked)
        resolver.say(*reversed(every))
        until(lambda: len(resolver.asked) > asked + 5)
        assert _places(mesh) == first
        resolver.say(*every[:10])
        until(lambda: mesh.snapshot()["orders"].warnings == () and len(_places(mesh)) == 10)
    assert caplog.text.count("of which 10 are used") == 1


def test_so_many_names_are_looked_up_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # The guard: `Feed._bounded`, for each name is a watch that asks the DNS again and again.
    monkeypatch.setattr(feed, "MOST_NAMES", 2)
    resolver = Played(*(f"n{number}.invalid:80" for number in range(9)), "10.0.0.1:80")
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        assert _places(mesh) == {"10.0.0.1:80"}
        assert "it has 9 names, of which 2 are used" in mesh.snapshot()["orders"].warnings
        assert mesh._upkeep.updates is not None
        followed = mesh._upkeep.updates._followed["orders"].feed
        assert followed is not None
        assert len(followed._names) == 2


def test_what_comes_from_outside_is_shown_escaped_and_short(caplog: pytest.LogCaptureFixture) -> None:
    # The guard: `plain`, in `Watch` and in `admitted`.
    resolver = Played(Endpoint("10.0.0.1", 80, zone=EVIL * 50))
    resolver.warnings = (EVIL * 1000,) * 100
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        snapshot = mesh.snapshot()["orders"]
        shown = [snapshot.nodes[0].zone, *snapshot.warnings]
        resolver.fail(RuntimeError(EVIL * 1000))
        until(lambda: "RuntimeError" in str(mesh.snapshot()["orders"].warnings))
        shown += [*mesh.snapshot()["orders"].warnings, *caplog.messages]
    assert any("RuntimeError" in each for each in caplog.messages)
    assert len(shown) < 50
    assert all(each.isprintable() for each in shown), shown
    assert all(len(each) < 600 for each in shown)


@pytest.mark.parametrize("text", ["x" * 100_000, "x." * 50_000 + "@" * 50_000])
def test_an_error_of_any_length_is_read_once(text: str) -> None:
    # The guard: `watch._URL`, which looks for a scheme where a word begins, and not at each of its letters.
    resolver = Played("10.0.0.1:80")
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        began = time.process_time()
        resolver.fail(RuntimeError(text))
        until(lambda: "RuntimeError" in str(mesh.snapshot()["orders"].warnings))
    assert time.process_time() - began < 3


def test_plain_text() -> None:
    assert plain("zürich 1") == "zürich 1"
    assert plain("a\x1b[0m\nb\udc80\u202e") == "a\\x1b[0m\\nb\\udc80\\u202e"
    assert plain("x" * 501) == "x" * 497 + "..."


def _places(mesh: Mesh) -> set[str]:
    return {node.endpoint for node in mesh.snapshot()["orders"].nodes}
