"""The control plane: one daemon thread per mesh, with one asyncio loop, for everything that is not a call.

Decides when that thread starts and ends, and that none of its jobs ends by an exception. What the jobs do is theirs:
they publish, and the request path only reads. The thread starts at the first use, ends with the mesh and within a
second of the interpreter's exit, and starts anew in a forked child that needs it.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import selectors
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakSet

import anyio

from meshlib.core.chance import Rng
from meshlib.fork import close_inherited, inherited, strays

Job = Callable[[], Awaitable[None]]

PATIENCE = 1.0
"""Seconds that `close` waits for the thread, and the interpreter for it at its exit."""

SHORTEST, LONGEST = 0.1, 10.0
"""Seconds from a job's failure to its next start: at the least, and at the most."""

DOUBLINGS = 10
"""Enough from the one to the other; thousands of them make a number that is none."""

logger = logging.getLogger("meshlib.control")


class Control:
    """The thread and its jobs.

    Args:
        rng: for the jitter of restarts.

    Attributes:
        starters: called on the loop when the thread starts; they `supervise` their jobs.
        failures: how often each job has failed.
    """

    def __init__(self, rng: Rng) -> None:
        self.starters: list[Callable[[Control], object]] = []
        self.failures: Counter[str] = Counter()
        self._rng = rng
        self._run: _Run | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        inherited.add(self)
        _controls.add(self)

    def ensure(self) -> bool:
        """Start the thread unless it runs; from any thread. Returns False if that cannot be any more."""
        with self._lock:
            return self._running() is not None

    def post(self, work: Callable[[], object], *, start: bool = True) -> bool:
        """Have a function called on the loop; from any thread.

        Args:
            work: it.
            start: whether the thread is started for that, unless it runs.

        Returns:
            False if it will not be called: the thread does not run, or cannot any more.
        """
        with self._lock:
            run = self._running() if start else self._run
            return run is not None and run.post(work)

    def close(self, patience: float = PATIENCE) -> None:
        """Stop the jobs and the thread, and wait for its end, at most `patience` seconds; from any thread."""
        if (thread := self.end()) is not None and thread is not threading.current_thread():
            thread.join(patience)

    async def aclose(self) -> None:
        """See `close`; on asyncio and trio."""
        if (thread := self.end()) is not None:
            with anyio.move_on_after(PATIENCE):
                while thread.is_alive():  # noqa: ASYNC110  # a thread that joined it would itself outlive this
                    await anyio.sleep(0.005)

    def end(self) -> threading.Thread | None:
        """Have the jobs and the thread end soon; returns the thread, if there is one."""
        with self._lock:
            self._is_closed = True
            run, self._run = self._run, None
        return None if run is None else run.stop()

    def reopen(self) -> None:
        """Let the thread start again."""
        self._is_closed = False

    def supervise(self, name: str, job: Job) -> asyncio.Task[None]:
        """Run a job on the loop, and run it again when it fails; only on the loop. Cancel the task to end it."""
        return asyncio.get_running_loop().create_task(self._supervised(name, job), name=f"meshlib: {name}")

    def forget(self) -> None:
        """After a fork, in the child: the thread is the parent's alone."""
        self._lock = threading.Lock()
        run, self._run = self._run, None
        if run is not None:
            run.forget()

    def _running(self) -> _Run | None:
        if self._is_closed or _is_exiting:
            return None
        if self._run is None:
            self._run = _Run(self._begin)
        return self._run

    def _begin(self) -> None:
        for start in self.starters:
            start(self)

    async def _supervised(self, name: str, job: Job) -> None:
        said: set[str] = set()
        failed = 0
        while True:
            try:
                return await job()
            except (Exception, asyncio.CancelledError, SystemExit, KeyboardInterrupt) as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                failed += 1
                self.failures[name] += 1
                if type(error).__name__ not in said:
                    said.add(type(error).__name__)
                    logger.exception("%s failed; it is started again", name)
            longest = min(LONGEST, SHORTEST * 2 ** min(failed, DOUBLINGS))
            await asyncio.sleep(SHORTEST + self._rng.random() * (longest - SHORTEST))


class _Run:
    """One life of the thread."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin
        self._selector = selectors.DefaultSelector()
        self._loop = _Loop(self._selector)
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._main, name="meshlib-control", daemon=True)
        self._thread.start()

    def post(self, work: Callable[[], object]) -> bool:
        """Have a function called on the loop; False if that has ended already."""
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:
            return False
        return True

    def stop(self) -> threading.Thread:
        """Have it end soon."""
        self.post(self._stopped.set)
        return self._thread

    def forget(self) -> None:
        """After a fork, in the child: close the sockets without a word to anybody."""
        # The objects stay: their finalizers would close numbers that are somebody else's by then.
        strays.append(self)
        for key in list((self._selector.get_map() or {}).values()):
            close_inherited(key.fd)
        self._selector.close()

    def _main(self) -> None:
        self._loop.set_default_executor(_Aside())
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._begin()
        await self._stopped.wait()
        jobs = asyncio.all_tasks() - {asyncio.current_task()}
        for job in jobs:
            job.cancel()
        if jobs:
            await asyncio.wait(jobs, timeout=PATIENCE / 2)


class _Loop(asyncio.SelectorEventLoop):
    """A loop whose end waits for no thread, and starts none, which Python forbids at its exit."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There is nothing to shut down: see `_Aside`."""


class _Aside(ThreadPoolExecutor):
    """Runs what would block the loop, such as `getaddrinfo`, in daemon threads: the interpreter's exit waits for no one
    else's, and neither does the end of the loop."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # it is for whoever waits, as with any executor
                future.set_exception(error)

        try:
            threading.Thread(target=work, name="meshlib-aside", daemon=True).start()
        except RuntimeError:
            if threading.main_thread().is_alive():
                raise
            work()  # Python starts no threads at its exit, and by then there is nothing left to hold up
        return future


_controls: WeakSet[Control] = WeakSet()
_is_exiting = False


@atexit.register
def _exit() -> None:
    global _is_exiting
    _is_exiting = True
    threads = [thread for control in list(_controls) if (thread := control.end()) is not None]
    until = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
