"""`meshlib resolve` as its users run it, on files, addresses, and a scheme that a package brings."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshlib.cli import findings, main
from meshlib.discovery import file
from packages import install

pytestmark = pytest.mark.once

COMMAND = (sys.executable, "-m", "meshlib.cli", "resolve")
BOUND = 60.0

FILE = """
[[endpoints]]
host = "10.0.0.1"
port = 8080
zone = "eu-1a"
metadata = {version = "v2", "dc\\u001b[2J" = "a"}
[[endpoints]]
host = "db.internal"
port = 81
weight = 2.5
priority = 1
"""

SLEEPER = """
import asyncio, pathlib, sys
from meshlib.discovery import Resolution

class Sleeper:
    def __init__(self, url):
        self.closed = pathlib.Path(url.removeprefix("sleeper:"))

    async def resolve(self, service, previous):
        print("asked", file=sys.stderr, flush=True)
        try:
            await asyncio.sleep(3600)
        finally:
            self.closed.write_text("closed")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file of endpoints, and a package that is installed."""
    (tmp_path / "endpoints.toml").write_text(FILE)
    install(tmp_path, "acme = acme_resolvers:Counted\nnone = acme_resolvers:Answerless")
    install(tmp_path, "sleeper = sleeper_resolvers:Sleeper", name="sleeper", source=SLEEPER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_resolvers", raising=False)
    return tmp_path


@contextlib.contextmanager
def watching(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "error"}
    with subprocess.Popen([*COMMAND, *arguments], stdout=pipe, stderr=pipe, text=True, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def next_line(stream: object) -> str:
    line = next(iter(stream))  # type: ignore[call-overload]
    assert isinstance(line, str)
    return line.rstrip("\n")


def test_what_a_resolver_sees_is_a_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    monkeypatch.setattr(file, "SETTLED", -3600.0)  # so that the answer has an index, which is nobody's business
    assert main(["resolve", "file:endpoints.toml"]) == 0
    told, complaints = capsys.readouterr()
    *table, summary = told.splitlines()
    assert table == [
        "place           priority  weight  zone   metadata",
        "10.0.0.1:8080          0       1  eu-1a  version=v2 dc\\x1b[2J=a",
        "db.internal:81         1     2.5",
    ]
    assert re.fullmatch(
        rf"2 endpoints from file:{re.escape(str(folder))}/endpoints.toml; ttl 1 s; took \d+\.\d ms", summary
    )
    assert complaints == ""


def test_JSON_is_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resolve", "acme:x", "--json", "--service", "users"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("seconds") >= 0
    endpoint = {"host": "10.0.0.1", "port": 80, "weight": 1, "priority": 0, "zone": "", "metadata": {"for": "users"}}
    assert told == {"source": "acme:x", "ttl": None, "index": 1, "warnings": [], "endpoints": [endpoint]}


def test_several_URLs_are_a_failover(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resolve", "static:10.0.0.1:80", "file:gone.toml", "static:[::1]:80?weight=2"]) == 0
    told = capsys.readouterr().out
    assert "10.0.0.1:80         0       1\n[::1]:80            1       2\nwarning: file:/" in told
    assert "gone.toml: No such file or directory\n2 endpoints from failover:static:|file:/" in told


def test_D5_what_a_mesh_would_not_call_is_left_out_and_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The guard: `resolve._admitted`.
    (folder / "mixed.json").write_text('["10.0.0.1:80", "169.254.169.254:80"]')
    assert main(["resolve", "file:mixed.json", "static:169.254.0.9:80"]) == 0
    told = capsys.readouterr().out
    assert "169.254.169.254:80" not in told
    assert "169.254.0.9:80" in told  # what is written down itself is meant
    assert "warning: 1 left out, since no resolver may send us there: 169.254.169.254\n2 endpoints" in told
    (folder / "bad.json").write_text('["[::ffff:169.254.169.254]:80"]')
    assert main(["resolve", "file:bad.json"]) == 1
    assert "none of its endpoints may be called: 1 left out" in capsys.readouterr().err


def test_an_empty_answer_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "none.json").write_text("[]")
    assert main(["resolve", "file:none.json"]) == 0
    assert capsys.readouterr().out.startswith("no endpoints from file:")


@pytest.mark.parametrize("json_", [[], ["--json"]])
@pytest.mark.parametrize(
    ("url", "status", "said"),
    [
        ("file:gone.toml", 1, "gone.toml: No such file or directory\n"),
        ("none:x", 1, "none:x: answered with a NoneType, not with a Resolution\n"),
        ("flie:gone.toml", 2, "resolver: must be a URL of a known scheme "),
        ("consul-:u:secret@host", 2, "resolver: must be a URL of a known scheme "),
        ("static:10.0.0.1:0", 2, "resolver[0]: endpoint.port: must be >= 1, got 0\n"),
    ],
)
def test_what_cannot_be_is_told_with_a_status(
    url: str, status: int, said: str, json_: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resolve", url, *json_]) == status
    told, complaint = capsys.readouterr()
    assert told == ""
    assert complaint.startswith("meshlib resolve: ")
    assert said in complaint
    assert "secret" not in complaint


def test_a_watch_prints_what_changes_and_errors_and_goes_on(folder: Path) -> None:
    with watching("--watch", "--json", "acme:x") as process:
        seen = [json.loads(next_line(process.stdout)) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=BOUND) == ("", "meshlib resolve: ended by SIGINT\n")
        assert process.returncode == 130
    # The second answer is like the first.
    assert [each.get("index") for each in seen] == [1, None, 4]
    assert seen[1]["error"] == "OSError: the third question"
    assert [each["endpoints"][0]["port"] for each in seen if "endpoints" in each] == [80, 81]
    assert seen[2]["at"] - seen[0]["at"] >= 2.9, "never more than one question a second"


def test_a_watch_of_a_file_shows_its_changes_as_tables(folder: Path) -> None:
    with watching("--watch", "file:endpoints.toml") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert [next_line(process.stdout) for _ in range(5)][3].startswith("0.0 s: 2 endpoints from file:/")
        (folder / "endpoints.toml").write_text("endpoints = [")
        assert re.match(r"meshlib resolve: \d+\.\d s: file:/.*: TOML: must be well-formed: ", next_line(process.stderr))
        (folder / "endpoints.toml").write_text("endpoints = []")
        assert re.match(r"\d+\.\d s: no endpoints from file:/", next_line(process.stdout))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=BOUND) == 128 + signal.SIGTERM


def test_ctrl_c_ends_it_while_the_resolver_waits_and_closes_it(folder: Path) -> None:
    with watching(f"sleeper:{folder}/closed") as process:
        assert next_line(process.stderr) == "asked"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=BOUND) == ("", "meshlib resolve: ended by SIGINT\n")
        assert process.returncode == 130
    assert (folder / "closed").read_text() == "closed"


def test_on_a_terminal_rich_draws_the_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "can_draw", lambda: True)
    (folder / "a.json").write_text('[{"host": "10.0.0.1", "port": 80, "metadata": {"a": "[red]b"}}]')
    assert main(["resolve", "file:a.json"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"place +priority +weight +zone +metadata", told)
    assert re.search(r"10\.0\.0\.1:80 +0 +1 +a=\[red\]b", told)
