"""What nobody is told (rule T3): secrets wherever a call, a check or a query to Consul has a place for one, and a look
at all that meshlib says.

The secrets have a word in common. Those that are sent encoded are looked for in that form as well.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import pickle
import socketserver
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import Colour
from meshlib import (
    TLS,
    Breaker,
    ConfigError,
    ConsistentHash,
    DeadlineExceeded,
    Endpoint,
    HealthCheck,
    Hedge,
    Mesh,
    Service,
    Timeout,
    UnknownService,
    report,
)
from meshlib.cli import main
from meshlib.discovery import Resolution
from meshlib.ext.wsgi import status_app
from meshlib.registry.entry import Entry
from meshlib.testing import Upstream, upstreams
from served import served
from telemetry.seen import Seen

pytestmark = pytest.mark.once

WORD = "hush"


def secret(where: str) -> str:
    return f"{WORD}-{where}"


USER, PASSWORD = secret("user"), secret("password")
QUERY = f"token={secret('query')}"
HEADERS = {
    "authorization": f"Bearer {secret('authorization')}",
    "cookie": f"session={secret('cookie')}",
    "x-user-id": secret("key"),
}
BODY = secret("request-body").encode()
ANSWER: dict[str, Any] = {
    "headers": {"set-cookie": f"session={secret('set-cookie')}", "x-secret": secret("header")},
    "body": secret("response-body"),
}
BASIC = [base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode(), base64.b64encode(f"u:{PASSWORD}".encode()).decode()]

OK = b"HTTP/1.1 200 OK\r\n"
ODD = f"Set-Cookie: {secret('odd-header')}\r\n".encode()
MALFORMED = (
    b"HTTP/1.1 " + secret("status").encode() + b"\r\n\r\n",
    secret("opening").encode() + b"\r\n\r\n",
    OK + ODD + secret("header line").encode() + b"\r\n\r\n",
    OK + ODD + b"Content-Length: " + secret("length").encode() + b"\r\n\r\n",
    OK + ODD + b"Transfer-Encoding: chunked\r\n\r\n" + secret("chunk").encode() + b"\r\n",
    OK + ODD + b"Content-Length: 99\r\n\r\n" + secret("cut").encode(),
)
"""Answers that break, one after the other."""

HAPPENS = {
    *("first", "retry", "hedge", "IdentityError"),
    *("DeadlineExceeded", "LocalProtocolError", "RemoteProtocolError", "UnknownService", "ConfigError"),
    *("DiscoveryStale", "Ejected", "EndpointAdded", "HealthChanged", "PanicBegan"),
}


class Playing(socketserver.ThreadingTCPServer):
    """Plays bytes, one answer for each connection, the last over and over; it keeps what it was sent."""

    daemon_threads = True

    def __init__(self, *answers: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Play)
        self.answers = list(answers)
        self.heard: list[str] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Play(socketserver.StreamRequestHandler):
    server: Playing

    def handle(self) -> None:
        lines = []
        while (line := self.rfile.readline().strip()) != b"":
            lines.append(line.decode("latin-1"))
        self.server.heard.append("\n".join(lines))
        answers = self.server.answers
        self.wfile.write(answers.pop(0) if len(answers) > 1 else answers[0])


@contextlib.contextmanager
def playing(*answers: bytes) -> Iterator[Playing]:
    with Playing(*answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def by_consul(port: int) -> list[bytes]:
    """An endpoint, and then everything that may go wrong."""
    said = [{"Node": {"Address": "127.0.0.1"}, "Service": {"ID": "x", "Address": "", "Port": port}, "Checks": []}]
    body = json.dumps(said).encode()
    told = b"X-Consul-Index: 7\r\nX-Consul-KnownLeader: true\r\nX-Consul-LastContact: 0\r\n" + ODD
    token = f"token {secret('environment')} {secret('file')} is none".encode()
    return [
        OK + told + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        b"HTTP/1.1 403 No\r\n" + ODD + b"Content-Length: %d\r\n\r\n" % len(token) + token,
        OK + told + b"Content-Length: %d\r\n\r\n" % len(token) + token,
        OK + told + b"Content-Encoding: " + secret("encoding").encode() + b"\r\n\r\n",
        *MALFORMED,
    ]


class Told(logging.Handler):
    """All that was said, by who said it.

    Attributes:
        happened: kinds of attempts, classes of errors and of events.
        theirs: the loggers of clients that are the user's own; httpx's tells of every URL, see `docs/telemetry.md`.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[tuple[str, str]] = []
        self.happened: set[str] = set()
        self.theirs: tuple[str, ...] = ("httpx",)

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(self.theirs):
            self.hear(f"log {record.name}", self.format(record), vars(record))

    def hear(self, who: str, *what: object) -> None:
        self.said += [(who, text) for each in what for text in (str(each), repr(each))]

    def hear_report(self, result: Any) -> None:
        made = report(result)
        self.happened |= {attempt.kind for attempt in made.attempts}
        self.hear("report", made, made.to_dict(), *made.attempts)

    def hear_error(self, error: BaseException) -> None:
        self.happened.add(type(error).__name__)
        self.hear("error", "".join(traceback.format_exception(error)), error)
        self.hear_report(error)

    def hear_event(self, event: Any) -> None:
        self.happened.add(type(event).__name__)
        self.hear("event", event)

    def leaks(self, *also: str) -> list[tuple[str, str]]:
        """What was said of the secrets."""
        words = [WORD, base64.b64encode(WORD.encode())[:-2].decode(), *BASIC, *also]
        return [(who, text) for who, text in self.said if any(word in text for word in words)]


