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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from conftest import DESCRIPTORS, Secured
from meshlib.testing import Upstream

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to test without fork")

BOUND = 60.0
"""Seconds after which a program is taken for deadlocked."""

PREAMBLE = """
import asyncio, gc, json, os, signal, sys, threading, time
import anyio, httpx, trio
from meshlib import TLS, Mesh, Service, Timeout

address, bundle = sys.argv[1], sys.argv[2]
service = Service("orders", [address], tls=TLS(verify=bundle) if bundle else None, timeout=Timeout(total=20))
mesh = Mesh(service)

def fork(work):
    # Run work in a child; whatever it raises ends the child with 1.
    pid = os.fork()
    if not pid:
        signal.alarm(40)
        try:
            work()
            gc.collect()
            os._exit(0)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(1)
    return pid

def join(*pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0, "a child failed"

def tell(**what):
    # One write, so that the lines of several processes do not mix.
    os.write(1, (json.dumps(what) + "\\n").encode())

def node():
    return mesh.snapshot()["orders"].nodes[0]

def wrong_of(client, who, count):
    # Every request asks for its own path, and the answer repeats it.
    paths = [f"/{who}/{number}" for number in range(count)]
    return sum(client.get(path).json()["path"] != path for path in paths)

async def wrong_of_async(client, who):
    wrong = []

    async def lane(number):
        for _ in range(40):
            path = f"/{who}/{number}/{len(wrong)}"
            wrong.append((await client.get(path)).json()["path"] != path)

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(lane, number)
    return sum(wrong)

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


def run(program: str, upstream: Upstream, bundle: str = "") -> list[dict[str, object]]:
    """Run a program after the preamble; what it told, line by line."""
    command = [sys.executable, "-W", "error", "-c", PREAMBLE + program, upstream.address, bundle]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
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

IN_THREADS = """
client = mesh.client("orders")
close = client.close

def ask(who):
    wrong = []
    at_once(4, lambda: wrong.append(wrong_of(client, f"{who}-{threading.get_ident()}", 40)))
    return sum(wrong)
"""

ON_LOOPS = """
client = mesh.async_client("orders")
ask = lambda who: run(wrong_of_async, client, who)
close = lambda: run(client.aclose)
"""

CALLERS = {
    "threads": IN_THREADS,
    # The parent goes on with its loop, and so with its warm connections; each child makes a loop of its own.
    "an asyncio loop": """
runner, parent = asyncio.Runner(), os.getpid()

def run(work, *args):
    return runner.run(work(*args)) if os.getpid() == parent else asyncio.run(work(*args))
"""
    + ON_LOOPS,
    "asyncio loops that are over": "run = lambda work, *args: asyncio.run(work(*args))\n" + ON_LOOPS,
    "trio runs that are over": "run = trio.run\n" + ON_LOOPS,
}

IN_PARENT_AND_CHILDREN = """
assert ask("warm") == 0

def child():
    tell(wrong=ask(os.getpid()), in_flight=node().in_flight)
    close()

pids = [fork(child) for _ in range(4)]
tell(wrong=ask("parent"), in_flight=node().in_flight)
join(*pids)
close()
"""


@pytest.mark.parametrize("caller", CALLERS)
def test_S3_a_warmed_client_in_parent_and_children_at_once(secured: Secured, caller: str) -> None:
    program = CALLERS[caller] + IN_PARENT_AND_CHILDREN
    assert run(program, secured.upstream, secured.bundle) == [{"wrong": 0, "in_flight": 0}] * 5


def test_S3_an_inner_transport_is_the_childs_own(no_leaks: None, upstream: Upstream) -> None:
    inner = "mesh = Mesh(service, inner=lambda endpoint: httpx.HTTPTransport())\n"
    assert run(inner + IN_THREADS + IN_PARENT_AND_CHILDREN, upstream) == [{"wrong": 0, "in_flight": 0}] * 5


# Connections

SYNC_BODY = """
client = mesh.client("orders")
client.get("/parent/1")
with client.stream("GET", "/parent/2") as response:
    chunks = response.iter_raw(65536)
    body = next(chunks)
    pid = os.fork()
    if not pid:
        client.get("/child")
        del chunks
        gc.collect()
        client.close()
        sys.exit(0)
    join(pid)
    body += b"".join(chunks)
client.get("/parent/3")
client.close()
tell(length=len(body), right=body[-1] == (len(body) - 1) % 251)
"""

ASYNCIO_BODY = """
client = mesh.async_client("orders")

async def first():
    await client.get("/parent/1")
    return await client.send(client.build_request("GET", "/parent/2"), stream=True)

async def last(path):
    await client.get(path)
    await client.aclose()

runner = asyncio.Runner()
response = runner.run(first())
pid = os.fork()
if not pid:
    gc.collect()
    asyncio.run(last("/child"))
    sys.exit(0)
