"""A mesh in ASGI: the status page as an app, and the middleware that hands on what a request says of its caller.

For FastAPI, Starlette, Litestar, Django, or a server of its own. Decides nothing: it translates between ASGI and
`meshlib.ext.status` and `meshlib.ext.inbound`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

from meshlib.ext.given import given
from meshlib.ext.inbound import NAMES, TOO_LATE, Inbound, Serving, checked_max_deadline
from meshlib.ext.status import Answer, Auth, Status, StatusRequest

if TYPE_CHECKING:
    from meshlib.mesh import Mesh

__all__ = ["MeshMiddleware", "StatusRequest", "status_app"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MESH = "meshlib.mesh"
"""Where a scope has the mesh of its middleware."""

_NAMES = {name.encode(): name for name in NAMES}


class MeshMiddleware:
    """Hands on to the calls that a request makes how long its caller waits, and which attempt of a call it is.

    The deadline is the earliest that `x-meshlib-deadline-ms`, `grpc-timeout` and `x-envoy-expected-rq-timeout-ms` tell;
    a request that comes after it is answered with 504, and the app is not called. A value that cannot be read counts as
    none. The deadline holds until the last byte of the answer is sent. WebSockets pass untouched.

    Args:
        app: what it is put around.
        mesh: where `meshlib.ext.fastapi.client` finds its mesh, in mounted apps too. Default none.
        max_deadline: seconds that a request has at most, whatever its headers say. Default None: they alone decide.

    Raises:
        TypeError: if `mesh` is none.
        ConfigError: if `max_deadline` is not a finite number above 0.
    """

    def __init__(self, app: App, mesh: Mesh | None = None, *, max_deadline: float | None = None) -> None:
        self.app = app
        self._mesh = None if mesh is None else given(mesh, "add_middleware(MeshMiddleware, mesh=mesh)")
        self._max_deadline = checked_max_deadline(max_deadline)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if self._mesh is not None:
            scope[MESH] = self._mesh
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        inbound = Inbound.of(_told(scope["headers"]), self._max_deadline)
        if inbound.is_late:
            return await _refuse(scope, send)
        if inbound.is_plain:
            return await self.app(scope, receive, send)
        with Serving(inbound) as serving:
            await self.app(scope, receive, _until_answered(serving, send))
        return None


def _told(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        if (name := _NAMES.get(raw_name.lower())) is not None:
            value = raw_value.decode("latin-1")
            found[name] = f"{found[name]},{value}" if name in found else value
    return found


def _until_answered(serving: Serving, send: Send) -> Send:
    async def sending(message: Message) -> None:
        await send(message)
        kind = message["type"]
        if kind in ("http.response.body", "http.response.pathsend") and not message.get("more_body"):
            serving.answered()

    return sending


async def _refuse(scope: Message, send: Send) -> None:
    length = str(len(TOO_LATE)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": 504, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else TOO_LATE})


def status_app(mesh: Mesh, *, auth: Auth | None = None) -> App:
    """An app that shows what a mesh knows: `/` is a page, `/snapshot.json` the same for programs.

    It may be mounted at any path. A snapshot is taken on the event loop.

    Args:
        mesh: which one.
        auth: who may see it: a function, async or not, of a `StatusRequest`. True lets in; False and 403 refuse; 401
            asks for a user and a password. Anything else, and an exception, is a 500. Default None: everybody.

    Raises:
        TypeError: if `mesh` is none, or `auth` cannot be called.
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
    except Exception as error:  # of `auth`, which is the application's: a 500, and its log has it
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
