"""What becomes of a test whose real component is not there.

Decides between a failure and a skip: where `CI` is set, a component that is missing is a failure, so that nobody takes
a run without it for a proof; elsewhere the test is skipped, and says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import pytest

Found = TypeVar("Found")


class Missing(Exception):
    """A component that this machine does not have and could not get, with the reason."""


def demanded(component: str, find: Callable[[], Found]) -> Found:
    """What `find` finds; without it the test that asks is skipped, or fails where `CI` is set."""
    try:
        return find()
    except Missing as why:
        reason = f"{component} is not to be had: {why}"
        if os.environ.get("CI"):
            pytest.fail(f"{reason} (CI is set, so this is a failure)", pytrace=False)
        pytest.skip(reason)
