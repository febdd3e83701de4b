"""The FastAPI extension in one process: what starts and ends when, who gets which client, and what a route sees."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from meshes import mesh_of
from meshlib import Mesh, Service, UnknownService, report
from meshlib.ext.fastapi import MeshMiddleware, client, lifespan, status_router, sync_client
from meshlib.scope import current_scope
from meshlib.testing import Upstream

Orders = Annotated[httpx.AsyncClient, client("orders")]
SyncOrders = Annotated[httpx.Client, sync_client("orders")]


@asynccontextmanager
async def running(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An app between its start and its end, as a server would have it, and a client of it."""
    async with (
        app.router.lifespan_context(app) as state,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as asking,
    ):
        asking.state = state  # type: ignore[attr-defined]
        yield asking


def run(app: Any, script: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with running(app) as asking:
            return await script(asking)

    return asyncio.run(main())


def seconds_left() -> float:
    return current_scope().deadline - time.monotonic()


class Registered:
    """What `mesh.register` gives, as far as a lifespan knows."""

    def __init__(self, said: list[str]) -> None:
        self._said = said

    async def __aenter__(self) -> None:
        self._said.append("registered")

    async def __aexit__(self, *_: object) -> None:
        self._said.append("deregistered")


# The lifespan


def test_the_lifespan_is_around_the_app_s_own_and_the_registration_within(no_leaks: None, upstream: Upstream) -> None:
    mesh, said = mesh_of(upstream), []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        async with app.state.meshlib.async_client("orders") as warming:
            said.append(f"up {(await warming.get('/')).status_code}")
        yield {"colour": "blue"}
        said.append("down")

    app = FastAPI(lifespan=lifespan(mesh, then=own, register=Registered(said)))

    async def script(asking: Any) -> Any:
        said.append("serving")
        return asking.state

    for _ in range(2):  # as tests do
        assert run(app, script) == {"colour": "blue"}
        assert said == ["up 200", "registered", "serving", "deregistered", "down"]
        said.clear()


def test_of_two_meshes_the_outer_one_is_the_application_s(no_leaks: None, upstream: Upstream) -> None:
    second = Mesh(Service("users", [upstream.address]))
    app = FastAPI(lifespan=lifespan(mesh_of(upstream), lifespan(second)))

    @app.get("/")
    def root(orders: SyncOrders, users: httpx.Client = sync_client("users", mesh=second)) -> list[int]:
        return [each.get("/").status_code for each in (orders, users)]

    for _ in range(2):
        assert run(app, lambda asking: asking.get("/")).json() == [200, 200]
    assert app.state.meshlib is None


def test_an_app_that_fails_to_start_is_not_registered_and_leaves_nothing(no_leaks: None) -> None:
    said: list[str] = []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        raise OSError("no disk")
        yield

    app = FastAPI(lifespan=lifespan(mesh_of("10.0.0.1:80"), own, Registered(said)))
    with pytest.raises(OSError, match="no disk"):
        asyncio.run(running(app).__aenter__())
    assert said == []


def test_a_status_page_where_nobody_could_ask_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match="must start with a slash, got 'mesh'"):
        status_router(mesh_of("10.0.0.1:80"), "mesh")


def test_a_lifespan_without_its_mesh_says_how_it_is_given() -> None:
    with pytest.raises(TypeError, match=r"FastAPI\(lifespan=lifespan\(mesh\)\), got FastAPI$"):
        FastAPI(lifespan=lifespan).router.lifespan_context(FastAPI())


def test_what_is_given_as_a_mesh_has_to_be_one() -> None:
    mesh: Any = "mesh"
    for made, usage in [
        (lambda: MeshMiddleware(Starlette(), mesh=mesh), "add_middleware(MeshMiddleware, mesh=mesh)"),
        (lambda: lifespan(mesh), "FastAPI(lifespan=lifespan(mesh))"),
        (lambda: client("orders", mesh=mesh), "client('orders', mesh=mesh)"),
        (lambda: sync_client("orders", mesh=mesh), "sync_client('orders', mesh=mesh)"),
        (lambda: status_router(mesh), "status_app(mesh, auth=...)"),
    ]:
        with pytest.raises(TypeError) as told:
            made()
        assert str(told.value) == f"mesh must be a Mesh, {usage}, got str"


def test_a_lifespan_that_is_a_bare_generator_is_refused() -> None:
    async def own(app: FastAPI) -> AsyncIterator[None]:
        yield

    with pytest.raises(TypeError, match=r"decorate the lifespan own with contextlib\.asynccontextmanager"):
        lifespan(mesh_of("10.0.0.1:80"), own)  # type: ignore[arg-type]


# Clients


