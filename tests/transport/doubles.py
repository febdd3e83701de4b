"""Inner transports that answer as they are told, and a body that knows what was done with it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import httpx

from meshlib import Endpoint

Answer = Callable[[httpx.Request], httpx.Response]


class Both(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """A transport of both colours that answers as it is told, and remembers what it was asked.

    Args:
        endpoint: whose it is.
        answer: what it raises is raised. Default 200 and the endpoint's name.
        hang: whether the async side never answers, which the sync side cannot.
    """

    def __init__(self, endpoint: Endpoint, answer: Answer | None = None, hang: bool = False) -> None:
        self.endpoint = endpoint
        self.requests: list[httpx.Request] = []
        self.cancelled = self.closed = 0
        self._answer = answer or (lambda request: httpx.Response(200, text=str(endpoint)))
        self._hang = hang

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self._answer(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        with anyio.move_on_after(0.01):  # a scope of its own, over more than one wait
            while True:
                await anyio.sleep(0.004)
        if self._hang:
            try:
                await anyio.sleep(60)
            except BaseException:
                self.cancelled += 1
                raise
        return self._answer(request)

    def close(self) -> None:
        self.closed += 1

    async def aclose(self) -> None:
        self.closed += 1


class Factory:
    """Makes a `Both` for each endpoint it is asked for, and keeps them in order.

    Args:
        answers: by address; the others answer 200.
        hang: see `Both`; all of them.
    """

    def __init__(self, answers: dict[str, Answer] | None = None, hang: bool = False) -> None:
        self.made: list[Both] = []
        self._answers = answers or {}
        self._hang = hang

    def __call__(self, endpoint: Endpoint) -> Both:
        self.made.append(Both(endpoint, self._answers.get(str(endpoint)), self._hang))
        return self.made[-1]

    @property
    def requests(self) -> list[httpx.Request]:
        return [request for each in self.made for request in each.requests]


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A streamed body of both colours that knows what was done with it.

    Args:
        chunks: what it brings; an exception is raised.
        interval: seconds before each chunk.
    """

    def __init__(self, *chunks: bytes | Exception, interval: float = 0.0) -> None:
        self.closed = 0
        self._chunks = chunks
        self._interval = interval

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            time.sleep(self._interval)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            await anyio.sleep(self._interval)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def close(self) -> None:
        self.closed += 1

    async def aclose(self) -> None:
        self.closed += 1
