"""What every test shares: upstream processes, one way to run a test in both colours, and the watch for leaks."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshes import mesh_of
from meshlib import TLS, Mesh, control
from meshlib.core import last_good
from meshlib.discovery import feed, watch
from meshlib.testing import Upstream, upstreams

DESCRIPTORS = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")
SETTLING = 5.0
"""Seconds that what a test left behind may take to go: a peer's FIN, a thread's last instructions."""


def _held() -> tuple[int, int]:
    return len(os.listdir(DESCRIPTORS)), threading.active_count()


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """File descriptors and threads are back to what they were; tasks are looked at by `Colour.run`."""
    gc.collect()
    before = _held()
    yield
    deadline = time.monotonic() + SETTLING
    while (after := _held()) > before or after[1] > before[1]:
        gc.collect()
        assert time.monotonic() < deadline, f"(descriptors, threads) were {before} and are {after}"
        time.sleep(0.01)


class Colour:
    """Runs the same script against the sync and the async client.

    A script is an async function of a client whose calls are awaited; for the sync client they are awaited as well,
    and are done by then.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_sync = name == "sync"

    def run(self, mesh: Mesh, script: Callable[[Any], Any], service: str | None = "orders", **settings: Any) -> Any:
        """Run `script(client)` and return what it returns; nothing of it may be left running."""
        if self.is_sync:
            with mesh.client(service, **settings) as client:
                return asyncio.run(script(_Awaitable(client)))
        return self._run_async(mesh, script, service, settings)

    def _run_async(
        self, mesh: Mesh, script: Callable[[Any], Any], service: str | None, settings: dict[str, Any]
    ) -> Any:
        async def main() -> Any:
            async with mesh.async_client(service, **settings) as client:
                result = await script(client)
            for _ in range(10):
                await asyncio.sleep(0)  # closed transports say goodbye on the loop's next turns
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks left running: {left}"
            return result

        if self.name == "trio":
            import trio

            return trio.run(_trio_main, mesh, script, service, settings)
        return asyncio.run(main())


async def _trio_main(mesh: Mesh, script: Callable[[Any], Any], service: str | None, settings: dict[str, Any]) -> Any:
    async with mesh.async_client(service, **settings) as client:
        return await script(client)


class _Awaitable:
    """A sync client whose methods look async."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        return call


@pytest.fixture
def collected() -> Iterator[None]:
    """What a test leaves to the garbage collector is found in this test and not in another."""
    yield
    gc.collect()


@pytest.fixture(params=["sync", "asyncio", "trio"])
def colour(request: pytest.FixtureRequest, no_leaks: None) -> Colour:
    """Sync, asyncio and trio in turn."""
    return Colour(request.param)


@pytest.fixture(scope="module")
def started() -> Iterator[list[Upstream]]:
    """Two upstream processes for all the tests of a module that only need their answers."""
    with upstreams(2) as fleet:
        for each in fleet:
            each.script()  # its connection for control is there before leaks are looked for
        yield fleet


@pytest.fixture
def two(started: list[Upstream]) -> list[Upstream]:
    """The same, with nothing left of the test before."""
    for each in started:
        each.script()
        each.clear()
    return started


@pytest.fixture
def fleet(no_leaks: None) -> Iterator[list[Upstream]]:
    """Three upstream processes."""
    with upstreams(3) as started:
        yield started


@pytest.fixture
def upstream(no_leaks: None) -> Iterator[Upstream]:
    """One upstream process."""
    with upstreams(1) as started:
        yield started[0]


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes the control plane a second takes it a fiftieth."""
    monkeypatch.setattr(watch, "PACE", 0.02)
    monkeypatch.setattr(feed, "EVERY", 0.01)
    monkeypatch.setattr(last_good, "SHORTEST", 0.002)
    monkeypatch.setattr(last_good, "LONGEST", 0.2)
    monkeypatch.setattr(last_good, "DOUBT_EVERY", 0.04)
    monkeypatch.setattr(last_good, "FIRST_DOUBT_EVERY", 0.04)
    monkeypatch.setattr(control, "SHORTEST", 0.002)


@dataclass
class Secured:
    """An upstream, and the bundle to trust it by, which is empty for one without TLS."""

    upstream: Upstream
    bundle: str

    def mesh(self, **settings: Any) -> Mesh:
        """A mesh with one service over it."""
        return mesh_of(self.upstream, tls=TLS(verify=self.bundle) if self.bundle else None, **settings)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A bundle, and the key and certificate of `orders` that go with it."""
    import trustme

    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "bundle.pem"))
    authority.issue_cert("orders").private_key_and_cert_chain_pem.write_to_path(str(folder / "orders.pem"))
    return str(folder / "bundle.pem"), str(folder / "orders.pem")


@pytest.fixture(params=["plain", "tls"])
def secured(request: pytest.FixtureRequest, no_leaks: None, certificates: tuple[str, str]) -> Iterator[Secured]:
    """One upstream process, without TLS and with it in turn."""
    bundle, certificate = certificates if request.param == "tls" else ("", None)
    with Upstream("a", cert=certificate) as started:
        yield Secured(started, bundle)
