"""What users write in FastAPI, Starlette and Flask, and what checkers must refuse of it. This file is never run."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, assert_type

import flask
import httpx
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware

from meshlib import Mesh
from meshlib.ext import asgi, wsgi
from meshlib.ext.fastapi import MeshMiddleware, StatusRequest, client, lifespan, status_router, sync_client
from meshlib.ext.flask import FlaskMesh

mesh = Mesh()


@asynccontextmanager
async def own(app: FastAPI) -> AsyncIterator[Mapping[str, int]]:
    yield {"answer": 42}


@asynccontextmanager
async def stateless(app: Starlette) -> AsyncIterator[None]:
    yield


@contextmanager
def registered() -> Iterator[None]:
    yield


async def may(request: StatusRequest) -> bool:
    return request.path == "/"


fast = FastAPI(lifespan=lifespan(mesh, then=own, register=stateless(Starlette())))
fast.add_middleware(MeshMiddleware, mesh=mesh, max_deadline=5.0)
fast.include_router(status_router(mesh, "/status", auth=may), dependencies=[Depends(may)])
star = Starlette(lifespan=lifespan(mesh, stateless), middleware=[Middleware(MeshMiddleware, mesh=mesh)])

Orders = Annotated[httpx.AsyncClient, client("orders")]


@fast.get("/")
async def root(orders: Orders) -> Any:
    assert_type(orders, httpx.AsyncClient)
    return (await orders.get("/")).json()


@fast.get("/sync")
def plain(orders: Annotated[httpx.Client, sync_client("orders", mesh=mesh)]) -> Any:
    assert_type(orders, httpx.Client)
    return orders.get("/").json()


fast.dependency_overrides[client("orders").dependency] = lambda: httpx.AsyncClient()

shop = flask.Flask("shop")
extension = FlaskMesh(mesh, shop, register=registered(), status_auth=lambda request: request.method == "GET")
extension.init_app(shop)
assert_type(extension.client("orders"), httpx.Client)
assert_type(extension.mesh, Mesh)
extension.start()

around_asgi = asgi.MeshMiddleware(asgi.status_app(mesh), mesh, max_deadline=1)
around_wsgi = wsgi.MeshMiddleware(wsgi.status_app(mesh), max_deadline=1)

lifespan()  # type: ignore[call-arg]
lifespan(mesh, register=registered())  # type: ignore[arg-type]
client(mesh)  # type: ignore[arg-type]
FlaskMesh(shop)  # type: ignore[arg-type]
FlaskMesh(mesh, register=stateless(star))  # type: ignore[arg-type]
fast.add_middleware(MeshMiddleware, mesh, 5.0)  # type: ignore[call-arg]
wsgi.MeshMiddleware(asgi.status_app(mesh))  # type: ignore[arg-type]
