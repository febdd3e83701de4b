"""The main job: one of three endpoints breaks under load, and no call fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from meshes import mesh_of
from meshlib import Mesh, PeakEwma, Timeout, report
from meshlib.core.report import Attempt
from meshlib.testing import Upstream, upstreams

CALLS = 2000
CONCURRENCY = 16
SLOW = 0.45

FAULTS: dict[str, Callable[[Upstream], None]] = {
    "kill": Upstream.kill,
    "hang": Upstream.suspend,
    "503": lambda victim: victim.script(then={"status": 503}),
}


@dataclass
class Tally:
    """What the calls brought."""

    failed: list[object] = field(default_factory=list)
    slow: int = 0
    attempts: list[Attempt] = field(default_factory=list)

    def count(self, seconds: float, result: httpx.Response | Exception) -> None:
        self.slow += seconds > SLOW
        self.attempts += report(result).attempts
        if isinstance(result, Exception) or result.status_code != 200:
            self.failed.append(result)


def drive_sync(mesh: Mesh, numbers: Iterator[int], tally: Tally) -> None:
    lock = threading.Lock()

    def work(client: httpx.Client) -> None:
        while True:
            with lock:
                if next(numbers, None) is None:
                    return
            started = time.monotonic()
            try:
                result: httpx.Response | Exception = client.get("/v1/orders/5")
            except httpx.HTTPError as error:
                result = error
            with lock:
                tally.count(time.monotonic() - started, result)

    with mesh.client("orders") as client:
        threads = [threading.Thread(target=work, args=(client,)) for _ in range(CONCURRENCY)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def drive_async(mesh: Mesh, numbers: Iterator[int], tally: Tally) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for _ in numbers:
            started = time.monotonic()
            try:
                result: httpx.Response | Exception = await client.get("/v1/orders/5")
            except httpx.HTTPError as error:
                result = error
            tally.count(time.monotonic() - started, result)

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            await asyncio.gather(*(work(client) for _ in range(CONCURRENCY)))

    asyncio.run(main())


@pytest.mark.parametrize("drive", [drive_sync, drive_async])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_call_fails_when_one_of_three_breaks(
    no_leaks: None, drive: Callable[[Mesh, Iterator[int], Tally], None], fault: str
) -> None:
    with upstreams(3, delay=0.01) as fleet:
        victim = fleet[1]
        mesh = mesh_of(*fleet, timeout=Timeout(attempt=0.5, total=5), balancer=PeakEwma())
        tally = Tally()
        broken_at = 0.0

        def numbers() -> Iterator[int]:
            nonlocal broken_at
            for number in range(CALLS):
                if number == CALLS // 3:
                    FAULTS[fault](victim)
                    broken_at = time.monotonic()
                yield number

        drive(mesh, numbers(), tally)
        snapshot = mesh.snapshot()["orders"]
        victim.resume()

    assert tally.failed == []
    assert len({id(attempt) for attempt in tally.attempts}) >= CALLS
    assert snapshot.in_flight == 0
    # In a hang each of the 16 may be caught once; a probe now and then is one more.
    assert tally.slow <= 21
    late = [
        attempt
        for attempt in tally.attempts
        if str(attempt.endpoint) == victim.address and attempt.started > broken_at + 1.0
    ]
    assert [attempt for attempt in late if attempt.why != "probe"] == []
    assert any(str(attempt.endpoint) == victim.address and attempt.started < broken_at for attempt in tally.attempts)
