"""The pages on web applications and recipes: what they show is run as it stands there, by the real frameworks."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pages import write
from servers import gunicorn, server, uvicorn

from components.absence import Missing, demanded
from meshlib import report
from meshlib.testing import Upstream

pytestmark = pytest.mark.once

LEFT = {"x-meshlib-deadline-ms": "20000"}

SETTINGS = """
SECRET_KEY = "of no use"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "shop.urls"
"""

URLS = """
from django.urls import path
from shop import views

urlpatterns = [path("orders/<int:number>", views.order), path("invoices/<int:number>", views.invoice)]
"""

WORKER = """
import os
from tasks import app

app.conf.update(
    broker_url="filesystem://",
    broker_transport_options={"data_folder_in": "broker", "data_folder_out": "broker"},
    result_backend="file://" + os.path.abspath("results"),
    worker_hijack_root_logger=False,
)
"""

LAMBDA = """
import sys
from types import SimpleNamespace
from function import handler, orders

context = SimpleNamespace(get_remaining_time_in_millis=lambda: 3000)
for line in sys.stdin:
    print(handler({"number": int(line)}, context)["path"], orders.post("/v1/orders").status_code, flush=True)
"""


def needed(*modules: str) -> None:
    """Skip without them, which in CI is a failure."""

    def find() -> None:
        for module in modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise Missing(str(error)) from None

    demanded(modules[0], find)


def passed_on(upstream: Upstream) -> list[tuple[str, bool]]:
    """What was asked for, and whether in the time that LEFT leaves."""
    return [(each.target, 10_000 < int(each.values("x-meshlib-deadline-ms")[0]) < 20_000) for each in upstream.log()]


def ask(url: str, *paths: str) -> list[int]:
    with httpx.Client(base_url=url, headers=LEFT, timeout=30, trust_env=False) as client:
        return [client.get(path).status_code for path in paths]


def test_fastapi(fleet: list[Upstream], tmp_path: Path) -> None:
    upstream, other, _ = fleet
    other.kill()
    write("frameworks.md", "FastAPI and Starlette", tmp_path, upstream, other)
    with server(*uvicorn("app:app"), folder=tmp_path) as started:
        assert ask(started.url, "/orders/5", "/invoices/5", "/mesh") == [200] * 3
    assert passed_on(upstream) == [("/v1/orders/5", True), ("/v1/invoices/5", True)]
    needed("httpx2")  # or else Starlette's test client warns of what it has instead
    told = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout


def test_flask(fleet: list[Upstream], tmp_path: Path) -> None:
    upstream, other, _ = fleet
    other.kill()
    write("frameworks.md", "Flask", tmp_path, upstream, other)
    with server(*gunicorn("shop:create_app()", tmp_path), folder=tmp_path) as started:
        assert ask(started.url, "/orders/5", "/mesh") == [200] * 2
    assert passed_on(upstream) == [("/v1/orders/5", True)]
    command = [sys.executable, "-m", "flask", "--app", "shop", "mesh", "status"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert [line.split()[0] for line in told.stdout.splitlines()] == ["service", "orders", "orders"], told.stderr


@pytest.mark.parametrize("door", ["wsgi", "asgi"])
def test_django(upstream: Upstream, tmp_path: Path, door: str) -> None:
    needed("django")
    write("recipes.md", "Django", tmp_path, upstream)
    (tmp_path / "shop" / "settings.py").write_text(SETTINGS)
    (tmp_path / "shop" / "urls.py").write_text(URLS)
    name = f"shop.{door}:application"
    command = gunicorn(name, tmp_path) if door == "wsgi" else uvicorn(name, "--lifespan", "off")
    with server(*command, folder=tmp_path) as started:
        assert ask(started.url, "/orders/5", "/invoices/5") == [200] * 2
        assert started.stop() <= 6.0  # of 3 where nothing else runs
    assert passed_on(upstream) == [("/v1/orders/5", True), ("/v1/invoices/5", True)]
    assert "Traceback" not in started.told


def test_litestar(upstream: Upstream, tmp_path: Path) -> None:
    needed("litestar")
    write("recipes.md", "Litestar", tmp_path, upstream)
    with server(*uvicorn("app:app"), folder=tmp_path) as started:
        assert ask(started.url, "/orders/5") == [200]
        started.stop()
    assert passed_on(upstream) == [("/v1/orders/5", True)]
    assert "Traceback" not in started.told


def test_celery(upstream: Upstream, tmp_path: Path) -> None:
    needed("celery")
    write("recipes.md", "Celery", tmp_path, upstream)
    (tmp_path / "worker.py").write_text(WORKER)
    for folder in ("broker", "results"):
        (tmp_path / folder).mkdir()
    celery = "celery", "-A", "worker", "worker", "-c", "1", "--without-gossip", "--without-mingle", "-l", "warning"
    with server(*celery, folder=tmp_path) as started:
        asking = "import worker; print(worker.app.tasks['tasks.ship'].delay(5).get(timeout=60))"
        told = subprocess.run([sys.executable, "-c", asking], cwd=tmp_path, capture_output=True, text=True)
        started.stop()
    assert told.stdout == "200\n", told.stderr + started.told
    assert [(each.method, *passed) for each, passed in zip(upstream.log(), passed_on(upstream), strict=True)] == [
        ("PUT", "/v1/orders/5", True)
    ]
    assert "Traceback" not in started.told


# The OpenAI SDK


def chunk(text: str) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    told = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "llama", "choices": [choice]}
    return f"data: {json.dumps(told)}\n\n"


@pytest.fixture
def models(fleet: list[Upstream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    needed("openai")
    write("recipes.md", "The OpenAI SDK over a fleet of model servers", tmp_path, *fleet)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("models")
    answer = {"headers": {"content-type": "text/event-stream"}, "body": chunk("a") + chunk("b") + "data: [DONE]\n\n"}
    for each in fleet:
        each.script(then={**answer, "fault": "drip", "interval": 0.0005})
    yield module
    module.openai.close()
    del sys.modules["models"]


def in_flight(mesh: Any) -> list[int]:
    return sorted(node.in_flight for node in mesh.snapshot()["models"].nodes)


def test_openai_keeps_sessions_and_counts_answers_until_they_end(models: Any, fleet: list[Upstream]) -> None:
    for _ in range(3):
        assert list(models.reply("mine", [])) == ["a", "b"]
    [own] = [each for each in fleet if each.log()]
    assert len(own.log()) == 3
    first = models.reply("mine", [])
    assert next(first) == "a"
    assert in_flight(models.mesh) == [0, 0, 1]
    second = models.reply("mine", [])  # one of one is more than 1.25 times a third
    assert next(second) == "a"
    assert in_flight(models.mesh) == [0, 1, 1]
    assert list(first) == list(second) == ["b"]
    assert in_flight(models.mesh) == [0, 0, 0]
    own.kill()
    assert list(models.reply("mine", [])) == ["a", "b"]


def test_openai_tells_what_a_call_went_through(models: Any, fleet: list[Upstream]) -> None:
    for each in fleet:
        each.kill()
    with pytest.raises(importlib.import_module("openai").APIConnectionError) as caught:
        list(models.reply("mine", []))
    assert len(report(caught.value.__cause__).attempts) >= 3  # type: ignore[arg-type]


def test_a_transport_of_ours_is_not_for_httpx2(models: Any) -> None:
    httpx2 = importlib.import_module("httpx2")
    with httpx2.Client(transport=models.mesh.transport()) as client, pytest.raises(AssertionError):
        client.get("http://models/")


# Frozen between calls


def test_what_is_frozen_between_calls_goes_on(upstream: Upstream, tmp_path: Path) -> None:
    write("recipes.md", "AWS Lambda, and whatever else is frozen between calls", tmp_path)
    path = tmp_path / "function.py"
    path.write_text(path.read_text().replace("orders.internal:8080", f"localhost:{upstream.port}"))
    with subprocess.Popen(
        [sys.executable, "-c", LAMBDA], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ask: Callable[[int], str] = lambda number: _told(process, number)  # noqa: E731
        assert ask(1) == "/v1/orders/1 200\n"
        os.kill(process.pid, signal.SIGSTOP)
        upstream.restart()  # ends the connection that was kept
        os.kill(process.pid, signal.SIGCONT)
        assert ask(2) == "/v1/orders/2 200\n"
        process.stdin.close()
        assert process.wait(10) == 0


def _told(process: Any, number: int) -> str:
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    return str(process.stdout.readline())
