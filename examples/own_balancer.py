"""A balancer of one's own: an object with `prepare`. This one prefers endpoints in its own zone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from meshlib import Endpoint, Mesh, Service
from meshlib.testing import upstreams


@dataclass(frozen=True)
class Nearest:
    """Endpoints of `zone` first, the idle ones before the busy ones."""

    zone: str

    def prepare(self, nodes: Sequence[Any], rng: Any) -> Callable[[float, str | None], Iterator[Any]]:
        def candidates(now: float, key: str | None) -> Iterator[Any]:
            yield from sorted(nodes, key=lambda node: (node.endpoint.zone != self.zone, node.in_flight))

        return candidates


with upstreams(2) as (near, far):
    endpoints = [Endpoint(far.host, far.port, zone="west"), Endpoint(near.host, near.port, zone="east")]
    mesh = Mesh(Service("orders", endpoints, balancer=Nearest("east")))
    with mesh.client("orders") as client:
        print("answered by", {client.get("/").headers["x-upstream"] for _ in range(20)})
        near.kill()
        print("answered by", {client.get("/").headers["x-upstream"] for _ in range(20)}, "when the near one is gone")
