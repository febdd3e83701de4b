"""Look for inputs that make a target raise: by atheris where it is installed, else by altering the seeds at random.

`python fuzz/run.py [--seconds 30] [target ...]`. An input that was found is written into the folder `--found`, and the
exit code is 1. Once mended, it belongs into `seeds/<target>/`, under a name that says what it is.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent

LONGEST_INPUT = 4096
LONGEST_TIME = 10
"""Seconds after which an input is taken for one that never ends."""


def main() -> int:
    """Run the targets one after another, each in a process of its own; 1 if one of them raised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help="which ones; default all")
    parser.add_argument("--seconds", type=int, default=30, help="for each target")
    parser.add_argument("--found", type=Path, default=Path("."), help="the folder for what is found")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        return _one(given.targets[0], given.seconds, given.found)
    names = given.targets or sorted(each.name for each in (HERE / "seeds").iterdir())
    found = [name for name in names if _apart(name, given.seconds, given.found)]
    print(f"found something: {', '.join(found)}" if found else f"nothing found in {len(names)} targets")
    return 1 if found else 0


def _apart(name: str, seconds: int, found: Path) -> int:
    print(f"== {name}", flush=True)
    how = [sys.executable, __file__, "--here", "--seconds", str(seconds), "--found", str(found), name]
    return subprocess.run(how, stdin=subprocess.DEVNULL).returncode


def _one(name: str, seconds: int, found: Path) -> int:
    if importlib.util.find_spec("atheris") is None:
        return _at_random(name, seconds, found)
    _guided(name, seconds, found)
    return 0


def _guided(name: str, seconds: int, found: Path) -> None:
    """Let atheris look, which knows what each input reached. It ends the process."""
    import atheris  # type: ignore[import-untyped]

    # It names every module.
    with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["meshlib"]):
        import targets

    with tempfile.TemporaryDirectory() as reached:
        how = [f"-max_total_time={seconds}", f"-max_len={LONGEST_INPUT}", f"-timeout={LONGEST_TIME}", "-verbosity=0"]
        how += [f"-artifact_prefix={found}/{name}-", f"-dict={HERE / 'words.txt'}", "-print_final_stats=1"]
        atheris.Setup([name, *how, reached, str(HERE / "seeds" / name)], lambda data: targets.run(name, data))
        atheris.Fuzz()


def _at_random(name: str, seconds: int, found: Path) -> int:
    import targets

    seeds = [each.read_bytes() for each in sorted((HERE / "seeds" / name).iterdir())]
    chance, end, count = random.Random(), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data, count = _altered(chance, seeds), count + 1
        try:
            targets.run(name, data)
        except Exception:
            traceback.print_exc()
            path = found / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
            path.write_bytes(data)
            print(f"written to {path}")
            return 1
    print(f"{count} inputs, without a guide: atheris is not installed")
    return 0


def _altered(chance: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with pieces of any of them in other places, or with other bytes."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 8)):
        at, other = chance.randint(0, len(data)), chance.choice(seeds)
        start = chance.randint(0, len(other))
        new = chance.choice((other[start : start + chance.randint(0, 16)], chance.randbytes(chance.randint(0, 4))))
        data[at : at + chance.randint(0, 8)] = new
    return bytes(data[:LONGEST_INPUT])


if __name__ == "__main__":
    sys.exit(main())
