"""Requests to hosts that are no services, for a mesh that lets them through (rule S1).

Decides which requests those are, and sends them through one plain httpx transport for each client, made at the first of
them: no endpoint, no retry, no header of ours, and nothing of the environment. A request that names a service, however
oddly, never goes this way.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from types import AsyncGeneratorType
from typing import TYPE_CHECKING, Any

import httpx

from meshlib.errors import DeadlineExceeded
from meshlib.fork import inherited, strays
from meshlib.scope import current_scope
from meshlib.transport.aio import AsyncMeshTransport
from meshlib.transport.loops import loops, running_loop, spawn
from meshlib.transport.router import Router
from meshlib.transport.sync import MeshTransport
from meshlib.transport.trust import trusting_as_httpx
from meshlib.transport.waits import within

PATIENCE = 5.0
"""Seconds that each operation may take when the request says nothing of it: httpx's own default. The clients of a mesh
say nothing, since a service has its `Timeout`, but these hosts have none."""

EARLY = 0.01
"""Seconds by which the timer of an event loop may be early: some count in milliseconds."""

PASSED = "the deadline has passed"


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

    if not TYPE_CHECKING:
        __getattr__ = MeshTransport.__getattr__  # which says which client takes what

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """See `MeshTransport.handle_request`."""
        if self._router.is_ours(request.url):
            return self._mesh.handle_request(request)
        with self._making:
            if self._plain is None:
                self._plain = httpx.HTTPTransport(verify=trusting_as_httpx(), trust_env=False)
            plain = self._plain
        bounded, deadline = _bounded(request, Body)
        response = plain.handle_request(bounded)
        if deadline < math.inf:
            response.stream = Body(response.stream, deadline)
        return response

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

    if not TYPE_CHECKING:
        __getattr__ = AsyncMeshTransport.__getattr__

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
        bounded, deadline = _bounded(request, AsyncBody)
        response = await plain.handle_async_request(bounded)
        if deadline < math.inf:
            response.stream = AsyncBody(response.stream, deadline)
        return response

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


class Body(httpx.SyncByteStream):
    """A body, either way, that is given up between two chunks when the deadline has passed.

    Args:
        stream: the caller's, or the answer's.
        deadline: of the block around the call.
    """

    def __init__(self, stream: Any, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            _left(self._deadline)
            yield chunk

    def close(self) -> None:
        """The caller is done with it."""
        self._stream.close()


class AsyncBody(httpx.AsyncByteStream):
    """See `Body`. No generator: one that is left half-way is cleaned up by the event loop, which trio minds."""

    def __init__(self, stream: Any, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline
        self._chunks: Any = None

    def __aiter__(self) -> AsyncBody:
        self._chunks = aiter(self._stream)
        return self

    async def __anext__(self) -> bytes:
        left = _left(self._deadline)
        try:
            chunk: bytes = await within(left, anext(self._chunks))
        except TimeoutError as error:
            if self._deadline - time.monotonic() > EARLY:
                raise  # the source's own
            raise DeadlineExceeded(PASSED) from error
        return chunk

    async def aclose(self) -> None:
        """The caller is done with it."""
        if isinstance(self._chunks, AsyncGeneratorType) and not self._chunks.ag_running:
            await self._chunks.aclose()
        await self._stream.aclose()


class Bounds(dict[str, float]):
    """The timeouts of a request. httpcore asks for one before whatever it does, and gets what is left by then."""

    def __init__(self, timeouts: dict[str, float], deadline: float) -> None:
        super().__init__(timeouts)
        self._deadline = deadline

    def get(self, name: str, default: Any = None) -> Any:
        """Seconds that the next operation may take.

        Raises:
            DeadlineExceeded: if there are none.
        """
        return min(self[name], _left(self._deadline))


def _left(deadline: float) -> float:
    left = math.inf if deadline == math.inf else deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded(PASSED)
    return left


def _bounded(request: httpx.Request, body: Any) -> tuple[httpx.Request, float]:
    """The request, with a bound for every operation, and the deadline of the block around it, which bounds them all.

    Raises:
        DeadlineExceeded: if it has passed: then nothing is sent either.
    """
    deadline = current_scope().deadline
    _left(deadline)
    given = request.extensions.get("timeout") or {}
    each = ((name, given.get(name)) for name in ("connect", "read", "write", "pool"))
    bounds = {name: PATIENCE if bound is None else bound for name, bound in each}
    # Another one, since httpx makes the request of a redirect from this, and it may lead to a service.
    extensions = {**request.extensions, "timeout": bounds if deadline == math.inf else Bounds(bounds, deadline)}
    stream = request.stream if deadline == math.inf else body(request.stream, deadline)
    moved = httpx.Request(request.method, request.url, headers=request.headers, stream=stream, extensions=extensions)
    return moved, deadline
