"""`meshlib top` as its users run it, on the status page of a mesh, on a terminal, and on what is no status page."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from meshes import mesh_of, refusing
from meshlib import Breaker
from meshlib.cli import main, overview
from meshlib.ext.wsgi import status_app
from meshlib.testing import Upstream
from served import served

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

COMMAND = (sys.executable, "-m", "meshlib.cli", "top")
BOUND = 20.0
ESCAPE = "\x1b[2J"

NODE: dict[str, Any] = {
    "endpoint": f"10.0.0.1:80{ESCAPE}",
    "state": "half_open",
    "eligible": False,
    "why": "a probe is under way",
    "in_flight": 1234,
    "attempts": 5678,
    "failures": 9,
    "weight": 2.5,
    "rate": 0.25,
    "p50": 0.0123,
    "p99": None,
    "last_error": "status 503",
}
SERVICE: dict[str, Any] = {
    "name": "orders",
    "nodes": [NODE],
    "in_flight": 1,
    "panic": True,
    "panics": 3,
    "budget_tokens": 499.5,
    "budget_capacity": 500,
    "throttle_share": 0.25,
    "limit": 10,
    "balancer": f"Own{ESCAPE}",
    "source": f"consul:{ESCAPE}",
    "age": None,
    "warnings": [f"odd{ESCAPE}"],
}


def always(status: str, body: bytes = b"", *headers: tuple[str, str]) -> WSGIApplication:
    """An app with one answer."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response(status, list(headers))
        return [body]

    return app


def test_once_prints_a_table_and_ends(fleet: list[Upstream], capsys: pytest.CaptureFixture[str]) -> None:
    mesh = mesh_of(*fleet, breaker=Breaker(open_for=60.0))
    fleet[1].kill()
    with mesh.client("orders") as client:
        while mesh.snapshot()["orders"].nodes[1].state != "open":
            client.get("/")
    with served(status_app(mesh)) as url:
        assert main(["top", url, "--once"]) == 0
        assert main(["top", f"{url}/snapshot.json", "--once"]) == 0
    told, complaints = capsys.readouterr()
    lines = told.splitlines()
    assert re.fullmatch(
        r"orders: 2 of 3 eligible, [\d.]+ attempts per s, 0 in flight, \d+ of 500 budget tokens, "
        r"by LeastRequest, from static, confirmed \d+ s ago",
        lines[0],
    )
    assert re.split(r"  +", lines[1]) == list(overview.HEADINGS)
    rows = {words[0]: words for words in (re.split(r"  +", line) for line in lines[2:5])}
    assert rows.keys() == {upstream.address for upstream in fleet}
    dead = rows[fleet[1].address]
    assert (dead[1], dead[2]) == ("open", "no")
    assert dead[-1].startswith("ejected after 5 failures in a row (last ConnectError: connecting to ")
    assert lines.count(lines[1]) == 2
    assert complaints == ""


def test_what_is_told_is_words_and_moves_no_cursor() -> None:
    (service,) = overview.Overview.of({"services": {"orders": SERVICE}}).services
    assert service.lines[0].words == (
        "10.0.0.1:80\\x1b[2J",
        "half_open",
        "no",
        "2.5",
        "1,234",
        "0.2",
        "12",
        "-",
        "5,678",
        "9",
        "a probe is under way (last status 503)",
    )
    assert service.warnings == ("odd\\x1b[2J",)
    assert service.figures == (
        "0 of 1 eligible, 0.2 attempts per s, 1 of 10 in flight, 500 of 500 budget tokens, 25% refused here, 3 panics, "
        "by Own\\x1b[2J, from consul:\\x1b[2J, no answer yet"
    )
    assert ", 1 panic, " in overview.ServiceLines.of("orders", SERVICE | {"panics": 1}).figures


def test_where_there_is_no_room_trouble_comes_first() -> None:
    nodes = [
        {
            **NODE,
            "endpoint": f"10.0.0.{number}:80",
            "eligible": number != 6,
            "state": "open" if number == 5 else "closed",
        }
        for number in range(1, 8)
    ]
    (service,) = overview.Overview.of({"services": {"orders": {**SERVICE, "nodes": nodes}}}).services
    lines, more = service.cut(3)
    assert [line.words[0] for line in lines] == ["10.0.0.6:80", "10.0.0.5:80", "10.0.0.1:80"]
    assert more == 4
    assert service.cut(7)[1] == 0


FEWEST = "endpoint state p50 ms p99 ms failures why"


@pytest.mark.parametrize(
    ("width", "columns"),
    [(66, FEWEST), (80, FEWEST), (100, "endpoint state eligible per s p50 ms p99 ms failures why")],
)
def test_a_narrow_terminal_goes_without_some_columns(width: int, columns: str) -> None:
    lines = [overview.Line.of({**NODE, "endpoint": "10.10.10.10:8080", "why": "ejected after 5 failures in a row"})]
    console = Console(width=width, file=io.StringIO())
    console.print(overview._table(lines, width))
    heads, first, *_ = console.file.getvalue().splitlines()
    assert " ".join(heads.split()) == columns
    assert first.startswith("10.10.10.10:8080  half_open  ")


