"""The Flask extension in one process: its configuration, what a view sees, the command, and when it registers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request, stream_with_context

from meshes import mesh_of, refusing
from meshlib import ConfigError, Mesh, Service
from meshlib.ext.flask import FlaskMesh
from meshlib.scope import NOTHING, current_scope
from meshlib.testing import Upstream


def app_of(mesh: Mesh | None, config: dict[str, Any] | None = None, **settings: Any) -> tuple[Flask, FlaskMesh]:
    app = Flask("shop")
    app.config.update(config or {})
    extension = FlaskMesh(mesh, **settings)
    extension.init_app(app)
    return app, extension


def seconds_left() -> float:
    return current_scope().deadline - time.monotonic()


def test_views_share_one_client_and_keep_the_deadline(no_leaks: None, upstream: Upstream) -> None:
    app, mesh = app_of(mesh_of(upstream))
    seen: list[Any] = []

    @app.get("/")
    def root() -> str:
        seen.append(mesh.client("orders"))
        return str(mesh.client("orders").get("/").status_code)

    asking = app.test_client()
    answers = [asking.get("/", headers={"x-meshlib-deadline-ms": "20000"}) for _ in range(3)]
    assert [answer.text for answer in answers] == ["200"] * 3
    assert len(set(map(id, seen))) == 1
    assert all(10_000 < int(each.values("x-meshlib-deadline-ms")[0]) < 20_000 for each in upstream.log())
    assert asking.get("/", headers={"x-meshlib-deadline-ms": "0"}).status_code == 504
    assert len(upstream.log()) == 3
    mesh.mesh.close()
    assert seen[0].is_closed


def test_a_streamed_answer_keeps_the_deadline_and_the_request(no_leaks: None) -> None:
    app, _ = app_of(mesh_of("10.0.0.1:80"), {"MESHLIB_MAX_DEADLINE": 20.0})

    @app.get("/<kind>")
    def root(kind: str) -> Any:
        def pieces() -> Iterator[str]:
            for _ in range(2):
                yield f"{seconds_left()};"
                assert kind == "bare" or request.path == "/within"

        return stream_with_context(pieces()) if kind == "within" else pieces()

    for kind in ("within", "bare"):
        left = [float(part) for part in app.test_client().get(f"/{kind}").text.split(";") if part]
        assert len(left) == 2
        assert all(10 < each < 20 for each in left)
    assert current_scope() is NOTHING


def test_the_extension_is_found_by_its_name_and_is_given_once() -> None:
    mesh = mesh_of("10.0.0.1:80")
    app, extension = app_of(mesh)
    assert app.extensions["meshlib"] is extension
    assert extension.mesh is mesh
    with pytest.raises(RuntimeError, match="has a mesh already"):
        extension.init_app(app)
    assert FlaskMesh(mesh, Flask("other")).mesh is mesh
    with pytest.raises(TypeError, match=r"FlaskMesh\(mesh, app\), got Flask"):
        FlaskMesh(Flask("other"))  # type: ignore[arg-type]


def test_a_mesh_that_is_nowhere_is_missed_at_once() -> None:
    with pytest.raises(RuntimeError, match="say FlaskMesh\\(mesh\\), or set MESHLIB_CONFIG"):
        app_of(None)
    with pytest.raises(ConfigError, match="max_deadline"):
        app_of(mesh_of("10.0.0.1:80"), {"MESHLIB_MAX_DEADLINE": -1})


def test_each_application_has_the_mesh_of_its_own_file(tmp_path: Path) -> None:
    extension, apps = FlaskMesh(), []
    for name in ("orders", "users"):
        (tmp_path / f"{name}.toml").write_text(f'[services.{name}]\nresolver = ["10.0.0.1:80"]\n')
        app = Flask("shop", root_path=str(tmp_path))
        app.config["MESHLIB_CONFIG"] = f"{name}.toml"
        extension.init_app(app)
        apps.append(app)
    for app, name in zip(apps, ("orders", "users"), strict=True):
        with app.app_context():
            assert set(extension.mesh.snapshot()) == {name}
            assert extension.client(name) is extension.client(name)


def test_the_status_page_is_behind_the_application_s_own_guards() -> None:
    config = {"MESHLIB_STATUS_PATH": "/deep/mesh/"}
    app, _ = app_of(mesh_of("10.0.0.1:80"), config, status_auth=lambda asked: asked.path == "/snapshot.json")
    app.before_request(lambda: ("who are you?", 401) if "stranger" in request.args else None)
    asking = app.test_client()
    assert [asking.get(f"/deep/mesh{path}").status_code for path in ("", "/", "/x")] == [403, 403, 404]
    assert set(asking.get("/deep/mesh/snapshot.json").get_json()["services"]) == {"orders"}
    assert asking.get("/deep/mesh/snapshot.json?stranger").status_code == 401


def test_without_a_path_there_is_no_status_page() -> None:
    app, _ = app_of(mesh_of("10.0.0.1:80"))
    assert [rule.rule for rule in app.url_map.iter_rules() if "static" not in rule.rule] == []


def test_the_command_shows_the_endpoints(no_leaks: None) -> None:
    app, _ = app_of(mesh_of("10.0.0.1:80", "10.0.0.2:80"))
    answer = app.test_cli_runner().invoke(args=["mesh", "status"])
    assert answer.exit_code == 0, answer.output
    heading, *rows = [line.split() for line in answer.output.splitlines()]
    assert heading == ["service", "endpoint", "state", "eligible", "weight", "why"]
    assert [row[:4] for row in rows] == [["orders", f"10.0.0.{last}:80", "closed", "yes"] for last in (1, 2)]


def test_the_command_says_what_it_could_not_find(no_leaks: None) -> None:
    with refusing() as consul:
        app, _ = app_of(Mesh(Service("orders", f"consul://{consul}/orders")))
        answer = app.test_cli_runner().invoke(args=["mesh", "status", "--timeout", "0.2"])
    assert answer.exit_code == 1
    assert answer.output.splitlines()[1].split()[0] == "orders"
    assert answer.output.splitlines()[1].endswith("no endpoints")
    assert "Error: not" in answer.output


# Registration


class Registered:
    """What `mesh.register` gives, as far as the extension knows."""

    def __init__(self, failures: int = 0) -> None:
        self.said: list[str] = []
        self._failures = failures

    def __enter__(self) -> None:
        if self._failures:
            self._failures -= 1
            raise OSError("not yet")
        self.said.append("registered")

    def __exit__(self, *_: object) -> None:
        self.said.append("deregistered")


def test_the_first_request_registers_and_no_other(no_leaks: None) -> None:
    register = Registered()
    app, _ = app_of(mesh_of("10.0.0.1:80"), register=register)
    assert register.said == []
    for _ in range(3):
        app.test_client().get("/")
    assert register.said == ["registered"]


def test_a_registration_that_fails_is_no_secret_and_is_tried_again() -> None:
    register = Registered(failures=1)
    app, extension = app_of(mesh_of("10.0.0.1:80"), register=register)
    assert app.test_client().get("/").status_code == 500
    extension.start()
    assert register.said == ["registered"]


def test_S3_a_child_registers_itself_and_leaves_its_parent_registered(no_leaks: None) -> None:
    register = Registered()
    _, extension = app_of(mesh_of("10.0.0.1:80"), register=register)
    extension.start()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        extension._presence._end()  # type: ignore[union-attr]  # what the end of the process would do
        extension.start()
        os.write(writing, ",".join(register.said).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading) as told:
        assert told.read() == "registered,registered"