@pytest.fixture
def told() -> Iterator[Told]:
    root, handler = logging.getLogger(), Told()
    was = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(was)


@pytest.fixture
def three() -> Iterator[list[Upstream]]:
    with upstreams(3) as started:
        yield started


async def _calls(client: Any, told: Told) -> None:
    """Calls that succeed, are retried, redirected, hedged, late, broken, refused and not to be made."""
    for service in ("orders", "checked", "hedged", "consul-env", "consul-file", "secure"):
        origin = f"https://{service}" if service == "secure" else f"http://{USER}:{PASSWORD}@{service}"
        response = await client.put(f"{origin}/?{QUERY}", content=BODY)
        assert response.status_code == 200, service
        assert WORD in response.text
        told.hear_report(response)
    odd = {"x-odd": f"{secret('odd')}\r\n{secret('odd')}: 1"}
    for url, more in [
        *[(f"http://broken/?{QUERY}", {})] * len(MALFORMED),
        (f"http://late/?{QUERY}", {}),
        (f"http://stranger/?{QUERY}", {}),
        (f"http://{USER}:{PASSWORD}@nobody/?{QUERY}", {}),
        (f"http://{USER}:{PASSWORD}@orders:99/?{QUERY}", {}),
        (f"ftp://{USER}:{PASSWORD}@orders/?{QUERY}", {}),
        (f"http://orders/?{QUERY}", {"headers": odd}),
        (f"http://orders/?{QUERY}", {"extensions": {"meshlib": {"hash_key": secret("key").encode()}}}),
    ]:
        with pytest.raises((httpx.TransportError, ConfigError)) as caught:
            await client.get(url, **more)
        told.hear_error(caught.value)


def mesh_over(
    three: list[Upstream], secure: str, broken: list[str], consuls: list[str], tls: TLS, seen: Seen, file: Path
) -> Mesh:
    first, second = Endpoint.parse(three[0].address), Endpoint("127.0.0.1", three[1].port, priority=1)
    slow = Endpoint.parse(three[2].address)
    check = HealthCheck(f"/healthz?{QUERY}", interval=0.2, timeout=0.1, unhealthy=1)
    late = Timeout(total=0.4, attempt=0.15)
    return Mesh(
        Service("orders", [first, second], balancer=ConsistentHash(key="header:x-user-id")),
        Service("checked", [second], health=check),
        Service("hedged", [slow, second], hedge=Hedge(after=0.05), min_healthy=2),
        Service("broken", broken, breaker=Breaker(consecutive=2)),
        Service("late", [slow], timeout=late, health=check),
        Service("secure", [secure], tls=tls),
        Service("stranger", [secure], tls=TLS(verify=tls.verify, cert=tls.cert)),
        Service("consul-env", f"consul://{consuls[0]}/web?tag=v2&wait=1"),
        Service("consul-file", f"consul://{consuls[1]}/web?token_file={file}&wait=1"),
        endpoint_attributes=True,
        **seen.told_to(),
    )  # fmt: skip


