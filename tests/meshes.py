"""How the tests build a mesh over upstream processes, and what they ask of a response."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from meshlib import Mesh, Service, report
from meshlib.testing import Upstream


def mesh_of(*endpoints: Upstream | str, name: str = "orders", **settings: Any) -> Mesh:
    """A mesh with one service over these upstreams or addresses."""
    places = [endpoint.address if isinstance(endpoint, Upstream) else endpoint for endpoint in endpoints]
    return Mesh(Service(name, places, **settings))


def outcomes(result: Any) -> list[tuple[str, str]]:
    """Kind and outcome of every attempt."""
    return [(attempt.kind, str(attempt.outcome)) for attempt in report(result).attempts]


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """An address that refuses connections for as long as this is open: bound, so nobody else gets it, not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"
