"""Requests to hosts that are no services, for a mesh that lets them through (rule S1).

Decides which requests those are, and sends them through one plain httpx transport for each client, made at the first of
them: no endpoint, no retry, no header of ours, and nothing of the environment. A request that names a service, however
oddly, never goes this way.
"""

from __future__ import annotations

import math
import threading
import time

import httpx

from meshlib.errors import DeadlineExceeded
from meshlib.fork import inherited, strays
from meshlib.scope import current_scope
from meshlib.transport.aio import AsyncMeshTransport
from meshlib.transport.loops import loops, running_loop, spawn
from meshlib.transport.router import Router
from meshlib.transport.sync import MeshTransport
from meshlib.transport.trust import trusting_as_httpx

PATIENCE = 5.0
"""Seconds that each operation may take when the request says nothing of it: httpx's own default. The clients of a mesh
say nothing, since a service has its `Timeout`, but these hosts have none."""


class PassingTransport(httpx.BaseTransport):
    """Sends requests for services through the mesh, and others as httpx would.

    Args:
        router: finds the services.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._mesh = MeshTransport(router)
        self._making = threading.Lock()
        self._plain: httpx.HTTPTransport | None = None
        inherited.add(self)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """See `MeshTransport.handle_request`."""
        if self._router.is_ours(request.url):
            return self._mesh.handle_request(request)
        with self._making:
            if self._plain is None:
                self._plain = httpx.HTTPTransport(verify=trusting_as_httpx(), trust_env=False)
            plain = self._plain
        return plain.handle_request(_bounded(request))

    def close(self) -> None:
        """Close every idle connection."""
        self._mesh.close()
        plain, self._plain = self._plain, None
        if plain is not None:
            plain.close()

    def forget(self) -> None:
        """After a fork, in the child: the connections are the parent's."""
        self._making = threading.Lock()
        self._plain = None


class AsyncPassingTransport(httpx.AsyncBaseTransport):
    """See `PassingTransport`. Sockets do not move between event loops, so each has a plain transport of its own."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._mesh = AsyncMeshTransport(router)
        self._plain: dict[object, httpx.AsyncHTTPTransport] = {}
        inherited.add(self)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See `AsyncMeshTransport.handle_async_request`."""
        if self._router.is_ours(request.url):
            return await self._mesh.handle_async_request(request)
        loop = running_loop()
        plain = self._plain.get(loop)
        if plain is None:
            await loops.streams_of(loop)  # from now on it is known whether that loop is over
            for other in [each for each in self._plain if loops.is_over(each)]:
                self._plain.pop(other, None)
            made = httpx.AsyncHTTPTransport(verify=trusting_as_httpx(), trust_env=False)
            plain = self._plain.setdefault(loop, made)
        return await plain.handle_async_request(_bounded(request))

    async def aclose(self) -> None:
        """Close every idle connection."""
        await self._mesh.aclose()
        here = running_loop()
        while self._plain:
            loop, plain = self._plain.popitem()
            if loop == here:
                await plain.aclose()
            else:
                spawn(loop, plain.aclose)

    def shut(self) -> None:
        """See `aclose`; from any thread, on whichever loops the connections are."""
        self._mesh.shut()
        while self._plain:
            loop, plain = self._plain.popitem()
            spawn(loop, plain.aclose)

    def forget(self) -> None:
        """After a fork, in the child: the connections, and the loops they are on, are the parent's."""
        strays.append(self._plain)
        self._plain = {}


def _bounded(request: httpx.Request) -> httpx.Request:
    """The request, with a bound for every operation, at most what is left of the `deadline` block around it.

    Raises:
        DeadlineExceeded: if nothing is: then nothing is sent either.
    """
    deadline = current_scope().deadline
    left = math.inf if deadline == math.inf else deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("the deadline had passed before the call")
    given = request.extensions.get("timeout") or {}
    bounds = {name: given.get(name) for name in ("connect", "read", "write", "pool")}
    bounds = {name: min(PATIENCE if bound is None else bound, left) for name, bound in bounds.items()}
    # Another one, since httpx makes the request of a redirect from this, and it may lead to a service.
    extensions = {**request.extensions, "timeout": bounds}
    return httpx.Request(
        request.method, request.url, headers=request.headers, stream=request.stream, extensions=extensions
    )
