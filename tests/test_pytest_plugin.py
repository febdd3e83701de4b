"""The pytest plugin, and what the page on testing shows, each as users run it: by a pytest of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")

# In its module, since those are all imported before the first test runs.
LIGHT = """
import sys

LOADED = sorted({"httpx", "meshlib"} & sys.modules.keys())

def test_a_run_without_its_fixtures_loads_none_of_it():
    assert LOADED == []
"""

BROKEN = """
import os

def test_that_fails_amid_its_servers(mesh_upstreams):
    pids = [each.pid for each in mesh_upstreams(2, delay=0.01)]
    with open("pids", "w") as file:
        file.write(" ".join(map(str, pids)))
    raise OSError

def test_its_servers_are_gone():
    with open("pids") as file:
        for pid in map(int, file.read().split()):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                continue
            raise AssertionError("it runs on")
"""


def run(folder: Path, *arguments: str) -> str:
    """What pytest says in a folder of its own, where the plugin is loaded and warnings are errors."""
    options = ["-p", "pytest_meshlib", "-p", "no:cacheprovider", "-W", "error"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def test_the_example_and_the_page_pass(tmp_path: Path) -> None:
    tests, program, servers = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    example = (ROOT / "examples" / "test_what_if.py").read_text(encoding="utf-8")
    files = {"test_0": LIGHT, "test_1": tests, "shop": program, "test_2": servers, "test_3": example}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    said = run(tmp_path, "-q")
    assert re.search(r"^10 passed", said, re.MULTILINE), said


def test_servers_of_a_test_that_fails_are_closed(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text(BROKEN)
    said = run(tmp_path, "-q")
    assert re.search(r"^1 failed, 1 passed", said, re.MULTILINE), said


def test_its_fixtures_are_called_as_nothing_of_ours_is() -> None:
    import conftest
    import pytest_meshlib

    def fixtures(module: object) -> set[str]:
        return {name for name, value in vars(module).items() if isinstance(value, type(pytest_meshlib.mesh_clock))}

    assert isinstance(pytest_meshlib.mesh_clock, type(pytest.fixture(lambda: None)))
    assert fixtures(pytest_meshlib) == {"mesh_upstreams", "mesh_clock", "mesh_no_backoff"}
    assert not fixtures(pytest_meshlib) & fixtures(conftest)