join(pid)
body = runner.run(response.aread())
runner.run(last("/parent/3"))
runner.close()
tell(length=len(body), right=body[-1] == (len(body) - 1) % 251)
"""


@pytest.mark.parametrize("program", [SYNC_BODY, ASYNCIO_BODY], ids=["sync", "asyncio"])
def test_a_child_connects_anew_and_does_not_disturb_the_parents_body(secured: Secured, program: str) -> None:
    secured.upstream.script({}, {"size": 3_000_000}, then={})
    assert run(program, secured.upstream, secured.bundle) == [{"length": 3_000_000, "right": True}]
    used = {request.target: request.connection for request in secured.upstream.log()}
    assert used == {"/parent/1": 1, "/parent/2": 1, "/child": 2, "/parent/3": 1}


def test_a_child_holds_none_of_the_parents_sockets(secured: Secured) -> None:
    program = f"""
client = mesh.client("orders")
before = len(os.listdir("{DESCRIPTORS}"))
at_once(4, lambda: wrong_of(client, "warm", 25))
held = len(os.listdir("{DESCRIPTORS}")) - before
join(fork(lambda: tell(held=held > 0, inherited=len(os.listdir("{DESCRIPTORS}")) - before)))
client.close()
"""
    assert run(program, secured.upstream, secured.bundle) == [{"held": True, "inherited": 0}]


# Counts


def test_C6_nothing_is_in_flight_in_a_child(no_leaks: None, upstream: Upstream) -> None:
    # The parent holds an answer open, and a call of another thread is under way, when it forks.
    upstream.script({"size": 3_000_000}, {"delay": 1.0}, then={})
    program = """
client = mesh.client("orders")
held = client.send(client.build_request("GET", "/held"), stream=True)
other = threading.Thread(target=client.get, args=("/other",))
other.start()
wait_until(lambda: node().in_flight == 2)
time.sleep(0.1)

def child():
    at_first = node().in_flight
    client.get("/child")
    tell(at_first=at_first, after_a_call=node().in_flight)

join(fork(child))
parent = node().in_flight
other.join()
assert len(held.read()) == 3_000_000
tell(parent=parent, at_the_end=node().in_flight)
client.close()
"""
    assert run(program, upstream) == [{"at_first": 0, "after_a_call": 0}, {"parent": 2, "at_the_end": 0}]


@pytest.mark.parametrize("how", ["held.close()", "del held; gc.collect()", "held.read()"])
def test_C6_an_inherited_answer_counts_for_nothing_when_it_ends(no_leaks: None, upstream: Upstream, how: str) -> None:
    upstream.script({"size": 3_000_000}, then={})
    program = f"""
client = mesh.client("orders")
held = client.send(client.build_request("GET", "/held"), stream=True)

def child():
    global held
    try:
        {how}
    except httpx.TransportError:
        pass  # the body is the parent's
    client.get("/child")
    client.get("/child")
    tell(in_flight=node().in_flight, state=node().state, failures=node().failures)

join(fork(child))
assert len(held.read()) == 3_000_000
tell(parent=node().in_flight)
client.close()
"""
    assert run(program, upstream) == [{"in_flight": 0, "state": "closed", "failures": 0}, {"parent": 0}]
    assert len({request.connection for request in upstream.log() if request.target == "/child"}) == 1


def test_C6_a_client_that_outlives_its_mesh_begins_anew_in_a_child(no_leaks: None, upstream: Upstream) -> None:
    upstream.script({"size": 3_000_000}, then={})
    program = """
client = Mesh(service).client("orders")
gc.collect()
cluster = client._transport._router._clusters["orders"]
held = client.send(client.build_request("GET", "/held"), stream=True)

def child():
    tell(in_flight=cluster.snapshot(time.monotonic()).in_flight, drawn=cluster.rng.random())

for _ in range(2):
    join(fork(child))
tell(parent=cluster.snapshot(time.monotonic()).in_flight)
held.close()
client.close()
"""
    *children, parent = run(program, upstream)
    assert [child["in_flight"] for child in children] == [0, 0]
    assert children[0]["drawn"] != children[1]["drawn"], "they would choose the same endpoints"
    assert parent == {"parent": 1}


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
    tell(status=client.get("/").status_code, in_flight=node().in_flight)

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
    assert run(program, upstream) == [{"status": 200, "in_flight": 0}]


def test_S3_forks_amid_threads_that_call(no_leaks: None, upstream: Upstream) -> None:
    # Without TLS: a fork amid handshakes can leave the child with a locked OpenSSL, whoever uses it.
    program = """
client = mesh.client("orders")
over = threading.Event()
wrong = []

def work():
    while not over.is_set():
        wrong.append(wrong_of(client, f"{threading.get_ident()}-{len(wrong)}", 10))

def child():
    signal.alarm(20)
    assert node().in_flight == 0
    assert wrong_of(client, os.getpid(), 10) == 0
    assert node().in_flight == 0

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for _ in range(5):
    join(*[fork(child) for _ in range(4)])
over.set()
for thread in threads:
    thread.join()
