"""Both extensions in real server processes: an endpoint dies under load, deadlines cross hops, workers end in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from servers import Server, gunicorn, server, uvicorn

from meshlib.testing import Upstream

pytestmark = pytest.mark.once

SOON = 6.0
"""Seconds to a server's end. Left to itself a machine needs less than 3, the bar; a worker that hung would take 30."""

APPS = {
    "fast": """
import os, time
from typing import Annotated
import httpx
from fastapi import FastAPI, Request, Response
from meshlib import Mesh, Service
from meshlib.ext.fastapi import MeshMiddleware, client, lifespan, sync_client

mesh = Mesh(Service("next", os.environ["NEXT"].split(",")))
app = FastAPI(lifespan=lifespan(mesh))
app.add_middleware(MeshMiddleware, mesh=mesh)
Next = Annotated[httpx.AsyncClient, client("next")]

@app.get("/call")
async def call(response: Response, next: Next) -> None:
    response.headers["x-pid"] = str(os.getpid())
    response.status_code = (await next.get("/")).status_code

@app.get("/hops")
async def hops(request: Request, next: Next):
    answer = (await next.get("/hops")).json()
    return [int(request.headers["x-meshlib-deadline-ms"]), *(answer if isinstance(answer, list) else [])]

@app.get("/sync-hops")
def sync_hops(request: Request, next: Annotated[httpx.Client, sync_client("next")]):
    return [int(request.headers["x-meshlib-deadline-ms"]), *next.get("/hops").json()]
""",
    "shop": """
import os
from contextlib import contextmanager
from flask import Flask
from meshlib import Mesh, Service
from meshlib.ext.flask import FlaskMesh

@contextmanager
def presence():
    say("in")
    yield
    say("out")

def say(what):
    with open("presence", "a") as file:
        file.write(f"{os.getpid()} {what}\\n")

mesh = FlaskMesh(Mesh(Service("next", "file:next.toml")), register=presence())
app = Flask(__name__)
mesh.init_app(app)

@app.get("/call")
def call():
    return "", mesh.client("next").get("/").status_code, {"x-pid": os.getpid()}
""",
    "hooks": """
import os, threading

def on_exit(server):
    with open("master", "w") as file:
        print(os.getpid(), *(thread.name for thread in threading.enumerate()), file=file)
""",
}


@pytest.fixture
def folder(tmp_path: Path, fleet: list[Upstream]) -> Path:
    for name, source in APPS.items():
        (tmp_path / f"{name}.py").write_text(source)
    places = "".join(f'[[endpoints]]\nhost = "127.0.0.1"\nport = {each.port}\n' for each in fleet)
    (tmp_path / "next.toml").write_text(places)
    return tmp_path


def asking(started: Server) -> httpx.Client:
    return httpx.Client(base_url=started.url, timeout=30, trust_env=False)


def workers(client: httpx.Client) -> set[str]:
    """Ask until both workers have answered."""
    seen: set[str] = set()
    until = time.monotonic() + 20
    while len(seen) < 2:
        assert time.monotonic() < until, f"only {seen} answered"
        seen.add(client.get("/call", headers={"connection": "close"}).headers["x-pid"])
    return seen


def lose_one_under_load(client: httpx.Client, fleet: list[Upstream]) -> list[int]:
    """Eight callers, some on kept connections and some not; one endpoint is killed amid their calls."""
    over = threading.Event()

    def call(number: int) -> Iterator[int]:
        headers = {"connection": "close"} if number % 2 else {}
        while not over.is_set():
            yield client.get("/call", headers=headers).status_code

    with ThreadPoolExecutor(8) as pool:
        calling = [pool.submit(list, call(number)) for number in range(8)]
        time.sleep(0.7)
        fleet[0].kill()
        time.sleep(1.0)
        over.set()
        return [status for each in calling for status in each.result()]


def test_fastapi_under_uvicorn_loses_an_endpoint_and_no_request(folder: Path, fleet: list[Upstream]) -> None:
    places = ",".join(each.address for each in fleet)
    with (
        server(*uvicorn("fast:app", "--workers", "2"), folder=folder, NEXT=places) as started,
        asking(started) as client,
    ):
        workers(client)
        statuses = lose_one_under_load(client, fleet)
        seconds = started.stop()  # with connections of ours that are idle
    assert set(statuses) == {200}, started.told
    assert len(statuses) > 100
    assert seconds <= SOON
    assert "Traceback" not in started.told


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_flask_under_gunicorn_loses_an_endpoint_and_no_request(folder: Path, fleet: list[Upstream], kind: str) -> None:
    more = ["--worker-class", kind, "--config", "hooks.py"]
    # That worker waits for its idle connections at its end, whatever runs in it: by default for 2 s.
    more += ["--preload", "--threads", "4", "--keep-alive", "1"] if kind == "gthread" else []
    with server(*gunicorn("shop:app", folder, *more), folder=folder) as started, asking(started) as client:
        pids = workers(client)
        statuses = lose_one_under_load(client, fleet)
        seconds = started.stop()
    assert set(statuses) == {200}, started.told
    assert len(statuses) > 100
    assert seconds <= SOON
    assert "Traceback" not in started.told
    said = [tuple(line.split()) for line in (folder / "presence").read_text().splitlines()]
    assert sorted(said) == sorted((pid, what) for pid in pids for what in ("in", "out"))
    master, *threads = (folder / "master").read_text().split()
    assert master not in pids
    assert threads == ["MainThread"]


def test_a_deadline_crosses_two_hops_and_only_shrinks(folder: Path, upstream: Upstream) -> None:
    with (
        server(*uvicorn("fast:app"), folder=folder, NEXT=upstream.address) as second,
        server(*uvicorn("fast:app"), folder=folder, NEXT=second.url.removeprefix("http://")) as first,
        asking(first) as client,
    ):
        for path in ("/hops", "/sync-hops"):
            told = client.get(path, headers={"x-meshlib-deadline-ms": "20000"}).json()
            [last] = [int(value) for value in upstream.log()[-1].values("x-meshlib-deadline-ms")]
            assert 20_000 == told[0] > told[1] > last > 10_000, (path, told, last)
        upstream.clear()
        assert client.get("/hops", headers={"x-meshlib-deadline-ms": "0"}).status_code == 504
        assert upstream.log() == []