@pytest.mark.parametrize(
    ("app", "said"),
    [
        (always("404 Not Found"), "404 Not Found"),
        (always("403 Forbidden"), "403 Forbidden"),
        (always("401 Unauthorized"), "401: it wants a user and a password: http://user:password@..."),
        (
            always("302 Found", b"", ("Location", "https://u:secret@sso.test/in?t=secret")),
            "302: it leads to https://sso.test/in",
        ),
        (always("200 OK", b"<html>"), "something else than a status page answers there"),
        (always("200 OK", b"[1]"), "something else than a status page answers there"),
        (
            always("200 OK", b'{"services": {"orders": {"nodes": []}}}'),
            "something else than a status page answers there",
        ),
        (always("200 OK", b"short", ("Content-Length", "10")), "peer closed connection"),
    ],
)
def test_what_is_no_status_page_is_told(app: WSGIApplication, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with served(app) as url:
        target = url.replace("//", "//user:secret@") + "/a?token=secret"
        assert main(["top", target, "--once"]) == 1
    told, complaint = capsys.readouterr()
    assert told == ""
    assert complaint.startswith(f"meshlib top: {url}/a: {said}")
    assert "secret" not in complaint


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with refusing() as address:
        assert main(["top", f"http://user:secret@{address}", "--once"]) == 1
    assert re.fullmatch(rf"meshlib top: http://{address}: .*Connection refused\n", capsys.readouterr().err)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://h/", "http://", "http://u:secret@h:port/"])
def test_a_URL_that_cannot_be(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", url]) == 2
    assert capsys.readouterr() == (
        "",
        "meshlib top: URL: must be where a status page is mounted, for example http://127.0.0.1:8000/mesh\n",
    )


@pytest.mark.parametrize("interval", ["0", "x", "nan", "-1"])
def test_an_interval_that_cannot_be(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["top", "http://h", f"--interval={interval}"])
    assert "must be a number of seconds from 0.1 to 3600" in capsys.readouterr().err


def test_credentials_in_the_URL_are_sent_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    right = f"Basic {base64.b64encode(b'ops:p@ss').decode()}"
    app = status_app(mesh_of("10.0.0.1:80"), auth=lambda request: request.headers.get("authorization") == right or 401)
    with served(app) as url:
        assert main(["top", url.replace("//", "//ops:p%40ss@"), "--once"]) == 0
        assert main(["top", url.replace("//", "//ops:wrong@"), "--once"]) == 1
    told, complaint = capsys.readouterr()
    assert told.startswith("orders: 1 of 1 eligible")
    assert complaint.startswith(f"meshlib top: {url}: 401: ")


# Live, in a process of its own


@contextlib.contextmanager
def started(*arguments: str, **pipes: Any) -> Iterator[subprocess.Popen[str]]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONWARNINGS": "error",
        "TERM": "xterm",
    }
    with subprocess.Popen([*COMMAND, *arguments], text=True, env=env, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_in_a_pipe_it_goes_on_through_errors_until_ctrl_c(no_leaks: None) -> None:
    asked: list[int] = []

    def auth(request: object) -> Any:
        asked.append(1)
        return 403 if len(asked) in (2, 3) else True

    pipe = subprocess.PIPE
    app = status_app(mesh_of("10.0.0.1:80"), auth=auth)
    with served(app) as url, started(url, "--interval", "0.1", stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        heads = [next(line for line in process.stdout if line.startswith("orders: 1 of 1")) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        complaints = process.communicate(timeout=BOUND)[1].splitlines()
        assert process.returncode == 130
    assert len(heads) == 3
    assert [re.sub(r"\d+ s:", "0 s:", line) for line in complaints] == [f"{url}: stale for 0 s: 403 Forbidden"] * 2


def test_on_a_terminal_it_is_drawn_in_place_until_ctrl_c(no_leaks: None) -> None:
    app = [status_app(mesh_of("10.0.0.1:80"))]

    def changing(environ: dict[str, Any], start_response: Any) -> Any:
        return app[0](environ, start_response)

    with (
        served(changing) as url,
        terminal() as (read_until, end),
        started(f"{url}/", "--interval", "0.1", stdin=end, stdout=end, stderr=end) as process,
    ):
        assert "\x1b[?1049h" in read_until(r"live[^$]*10\.0\.0\.1:80"), "a screen of its own"
        app[0] = always("503 Service Unavailable")
        read_until(r"stale for \d+ s: 503 Service Unavailable[^$]*10\.0\.0\.1:80")
        process.send_signal(signal.SIGINT)
        rest = read_until(r"\x1b\[\?1049l")
        assert process.wait(timeout=BOUND) == 130
    assert "Traceback" not in rest
    assert "ended by" not in rest


@contextlib.contextmanager
def terminal() -> Iterator[tuple[Callable[[str], str], int]]:
    """What reads from a terminal until something was written to it, and the end to write to."""
    ours, theirs = pty.openpty()
    told = ""

    def read_until(pattern: str) -> str:
        nonlocal told
        deadline = time.monotonic() + BOUND
        while not (found := re.search(pattern, told)):
            assert select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0], told
            told += os.read(ours, 65536).decode(errors="replace")
        seen, told = told[: found.end()], told[found.end() :]
        return seen

    try:
        yield read_until, theirs
    finally:
        os.close(theirs)
        os.close(ours)
