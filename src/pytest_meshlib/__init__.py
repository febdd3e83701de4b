"""Fixtures for tests of code that uses meshlib. pytest loads them by itself, once meshlib is installed.

Decides only when what `meshlib.testing` has begins and ends. It is a package of its own, so that a run of pytest that
uses none of it does not load meshlib, nor httpx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from meshlib.testing import ManualClock, Upstream


@pytest.fixture
def mesh_upstreams() -> Iterator[Callable[..., list[Upstream]]]:
    """Starts real HTTP servers, each a process of its own: `one, two = mesh_upstreams(2)`.

    They are `meshlib.testing.Upstream`s: told what to answer by `script`, killed, suspended, and closed after the test.
    Keyword arguments go to `meshlib.testing.upstreams`.
    """
    from meshlib.testing import upstreams

    with ExitStack() as started:

        def start(count: int = 1, **settings: Any) -> list[Upstream]:
            return started.enter_context(upstreams(count, **settings))

        yield start


@pytest.fixture
def mesh_clock() -> ManualClock:
    """A clock for `Mesh(clock=mesh_clock)`, which moves by `mesh_clock.advance(seconds)`."""
    from meshlib.testing import ManualClock

    return ManualClock()


@pytest.fixture
def mesh_no_backoff() -> Iterator[None]:
    """No retry waits during the test."""
    from meshlib.testing import no_backoff

    with no_backoff():
        yield
