"""A mesh in WSGI: the status page as an app, and the middleware that hands on what a request says of its caller.

For Flask, Django, or a server of its own. Decides nothing: it translates between WSGI and `meshlib.ext.status` and
`meshlib.ext.inbound`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextvars import Context, copy_context
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from meshlib.ext.inbound import NAMES, TOO_LATE, Inbound, Serving, checked_max_deadline
from meshlib.ext.status import Answer, Auth, Status, StatusRequest

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

    from meshlib.mesh import Mesh

__all__ = ["MeshMiddleware", "StatusRequest", "status_app"]

_KEYS = {f"HTTP_{name.upper().replace('-', '_')}": name for name in NAMES}


class MeshMiddleware:
    """Hands on to the calls that a request makes how long its caller waits, and which attempt of a call it is.

    See `meshlib.ext.asgi.MeshMiddleware`. The app, and the body that it returns, run in a context of their own, so a
    streamed answer has the deadline as well, and the thread's next request does not.

    Args:
        app: what it is put around.
        max_deadline: seconds that a request has at most, whatever its headers say. Default None: they alone decide.

    Raises:
        ConfigError: if `max_deadline` is not a finite number above 0.
    """

    def __init__(self, app: WSGIApplication, *, max_deadline: float | None = None) -> None:
        self.app = app
        self._max_deadline = checked_max_deadline(max_deadline)

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request, as WSGI has it."""
        told = {name: environ[key] for key, name in _KEYS.items() if key in environ}
        inbound = Inbound.of(told, self._max_deadline)
        if inbound.is_late:
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(TOO_LATE)))]
            start_response("504 Gateway Timeout", headers)
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else TOO_LATE]
        if inbound.is_plain:
            return self.app(environ, start_response)
        return self._served(Serving(inbound), environ, start_response)

    def _served(self, serving: Serving, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        context = copy_context()
        context.run(serving.__enter__)  # there is no leaving: the context goes with the answer
        body = context.run(self.app, environ, start_response)
        file = environ.get("wsgi.file_wrapper")
        if isinstance(body, (list, tuple)) or (isinstance(file, type) and isinstance(body, file)):
            return body  # nothing of it is made any more, and a server may know a better way to send it
        return _Body(body, context, serving)


class _Body:
    """A body whose pieces are made in the context of its request."""

    def __init__(self, body: Iterable[bytes], context: Context, serving: Serving) -> None:
        self._body = body
        self._pieces = context.run(iter, body)
        self._context = context
        self._serving = serving

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return self._context.run(next, self._pieces)

    def close(self) -> None:
        self._serving.answered()
        close = getattr(self._body, "close", None)
        if close is not None:
            self._context.run(close)


def status_app(mesh: Mesh, *, auth: Auth | None = None) -> WSGIApplication:
    """An app that shows what a mesh knows: `/` is a page, `/snapshot.json` the same for programs.

    It may be mounted at any path.

    Args:
        mesh: which one.
        auth: who may see it: a function of a `StatusRequest`. True lets in; False and 403 refuse; 401 asks for a user
            and a password. Anything else, and an exception, is a 500. Default None: everybody.

    Raises:
        TypeError: if `mesh` is none, or `auth` cannot be called or is async, for which there is no event loop here.
    """
    if inspect.iscoroutinefunction(auth):
        raise TypeError("auth must not be async in a WSGI app")
    status = Status(mesh, auth)

    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        answer = _answer(status, _request(environ))
        start_response(f"{answer.status} {HTTPStatus(answer.status).phrase}", list(answer.headers))
        return [answer.body]

    return app


def _answer(status: Status, request: StatusRequest) -> Answer:
    try:
        return status.answer(request, status.permission(request))
    except Exception as error:  # see `meshlib.ext.asgi`
        return status.failure(request, error)


def _request(environ: dict[str, Any]) -> StatusRequest:
    headers = {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    return StatusRequest(
        method=environ["REQUEST_METHOD"],
        path=environ.get("PATH_INFO", ""),
        headers=headers,
        client=environ.get("REMOTE_ADDR") or None,
    )
