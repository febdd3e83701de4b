"""A mesh in a Flask application: requests' deadlines, shared clients, a status page, and `flask mesh status`.

Decides what is set up when the application is made, which may be in a process that will fork: nothing starts there.
What registers the process is entered in the worker, and left when that ends.
"""

from __future__ import annotations

import atexit
import os
from contextlib import AbstractContextManager
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

try:
    import click
    from flask import Flask, current_app, request
    from flask.cli import AppGroup
    from werkzeug.wrappers import Response
except ModuleNotFoundError as error:
    raise ImportError("flask is not installed: pip install 'meshlib-http[flask]'") from error

from meshlib.errors import ResolveError
from meshlib.ext.given import given
from meshlib.ext.status import StatusRequest
from meshlib.ext.wsgi import MeshMiddleware, status_app
from meshlib.fork import inherited
from meshlib.mesh import Mesh

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    import httpx

    from meshlib.core.snapshot import ServiceSnapshot
    from meshlib.ext.status import Auth

__all__ = ["FlaskMesh", "StatusRequest"]

NAME = "meshlib"
"""The extension's, in `app.extensions`."""

HEADINGS = ("service", "endpoint", "state", "eligible", "weight", "why")


class FlaskMesh:
    """A Flask extension. Every request's deadline holds for the calls it makes; see `meshlib.ext.asgi.MeshMiddleware`.

    Configuration, read by `init_app`:

    - `MESHLIB_CONFIG`: the file that `Mesh.from_toml` makes the mesh from, for an extension without one; relative to
      the application's folder.
    - `MESHLIB_MAX_DEADLINE`: seconds that a request has at most, whatever its headers say.
    - `MESHLIB_STATUS_PATH`: where the status page is, such as `/mesh`. Default none.

    Args:
        mesh: whose services are called. Default the one of `MESHLIB_CONFIG`.
        app: saves a call of `init_app`.
        register: what `mesh.register(...)` gives: entered once in each worker, with its first request or by `start`,
            and left when that process ends.
        status_auth: who may see the status page; see `meshlib.ext.wsgi.status_app`.

    Raises:
        TypeError: if `mesh` is none.
    """

    def __init__(
        self,
        mesh: Mesh | None = None,
        app: Flask | None = None,
        *,
        register: AbstractContextManager[Any] | None = None,
        status_auth: Auth | None = None,
    ) -> None:
        self._mesh = None if mesh is None else given(mesh, "FlaskMesh(mesh, app)")
        self._presence = None if register is None else Presence(register)
        self._status_auth = status_auth
        if app is not None:
            self.init_app(app)

    @property
    def mesh(self) -> Mesh:
        """The mesh it was given, or else that of the current application."""
        return self._mesh or self._mesh_of(current_app)

    def client(self, service: str) -> httpx.Client:
        """The one client of a service that all requests of the process share."""
        mesh = self.mesh
        return cast("httpx.Client", mesh._upkeep.shared.take(mesh, service, False))

    def start(self) -> None:
        """Register this process now, rather than with its first request; where a worker starts, after the fork."""
        if self._presence is not None:
            self._presence.start()

    def init_app(self, app: Flask) -> None:
        """Give an application the mesh.

        Raises:
            RuntimeError: if it has one already, or there is none to give.
            ConfigError: for a value of its configuration that is not usable.
        """
        if NAME in app.extensions:
            raise RuntimeError("this application has a mesh already")
        around = MeshMiddleware(app.wsgi_app, max_deadline=app.config.get("MESHLIB_MAX_DEADLINE"))
        if self._mesh is None:
            app.extensions[f"{NAME}.mesh"] = _configured(app)
        app.extensions[NAME] = self
        app.wsgi_app = around  # type: ignore[method-assign]
        if self._presence is not None:
            app.before_request(self.start)
        if (path := app.config.get("MESHLIB_STATUS_PATH")) is not None:
            _add_status(app, path, status_app(self._mesh_of(app), auth=self._status_auth))
        app.cli.add_command(_commands(self._mesh_of(app)))

    def _mesh_of(self, app: Flask) -> Mesh:
        return self._mesh or cast("Mesh", app.extensions[f"{NAME}.mesh"])


class Presence:
    """That this process is registered; from its start to the process's end.

    Args:
        register: what makes it so.
    """

    def __init__(self, register: AbstractContextManager[Any]) -> None:
        self._register = register
        self._is_there = False
        self._lock = Lock()
        inherited.add(self)

    def start(self) -> None:
        """Register, unless that is done; from any thread."""
        if self._is_there:
            return
        with self._lock:
            if not self._is_there:
                self._register.__enter__()
                self._is_there = True
                atexit.register(self._end)

    def forget(self) -> None:
        """After a fork, in the child: who is registered is the parent."""
        self._is_there = False
        self._lock = Lock()

    def _end(self) -> None:
        if self._is_there:
            self._is_there = False
            self._register.__exit__(None, None, None)


def _configured(app: Flask) -> Mesh:
    path = app.config.get("MESHLIB_CONFIG")
    if path is None:
        raise RuntimeError("there is no mesh: say FlaskMesh(mesh), or set MESHLIB_CONFIG to the path of its file")
    return Mesh.from_toml(os.path.join(app.root_path, path))


def _add_status(app: Flask, path: str, page: WSGIApplication) -> None:
    for below in ("", "/", "/snapshot.json"):
        if rule := path.rstrip("/") + below:
            app.add_url_rule(rule, f"{NAME}{below.replace('.', '_')}", _told, defaults={"page": page, "at": below})


def _told(page: WSGIApplication, at: str) -> Response:
    return Response.from_app(page, {**request.environ, "PATH_INFO": at})


def _commands(mesh: Mesh) -> AppGroup:
    group = AppGroup("mesh", help="The mesh of this application.")

    @group.command("status")
    @click.option("--timeout", default=5.0, show_default=True, help="Seconds to wait for the endpoints.")
    def status(timeout: float) -> None:
        """Show the endpoints that a new process would find. What running ones learned is on their status page."""
        with mesh:
            missing = _missing(mesh, timeout)
            rows = [HEADINGS, *(row for each in mesh.snapshot().values() for row in _rows(each))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            click.echo("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
        if missing:
            raise click.ClickException(missing)

    return group


def _missing(mesh: Mesh, timeout: float) -> str | None:
    """Why a service has no endpoints yet."""
    try:
        mesh.wait_ready(timeout)
    except ResolveError as error:
        return str(error)
    return None


def _rows(service: ServiceSnapshot) -> list[tuple[str, ...]]:
    if not service.nodes:
        return [(service.name, "-", "-", "-", "-", "no endpoints")]
    return [
        (
            service.name,
            str(node.endpoint),
            str(node.state),
            "yes" if node.eligible else "no",
            f"{node.weight:g}",
            node.why,
        )
        for node in service.nodes
    ]
