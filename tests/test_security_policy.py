"""`SECURITY.md` names for each line of the threat model what guards it and what tests that: there are such files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
POLICY = (ROOT / "SECURITY.md").read_text()
MODEL = POLICY.partition("## Threat model")[2]
LINES = [
    line.strip("|").split(" | ") for line in MODEL.splitlines() if line.startswith("| ") and "the guard" not in line
]


def test_every_file_that_it_names_is_there() -> None:
    named = set(re.findall(r"`((?:src|tests|requirements)/[^`]+)`", POLICY))
    assert len(named) > 20
    assert [each for each in sorted(named) if not (ROOT / each).is_file()] == []


def test_every_guard_has_a_test() -> None:
    assert len(LINES) > 15
    assert [line for line in LINES if len(line) != 3 or "`src/" not in line[1] or "`tests/" not in line[2]] == []
