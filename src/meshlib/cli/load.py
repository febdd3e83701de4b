"""Making the calls of the demo, through whichever client, and writing down how each of them went.

Decides how calls are spread over threads or tasks, and that a call at which a fault is due waits for it. It runs in
threads of its own and leaves the main one to faults, screen and signals. It never judges a run; see
`meshlib.cli.verdict`.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import httpx

from meshlib.cli.faults import Step
from meshlib.core.report import report
from meshlib.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Visit:
    """One attempt: its endpoint, when it was started, and whether it was a breaker's probe."""

    endpoint: str
    started: float
    is_probe: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """How one call went.

    Attributes:
        started: on the monotonic clock.
        seconds: how long it took.
        failure: the exception's class or the status, None if it went well.
        visits: its attempts.
    """

    started: float
    seconds: float
    failure: str | None
    visits: tuple[Visit, ...]


Result = httpx.Response | Exception


@dataclass(frozen=True, slots=True)
class Way:
    """One way to make the calls.

    Attributes:
        client, async_client: open a client.
        url: of the call of a number.
        visits: the attempts of a call, from its number, its start and its result.
    """

    client: Callable[[], httpx.Client]
    async_client: Callable[[], httpx.AsyncClient]
    url: Callable[[int], str]
    visits: Callable[[int, float, Result], tuple[Visit, ...]]


def through_mesh(mesh: Mesh, service: str) -> Way:
    """Calls to a service of a mesh."""

    def visits(number: int, started: float, result: Result) -> tuple[Visit, ...]:
        attempts = report(result).attempts
        return tuple(Visit(str(each.endpoint), each.started, each.why == "probe") for each in attempts)

    return Way(
        client=lambda: mesh.client(service),
        async_client=lambda: mesh.async_client(service),
        url=lambda number: f"http://{service}/{number}",
        visits=visits,
    )


def through_httpx(addresses: Sequence[str], timeout: float) -> Way:
    """Calls without a mesh: the caller goes round the addresses, and httpx has its defaults but for the timeout."""

    def address(number: int) -> str:
        return addresses[number % len(addresses)]

    # A proxy named by the environment would stand between this side, and only this one, and the upstreams.
    return Way(
        client=lambda: httpx.Client(timeout=timeout, trust_env=False),
        async_client=lambda: httpx.AsyncClient(timeout=timeout, trust_env=False),
        url=lambda number: f"http://{address(number)}/{number}",
        visits=lambda number, started, result: (Visit(address(number), started),),
    )


class Load:
    """The calls of one run, made in the background.

    Args:
        way: how they are made.
        calls: how many.
        concurrency: how many at a time.
        steps: the faults; the call at whose number one is due waits until `done` is said of it.
        is_sync: threads that share an `httpx.Client`, instead of tasks that share an `httpx.AsyncClient`.

    Attributes:
        records: how the calls went that are over, in order of their ends.
        due: faults whose call has come.
    """

    def __init__(self, way: Way, *, calls: int, concurrency: int, steps: Sequence[Step], is_sync: bool) -> None:
        self.records: list[Record] = []
        self.due: queue.SimpleQueue[Step] = queue.SimpleQueue()
        self._way = way
        self._concurrency = concurrency
        self._is_sync = is_sync
        self._numbers = iter(range(calls))
        self._steps = {step.at: step for step in steps}
        self._gates: dict[int, Future[None]] = {step.at: Future() for step in steps}
        self._is_stopped = False
        self._everything: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None
        self._thread = ThreadPoolExecutor(1, "load")
        self._run: Future[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._run = self._thread.submit(self._run_sync if self._is_sync else self._run_async)

    def is_over(self) -> bool:
        """Whether all calls are made."""
        return self._run is not None and self._run.done()

    def done(self, step: Step) -> None:
        """A fault has been done: its call may be made."""
        self._gates[step.at].set_result(None)

    def stop(self) -> None:
        """Make no further calls; those of tasks are cancelled, those of threads go on to their end."""
        self._is_stopped = True
        for gate in self._gates.values():
            gate.cancel()
        if self._everything is not None:
            loop, task = self._everything
            with suppress(RuntimeError):  # the loop may have ended by itself
                loop.call_soon_threadsafe(task.cancel)

    def join(self) -> None:
        """Wait for the end.

        Raises:
            Exception: what went wrong in making the calls, other than their own failures.
        """
        self._thread.shutdown()
        if self._run is not None and not self._is_stopped:
            self._run.result()

    def _run_sync(self) -> None:
        with self._way.client() as client, ThreadPoolExecutor(self._concurrency, "caller") as callers:
            workers = [callers.submit(self._work, client) for _ in range(self._concurrency)]
        for worker in workers:
            worker.result()

    def _run_async(self) -> None:
        asyncio.run(self._spread())

    async def _spread(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._everything = (asyncio.get_running_loop(), task)
        async with self._way.async_client() as client, asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._work_async(client))

    def _work(self, client: httpx.Client) -> None:
        while (number := self._take()) is not None:
            if (gate := self._gate(number)) is not None:
                try:
                    gate.result()
                except CancelledError:
                    return
            started = time.monotonic()
            try:
                result: Result = client.get(self._way.url(number))
            except Exception as error:  # whatever it is, the call has failed, which is what is counted
                result = error
            self._record(number, started, result)

    async def _work_async(self, client: httpx.AsyncClient) -> None:
        while (number := self._take()) is not None:
            if (gate := self._gate(number)) is not None:
                await asyncio.wrap_future(gate)
            started = time.monotonic()
            try:
                result: Result = await client.get(self._way.url(number))
            except Exception as error:  # see `_work`
                result = error
            self._record(number, started, result)

    def _take(self) -> int | None:
        return None if self._is_stopped else next(self._numbers, None)

    def _gate(self, number: int) -> Future[None] | None:
        if (step := self._steps.get(number)) is not None:
            self.due.put(step)
        return self._gates.get(number)

    def _record(self, number: int, started: float, result: Result) -> None:
        seconds = time.monotonic() - started
        failure = type(result).__name__ if isinstance(result, Exception) else _bad_status(result)
        self.records.append(Record(started, seconds, failure, self._way.visits(number, started, result)))


def _bad_status(response: httpx.Response) -> str | None:
    return None if response.is_success else str(response.status_code)
