"""meshlib beside an Envoy sidecar: the same calls under the same faults, once by each.

Decides the load, the faults, and what a turn is. Each turn has upstreams, a client and, if it is Envoy's, an Envoy of
its own, so that nobody starts with what an earlier fault has left. The CPU time that counts is that of this process,
which makes the calls, and that of Envoy's; the upstreams' is never counted. How Envoy is set is decided by `sidecar`,
what the figures say by `standings`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from machine import described
from sidecar import ATTEMPT, CONNECT, MOST_RETRIES, OUTLIERS, RETRY_POLICY, TOTAL, Absent, program, sidecar
from standings import ENVOY, MESHED, NO_FAULT, PLAIN, aligned, markdown, told
from subject import PATH, SERVICE

from meshlib import Mesh, Service, Timeout
from meshlib.testing import Upstream, upstreams

CALLS, CONCURRENCY, ROUNDS = 2000, 16, 5
DELAY = 0.025
"""Seconds an upstream takes to answer: with less, plain httpx at 16 at a time has no core left to wait on."""

SLOW = 0.45
"""Seconds from which on a call is slow: less than one attempt that times out, more than all else."""

WARM_UP = 160
"""Calls before anything is counted, for connections to be opened."""

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "benchmarks" / "sidecar.json", DOCS / "comparison.md"
BEGIN, END = "<!-- measured: by `nox -s sidecar -- --keep` -->\n\n", "\n\n<!-- end of what was measured -->"

FAULTS: dict[str, Callable[[Upstream], None]] = {
    NO_FAULT: lambda victim: None,
    "kill": Upstream.kill,
    "hang": Upstream.suspend,
    "503": lambda victim: victim.script(then={"status": 503}),
}


@dataclass(frozen=True)
class Caller:
    """Somebody's way to make a call, and the CPU seconds that its sidecar has burned so far."""

    client: httpx.AsyncClient
    url: str
    sidecar_seconds: Callable[[], float] = lambda: 0.0


@dataclass
class Tally:
    """What the calls brought, and how many seconds each took."""

    failed: int = 0
    seconds: list[float] = field(default_factory=list)


@contextlib.asynccontextmanager
async def plain(addresses: Sequence[str]) -> AsyncIterator[Caller]:
    """httpx straight to one endpoint: with three it would have more connections than it keeps, and pay for it."""
    async with httpx.AsyncClient(trust_env=False, timeout=TOTAL + CONNECT) as client:
        yield Caller(client, f"http://{addresses[0]}{PATH}")


@contextlib.asynccontextmanager
async def through_envoy(addresses: Sequence[str]) -> AsyncIterator[Caller]:
    """The same client to a sidecar, whose timeouts end before the client's."""
    with sidecar(addresses) as envoy:
        async with plain([envoy.address]) as caller:
            yield Caller(caller.client, caller.url, envoy.cpu_seconds)


@contextlib.asynccontextmanager
async def meshed(addresses: Sequence[str]) -> AsyncIterator[Caller]:
    """meshlib with its defaults, but for the timeouts."""
    service = Service(SERVICE, addresses, timeout=Timeout(attempt=ATTEMPT, total=TOTAL, connect=CONNECT))
    async with Mesh(service) as mesh, mesh.async_client() as client:
        yield Caller(client, f"http://{SERVICE}{PATH}")


Opened = Callable[[Sequence[str]], contextlib.AbstractAsyncContextManager[Caller]]
CONTESTANTS: dict[str, Opened] = {PLAIN: plain, ENVOY: through_envoy, MESHED: meshed}


def main() -> None:
    """Measure and print; with `--keep` for the documentation too."""
    options = _options()
    try:
        program()
    except Absent as absent:
        sys.exit(f"nothing to compare with: {absent}")
    turns = []
    for turn in measured(CONTESTANTS, options.rounds, options.calls):
        print(" ".join(f"{key}={_short(value)}" for key, value in turn.items()), flush=True)
        turns.append(turn)
    results = {**described(), **_settings(options.calls), "turns": turns}
    print(f"\n{told(results, aligned)}")
    if options.keep:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare meshlib to an Envoy sidecar, under faults.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of everybody, per fault ({ROUNDS})")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"calls of a turn ({CALLS})")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULTS.name} and the tables of {PAGE.name}")
    return parser.parse_args()


def _settings(calls: int) -> dict[str, Any]:
    """What the turns had in common."""
    return {
        "calls": calls,
        "concurrency": CONCURRENCY,
        "delay": DELAY,
        "slow": SLOW,
        "timeouts": {"attempt": ATTEMPT, "total": TOTAL, "connect": CONNECT},
        "envoy": {"outlier_detection": OUTLIERS, "retry_policy": RETRY_POLICY, "max_retries": MOST_RETRIES},
    }


def measured(contestants: dict[str, Opened], rounds: int, calls: int) -> Iterator[dict[str, Any]]:
    """Let everybody take a turn under every fault, over and over. Nothing but the baseline is asked of plain httpx."""
    for number in range(rounds):
        for fault in FAULTS:
            for who in contestants:
                if who != PLAIN or fault == NO_FAULT:
                    yield {"round": number, "fault": fault, "who": who, **turn(contestants[who], fault, calls)}


def turn(opened: Opened, fault: str, calls: int) -> dict[str, Any]:
    """One turn: three upstreams, of which one breaks when half of the calls were begun."""
    with upstreams(3, delay=DELAY) as fleet:
        gc.collect()  # everybody starts with the same debts, and pays those it makes
        return asyncio.run(_turn(opened, fleet, fault, calls))


async def _turn(opened: Opened, fleet: Sequence[Upstream], fault: str, calls: int) -> dict[str, Any]:
    def numbers() -> Iterator[int]:
        for number in range(calls):
            if number == calls // 2:
                FAULTS[fault](fleet[1])
            yield number

    async with opened([upstream.address for upstream in fleet]) as caller:
        await _calls(caller, iter(range(WARM_UP)))
        client, aside = time.process_time(), caller.sidecar_seconds()
        tally = await _calls(caller, numbers())
        client, aside = time.process_time() - client, caller.sidecar_seconds() - aside
    return {
        "failed": tally.failed,
        "slow": sum(seconds > SLOW for seconds in tally.seconds),
        "p99": _short(sorted(tally.seconds)[math.ceil(0.99 * calls) - 1]),
        "client": _short(client / calls),
        "sidecar": _short(aside / calls),
    }


async def _calls(caller: Caller, numbers: Iterator[int]) -> Tally:
    tally = Tally()

    async def work() -> None:
        for _ in numbers:
            start = time.monotonic()
            try:
                is_good = (await caller.client.get(caller.url)).status_code == 200
            except httpx.HTTPError:
                is_good = False
            tally.seconds.append(time.monotonic() - start)
            tally.failed += not is_good

    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return tally


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def renewed(page: str, results: dict[str, Any]) -> str:
    """The page with the tables of these results in place of those it has."""
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"{PAGE.name} has no place for tables, between {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + told(results, markdown) + END + after


if __name__ == "__main__":
    main()
