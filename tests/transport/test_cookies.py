"""A mesh's client keeps cookies as httpx's does, and asks its jar only about answers that set one."""

from __future__ import annotations

from http.cookiejar import CookieJar
from typing import Any

import httpx
import pytest

from conftest import Colour
from meshes import over
from meshlib import Endpoint, Mesh
from meshlib.transport.cookies import SparingCookies


class Answering(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Answers with these headers in turn, and tells which cookies it was sent."""

    def __init__(self, *answers: list[tuple[str, str]]) -> None:
        self.sent: list[str | None] = []
        self._answers = list(answers)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request.headers.get("cookie"))
        return httpx.Response(200, headers=self._answers.pop(0) if self._answers else [])

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.handle_request(request)


def mesh_over(answering: Answering) -> Mesh:
    return over("10.0.0.1:80", inner=lambda endpoint: answering)


def test_cookies_are_kept_and_sent(colour: Colour) -> None:
    answering = Answering([("Set-Cookie", "sid=7; Path=/")], [("x-other", "1")], [("set-cookie", "sid=8; Path=/")])

    async def script(client: Any) -> dict[str, str]:
        for _ in range(4):
            await client.get("/")
        return dict((client._client if colour.is_sync else client).cookies)

    assert colour.run(mesh_over(answering), script) == {"sid": "8"}
    assert answering.sent == [None, "sid=7", "sid=7", "sid=8"]


def test_the_jar_is_not_asked_about_answers_that_set_none(colour: Colour, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[httpx.Response] = []
    plainly = httpx.Cookies.extract_cookies
    monkeypatch.setattr(
        httpx.Cookies, "extract_cookies", lambda self, response: (asked.append(response), plainly(self, response))
    )
    answering = Answering([], [("Set-Cookie2", "a=1")], [("SET-COOKIE", "b=2")], [("content-type", "text/plain")])

    async def script(client: Any) -> None:
        for _ in range(4):
            await client.get("/")

    colour.run(mesh_over(answering), script)
    assert [response.headers.raw[0][0].lower() for response in asked] == [b"set-cookie2", b"set-cookie"]


def test_cookies_given_to_the_client_are_its_own() -> None:
    answering = Answering()
    with mesh_over(answering).client("orders", cookies={"a": "1"}) as client:
        assert isinstance(client.cookies, SparingCookies)
        client.get("/")
        client.cookies.set("b", "2")
        client.get("/")
        client.cookies = {"c": "3"}
        client.get("/")
    assert answering.sent == ["a=1", "a=1; b=2", "c=3"]


def test_a_jar_of_the_users_own_making_sees_every_answer() -> None:
    class Jar(CookieJar):
        seen = 0

        def extract_cookies(self, response: Any, request: Any) -> None:
            Jar.seen += 1

    with mesh_over(Answering()).client("orders", cookies=Jar()) as client:
        client.get("/")
    assert Jar.seen == 1


def test_an_httpx_that_keeps_its_cookies_elsewhere_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = httpx.Cookies()
    monkeypatch.setattr(httpx.Client, "cookies", property(lambda self: elsewhere))
    client = Mesh(inner=lambda endpoint: Answering()).client()
    assert type(client._cookies) is httpx.Cookies
    client.close()


def test_clients_of_others_are_as_they_were() -> None:
    mesh = over(str(Endpoint("10.0.0.1", 80)), inner=lambda endpoint: Answering())
    with httpx.Client(transport=mesh.transport()) as client:
        client.get("http://orders/")
        assert type(client.cookies) is httpx.Cookies
