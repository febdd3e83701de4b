"""How the tests build a mesh over upstream processes, and what they ask of a response."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

from meshlib import Endpoint, LeastRequest, Mesh, RoundRobin, Service, report
from meshlib.testing import Upstream


def mesh_of(*endpoints: Upstream | str, name: str = "orders", **settings: Any) -> Mesh:
    """A mesh with one service over these upstreams or addresses.

    Unless told otherwise it draws among idle endpoints by chance: a test that breaks one wants it to be called.
    """
    places = [endpoint.address if isinstance(endpoint, Upstream) else endpoint for endpoint in endpoints]
    return Mesh(Service(name, places, **{"balancer": LeastRequest(), **settings}))


def outcomes(result: Any) -> list[tuple[str, str]]:
    """Kind and outcome of every attempt."""
    return [(attempt.kind, str(attempt.outcome)) for attempt in report(result).attempts]


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """An address that refuses connections for as long as this is open: bound, so nobody else gets it, not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def over(*addresses: str, inner: Callable[[Endpoint], Any], **settings: Any) -> Mesh:
    """A mesh with the service `orders`, its endpoints in turn, whose attempts go through `inner`."""
    return Mesh(Service("orders", addresses, balancer=RoundRobin(), **settings), inner=inner)


async def get_or_error(client: Any) -> Any:
    """What a GET ends with."""
    try:
        return await client.get("/")
    except Exception as error:
        return error


async def post_or_error(client: Any) -> Any:
    """What a POST ends with."""
    try:
        return await client.post("/", content=b"once")
    except Exception as error:
        return error
