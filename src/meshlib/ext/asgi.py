"""The status page as an ASGI app, for FastAPI, Starlette, or a server of its own.

Decides nothing: it translates between ASGI and `meshlib.ext.status`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from meshlib.ext.status import Answer, Auth, Status, StatusRequest

if TYPE_CHECKING:
    from meshlib.mesh import Mesh

__all__ = ["StatusRequest", "status_app"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def status_app(mesh: Mesh, *, auth: Auth | None = None) -> App:
    """An app that shows what a mesh knows: `/` is a page, `/snapshot.json` the same for programs.

    It may be mounted at any path. A snapshot is taken on the event loop.

    Args:
        mesh: which one.
        auth: who may see it: a function, async or not, of a `StatusRequest`. True lets in; False and 403 refuse; 401
            asks for a user and a password. Anything else, and an exception, is a 500. Default None: everybody.

    Raises:
        TypeError: if `auth` cannot be called.
    """
    status = Status(mesh, auth)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _send(await _answer(status, _request(scope)), send)
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    return app


async def _answer(status: Status, request: StatusRequest) -> Answer:
    try:
        permission = status.permission(request)
        if inspect.isawaitable(permission):
            permission = await permission
        return status.answer(request, permission)
    except Exception as error:
        return status.failure(request, error)


def _request(scope: Message) -> StatusRequest:
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    client = scope.get("client")
    return StatusRequest(
        method=scope["method"], path=_path(scope), headers=headers, client=client[0] if client else None
    )


def _path(scope: Message) -> str:
    """The path below where the app is mounted, whether or not who mounted it has taken the rest away."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "").rstrip("/")
    rest = path.removeprefix(root)
    return rest if rest != path and (not rest or rest.startswith("/")) else path


async def _send(answer: Answer, send: Send) -> None:
    headers = [(name.lower().encode(), value.encode()) for name, value in answer.headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _live(receive: Receive, send: Send) -> None:
    """Agree to start and to end."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
