"""Who answers: SPIFFE ids, sessions, and files that are replaced while calls go on.

The servers are threads of this process, so that they can tell every byte that came after the handshake. The guards are
`Dial.prove` (the id), `check_hostname` and the chain (which OpenSSL must not be kept from checking), `Call._strangers`
(not the same endpoint again) and `tls.Kept` (rotation); each test says which one it would miss.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import itertools
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpcore
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from test_tls import listener

from conftest import Colour
from meshes import get_or_error, mesh_of, outcomes, post_or_error
from meshlib import (
    TLS,
    Breaker,
    ConfigError,
    Connections,
    HealthCheck,
    IdentityError,
    Mesh,
    Retry,
    RoundRobin,
    Service,
    report,
)
from meshlib.consul import ConsulAgent, ConsulError
from meshlib.endpoint import Endpoint
from meshlib.health import Finding, check
from meshlib.telemetry.words import error_of
from meshlib.transport import tls as tls_module
from meshlib.transport.tls import context_for

ORDERS = "spiffe://mesh.test/orders"
DAY = dt.timedelta(days=1)
numbers = itertools.count()


class Authority:
    """Signs certificates with any names.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"authority {next(numbers)}")])
        key_id = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        made = self._begun(self._name, self._key, DAY, is_authority=True).add_extension(key_id, critical=False)
        self.pem = made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        self.bundle = str(self._written(self.pem))

    def leaf(
        self, *uris: str, dns: str | None = None, san: bytes = b"", left: dt.timedelta = DAY, called: str = "leaf"
    ) -> tuple[str, str]:
        """Certificate and key with these URIs; with `san` as its names just as they are; and so much time left."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, called)])
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += [x509.DNSName(dns)] if dns else []
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        raw = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), san)
        made = self._begun(subject, key, left, is_authority=False).add_extension(signer, critical=False)
        made = made.add_extension(purposes, critical=False)
        made = made.add_extension(raw if san else x509.SubjectAlternativeName(names), critical=False)
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        cert = made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        return str(self._written(cert)), str(self._written(key.private_bytes(*form)))

    def _begun(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, left: dt.timedelta, *, is_authority: bool
    ) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment"), False)
        usage |= dict.fromkeys(("key_agreement", "encipher_only", "decipher_only"), False)
        usage |= dict.fromkeys(("key_cert_sign", "crl_sign"), is_authority)
        return (
            x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + left)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(digital_signature=not is_authority, **usage), critical=True)
        )

    def _written(self, content: bytes) -> Path:
        file = self._folder / f"{next(numbers)}.pem"
        file.write_bytes(content)
        return file


class Witness:
    """A server that answers with 204 and tells what came.

    Args:
        papers: its certificate and key.
        ca: whom its callers must be vouched for by, if by anybody.
        status: what it answers.

    Attributes:
        received: bytes of each connection whose handshake ended well.
        serials: of its callers' certificates.
    """

    def __init__(self, papers: tuple[str, str], ca: str | None = None, status: str = "204 No Content") -> None:
        self.received: list[bytes] = []
        self.resumed: list[bool | None] = []
        self.names: list[str | None] = []
        self.serials: list[str] = []
        self._status = status.encode()
        self.carry(papers, ca)

    def carry(self, papers: tuple[str, str], ca: str | None = None) -> None:
        """Go by other papers from now on."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*papers)
        if ca is not None:
            context.load_verify_locations(ca)
            context.verify_mode = ssl.CERT_REQUIRED
        context.sni_callback = lambda sock, name, context: self.names.append(name)
        self._context = context

    def __call__(self, sock: socket.socket) -> None:
        sock.settimeout(20)
        with self._context.wrap_socket(sock, server_side=True) as secure:
            number = len(self.received)
            self.received.append(b"")
            self.resumed.append(secure.session_reused)
            self.serials.append(str((secure.getpeercert() or {}).get("serialNumber")))
            while got := secure.recv(65536):
                self.received[number] += got
                if got.endswith((b"\r\n\r\n", b"once")):
                    secure.sendall(b"HTTP/1.1 " + self._status + b"\r\ncontent-length: 0\r\n\r\n")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("identities"))


