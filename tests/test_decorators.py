"""`mesh.call`: what a decorated function gets, how it looks from outside, and who answers for it when it fails."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import httpx
import pytest

from meshes import mesh_of, outcomes, over, refusing
from meshlib import ConfigError, ConsistentHash, DeadlineExceeded, Mesh, Service, UnknownService, deadline, options
from meshlib.testing import Upstream

if TYPE_CHECKING:
    import decimal

    from httpx import AsyncClient, Client


def answering(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, text=request.url.path)


def played(answer: Callable[[httpx.Request], httpx.Response] = answering, **settings: Any) -> Mesh:
    """A mesh whose endpoint is a function."""
    return over("127.0.0.1:1", inner=lambda endpoint: httpx.MockTransport(answer), **settings)


mesh = played()


@mesh.call("orders")
def order(client: httpx.Client, number: int, *, fresh: bool = False) -> str:
    """One order."""
    return client.get(f"/{number}", params={"fresh": fresh}).text


@mesh.call("orders")
async def order_async(client: httpx.AsyncClient, number: int, *, fresh: bool = False) -> str:
    """One order."""
    return (await client.get(f"/{number}", params={"fresh": fresh})).text


# What it gets, and what it looks like


def test_a_function_is_called_without_its_client() -> None:
    assert order(5) == "/5"
    assert order(number=6, fresh=True) == "/6"
    assert asyncio.run(order_async(7)) == "/7"
    assert functools.partial(order, 8)(fresh=True) == "/8"


def test_what_can_be_called_like_a_function_can_be_decorated_like_one() -> None:
    class Asking:
        async def __call__(self, client: httpx.AsyncClient, number: int) -> str:
            return (await client.get(f"/{number}")).text

    def ask(client: httpx.Client, folder: str, number: int) -> str:
        return client.get(f"/{folder}/{number}").text

    assert asyncio.run(mesh.call("orders")(Asking())(5)) == "/5"
    assert mesh.call("orders")(functools.partial(ask, folder="old"))(number=6) == "/old/6"


def test_the_client_belongs_to_the_service() -> None:
    @mesh.call("orders")
    def client_of(client: httpx.Client) -> httpx.Client:
        return client

    assert type(client_of()) is httpx.Client
    assert client_of().base_url == "http://orders"
    assert client_of().timeout == httpx.Timeout(None)


@pytest.mark.parametrize("function", [order, order_async])
def test_it_keeps_its_name_and_the_rest_of_its_signature(function: Any) -> None:
    assert str(inspect.signature(function)) == "(number: int, *, fresh: bool = False) -> str"
    assert function.__annotations__ == {"number": int, "fresh": bool, "return": str}
    assert function.__doc__ == "One order."
    assert function.__module__ == __name__
    assert pickle.loads(pickle.dumps(function)) is function
    assert inspect.iscoroutinefunction(function) == (function is order_async)


def test_annotations_that_are_not_there_at_run_time_are_left_as_they_are_written() -> None:
    @mesh.call("orders")
    def price(client: Client, number: int) -> decimal.Decimal:
        return client.get(f"/{number}")  # type: ignore[return-value]

    assert str(inspect.signature(price)) == "(number: int) -> 'decimal.Decimal'"


def test_all_functions_of_a_service_share_a_client_in_whatever_thread() -> None:
    seen = []
    here = threading.Barrier(4)

    @mesh.call("orders")
    def first(client: httpx.Client) -> None:
        here.wait(10)
        seen.append(client)

    threads = [threading.Thread(target=first) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, seen))) == 1


def test_a_client_that_somebody_has_closed_is_replaced() -> None:
    @mesh.call("orders")
    def careless(client: httpx.Client) -> str:
        text = client.get("/5").text
        client.close()
        return text

    assert [careless(), careless()] == ["/5", "/5"]


def test_the_shared_client_keeps_no_cookies() -> None:
    sent = []

    def setting(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers.get("cookie"))
        return httpx.Response(200, headers={"set-cookie": "session=of-somebody; Path=/"})

    @played(setting).call("orders")
    def visit(client: httpx.Client, **given: Any) -> Any:
        return client.get("/", **given)

    visit()
    visit()
    visit(headers={"cookie": "session=mine"})
    assert sent == [None, None, "session=mine"]


def test_two_services_are_two_decorators() -> None:
    both = Mesh(
        Service("orders", ["127.0.0.1:1"]),
        Service("users", ["127.0.0.1:2"]),
        inner=lambda endpoint: httpx.MockTransport(lambda request: httpx.Response(200, text=request.headers["host"])),
    )

    @both.call("users")
    @both.call("orders")
    def invoice(orders: httpx.Client, users: httpx.Client, number: int) -> tuple[str, str, int]:
        return orders.get("/").text, users.get("/").text, number

    assert invoice(5) == ("orders", "users", 5)


def test_what_the_page_shows_can_be_decorated() -> None:
    page = (Path(__file__).parents[1] / "docs" / "decorators.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"__name__": "decorators_page"}
    exec(compile(block, "decorators.md", "exec", dont_inherit=True), names)
    assert str(inspect.signature(names["pay"])) == "(number: int, *, amount: float) -> None"


# Options


def test_the_options_hold_for_its_calls() -> None:
    requests = []

    def failing(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(503)

    mesh = played(failing)

    @mesh.call("orders", idempotent=True)
    def pay(client: httpx.Client) -> httpx.Response:
        return client.post("/")

    @mesh.call("orders", retry=False)
    def once(client: httpx.Client) -> httpx.Response:
        return client.get("/")

    assert len(outcomes(pay())) == 3
    assert len(requests) == 3  # and its body ran once
    assert len(outcomes(once())) == 1
    with options(retry=True):
        assert len(outcomes(once())) == 1  # the nearest block is the function's own


def test_the_options_do_not_hold_for_functions_that_it_calls_nor_for_other_services() -> None:
    def failing(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503)

    names = ("orders", "payments")
    mesh = Mesh(
        *(Service(name, ["127.0.0.1:1"]) for name in names), inner=lambda endpoint: httpx.MockTransport(failing)
    )

    @mesh.call("orders")
    def charge(client: httpx.Client) -> int:
        return len(outcomes(client.post("/")))

    @mesh.call("payments")
    def charge_there(client: httpx.Client) -> int:
        return len(outcomes(client.post("/")))

    @mesh.call("orders", idempotent=True)
    def buy(client: httpx.Client) -> tuple[int, ...]:
        with options(timeout=5):
            found = len(outcomes(client.post("/"))), charge(), charge_there(), len(outcomes(client.post("/")))
        with options(idempotent=False):  # nearer than the decorator
            return (*found, len(outcomes(client.post("/"))))

    assert buy() == (3, 1, 1, 3, 1)
    with options(idempotent=True):
        assert (charge(), charge_there()) == (3, 3)


def test_the_timeout_bounds_each_call_and_a_deadline_all(upstream: Upstream) -> None:
    upstream.script(then={"fault": "hang"})
    with mesh_of(upstream) as mesh:

        @mesh.call("orders", timeout=0.1, retry=False)
        def slow(client: httpx.Client) -> None:
            for _ in range(2):
                with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.1 s"):
                    client.get("/")

        slow()
        with deadline(0.05), pytest.raises(BaseException, match=r"no answer within 0\.0"):
            slow()


def test_the_hash_key_comes_from_the_arguments_by_name() -> None:
    addresses = [f"127.0.0.{number}:1" for number in range(1, 6)]
    mesh = Mesh(
        Service("orders", addresses, balancer=ConsistentHash()),
        inner=lambda endpoint: httpx.MockTransport(lambda request: httpx.Response(200, text=str(endpoint))),
    )

    @mesh.call("orders", hash_key=lambda user: user)
    def by_user(client: httpx.Client, number: int = 1, user: str = "u0") -> str:
        return client.get("/").text

    @mesh.call("orders", hash_key=lambda *args, **kwargs: str(kwargs["user"]))
    async def by_all(client: httpx.AsyncClient, number: int, *, user: str) -> str:
        return (await client.get("/")).text

    @mesh.call("orders", hash_key="u0")
    def by_value(client: httpx.Client) -> str:
        return client.get("/").text

    def where(key: str) -> str:
        with mesh.client("orders") as client, options(hash_key=key):
            return client.get("/").text

    assert len({where(f"u{number}") for number in range(9)}) > 2
    for number in range(5):
        user = f"u{number}"
        assert where(user) == by_user(user=user) == by_user(number, user) == asyncio.run(by_all(7, user=user))
    assert where("u0") == by_user() == by_value()


def test_a_hash_key_that_is_no_text_is_a_TypeError() -> None:
    @mesh.call("orders", hash_key=lambda number: number)
    def numbered(client: httpx.Client, number: int) -> None: ...

    with pytest.raises(TypeError, match="must return a str or None, got int"):
        numbered(5)


# Fallbacks


class Outage(Exception):
    """Nobody answers for this."""


def raising(error: Exception) -> Callable[[httpx.Client], Any]:
    def raises(client: httpx.Client) -> Any:
        raise error

    return raises


REQUEST = httpx.Request("GET", "http://orders/")


def status(code: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("", request=REQUEST, response=httpx.Response(code))


@pytest.mark.parametrize(
    ("error", "is_answered"),
    [
        (httpx.ConnectError(""), True),
        (DeadlineExceeded(""), True),
        (status(500), True),
        (status(503), True),
        (status(499), False),
        (status(404), False),
        (UnknownService("ordrs"), False),
        (ConfigError([]), False),
        (httpx.TooManyRedirects("", request=REQUEST), False),
        (Outage(), False),
    ],
    ids=repr,
)
def test_a_fallback_answers_for_a_service_that_is_not_well(error: Exception, is_answered: bool) -> None:
    guarded = mesh.call("orders", fallback=None)(raising(error))
    if is_answered:
        assert guarded() is None
    else:
        with pytest.raises(type(error)):
            guarded()
    with pytest.raises(type(error)):
        mesh.call("orders")(raising(error))()


def test_a_fallback_is_a_value_or_a_function_of_the_arguments_it_names() -> None:
    def failed(client: httpx.Client, number: int, *, fresh: bool = True) -> Any:
        raise httpx.ReadError("lost")

    def answer(**settings: Any) -> Any:
        return mesh.call("orders", **settings)(failed)(5)

    assert answer(fallback="value") == "value"
    assert answer(fallback=lambda: "nothing") == "nothing"
    assert answer(fallback=lambda number: number) == 5
    assert answer(fallback=lambda fresh, error, other="o": (fresh, str(error), other)) == (True, "lost", "o")
    assert answer(fallback=lambda *args, **kwargs: (args, kwargs)) == ((5,), {})
    assert answer(fallback=lambda *args, error, **kwargs: (args, str(error), kwargs)) == ((5,), "lost", {})
    assert [answer(fallback=list), answer(fallback=dict)] == [[], {}]


def test_a_fallback_of_an_async_function_may_be_async() -> None:
    async def failed(client: httpx.AsyncClient, number: int) -> Any:
        raise httpx.ReadError("lost")

    async def later(number: int, error: Exception) -> tuple[int, str]:
        await asyncio.sleep(0)
        return number, str(error)

    async def answers() -> list[Any]:
        fallbacks: list[Any] = [later, lambda number: number, "value"]
        return [await mesh.call("orders", fallback=each)(failed)(5) for each in fallbacks]

    assert asyncio.run(answers()) == [(5, "lost"), 5, "value"]


def test_a_fallback_answers_for_a_real_outage() -> None:
    with refusing() as address, mesh_of(address) as mesh:

        @mesh.call("orders", fallback="closed")
        def state(client: httpx.Client) -> str:
            return client.get("/").text

        @mesh.call("orders", fallback="closed")
        async def state_async(client: httpx.AsyncClient) -> str:
            return (await client.get("/")).text

        assert state() == asyncio.run(state_async()) == "closed"


# What cannot be decorated


class Shop:
    """Functions that are none."""

    def method(self, client: httpx.Client) -> None: ...

    def nameless(this, client: httpx.Client) -> None: ...

    @staticmethod
    def static(client: httpx.Client) -> None: ...


def generator(client: httpx.Client) -> Iterator[int]:
    yield 1


async def async_generator(client: httpx.AsyncClient) -> Any:
    yield 1


def without() -> None: ...


def keyword_only(*, client: httpx.Client) -> None: ...


def forgotten(number: int) -> None: ...


async def wrong_async(client: httpx.Client) -> None: ...


def wrong_sync(client: Annotated[httpx.AsyncClient, "meshed"]) -> None: ...


async def wrong_async_unresolved(client: Client, number: int) -> None: ...


def wrong_sync_unresolved(client: AsyncClient) -> None: ...


def wrong_sync_optional(client: httpx.AsyncClient | None = None) -> None: ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (Shop.method, r"cannot decorate the method Shop\.method, .* give the object a client"),
        (Shop().method, r"cannot decorate the method Shop\.method"),
        (Shop.nameless, r"cannot decorate the method Shop\.nameless"),
        (lambda self: None, "cannot decorate the method"),
        (vars(Shop)["static"], r"got the staticmethod Shop\.static"),
        (Shop, "decorates functions, got the class Shop"),
        (5, "decorates functions, got an object of type int"),
        (generator, "cannot decorate the generator generator: take a client inside"),
        (async_generator, "cannot decorate the generator"),
        (without, r"has no parameter for the client: def without\(client: httpx\.Client, \.\.\.\)"),
        (keyword_only, "has no parameter for the client"),
        (forgotten, r"gets an httpx\.Client, since it is no 'async def'; its first parameter is number: int"),
        (wrong_async, r"gets an httpx\.AsyncClient, since it is an 'async def'; .* is client: httpx\.Client"),
        (wrong_sync, r"gets an httpx\.Client, since it is no 'async def'"),
        (wrong_async_unresolved, r"gets an httpx\.AsyncClient, since it is an 'async def'"),
        (wrong_sync_unresolved, r"gets an httpx\.Client, since it is no 'async def'"),
        (wrong_sync_optional, r"gets an httpx\.Client, since it is no 'async def'"),
    ],
)
def test_what_cannot_be_decorated_says_why(function: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        mesh.call("orders")(function)


class Getting(Protocol):
    def get(self, url: str) -> httpx.Response: ...


@pytest.mark.parametrize(
    "annotation", [Any, object, httpx.Client | None, httpx.Client | httpx.AsyncClient, Getting, "Later | None"], ids=str
)
def test_a_parameter_may_take_more_than_the_client(annotation: Any) -> None:
    def kind(client: Any) -> str:
        return type(client).__name__

    kind.__annotations__["client"] = annotation
    assert mesh.call("orders")(kind)() == "Client"


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"timeot": 1}, TypeError, r"mesh\.call\(\) has no option 'timeot'; known: timeout, idempotent, hash_key"),
        ({"timeout": 0}, ConfigError, "timeout: must be > 0 .*, got 0"),
        ({"hash_key": 5}, ConfigError, "hash_key: must be a string, got int"),
        ({"hash_key": str}, TypeError, "must be a string, or a function of the arguments, got the class str"),
        (
            {"hash_key": lambda user: user},
            TypeError,
            "takes 'user', which is none of its arguments: number, fresh$",
        ),
        ({"hash_key": lambda client: "k"}, TypeError, "hash_key of order takes 'client'"),
        ({"fallback": lambda user: user}, TypeError, "fallback of order takes 'user', .*: number, fresh, error$"),
        (
            {"fallback": lambda error, **others: error},
            TypeError,
            r"'error' has to stand behind a star: def fallback\(\*ar",
        ),
        ({"hash_key": order_async.__wrapped__}, TypeError, r"hash_key=\.\.\.\) must not be async"),  # type: ignore[attr-defined]
        ({"fallback": order_async.__wrapped__}, TypeError, "fallback of order must not be async"),  # type: ignore[attr-defined]
        ({"url_template": "/orders?id={id}"}, ConfigError, "url_template: must be a path with names in it"),
    ],
)
def test_an_option_that_cannot_be_is_told_when_the_function_is_decorated(
    given: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        mesh.call("orders", **given)(order.__wrapped__)  # type: ignore[attr-defined]


def test_an_unknown_service_is_told_when_the_function_is_decorated() -> None:
    with pytest.raises(UnknownService, match="did you mean 'orders'"):
        mesh.call("ordrs")
    with pytest.raises(TypeError, match=r'a service is missing: @mesh\.call\("orders"\)'):
        mesh.call(order)  # type: ignore[call-overload]


# Lives


def idle(mesh: Mesh) -> int:
    """Idle connections of all clients of the mesh."""
    return sum(idle for idle, _ in mesh._clients.counts().values())


def test_its_clients_are_closed_with_the_mesh_and_made_anew(upstream: Upstream, no_leaks: None) -> None:
    mesh = mesh_of(upstream)

    @mesh.call("orders")
    def ask(client: httpx.Client) -> int:
        return client.get("/").status_code

    for _ in range(2):
        with mesh:
            assert (ask(), ask()) == (200, 200)
            assert idle(mesh) == 1
        gc.collect()
        assert idle(mesh) == 0
    assert ask() == 200  # as any client's, its calls make do with what is known
    mesh.close()


@pytest.mark.parametrize("way", ["aclose", "close in the loop", "close in a thread", "close after the loop"])
def test_its_async_clients_are_closed_from_anywhere(way: str, upstream: Upstream, no_leaks: None) -> None:
    mesh = mesh_of(upstream)
    held = []

    @mesh.call("orders")
    async def ask(client: httpx.AsyncClient) -> int:
        held.append(client)  # or its connections would go with it
        return (await client.get("/")).status_code

    async def main() -> None:
        assert [await ask(), await ask()] == [200, 200]
        assert idle(mesh) == 1
        if way == "aclose":
            await mesh.aclose()
        elif way == "close in the loop":
            mesh.close()
        elif way == "close in a thread":
            await asyncio.to_thread(mesh.close)
        await asyncio.sleep(0.01)
        if way != "close after the loop":
            assert idle(mesh) == 0

    for _ in range(2):
        asyncio.run(main())
        mesh.close()
        assert idle(mesh) == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_inner_transports_are_closed_as_well(is_async: bool) -> None:
    closed = []

    class Inner(httpx.MockTransport):
        def close(self) -> None:
            closed.append("close")

        async def aclose(self) -> None:
            closed.append("aclose")

    mesh = over("127.0.0.1:1", inner=lambda endpoint: Inner(answering))

    async def main() -> None:
        if is_async:
            await mesh.call("orders")(order_async.__wrapped__)(1)  # type: ignore[attr-defined]
        else:
            mesh.call("orders")(order.__wrapped__)(1)  # type: ignore[attr-defined]
        mesh.close()
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert closed == ["aclose" if is_async else "close"]


AT_MODULE_LEVEL = """
import asyncio, sys
import httpx
from meshlib import Mesh, Service