def test_T3_no_secret_is_told_anywhere(
    three: list[Upstream],
    told: Told,
    certificates: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hurry: None,
) -> None:
    bundle, certificate = certificates
    file = tmp_path / "token"
    file.write_text(secret("file"))
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", secret("environment"))
    seen = Seen()
    tls = TLS(verify=bundle, cert=certificate, server_name="orders")
    for each in three[:2]:
        each.script(then=ANSWER)
    three[2].script(then={**ANSWER, "delay": 1.0})
    with contextlib.ExitStack() as stack:
        secure = stack.enter_context(Upstream("s", cert=certificate))
        secure.script(then=ANSWER)
        broken = [stack.enter_context(playing(*MALFORMED)) for _ in range(2)]
        consuls = [stack.enter_context(playing(*by_consul(three[0].port))) for _ in range(2)]
        of_both = [[each.address for each in servers] for servers in (broken, consuls)]
        mesh = stack.enter_context(mesh_over(three, secure.address, *of_both, tls, seen, file))
        stack.callback(mesh.subscribe(told.hear_event))
        for name in ("sync", "asyncio"):
            for each in broken:
                each.answers = list(MALFORMED)
            moved = {"status": 302, "headers": {"location": f"/next?token={secret('location')}", **ANSWER["headers"]}}
            three[0].script({"status": 503, **ANSWER}, moved, then=ANSWER)
            settings: Any = {"headers": HEADERS, "follow_redirects": True, "service": None}
            Colour(name).run(mesh, lambda client: _calls(client, told), **settings)
            basic = httpx.BasicAuth("u", PASSWORD)
            Colour(name).run(mesh, lambda client: client.get("/"), auth=basic)
        _until_refused(consuls)
        _look_at(mesh, told, tls)
        _pages(mesh, told, capsys)
        told.hear("span", *(span.to_json() for span in seen.spans))
        told.hear("metric", *(metric.to_json() for metric in seen.metrics().values()))
        _were_sent([secure, *three], consuls)
    who = {each.partition(" ")[0] for each, _ in told.said}
    assert who >= {"log", "event", "error", "report", "span", "metric", "repr", "page", "top"}
    assert told.happened >= HAPPENS
    assert {f"log meshlib.{room}" for room in ("discovery", "breaker")} <= {each for each, _ in told.said}
    key = Path(certificate).read_text().splitlines()
    assert told.leaks(*key[1:3]) == []


@dataclass
class Own:
    """A resolver whose maker did not think of its repr."""

    token: str

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        raise NotImplementedError


def test_T3_no_error_and_no_repr_shows_credentials_that_stand_where_they_should_not(told: Told) -> None:
    # The guards: `validation.shown`, `Service.__repr__`, `policy._is_path` (or a repr would show a key), and
    # `repr=False` of fields that hold queries.
    url = f"consul://{USER}:{PASSWORD}@h/x?{QUERY}"
    mesh = Mesh(Service("orders", ["127.0.0.1:1"]))
    pem = f"-----BEGIN PRIVATE KEY-----\n{secret('pem')}\n"
    own: Any = Own(secret("own"))
    mistakes: list[Callable[[], object]] = [
        lambda: Service(url, "orders"),
        lambda: Service("orders", url),
        lambda: Service("orders", [url]),
        lambda: Service("orders", "static:a:1", scheme=url),
        lambda: Service("orders", "static:a:1", tls=TLS(server_name=url)),
        lambda: Service("orders", "static:a:1", balancer=url),  # type: ignore[arg-type]
        lambda: Mesh(url),  # type: ignore[arg-type]
        lambda: Mesh(own),
        *(partial(TLS, **{"cert": "/nowhere", setting: pem}) for setting in ("verify", "cert", "key")),
        lambda: TLS(server_name=pem),
        lambda: HealthCheck(f"x?{QUERY}"),
        lambda: ConsistentHash(key=url),
        lambda: mesh.client(url),
        lambda: mesh.call(url),
        lambda: mesh.eject(url, "127.0.0.1:1"),
        lambda: mesh.eject("orders", url),
        lambda: mesh.register(url, port=1),
        lambda: mesh.register("orders", port=1, at=url),
        lambda: mesh.register("orders", port=1, check_path=f"x?{QUERY}"),
        lambda: Endpoint(url, 1),
        lambda: Endpoint.parse(url),
    ]
    for mistake in mistakes:
        with pytest.raises((ConfigError, UnknownService)) as caught:
            mistake()
        told.hear("error", "".join(traceback.format_exception(caught.value)), caught.value)
    told.hear("repr", Service("orders", own), Entry("orders", port=1, check_path=f"/x?{QUERY}"))
    assert len(told.said) >= 2 * len(mistakes)
    assert told.leaks() == []


