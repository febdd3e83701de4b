"""Where the key of a call comes from, and where it goes."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from conftest import Colour
from meshes import mesh_of
from meshlib import Breaker, ConsistentHash, Endpoint, options, report
from meshlib.core.node import Node
from meshlib.testing import Upstream
from meshlib.transport.keys import key_of

KEYS = [f"user {number}/é" for number in range(8)]
"""Enough of them that chance does not send all to the right one of three; with all that has to be decoded."""


def home_of(fleet: list[Upstream], key: str) -> str:
    nodes = [Node(Endpoint.parse(each.address), Breaker()) for each in fleet]
    return str(next(ConsistentHash().prepare(nodes, random.Random(1))(0.0, key)).endpoint)


def went_to(response: httpx.Response) -> str:
    return str(report(response).attempts[0].endpoint)


def from_url(request: httpx.Request) -> str:
    return request.url.params["k"]


def requests_with(key: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A setting, and a request that has the key where it says."""
    quoted = key.replace(" ", "%20").replace("/", "%2F").replace("é", "%C3%A9")
    # httpx takes all headers of a request for latin-1 if one of them is not UTF-8.
    yield "header:X-User-Id", {"headers": {"x-user-id": key.encode(), "x-other": b"\xe9"}}
    yield "cookie:sid", {"headers": {"cookie": f'psid=1; sid="{key}"; sid=2'.encode()}}
    yield "query:tenant", {"url": f"/?a=1&tenant={quoted}&tenant=2"}
    yield "path:1", {"url": f"/a/{quoted}/c?x=/y/z"}
    yield from_url, {"url": f"/?k={quoted}"}


def test_a_call_goes_to_its_keys_endpoint_wherever_the_key_is(colour: Colour, fleet: list[Upstream]) -> None:
    expected = [home_of(fleet, key) for key in KEYS]

    async def script(client: httpx.AsyncClient) -> list[str]:
        return [went_to(await client.get(**{"url": "/", **request})) for request in requests]

    for position, (setting, _) in enumerate(requests_with("")):
        requests = [list(requests_with(key))[position][1] for key in KEYS]
        mesh = mesh_of(*fleet, balancer=ConsistentHash(key=setting))
        assert colour.run(mesh, script) == expected, setting
        assert mesh.snapshot()["orders"].warnings == ()


def test_options_win_over_the_balancers_key(colour: Colour, fleet: list[Upstream]) -> None:
    expected = [home_of(fleet, key) for key in KEYS]
    other = {"x-user-id": "somebody else"}

    async def script(client: httpx.AsyncClient) -> list[str]:
        places = []
        for key in KEYS:
            extension = {"meshlib": {"hash_key": key}}
            places.append(went_to(await client.get("/", headers=other, extensions=extension)))
            with options(hash_key=key):
                places.append(went_to(await client.get("/", headers=other)))
                with options(hash_key=None):  # none of its own: the header's again
                    assert went_to(await client.get("/", headers=other)) == home_of(fleet, "somebody else")
        return places

    for key in ("header:x-user-id", lambda request: request.headers["x-user-id"]):
        mesh = mesh_of(*fleet, balancer=ConsistentHash(key=key))
        assert colour.run(mesh, script) == [each for place in expected for each in (place, place)]


def test_calls_without_a_key_are_balanced_and_counted(colour: Colour, fleet: list[Upstream]) -> None:
    async def script(client: httpx.AsyncClient) -> set[str]:
        seen = {went_to(await client.get("/")) for _ in range(40)}
        await client.get("/", headers={"x-user-id": "u1"})
        await client.get("/", headers={"x-user-id": ""})
        with options(hash_key=""):
            await client.get("/", headers={"x-user-id": "u1"})
        return seen

    mesh = mesh_of(*fleet, balancer=ConsistentHash(key="header:x-user-id"))
    assert len(colour.run(mesh, script)) == 3
    assert mesh.snapshot()["orders"].warnings == ("42 calls had no hash key",)


def test_a_key_fails_over_to_the_same_endpoint_every_time(colour: Colour, fleet: list[Upstream]) -> None:
    async def script(client: httpx.AsyncClient) -> list[list[str]]:
        answers = [await client.get("/", headers={"x-user-id": "u1"}) for _ in range(3)]
        return [[str(attempt.endpoint) for attempt in report(answer).attempts] for answer in answers]

    home = home_of(fleet, "u1")
    next(each for each in fleet if each.address == home).kill()
    left = [each for each in fleet if each.address != home]
    mesh = mesh_of(*fleet, balancer=ConsistentHash(key="header:x-user-id"))
    assert colour.run(mesh, script) == [[home, home_of(left, "u1")]] * 3


class Ours(Exception):
    pass


def test_what_the_function_for_the_key_raises_is_the_callers(colour: Colour, upstream: Upstream) -> None:
    error = Ours("no tenant")

    def failing(request: httpx.Request) -> str:
        raise error

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(Ours) as caught:
            await client.get("/")
        assert caught.value is error
        assert report(error).attempts == []

    mesh = mesh_of(upstream, balancer=ConsistentHash(key=failing))
    colour.run(mesh, script)
    assert upstream.log() == []


def test_T3_a_key_is_not_said(colour: Colour, upstream: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever its type: it may be a session."""
    caplog.set_level(logging.DEBUG, "meshlib")

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(TypeError, match="must return a str or None, got bytes") as caught:
            await client.get("/", headers={"x-user-id": "secret"})
        said.append(caught.value)
        with pytest.raises(ValueError, match="hash_key: must be a string, got bytes") as wrong:
            await client.get("/", extensions={"meshlib": {"hash_key": b"secret"}})
        said.append(wrong.value)
        said.append(report(await client.get("/", extensions={"meshlib": {"hash_key": "secret"}})))

    said: list[Any] = []
    mesh = mesh_of(upstream, balancer=ConsistentHash(key=lambda request: request.headers["x-user-id"].encode()))
    colour.run(mesh, script)
    said += [*caplog.messages, mesh.snapshot(), *(getattr(each, "__notes__", ()) for each in said)]
    assert "secret" not in repr(said) + str(said[0]) + str(said[1])


@pytest.mark.parametrize(
    ("setting", "request_"),
    [
        ("header:x-user-id", httpx.Request("GET", "http://orders/")),
        ("cookie:sid", httpx.Request("GET", "http://orders/")),
        ("cookie:sid", httpx.Request("GET", "http://orders/", headers={"cookie": "a=sid; psid=1; sid"})),
        ("query:tenant", httpx.Request("GET", "http://orders/?tenants=1")),
        ("path:0", httpx.Request("GET", "http://orders/")),
        ("path:0", httpx.Request("GET", "http://orders//a")),
        ("path:2", httpx.Request("GET", "http://orders/a/b?c/d")),
        (lambda request: None, httpx.Request("GET", "http://orders/a")),
        (None, httpx.Request("GET", "http://orders/a")),
    ],
)
def test_a_request_may_have_no_key(setting: Any, request_: httpx.Request) -> None:
    read = key_of(ConsistentHash(key=setting))
    assert read is not None
    assert not read(request_)