# SPIFFE ids


@pytest.mark.parametrize("asked_for", [{"spiffe_id": ORDERS}, {"trust_domain": "mesh.test"}])
def test_S2_who_carries_the_id_is_called_and_both_sides_show_theirs(
    colour: Colour, authority: Authority, asked_for: dict[str, str]
) -> None:
    """Misses `check_hostname = False` in `tls._make`: the certificate carries no name."""
    cert, key = authority.leaf("spiffe://mesh.test/caller")
    witness = Witness(authority.leaf(ORDERS), ca=authority.bundle)
    with listener(witness) as address:
        tls = TLS(verify=authority.bundle, cert=cert, key=key, **asked_for)
        assert colour.run(mesh_of(address, tls=tls), post_or_error).status_code == 204
    assert len(witness.received) == 1
    assert witness.names == ["orders"]


STRANGERS: dict[str, Callable[[Authority], tuple[str, str]]] = {
    "another id": lambda authority: authority.leaf("spiffe://mesh.test/users"),
    "an id that begins alike": lambda authority: authority.leaf(f"{ORDERS}/admin"),
    "two, the right one among them": lambda authority: authority.leaf(ORDERS, "spiffe://mesh.test/users"),
    "none, but the service's name": lambda authority: authority.leaf(dns="orders"),
    "one that cannot be read": lambda authority: authority.leaf(san=b"\x30\x06\x86\x04\xff\xfe\xff\xfe"),
    "the right one, expired": lambda authority: authority.leaf(ORDERS, left=-dt.timedelta(hours=1)),
}


def refused(colour: Colour, witness: Witness, tls: TLS) -> IdentityError:
    """The error of a POST to a stranger; that nothing else came of it is seen to here."""
    with listener(witness) as address:
        mesh = mesh_of(address, tls=tls)
        error = colour.run(mesh, post_or_error)
    assert type(error) is IdentityError, error
    assert error.request.method == "POST"
    assert b"".join(witness.received) == b"", "not a byte"
    assert outcomes(error) == [("first", "not_sent")]
    assert report(error).attempts[0].decision == "not_retryable", "and not after a wait"
    [node] = mesh.snapshot()["orders"].nodes
    assert (node.in_flight, node.failures) == (0, 1)
    return error


@pytest.mark.parametrize("who", STRANGERS)
def test_S2_nothing_is_sent_to_who_does_not_carry_the_id(colour: Colour, authority: Authority, who: str) -> None:
    """Misses `Dial.prove`; for the expired one, the chain."""
    witness = Witness(STRANGERS[who](authority))
    error = refused(colour, witness, TLS(verify=authority.bundle, spiffe_id=ORDERS))
    assert f"has not proved to be {ORDERS}: " in str(error)
    assert ("certificate verify failed" in str(error)) == ("expired" in who)


@pytest.mark.parametrize(
    "uri", ["spiffe://other.test/orders", "spiffe://mesh.test", "spiffe://mesh.test/a//b", "spiffe://mesh.test.evil/x"]
)
def test_S2_nothing_is_sent_to_who_is_not_of_the_trust_domain(colour: Colour, authority: Authority, uri: str) -> None:
    """Misses `trust_domain_of`: a prefix is not enough, and the domain itself is no workload."""
    witness = Witness(authority.leaf(uri))
    error = refused(colour, witness, TLS(verify=authority.bundle, trust_domain="mesh.test"))
    assert f"certificate says '{uri}'" in str(error)


def test_S2_the_right_id_by_an_unknown_authority_is_none(colour: Colour, authority: Authority, tmp_path: Path) -> None:
    """Misses the chain: `check_hostname = False` must not have become `CERT_NONE`."""
    witness = Witness(Authority(tmp_path).leaf(ORDERS))
    refused(colour, witness, TLS(verify=authority.bundle, spiffe_id=ORDERS))


