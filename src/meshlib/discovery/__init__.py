"""Resolvers: which endpoints a service has.

A resolver answers with a whole set of endpoints, off the request path. It never judges whether one of them is well, and
it keeps no last good answer: whoever watches it does (`meshlib.discovery.watch`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshlib.discovery.consul import Consul
    from meshlib.discovery.dns import Dns, DnsSrv
    from meshlib.discovery.failover import Failover
    from meshlib.discovery.file import File
    from meshlib.discovery.resolver import Resolution, Resolver
    from meshlib.discovery.static import Static

__all__ = ["Consul", "Dns", "DnsSrv", "Failover", "File", "Resolution", "Resolver", "Static"]

_ROOMS = {"DnsSrv": "dns", "Resolution": "resolver"}
"""Where a name is found, if not in the module that is called like it."""


def __getattr__(name: str) -> Any:
    # The resolvers bring their clients along (dnspython, httpx), and most programs use one of them.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"meshlib.discovery.{_ROOMS.get(name, name.lower())}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