def test_all_requests_share_one_client_until_the_end(no_leaks: None, upstream: Upstream) -> None:
    app = FastAPI(lifespan=lifespan(mesh_of(upstream)))
    seen: list[Any] = []

    @app.get("/a")
    async def a(orders: Orders) -> str:
        seen.append(orders)
        return str((await orders.get("/a")).status_code)

    @app.get("/b")
    def b(orders: SyncOrders, others: Orders) -> str:
        seen.extend((orders, others))
        return str(orders.get("/b").status_code)

    async def script(asking: Any) -> Any:
        answers = await asyncio.gather(*(asking.get(path) for path in ("/a", "/b") * 5))
        assert {answer.json() for answer in answers} == {"200"}
        assert not any(each.is_closed for each in seen[-10:])

    run(app, script)
    kinds = {type(each): id(each) for each in seen}
    assert {id(each) for each in seen} == set(kinds.values())
    assert kinds.keys() == {httpx.Client, httpx.AsyncClient}
    assert all(each.is_closed for each in seen)
    before = set(map(id, seen))
    run(app, script)
    assert len({id(each) for each in seen} - before) == 2, "the app starts again with new ones"


def test_a_client_that_a_route_has_closed_is_made_anew(no_leaks: None, upstream: Upstream) -> None:
    app = FastAPI(lifespan=lifespan(mesh_of(upstream)))

    @app.get("/")
    async def root(orders: Orders) -> int:
        async with orders:
            return (await orders.get("/")).status_code

    async def script(asking: Any) -> list[int]:
        return [(await asking.get("/")).json() for _ in range(2)]

    assert run(app, script) == [200, 200]


def test_cookies_do_not_go_from_one_request_to_the_next(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"headers": {"set-cookie": "session=mallory; Path=/"}})
    app = FastAPI(lifespan=lifespan(mesh_of(upstream)))

    @app.get("/")
    async def root(orders: Orders, sync_orders: SyncOrders) -> None:
        sync_orders.get("/")
        assert (await orders.get("/")).cookies["session"] == "mallory"

    async def script(asking: Any) -> None:
        for _ in range(2):
            await asking.get("/")

    run(app, script)
    assert [each.values("cookie") for each in upstream.log()] == [[]] * 4


def test_a_test_puts_another_client_in_its_place() -> None:
    app = FastAPI(lifespan=lifespan(mesh_of("10.0.0.1:80")))

    @app.get("/")
    async def root(orders: Orders) -> str:
        return (await orders.get("/")).text

    async def fake() -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, text="a fake"))
        async with httpx.AsyncClient(transport=transport, base_url="http://orders") as double:
            yield double

    app.dependency_overrides[client("orders").dependency] = fake
    assert run(app, lambda asking: asking.get("/")).json() == "a fake"


def test_without_a_mesh_the_error_says_what_to_do() -> None:
    app = FastAPI()

    @app.get("/")
    def root(orders: SyncOrders) -> None:
        """Never called."""

    with pytest.raises(RuntimeError, match=r"sync_client\('orders'\) finds no mesh: .*lifespan=lifespan\(mesh\)"):
        run(app, lambda asking: asking.get("/"))


def test_a_service_that_is_not_declared_is_named() -> None:
    app = FastAPI(lifespan=lifespan(mesh_of("10.0.0.1:80")))

    @app.get("/")
    def root(orders: Annotated[httpx.AsyncClient, client("order")]) -> None:
        """Never called."""

    with pytest.raises(UnknownService, match="did you mean 'orders'"):
        run(app, lambda asking: asking.get("/"))


def test_mounted_applications_find_the_mesh_of_the_middleware(no_leaks: None, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)
    outer, inner = FastAPI(lifespan=lifespan(mesh)), FastAPI()
    outer.add_middleware(MeshMiddleware, mesh=mesh)
    outer.mount("/v1", inner)

    @inner.get("/orders")
    async def orders(orders: Orders) -> int:
        return (await orders.get("/")).status_code

    assert run(outer, lambda asking: asking.get("/v1/orders")).json() == 200


def test_a_dependency_may_bring_its_mesh(no_leaks: None, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)
    app = FastAPI(lifespan=lifespan(mesh_of("10.0.0.1:80", name="users"), then=lifespan(mesh)))

    @app.get("/")
    async def root(orders: httpx.AsyncClient = client("orders", mesh=mesh)) -> int:
        return (await orders.get("/")).status_code

    assert run(app, lambda asking: asking.get("/")).json() == 200


# The middleware


@pytest.fixture
def app(no_leaks: None, upstream: Upstream) -> FastAPI:
    mesh = mesh_of(upstream)
    app = FastAPI(lifespan=lifespan(mesh))
    app.add_middleware(MeshMiddleware, mesh=mesh)
    return app


