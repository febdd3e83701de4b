"""The clients that all of a mesh's functions and requests share: of decorated functions, and of the frameworks.

Decides that there is one for each service and colour, made when it is first asked for, and made anew once somebody has
closed it; and that it keeps no cookies, which would go from one caller's call to the next one's. They are closed with
the mesh, or at the end of the process.
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


class Transports(Protocol):
    """What a mesh makes clients by."""

    def transport(self) -> httpx.BaseTransport: ...

    def async_transport(self) -> httpx.AsyncBaseTransport: ...

    def _cluster(self, service: str, /) -> object: ...


class SharedClients:
    """The clients of one mesh; from any thread."""

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
    settings: dict[str, Any] = {"base_url": f"http://{service}", "timeout": None, "trust_env": False}
    client: httpx.Client | httpx.AsyncClient
    transport: Any
    if is_async:
        transport = mesh.async_transport()
        client = httpx.AsyncClient(transport=transport, **settings)
    else:
        transport = mesh.transport()
        client = httpx.Client(transport=transport, **settings)
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    spare(client)
    return client, transport


_in_use: WeakSet[SharedClients] = WeakSet()


@atexit.register
def _exit() -> None:
    for clients in list(_in_use):
        clients.close()
