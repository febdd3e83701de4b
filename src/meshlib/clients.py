"""The httpx clients that a mesh makes: what they are given, and those that decorated functions and frameworks share.

Decides which settings of httpx go with a mesh, and refuses the others; and that there is one shared client for each
service and colour, made when it is first asked for, and made anew once somebody has closed it. Shared ones keep no
cookies, which would go from one caller's call to the next one's, and are closed with the mesh, or at the end of the
process. It makes no transport, and knows nothing of the functions that are given a client.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Protocol
from weakref import WeakSet

import httpx

from meshlib.fork import inherited

NOT_FOR_CLIENTS = {
    "transport": "the mesh is its transport; for another one under it see Mesh(inner=...)",
    "proxy": "calls would go past the mesh",
    "verify": "TLS is a setting of the service, Service(tls=TLS(verify=...))",
    "cert": "TLS is a setting of the service, Service(tls=TLS(cert=...))",
    "limits": "connections are a setting of the service, Service(connections=Connections(...))",
    "http2": "a mesh speaks HTTP/1.1",
    "http1": "a mesh speaks HTTP/1.1",
}
"""What `httpx.Client` takes that would go past the mesh, or have no effect without a word."""


def settings(service: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """What httpx makes a client of, but for its transport.

    Raises:
        TypeError: for a keyword that would go past the mesh, or have no effect.
    """
    for name in given.keys() & NOT_FOR_CLIENTS.keys():
        raise TypeError(f"a mesh's client takes no {name!r}: {NOT_FOR_CLIENTS[name]}")
    base = {} if service is None else {"base_url": f"http://{service}"}
    # The environment's proxies and credentials are for the world outside; a mesh knows its endpoints.
    return {"timeout": None, "trust_env": False, **base, **given}


class Transports(Protocol):
    """What a mesh makes clients by."""

    def transport(self) -> httpx.BaseTransport: ...

    def async_transport(self) -> httpx.AsyncBaseTransport: ...

    def _cluster(self, service: str, /) -> object: ...


class SharedClients:
    """The shared clients of one mesh; from any thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bool], tuple[Any, Any]] = {}
        self.forget()
        inherited.add(self)

    def forget(self) -> None:
        """After a fork, in the child: nobody holds the lock. The clients see to their connections themselves."""
        self._lock = threading.Lock()

    def take(self, mesh: Transports, service: str, is_async: bool) -> Any:
        """The client of a service; a new one if somebody has closed the last.

        Raises:
            UnknownService: if the service is not declared.
        """
        key = service, is_async
        known = self._known.get(key)
        if known is None or known[0].is_closed:
            with self._lock:
                known = self._known.get(key)
                if known is None or known[0].is_closed:
                    known = self._known[key] = _made(mesh, service, is_async)
                    _in_use.add(self)
        return known[0]

    def close(self) -> None:
        """Close all, also from outside of the event loops that they were used on."""
        with contextlib.ExitStack() as stack:
            for (_, is_async), (client, transport) in self._taken():
                stack.callback(transport.shut if is_async else client.close)

    async def aclose(self) -> None:
        """Close all."""
        async with contextlib.AsyncExitStack() as stack:
            for (_, is_async), (client, _) in self._taken():
                if is_async:
                    stack.push_async_callback(client.aclose)
                else:
                    stack.callback(client.close)

    def _taken(self) -> list[tuple[tuple[str, bool], tuple[Any, Any]]]:
        with self._lock:
            known, self._known = self._known, {}
        return list(known.items())


def _made(mesh: Transports, service: str, is_async: bool) -> tuple[Any, Any]:
    from meshlib.transport.cookies import spare

    mesh._cluster(service)
    client: httpx.Client | httpx.AsyncClient
    transport: Any
    if is_async:
        transport = mesh.async_transport()
        client = httpx.AsyncClient(transport=transport, **settings(service, {}))
    else:
        transport = mesh.transport()
        client = httpx.Client(transport=transport, **settings(service, {}))
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    spare(client)
    return client, transport


_in_use: WeakSet[SharedClients] = WeakSet()


@atexit.register
def _exit() -> None:
    for clients in list(_in_use):
        clients.close()