def test_calls_of_a_route_keep_its_deadline_in_both_colours(app: FastAPI, upstream: Upstream) -> None:
    threads: list[bool] = []

    @app.get("/def")
    def plain(orders: SyncOrders) -> float:
        threads.append(threading.current_thread() is threading.main_thread())
        orders.get("/def")
        return seconds_left()

    @app.get("/async")
    async def coroutine(orders: Orders) -> float:
        await orders.get("/async")
        return seconds_left()

    async def script(asking: Any) -> Any:
        headers = {"x-meshlib-deadline-ms": "20000"}
        return [(await asking.get(path, headers=headers)).json() for path in ("/def", "/async")]

    assert all(10 < left < 20 for left in run(app, script))
    assert threads == [False]
    told = {each.target: [int(value) for value in each.values("x-meshlib-deadline-ms")] for each in upstream.log()}
    assert all(10_000 < left < 20_000 for [left] in told.values()), told


@pytest.mark.parametrize("path", ["/def", "/async"])
def test_a_stream_keeps_the_deadline_to_its_end(app: FastAPI, upstream: Upstream, path: str) -> None:
    def pieces(orders: httpx.Client) -> Any:
        yield f"{seconds_left()};"
        yield str(orders.get("/").request and seconds_left())

    async def async_pieces() -> Any:
        for _ in range(2):
            yield f"{seconds_left()};"
            await asyncio.sleep(0)

    @app.get("/def")
    def plain(orders: SyncOrders) -> StreamingResponse:
        return StreamingResponse(pieces(orders))

    @app.get("/async")
    async def coroutine() -> StreamingResponse:
        return StreamingResponse(async_pieces())

    answer = run(app, lambda asking: asking.get(path, headers={"x-meshlib-deadline-ms": "20000"}))
    left = [float(part) for part in answer.text.split(";") if part]
    assert len(left) == 2
    assert all(10 < each < 20 for each in left)


def test_a_background_task_has_no_deadline(app: FastAPI, upstream: Upstream) -> None:
    done: list[int] = []

    async def later(orders: httpx.AsyncClient) -> None:
        await asyncio.sleep(0.3)
        done.append((await orders.get("/later")).status_code)

    @app.get("/")
    async def root(tasks: BackgroundTasks, orders: Orders) -> None:
        tasks.add_task(later, orders)

    run(app, lambda asking: asking.get("/", headers={"x-meshlib-deadline-ms": "200"}))
    assert done == [200]


def test_C10_calls_for_a_retry_are_not_retried_and_say_so(app: FastAPI, upstream: Upstream) -> None:
    upstream.script(then={"status": 503})

    @app.get("/")
    async def root(orders: Orders) -> int:
        return len(report(await orders.get("/")).attempts)

    async def script(asking: Any) -> Any:
        return [(await asking.get("/", headers=each)).json() for each in ({}, {"x-meshlib-attempt": "2"})]

    first, retried = run(app, script)
    assert (first > 1, retried) == (True, 1)
    assert upstream.log()[-1].values("x-meshlib-attempt") == ["2"]


def test_who_comes_too_late_gets_504(app: FastAPI) -> None:
    @app.get("/")
    async def root() -> None:
        raise AssertionError("nobody waits for this")

    answer = run(app, lambda asking: asking.get("/", headers={"grpc-timeout": "0m"}))
    assert answer.status_code == 504


# The status page


def test_the_status_page_is_where_it_was_put_and_asks_who_it_is() -> None:
    mesh: Mesh = mesh_of("10.0.0.1:80")
    app = FastAPI()
    app.include_router(status_router(mesh, auth=lambda request: request.path == "/"), prefix="/deep")

    def refuse(request: Request) -> None:
        raise PermissionError(request.url.path)

    app.include_router(status_router(mesh, "/"), prefix="/own")
    app.include_router(status_router(mesh, "/closed"), dependencies=[Depends(refuse)])

    async def script(asking: Any) -> list[httpx.Response]:
        paths = ("/deep/mesh", "/deep/mesh/", "/deep/mesh/snapshot.json", "/own/", "/own/snapshot.json")
        return [await asking.get(path) for path in paths]

    page, slashed, closed, root, told = run(app, script)
    assert page.text.startswith("<!doctype html>")
    assert page.text == slashed.text == root.text
    assert closed.status_code == 403
    assert set(json.loads(told.content)["services"]) == {"orders"}
    with pytest.raises(PermissionError, match="/closed/"):
        run(app, lambda asking: asking.get("/closed/"))
    assert "/deep/mesh" not in app.openapi()["paths"]


# Starlette alone


def test_starlette_has_the_lifespan_and_the_middleware(no_leaks: None, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)

    async def root(request: Request) -> PlainTextResponse:
        async with request.app.state.meshlib.async_client("orders") as orders:
            await orders.get("/")
        return PlainTextResponse(str(seconds_left()))

    app = Starlette(routes=[Route("/", root)], lifespan=lifespan(mesh))
    app.add_middleware(MeshMiddleware, mesh=mesh)
    answer = run(app, lambda asking: asking.get("/", headers={"x-envoy-expected-rq-timeout-ms": "20000"}))
    assert 10 < float(answer.text) < 20


def test_starlette_alone_is_enough() -> None:
    program = "import sys; sys.modules['fastapi'] = None; from meshlib.ext.fastapi import MeshMiddleware, lifespan"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
