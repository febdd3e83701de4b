"""What a request says of its caller: how it is read, and how long it holds, in ASGI and in WSGI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from meshlib import ConfigError, deadline
from meshlib.ext import asgi, wsgi
from meshlib.ext.inbound import LONGEST, Inbound
from meshlib.scope import NOTHING, current_scope


@pytest.mark.parametrize(
    ("headers", "left"),
    [
        ({}, None),
        ({"x-meshlib-deadline-ms": "1500"}, 1.5),
        ({"x-meshlib-deadline-ms": "0"}, 0.0),
        ({"x-meshlib-deadline-ms": "-7"}, -0.007),
        ({"x-envoy-expected-rq-timeout-ms": "250"}, 0.25),
        ({"grpc-timeout": "2H"}, 7200.0),
        ({"grpc-timeout": "3M"}, 180.0),
        ({"grpc-timeout": "4S"}, 4.0),
        ({"grpc-timeout": "500m"}, 0.5),
        ({"grpc-timeout": "500000u"}, 0.5),
        ({"grpc-timeout": "99999999n"}, 0.099999999),
        # Whoever gives up first decides.
        ({"x-meshlib-deadline-ms": "3000", "grpc-timeout": "1S", "x-envoy-expected-rq-timeout-ms": "2000"}, 1.0),
        ({"x-meshlib-deadline-ms": "3000,1000"}, 1.0),
        # What cannot be read is not there.
        ({"x-meshlib-deadline-ms": "soon", "grpc-timeout": "1S"}, 1.0),
        *(
            ({"x-meshlib-deadline-ms": value}, None)
            for value in ("", " ", "1.5", "1e3", "nan", "inf", "1_0", "\u0661", "--1")
        ),
        *(({"grpc-timeout": value}, None) for value in ("", "1", "S", "1s", "-1S", "123456789S", "1.5S", "1 S")),
        # What is absurd is long.
        ({"x-meshlib-deadline-ms": "9" * 30}, LONGEST),
        ({"x-meshlib-deadline-ms": "9" * 399}, LONGEST),
        ({"x-meshlib-deadline-ms": "9" * 5000}, None),
        ({"grpc-timeout": "99999999H"}, LONGEST),
    ],
)
def test_the_deadline_is_the_earliest_that_can_be_read(headers: dict[str, str], left: float | None) -> None:
    assert Inbound.of(headers, None).left == (None if left is None else pytest.approx(left))


def test_a_setting_bounds_every_deadline() -> None:
    assert Inbound.of({}, 2.0).left == 2.0
    assert Inbound.of({"grpc-timeout": "3S"}, 2.0).left == 2.0
    assert Inbound.of({"grpc-timeout": "1S"}, 2.0).left == 1.0
    assert Inbound.of({}, 2 * LONGEST).left == 2 * LONGEST


@pytest.mark.parametrize(
    ("value", "attempt"), [("2", 2), ("17", 17), ("1", 1), ("", 1), ("0", 1), ("-2", 1), ("2,3", 1), ("9" * 5, 1)]
)
def test_C10_the_attempt_is_a_small_number_or_the_first(value: str, attempt: int) -> None:
    assert Inbound.of({"x-meshlib-attempt": value}, None).attempt == attempt


# Both middlewares


@dataclass(frozen=True)
class Way:
    """One of the two middlewares, around an app that answers with what `look` gives at its start and amid its body."""

    name: str

    def ask(self, look: Callable[[], Any], headers: dict[str, str], method: str = "GET", **settings: Any) -> Any:
        if self.name == "wsgi":
            return self._ask_wsgi(look, headers, method, settings)
        return asyncio.run(self._ask_asgi(look, headers, method, settings))

    def _ask_wsgi(self, look: Callable[[], Any], headers: dict[str, str], method: str, settings: Any) -> Any:
        def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
            first = look()
            start_response("200 OK", [("content-type", "text/plain")])
            yield f"{first};".encode()
            yield str(look()).encode()

        with httpx.Client(transport=httpx.WSGITransport(wsgi.MeshMiddleware(app, **settings))) as client:
            return client.request(method, "http://app/", headers=headers)

    async def _ask_asgi(self, look: Callable[[], Any], headers: dict[str, str], method: str, settings: Any) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            first = look()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": f"{first};".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": str(look()).encode()})

        async with httpx.AsyncClient(transport=httpx.ASGITransport(asgi.MeshMiddleware(app, **settings))) as client:
            return await client.request(method, "http://app/", headers=headers)


@pytest.fixture(params=["asgi", "wsgi"])
def way(request: pytest.FixtureRequest) -> Way:
    return Way(request.param)


def seconds_left() -> float:
    return current_scope().deadline - time.monotonic()


def test_the_deadline_holds_from_the_start_to_the_last_byte(way: Way) -> None:
    answer = way.ask(seconds_left, {"x-meshlib-deadline-ms": "40000"})
    first, last = (float(part) for part in answer.text.split(";"))
    assert 0 < last <= first <= 40.0
    assert first > 10
    assert current_scope() is NOTHING


def test_C10_the_attempt_is_handed_on(way: Way) -> None:
    assert way.ask(lambda: current_scope().attempt, {"X-Meshlib-Attempt": "3"}).text == "3;3"


def test_a_deadline_of_the_app_s_own_goes_by_the_earlier(way: Way) -> None:
    def look() -> bool:
        with deadline(5.0):
            return seconds_left() <= 5.0

    assert way.ask(look, {"x-meshlib-deadline-ms": "40000"}).text == "True;True"


def test_a_request_that_says_nothing_costs_calls_nothing(way: Way) -> None:
    assert way.ask(lambda: current_scope() is NOTHING, {"x-meshlib-deadline-ms": "soon"}).text == "True;True"


def test_who_comes_too_late_gets_504_and_nothing_is_done(way: Way) -> None:
    asked: list[int] = []
    answer = way.ask(lambda: asked.append(1), {"x-meshlib-deadline-ms": "0"})
    assert (answer.status_code, answer.headers["content-type"]) == (504, "application/json")
    assert answer.json() == {"detail": "the deadline of this request had passed when it came"}
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert way.ask(lambda: asked.append(1), {"grpc-timeout": "0S"}, "HEAD").content == b""
    assert asked == []


def test_a_limit_that_cannot_be_is_refused(way: Way) -> None:
    for wrong in (0, -1.0, float("nan"), "2"):
        with pytest.raises(ConfigError, match="max_deadline"):
            way.ask(seconds_left, {}, max_deadline=wrong)
    assert float(way.ask(seconds_left, {}, max_deadline=5).text.split(";")[0]) <= 5.0


# ASGI alone


@pytest.mark.parametrize("is_answered", [True, False])
@pytest.mark.parametrize("headers", [{}, {"x-meshlib-deadline-ms": "5000"}], ids=str)
def test_C10_after_the_answer_nothing_of_the_request_holds(headers: dict[str, str], is_answered: bool) -> None:
    """Whom a background task serves has gone, or repeats it no more; so has whom a request served that failed."""
    seen: list[tuple[float, int]] = []
    tasks: list[asyncio.Task[None]] = []

    async def job() -> None:
        await asyncio.sleep(0.01)
        seen.append((current_scope().deadline, current_scope().attempt))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.create_task(job()))
        if not is_answered:
            raise OSError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        await job()

    async def main() -> None:
        transport = httpx.ASGITransport(asgi.MeshMiddleware(app), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as client:
            await client.get("http://app/", headers={"x-meshlib-attempt": "2", **headers})
        await tasks[0]

    asyncio.run(main())
    assert set(seen) == {(float("inf"), 1)}


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_what_is_no_request_passes(kind: str) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], receive, send, current_scope() is NOTHING))

    scope = {"type": kind, "headers": [(b"x-meshlib-deadline-ms", b"0")]}
    asyncio.run(asgi.MeshMiddleware(app)(scope, "receive", "send"))  # type: ignore[arg-type]
    assert seen == [(kind, "receive", "send", True)]


# WSGI alone


def test_a_thread_s_next_request_has_nothing_of_a_body_that_was_not_closed() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        yield str(seconds_left()).encode()

    middleware = wsgi.MeshMiddleware(app)
    left = iter(middleware({"HTTP_X_MESHLIB_DEADLINE_MS": "1000"}, lambda *_: None))  # type: ignore[arg-type]
    assert float(next(left)) <= 1.0
    assert current_scope() is NOTHING


def test_a_body_is_closed_once_and_a_file_stays_a_file() -> None:
    closed: list[float] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"a"])

        def close(self) -> None:
            closed.append(current_scope().deadline)

    class File(Body):
        pass

    environ = {"HTTP_X_MESHLIB_DEADLINE_MS": "1000", "wsgi.file_wrapper": File}
    body: Any = wsgi.MeshMiddleware(lambda *_: Body())(environ, None)  # type: ignore[arg-type]
    assert list(body) == [b"a"]
    body.close()
    assert closed == [float("inf")]
    assert isinstance(wsgi.MeshMiddleware(lambda *_: File())(environ, None), File)  # type: ignore[arg-type]
