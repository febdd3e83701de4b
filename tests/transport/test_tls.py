"""TLS: who is trusted, whose name is checked, and what a handshake that goes wrong costs.

The certificates are made anew for each run. What a server sees of a handshake (the name asked for, the version) is
told by a small server in a thread; everything else runs against upstream processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
import trustme

from conftest import Colour
from meshes import mesh_of, outcomes
from meshlib import (
    TLS,
    ConfigError,
    DeadlineExceeded,
    IdentityError,
    Mesh,
    Retry,
    RoundRobin,
    Service,
    Timeout,
    report,
)
from meshlib.testing import Upstream, upstreams
from meshlib.testing.upstream import generated
from meshlib.transport import tls as tls_module
from meshlib.transport.tls import context_for

SLACK = 0.5
"""Seconds that a busy machine may be late. What a bound that does not hold would cost is ten times as much."""

ONCE = Retry(max_attempts=1)


class Papers:
    """The files of one authority and of those it vouches for, and of one that nobody knows.

    Args:
        folder: where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._authority = trustme.CA()
        self._unknown = trustme.CA()
        self.bundle = str(folder / "bundle.pem")
        self._authority.cert_pem.write_to_path(self.bundle)

    def server(self, *names: str, unknown: bool = False) -> dict[str, str]:
        """Certificate and key of a server with these names, as `Upstream` takes them."""
        cert, key = self._issue("-".join(names), *names, unknown=unknown)
        return {"cert": cert, "key": key}

    def client(self, *, unknown: bool = False) -> tuple[str, str]:
        """Certificate and key of a caller."""
        return self._issue("caller", "caller", unknown=unknown)

    def _issue(self, file: str, *names: str, unknown: bool) -> tuple[str, str]:
        issued = (self._unknown if unknown else self._authority).issue_cert(*names)
        stem = self.folder / f"{file}{'-unknown' if unknown else ''}"
        cert, key = f"{stem}-cert.pem", f"{stem}-key.pem"
        issued.private_key_pem.write_to_path(key)
        Path(cert).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return cert, key

    def trusting(self, **settings: Any) -> TLS:
        """A setting that trusts the authority."""
        return TLS(verify=self.bundle, **settings)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"))


@pytest.fixture
def secure(no_leaks: None, papers: Papers) -> Iterator[Upstream]:
    """An upstream that is `orders`."""
    with Upstream("a", **papers.server("orders")) as upstream:
        yield upstream


@contextlib.contextmanager
def listener(answer: Callable[[socket.socket], None] | None = None) -> Iterator[str]:
    """An address whose connections are each handed to `answer` in a thread; without it they are left in the backlog."""
    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:

        def serve(sock: socket.socket) -> None:
            with sock, contextlib.suppress(OSError):
                assert answer is not None
                answer(sock)

        def accept() -> None:
            while True:
                sock, _ = server.accept()
                if is_over.is_set():
                    sock.close()
                    return
                threads.append(threading.Thread(target=serve, args=(sock,)))
                threads[-1].start()

        address = server.getsockname()
        is_over = threading.Event()
        if answer is not None:
            threads.append(threading.Thread(target=accept))
            threads[0].start()
        try:
            yield f"127.0.0.1:{address[1]}"
        finally:
            is_over.set()
            if answer is not None:
                socket.create_connection(address).close()
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive()


