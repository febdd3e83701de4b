"""How many checks in a row it takes to change what a node counts as."""

from __future__ import annotations

import pytest

from meshlib import HealthCheck
from meshlib.core.health import Standing


@pytest.mark.parametrize(
    ("checks", "standings"),
    [
        ("+", "+"),
        ("-", "-"),
        ("+--", "+++"),
        ("+---", "+++-"),
        ("+--+--+", "+++++++"),
        ("+--+---", "++++++-"),
        ("-+", "--"),
        ("-++", "--+"),
        ("-+-+-", "-----"),
        ("-++--", "--+++"),
        ("+---++---", "+++--+++-"),
    ],
)
def test_the_first_check_decides_and_then_it_takes_some_in_a_row(checks: str, standings: str) -> None:
    standing = Standing(HealthCheck("/", healthy=2, unhealthy=3))
    assert standing.healthy is None
    seen = []
    for passed in checks:
        before = standing.healthy
        changed = standing.hear(passed == "+")
        assert changed is (standing.healthy is not before)
        seen.append("+" if standing.healthy else "-")
    assert "".join(seen) == standings


def test_one_may_be_enough_both_ways() -> None:
    standing = Standing(HealthCheck("/", healthy=1, unhealthy=1))
    assert [standing.hear(passed) for passed in (True, False, False, True)] == [True, True, False, True]
