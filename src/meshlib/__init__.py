"""What a service mesh gives to outgoing HTTP calls, as a library.

    mesh = Mesh(Service("orders", ["10.0.0.1:8080", "10.0.0.2:8080"]))
    with mesh.client("orders") as client:
        client.get("/v1/orders/5")

A call goes to the best endpoint of the service that its URL names, and to another one when that breaks. Clients are
plain httpx clients. Everything here is public; everything else is the inside.
"""

from typing import TYPE_CHECKING, Any

from meshlib.core.balance.peak_ewma import PeakEwma
from meshlib.core.report import report
from meshlib.endpoint import Endpoint
from meshlib.errors import (
    ConfigError,
    DeadlineExceeded,
    IdentityError,
    MeshError,
    NoEndpoints,
    Overloaded,
    ResolveError,
    UnknownService,
)
from meshlib.mesh import Mesh
from meshlib.policy import TLS, Breaker, Budget, Connections, HealthCheck, Hedge, Limit, Retry, Throttle, Timeout
from meshlib.scope import deadline, options
from meshlib.service import Service

if TYPE_CHECKING:
    from meshlib.core.balance.hashing import ConsistentHash
    from meshlib.core.balance.least_request import LeastRequest
    from meshlib.core.balance.lottery import Random
    from meshlib.core.balance.round_robin import RoundRobin

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "Breaker",
    "Budget",
    "ConfigError",
    "Connections",
    "ConsistentHash",
    "DeadlineExceeded",
    "Endpoint",
    "HealthCheck",
    "Hedge",
    "IdentityError",
    "LeastRequest",
    "Limit",
    "Mesh",
    "MeshError",
    "NoEndpoints",
    "Overloaded",
    "PeakEwma",
    "Random",
    "ResolveError",
    "Retry",
    "RoundRobin",
    "Service",
    "Throttle",
    "Timeout",
    "UnknownService",
    "deadline",
    "options",
    "report",
]

_ROOMS = {
    "ConsistentHash": "hashing",
    "LeastRequest": "least_request",
    "Random": "lottery",
    "RoundRobin": "round_robin",
}
"""Balancers other than the default, which most programs do without."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        from importlib import import_module

        return getattr(import_module(f"meshlib.core.balance.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
