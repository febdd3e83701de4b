"""A mesh in a FastAPI or Starlette application: its lifespan, its clients as dependencies, and what requests bring.

Decides where an application keeps its mesh, and in which order things start and end. `lifespan` and `MeshMiddleware`
need Starlette alone.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

try:
    from starlette.requests import HTTPConnection
    from starlette.responses import Response
except ModuleNotFoundError as error:
    raise ImportError("starlette is not installed: pip install 'meshlib-http[fastapi]'") from error

from meshlib.ext.asgi import MESH, App, MeshMiddleware, Message, Receive, Send, StatusRequest, status_app
from meshlib.ext.given import given

if TYPE_CHECKING:
    import fastapi
    import httpx

    from meshlib.ext.status import Auth
    from meshlib.mesh import Mesh

__all__ = ["MeshMiddleware", "StatusRequest", "client", "lifespan", "status_router", "sync_client"]

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]


def lifespan(
    mesh: Mesh, then: Lifespan | None = None, register: AbstractAsyncContextManager[Any] | None = None
) -> Lifespan:
    """What to give as `lifespan=` to an application that calls services.

    The mesh may be used from the start of `then` to its end. After that the clients made by `client` and `sync_client`
    are closed, and the mesh. The application may start again, as tests do. Of lifespans in each other the outer one's
    mesh is the application's.

    Args:
        mesh: whose services.
        then: the application's own lifespan; what it yields becomes the state of requests, as ever.
        register: what `mesh.register(...)` gives: entered last, once `then` has started, and left first.

    Raises:
        TypeError: if `mesh` is none, or `then` an async generator function without `contextlib.asynccontextmanager`.
    """
    given(mesh, "FastAPI(lifespan=lifespan(mesh))")
    if inspect.isasyncgenfunction(then):
        raise TypeError(f"decorate the lifespan {then.__name__} with contextlib.asynccontextmanager")

    @asynccontextmanager
    async def living(app: Any) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(mesh)
            if getattr(app.state, "meshlib", None) is None:  # else a lifespan around this one has a mesh
                app.state.meshlib = mesh
                stack.callback(setattr, app.state, "meshlib", None)
            state = None if then is None else await stack.enter_async_context(then(app))
            if register is not None:
                await stack.enter_async_context(register)
            yield state

    return living


def client(service: str, *, mesh: Mesh | None = None) -> Any:
    """A FastAPI dependency: the application's one async client of a service.

        Orders = Annotated[httpx.AsyncClient, client("orders")]

    A test puts another one in its place by `app.dependency_overrides[client("orders").dependency]`.

    Args:
        service: its name.
        mesh: whose. Default the one of the application's `lifespan`, or else of its `MeshMiddleware`.

    Raises:
        TypeError: if `mesh` is none.
    """
    return _depends(service, mesh, is_sync=False)


def sync_client(service: str, *, mesh: Mesh | None = None) -> Any:
    """The same for a sync client, `Annotated[httpx.Client, sync_client("orders")]`, for routes that are plain `def`."""
    return _depends(service, mesh, is_sync=True)


def _depends(service: str, mesh: Mesh | None, *, is_sync: bool) -> Any:
    from fastapi import Depends

    if mesh is not None:
        given(mesh, f"{'sync_' * is_sync}client({service!r}, mesh=mesh)")
    return Depends(ClientOf(service, mesh, is_sync))


@dataclass(frozen=True)
class ClientOf:
    """What FastAPI calls to get a client. Those for the same one are equal, so that tests can name what they replace.

    Attributes:
        service: its name.
        mesh: whose; None for the application's.
        is_sync: of which colour.
    """

    service: str
    mesh: Mesh | None
    is_sync: bool

    # FastAPI looks names of types up in a function's globals, which an object does not have.
    __signature__: ClassVar = inspect.Signature(
        [inspect.Parameter("connection", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=HTTPConnection)]
    )

    async def __call__(self, connection: HTTPConnection) -> httpx.Client | httpx.AsyncClient:
        """The client, for one request."""
        mesh = self.mesh or self._mesh_of(connection)
        return cast("httpx.Client | httpx.AsyncClient", mesh._upkeep.shared.take(mesh, self.service, not self.is_sync))

    def _mesh_of(self, connection: HTTPConnection) -> Mesh:
        mesh: Mesh | None = getattr(connection.app.state, "meshlib", None) or connection.scope.get(MESH)
        if mesh is None:
            name = f"{'sync_' * self.is_sync}client({self.service!r}"
            raise RuntimeError(
                f"{name}) finds no mesh: give the application lifespan=lifespan(mesh), or the dependency its mesh, "
                f"{name}, mesh=mesh). A test client runs the lifespan in a block alone, `with TestClient(app) as "
                "client`; an application mounted in another has no lifespan, but add_middleware(MeshMiddleware, "
                "mesh=mesh) of the outer one reaches it."
            )
        return mesh


def status_router(mesh: Mesh, path: str = "/mesh", *, auth: Auth | None = None) -> fastapi.APIRouter:
    """The status page as routes: `app.include_router(status_router(mesh), dependencies=[...])`.

    Args:
        mesh: which one.
        path: where.
        auth: see `meshlib.ext.asgi.status_app`.

    Raises:
        ValueError: if `path` does not start with a slash: no request would ever come there.
    """
    from fastapi import APIRouter

    if path and not path.startswith("/"):
        raise ValueError(f"the path of a status page must start with a slash, got {path!r}")
    app = status_app(mesh, auth=auth)
    router = APIRouter()
    path = path.rstrip("/")
    for below in ("", "/", "/snapshot.json"):
        if path + below:
            told = _told(app, below or "/")
            router.add_api_route(path + below, told, methods=["GET", "HEAD"], include_in_schema=False)
    return router


def _told(app: App, path: str) -> Callable[[], Awaitable[Response]]:
    async def told() -> Response:
        return _Told(app, path)

    return told


class _Told(Response):
    """What an app answers at a path of its own, wherever the request came to."""

    def __init__(self, app: App, path: str) -> None:
        super().__init__()
        self._app = app
        self._path = path

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await self._app({**scope, "path": self._path, "root_path": ""}, receive, send)
