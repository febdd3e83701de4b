"""A FastAPI application that calls a service: a client as a dependency, and the caller's deadline on every call.

It is asked a few times, in this process, while an endpoint of the service is killed. The upstreams are started here so
that the example runs anywhere; yours are running somewhere already, and uvicorn serves the application.
"""

import asyncio
from typing import Annotated

import httpx
from fastapi import FastAPI

from meshlib import Mesh, Service, report
from meshlib.ext.fastapi import MeshMiddleware, client, lifespan, status_router
from meshlib.testing import upstreams

Orders = Annotated[httpx.AsyncClient, client("orders")]


def application(mesh: Mesh) -> FastAPI:
    app = FastAPI(lifespan=lifespan(mesh))
    app.add_middleware(MeshMiddleware, mesh=mesh)
    app.include_router(status_router(mesh))

    @app.get("/orders/{number}")
    async def order(number: int, orders: Orders) -> str:
        response = (await orders.get(f"/v1/orders/{number}")).raise_for_status()
        return str(report(response))

    return app


async def main() -> None:
    with upstreams(3) as (a, b, c):
        app = application(Mesh(Service("orders", [a.address, b.address, c.address])))
        asking = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop")
        async with app.router.lifespan_context(app), asking:
            for number in range(6):
                if number == 3:
                    c.kill()
                answer = await asking.get(f"/orders/{number}", headers={"x-meshlib-deadline-ms": "15000"})
                print(answer.raise_for_status().json())
            left = [int(request.values("x-meshlib-deadline-ms")[0]) for each in (a, b) for request in each.log()]
            print(f"the service was given {max(left):,d} of 15,000 ms at most")
            late = await asking.get("/orders/7", headers={"x-meshlib-deadline-ms": "0"})
            print(late.status_code, late.json())
            page = await asking.get("/mesh/snapshot.json")
            print([node["endpoint"] for node in page.json()["services"]["orders"]["nodes"]])


asyncio.run(main())
