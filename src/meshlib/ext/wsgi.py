"""The status page as a WSGI app, for Flask, Django, or a server of its own.

Decides nothing: it translates between WSGI and `meshlib.ext.status`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from meshlib.ext.status import Answer, Auth, Status, StatusRequest

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

    from meshlib.mesh import Mesh

__all__ = ["StatusRequest", "status_app"]


def status_app(mesh: Mesh, *, auth: Auth | None = None) -> WSGIApplication:
    """An app that shows what a mesh knows: `/` is a page, `/snapshot.json` the same for programs.

    It may be mounted at any path.

    Args:
        mesh: which one.
        auth: who may see it: a function of a `StatusRequest`. True lets in; False and 403 refuse; 401 asks for a user
            and a password. Anything else, and an exception, is a 500. Default None: everybody.

    Raises:
        TypeError: if `auth` cannot be called, or is async, for which there is no event loop here.
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
    except Exception as error:
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