tell(wrong=sum(wrong), many=len(wrong) > 8, in_flight=node().in_flight)
client.close()
"""
    assert run(program, upstream) == [{"wrong": 0, "many": True, "in_flight": 0}]


# Imports


FIRST = {
    "call": "",
    "update": "mesh.update(Service('orders', [address, 'localhost:' + address.rpartition(':')[2]]))",
    "call that is traced": "",
}

PROVIDER = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

trace.set_tracer_provider(TracerProvider())
"""


@pytest.mark.parametrize("first", FIRST)
def test_S3_forks_amid_another_threads_first(no_leaks: None, upstream: Upstream, first: str) -> None:
    # A child would wait for ever for a module that the other thread was importing.
    program = f"""
{PROVIDER if first == "call that is traced" else ""}
def first():
    {FIRST[first]}
    with mesh.client("orders") as client:
        client.get("/first")

def child():
    signal.alarm(10)
    first()

other = threading.Thread(target=first)
other.start()
pids = []
while len(pids) < 8 and (other.is_alive() or not pids):
    pids.append(fork(child))
    time.sleep(0.01)
join(*pids)
other.join()
"""
    assert run(program, upstream) == []


def test_S3_a_fork_waits_for_an_update(no_leaks: None, upstream: Upstream) -> None:
    program = """
class Slow:
    def prepare(self, nodes, rng):
        preparing.set()
        time.sleep(0.3)
        return lambda now, key: iter(nodes)

preparing = threading.Event()
other = threading.Thread(target=lambda: mesh.update(Service("users", [address], balancer=Slow())))
other.start()
preparing.wait()

def child():
    with mesh.client("users") as client:
        tell(status=client.get("/").status_code)

join(fork(child))
other.join()
"""
    assert run(program, upstream) == [{"status": 200}]


NOTHING_IS_IMPORTED = """
from meshlib.fork import whole

class Noting:
    # Python asks it for every module that is not there yet.
    def find_spec(self, name, path, target=None):
        if not whole._is_owned():
            noted.append(name)

async def ask():
    async with mesh.async_client("orders") as client:
        await client.get("/async")
    await mesh.aclose()

noted = []
sys.meta_path.insert(0, Noting())
with mesh.client("orders") as client:
    client.get("/sync")
asyncio.run(ask())
mesh.snapshot()
if is_followed:  # a change of its file is an update
    mesh.update(service)
mesh.close()
tell(noted=noted)
"""

MESHES = {
    "a list": "Mesh(service)",
    "passthrough": "Mesh(service, passthrough=True)",
    "a file of endpoints": "Mesh(Service('orders', 'file:endpoints.toml'))",
    "a file that is followed": "Mesh.from_toml('mesh.toml', reload=True)",
    "traced": "Mesh(service, tracer_provider=TracerProvider())",
}


@pytest.mark.parametrize("made", MESHES)
def test_S3_calls_import_nothing_that_a_fork_does_not_wait_for(
    no_leaks: None, upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    (tmp_path / "endpoints.toml").write_text(f'endpoints = ["{upstream.address}"]')
    (tmp_path / "mesh.toml").write_text(f'services.orders.resolver = ["{upstream.address}"]')
    monkeypatch.chdir(tmp_path)
    program = "from opentelemetry.sdk.trace import TracerProvider\n" if made == "traced" else ""
    program += f"is_followed, mesh = {made == 'a file that is followed'}, {MESHES[made]}\n"
    assert run(program + NOTHING_IS_IMPORTED, upstream) == [{"noted": []}]


# gunicorn --preload

APP = """
import os, threading
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


@pytest.mark.parametrize("kind", [["sync"], ["gthread", "--threads", "4"]], ids=["sync", "gthread"])
def test_S3_gunicorn_with_preload(no_leaks: None, upstream: Upstream, tmp_path: Path, kind: list[str]) -> None:
    (tmp_path / "preloaded.py").write_text(APP)
    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--worker-class", *kind]
        command += ["--bind", f"fd://{server.fileno()}", "--worker-tmp-dir", str(tmp_path), "preloaded:app"]
        gunicorn = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "UPSTREAM": upstream.address, "HOME": str(tmp_path)},
            pass_fds=[server.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
    paths = [f"/{number}" for number in range(600)]
    # The socket is there before its workers are, hence the patience; a connection that is kept stays with one worker.
    once = {"connection": "close"}
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=once, timeout=30, trust_env=False)
    try:
        with client, ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(client.get, paths))
    finally:
        gunicorn.terminate()
        try:
            told, _ = gunicorn.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(gunicorn.pid, signal.SIGKILL)
            told, _ = gunicorn.communicate()
    assert {response.status_code for response in responses} == {200}, told
    assert [response.json()["path"] for response in responses] == paths
    assert len({response.headers["x-pid"] for response in responses}) == 2, "all of it was done by one worker"
    assert "Traceback" not in told
    assert gunicorn.returncode == 0, told
