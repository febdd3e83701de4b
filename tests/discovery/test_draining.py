"""What has gone gets no new call; its idle connections close at once, the others with their responses (rule D2)."""

from __future__ import annotations

import sys
import threading
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from played import Played

from conftest import Colour
from meshlib import Endpoint, Mesh, Service, report, updates
from meshlib.endpoint import Place
from meshlib.testing import Upstream
from meshlib.transport.draining import Clients, Cut
from waiting import until

pytestmark = pytest.mark.usefixtures("hurry")

SLOW = {"fault": "drip", "size": 30, "interval": 0.05}
"""A response of a second and a half."""


async def eventually(colour: Colour, is_true: Any) -> None:
    """Wait, and let the loop run meanwhile that has connections to close."""
    if colour.is_sync:
        until(is_true)
        return
    with anyio.fail_after(5):
        while not is_true():  # other threads and processes bring it about
            await anyio.sleep(0.01)


class Moving:
    """A service that can move from one upstream to another."""

    def __init__(self, fleet: list[Upstream], colour: Colour, **settings: Any) -> None:
        self.old, self.new = fleet[:2]
        self.colour = colour
        self.resolver = Played(self.old.address)
        self.mesh = Mesh(Service("orders", self.resolver), **settings)

    async def move(self, *to: Upstream) -> None:
        """Move, and wait until it is seen."""
        places = [each.address for each in to or (self.new,)]
        self.resolver.say(*places)
        await eventually(self.colour, lambda: [each.endpoint for each in self._nodes()] == places)

    async def closed(self) -> None:
        """Wait until the old upstream has no connection any more."""
        await eventually(self.colour, lambda: self.old.stats()["connections_open"] == 0)

    async def answered_by(self, client: Any, upstream: Upstream) -> None:
        """Call, and look who answers."""
        response = await client.get("/")
        assert report(response).attempts[-1].endpoint.port == upstream.port
        assert response.status_code == 200

    def run(self, script: Any) -> None:
        with self.mesh:
            self.colour.run(self.mesh, script)

    def _nodes(self) -> Any:
        return self.mesh.snapshot()["orders"].nodes


def test_D2_idle_connections_close_at_once(colour: Colour, fleet: list[Upstream]) -> None:
    moving = Moving(fleet, colour)

    async def script(client: Any) -> None:
        await moving.answered_by(client, moving.old)
        assert moving.old.stats()["connections_open"] == 1
        await moving.move()
        await moving.closed()
        await moving.answered_by(client, moving.new)

    moving.run(script)


async def opened(client: Any) -> httpx.Response:
    """A response whose body is still to come."""
    response: httpx.Response = await client.send(httpx.Request("GET", "http://orders/"), stream=True)
    return response


async def read(response: httpx.Response, colour: Colour) -> bytes:
    return response.read() if colour.is_sync else await response.aread()


def test_D2_a_response_under_way_is_read_to_its_end_and_then_its_connection_closes(
    colour: Colour, fleet: list[Upstream]
) -> None:
    moving = Moving(fleet, colour)
    moving.old.script(SLOW)

    async def script(client: Any) -> None:
        response = await opened(client)
        await moving.move()
        await moving.answered_by(client, moving.new)
        assert moving.old.stats()["connections_open"] == 1
        assert len(await read(response, colour)) == 30
        await moving.closed()

    moving.run(script)


def test_D2_what_takes_longer_is_cut(colour: Colour, fleet: list[Upstream], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "GRACE", 0.3)
    moving = Moving(fleet, colour)
    moving.old.script({**SLOW, "size": 1000})

    async def script(client: Any) -> None:
        response = await opened(client)
        await moving.move()
        with pytest.raises(httpx.TransportError):
            await read(response, colour)
        await moving.closed()
        await moving.answered_by(client, moving.new)

    moving.run(script)


def test_D2_a_place_that_comes_back_in_time_is_not_cut(
    colour: Colour, fleet: list[Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "GRACE", 0.3)
    moving = Moving(fleet, colour)

    async def script(client: Any) -> None:
        await moving.answered_by(client, moving.old)
        await moving.move()
        await moving.closed()
        await moving.move(moving.old)
        moving.old.script(SLOW)
        response = await opened(client)
        assert len(await read(response, colour)) == 30, "longer than what goes has"
        assert moving.old.stats()["connections_open"] == 1

    moving.run(script)


class Inner(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """An inner transport that remembers who closed it."""

    def __init__(self, endpoint: Endpoint, closed: list[str]) -> None:
        self.place = str(endpoint)
        self._closed = closed

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=self.place)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=self.place)

    def close(self) -> None:
        self._closed.append(self.place)

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._closed.append(self.place)


def test_D2_an_inner_transport_is_closed_at_the_end_of_the_grace(
    colour: Colour, fleet: list[Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "GRACE", 0.2)
    closed: list[str] = []
    moving = Moving(fleet, colour, inner=lambda endpoint: Inner(endpoint, closed))

    async def script(client: Any) -> None:
        await moving.answered_by(client, moving.old)
        await moving.move()
        await moving.answered_by(client, moving.new)
        assert closed == []
        await eventually(colour, lambda: closed)
        assert closed == [moving.old.address]

    moving.run(script)
    assert closed == [moving.old.address, moving.new.address]


def test_D2_an_inner_transport_of_a_place_that_comes_back_is_another_one(
    colour: Colour, fleet: list[Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "GRACE", 0.5)
    made: list[Closing] = []

    class Closing(Inner):
        is_closed = False

        def close(self) -> None:
            self.is_closed = True
            raise OSError("it does not close well")

        async def aclose(self) -> None:
            self.close()

    def inner(endpoint: Endpoint) -> Closing:
        made.append(Closing(endpoint, []))
        return made[-1]

    moving = Moving(fleet, colour, inner=inner)

    async def script(client: Any) -> None:
        await moving.answered_by(client, moving.old)
        await moving.move()
        await moving.move(moving.old)
        await moving.answered_by(client, moving.old)
        assert len(made) == 2, "calls may be under way over it when the first is closed"
        await eventually(colour, lambda: made[0].is_closed)
        await moving.answered_by(client, moving.old)
        assert [each.is_closed for each in made] == [True, False]
        Closing.close = Inner.close  # type: ignore[method-assign]
        Closing.aclose = Inner.aclose  # type: ignore[method-assign]

    moving.run(script)


def test_D2_what_was_on_its_way_when_its_place_went_is_cut_as_well(
    colour: Colour, fleet: list[Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "GRACE", 0.3)
    moving = Moving(fleet, colour)
    moving.old.script({}, {**SLOW, "size": 1000})

    async def script(client: Any) -> None:
        await moving.answered_by(client, moving.old)
        cluster: Any = moving.mesh._clusters["orders"]
        late = cluster.view
        await moving.move()
        cluster.view = late  # a call that has chosen its endpoint before, and goes there now
        response = await opened(client)
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):  # not the deadline
            await read(response, colour)
        await moving.closed()

    moving.run(script)


def test_D2_clients_may_come_while_others_are_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = Clients()
    kept = [Quick() for _ in range(100)]
    for each in kept:
        clients.add(each)
    over = threading.Event()

    def come() -> None:
        while not over.is_set():
            clients.add(Quick())

    thread = threading.Thread(target=come)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(3000):
            clients.drain("orders", ("10.0.0.1", 80))
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(before)


class Quick:
    """Has nothing to drain."""

    def drain(self, service: str, place: Place) -> Cut:
        return lambda: None
