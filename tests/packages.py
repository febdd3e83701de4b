"""An installed package that brings resolvers, as `importlib.metadata` sees one."""

from __future__ import annotations

from pathlib import Path

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"

SOURCE = '''
import itertools

from meshlib import ConfigError, Endpoint
from meshlib.discovery import Resolution
from meshlib.validation import Fault

asked = itertools.count(1)
EXPECTED = {1: None, 4: None}


class Counted:
    """Another endpoint from the fourth question on; the third fails. The fourth is asked plainly for that."""

    def __init__(self, url):
        self.source = url

    async def resolve(self, service, previous):
        number = next(asked)
        if previous != EXPECTED.get(number, previous):
            raise AssertionError(f"question {number} came with {previous}")
        if number == 3:
            raise OSError("the third question")
        answer = Resolution([Endpoint("10.0.0.1", 80 + number // 4, metadata={"for": service})], None, number)
        EXPECTED.setdefault(number + 1, answer)
        return answer


class Answerless:
    def __init__(self, url):
        self.source = url

    async def resolve(self, service, previous):
        return None


def nothing(url):
    return None


def refuses(url):
    raise ConfigError([Fault("resolver", "must be nicer")])


def breaks(url):
    raise RuntimeError(url)
'''


def install(folder: Path, entry_points: str, *, name: str = "acme", source: str = SOURCE) -> None:
    """Make what a wheel leaves in `folder`: a module `<name>_resolvers`, and the metadata of its distribution.

    Args:
        entry_points: the lines of the group `meshlib.resolvers`.
    """
    (folder / f"{name}_resolvers.py").write_text(source)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(METADATA.format(name=name))
    (metadata / "entry_points.txt").write_text(f"[meshlib.resolvers]\n{entry_points}\n")