@pytest.mark.parametrize("name", [f"http://{USER}:{PASSWORD}@h/", f"http://{USER}:a {WORD}@h/", f"h/?{QUERY}"])
def test_T3_an_unknown_service_keeps_no_password_in_any_form(name: str) -> None:
    # The guard: `UnknownService.name` is `bare`.
    with pytest.raises(UnknownService) as caught:
        Mesh(Service("orders", ["127.0.0.1:1"])).client(name)
    assert WORD not in str(vars(caught.value)) + str(caught.value)
    assert WORD.encode() not in pickle.dumps(caught.value)
    assert caught.value.name.endswith(("@h/", "h/?..."))


def test_T3_an_error_of_ours_is_pickled_without_its_request() -> None:
    # The guard: `MeshError.__reduce__`.
    mesh = Mesh(Service("orders", ["127.0.0.1:1"], timeout=Timeout(total=1e-6)))
    with mesh.client("orders") as client, pytest.raises(DeadlineExceeded) as caught:
        client.post(f"/?{QUERY}", headers=HEADERS, content=BODY)
    pickled = pickle.dumps(caught.value)
    assert WORD.encode() not in pickled
    again = pickle.loads(pickled)
    assert (type(again), str(again), again.__notes__) == (DeadlineExceeded, str(caught.value), caught.value.__notes__)
    assert report(again).service == "orders"
    assert caught.value.request.headers["authorization"]


def _until_refused(consuls: list[Playing]) -> None:
    """Until each of them has said everything."""
    until = time.monotonic() + 30
    while any(len(each.answers) > 1 for each in consuls):
        assert time.monotonic() < until, [each.heard for each in consuls]
        time.sleep(0.02)


def _were_sent(fleet: list[Upstream], consuls: list[Playing]) -> None:
    """Nothing is proven by a secret that nobody used."""
    sent = [str((request.target, request.headers)) for each in fleet for request in each.log()]
    for where in ("query", "authorization", "cookie", "key", "location"):
        assert any(secret(where) in each for each in sent), where
    for encoded in BASIC:
        assert any(encoded in each for each in sent)
    assert any("/healthz" in each for each in sent)
    assert [f"x-consul-token: {secret(where)}" in heard for where, each in
            zip(("environment", "file"), consuls, strict=True) for heard in each.heard[:1]] == [True, True]  # fmt: skip


def _look_at(mesh: Mesh, told: Told, tls: TLS) -> None:
    """Everything that has a `repr`."""
    services = [cluster.service for cluster in mesh._clusters.values()]
    settings = [getattr(each, name) for each in services for name in each.__dataclass_fields__]
    with mesh.client("orders", headers=HEADERS, auth=(USER, PASSWORD)) as client:
        told.hear("repr", client, client._transport, mesh.transport(), mesh.async_transport(), mesh.async_client())
    snapshot = mesh.snapshot()
    told.hear("repr", mesh, tls, *services, *settings, snapshot, *(each.to_dict() for each in snapshot.values()))
    told.hear("repr", *mesh._clusters.values(), *(cluster.telemetry for cluster in mesh._clusters.values()))
    told.hear("repr", *(node for cluster in mesh._clusters.values() for node in cluster.view.nodes))


def _pages(mesh: Mesh, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    """The page, asked with secrets and by who is not let in, and `meshlib top`."""

    def auth(request: Any) -> bool:
        told.hear("repr", request)
        if "basic" in request.headers.get("authorization", "").lower():
            return True
        raise ValueError(request.headers.get("authorization"))

    with served(status_app(mesh, auth=auth)) as url, httpx.Client(trust_env=False) as client:
        told.theirs = ("httpx", "httpcore")
        for path in ("/", "/snapshot.json", "/nothing"):
            for headers in ({}, HEADERS):
                answer = client.get(f"{url}{path}?{QUERY}", headers=headers, auth=None if headers else (USER, PASSWORD))
                told.hear("page", answer.text, answer.headers)
        told.theirs = ()
        ours = url.replace("//", f"//{USER}:{PASSWORD}@")
        for target in (f"{ours}?{QUERY}", f"{ours}/nothing?{QUERY}", f"{url}?{QUERY}", f"http://{USER}@h:x/?{QUERY}"):
            main(["top", target, "--once"])
            told.hear("top", *capsys.readouterr())
