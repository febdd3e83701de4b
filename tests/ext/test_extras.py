"""Who lacks an extra is told which one, and not the name of a package that it would bring along."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("framework", "lacking", "module"),
    [("fastapi", "starlette", "starlette.requests"), ("flask", "flask", "click")],
)
def test_the_missing_extra_is_named(framework: str, lacking: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"meshlib.ext.{framework}", raising=False)
    with pytest.raises(ImportError, match=rf"^{lacking} is not installed: pip install 'meshlib-http\[{framework}\]'$"):
        importlib.import_module(f"meshlib.ext.{framework}")