class Seen:
    """A server that answers every request with 204 and notes what it saw of the handshake.

    Args:
        papers: its certificate and key.
        newest: the newest version it speaks.
    """

    def __init__(self, papers: dict[str, str], newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        self.names: list[str | None] = []
        self.versions: list[str | None] = []
        self.protocols: list[str | None] = []
        self.requests = 0
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(papers["cert"], papers["key"])
        self._context.maximum_version = newest
        self._context.set_alpn_protocols(["h2", "http/1.1"])
        self._context.sni_callback = lambda sock, name, context: self.names.append(name)

    def __call__(self, sock: socket.socket) -> None:
        sock.settimeout(20)
        with self._context.wrap_socket(sock, server_side=True) as secure:
            self.versions.append(secure.version())
            self.protocols.append(secure.selected_alpn_protocol())
            while b"\r\n\r\n" in secure.recv(65536):
                self.requests += 1
                secure.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")


async def get(client: httpx.AsyncClient) -> httpx.Response:
    return await client.get("/")


async def get_or_error(client: httpx.AsyncClient) -> httpx.Response | httpx.TransportError:
    try:
        return await client.get("/")
    except httpx.TransportError as error:
        return error


async def post_or_error(client: httpx.AsyncClient) -> httpx.Response | httpx.TransportError:
    try:
        return await client.post("/", content=b"once")
    except httpx.TransportError as error:
        return error


async def pause(colour: Colour) -> None:
    """Long enough for a server's goodbye to arrive. The sync client's script may block: nothing else runs beside it."""
    if colour.is_sync:
        threading.Event().wait(0.1)
    else:
        await anyio.sleep(0.1)


@contextlib.contextmanager
def lasting(at_least: float, at_most: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert at_least - 0.02 <= time.monotonic() - started <= at_most


# Trust


def test_a_service_is_called_over_TLS_with_a_bundle(colour: Colour, secure: Upstream, papers: Papers) -> None:
    response = colour.run(mesh_of(secure, tls=papers.trusting()), get)
    assert response.status_code == 200
    [request] = secure.log()
    assert request.values("host") == ["orders"]
    assert outcomes(response) == [("first", "ok")]


def test_a_service_is_called_over_TLS_with_a_context_of_ones_own(
    colour: Colour, secure: Upstream, papers: Papers
) -> None:
    mesh = mesh_of(secure, tls=TLS(verify=ssl.create_default_context(cafile=papers.bundle)))
    assert colour.run(mesh, get).status_code == 200


def test_the_scheme_alone_turns_TLS_on_with_the_systems_authorities(
    colour: Colour, secure: Upstream, papers: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "_contexts", {})
    assert isinstance(colour.run(mesh_of(secure, scheme="https", retry=ONCE), get_or_error), IdentityError)
    assert secure.log() == []
    monkeypatch.setattr(tls_module, "_contexts", {})
    # Where OpenSSL finds the system's authorities, which is asked when the environment names another place.
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    paths = ssl.get_default_verify_paths()._replace(openssl_cafile=papers.bundle)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    assert colour.run(mesh_of(secure, scheme="https"), get).status_code == 200


@pytest.mark.parametrize("url", ["http://orders/x", "https://orders/x", "https://ORDERS./x", "https://orders:443/x"])
def test_both_schemes_reach_a_service_with_TLS(colour: Colour, secure: Upstream, papers: Papers, url: str) -> None:
    async def script(client: httpx.AsyncClient) -> int:
        return (await client.get(url)).status_code

    assert colour.run(mesh_of(secure, tls=papers.trusting()), script, service=None) == 200
    assert [request.target for request in secure.log()] == ["/x"]


def test_localhost_is_dialled_and_the_services_name_is_checked(
    colour: Colour, secure: Upstream, papers: Papers
) -> None:
    assert colour.run(mesh_of(f"localhost:{secure.port}", tls=papers.trusting()), get).status_code == 200


# Names


@pytest.mark.parametrize(("server_name", "asked_for"), [(None, "orders"), ("shop.example", "shop.example")])
def test_S2_the_name_asked_for_is_the_services(
    colour: Colour, papers: Papers, server_name: str | None, asked_for: str
) -> None:
    seen = Seen(papers.server(asked_for))
    with listener(seen) as address:
        mesh = mesh_of(address, tls=papers.trusting(server_name=server_name))
        assert colour.run(mesh, get).status_code == 204
    assert seen.names == [asked_for]
    assert seen.protocols == ["http/1.1"]
    assert seen.requests == 1


@pytest.mark.parametrize(
    ("names", "unknown"),
    [(("users",), False), (("127.0.0.1",), False), (("orders.example",), False), (("orders",), True)],
)
@pytest.mark.parametrize("call", [get_or_error, post_or_error])
def test_S2_nothing_is_sent_to_a_server_that_cannot_prove_its_name(
    colour: Colour, papers: Papers, names: tuple[str, ...], unknown: bool, call: Callable[[Any], Any]
) -> None:
    with Upstream("a", **papers.server(*names, unknown=unknown)) as upstream:
        mesh = mesh_of(upstream, tls=papers.trusting())
        error = colour.run(mesh, call)
        assert upstream.log() == []
        assert upstream.stats()["requests"] == 0
    assert isinstance(error, IdentityError)
    assert not isinstance(error, httpx.ConnectError), "somebody was there"
    assert error.request.url.host == "orders"
    assert "certificate verify failed" in str(error)
    assert outcomes(error) == [("first", "not_sent")], "who is a stranger is one at the next try as well"
    [node] = mesh.snapshot()["orders"].nodes
    assert (node.in_flight, node.failures) == (0, 1)


def test_S2_another_name_may_be_asked_for(colour: Colour, papers: Papers) -> None:
    with Upstream("a", **papers.server("users")) as upstream:
        mesh = mesh_of(upstream, tls=papers.trusting(server_name="users"))
        assert colour.run(mesh, get).status_code == 200
        assert upstream.log()[0].values("host") == ["orders"]


@pytest.mark.parametrize("call", [get_or_error, post_or_error])
@pytest.mark.parametrize("unknown", [False, True])
def test_S2_a_call_fails_over_from_a_wrong_server_to_the_right_one(
    colour: Colour, secure: Upstream, papers: Papers, call: Callable[[Any], Any], unknown: bool
) -> None:
    with Upstream("wrong", **papers.server("orders" if unknown else "users", unknown=unknown)) as wrong:

        async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
            return [await call(client) for _ in range(4)]

        responses = colour.run(mesh_of(wrong, secure, tls=papers.trusting(), balancer=RoundRobin()), script)
        assert wrong.log() == []
    assert [response.status_code for response in responses] == [200] * 4
    assert [("first", "not_sent"), ("failover", "ok")] in map(outcomes, responses)
    assert len(secure.log()) == 4


def test_S2_two_services_on_one_place_never_share_a_connection(colour: Colour, papers: Papers) -> None:
    with Upstream("a", **papers.server("orders", "users", "events")) as upstream:
        mesh = Mesh(
            Service("orders", [upstream.address], tls=papers.trusting()),
            Service("users", [upstream.address], tls=papers.trusting(min_version="1.3")),
            Service("events", [upstream.address], tls=papers.trusting()),  # the very setting of orders
            Service("plain", [upstream.address]),
        )

        async def script(client: httpx.AsyncClient) -> list[int]:
            names = ("orders", "users", "events", "plain") * 3
            return [(await client.get(f"http://{name}/{name}")).status_code for name in names]

        statuses = colour.run(mesh, script, service=None)
        log = upstream.log()
    assert statuses == [200, 200, 200, 400] * 3, "the port speaks TLS, and a service without must not have used it"
    serials = {
        name: {each.connection for each in log if each.target == f"/{name}"} for name in ("orders", "users", "events")
    }
    assert [len(each) for each in serials.values()] == [1, 1, 1]
    assert len(set.union(*serials.values())) == 3


def test_S2_a_warm_connection_does_not_vouch_for_another_service(
    colour: Colour, secure: Upstream, papers: Papers
) -> None:
    mesh = Mesh(
        Service("orders", [secure.address], tls=papers.trusting()),
        Service("users", [secure.address], tls=papers.trusting()),
    )

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(3):
            assert (await client.get("http://orders/")).status_code == 200
            with pytest.raises(IdentityError):
                await client.get("http://users/")

    colour.run(mesh, script, service=None)
    assert len(secure.log()) == 3


# Versions


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("least", ["1.2", "1.3"])
def test_the_least_version_is_kept(colour: Colour, papers: Papers, newest: ssl.TLSVersion, least: str) -> None:
    seen = Seen(papers.server("orders"), newest)
    with listener(seen) as address:
        mesh = mesh_of(address, tls=papers.trusting(min_version=least), retry=ONCE)
        result = colour.run(mesh, get_or_error)
    if (newest, least) == (ssl.TLSVersion.TLSv1_2, "1.3"):
        assert isinstance(result, httpx.ConnectError)
        assert outcomes(result) == [("first", "not_sent")]
        assert seen.requests == 0
    else:
        assert result.status_code == 204
        assert seen.versions == ["TLSv1.2" if newest is ssl.TLSVersion.TLSv1_2 else "TLSv1.3"]


# Client certificates


@pytest.fixture
def demanding(no_leaks: None, papers: Papers) -> Iterator[Upstream]:
    """An upstream that wants to know its callers."""
    with Upstream("a", **papers.server("orders"), ca=papers.bundle) as upstream:
        yield upstream


@pytest.mark.parametrize("files", ["two", "one"])
def test_a_client_certificate_is_shown(
    colour: Colour, demanding: Upstream, papers: Papers, files: str, tmp_path: Path
) -> None:
    cert, key = papers.client()
    if files == "one":
        both = tmp_path / "both.pem"
        both.write_bytes(Path(cert).read_bytes() + Path(key).read_bytes())
        setting = papers.trusting(cert=str(both))
    else:
        setting = papers.trusting(cert=cert, key=key)

    async def script(client: httpx.AsyncClient) -> list[int]:
        return [(await client.post("/", content=b"x")).status_code for _ in range(3)]

    assert colour.run(mesh_of(demanding, tls=setting), script) == [200, 200, 200]
    assert {request.connection for request in demanding.log()} == {1}


def older(papers: Papers) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=papers.bundle)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


@pytest.mark.parametrize("shown", ["none", "unknown"])
@pytest.mark.parametrize("call", [get_or_error, post_or_error])
def test_without_a_good_client_certificate_a_call_fails_and_a_post_goes_once(
    colour: Colour, demanding: Upstream, papers: Papers, shown: str, call: Callable[[Any], Any]
) -> None:
    # In TLS 1.3 the refusal comes after the handshake, when the request may be on its way: `failed`, not `not_sent`.
    # Whether it comes as an alert, a reset or a plain end is up to the server.
    cert, key = papers.client(unknown=True)
    setting = papers.trusting() if shown == "none" else papers.trusting(cert=cert, key=key)
    mesh = mesh_of(demanding, tls=setting)
    error = colour.run(mesh, call)
    assert isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
    assert not isinstance(error, httpx.ConnectError), "it was connected"
    assert {outcome for _, outcome in outcomes(error)} == {"failed"}
    assert len(report(error).attempts) == (1 if call is post_or_error else 3)
    assert demanding.stats()["requests"] == 0
    assert mesh.snapshot()["orders"].in_flight == 0


def test_in_TLS_1_2_a_missing_client_certificate_ends_the_handshake(
    colour: Colour, demanding: Upstream, papers: Papers
) -> None:
    error = colour.run(mesh_of(demanding, tls=TLS(verify=older(papers)), retry=ONCE), post_or_error)
    assert isinstance(error, httpx.ConnectError)
    assert outcomes(error) == [("first", "not_sent")]
    assert demanding.stats()["requests"] == 0


# Contexts and their files


def test_one_context_for_each_setting(papers: Papers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_module, "_contexts", {})
    cert, key = papers.client()
    made: list[ssl.SSLContext] = []
    barrier = threading.Barrier(8)

    def make() -> None:
        barrier.wait()
        made.append(context_for(TLS(verify=papers.bundle, cert=cert, key=key)))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len({id(context) for context in made}) == 1
    others = [context_for(setting) for setting in (papers.trusting(), papers.trusting(min_version="1.3"))]
    assert len({id(context) for context in [*others, made[0]]}) == 3
    assert context_for(papers.trusting(min_version="1.3")).minimum_version is ssl.TLSVersion.TLSv1_3
    assert context_for(papers.trusting()).minimum_version is ssl.TLSVersion.TLSv1_2
    own = ssl.create_default_context()
    assert context_for(TLS(verify=own)) is own
    assert all(each.verify_mode is ssl.CERT_REQUIRED and each.check_hostname for each in [*others, made[0]])


def test_a_mesh_makes_its_contexts_once_and_at_once(
    secure: Upstream, papers: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    make = ssl.create_default_context

    def counting(*args: Any, **kwargs: Any) -> ssl.SSLContext:
        nonlocal made
        made += 1
        return make(*args, **kwargs)

    monkeypatch.setattr(tls_module, "_contexts", {})
    monkeypatch.setattr(ssl, "create_default_context", counting)
    mesh = mesh_of(secure, tls=papers.trusting())
    assert made == 1
    for _ in range(2):
        with mesh.client("orders") as client:
            assert client.get("/").status_code == 200
    mesh_of(secure, tls=papers.trusting())
    assert made == 1


def broken(papers: Papers, folder: Path, what: str) -> tuple[str, TLS]:
    """A setting with a file that cannot be used, and the setting's name."""
    cert, key = papers.client()
    _, other_key = papers.client(unknown=True)
    missing, junk, empty = folder / "missing.pem", folder / "junk.pem", folder / "empty.pem"
    junk.write_text("not a certificate")
    empty.write_text("")
    return {
        "no bundle": ("verify", TLS(verify=str(missing))),
        "junk for a bundle": ("verify", TLS(verify=str(junk))),
        "an empty bundle": ("verify", TLS(verify=str(empty))),
        "a folder for a bundle": ("verify", TLS(verify=str(folder))),
        "what is no path": ("verify", TLS(verify="bundle\0.pem")),
        "no certificate": ("cert", papers.trusting(cert=str(missing), key=key)),
        "junk for a certificate": ("cert", papers.trusting(cert=str(junk), key=key)),
        "no key": ("cert", papers.trusting(cert=cert, key=str(missing))),
        "junk for a key": ("cert", papers.trusting(cert=cert, key=str(junk))),
        "no key in the certificate's file": ("cert", papers.trusting(cert=cert)),
        "the key of another certificate": ("cert", papers.trusting(cert=cert, key=other_key)),
    }[what]


@pytest.mark.parametrize(
    "what",
    [
        "no bundle",
        "junk for a bundle",
        "an empty bundle",
        "a folder for a bundle",
        "what is no path",
        "no certificate",
        "junk for a certificate",
        "no key",
        "junk for a key",
        "no key in the certificate's file",
        "the key of another certificate",
    ],
)
def test_files_that_cannot_be_used_are_found_out_by_the_mesh(papers: Papers, tmp_path: Path, what: str) -> None:
    setting, tls = broken(papers, tmp_path, what)
    with pytest.raises(ConfigError) as caught:
        mesh_of("127.0.0.1:1", tls=tls)
    [fault] = caught.value.faults
    assert fault.path == f"services.orders.tls.{setting}"
    assert fault.message.startswith("must be ")


def test_every_service_whose_files_cannot_be_used_is_named(papers: Papers, tmp_path: Path) -> None:
    services = [
        Service("orders", ["127.0.0.1:1"], tls=broken(papers, tmp_path, "no bundle")[1]),
        Service("users", ["127.0.0.1:1"], tls=papers.trusting()),
        Service("events", ["127.0.0.1:1"], tls=broken(papers, tmp_path, "no key")[1]),
    ]
    with pytest.raises(ConfigError) as caught:
        Mesh(*services)
    assert [fault.path for fault in caught.value.faults] == ["services.orders.tls.verify", "services.events.tls.cert"]


def test_a_setting_that_failed_is_tried_anew(papers: Papers, secure: Upstream, tmp_path: Path) -> None:
    cert, key = papers.client()
    _, other_key = papers.client(unknown=True)
    mixed = tmp_path / "key.pem"
    mixed.write_bytes(Path(other_key).read_bytes())
    with pytest.raises(ConfigError):
        mesh_of(secure, tls=papers.trusting(cert=cert, key=str(mixed)))
    mixed.write_bytes(Path(key).read_bytes())
    with mesh_of(secure, tls=papers.trusting(cert=cert, key=str(mixed))).client("orders") as client:
        assert client.get("/").status_code == 200


def test_a_key_with_a_pass_phrase_is_refused_and_not_asked_for(papers: Papers, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    cert, key = papers.client()
    loaded = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    program = (
        "import sys\n"
        "from meshlib import TLS, ConfigError, Mesh, Service\n"
        "try:\n"
        "    Mesh(Service('orders', ['127.0.0.1:1'], tls=TLS(cert=sys.argv[1], key=sys.argv[2])))\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", program, cert, str(locked)]
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SSL_CERT_")}
    # Without a terminal OpenSSL asks on standard input: this one stays open and silent.
    with subprocess.Popen(command, **pipes, env=environment, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"it waits for somebody to type: {process.stderr.read()!r}")
        told = process.stdout.read().decode()
        assert process.stderr.read() == b""
    assert told.startswith("services.orders.tls.cert: must be ")


# Handshakes that do not end


SETTINGS = [
    pytest.param(Timeout(total=10, attempt=10, connect=0.3), httpx.ConnectTimeout, id="connect"),
    pytest.param(Timeout(total=10, attempt=0.3, connect=10), httpx.ConnectTimeout, id="attempt"),
    pytest.param(Timeout(total=0.3, attempt=10, connect=10), DeadlineExceeded, id="total"),
]


@pytest.mark.parametrize(("timeout", "raised"), SETTINGS)
@pytest.mark.parametrize("call", [get_or_error, post_or_error])
def test_C4_a_handshake_that_is_not_answered_ends_in_time(
    colour: Colour, papers: Papers, timeout: Timeout, raised: type[Exception], call: Callable[[Any], Any]
) -> None:
    with listener() as address:
        mesh = mesh_of(address, tls=papers.trusting(), timeout=timeout, retry=ONCE)
        with lasting(0.3, 0.3 + SLACK):
            error = colour.run(mesh, call)
    assert type(error) is raised
    assert [kind for kind, _ in outcomes(error)] == ["first"]
    assert mesh.snapshot()["orders"].in_flight == 0
    if raised is httpx.ConnectTimeout:
        assert outcomes(error) == [("first", "not_sent")]
        assert address in str(error)


@pytest.mark.parametrize(("timeout", "raised"), SETTINGS)
def test_C4_a_handshake_that_drips_ends_in_time(
    colour: Colour, secure: Upstream, papers: Papers, timeout: Timeout, raised: type[Exception]
) -> None:
    def drip(sock: socket.socket) -> None:
        with socket.create_connection((secure.host, secure.port)) as server:
            server.sendall(sock.recv(65536))
            for byte in server.recv(65536):
                sock.sendall(bytes([byte]))
                time.sleep(0.02)

    with listener(drip) as address:
        mesh = mesh_of(address, tls=papers.trusting(), timeout=timeout, retry=ONCE)
        with lasting(0.3, 0.3 + SLACK):
            error = colour.run(mesh, get_or_error)
    assert type(error) is raised
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("call", [get_or_error, post_or_error])
def test_a_call_fails_over_from_a_handshake_that_is_not_answered(
    colour: Colour, secure: Upstream, papers: Papers, call: Callable[[Any], Any]
) -> None:
    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await call(client) for _ in range(2)]

    with listener() as silent:
        timeout = Timeout(total=20, connect=0.3)
        mesh = mesh_of(silent, secure, tls=papers.trusting(), timeout=timeout, balancer=RoundRobin())
        responses = colour.run(mesh, script)
    assert [response.status_code for response in responses] == [200, 200]
    ways = list(map(outcomes, responses))
    assert [("first", "not_sent"), ("failover", "ok")] in ways
    assert all(way in ([("first", "ok")], [("first", "not_sent"), ("failover", "ok")]) for way in ways)


def _says_plainly(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")


def _hangs_up(sock: socket.socket) -> None:
    sock.recv(65536)


def _hangs_up_half_way(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"\x16\x03\x03\x01")


@pytest.mark.parametrize("answer", [_says_plainly, _hangs_up, _hangs_up_half_way])
def test_a_handshake_that_is_answered_otherwise_is_a_failure_to_connect(
    colour: Colour, papers: Papers, answer: Callable[[socket.socket], None]
) -> None:
    with listener(answer) as address:
        mesh = mesh_of(address, tls=papers.trusting(), retry=ONCE)
        error = colour.run(mesh, post_or_error)
    assert type(error) is httpx.ConnectError
    assert re.search(r" failed: .*\w", str(error)), "in words, whichever loop it is"
    assert ("it does not answer in TLS" in str(error)) is (answer is _says_plainly)
    assert outcomes(error) == [("first", "not_sent")]


def _resets(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_handshake_that_is_reset_is_told_as_the_system_tells_it(colour: Colour, papers: Papers) -> None:
    with listener(_resets) as address:
        error = colour.run(mesh_of(address, tls=papers.trusting(), retry=ONCE), post_or_error)
    assert type(error) is httpx.ConnectError
    assert "Connection reset by peer" in str(error)


def test_S2_no_handshake_is_left_out_where_the_connection_is_lost_already(
    papers: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Misses `do_handshake` in the sync `connect`: `wrap_socket` waits for a peer that is to come."""
    mesh = mesh_of("127.0.0.1:1", tls=papers.trusting(), retry=ONCE)
    monkeypatch.setattr(socket.socket, "connect", lambda sock, address: None)
    with mesh.client("orders") as client, pytest.raises(httpx.ConnectError) as caught:
        client.post("/", content=b"once")
    assert outcomes(caught.value) == [("first", "not_sent")]


def test_nothing_is_sent_to_who_took_the_offer_of_another_protocol(colour: Colour, papers: Papers) -> None:
    """A context that httpx was given as well offers HTTP/2, because httpx has it do so. Misses `Dial.prove`."""
    own = ssl.create_default_context(cafile=papers.bundle)
    own.set_alpn_protocols(["h2", "http/1.1"])
    seen = Seen(papers.server("orders"))
    with listener(seen) as address:
        error = colour.run(mesh_of(address, tls=TLS(verify=own), retry=ONCE), post_or_error)
    assert type(error) is httpx.ConnectError
    assert "speaks h2, which the context of TLS(verify=...) must not offer" in str(error)
    assert outcomes(error) == [("first", "not_sent")]
    assert (seen.protocols, seen.requests) == (["h2"], 0)


@pytest.mark.parametrize(
    ("timeout", "raised"),
    [(Timeout(total=60, connect=60), DeadlineExceeded), (Timeout(total=1000, connect=60), httpx.TimeoutException)],
)
def test_no_time_left_after_the_connection_is_a_timeout(
    colour: Colour, secure: Upstream, papers: Papers, timeout: Timeout, raised: type[Exception]
) -> None:
    """The time runs out between the connection and the handshake, which takes a clock that can be told to."""
    jump = 0.0

    def clock() -> float:
        return time.monotonic() + jump

    service = Service("orders", [secure.address], tls=papers.trusting(), timeout=timeout, retry=ONCE)
    mesh = Mesh(service, clock=clock)
    connect = socket.socket.connect

    def connected_late(sock: socket.socket, address: Any) -> None:
        nonlocal jump
        try:
            connect(sock, address)
        finally:
            if sock.type == socket.SOCK_STREAM and address[1] == secure.port:
                jump = 100.0

    secure.stats()  # the control connection is open before connecting becomes slow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connected_late)
        error = colour.run(mesh, post_or_error)
    assert isinstance(error, raised)
    assert raised is DeadlineExceeded or outcomes(error) == [("first", "not_sent")]
    assert secure.log() == []


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_C7_cancelling_a_handshake_leaks_nothing(no_leaks: None, papers: Papers, backend: str) -> None:
    with listener() as address:
        mesh = mesh_of(address, tls=papers.trusting(), timeout=Timeout(total=30, connect=30))

        async def main() -> None:
            async with mesh.async_client("orders") as client:
                before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
                for _ in range(5):
                    with anyio.move_on_after(0.05) as scope:
                        await client.get("/")
                    assert scope.cancelled_caught
                if sys.platform == "linux":
                    for _ in range(3):
                        await anyio.lowlevel.checkpoint()
                    assert len(os.listdir("/proc/self/fd")) == before
            assert mesh.snapshot()["orders"].in_flight == 0

        anyio.run(main, backend=backend)


# Bodies


def test_large_bodies_arrive_whole_in_both_directions(colour: Colour, secure: Upstream, papers: Papers) -> None:
    sent = generated(6_000_000)
    secure.script({"size": 6_000_000}, {"size": 6_000_000, "chunked": True})

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.put("/", content=sent) for _ in range(2)]

    for response in colour.run(mesh_of(secure, tls=papers.trusting()), script):
        assert response.content == generated(6_000_000)
    assert {request.body_digest for request in secure.log()} == {hashlib.sha256(sent).hexdigest()}
    assert {request.connection for request in secure.log()} == {1}


def test_C4_a_reader_that_stalls_ends_an_upload_in_time(colour: Colour, secure: Upstream, papers: Papers) -> None:
    secure.script(then={"fault": "stall_reader"})
    body = bytes(60_000_000)

    async def script(client: httpx.AsyncClient) -> Exception:
        with lasting(0.5, 0.5 + 2 * SLACK), pytest.raises(DeadlineExceeded) as caught:
            await client.post("/", content=body)
        return caught.value

    mesh = mesh_of(secure, tls=papers.trusting(), timeout=Timeout(total=0.5))
    error = colour.run(mesh, script)
    assert [kind for kind, _ in outcomes(error)] == ["first"]
    assert mesh.snapshot()["orders"].in_flight == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_large_upload_leaves_the_loop_to_others(
    no_leaks: None, secure: Upstream, papers: Papers, backend: str
) -> None:
    secure.script(then={"fault": "stall_reader"})
    body = bytes(200_000_000)
    mesh = mesh_of(secure, tls=papers.trusting(), timeout=Timeout(total=1.0))

    async def main() -> float:
        longest = 0.0

        async def tick() -> None:
            nonlocal longest
            while True:
                before = time.monotonic()
                await anyio.sleep(0.005)
                longest = max(longest, time.monotonic() - before)

        async with mesh.async_client("orders") as client, anyio.create_task_group() as group:
            group.start_soon(tick)
            await anyio.sleep(0.05)
            with pytest.raises(DeadlineExceeded):
                await client.post("/", content=body)
            group.cancel_scope.cancel()
        return longest

    assert anyio.run(main, backend=backend) < SLACK


def test_connections_are_kept(colour: Colour, secure: Upstream, papers: Papers) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(20):
            await client.get("/")

    colour.run(mesh_of(secure, tls=papers.trusting()), script)
    assert [request.connection for request in secure.log()] == [1] * 20
    assert secure.stats()["connections_total"] == 1


def test_connections_of_TLS_1_2_are_kept(colour: Colour, secure: Upstream, papers: Papers) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(5):
            await client.get("/")

    colour.run(mesh_of(secure, tls=TLS(verify=older(papers))), script)
    assert [request.connection for request in secure.log()] == [1] * 5


def test_C8_a_connection_closed_while_idle_is_not_even_tried(colour: Colour, secure: Upstream, papers: Papers) -> None:
    secure.script(then={"fault": "close_after"})

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        responses = []
        for _ in range(4):
            responses.append(await client.post("/", content=b"x"))
            await pause(colour)
        return responses

    responses = colour.run(mesh_of(secure, tls=papers.trusting()), script)
    assert [outcomes(response) for response in responses] == [[("first", "ok")]] * 4
    assert len(secure.log()) == 4


def test_C8_a_kept_connection_that_is_reset_costs_one_free_retry(
    colour: Colour, secure: Upstream, papers: Papers
) -> None:
    secure.script({}, {"fault": "reset"})

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(2)]

    mesh = mesh_of(secure, tls=papers.trusting())
    assert outcomes(colour.run(mesh, script)[1]) == [("first", "failed"), ("transparent", "ok")]
    assert mesh.snapshot()["orders"].nodes[0].failures == 0


def test_C4_a_deadline_in_the_middle_of_a_body(colour: Colour, secure: Upstream, papers: Papers) -> None:
    secure.script(then={"fault": "drip", "size": 10_000, "interval": 0.02})
    mesh = mesh_of(secure, tls=papers.trusting(), timeout=Timeout(total=0.4))

    async def script(client: httpx.AsyncClient) -> None:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            await client.get("/")
        assert 0.38 <= time.monotonic() - started <= 0.4 + SLACK
        assert report(caught.value).attempts[0].status == 200
        assert mesh.snapshot()["orders"].in_flight == 0

    colour.run(mesh, script)


@pytest.mark.parametrize("fault", ["cut", "cut_reset"])
def test_a_body_that_dies_is_one_failure(colour: Colour, secure: Upstream, papers: Papers, fault: str) -> None:
    secure.script({"fault": fault, "size": 1000})
    mesh = mesh_of(secure, tls=papers.trusting())
    error = colour.run(mesh, get_or_error)
    assert isinstance(error, httpx.RemoteProtocolError | httpx.ReadError)
    assert outcomes(error) == [("first", "failed")]
    [node] = mesh.snapshot()["orders"].nodes
    assert (node.attempts, node.failures, node.in_flight) == (1, 1, 0)


def test_sixteen_calls_at_once_over_TLS(no_leaks: None, papers: Papers) -> None:
    with upstreams(3, **papers.server("orders")) as fleet:
        mesh = mesh_of(*fleet, tls=papers.trusting())

        async def main() -> list[httpx.Response]:
            async with mesh.async_client("orders") as client:
                rounds = [await asyncio.gather(*(client.get(f"/{n}/{m}") for n in range(16))) for m in range(5)]
            return [response for each in rounds for response in each]

        responses = asyncio.run(main())
    assert [response.json()["path"] for response in responses] == [f"/{n}/{m}" for m in range(5) for n in range(16)]


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc"], ids=["headers", "body"])
def test_a_record_that_does_not_decrypt_is_the_endpoints_failure(colour: Colour, papers: Papers, head: bytes) -> None:
    served = papers.server("orders")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(served["cert"], served["key"])

    def answer(sock: socket.socket) -> None:
        sock.settimeout(20)
        secure = context.wrap_socket(sock, server_side=True)
        secure.recv(65536)
        secure.sendall(head)
        with socket.socket(fileno=secure.detach()) as bare:
            bare.sendall(b"\x17\x03\x03\x00\x20" + b"A" * 32)
            while bare.recv(65536):
                pass

    with listener(answer) as address:
        mesh = mesh_of(address, tls=papers.trusting(), retry=ONCE)
        error = colour.run(mesh, get_or_error)
    assert type(error) is httpx.ReadError
    assert outcomes(error) == [("first", "failed")]
    [node] = mesh.snapshot()["orders"].nodes
    assert (node.attempts, node.failures, node.in_flight) == (1, 1, 0)
