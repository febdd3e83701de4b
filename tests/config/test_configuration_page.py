"""What the page on configuration shows works as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meshlib import ConfigError, Mesh
from meshlib.cli import main
from meshlib.config.reading import configured

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.once


def blocks(language: str) -> list[str]:
    return re.findall(f"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mesh.toml").write_text(blocks("toml")[0])
    (tmp_path / "users.toml").write_text("endpoints = ['127.0.0.1:8003']")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_the_file_is_as_good_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    command, said = blocks("console")[0].splitlines()
    assert main(command.removeprefix("$ meshlib ").split()) == 0
    assert capsys.readouterr().out.splitlines()[-1] == said


@pytest.mark.usefixtures("folder")
def test_code_runs() -> None:
    for code in blocks("python"):
        names: dict[str, Mesh] = {}
        exec(code, names)
        names["mesh"].close()


def test_faults_read_as_on_the_page() -> None:
    orders = {"resolver": ["10.0.0.1:80"], "retry": {"max_attempts": 0}, "timeout": {"atempt": 1}}
    with pytest.raises(ConfigError) as caught:
        configured({"services": {"orders": orders, "order": {}}})
    assert [str(fault) for fault in caught.value.faults] == blocks("text")[0].splitlines()


def test_variables_are_read_as_on_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in blocks("sh")[0].splitlines():
        name, _, value = line.partition("  #")[0].strip().partition("=")
        monkeypatch.setenv(name, str(folder / "mesh.toml") if name == "MESHLIB_CONFIG" else value.strip("'"))
    mesh = Mesh.from_env()
    orders = mesh._clusters["orders"].service
    assert (orders.timeout.total, orders.timeout.attempt, orders.retry.on_status) == (2.5, 0.5, {502, 503})
    assert mesh._zone == "eu-west-1a"
    assert mesh.snapshot()["orders"].source == "consul://127.0.0.1:8500/orders"
