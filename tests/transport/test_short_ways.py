"""What most calls need is written out where it is needed; here it is held against the long way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest
from doubles import Factory
from test_drivers import SCRIPTS, Scripted, mesh_over, run_async, run_sync

from conftest import Colour
from meshes import over
from meshlib import Mesh, Service, Timeout
from meshlib.testing import ManualClock
from meshlib.transport import binding

URLS = ("http://orders/v1?x=1&y=%2F#part", "http://user:pass@orders/", "http://orders./a%20b", "http://ORDERS")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_answer_judged_at_length_is_judged_alike(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meshes: list[Mesh] = []

    def kept(scripted: Scripted) -> Mesh:
        meshes.append(mesh_over(scripted))
        return meshes[-1]

    monkeypatch.setattr("test_drivers.mesh_over", kept)
    short = run_sync(Scripted(SCRIPTS[script])), run_async(Scripted(SCRIPTS[script]))
    monkeypatch.setattr("meshlib.transport.terms.REJECTING", frozenset(range(100, 600)))
    assert (run_sync(Scripted(SCRIPTS[script])), run_async(Scripted(SCRIPTS[script]))) == short
    learned = list(map(known, meshes))
    assert learned == [learned[0]] * 4
    assert all(in_flight == 0 for _, *nodes in learned for _, in_flight, *_ in nodes)


def known(mesh: Mesh) -> list[Any]:
    """What a mesh knows of its service after all calls, without the times."""
    service = mesh.snapshot()["orders"]
    nodes = [(each.endpoint, each.in_flight, each.attempts, each.failures, each.state) for each in service.nodes]
    return [service.budget_tokens, *nodes]


@pytest.mark.parametrize("host", [None, "endpoint", "elsewhere"])
def test_a_request_put_together_by_httpx_is_the_same(host: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert binding.IS_KNOWN
    short = asked(host)
    monkeypatch.setattr(binding, "IS_KNOWN", False)
    assert asked(host) == short
    assert len(short) == 3 * len(URLS)


def asked(host: str | None) -> list[Any]:
    """What the transport of the only endpoint is asked."""
    factory = Factory()
    mesh = Mesh(Service("orders", ["10.0.0.1:8080"], host=host), inner=factory, clock=ManualClock())
    with mesh.client() as client:
        for url in URLS:
            client.get(url)
            client.post(url, content=b"hello", headers={b"Idempotency-Key": b"k", b"x-a": b"\xe4"})
            client.put(url, json={"a": 1}, headers={"X-Meshlib-Deadline-Ms": "7"})
    return [
        (each.method, str(each.url), each.url.userinfo, each.headers.raw, each.content, each.extensions["timeout"])
        for each in factory.requests
    ]


def test_a_service_that_is_set_anew_is_so_for_the_next_call(colour: Colour) -> None:
    factory = Factory()
    mesh = over("10.0.0.1:80", inner=factory)

    async def script(client: httpx.AsyncClient) -> None:
        await client.get("/")
        cluster = mesh._clusters["orders"]
        cluster.service = replace(cluster.service, timeout=Timeout(attempt=2.0, connect=0.5))
        await client.get("/")

    colour.run(mesh, script)
    assert [each.extensions["timeout"]["connect"] for each in factory.requests] == [1.0, 0.5]


def test_what_comes_from_users_is_not_kept_for_ever() -> None:
    transport: Any = over("10.0.0.1:80", inner=Factory()).transport()
    with httpx.Client(transport=transport) as client:
        for number in range(5):
            client.get(f"http://user{number}:pass@orders/{number}?{number}#{number}")
            client.get(f"http://orders/{number}?{number}#{number}")
    assert len(transport._router._routes) == 1
