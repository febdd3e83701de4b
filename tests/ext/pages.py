"""What the documentation's pages show, as files: a block of Python whose first line is a path is that file."""

from __future__ import annotations

import re
from pathlib import Path

from meshlib.testing import Upstream

DOCS = Path(__file__).parents[2] / "docs"


def write(page: str, title: str, folder: Path, *upstreams: Upstream) -> None:
    """Write the files of a page's section; its first address becomes the first upstream's, and so on."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", section, re.DOTALL)
    assert found, f"{page} shows nothing about {title}"
    for name, source in found:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(_meshed(source, upstreams), encoding="utf-8")


def _meshed(source: str, upstreams: tuple[Upstream, ...]) -> str:
    for number, upstream in enumerate(upstreams, 1):
        source = source.replace(f"10.0.0.{number}:8080", upstream.address)
    assert "10.0.0." not in source, "there are more endpoints than upstreams"
    return source
