"""The control plane: one thread per mesh that comes late, survives its jobs, and goes in time."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from played import Played

from meshlib import Mesh, NoEndpoints, ResolveError, Service, control
from meshlib.control import Control
from meshlib.testing import Upstream
from waiting import until

pytestmark = pytest.mark.usefixtures("hurry", "no_leaks")

HERE = Path(__file__).parent


def controls() -> int:
    return sum(thread.name == "meshlib-control" for thread in threading.enumerate())


def test_one_thread_for_each_mesh_from_the_first_use_on(upstream: Upstream) -> None:
    mesh = Mesh(*(Service(name, Played(upstream.address)) for name in ("a", "b", "c")))
    with mesh.client() as client:
        assert controls() == 0
        for name in ("a", "b", "c"):
            assert client.get(f"http://{name}/").status_code == 200
            assert controls() == 1
    mesh.close()
    assert controls() == 0


def test_closing_cancels_what_is_asked_and_calls_make_do_with_what_is_known(upstream: Upstream) -> None:
    resolver = Played(upstream.address, ttl=None)
    unknown = Played()
    unknown.hangs = True
    mesh = Mesh(Service("orders", resolver), Service("users", unknown))
    with mesh.client() as client:
        assert client.get("http://orders/").status_code == 200
        until(lambda: resolver.under_way)
        began = time.monotonic()
        mesh.close()
        assert time.monotonic() - began < 1
        assert (resolver.under_way, unknown.under_way) == (0, 0)
        assert client.get("http://orders/").status_code == 200
        with pytest.raises(ResolveError, match="users: its endpoints are not known yet"):
            client.get("http://users/")
        assert controls() == 0
        with mesh:
            unknown.hangs = False
            unknown.say(upstream.address)
            assert client.get("http://users/").status_code == 200
            resolver.say()
            until(lambda: mesh.snapshot()["orders"].nodes == ())
            with pytest.raises(NoEndpoints):
                client.get("http://orders/")


def test_closing_twice_is_said_once() -> None:
    mesh = Mesh(Service("orders", Played("10.0.0.1:80")))
    mesh.wait_ready(5)
    mesh.close()
    mesh.close()
    assert mesh.snapshot()["orders"].warnings == ("the mesh is closed",)


def test_closing_lets_those_go_who_wait() -> None:
    resolver = Played()
    resolver.hangs = True
    mesh = Mesh(Service("orders", resolver))
    threading.Timer(0.2, mesh.close).start()
    with mesh.client("orders") as client, pytest.raises(ResolveError):
        client.get("/")


def test_a_mesh_that_is_garbage_takes_its_thread_along() -> None:
    mesh = Mesh(Service("orders", Played("10.0.0.1:80")))
    mesh.wait_ready(5)
    assert controls() == 1
    del mesh
    gc.collect()
    until(lambda: controls() == 0)


def test_a_resolver_that_blocks_or_ignores_its_cancellation_does_not_keep_close_waiting() -> None:
    class Deaf(Played):
        async def resolve(self, service: str, previous: object) -> object:  # type: ignore[override]
            while not let_go.is_set():
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    pass
            raise OSError

    let_go = threading.Event()
    mesh = Mesh(Service("orders", Deaf()))
    with pytest.raises(ResolveError):
        mesh.wait_ready(0.1)
    began = time.monotonic()
    mesh.close()
    assert time.monotonic() - began < 1.5
    let_go.set()


def test_a_job_that_fails_is_counted_said_once_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    runs: list[int] = []
    control = Control(random.Random(1))

    async def job() -> None:
        runs.append(1)
        if len(runs) < 6:
            raise (ValueError if len(runs) % 2 else asyncio.CancelledError)("again")

    control.starters.append(lambda control: control.supervise("the job", job) and None)
    assert control.ensure()
    until(lambda: len(runs) == 6)
    control.close()
    assert control.failures == {"the job": 5}
    said = [record for record in caplog.records if record.name == "meshlib.control"]
    assert [record.getMessage() for record in said] == ["the job failed; it is started again"] * 2
    assert {record.exc_info and record.exc_info[0] for record in said} == {ValueError, asyncio.CancelledError}
    assert not control.ensure(), "it is closed"


def test_a_job_may_fail_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SHORTEST", 0.0)
    monkeypatch.setattr(control, "LONGEST", 0.0)
    runs: list[int] = []

    async def job() -> None:
        runs.append(1)
        raise ValueError

    plane = Control(random.Random(1))
    plane.starters.append(lambda control: control.supervise("the job", job) and None)
    plane.ensure()
    until(lambda: len(runs) > 1100)
    plane.close()


def test_S3_closing_that_is_cancelled_closes_all_the_same(upstream: Upstream) -> None:
    class Blocking(Played):
        async def resolve(self, service: str, previous: object) -> object:  # type: ignore[override]
            if self.hangs:
                let_go.wait(5)
            return await super().resolve(service, None)

    let_go = threading.Event()
    resolver = Blocking(upstream.address)
    mesh = Mesh(Service("orders", resolver))
    mesh.wait_ready(5)
    resolver.hangs = True

    async def close() -> None:
        task = asyncio.ensure_future(mesh.aclose())
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task])

    time.sleep(0.1)
    asyncio.run(close())
    let_go.set()
    resolver.hangs = False
    with mesh, mesh.client("orders") as client:
        assert client.get("/").status_code == 200
        resolver.say("10.0.0.9:80", upstream.address)
        until(lambda: len(mesh.snapshot()["orders"].nodes) == 2, what="nobody asks again")


SCRIPT = """
import os, sys, threading, time
sys.path[:0] = {paths!r}
from played import Played
from meshlib import Mesh, Service
resolver = Played({address!r})
mesh = Mesh(Service("orders", resolver))
client = mesh.client("orders")
"""


def run(script: str, address: str) -> subprocess.CompletedProcess[str]:
    """A program of its own, which is killed if it does not end."""
    whole = SCRIPT.format(paths=[str(HERE), str(HERE.parent)], address=address) + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-X", "dev", "-c", whole], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "how", ["", "resolver.hangs = True", "threading.Thread(target=time.sleep, args=(0.3,)).start()"]
)
def test_the_interpreter_exits_within_a_second_and_without_a_word(how: str, upstream: Upstream) -> None:
    script = f"""
        assert client.get("/").status_code == 200
        client.close()
        {how}
        time.sleep(0.1)
        os.write(1, b"end")
        """
    began = time.monotonic()
    done = run(script, upstream.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end", "")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("how", ["await asyncio.to_thread(time.sleep, 30)", "time.sleep(30)"])
def test_no_number_of_meshes_keeps_the_interpreter_waiting_for_who_blocks(how: str) -> None:
    script = f"""
        import asyncio
        class Blocking:
            async def resolve(self, service, previous):
                {how}
        meshes = [Mesh(Service("orders", Blocking())) for _ in range(8)]
        for each in meshes:
            try:
                each.wait_ready(0.05)
            except Exception:
                pass
        at = time.monotonic()
        import atexit
        from meshlib import control
        atexit.unregister(control._exit)
        atexit.register(lambda: os.write(1, str(time.monotonic() - at < 2.5).encode()))
        atexit.register(control._exit)
        """
    done = run(script, "10.0.0.1:80")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True", "")


def test_an_exit_before_the_first_answer_exits(upstream: Upstream) -> None:
    script = """
        import httpx
        resolver.hangs = True
        try:
            client.get("/", extensions={"meshlib": {"timeout": 0.2}})
        except httpx.TimeoutException:
            sys.exit(3)
        """
    done = run(script, upstream.address)
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_S3_a_forked_child_starts_its_own(upstream: Upstream) -> None:
    script = """
        import warnings; warnings.simplefilter("ignore")
        assert client.get("/").status_code == 200
        time.sleep(0.1)
        before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
        pid = os.fork()
        if pid == 0:
            names = [thread.name for thread in threading.enumerate()]
            assert names == ["MainThread"], names
            asked = len(resolver.asked)
            assert client.get("/").status_code == 200  # with what is known
            resolver.say("10.0.0.9:80")
            end = time.monotonic() + 10
            while [node.endpoint for node in mesh.snapshot()["orders"].nodes] != ["10.0.0.9:80"]:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert len(resolver.asked) > asked
            client.close()
            mesh.close()
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        asked = len(resolver.asked)
        end = time.monotonic() + 5
        while len(resolver.asked) < asked + 2:
            assert time.monotonic() < end, "the parent's still asks"
            time.sleep(0.01)
        assert client.get("/").status_code == 200
        client.close()
        os.write(1, b"end")
        """
    done = run(script, upstream.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end", "")
