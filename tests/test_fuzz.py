"""What fuzzing starts from, and what it found, stays right: every seed runs through its target.

`nox -s fuzz` looks for more. What it finds is kept as a seed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz"
SEEDS = sorted((FUZZ / "seeds").glob("*/*"))


@pytest.fixture(scope="module")
def targets() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fuzz_targets", FUZZ / "targets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.loop.close()


@pytest.mark.parametrize("name", sorted({each.parent.name for each in SEEDS}))
def test_every_seed_does_what_it_must(targets: ModuleType, name: str) -> None:
    for seed in SEEDS:
        if seed.parent.name == name:
            targets.run(name, seed.read_bytes())


def test_every_target_has_seeds(targets: ModuleType) -> None:
    assert set(targets.TARGETS) == {each.parent.name for each in SEEDS}