def test_S2_an_expired_certificate_with_the_right_name_is_none(colour: Colour, authority: Authority) -> None:
    witness = Witness(authority.leaf(dns="orders", left=-dt.timedelta(hours=1)))
    assert "expired" in str(refused(colour, witness, TLS(verify=authority.bundle)))


def test_S2_a_subject_that_says_the_name_proves_nothing(colour: Colour, authority: Authority) -> None:
    """Misses `hostname_checks_common_name`: many an authority signs whatever its callers call themselves."""
    witness = Witness(authority.leaf("spiffe://mesh.test/users", called="orders"))
    assert "Hostname mismatch" in str(refused(colour, witness, TLS(verify=authority.bundle)))


def test_S2_an_id_is_asked_for_with_a_context_of_ones_own_as_well(colour: Colour, authority: Authority) -> None:
    """Misses `Dial.prove`. A context that verifies nothing gives nothing to read an id from, and so does not help."""
    own, careless = ssl.create_default_context(cafile=authority.bundle), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    own.check_hostname = careless.check_hostname = False
    careless.verify_mode = ssl.CERT_NONE
    refused(colour, Witness(authority.leaf("spiffe://mesh.test/users")), TLS(verify=own, spiffe_id=ORDERS))
    refused(colour, Witness(authority.leaf(ORDERS)), TLS(verify=careless, spiffe_id=ORDERS))
    with listener(Witness(authority.leaf(ORDERS))) as address:
        assert colour.run(mesh_of(address, tls=TLS(verify=own, spiffe_id=ORDERS)), post_or_error).status_code == 204


def test_S2_a_call_goes_on_to_who_carries_the_id_and_never_twice_to_who_does_not(
    colour: Colour, authority: Authority
) -> None:
    """Misses `Call._strangers`: the retries after the 503 would find the stranger again."""
    stranger = Witness(authority.leaf("spiffe://mesh.test/users"))
    ill = Witness(authority.leaf(ORDERS), status="503 Service Unavailable")
    tls = TLS(verify=authority.bundle, spiffe_id=ORDERS)
    with listener(stranger) as first, listener(ill) as second:

        async def script(client: Any) -> list[Any]:
            return [await client.get("/") for _ in range(2)]

        mesh = mesh_of(
            first, second, tls=tls, balancer=RoundRobin(), retry=Retry(max_attempts=4), breaker=Breaker(enforce=False)
        )
        results = colour.run(mesh, script)
    seen = [[str(attempt.endpoint) for attempt in report(result).attempts] for result in results]
    assert first in seen[0] + seen[1]
    assert all(each.count(first) <= 1 and each.count(second) >= 3 for each in seen)
    assert b"".join(stranger.received) == b""


@pytest.mark.parametrize("asked_for", [{"spiffe_id": ORDERS}, {"trust_domain": "mesh.test"}])
def test_S2_no_id_is_asked_for_where_nobody_would_look_at_it(authority: Authority, asked_for: dict[str, str]) -> None:
    """Misses `mesh._asks_for_id`: the transports of others take whoever has a name that fits."""
    service = Service("orders", ["127.0.0.1:1"], tls=TLS(verify=authority.bundle, **asked_for))
    with pytest.raises(ConfigError, match=r"services\.orders\.tls: must not ask for a SPIFFE id"):
        Mesh(service, inner=lambda endpoint: httpx.HTTPTransport())
    mesh = Mesh(Service("orders", ["127.0.0.1:1"], scheme="https"), inner=lambda endpoint: httpx.HTTPTransport())
    with pytest.raises(ConfigError, match="SPIFFE"):
        mesh.update(service)


