"""The clients that the requests of one process share.

Decides that there is one of each colour for a mesh's service, made when it is first asked for, and made anew when
somebody has closed it; and that it keeps no cookies, which would go from one user's request to the next one's. It never
decides when they are closed: the framework's lifecycle does, or the end of the process.
"""

from __future__ import annotations

import atexit
from http.cookiejar import DefaultCookiePolicy
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from meshlib.fork import inherited

if TYPE_CHECKING:
    import httpx

    from meshlib.mesh import Mesh

    Client = TypeVar("Client", httpx.Client, httpx.AsyncClient)


class SharedClients:
    """The clients of one mesh; from any thread.

    Args:
        mesh: makes them.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._sync: dict[str, httpx.Client] = {}
        self._async: dict[str, httpx.AsyncClient] = {}
        self._lock = Lock()
        inherited.add(self)

    def sync(self, service: str) -> httpx.Client:
        """The sync client of a service."""
        with self._lock:
            client = self._sync.get(service)
            if client is None or client.is_closed:
                client = self._sync[service] = _without_cookies(self._mesh.client(service))
            return client

    def asynchronous(self, service: str) -> httpx.AsyncClient:
        """The async client of a service."""
        with self._lock:
            client = self._async.get(service)
            if client is None or client.is_closed:
                client = self._async[service] = _without_cookies(self._mesh.async_client(service))
            return client

    def close(self) -> None:
        """Close the sync ones. Who asks again gets a new one."""
        _shared.pop(self._mesh, None)
        for client in list(self._sync.values()):
            client.close()

    async def aclose(self) -> None:
        """Close all of them."""
        self.close()
        for client in list(self._async.values()):
            await client.aclose()

    def forget(self) -> None:
        """After a fork, in the child: the lock may be held by a thread of the parent's."""
        self._lock = Lock()


def _without_cookies(client: Client) -> Client:
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return client


_shared: dict[Mesh, SharedClients] = {}


def shared_by(mesh: Mesh) -> SharedClients:
    """The clients that all who have this mesh share, until they are closed."""
    return _shared.get(mesh) or _shared.setdefault(mesh, SharedClients(mesh))


@atexit.register
def _exit() -> None:
    for clients in list(_shared.values()):
        clients.close()
