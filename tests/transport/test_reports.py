"""Whatever leaves a call carries the report of its attempts, and lists them in a note."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import anyio
import httpx
import pytest

from conftest import Colour
from meshes import mesh_of, refusing
from meshlib import (
    ConfigError,
    ConsistentHash,
    Limit,
    Mesh,
    NoEndpoints,
    Overloaded,
    Retry,
    Service,
    Timeout,
    UnknownService,
    report,
)
from meshlib.testing import Upstream

A = "10.0.0.1:80"


class Mine(Exception):
    """The caller's own."""


class Both(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Reads the request and answers 503, in both colours."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return httpx.Response(503)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return httpx.Response(503)


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: Any) -> Any:
        raise error

    return raise_it


def mesh_with(**settings: Any) -> Mesh:
    return Mesh(Service("orders", [A], **settings), inner=lambda endpoint: Both())


def ejected() -> Mesh:
    mesh = mesh_with()
    mesh.eject("orders", A)
    return mesh


def leaving(colour: Colour, mesh: Mesh, url: str = "/", **request: Any) -> BaseException:
    """What leaves a call."""

    async def script(client: Any) -> BaseException:
        with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever it is
            await client.post(url, **request)
        return caught.value

    error: BaseException = colour.run(mesh, script)
    return error


def body_of(error: Exception, colour: Colour) -> Any:
    if colour.is_sync:
        return (raising(error)(each) for each in b"xy")

    async def body() -> Any:
        for _ in range(2):
            yield raising(error)()

    return body()


def options(**given: Any) -> dict[str, Any]:
    return {"extensions": {"meshlib": given}}


@pytest.mark.parametrize(
    ("kind", "make", "request_", "service"),
    [
        (UnknownService, mesh_with, {"url": "http://order/"}, "order"),
        (UnknownService, mesh_with, {"url": "https://orders/"}, "https://orders"),
        (NoEndpoints, ejected, {}, "orders"),
        (TypeError, mesh_with, options(timeot=1), "orders"),
        (ConfigError, mesh_with, options(timeout=-1), "orders"),
        (Mine, lambda: mesh_with(balancer=ConsistentHash(key=raising(Mine()))), {}, "orders"),
    ],
    ids=["unknown", "scheme", "nobody", "option", "value", "key"],
)
def test_a_call_that_made_no_attempt_says_so(
    kind: type[Exception], make: Callable[[], Mesh], request_: dict[str, Any], service: str, colour: Colour
) -> None:
    error = leaving(colour, make(), **request_)
    assert type(error) is kind
    assert (report(error).service, report(error).attempts) == (service, [])
    assert error.__notes__ == [f"meshlib: {service}: no attempt"]


def test_a_call_that_is_not_let_in_says_so(colour: Colour, upstream: Upstream) -> None:
    mesh = mesh_of(upstream, limit=Limit(1))
    with mesh.client("orders") as other, other.stream("GET", "/"):
        error = leaving(colour, mesh)
    assert type(error) is Overloaded
    assert error.__notes__ == ["meshlib: orders: no attempt"]


def test_the_caller_s_own_exceptions_carry_it_too(colour: Colour) -> None:
    own = Mine()
    for mesh, request_ in (
        (mesh_with(), {"content": body_of(own, colour)}),
        (mesh_with(retry=Retry(on=raising(own))), options(idempotent=True)),
    ):
        own.__dict__.clear()
        assert leaving(colour, mesh, **request_) is own
        [attempt] = report(own).attempts
        assert (str(attempt.endpoint), attempt.is_over) == (A, True)
        assert own.__notes__ == [f"meshlib: {report(own)}"]


def test_a_call_that_runs_out_of_time_says_what_it_tried(colour: Colour, no_leaks: None) -> None:
    with refusing() as one, refusing() as two:
        error = leaving(colour, mesh_of(one, two, timeout=Timeout(total=0.2), retry=Retry(max_attempts=50)))
    [note] = error.__notes__
    assert note == f"meshlib: {report(error)}"
    assert "\n" not in note
    first, *others = note.removeprefix(f"meshlib: orders: {len(report(error).attempts)} attempts: ").split("; ")
    assert first.startswith("first at 127.0.0.1:")
    assert "): not_sent in " in first
    assert ", ConnectError: connecting to 127.0.0.1:" in first
    assert others[0].startswith("failover at 127.0.0.1:")
    assert " after waiting " in others[1]
    assert "(again): not_sent in " in others[1]


def test_C7_a_cancelled_call_says_how_far_it_had_come(upstream: Upstream) -> None:
    upstream.script(then={"fault": "hang"})

    async def main() -> BaseException:
        async with mesh_of(upstream).async_client("orders") as client:
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(0.1):
                    await client.get("/")
        assert caught.value.__cause__ is not None
        return caught.value.__cause__

    error = asyncio.run(main())
    [attempt] = report(error).attempts
    assert attempt.outcome == "abandoned"
    assert error.__notes__ == [f"meshlib: {report(error)}"]


def test_C7_a_call_that_trio_cancels_ends_as_ever(upstream: Upstream) -> None:
    import trio

    upstream.script(then={"fault": "hang"})

    async def main() -> bool:
        async with mesh_of(upstream).async_client("orders") as client:
            with anyio.move_on_after(0.1) as scope:
                await client.get("/")
        return scope.cancelled_caught

    began = time.monotonic()
    assert trio.run(main)
    assert time.monotonic() - began < 10
