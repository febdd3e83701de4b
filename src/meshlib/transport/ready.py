"""Waiting for the first answer of a service's resolver, in threads and on every kind of event loop.

Decides who is woken and when. It never asks a resolver: it has the control plane started, and is opened by it. Once
there is an answer, a call does not come here: its cluster points to no `Ready` any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import anyio

from meshlib.core.cluster import Cluster
from meshlib.fork import inherited
from meshlib.transport.loops import post, running_loop
from meshlib.transport.waits import within

Wake = Callable[[], object]


class Ready:
    """What a call waits for before a service has endpoints.

    Args:
        cluster: the service's live state; it leads calls here while `cluster.pending` is set.
        ensure: starts what asks the resolver, unless it runs; False if it cannot.
    """

    def __init__(self, cluster: Cluster, ensure: Callable[[], bool]) -> None:
        self._cluster = cluster
        self._ensure = ensure
        self._lock = threading.Lock()
        self._waiting: set[Wake] = set()
        self.forget()
        inherited.add(self)

    def open(self) -> None:
        """The answer is there; calls go on."""
        self._cluster.pending = None
        self._wake()

    def close(self) -> None:
        """No answer will come; until that changes, calls make do with what there is."""
        self._cluster.pending = self
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for wake in waiting:
            wake()

    def wait(self, left: float) -> None:
        """Block until there is an answer, or `left` seconds have passed, or it is clear that none will come."""
        event = threading.Event()
        if self._enter(event.set):
            try:
                event.wait(min(left, threading.TIMEOUT_MAX))
            finally:
                self._leave(event.set)

    async def wait_async(self, left: float) -> None:
        """See `wait`; cancelling it leaves nothing behind."""
        event = anyio.Event()
        wake = partial(post, running_loop(), event.set)
        if self._enter(wake):
            try:
                await within(left, event.wait())
            except TimeoutError:
                pass
            finally:
                self._leave(wake)

    def forget(self) -> None:
        """After a fork, in the child: the thread that asks is to be started, and nobody waits."""
        self._lock = threading.Lock()
        self._waiting = set()
        self._cluster.pending = self

    def _enter(self, wake: Wake) -> bool:
        """Whether there is something to wait for."""
        with self._lock:
            self._waiting.add(wake)
        is_running = self._ensure()
        if is_running and not self._cluster.is_known:
            return True
        if is_running:
            self._cluster.pending = None
        self._leave(wake)
        return False

    def _leave(self, wake: Wake) -> None:
        with self._lock:
            self._waiting.discard(wake)