def test_S2_a_uvloop_verifies_too(authority: Authority) -> None:
    """Misses `Dial.prove`, where the TLS side of a connection comes from another implementation."""
    import uvloop

    async def main(address: str, spiffe_id: str) -> Any:
        mesh = mesh_of(address, tls=TLS(verify=authority.bundle, spiffe_id=spiffe_id))
        async with mesh.async_client("orders") as client:
            return await post_or_error(client)

    witness = Witness(authority.leaf(ORDERS))
    with listener(witness) as address, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert type(runner.run(main(address, "spiffe://mesh.test/users"))) is IdentityError
        assert b"".join(witness.received) == b""
        assert runner.run(main(address, ORDERS)).status_code == 204


def test_S2_health_checks_and_consul_verify_alike(authority: Authority) -> None:
    """Misses `Dial.prove` in a check, and `check_hostname` for Consul's own address."""
    stranger = Witness(authority.leaf("spiffe://mesh.test/users", dns="orders"))
    with listener(stranger) as address:
        host, _, port = address.partition(":")
        service = Service("orders", [address], tls=TLS(verify=authority.bundle, spiffe_id=ORDERS))
        found = asyncio.run(check(service, HealthCheck("/healthz"), Endpoint(host, int(port))))
        assert found == Finding(False, "IdentityError")
        agent = ConsulAgent(host, int(port), scheme="https", ca_file=authority.bundle)
        with pytest.raises(ConsulError, match="IdentityError"):
            asyncio.run(agent.get(["v1", "agent", "self"], [], timeout=10))
    assert b"".join(stranger.received) == b""


def test_S2_no_other_certificate_can_come_after_the_check(authority: Authority) -> None:
    """Misses `OP_NO_RENEGOTIATION`: no server at hand begins a renegotiation, so it is the option that is seen."""
    for asked_for in ({"spiffe_id": ORDERS}, {"trust_domain": "mesh.test"}):
        context = context_for(TLS(verify=authority.bundle, **asked_for))
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.verify_mode is ssl.CERT_REQUIRED


def test_S2_telemetry_has_a_word_for_it() -> None:
    assert error_of(tls_module.IdentityError("")) == error_of(IdentityError("")) == "identity"
    assert error_of(httpcore.ConnectError("")) == "connect"