mesh = Mesh(Service("orders", [sys.argv[1]]))

@mesh.call("orders")
def ask(client: httpx.Client) -> int:
    return client.get("/").status_code

@mesh.call("orders")
async def ask_async(client: httpx.AsyncClient) -> int:
    return (await client.get("/")).status_code

assert [ask(), asyncio.run(ask_async())] == [200, 200]
"""


@pytest.mark.once
def test_its_clients_are_closed_at_the_end_of_the_process(upstream: Upstream) -> None:
    command = [sys.executable, "-W", "always", "-c", AT_MODULE_LEVEL, upstream.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_function_serves_several_loops_and_colours(colour: Any, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)

    @mesh.call("orders")
    async def ask(client: httpx.AsyncClient) -> int:
        return (await client.get("/")).status_code

    async def script(client: Any) -> list[int]:
        return [await ask() for _ in range(2)]

    assert colour.run(mesh, script) == [200, 200]
    assert colour.run(mesh, script) == [200, 200]
    mesh.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_S3_a_forked_child_has_connections_of_its_own(upstream: Upstream) -> None:
    with mesh_of(upstream) as mesh:

        @mesh.call("orders")
        def ask(client: httpx.Client) -> int:
            return client.get("/").status_code

        ask()
        with mesh._upkeep.shared._lock:  # as a thread that does not live on may
            child = os.fork()
            if not child:
                signal.alarm(20)
                status = ask()
                mesh.close()
                os._exit(status != 200)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ask()
    assert [each.connection for each in upstream.log()] == [1, 2, 1]


# With others


def test_it_serves_as_a_route_and_as_a_dependency_of_FastAPI() -> None:
    import fastapi

    app = fastapi.FastAPI()
    app.get("/orders/{number}")(order)
    app.get("/async/{number}")(order_async)
    app.get("/depends/{number}")(_depending(fastapi.Depends(order_async)))

    async def main() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            paths = ["/orders/5?fresh=1", "/async/6", "/depends/7", "/orders/five"]
            return [(await client.get(path)).json() for path in paths]

    *answers, wrong = asyncio.run(main())
    assert answers == ["/5", "/6", "/7"]
    assert [each["loc"] for each in wrong["detail"]] == [["path", "number"]]


def _depending(dependency: Any) -> Any:
    async def route(found=dependency):  # type: ignore[no-untyped-def]
        return found

    return route


def test_options_decorate_methods_of_every_kind() -> None:
    with mesh.client("orders") as client:

        class Orders:
            @options(timeout=1.5)
            def method(self) -> Any:
                return told()

            @classmethod
            @options(timeout=1.5)
            def of_the_class(cls) -> Any:
                return told()

            @staticmethod
            @options(timeout=1.5)
            def static() -> Any:
                return told()

            @property
            @options(timeout=1.5)
            def read(self) -> Any:
                return told()

        def told() -> Any:
            return client.get("/").request.headers.get("x-meshlib-deadline-ms"), current()

        from meshlib.scope import current_scope

        def current() -> Any:
            return dict(current_scope().options)

        orders = Orders()
        assert [orders.method()[1], orders.of_the_class()[1], orders.static()[1], orders.read[1]] == [
            {"timeout": 1.5}
        ] * 4


@pytest.mark.parametrize("kind", [classmethod, staticmethod, property])
def test_options_below_a_descriptor_say_which_way_round(kind: Any) -> None:
    def found(first: object) -> None: ...

    with pytest.raises(TypeError, match=f"options cannot decorate a {kind.__name__}: put it below @{kind.__name__}"):
        options(timeout=1.0)(kind(found))
