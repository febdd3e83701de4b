"""Forks (rule S3): a child shares no connection with its parent, and neither of them ever reads the other's answers.

Every test forks in a program of its own. A program gets the upstream's address as its first argument, says what it
found out on standard output, and must end without a warning.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import httpx
import pytest

from conftest import Secured
from meshlib.testing import Upstream

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to test without fork")

BOUND = 60.0
"""Seconds after which a program is taken for deadlocked."""

PREAMBLE = """
import asyncio, gc, json, os, signal, sys, threading, time
import httpx
from meshlib import TLS, Mesh, Service, Timeout

address, bundle = sys.argv[1], sys.argv[2]
service = Service("orders", [address], tls=TLS(verify=bundle) if bundle else None, timeout=Timeout(total=20))
mesh = Mesh(service)


def fork(work):
    # Run work in a child; whatever it raises ends the child with 1.
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(40)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def join(*pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0, "a child failed"


def tell(**what):
    # One write, so that the lines of several processes do not mix.
    os.write(1, (json.dumps(what) + "\\n").encode())


def wrong_of(client, who, count):
    # Every request asks for its own path, and the answer repeats it.
    wrong = 0
    for number in range(count):
        path = f"/{who}/{number}"
        wrong += client.get(path).json()["path"] != path
    return wrong


async def wrong_of_async(client, who, count):
    async def one(lane):
        wrong = 0
        for number in range(count // 4):
            path = f"/{who}/{lane}/{number}"
            wrong += (await client.get(path)).json()["path"] != path
        return wrong

    return sum(await asyncio.gather(*(one(lane) for lane in range(4))))


def at_once(count, work):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A joined thread still has to leave OpenSSL, under a lock of OpenSSL's own which no child would ever get.
    wait_until(lambda: len(os.listdir("/proc/self/task")) == 1 if os.path.exists("/proc/self/task") else True)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
"""


def run(program: str, upstream: Upstream, bundle: str = "", *options: str) -> list[dict[str, object]]:
    """Run a program after the preamble; what it told, line by line."""
    whole = PREAMBLE + textwrap.dedent(program)
    command = [sys.executable, "-W", "error", *options, "-c", whole, upstream.address, bundle]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=BOUND)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"deadlocked: {out}{err}")
    assert err == ""
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


# Right answers


def test_S3_a_warmed_sync_client_in_parent_and_children_at_once(secured: Secured) -> None:
    program = """
        client = mesh.client("orders")
        at_once(4, lambda: wrong_of(client, "warm", 25))


        def child():
            results = []
            at_once(4, lambda: results.append(wrong_of(client, f"{os.getpid()}-{threading.get_ident()}", 50)))
            tell(wrong=sum(results), calls=50 * len(results), in_flight=mesh.snapshot()["orders"].in_flight)
            client.close()


        pids = [fork(child) for _ in range(4)]
        results = []
        at_once(4, lambda: results.append(wrong_of(client, f"{os.getpid()}-{threading.get_ident()}", 50)))
        tell(wrong=sum(results), calls=50 * len(results), in_flight=mesh.snapshot()["orders"].in_flight)
        join(*pids)
        client.close()
    """
    assert run(program, secured.upstream, secured.bundle) == [{"wrong": 0, "calls": 200, "in_flight": 0}] * 5


def test_S3_a_warmed_asyncio_client_in_parent_and_children_at_once(secured: Secured) -> None:
    # The parent goes on with its loop, and so with its warm connections; each child makes a loop of its own.
    program = """
        client = mesh.async_client("orders")


        def child():
            async def main():
                wrong = await wrong_of_async(client, os.getpid(), 200)
                await client.aclose()
                return wrong

            tell(wrong=asyncio.run(main()), in_flight=mesh.snapshot()["orders"].in_flight)


        with asyncio.Runner() as runner:
            assert runner.run(wrong_of_async(client, "warm", 100)) == 0
            pids = [fork(child) for _ in range(4)]
            wrong = runner.run(wrong_of_async(client, os.getpid(), 200))
            tell(wrong=wrong, in_flight=mesh.snapshot()["orders"].in_flight)
            join(*pids)
            runner.run(client.aclose())
    """
    assert run(program, secured.upstream, secured.bundle) == [{"wrong": 0, "in_flight": 0}] * 5


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_S3_a_loop_that_is_over_when_the_process_forks(secured: Secured, library: str) -> None:
    program = f"""
        client = mesh.async_client("orders")
        import {library} as library


        async def work(who, count):
            wrong = 0
            for number in range(count):
                path = f"/{{who}}/{{number}}"
                wrong += (await client.get(path)).json()["path"] != path
            return wrong


        async def last(who, count):
            wrong = await work(who, count)
            await client.aclose()
            return wrong


        assert library.run(work, "warm", 10) == 0 if library.__name__ == "trio" else not asyncio.run(work("warm", 10))


        def both():
            run = (lambda: library.run(last, os.getpid(), 50)) if library.__name__ == "trio" else (
                lambda: asyncio.run(last(os.getpid(), 50)))
            tell(wrong=run(), in_flight=mesh.snapshot()["orders"].in_flight)


        pids = [fork(both) for _ in range(3)]
        both()
        join(*pids)
    """
    assert run(program, secured.upstream, secured.bundle) == [{"wrong": 0, "in_flight": 0}] * 4


def test_S3_a_childs_child(no_leaks: None, upstream: Upstream) -> None:
    program = """
        client = mesh.client("orders")
        assert wrong_of(client, "warm", 3) == 0


        def child():
            assert wrong_of(client, "child", 3) == 0
            pid = fork(grandchild)
            assert wrong_of(client, "child", 50) == 0
            join(pid)


        def grandchild():
            assert wrong_of(client, "grandchild", 50) == 0


        pid = fork(child)
        assert wrong_of(client, "parent", 50) == 0
        join(pid)
        client.close()
    """
    assert run(program, upstream) == []
    assert len({request.connection for request in upstream.log()}) == 3


def test_S3_a_pool_of_forked_workers(no_leaks: None, upstream: Upstream) -> None:
    program = """
        import multiprocessing

        client = mesh.client("orders")
        at_once(4, lambda: wrong_of(client, "warm", 10))


        def job(number):
            return wrong_of(client, f"{os.getpid()}/{number}", 10), os.getpid()


        with multiprocessing.get_context("fork").Pool(4) as pool:
            pending = pool.map_async(job, range(40), chunksize=1)
            mine = wrong_of(client, "parent", 100)
            results = pending.get(40)
        tell(wrong=mine + sum(wrong for wrong, _ in results), several=len({pid for _, pid in results}) > 1)
        client.close()
    """
    assert run(program, upstream) == [{"wrong": 0, "several": True}]


def test_S3_an_inner_transport_is_the_childs_own(no_leaks: None, upstream: Upstream) -> None:
    program = """
        mesh = Mesh(service, inner=lambda endpoint: httpx.HTTPTransport())
        client = mesh.client("orders")
        at_once(4, lambda: wrong_of(client, "warm", 25))


        def child():
            tell(wrong=wrong_of(client, os.getpid(), 200))


        pids = [fork(child) for _ in range(4)]
        tell(wrong=wrong_of(client, os.getpid(), 200))
        join(*pids)
        client.close()
    """
    assert run(program, upstream) == [{"wrong": 0}] * 5


# Connections


@pytest.mark.parametrize("colour", ["sync", "asyncio"])
def test_a_child_connects_anew_and_the_parents_connection_stays(secured: Secured, colour: str) -> None:
    sync = """
        client = mesh.client("orders")
        client.get("/parent/1")
        join(fork(lambda: [client.get("/child") for _ in range(2)] and client.close()))
        join(fork(lambda: None))
        client.get("/parent/2")
        client.close()
    """
    asynchronous = """
        client = mesh.async_client("orders")


        async def child():
            for _ in range(2):
                await client.get("/child")
            await client.aclose()


        with asyncio.Runner() as runner:
            runner.run(client.get("/parent/1"))
            join(fork(lambda: asyncio.run(child())))
            join(fork(lambda: None))
            runner.run(client.get("/parent/2"))
            runner.run(client.aclose())
    """
    assert run(sync if colour == "sync" else asynchronous, secured.upstream, secured.bundle) == []
    assert [(request.target, request.connection) for request in secured.upstream.log()] == [
        ("/parent/1", 1),
        ("/child", 2),
        ("/child", 2),
        ("/parent/2", 1),
    ]


@pytest.mark.parametrize("colour", ["sync", "asyncio"])
def test_a_child_that_ends_does_not_disturb_the_parents_body(secured: Secured, colour: str) -> None:
    secured.upstream.script({"size": 3_000_000}, then={})
    sync = """
        client = mesh.client("orders")
        with client.stream("GET", "/") as response:
            chunks = response.iter_raw(65536)
            body = next(chunks)
            pid = os.fork()
            if not pid:
                del chunks
                gc.collect()
                client.close()
                sys.exit(0)
            join(pid)
            body += b"".join(chunks)
        tell(length=len(body), right=body[-1] == (len(body) - 1) % 251, status=client.get("/").status_code)
        client.close()
    """
    asynchronous = """
        client = mesh.async_client("orders")


        async def first():
            response = await client.send(client.build_request("GET", "/"), stream=True)
            chunks = response.aiter_raw(65536)
            return response, chunks, await anext(chunks)


        async def rest(response, chunks):
            body = b"".join([chunk async for chunk in chunks])
            await response.aclose()
            return body, (await client.get("/")).status_code


        runner = asyncio.Runner()
        response, chunks, body = runner.run(first())
        pid = os.fork()
        if not pid:
            gc.collect()
            asyncio.run(client.aclose())
            sys.exit(0)
        join(pid)
        more, status = runner.run(rest(response, chunks))
        body += more
        tell(length=len(body), right=body[-1] == (len(body) - 1) % 251, status=status)
        runner.run(client.aclose())
        runner.close()
    """
    told = run(sync if colour == "sync" else asynchronous, secured.upstream, secured.bundle)
    assert told == [{"length": 3_000_000, "right": True, "status": 200}]


def test_a_child_holds_none_of_the_parents_sockets(secured: Secured) -> None:
    program = """
        def sockets():
            names = []
            for descriptor in os.listdir("/proc/self/fd"):
                try:
                    names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
                except OSError:
                    pass  # the folder's own
            return sum(name.startswith("socket:") for name in names)


        client = mesh.client("orders")
        before = sockets()
        at_once(4, lambda: wrong_of(client, "warm", 25))
        held = sockets() - before
        join(fork(lambda: tell(held=held > 0, inherited=sockets() - before)))
        assert sockets() - before == held
        client.close()
    """
    if sys.platform != "linux":
        pytest.skip("needs /proc")
    assert run(program, secured.upstream, secured.bundle) == [{"held": True, "inherited": 0}]


# Counts


def test_C6_nothing_is_in_flight_in_a_child(no_leaks: None, upstream: Upstream) -> None:
    # The parent holds an answer open, and a call of another thread is under way, when it forks.
    upstream.script({"size": 3_000_000}, {"delay": 1.0}, then={})
    program = """
        client = mesh.client("orders")
        stream = client.stream("GET", "/held")
        held = stream.__enter__()
        other = threading.Thread(target=client.get, args=("/other",))
        other.start()
        wait_until(lambda: mesh.snapshot()["orders"].in_flight == 2)
        time.sleep(0.1)


        def child():
            tell(at_first=mesh.snapshot()["orders"].in_flight)
            client.get("/child")
            tell(after_a_call=mesh.snapshot()["orders"].in_flight)


        join(fork(child))
        tell(parent=mesh.snapshot()["orders"].in_flight)
        other.join()
        assert len(held.read()) == 3_000_000
        stream.__exit__(None, None, None)
        tell(parent=mesh.snapshot()["orders"].in_flight)
        client.close()
    """
    assert run(program, upstream) == [{"at_first": 0}, {"after_a_call": 0}, {"parent": 2}, {"parent": 0}]


@pytest.mark.parametrize("how", ["held.close()", "del held, stream; gc.collect()", "held.read()"])
def test_C6_an_inherited_answer_counts_for_nothing_when_it_ends(no_leaks: None, upstream: Upstream, how: str) -> None:
    upstream.script({"size": 3_000_000}, then={})
    program = f"""
        client = mesh.client("orders")
        held = client.send(client.build_request("GET", "/held"), stream=True)
        stream = held.stream


        def child():
            global held, stream
            try:
                {how}
            except httpx.TransportError:
                pass  # the body is the parent's
            client.get("/child")
            client.get("/child")
            node = mesh.snapshot()["orders"].nodes[0]
            tell(in_flight=node.in_flight, state=node.state, failures=node.failures)


        join(fork(child))
        assert len(held.read()) == 3_000_000
        tell(parent=mesh.snapshot()["orders"].in_flight)
        client.close()
    """
    assert run(program, upstream) == [{"in_flight": 0, "state": "closed", "failures": 0}, {"parent": 0}]
    assert len({request.connection for request in upstream.log() if request.target == "/child"}) == 1


def test_children_do_not_all_draw_alike(no_leaks: None, upstream: Upstream) -> None:
    program = """
        tell(draw=mesh._rng.random())
        join(*[fork(lambda: tell(draw=mesh._rng.random())) for _ in range(4)])
    """
    assert len({line["draw"] for line in run(program, upstream)}) == 5


# Locks


@pytest.mark.parametrize("lock", ['mesh._clusters["orders"].lock', "client._transport._stacks._lock"])
def test_a_lock_that_another_thread_holds_does_not_deadlock_a_child(
    no_leaks: None, upstream: Upstream, lock: str
) -> None:
    program = f"""
        client = mesh.client("orders")
        client.get("/")
        held, done = threading.Event(), threading.Event()


        def hold():
            with {lock}:
                held.set()
                done.wait()


        def child():
            signal.alarm(10)
            tell(status=client.get("/").status_code)
            with Mesh(service).client("orders") as another:
                tell(status=another.get("/").status_code)
            assert mesh.snapshot()["orders"].in_flight == 0


        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        try:
            join(fork(child))
        finally:
            done.set()
            thread.join()
        client.close()
    """
    assert run(program, upstream) == [{"status": 200}] * 2


def test_forks_amid_threads_that_call(no_leaks: None, upstream: Upstream) -> None:
    # Without TLS: a fork amid handshakes can leave the child with a locked OpenSSL, whoever uses it.
    program = """
        client = mesh.client("orders")
        over = threading.Event()
        wrong = []


        def work():
            number = 0
            while not over.is_set():
                wrong.append(wrong_of(client, f"{threading.get_ident()}-{number}", 10))
                number += 1


        def child():
            signal.alarm(20)
            assert mesh.snapshot()["orders"].in_flight == 0
            assert wrong_of(client, f"{os.getpid()}", 10) == 0
            assert mesh.snapshot()["orders"].in_flight == 0


        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            join(*[fork(child) for _ in range(5)])
        over.set()
        for thread in threads:
            thread.join()
        tell(wrong=sum(wrong), many=len(wrong) > 8, in_flight=mesh.snapshot()["orders"].in_flight)
        client.close()
    """
    assert run(program, upstream) == [{"wrong": 0, "many": True, "in_flight": 0}]


# gunicorn --preload

APP = """
import os
import threading

import httpx

from meshlib import Mesh, Service

mesh = Mesh(Service("orders", [os.environ["UPSTREAM"]]))
client = mesh.client("orders")

# What a preloaded application may well do: call at import, and from several threads.
threads = [threading.Thread(target=lambda: [client.get("/warm") for _ in range(25)]) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()


def app(environ, start_response):
    body = client.get(environ["PATH_INFO"]).content
    start_response("200 OK", [("content-length", str(len(body))), ("x-pid", str(os.getpid()))])
    return [body]
"""


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_S3_gunicorn_with_preload(no_leaks: None, upstream: Upstream, tmp_path: Path, kind: str) -> None:
    (tmp_path / "preloaded.py").write_text(APP)
    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:
        port = server.getsockname()[1]
        threads = "1" if kind == "sync" else "4"
        command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--worker-class", kind]
        command += ["--threads", threads, "--bind", f"fd://{server.fileno()}", "--graceful-timeout", "5"]
        command += ["--worker-tmp-dir", str(tmp_path), "--chdir", str(tmp_path), "preloaded:app"]
        gunicorn = subprocess.Popen(
            command,
            env={**os.environ, "UPSTREAM": upstream.address, "HOME": str(tmp_path)},
            pass_fds=[server.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
    try:
        wrong, pids = hammer(port)
    finally:
        gunicorn.terminate()
        try:
            told, _ = gunicorn.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(gunicorn.pid, signal.SIGKILL)
            told, _ = gunicorn.communicate()
    assert wrong == [], told
    assert len(pids) == 2, "all of it was done by one worker"
    assert "Traceback" not in told
    assert gunicorn.returncode == 0, told


def hammer(port: int) -> tuple[list[str], set[str]]:
    """Call gunicorn from eight threads: the answers that were wrong, and the workers that gave answers."""
    wrong: list[str] = []
    pids: set[str] = set()

    def work(who: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
            for number in range(60):
                path = f"/{who}/{number}"
                try:
                    response = client.get(path)
                    pids.add(response.headers.get("x-pid", ""))
                    if response.status_code != 200 or response.json()["path"] != path:
                        wrong.append(f"{path}: {response.status_code} {response.text}")
                except Exception as error:
                    wrong.append(f"{path}: {error!r}")

    started = time.monotonic()
    while True:  # the socket is there before its workers are
        try:
            httpx.get(f"http://127.0.0.1:{port}/", timeout=1, trust_env=False)
            break
        except httpx.TimeoutException:
            assert time.monotonic() - started < 30
    threads = [threading.Thread(target=work, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong, pids