def test_the_page_can_be_followed(authority: Authority, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tls.md").read_text(encoding="utf-8")
    (tmp_path / "bundle.pem").write_bytes(authority.pem)
    for name, source in zip(("web.pem", "web.key"), authority.leaf(ORDERS), strict=True):
        (tmp_path / name).write_bytes(Path(source).read_bytes())
    names: dict[str, Any] = {}
    for block in page.split("```python\n")[1:]:
        source = block.partition("```")[0].replace("/etc/mesh", str(tmp_path))
        exec(compile(source, "tls.md", "exec", dont_inherit=True), names)
    for tls in (names["one"], names["any_of_them"], names["mutual"]):
        assert isinstance(mesh_of("10.0.0.1:8443", tls=tls), Mesh)


# Sessions


def test_S2_no_session_is_resumed_neither_by_another_service_nor_by_the_same(
    colour: Colour, authority: Authority
) -> None:
    """Misses `stack.Key`. A session that was resumed would carry the certificate of the other handshake."""
    witness = Witness(authority.leaf(ORDERS, dns="orders"))
    with listener(witness) as address:
        settings: Any = {"tls": TLS(verify=authority.bundle, spiffe_id=ORDERS)}
        settings["connections"] = Connections(max_idle=0)
        mesh = Mesh(Service("orders", [address], **settings), Service("users", [address], **settings))

        async def script(client: Any) -> None:
            for name in ("orders", "users") * 2:
                assert (await client.get(f"http://{name}/")).status_code == 204

        colour.run(mesh, script, service=None)
    assert witness.names == ["orders", "users"] * 2
    assert witness.resumed == [False] * 4


# Files that are replaced


class Clock:
    """What the looks at the files are paced by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(tls_module, "_contexts", {})
        monkeypatch.setattr(tls_module, "monotonic", lambda: self.now)

    def later(self, tls: TLS) -> ssl.SSLContext:
        """The context when the next look is due."""
        self.now += tls_module.LOOK_EVERY
        return context_for(tls)


def copied(papers: tuple[str, str], folder: Path) -> tuple[Path, Path]:
    """The same papers where they can be replaced."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    for file, source in zip((cert, key), papers, strict=True):
        file.write_bytes(Path(source).read_bytes())
    return cert, key


def replace(file: Path, content: bytes) -> None:
    """As a program that renews certificates does it."""
    fresh = file.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(file)


def renew(cert: Path, key: Path, papers: tuple[str, str]) -> None:
    for file, source in zip((cert, key), papers, strict=True):
        replace(file, Path(source).read_bytes())


def test_S2_a_context_is_made_anew_when_its_files_hold_something_else(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Misses `Kept.look`."""
    clock = Clock(monkeypatch)
    cert, key = copied(authority.leaf(ORDERS), tmp_path)
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(authority.pem)
    tls = TLS(verify=str(bundle), cert=str(cert), key=str(key))
    first = context_for(tls)
    for file in (cert, key, bundle):
        os.utime(file, (1, 1))
    assert clock.later(tls) is first, "another time, and the same content"
    renew(cert, key, authority.leaf(ORDERS))
    second = clock.later(tls)
    assert second is not first
    assert clock.later(tls) is second
    bundle.write_bytes(authority.pem + Authority(tmp_path).pem)  # in place
    assert len(clock.later(tls).get_ca_certs()) == 2
    assert len(first.get_ca_certs()) == 1


def test_S2_the_files_are_looked_at_once_a_second_at_most(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Misses `Kept._look_at`."""
    clock, looks = Clock(monkeypatch), list[object]()
    tls = TLS(verify=authority.bundle)
    context_for(tls)
    monkeypatch.setattr(tls_module, "_stamp", looks.append)
    for _ in range(38):
        clock.now += 0.25
        context_for(tls)
    assert len(looks) == 9


@pytest.mark.parametrize("wrong", ["a key of another", "junk", "nothing"])
def test_S2_files_that_do_not_fit_change_nothing_and_are_told_of_once(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    """Misses `Kept._renewed`."""
    clock = Clock(monkeypatch)
    cert, key = copied(authority.leaf(ORDERS), tmp_path)
    tls = TLS(verify=authority.bundle, cert=str(cert), key=str(key))
    first, right = context_for(tls), key.read_bytes()
    with caplog.at_level(logging.WARNING, "meshlib.transport"):
        replace(key, Path(authority.leaf()[1] if wrong == "a key of another" else __file__).read_bytes())
        if wrong == "nothing":
            key.unlink()
        assert clock.later(tls) is first
        assert caplog.messages == [], "one may be replaced before the other"
        assert [clock.later(tls) for _ in range(5)] == [first] * 5
        [told] = caplog.messages
        assert f"{key} held before: tls.cert: must be a certificate whose key fits" in told
        replace(key, right)
        assert clock.later(tls) is first
        renew(cert, key, authority.leaf(ORDERS))
        assert clock.later(tls) is not first
        assert len(caplog.messages) == 1


def test_S2_files_that_could_not_be_read_are_tried_again(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Misses that each look tries: no more descriptors for a moment must not end all rotation until the next one."""
    clock = Clock(monkeypatch)
    cert, key = copied(authority.leaf(ORDERS), tmp_path)
    tls = TLS(verify=authority.bundle, cert=str(cert), key=str(key))
    first = context_for(tls)
    renew(cert, key, authority.leaf(ORDERS))
    with monkeypatch.context() as patch:
        patch.setattr(tls_module, "trusting", lambda bundle: Path("/nowhere").stat())
        for _ in range(3):
            assert clock.later(tls) is first
    assert clock.later(tls) is not first


def test_S2_a_relative_path_means_what_it_meant_when_the_mesh_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Misses `tls._own`: whoever becomes a daemon goes elsewhere, where other authorities may be found."""
    clock, here, there = Clock(monkeypatch), tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "bundle.pem").write_bytes(Authority(tmp_path).pem)
    monkeypatch.chdir(here)
    tls = TLS(verify="bundle.pem")
    first = context_for(tls)
    monkeypatch.chdir(there)
    assert clock.later(tls) is first
    assert context_for(TLS(verify="bundle.pem")) is not first
    replace(here / "bundle.pem", Authority(tmp_path).pem)
    assert clock.later(tls) is not first


def test_S2_an_open_connection_stays_when_the_files_are_replaced(
    colour: Colour, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Misses that a context is swapped, and no connection dropped."""
    monkeypatch.setattr(tls_module, "LOOK_EVERY", 0.0)
    cert, key = copied(authority.leaf(ORDERS), tmp_path)
    witness = Witness(authority.leaf(dns="orders"), ca=authority.bundle)
    with listener(witness) as address:

        async def script(client: Any) -> None:
            for _ in range(3):
                assert (await client.get("/")).status_code == 204
                renew(cert, key, authority.leaf(ORDERS))

        colour.run(mesh_of(address, tls=TLS(verify=authority.bundle, cert=str(cert), key=str(key))), script)
    assert len(witness.received) == 1


def test_S2_rotation_under_load_fails_no_call(
    colour: Colour, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 calls a second, each over a new connection, while our own pair is replaced file by file, then the bundle, with
    a moment of junk, and then the server's papers by those of another authority. Misses `Kept.look` (the server's new
    papers are strangers, ours stay the old ones) and `Kept._renewed` (what does not fit would be used)."""
    monkeypatch.setattr(tls_module, "LOOK_EVERY", 0.02)
    other = Authority(tmp_path)
    cert, key = copied(authority.leaf(ORDERS), tmp_path)
    bundle, callers = tmp_path / "bundle.pem", tmp_path / "callers.pem"
    bundle.write_bytes(authority.pem)
    callers.write_bytes(authority.pem + other.pem)
    witness = Witness(authority.leaf(dns="orders"), ca=str(callers))
    fresh_cert, fresh_key = (Path(file).read_bytes() for file in other.leaf(ORDERS))
    steps: list[Callable[[], None]] = [
        lambda: replace(cert, fresh_cert),
        lambda: replace(key, fresh_key),
        lambda: replace(bundle, b"junk"),
        lambda: replace(bundle, callers.read_bytes()),
        lambda: witness.carry(other.leaf(dns="orders"), ca=str(callers)),
    ]
    with listener(witness) as address:
        tls = TLS(verify=str(bundle), cert=str(cert), key=str(key))
        mesh = mesh_of(address, tls=tls, connections=Connections(max_idle=0), retry=Retry(max_attempts=1))

        async def script(client: Any) -> list[Any]:
            ends = []
            for number in range(48):
                due = time.monotonic() + 0.02
                if number % 8 == 7 and steps:
                    steps.pop(0)()
                ends.append(await get_or_error(client))
                await anyio.sleep(max(0.0, due - time.monotonic()))
            return ends

        ends = colour.run(mesh, script)
    assert steps == []
    assert [end for end in ends if not isinstance(end, httpx.Response) or end.status_code != 204] == []
    assert len(witness.received) == 48
    assert len(set(witness.serials)) == 2
    assert witness.serials[0] != witness.serials[-1]


# What is no file


@pytest.mark.parametrize("place", ["verify", "cert", "key"])
def test_S2_a_pipe_is_refused_and_not_waited_for(authority: Authority, tmp_path: Path, place: str) -> None:
    """Misses `tls._is_odd`; a device is refused by the same line."""
    cert, key = authority.leaf(ORDERS)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    setting = {"verify": authority.bundle, "cert": cert, "key": key} | {place: str(pipe)}
    assert not in_time(lambda: mesh_of("127.0.0.1:1", tls=TLS(**setting))), "it fails, and at once"
    with pytest.raises(
        ConfigError, match=rf"services\.orders\.tls\.{place}: must be a regular file, and no folder, pipe"
    ):
        mesh_of("127.0.0.1:1", tls=TLS(**setting))
    with pytest.raises(ConfigError, match="must be a regular file"):
        mesh_of("127.0.0.1:1", tls=TLS(verify="/dev/zero"))


def test_S2_a_pipe_in_the_place_of_a_file_changes_nothing(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Misses `tls._is_odd` in `_held`."""
    clock = Clock(monkeypatch)
    cert, key = copied(authority.leaf(ORDERS), tmp_path)
    tls = TLS(verify=authority.bundle, cert=str(cert), key=str(key))
    first = context_for(tls)
    key.unlink()
    os.mkfifo(key)
    for _ in range(3):
        assert in_time(lambda: clock.later(tls))
    assert context_for(tls) is first
    [told] = caplog.messages
    assert "tls.key: must be a regular file" in told
    key.unlink()
    renew(cert, key, authority.leaf(ORDERS))
    assert clock.later(tls) is not first


def test_S2_a_pipe_that_comes_while_a_context_is_made_is_not_waited_for(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Misses that `tls._see_files` is asked again, after the authorities are read."""
    clock, trusting = Clock(monkeypatch), tls_module.trusting
    cert, key = copied(authority.leaf(ORDERS), tmp_path)
    tls = TLS(verify=authority.bundle, cert=str(cert), key=str(key))
    first = context_for(tls)

    def slowly(bundle: str | None) -> ssl.SSLContext:
        if key.is_file():
            key.unlink()
            os.mkfifo(key)
        return trusting(bundle)

    monkeypatch.setattr(tls_module, "trusting", slowly)
    replace(key, Path(authority.leaf()[1]).read_bytes())
    assert in_time(lambda: clock.later(tls))
    assert context_for(tls) is first


def in_time(work: Callable[[], object]) -> bool:
    """Whether it ends well. A thread that waits for a pipe is given up: the test fails, and does not hang."""
    ended = list[bool]()

    def run() -> None:
        try:
            work()
        except ConfigError:
            ended.append(False)
        else:
            ended.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits for the pipe"
    return ended == [True]


# What is forgotten


def test_a_context_is_kept_for_as_long_as_a_setting_that_asks_for_it(tmp_path: Path) -> None:
    """Misses the weak `_contexts`, and the finalizers of `_users`."""
    bundle = Authority(tmp_path).bundle

    def asks(number: int) -> TLS:
        return TLS(verify=bundle, server_name=f"orders-{number}")

    for number in range(20):
        mesh_of("127.0.0.1:1", tls=asks(number))
    one, other = asks(0), asks(0)
    context = context_for(one)
    assert context_for(other) is context
    del one
    gc.collect()
    assert context_for(asks(0)) is context, "the other still asks for it"
    del other
    gc.collect()
    assert [kept for kept in tls_module._contexts.values() if kept._tls.verify == bundle] == []
    assert [kept for kept in tls_module._users.values() if kept._tls.verify == bundle] == []


def test_consul_is_asked_with_one_context_however_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Misses `consul._trusting`: a setting of one request is forgotten with it, and so is its context."""
    made, make = list[TLS](), tls_module._make

    def counting(tls: TLS) -> ssl.SSLContext:
        made.append(tls)
        return make(tls)

    monkeypatch.setattr(tls_module, "_make", counting)
    agent = ConsulAgent("127.0.0.1", 1, scheme="https", ca_file=Authority(tmp_path).bundle)
    for _ in range(3):
        with pytest.raises(ConsulError):
            asyncio.run(agent.get(["v1", "agent", "self"], [], timeout=10))
        gc.collect()
    assert len(made) == 1
