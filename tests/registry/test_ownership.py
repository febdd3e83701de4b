"""Which worker of a host owns a registration, by lock files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from meshlib.registry.ownership import Alone, Shared, ownership_of

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no such locks"),
]


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Shared]]:
    """Two of them; each has files of its own open, as if in processes of their own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with ExitStack() as stack:
        made = [Shared("orders-h-1") for _ in range(2)]
        for each in made:
            stack.callback(each.close)
        yield made


def test_G1_one_owns_it_until_it_gives_it_up(workers: list[Shared]) -> None:
    first, second = workers
    assert first.join()
    assert second.join()
    assert [first.claim(), second.claim(), first.claim()] == [True, False, True]
    first.give_up()
    assert [second.claim(), first.claim()] == [True, False]


def test_G1_only_the_last_to_leave_is_told_so(workers: list[Shared]) -> None:
    first, second = workers
    assert first.join()
    assert second.join()
    assert first.claim()
    assert not first.leave()
    assert second.claim()
    assert second.leave()


def test_G1_nobody_comes_while_the_last_one_takes_it_back(workers: list[Shared]) -> None:
    first, second = workers
    assert first.join()
    assert first.leave()
    assert not second.join()
    first._take(first._members, first._none)
    assert second.join()


def test_other_ids_have_other_owners(workers: list[Shared]) -> None:
    other = Shared("orders-h-2" + "x" * 500)
    assert workers[0].claim()
    assert other.claim()
    other.close()


@pytest.mark.skipif(os.name != "posix", reason="there are no such rights")
def test_the_files_are_in_a_folder_of_ours_alone(
    workers: list[Shared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert stat.S_IMODE((tmp_path / "meshlib").stat().st_mode) == 0o700
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / f"meshlib-{os.getuid()}").symlink_to(elsewhere)  # somebody was there first
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert isinstance(ownership_of("orders-h-1"), Alone)
    assert "each worker registers for itself" in caplog.text
    assert not list(elsewhere.iterdir())
