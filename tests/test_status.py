"""The status apps by their protocols: what is answered, to whom, with which headers, and what is never told."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import httpx
import pytest

from meshes import mesh_of
from meshlib import Endpoint, Mesh, Service
from meshlib.discovery import Resolution
from meshlib.ext import asgi, status, wsgi
from meshlib.ext.status import StatusRequest
from meshlib.plain import plain

HOSTILE = "<script>alert(1)</script> \"' &amp; \u2028 \ud800"


@dataclass(frozen=True)
class Door:
    """One of the two apps, and how it is asked."""

    name: str

    def app(self, mesh: Any, **settings: Any) -> Any:
        module = asgi if self.name == "asgi" else wsgi
        return module.status_app(mesh, **settings)

    def ask(self, app: Any, path: str, method: str = "GET", root: str = "", **more: Any) -> httpx.Response:
        url = httpx.URL(f"http://mesh.test{path}")
        if self.name == "wsgi":
            inner = url.path.removeprefix(root)  # who mounts a WSGI app takes the path apart
            transport = httpx.WSGITransport(app, script_name=root, remote_addr="10.9.9.9")
            with httpx.Client(transport=transport) as client:
                return client.request(method, url.copy_with(path=inner or "/"), **more)
        return asyncio.run(self._ask(app, url, method, root, more))

    async def _ask(self, app: Any, url: httpx.URL, method: str, root: str, more: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=root, client=("10.9.9.9", 1))
        async with httpx.AsyncClient(transport=transport) as client:
            return await client.request(method, url, **more)


@pytest.fixture(params=["asgi", "wsgi"])
def door(request: pytest.FixtureRequest) -> Door:
    return Door(request.param)


@pytest.fixture
def mesh() -> Mesh:
    return mesh_of("10.0.0.1:80", "[::1]:81")


class Warned:
    """A resolver whose answer comes with a warning."""

    source = "test:warned"

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        return Resolution([Endpoint("10.0.0.1", 80)], 60.0, None, warnings=(HOSTILE,))


def test_the_page_and_the_snapshot(door: Door, mesh: Mesh, no_leaks: None) -> None:
    app = door.app(mesh)
    page = door.ask(app, "/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.text.startswith("<!doctype html>")
    answer = door.ask(app, "/snapshot.json?anything")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    told = answer.json()
    seen = {name: service.to_dict() for name, service in mesh.snapshot().items()}
    assert told["services"].keys() == {"orders"}
    assert told["services"]["orders"].pop("age") <= seen["orders"].pop("age")
    assert told["services"] == seen
    assert [node["endpoint"] for node in told["services"]["orders"]["nodes"]] == ["10.0.0.1:80", "[::1]:81"]


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("HEAD", "/", 200),
        ("HEAD", "/snapshot.json", 200),
        ("POST", "/", 405),
        ("DELETE", "/snapshot.json", 405),
        ("OPTIONS", "/", 405),
        ("GET", "/page.js", 404),
        ("GET", "//snapshot.json", 404),
        ("POST", "/nodes", 404),
        ("HEAD", "/nodes", 404),
    ],
)
def test_everything_else(method: str, path: str, code: int, door: Door, mesh: Mesh) -> None:
    before = mesh.snapshot()["orders"].nodes
    answer = door.ask(door.app(mesh), path, method)
    assert answer.status_code == code
    assert answer.headers.get("allow") == ("GET, HEAD" if code == 405 else None)
    assert int(answer.headers["content-length"]) > 0
    assert bool(answer.content) == (method != "HEAD")
    assert mesh.snapshot()["orders"].nodes == before


@pytest.mark.parametrize("path", ["/", "/snapshot.json", "/nowhere"])
@pytest.mark.parametrize("permission", [True, 401, None])
def test_every_answer_is_closed_to_others(path: str, permission: Any, door: Door, mesh: Mesh) -> None:
    headers = door.ask(door.app(mesh, auth=lambda request: permission), path).headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    assert "unsafe" not in policy
    assert "access-control-allow-origin" not in headers


def test_the_page_is_whole_and_its_policy_names_what_is_in_it(door: Door, mesh: Mesh) -> None:
    page = door.ask(door.app(mesh), "/")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["connect-src"] == "'self'"
    assert set(re.findall(r"https?://[^'\"\s]+", page.text)) == {"http://www.w3.org/2000/svg"}, "nothing from elsewhere"
    assert not re.search(r"<[^>]+ (on\w+|style)=", page.text), "the policy would not let it"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", page.text)
    assert not re.search(r"(src|href)=.?/", page.text), "it would leave the place where it is mounted"


@pytest.mark.parametrize("root", ["/status", "/a/b", "/snapshot.json", "/status/"])
def test_it_may_be_mounted_anywhere(root: str, door: Door, mesh: Mesh) -> None:
    app = door.app(mesh)
    root = root if door.name == "asgi" else root.rstrip("/")
    bare = root.rstrip("/")
    assert door.ask(app, f"{bare}/", root=root).text.startswith("<!doctype html>")
    assert "orders" in door.ask(app, f"{bare}/snapshot.json", root=root).json()["services"]
    assert door.ask(app, f"{bare}/status", root=root).status_code == 404
    assert door.ask(app, bare, root=root).text.startswith("<!doctype html>")


@pytest.mark.parametrize("path", ["/snapshot.json", "/status/snapshot.json"])
def test_who_mounts_an_ASGI_app_may_have_taken_the_path_away(path: str, mesh: Mesh) -> None:
    """Servers and frameworks disagree on whether `path` holds `root_path`."""
    assert Door("asgi").ask(asgi.status_app(mesh), path, root="/status").status_code == 200


def test_what_comes_from_outside_is_in_the_snapshot_alone(door: Door, mesh: Mesh, no_leaks: None) -> None:
    hostile = Mesh(Service("orders", Warned()))
    with hostile:
        hostile.wait_ready(10)
        app = door.app(hostile)
        answer = door.ask(app, "/snapshot.json")
        assert answer.json()["services"]["orders"]["warnings"] == [f"test:warned: {plain(HOSTILE)}"]
        assert answer.content.isascii()
        assert door.ask(app, "/").content == door.ask(door.app(mesh), "/").content


def test_a_snapshot_is_shared_for_a_moment(door: Door, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    take = mesh.snapshot
    monkeypatch.setattr(mesh, "snapshot", lambda: taken.append(1) or take())
    monkeypatch.setattr(status, "SHARED", 3600.0)
    app = door.app(mesh)
    for path in ("/", "/snapshot.json", "/snapshot.json"):
        door.ask(app, path)
    assert len(taken) == 1
    monkeypatch.setattr(status, "SHARED", 0.0)
    door.ask(app, "/snapshot.json")
    assert len(taken) == 2


# Who may see it


@pytest.mark.parametrize(("permission", "code"), [(True, 200), (False, 403), (403, 403), (401, 401)])
@pytest.mark.parametrize("path", ["/", "/nowhere"])
def test_auth_decides(permission: Any, code: int, path: str, door: Door, mesh: Mesh) -> None:
    answer = door.ask(door.app(mesh, auth=lambda request: permission), path)
    assert answer.status_code == (404 if (permission, path) == (True, "/nowhere") else code)
    assert ("www-authenticate" in answer.headers) == (code == 401)
    assert "<" not in answer.text or code == 200


def test_auth_is_told_who_asks(door: Door, mesh: Mesh) -> None:
    asked: list[StatusRequest] = []
    app = door.app(mesh, auth=lambda request: bool(asked.append(request)))
    door.ask(app, "/x/snapshot.json?q=1", "HEAD", root="/x", headers={"Authorization": "Basic c2VjcmV0", "X-A": "b"})
    (request,) = asked
    assert (request.method, request.path, request.client) == ("HEAD", "/snapshot.json", "10.9.9.9")
    assert (request.headers["authorization"], request.headers["x-a"]) == ("Basic c2VjcmV0", "b")
    assert "c2VjcmV0" not in repr(request)


@contextmanager
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    lines: list[str] = []
    with caplog.at_level(logging.DEBUG):
        yield lines
    lines += [logging.Formatter().format(record) for record in caplog.records]


@pytest.mark.parametrize("answer", [None, 1, 0, 200, "yes", 404])
def test_a_hook_that_says_nothing_sensible_lets_nobody_in(
    answer: Any, door: Door, mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    with heard(caplog) as lines:
        response = door.ask(door.app(mesh, auth=lambda request: answer), "/snapshot.json")
    assert response.status_code == 500
    assert "orders" not in response.text
    assert any("the status page failed: TypeError in" in line for line in lines)


def test_T3_a_hook_that_raises_tells_nobody_why(door: Door, mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    def auth(request: StatusRequest) -> bool:
        return bool(int(request.headers["authorization"]))

    with heard(caplog) as lines:
        secrets = {"authorization": "marker-a", "cookie": "marker-b"}
        answer = door.ask(door.app(mesh, auth=auth), "/?q=marker-c", "POST", headers=secrets, content=b"marker-d")
    assert answer.status_code == 500
    (line,) = [line for line in lines if "status page" in line]
    assert line.startswith("the status page failed: ValueError in auth (")
    assert "marker" not in answer.text + line


def test_a_snapshot_that_raises_is_a_500(door: Door, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "snapshot", lambda: 1 / 0)
    app = door.app(mesh)
    assert (door.ask(app, "/snapshot.json").status_code, door.ask(app, "/").status_code) == (500, 200)


def test_auth_may_be_async_in_ASGI_alone(mesh: Mesh) -> None:
    async def auth(request: StatusRequest) -> bool:
        await asyncio.sleep(0)
        return request.path == "/"

    app = asgi.status_app(mesh, auth=auth)
    codes = [Door("asgi").ask(app, path).status_code for path in ("/", "/snapshot.json")]
    assert codes == [200, 403]
    with pytest.raises(TypeError, match="must not be async"):
        wsgi.status_app(mesh, auth=auth)


def test_auth_has_to_be_a_function(door: Door, mesh: Mesh) -> None:
    with pytest.raises(TypeError, match="auth must be a function of a StatusRequest, or None, got str"):
        door.app(mesh, auth="secret")


def test_a_status_page_is_of_a_mesh(door: Door) -> None:
    with pytest.raises(TypeError, match=r"mesh must be a Mesh, status_app\(mesh, auth=\.\.\.\), got str$"):
        door.app("mesh")


# ASGI beside HTTP


def played(app: Any, scope: dict[str, Any], *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What an app sends when it receives these."""
    sent: list[dict[str, Any]] = []
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


