"""The mesh's own work on a call, part by part.

Decides how each part is run on its own. Parts reach into the inside of meshlib, as nothing else here does: when one is
renamed, so it is here. They need not add up to the tax: each is run over and over, from warm caches.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import timeit
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import httpx
from answering_server import ANSWER, BODY
from figure import Figure, microseconds
from paired import Sizes
from subject import SUBJECT, URL, Subject
from upstream import answering

from meshlib import Endpoint, LeastRequest, RoundRobin
from meshlib.core.call import Call
from meshlib.core.cluster import Cluster
from meshlib.core.report import Attempt
from meshlib.transport.binding import Answer
from meshlib.transport.body import RecordedBody
from meshlib.transport.connections import AsyncStacks, SyncStacks
from meshlib.transport.exchange import Exchange
from meshlib.transport.head import Fields, Head
from meshlib.transport.inner import InnerConnection
from meshlib.transport.network import Bounded
from meshlib.transport.router import Router
from meshlib.transport.stack import AsyncConnection, Connection, Stack
from meshlib.transport.sync import SyncReply

BALANCERS = (LeastRequest(), RoundRobin())
ENDPOINTS = (1, 10, 100, 1000)


def figures(sizes: Sizes) -> Iterator[Figure]:
    """Microseconds per run of a part."""
    for balancer in BALANCERS:
        for count in ENDPOINTS:
            core = _core(cluster_of(count, balancer))
            yield _cost(f"core, {type(balancer).__name__}, {count} endpoints", core, sizes)
    request = httpx.Client(trust_env=False).build_request("GET", URL)
    with answering(1) as addresses:
        cluster = cluster_of(1)
        cluster.publish(SUBJECT.service(addresses).resolver.endpoints, "static", time.monotonic())
        router = Router({cluster.service.name: cluster}, time.monotonic)
        yield _cost("exchange", lambda: router.exchange(request, RecordedBody), sizes)
        exchange = router.exchange(request, RecordedBody)
        attempt = exchange.begin(time.monotonic())
        assert attempt is not None
        yield _cost("request, for our own connections", lambda: exchange.head(attempt), sizes)
        inner = InnerConnection(None, time.monotonic, attempt.deadline)
        yield _cost("request, for an inner transport", lambda: inner.request(exchange, attempt), sizes)
        yield _cost("http, sync", _http(exchange, attempt), sizes)
        yield _cost("http, async", _async_http(exchange, attempt), sizes)
        yield _cost("reply", _reply(exchange, attempt), sizes)
        yield from _connections(exchange, attempt, sizes)


def cluster_of(count: int, balancer: Any = None) -> Cluster:
    """A service with so many endpoints; the default balancer unless told otherwise."""
    endpoints = [Endpoint(f"10.0.{number // 250}.{number % 250}", 80) for number in range(count)]
    cluster = Cluster(Subject(balancer).service(["10.0.0.0:80"]), Random(5))
    cluster.publish(endpoints, "static", 0.0)
    return cluster


def _core(cluster: Cluster) -> Callable[[], object]:
    """A call from its beginning to its end, as far as decisions go."""

    def run() -> None:
        call = Call(cluster, repeatable=True, deadline=31.0)
        attempt = call.begin(1.0)
        assert attempt is not None
        call.succeed(attempt, 1.001, 200, False)
        call.release(attempt, 1.002)

    return run


class Memory(Bounded):
    """A stream of either colour that has the upstream's answer ready."""

    def __init__(self, *, is_async: bool) -> None:
        super().__init__(time.monotonic)
        self.read, self.write = (self._aread, self._awrite) if is_async else (self._read, self._write)

    def get_extra_info(self, info: str) -> Any:
        return None

    def _read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return ANSWER

    def _write(self, buffer: bytes, timeout: float | None = None) -> None:
        pass

    async def _aread(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return ANSWER

    async def _awrite(self, buffer: bytes, timeout: float | None = None) -> None:
        pass


def _http(exchange: Exchange, attempt: Attempt) -> Callable[[], object]:
    """A request written and its response read, without a network."""
    stack = Stack(exchange.service, attempt.endpoint)
    connection = Connection(Memory(is_async=False), stack, 0.0)  # type: ignore[arg-type]

    def run() -> None:
        for _ in connection.send(exchange, attempt).body:
            pass
        connection.renew()

    return run


def _async_http(exchange: Exchange, attempt: Attempt) -> Callable[[], object]:
    stack = Stack(exchange.service, attempt.endpoint)
    connection = AsyncConnection(Memory(is_async=True), stack, 0.0, None)  # type: ignore[arg-type]

    async def send() -> None:
        async for _ in (await connection.send(exchange, attempt)).body:
            pass
        connection.renew()

    return lambda: _finish(send())


def _reply(exchange: Exchange, attempt: Attempt) -> Callable[[], object]:
    """A response's headers made into the caller's response, and ended."""
    stacks = SyncStacks(time.monotonic)
    stacks.put = lambda connection: None  # type: ignore[method-assign]  # measured on its own
    connection = stacks.take(exchange, attempt)
    headers = [(b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(BODY))]
    head = Head(b"1.1", 200, b"OK", Fields(headers))

    def run() -> None:
        attempt.is_over = False
        answer = Answer(head, (BODY,), connection.stream)
        reply = SyncReply(exchange, attempt, connection, answer, stacks)
        reply.response()
        reply.end()

    return run


def _connections(exchange: Exchange, attempt: Attempt, sizes: Sizes) -> Iterator[Figure]:
    stacks = SyncStacks(time.monotonic)
    yield _cost("connection, sync", lambda: stacks.put(stacks.take(exchange, attempt)), sizes)
    stacks.close()
    with asyncio.Runner() as runner:
        many = AsyncStacks(time.monotonic)

        async def take() -> None:
            many.put(await many.take(exchange, attempt))

        runner.run(take())
        yield _cost("connection, async", lambda: _finish(take()), sizes, within=runner)
        runner.run(many.aclose())


def _finish(coroutine: Any) -> None:
    """Run a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("it waited")


def _cost(part: str, run: Callable[[], object], sizes: Sizes, within: asyncio.Runner | None = None) -> Figure:
    async def inside() -> list[float]:
        return _timed(run, sizes)

    values = _timed(run, sizes) if within is None else within.run(inside())
    return microseconds(f"parts: {part}", (statistics.median(values), min(values), values))


def _timed(run: Callable[[], object], sizes: Sizes) -> list[float]:
    timer = timeit.Timer(run, timer=time.process_time)
    number = min(sizes.most, max(1, int(sizes.seconds / 10 / (timer.timeit(100) / 100))))
    return [seconds / number * 1e6 for seconds in timer.repeat(sizes.rounds, number)]
