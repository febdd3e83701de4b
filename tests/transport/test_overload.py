"""Calls that are refused before anything is sent: `Overloaded`, from the limit and from the throttle."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from conftest import Colour
from meshes import get_or_error, mesh_of
from meshlib import Limit, Overloaded, Timeout, report
from meshlib.testing import Upstream


def test_a_call_over_the_limit_is_refused_until_a_body_has_ended(upstream: Upstream) -> None:
    mesh = mesh_of(upstream, limit=Limit(1))
    with mesh.client("orders") as client:
        with client.stream("GET", "/") as response:
            with pytest.raises(httpx.TransportError) as refused:
                client.get("/")
            response.read()
        assert client.get("/").status_code == 200
    assert isinstance(refused.value, Overloaded)
    assert str(refused.value) == "orders: it has 1 in flight, which is its limit"
    assert report(refused.value).attempts == []
    assert len(upstream.log()) == 2
    assert mesh.snapshot()["orders"].in_flight == 0


def test_B4_an_overloaded_service_is_spared_and_comes_back(colour: Colour, fleet: list[Upstream]) -> None:
    for each in fleet:
        each.script(then={"status": 503, "headers": {"retry-after": "60"}})
    mesh = mesh_of(*fleet, timeout=Timeout(total=5.0, attempt=1.0))

    async def script(client: Any) -> None:
        ends = [await get_or_error(client) for _ in range(200)]
        refused = [end for end in ends if isinstance(end, Overloaded)]
        assert len(refused) > 80
        assert all(end.status_code == 503 for end in ends if not isinstance(end, Exception))
        assert sum(len(each.log()) for each in fleet) == 200 - len(refused), "what is refused is not sent"
        for each in fleet:
            each.script()
        deadline = time.monotonic() + 20.0
        in_a_row = 0
        while in_a_row < 30:
            assert time.monotonic() < deadline
            in_a_row = 0 if isinstance(await get_or_error(client), Overloaded) else in_a_row + 1

    colour.run(mesh, script)


@pytest.mark.parametrize("headers", [{"retry-after": "60"}, {"x-envoy-overloaded": "true"}])
def test_B4_what_an_overloaded_server_says(headers: dict[str, str], upstream: Upstream) -> None:
    upstream.script(then={"status": 503, "headers": headers})
    mesh = mesh_of(upstream)
    with mesh.client("orders") as client:
        ends = []
        for _ in range(60):
            try:
                ends.append(client.get("/").status_code)
            except Overloaded as error:
                ends.append(str(error))
    assert "orders: it is overloaded, and" in str(ends[-20:])