def test_it_is_a_server_s_whole_app(mesh: Mesh) -> None:
    app = asgi.status_app(mesh)
    sent = played(app, {"type": "lifespan"}, {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    assert [each["type"] for each in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    scope = {"type": "websocket", "path": "/", "headers": []}
    assert played(app, scope, {"type": "websocket.connect"}) == [{"type": "websocket.close", "code": 1000}]


def test_headers_that_come_twice_are_one_value_for_auth(mesh: Mesh) -> None:
    def auth(request: StatusRequest) -> bool:
        return request.headers["authorization"] == "right"

    scope = {"type": "http", "method": "GET", "path": "/", "client": None}
    app = asgi.status_app(mesh, auth=auth)
    twice = played(app, {**scope, "headers": [(b"Authorization", b"wrong"), (b"authorization", b"right")]})
    once = played(app, {**scope, "headers": [(b"authorization", b"right")]})
    assert [twice[0]["status"], once[0]["status"]] == [403, 200]


# Frameworks


def test_starlette_mounts_it(mesh: Mesh) -> None:
    applications = import_module("starlette.applications")
    routing = import_module("starlette.routing")
    app = applications.Starlette(routes=[routing.Mount("/deep", routes=[routing.Mount("/x", asgi.status_app(mesh))])])
    assert _services(lambda path: Door("asgi").ask(app, path)) == {"orders"}


def test_fastapi_mounts_it(mesh: Mesh) -> None:
    app = import_module("fastapi").FastAPI()
    app.mount("/deep/x", asgi.status_app(mesh))
    assert _services(lambda path: Door("asgi").ask(app, path)) == {"orders"}


def test_flask_mounts_it(mesh: Mesh) -> None:
    flask, dispatching = import_module("flask"), import_module("werkzeug.middleware.dispatcher")
    app = flask.Flask(__name__)
    app.wsgi_app = dispatching.DispatcherMiddleware(app.wsgi_app, {"/deep/x": wsgi.status_app(mesh)})
    door = Door("wsgi")
    assert _services(lambda path: door.ask(app, path)) == {"orders"}
    assert door.ask(app, "/deep/x").text.startswith("<!doctype html>")


def _services(ask: Callable[[str], httpx.Response]) -> set[str]:
    assert ask("/deep/x/").text.startswith("<!doctype html>")
    assert ask("/deep/x/nowhere").text == "there is / and /snapshot.json\n"
    return set(json.loads(ask("/deep/x/snapshot.json").content)["services"])
