"""Programs that register themselves, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from components.consul import Agent

PATIENCE = 20.0
"""Seconds for what has to happen, on a machine that has much else to do."""

PREAMBLE = """
import asyncio, logging, os, signal, sys, threading, time
from meshlib import Mesh

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s %(message)s")
mesh = Mesh()
agent, port = sys.argv[1], int(sys.argv[2])

def register(**settings):
    settings = {"port": port, "at": "consul://" + agent, "ttl": 1.0, "host": "127.0.0.1"} | settings
    return mesh.register("orders", **settings)
"""

WAITING = """
with register(alive=lambda: not os.path.exists(os.environ.get("SICK", ""))):
    while True:
        time.sleep(0.1)
"""

SERVING = """
import uvicorn

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        async with register(drain=float(os.environ.get("DRAIN", "0.3"))):
            await asyncio.sleep(0.5)
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "http":
        if scope["path"] == "/block":
            time.sleep(4)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

if __name__ == "__main__":
    uvicorn.run(app, port=port, loop=os.environ.get("LOOP", "asyncio"))
"""

FASTAPI = """
import uvicorn
from fastapi import FastAPI
from meshlib.ext.fastapi import lifespan

app = FastAPI(lifespan=lifespan(mesh, register=register(drain=float(os.environ["DRAIN"]))))

if __name__ == "__main__":
    uvicorn.run(app, port=port)
"""

PLAIN = """
entered = register(ttl=3.0)

def app(environ, start_response):
    start_response("200 OK", [("content-length", "0")])
    return []
"""

FLASK = """
from flask import Flask
from meshlib.ext.flask import FlaskMesh

app = Flask("shop")
entered = FlaskMesh(mesh, app, register=register(ttl=3.0))
"""

GUNICORN = """
from gunicorn.app.base import BaseApplication

class Served(BaseApplication):
    def load_config(self):
        settings = {"bind": f"127.0.0.1:{port}", "workers": 2, "worker_class": os.environ["KIND"], "preload_app": True}
        settings |= {"post_worker_init": lambda worker: entered.start(), "worker_tmp_dir": "/tmp"}
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self):
        return app

Served().run()
"""

FORKING = """
entered = register()
entered.start()
while entered.state != "registered":
    time.sleep(0.02)
if not os.fork():
    assert entered.state == "closed"
    print("forked", flush=True)
    sys.stdin.read()
    os._exit(0)
os.wait()
"""

ON_A_LOOP = """
async def main():
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    for turn in range(2):
        async with register() as entered:
            while not entered.counts["registered"]:
                await asyncio.sleep(0.02)
            if turn:
                await told.wait()
                print("told", flush=True)

if os.environ.get("LOOP") == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


def until(is_so: Callable[[], Any], within: float = PATIENCE) -> float:
    """Wait until it is, and say how many seconds that took."""
    begun = time.monotonic()
    while not is_so():
        assert time.monotonic() - begun < within, "it did not happen"
        time.sleep(0.02)
    return time.monotonic() - begun


def states(agent: Agent, port: int) -> list[str]:
    """The states of the instances on a port, as the agent has them; its servers may hear of it a moment later."""
    here = {name for name, service in agent.get("agent/services").items() if service["Port"] == port}
    return [check["Status"] for check in agent.get("agent/checks").values() if check["ServiceID"] in here]


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


class Worker:
    """One program, given the agent's address and a port; killed at the end of its block."""

    def __init__(self, folder: Path, program: str, agent: Agent, port: int, **environment: str) -> None:
        self._log = folder / f"{time.monotonic_ns()}.log"
        environment = dict(os.environ) | {"XDG_RUNTIME_DIR": str(folder), "PYTHONWARNINGS": "error"} | environment
        with self._log.open("wb") as written:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", PREAMBLE + program, agent.address, str(port)],
                stdin=subprocess.PIPE,
                stdout=written,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self) -> float:
        """Wait until it has ended, and say how many seconds that took."""
        begun = time.monotonic()
        self.popen.wait(timeout=PATIENCE)
        return time.monotonic() - begun

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.popen.kill()
        self.popen.communicate()
        if error is not None:
            print(self.output)
