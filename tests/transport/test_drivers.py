"""The two drivers turn the same calls in the same way: one script for both, and their logs are compared."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import httpx
import pytest

from meshes import refusing
from meshlib import Endpoint, Mesh, Retry, RoundRobin, Service, report

Step = int | type[httpx.TransportError]

SCRIPTS: dict[str, list[Step]] = {
    "fine": [200] * 6,
    "rejected": [503, 200, 502, 504, 503, 200, 500, 200],
    "refused": [httpx.ConnectError, 200, httpx.ConnectTimeout, httpx.ConnectError, 200],
    "lost": [httpx.ReadError, 200, httpx.RemoteProtocolError, httpx.ReadError, httpx.ReadTimeout, 200],
    "mixed": [503, httpx.ReadError, httpx.ConnectError, 429, 200, httpx.WriteError, 503, 503, 503, 200, 404],
}


class Scripted(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Plays a script over all endpoints, and logs which one was asked for what."""

    def __init__(self, steps: list[Step]) -> None:
        self.log: list[tuple[str, str, str]] = []
        self._steps = iter(steps)

    def at(self, endpoint: Endpoint) -> Scripted:
        return self

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        step = next(self._steps, 200)
        self.log.append((request.method, str(request.url), str(step)))
        if isinstance(step, int):
            return httpx.Response(step, text="body")
        raise step("scripted", request=request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.handle_request(request)


def mesh_over(scripted: Scripted) -> Mesh:
    places = [f"10.0.0.{number}:80" for number in range(1, 4)]
    service = Service("orders", places, balancer=RoundRobin(), retry=Retry(max_attempts=3))
    return Mesh(service, inner=scripted.at, rng=random.Random(1))


def told(result: httpx.Response | Exception) -> tuple[object, ...]:
    """What came out of a call, without the times."""
    attempts = [
        (each.kind, str(each.endpoint), str(each.outcome), each.status, each.why, each.error)
        for each in report(result).attempts
    ]
    return (result.status_code if isinstance(result, httpx.Response) else type(result), attempts)


def calls() -> Iterator[tuple[str, str]]:
    for number in range(5):
        yield ("POST" if number % 2 else "GET"), f"/{number}"


def run_sync(scripted: Scripted) -> list[tuple[object, ...]]:
    results: list[tuple[object, ...]] = []
    with mesh_over(scripted).client("orders") as client:
        for method, path in calls():
            try:
                results.append(told(client.request(method, path, content=b"x")))
            except httpx.TransportError as error:
                results.append(told(error))
    return results


def run_async(scripted: Scripted) -> list[tuple[object, ...]]:
    async def main() -> list[tuple[object, ...]]:
        results: list[tuple[object, ...]] = []
        async with mesh_over(scripted).async_client("orders") as client:
            for method, path in calls():
                try:
                    results.append(told(await client.request(method, path, content=b"x")))
                except httpx.TransportError as error:
                    results.append(told(error))
        return results

    return asyncio.run(main())


@pytest.mark.parametrize("script", SCRIPTS)
def test_both_drivers_turn_a_script_into_the_same_log(script: str) -> None:
    one, other = Scripted(SCRIPTS[script]), Scripted(SCRIPTS[script])
    assert run_sync(one) == run_async(other)
    assert one.log == other.log
    assert len(one.log) >= 5


def test_a_refused_port_is_the_same_to_both(no_leaks: None) -> None:
    with refusing() as address:
        mesh = Mesh(Service("orders", [address]))
        with mesh.client("orders") as client, pytest.raises(httpx.ConnectError) as caught:
            client.get("/")

        async def main() -> Exception:
            async with mesh.async_client("orders") as client:
                with pytest.raises(httpx.ConnectError) as caught:
                    await client.get("/")
                return caught.value

        other = asyncio.run(main())
    assert str(caught.value) == str(other)
