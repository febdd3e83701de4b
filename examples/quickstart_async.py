"""Call two services by name from async code, many calls at a time.

The upstreams are started here so that the example runs anywhere; yours are running somewhere already.
"""

import asyncio

from meshlib import LeastRequest, Mesh, Retry, RoundRobin, Service, Timeout
from meshlib.testing import Upstream, upstreams


async def main(orders: list[Upstream], users: list[Upstream]) -> None:
    mesh = Mesh(
        Service("orders", [each.address for each in orders], balancer=LeastRequest(choices=2)),
        Service(
            "users",
            [each.address for each in users],
            balancer=RoundRobin(),
            timeout=Timeout(total=2.0, attempt=0.5),
            retry=Retry(max_attempts=2),
        ),
    )
    async with mesh.async_client() as client:  # a plain httpx.AsyncClient
        urls = [f"http://{service}/v1/{number}" for number in range(50) for service in ("orders", "users")]
        responses = await asyncio.gather(*(client.get(url) for url in urls))
    print(f"{sum(response.is_success for response in responses)} of {len(urls)} calls succeeded")
    for name, service in mesh.snapshot().items():
        print(name, {node.endpoint: node.attempts for node in service.nodes})


with upstreams(2) as first, upstreams(2) as second:
    asyncio.run(main(first, second))
