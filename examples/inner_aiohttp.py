"""Let aiohttp carry the calls: the mesh still chooses, fails over and keeps the time, and aiohttp owns the connections.

Needs the `aiohttp` extra. The upstreams are started here so that the example runs anywhere; yours are running already.
"""

import asyncio

from httpx_aiohttp import AiohttpTransport

from meshlib import Endpoint, Mesh, Service, report
from meshlib.testing import Upstream, upstreams


def over_aiohttp(endpoint: Endpoint) -> AiohttpTransport:
    return AiohttpTransport()  # one for each endpoint, closed with the client


async def main(fleet: list[Upstream]) -> None:
    mesh = Mesh(Service("orders", [each.address for each in fleet]), inner=over_aiohttp)
    async with mesh.async_client("orders") as client:  # a plain httpx.AsyncClient
        responses = await asyncio.gather(*(client.get(f"/v1/orders/{number}") for number in range(50)))
        fleet[0].kill()
        responses += await asyncio.gather(*(client.get(f"/v1/orders/{number}") for number in range(50)))
    print(f"{sum(response.is_success for response in responses)} of {len(responses)} calls succeeded")
    print(next(report(response) for response in responses if len(report(response).attempts) > 1))
    for node in mesh.snapshot()["orders"].nodes:
        print(f"{node.endpoint}: {node.state}, {node.attempts} attempts, {node.failures} failures")


with upstreams(3) as fleet:
    asyncio.run(main(fleet))
