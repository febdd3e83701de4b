"""`meshlib demo`: the same calls with the same faults, through a mesh and through plain httpx.

Decides the course of the demo: processes, two runs, verdict, exit status; and that every process it started ends with
it, however it ends. It never makes a call itself: those are made in threads of `meshlib.cli.load`, so that this one is
free for faults, screen and signals.
"""

from __future__ import annotations

import json
import logging
import queue
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from meshlib.cli import verdict
from meshlib.cli.faults import Stage, Step, schedule
from meshlib.cli.load import Load, Way, through_httpx, through_mesh
from meshlib.cli.progress import Progress
from meshlib.cli.screen import Screen, screen
from meshlib.core.snapshot import ServiceSnapshot
from meshlib.mesh import Mesh
from meshlib.policy import Timeout
from meshlib.service import Service
from meshlib.testing.upstream import upstreams

SERVICE = "orders"
ATTEMPT = 0.5
LENGTH = 6.2
"""Seconds that a run should take if no call had to wait: long enough for a breaker to open, be probed and close."""

SHORTEST_DELAY, LONGEST_DELAY = 0.001, 0.15
"""Bounds for the upstreams' seconds per answer, which make up that length: with more, healthy answers look slow."""

TICK = 0.02

_SILENT = logging.NullHandler()
"""The screen shows what becomes of endpoints; the log would say it amid that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is asked for, and what follows from it."""

    calls: int
    concurrency: int
    is_sync: bool

    @property
    def delay(self) -> float:
        """Seconds that an upstream takes for an answer."""
        return min(max(LENGTH * self.concurrency / self.calls, SHORTEST_DELAY), LONGEST_DELAY)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The faults."""
        return schedule(self.calls)

    def __str__(self) -> str:
        mode = "threads" if self.is_sync else "async"
        return f"{self.calls:,} GETs, {self.concurrency} at a time ({mode}), {self.delay * 1000:.0f} ms per answer"


def run(*, calls: int, concurrency: int, is_sync: bool, wants_json: bool) -> int:
    """Run the demo.

    Args:
        calls: how many, in each of the two runs.
        concurrency: how many at a time.
        is_sync: threads instead of tasks.
        wants_json: one JSON document on standard output instead of a table.

    Returns:
        The exit status: 0 if nothing failed through the mesh, else 1.
    """
    if not hasattr(signal, "SIGSTOP"):
        print("meshlib demo: this system has no SIGSTOP, which the demo needs", file=sys.stderr)
        return 1
    logging.getLogger("meshlib.breaker").addHandler(_SILENT)
    return _compare(Plan(calls=calls, concurrency=concurrency, is_sync=is_sync), wants_json=wants_json)


def _compare(plan: Plan, *, wants_json: bool) -> int:
    with upstreams(3, delay=plan.delay) as processes:
        addresses = [upstream.address for upstream in processes]
        with Mesh(Service(SERVICE, addresses, timeout=Timeout(attempt=ATTEMPT, total=5))) as mesh:
            stage = Stage(processes)
            with screen(is_silent=wants_json) as shown:
                mesh_tally = _made(plan, f"mesh: {plan}", through_mesh(mesh, SERVICE), stage, shown, mesh)
            snapshot = mesh.snapshot()
        stage = Stage(processes)
        with screen(is_silent=wants_json) as shown:
            plain_tally = _made(plan, f"plain httpx: {plan}", through_httpx(addresses, ATTEMPT), stage, shown, None)
    if wants_json:
        print(json.dumps(_document(plan, stage, mesh_tally, plain_tally, snapshot), indent=2))
    else:
        print("", *verdict.lines(mesh_tally, plain_tally), sep="\n", flush=True)
    return verdict.status(mesh_tally)


def _made(plan: Plan, title: str, way: Way, stage: Stage, shown: Screen, mesh: Mesh | None) -> verdict.Tally:
    """Make one run."""
    load = Load(way, calls=plan.calls, concurrency=plan.concurrency, steps=plan.steps, is_sync=plan.is_sync)
    progress = Progress(title, plan.calls, stage, load.records)
    began = time.monotonic()

    def show() -> None:
        snapshot = mesh.snapshot()[SERVICE] if mesh else None
        shown.show(progress.frame(time.monotonic() - began, snapshot))

    try:
        load.start()
        _direct(load, stage, shown.every, show)
    except BaseException:
        load.stop()
        stage.kill()
        raise
    finally:
        load.join()
    show()
    return verdict.tally(load.records, stage.victim, stage.death)


def _direct(load: Load, stage: Stage, every: float, show: Callable[[], None]) -> None:
    """Do every fault when its call has come, and show how things stand, until all calls are made."""
    waiting: list[Step] = []
    show_at = 0.0
    while not load.is_over():
        with suppress(queue.Empty):
            waiting.append(load.due.get(timeout=TICK))
        for step in [each for each in waiting if stage.is_ready(each)]:
            stage.perform(step)
            load.done(step)
            waiting.remove(step)
            show_at = 0.0
        if time.monotonic() >= show_at:
            show()
            show_at = time.monotonic() + every


def _document(
    plan: Plan,
    stage: Stage,
    mesh: verdict.Tally,
    plain: verdict.Tally,
    snapshot: dict[str, ServiceSnapshot],
) -> dict[str, Any]:
    return {
        "calls": plan.calls,
        "concurrency": plan.concurrency,
        "mode": "sync" if plan.is_sync else "async",
        "delay": plan.delay,
        "victim": stage.victim,
        "faults": [{"at": step.at, "act": step.act, "endpoint": stage.target(step.act)} for step in plan.steps],
        "mesh": mesh.to_dict(),
        "plain": {**plain.to_dict(), "retries": None, "probes": None, "unpaid": None},
        "verdict": verdict.sentence(mesh, plain),
        "snapshot": {name: service.to_dict() for name, service in snapshot.items()},
    }
