"""`meshlib check`: every fault on a line of its own, and an exit status that scripts can go by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshes import refusing
from meshlib.cli import main
from meshlib.testing import Upstream

pytestmark = pytest.mark.once


def test_faults_are_printed_one_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[services.orders]\nresolver = ['10.0.0.1']\nretry = {max_attempts = 0, on = 1}\n")
    assert main(["check", str(file)]) == 1
    assert [line.partition(": must")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{file}: services.orders.resolver[0]: endpoint",
        f"{file}: services.orders.retry.max_attempts",
        f"{file}: services.orders.retry.on",
    ]


def test_a_file_without_faults_is_fine_and_its_doubts_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[services.orders]\nresolver = ['10.0.0.1:80']\ntimeout = {total = 1}\n")
    assert main(["check", str(file)]) == 0
    warning, last = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"{file}: services.orders: warning: timeout.attempt, 10 s, is longer than")
    assert last == f"{file}: 1 service, no faults"


def test_what_the_output_cannot_hold_is_printed_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[services.orders]\nresolver = ['10.0.0.1:80']\n'caf\u00e9\u200b' = 1\n", encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "meshlib.cli", "check", file],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "services.orders.'caf\\xe9\\u200b': must not be there" in ended.stdout


@pytest.mark.parametrize("arguments", [[], ["mesh.toml", "--schema"], ["mesh.toml", "--timeout", "0"]])
def test_bad_usage_is_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check", *arguments])
    assert caught.value.code == 2


def test_a_file_that_cannot_be_read_is_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "mesh.toml")]) == 2
    assert main(["check", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "No such file or directory" in told.err


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "meshlib"


def test_live_finds_the_endpoints_and_connects(
    tmp_path: Path, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mesh.toml"
    (tmp_path / "users.toml").write_text(f"endpoints = ['{upstream.address}']")
    with refusing() as dead:
        file.write_text(f"""
            [services.orders]
            resolver = ["{upstream.address}", "{dead}"]
            [services.users]
            resolver = "file:users.toml"
        """)
        assert main(["check", str(file), "--live"]) == 0
        first, orders, good, bad, users, same = capsys.readouterr().out.splitlines()
        assert first == f"{file}: 2 services, no faults"
        assert orders == "orders: 2 endpoints, 1 can be connected to (static)"
        assert good == f"  {upstream.address}: connected"
        assert bad.startswith(f"  {dead}: ConnectionRefusedError")
        assert users == f"users: 1 endpoint, 1 can be connected to (file:{tmp_path}/users.toml)"
        assert same == f"  {upstream.address}: connected"
        (tmp_path / "users.toml").unlink()
        assert main(["check", str(file), "--live", "--timeout", "0.5"]) == 1
        assert "users: no answer yet, 0 can be connected to" in capsys.readouterr().out
