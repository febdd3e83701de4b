"""What the page on discovery shows works as it says."""

from __future__ import annotations

import asyncio
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from meshlib import Service
from meshlib.cli import main
from meshlib.discovery.schemes import GROUP
from packages import install

PAGE = (Path(__file__).parents[2] / "docs" / "discovery.md").read_text(encoding="utf-8")


def block(section: str, language: str) -> str:
    """The first block of code of a section."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    match = re.search(f"```{language}\n(.*?)```", text, re.DOTALL)
    assert match
    return match[1]


def test_the_file_is_read_and_shown_as_the_page_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "endpoints.toml").write_text(block("A file", "toml"))
    assert main(["resolve", "file:endpoints.toml"]) == 0
    told = capsys.readouterr().out.replace(str(tmp_path), "/srv")
    _, *shown = block("`meshlib resolve`", "text").splitlines()
    assert re.sub(r"took .* ms", "", told).splitlines() == re.sub(r"took .* ms", "", "\n".join(shown)).splitlines()


def test_the_resolver_of_ones_own_works_and_so_does_its_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points = tomllib.loads(block("A resolver of your own", "toml"))["project"]["entry-points"][GROUP]
    (tmp_path / "my_package.py").write_text(block("A resolver of your own", "python"))
    install(tmp_path, "\n".join(f"{scheme} = {target}" for scheme, target in entry_points.items()))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ORDERS_ENDPOINTS", "10.0.0.1:8080 10.0.0.2:8080")
    try:
        import my_package  # type: ignore[import-not-found]
    finally:
        sys.modules.pop("my_package", None)
    for service in (my_package.orders, Service("orders", "env:")):
        resolver: Any = service.resolver
        answer = asyncio.run(resolver.resolve("orders", None))
        assert [str(endpoint) for endpoint in answer.endpoints] == ["10.0.0.1:8080", "10.0.0.2:8080"]
        assert resolver.source == "env:"
