"""What type checkers must refuse: a line below whose error is missing is itself an error. This file is never run."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import httpx

from meshlib import (
    Breaker,
    Budget,
    Connections,
    Endpoint,
    LeastRequest,
    Limit,
    Mesh,
    Retry,
    RoundRobin,
    Service,
    Throttle,
    Timeout,
    deadline,
    options,
    report,
)
from meshlib.core.balance import Balancer
from meshlib.core.chance import Rng
from meshlib.core.node import Node
from meshlib.discovery import Resolution
from meshlib.discovery.failover import Failover

ADDRESSES = ["10.0.0.1:8080"]

# Settings are keyword-only, frozen, and of one type each
Timeout(5.0)  # type: ignore[call-arg]
Timeout(total="5")  # type: ignore[arg-type]
Timeout(totl=5.0)  # type: ignore[call-arg]
Retry(max_attempts=1.5)  # type: ignore[arg-type]
Retry(on_status=503)  # type: ignore[arg-type]
Retry(on_status={"503"})  # type: ignore[arg-type]
Retry(budget=500)  # type: ignore[arg-type]
Budget(capacity=None)  # type: ignore[arg-type]
Breaker(consecutive=0.5)  # type: ignore[arg-type]
Throttle(2.0)  # type: ignore[call-arg]
Throttle(enforce=None)  # type: ignore[arg-type]
Limit()  # type: ignore[call-arg]
Limit(10, 4)  # type: ignore[call-arg]
Connections(max_idle="many")  # type: ignore[arg-type]
LeastRequest(choices=2.5)  # type: ignore[arg-type]
RoundRobin(choices=2)  # type: ignore[call-arg]
Timeout().total = 5.0  # type: ignore[misc]

# Endpoints
Endpoint("10.0.0.1", "80")  # type: ignore[arg-type]
Endpoint("10.0.0.1", 80, metadata={"version": 2})  # type: ignore[dict-item]
Endpoint("10.0.0.1", 80, place=("10.0.0.2", 80))  # type: ignore[call-arg]
Endpoint("10.0.0.1", 80).port = 81  # type: ignore[misc]
Endpoint("10.0.0.1", 80).metadata["version"] = "v2"  # type: ignore[index]
Endpoint.parse("10.0.0.1:80", 3)  # type: ignore[call-arg]

# Services
Service("orders")  # type: ignore[call-arg]
Service("orders", None)  # type: ignore[arg-type]
Service("orders", [8080])  # type: ignore[list-item]
Service("orders", ADDRESSES, balancer="round_robin")  # type: ignore[arg-type]
Service("orders", ADDRESSES, balancer=RoundRobin)  # type: ignore[arg-type]
Service("orders", ADDRESSES, timeout=5.0)  # type: ignore[arg-type]
Service("orders", ADDRESSES, retries=3)  # type: ignore[call-arg]
Service("orders", ADDRESSES, tls=True)  # type: ignore[arg-type]

Service("orders", ADDRESSES, min_healthy=0.5)  # type: ignore[arg-type]


# Resolvers
class Blocking:
    def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        return Resolution([], None)


Service("orders", Blocking())  # type: ignore[arg-type]
Resolution(["10.0.0.1:80"], 5.0)  # type: ignore[list-item]
Failover(5)  # type: ignore[arg-type]

# The mesh
Mesh("orders")  # type: ignore[arg-type]
Mesh([Service("orders", ADDRESSES)])  # type: ignore[arg-type]
Mesh(clock=5.0)  # type: ignore[arg-type]
Mesh().client(5)  # type: ignore[arg-type]
Mesh().snapshot()["orders"].panic = True  # type: ignore[misc]
state: Literal["closed", "open"] = Mesh().snapshot()["orders"].nodes[0].state  # type: ignore[assignment]


async def colours() -> None:
    async with Mesh().client():  # type: ignore[attr-defined]
        pass
    with Mesh().async_client():  # type: ignore[attr-defined]
        pass


# Scopes keep the types of what they decorate
deadline("5")  # type: ignore[arg-type]
deadline()  # type: ignore[call-arg]


@options(timeout=1.0)
def fetch(order: int) -> str:
    return str(order)


fetch("5")  # type: ignore[arg-type]
real = fetch(5).real  # type: ignore[attr-defined]

# Decorated functions
mesh = Mesh()
mesh.call()  # type: ignore[call-overload]
mesh.call(5)  # type: ignore[call-overload]
mesh.call("orders", timeot=1.0)  # type: ignore[call-overload]
mesh.call("orders", idempotent="yes")  # type: ignore[call-overload]
mesh.call("orders", hash_key=5)  # type: ignore[call-overload]


@mesh.call("orders", fallback=None)
def order(client: httpx.Client, number: int) -> str:
    return str(number)


@mesh.call("orders")
async def order_async(client: httpx.AsyncClient, number: int, *, fresh: bool = False) -> str:
    return str(number)


async def later(number: int) -> str:
    return str(number)


order("5")  # type: ignore[arg-type]
order()  # type: ignore[call-arg]
order(mesh.client(), 5)  # type: ignore[call-arg, arg-type]
stale = order_async(5, stale=True)  # type: ignore[call-arg]
word: str = order(5)  # type: ignore[assignment]


@mesh.call("orders")  # type: ignore[arg-type]
def without_a_client(number: int) -> str:
    return str(number)


@mesh.call("orders")  # type: ignore[arg-type]
def of_another_colour(client: httpx.AsyncClient) -> str:
    return ""


@mesh.call("orders", fallback=later)  # type: ignore[arg-type]
def that_cannot_wait(client: httpx.Client, number: int) -> str:
    return str(number)


# Reports
report()  # type: ignore[call-arg]
kind: Literal["first", "retry"] = report(None).attempts[0].kind  # type: ignore[assignment]
tries = report(None).tries  # type: ignore[attr-defined]


# Balancers
class WithoutRng:
    def prepare(self, nodes: Sequence[Node]) -> Iterator[Node]:
        return iter(nodes)


class OneNode:
    def prepare(self, nodes: Sequence[Node], rng: Rng) -> Node:
        return nodes[0]


class Named:
    def choose(self, nodes: Sequence[Node], rng: Rng) -> Node:
        return nodes[0]


first: Balancer = WithoutRng()  # type: ignore[assignment]
second: Balancer = OneNode()  # type: ignore[assignment]
third: Balancer = Named()  # type: ignore[assignment]

# Registration
Mesh().register("orders")  # type: ignore[call-arg]
Mesh().register("orders", port="8000")  # type: ignore[arg-type]
Mesh().register("orders", port=8000, check="grpc")  # type: ignore[arg-type]
Mesh().register("orders", port=8000, alive=lambda loop: True)  # type: ignore[arg-type, misc]
