"""Who may be called (rule S1), whatever a URL, a redirect or the environment says.

Each test says which guard it is there for: without that guard it fails.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider

from conftest import Colour
from meshes import get_or_error
from meshlib import TLS, ConfigError, DeadlineExceeded, Mesh, Retry, Service, UnknownService, deadline, report
from meshlib.testing import Upstream, upstreams
from meshlib.transport import tls, trust


@pytest.fixture
def orders_and_other(no_leaks: None) -> Iterator[tuple[Upstream, Upstream]]:
    with upstreams(2) as (orders, other):
        yield orders, other


def mesh_over(orders: Upstream, **settings: Any) -> Mesh:
    return Mesh(Service("orders", [orders.address]), **settings)


async def error_of(client: Any, url: str) -> Exception:
    with pytest.raises((UnknownService, httpx.InvalidURL)) as caught:
        await client.get(url)
    return caught.value


def test_S1_no_way_to_write_a_host_reaches_what_is_not_declared(
    colour: Colour, orders_and_other: tuple[Upstream, Upstream]
) -> None:
    # The guard: `Router._route` raises for every name that is no service's.
    orders, other = orders_and_other
    port = other.port
    tricks = [
        f"http://127.0.0.1:{port}/",
        f"http://orders@127.0.0.1:{port}/",
        f"http://orders:80@127.0.0.1:{port}/",
        f"http://orders%2f@127.0.0.1:{port}/",
        f"http://orders\\@127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}#@orders/",
        f"http://127.0.0.1:{port}?@orders/",
        f"http://[::ffff:127.0.0.1]:{port}/",
        f"http://localhost:{port}/",
        f"http://LOCALHOST.:{port}/",
        f"http://127.1:{port}/",
        f"http://2130706433:{port}/",
        f"http://0x7f000001:{port}/",
        f"http://orders:{port}/",
        f"//127.0.0.1:{port}/",
        "http://orders../",
        "http://.orders/",
        "http://%6frders/",
        "http://orders%00/",
        "http://orders%2e/",
        "http://orders\u200b/",
        "http://ord\u00aders/",
        "http://\uff4frders/",
        "http://order\u017f/",
        "http://[orders]/",
        "http://orders,/",
        "http:///orders/",
        "file://orders/",
        "https://orders/",
    ]

    async def script(client: httpx.AsyncClient) -> None:
        for url in tricks:
            await error_of(client, url)

    for passthrough in (False, True):
        # Those that name nobody else are refused even by a mesh that lets others through.
        tricks = tricks if not passthrough else [f"http://orders:{port}/", "http:///orders/", "file://orders/"]
        colour.run(mesh_over(orders, passthrough=passthrough), script, None)
    assert orders.log() == other.log() == []


def test_S1_other_spellings_of_a_service_reach_it(colour: Colour, upstream: Upstream) -> None:
    spellings = ("http://ORDERS/", "http://orders./", "http://u@orders/", "http://orders:80/", "http://orders\u3002/")

    async def script(client: httpx.AsyncClient) -> None:
        for url in spellings:
            assert (await client.get(url)).status_code == 200

    for passthrough in (False, True):
        colour.run(mesh_over(upstream, passthrough=passthrough), script, None)
    assert [request.values("host") for request in upstream.log()] == [["orders"]] * 2 * len(spellings)


def test_S1_a_host_without_end_is_refused_in_no_time_and_few_words(upstream: Upstream) -> None:
    # The guards: `validation.bare`, which reads a text once, and `plain` in `UnknownService`.
    began = time.process_time()
    with mesh_over(upstream).client() as client, pytest.raises(UnknownService) as caught:
        client.get(f"http://{'a' * 60_000}/")
    assert time.process_time() - began < 5
    assert len(str(caught.value)) < 1000


def test_S1_what_only_looks_like_idna_is_an_unknown_service(upstream: Upstream) -> None:
    # The guard: `_name_in` takes the host as it goes over the wire; `URL.host` raises an error of a codec's.
    request = httpx.Request("GET", "http://orders/", headers={"host": "orders"})
    request.url = httpx.URL("http://xn--orders-/")
    with mesh_over(upstream).transport() as transport, pytest.raises(UnknownService, match="no service 'xn--orders-'"):
        transport.handle_request(request)


def test_S1_a_redirect_goes_nowhere_else(colour: Colour, orders_and_other: tuple[Upstream, Upstream]) -> None:
    # The guard: `Router._route`, which sees every request of a redirect.
    orders, other = orders_and_other
    orders.script({"status": 307, "headers": {"location": f"http://orders@{other.address}/"}})
    mesh = mesh_over(orders)
    error = colour.run(mesh, get_or_error, follow_redirects=True)
    assert isinstance(error, UnknownService)
    assert report(error).attempts == []
    assert other.log() == []


@pytest.mark.parametrize("where", ["a service", "outside"])
def test_S1_a_redirect_elsewhere_carries_no_credentials(
    orders_and_other: tuple[Upstream, Upstream], where: str
) -> None:
    # The guard is httpx's own, and no header is added by us: `SparingCookies` and the drivers take none along.
    orders, other = orders_and_other
    target = "http://users/" if where == "a service" else f"http://{other.address}/"
    orders.script({"status": 302, "headers": {"location": target, "set-cookie": "session=hush"}})
    mesh = Mesh(Service("orders", [orders.address]), Service("users", [other.address]), passthrough=True)
    with mesh.client("orders", follow_redirects=True) as client:
        client.get("/", headers={"authorization": "Bearer hush", "cookie": "a=hush"})
    [asked], [followed] = orders.log(), other.log()
    assert asked.values("authorization") == ["Bearer hush"]
    assert "hush" not in str(followed.headers)


def test_S1_others_are_called_plainly_where_that_is_wanted(
    colour: Colour, orders_and_other: tuple[Upstream, Upstream]
) -> None:
    # The guards: `Router.is_ours` chooses the way, and the plain one adds no header.
    orders, other = orders_and_other

    async def script(client: httpx.AsyncClient) -> Any:
        with deadline(20.0):
            await client.get("http://orders/a")
            for path in "bc":
                found = await client.get(f"http://{other.address}/{path}", headers={"x-mine": "1"})
            return found

    mesh = mesh_over(orders, passthrough=True, tracer_provider=TracerProvider())
    found = colour.run(mesh, script, None)
    assert found.status_code == 200
    with pytest.raises(ValueError, match="no report"):
        report(found)
    [ours] = orders.log()
    assert ours.values("x-meshlib-deadline-ms")
    assert ours.values("traceparent")
    plain = other.log()
    assert {name.lower() for name, _ in plain[0].headers} == {
        *("host", "accept", "accept-encoding", "connection", "user-agent", "x-mine")
    }
    assert [request.connection for request in plain] == [1, 1]  # one pool


def test_S1_a_host_that_is_let_through_and_hangs_is_not_waited_for_for_ever(
    colour: Colour, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The guards: `_bounded`, since a mesh's clients have no timeouts of httpx's, and `Bounds`.
    monkeypatch.setattr("meshlib.transport.passthrough.PATIENCE", 0.2)
    upstream.script(then={"fault": "hang"})

    async def script(client: httpx.AsyncClient) -> list[Exception]:
        found = []
        for seconds, timeout in ((60.0, None), (0.1, 60.0)):
            with pytest.raises(httpx.ReadTimeout) as caught, deadline(seconds):
                await client.get(f"http://{upstream.address}/", timeout=timeout)
            found.append(caught.value)
        return found

    began = time.monotonic()
    colour.run(Mesh(passthrough=True), script, None)
    assert time.monotonic() - began < 4


def test_C4_a_host_that_is_let_through_gets_nothing_after_the_deadline(colour: Colour, upstream: Upstream) -> None:
    # The guard: `_bounded`.
    async def script(client: httpx.AsyncClient) -> None:
        with deadline(1e-9), pytest.raises(DeadlineExceeded):
            await client.post(f"http://{upstream.address}/")

    colour.run(Mesh(passthrough=True), script, None)
    assert upstream.log() == []


def test_C4_a_body_that_drips_ends_at_the_deadline_where_others_are_let_through(
    colour: Colour, upstream: Upstream
) -> None:
    # The guards: `Body` and `AsyncBody`. Each operation has its bound, but they are many.
    upstream.script({"fault": "drip", "size": 1000, "interval": 0.05})

    async def dripping() -> AsyncIterator[bytes]:
        for _ in range(1000):
            await anyio.sleep(0.05)
            yield b"x"

    def dripping_sync() -> Iterator[bytes]:
        for _ in range(1000):
            time.sleep(0.05)
            yield b"x"

    async def script(client: httpx.AsyncClient) -> None:
        content: Any = dripping_sync() if colour.is_sync else dripping()
        for sent in ({}, {"content": content}):
            with deadline(0.3), pytest.raises(DeadlineExceeded, match="has passed"):
                await client.post(f"http://{upstream.address}/", **sent)

    began = time.monotonic()
    colour.run(Mesh(passthrough=True), script, None)
    assert time.monotonic() - began < 20


def test_C4_a_timeout_of_the_source_itself_is_its_own(no_leaks: None, upstream: Upstream) -> None:
    # The guard: `AsyncBody`, which cancels the source by a timeout as well.
    async def failing() -> AsyncIterator[bytes]:
        yield b"x"
        raise TimeoutError("mine")

    async def main() -> None:
        async with Mesh(passthrough=True).async_client() as client:
            with deadline(60), pytest.raises(TimeoutError, match="mine"):
                await client.post(f"http://{upstream.address}/", content=failing())

    asyncio.run(main())


def test_S1_a_redirect_back_to_a_service_has_no_timeouts_of_ours(
    orders_and_other: tuple[Upstream, Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The guard: `_bounded` leaves the request as it is.
    monkeypatch.setattr("meshlib.transport.passthrough.PATIENCE", 0.5)
    orders, other = orders_and_other
    other.script({"status": 307, "headers": {"location": "http://orders/"}})
    orders.script({"delay": 1.0})
    with mesh_over(orders, passthrough=True).client(follow_redirects=True) as client:
        answer = client.post(f"http://{other.address}/", content=b"whole")
    assert (answer.status_code, len(report(answer).attempts)) == (200, 1)
    assert [each.log()[0].body_length for each in (orders, other)] == [5, 5]


@pytest.mark.filterwarnings("ignore:unclosed")  # httpx has nobody see to what a loop leaves behind
def test_S3_each_loop_has_a_plain_transport_of_its_own(no_leaks: None, upstream: Upstream) -> None:
    # The guard: `AsyncPassingTransport` keeps them by loop; a connection of a loop that is over answers nobody.
    client = Mesh(passthrough=True).async_client()

    async def call() -> int:
        return (await client.get(f"http://{upstream.address}/")).status_code

    async def last() -> int:
        status = await call()
        await client.aclose()
        return status

    assert [asyncio.run(call()), asyncio.run(call()), asyncio.run(last())] == [200, 200, 200]
    gc.collect()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to test without fork")
def test_S3_a_child_shares_no_plain_connection(no_leaks: None, upstream: Upstream) -> None:
    # The guard: `PassingTransport.forget`.
    with Mesh(passthrough=True).client(base_url=f"http://{upstream.address}") as client:
        client.get("/parent")
        if not (child := os.fork()):
            os._exit(0 if client.get("/child").status_code == 200 else 1)
        assert os.waitpid(child, 0)[1] == 0
        client.get("/parent")
    assert [request.connection for request in upstream.log()] == [1, 2, 1]


@pytest.mark.parametrize("is_foreign", [False, True])
def test_S1_no_proxy_or_netrc_of_the_environment_counts(
    orders_and_other: tuple[Upstream, Upstream],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    is_foreign: bool,
) -> None:
    # The guards: `trust_env=False` in `Mesh._settings` and of the plain transport; a transport that is given to httpx
    # keeps it from the proxies.
    orders, proxy = orders_and_other
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{proxy.address}")
        monkeypatch.setenv(name.lower(), f"http://{proxy.address}")
    netrc = tmp_path / "netrc"
    netrc.write_text("default login hush password hush\n")
    monkeypatch.setenv("NETRC", str(netrc))
    mesh = mesh_over(orders, passthrough=True)
    with httpx.Client(transport=mesh.transport()) if is_foreign else mesh.client() as client:
        for url in ("http://orders/", f"http://{orders.address}/"):
            assert client.get(url).status_code == 200
    assert proxy.log() == []
    assert [request.values("authorization") for request in orders.log()] == [[], []]


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_S1_the_environment_does_not_change_whom_tls_trusts(
    no_leaks: None,
    certificates: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The guards: `trusting`, and `trusting_as_httpx` for the plain transport.
    bundle, certificate = certificates
    folder = tmp_path / "trusted"
    folder.mkdir()
    _hash_into(folder, bundle)
    monkeypatch.setenv(name, bundle if name == "SSL_CERT_FILE" else str(folder))
    monkeypatch.setattr(tls, "_contexts", {})
    monkeypatch.setattr(trust, "_said", set())
    with Upstream("a", cert=certificate) as upstream:
        once = Retry(max_attempts=1)
        settings = {"by the system": TLS(server_name="orders"), "by a bundle": TLS(verify=bundle, server_name="orders")}
        found = {}
        for way, setting in settings.items():
            mesh = Mesh(Service("orders", [upstream.address], tls=setting, retry=once), passthrough=True)
            with mesh.client() as client:
                found[way] = _status(client, "https://orders/")
                found[f"plainly beside {way}"] = _status(client, f"https://localhost:{upstream.port}/")
        assert found.pop("by a bundle") == 200
        assert all("certificate verify failed" in str(each) for each in found.values()), found
    assert caplog.text.count(f"{name} has no effect") == 1


def test_S1_no_keys_of_sessions_are_written_down(
    no_leaks: None, certificates: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The guard: `_unrecorded`.
    bundle, certificate = certificates
    written = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(written))
    monkeypatch.setattr(tls, "_contexts", {})
    with Upstream("a", cert=certificate) as upstream:
        mesh = Mesh(Service("orders", [upstream.address], tls=TLS(verify=bundle)))
        with mesh.client("orders") as client:
            assert client.get("/").status_code == 200
    assert not written.exists() or "SECRET" not in written.read_text()


def test_passthrough_is_a_flag() -> None:
    with pytest.raises(ConfigError, match=r"passthrough: must be True or False, got 'no'"):
        Mesh(passthrough="no")  # type: ignore[arg-type]
    assert (
        Mesh.from_mapping({"mesh": {"passthrough": True}, "services": {"a": {"resolver": "static:a:1"}}})._passthrough
        is True
    )


def _status(client: httpx.Client, url: str) -> Any:
    try:
        return client.get(url, extensions={"sni_hostname": "orders"}).status_code
    except httpx.TransportError as error:
        return error


def _hash_into(folder: Path, bundle: str) -> None:
    """What `openssl rehash` does, without the program."""
    content = Path(bundle).read_text()
    named = subprocess.run(
        ["openssl", "x509", "-subject_hash", "-noout"], input=content, capture_output=True, text=True, check=True
    )
    (folder / f"{named.stdout.strip()}.0").write_text(content)
