"""`report()`: found on a response and on an exception, and an error on anything else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from scripted import OK, Draws, Stage, answer, broke

from meshlib import Retry, RoundRobin, report
from meshlib.core.ending import Ending
from meshlib.core.outcome import End
from meshlib.core.report import Report


@pytest.fixture
def made() -> Report:
    return Stage(1).play([OK]).call.report


def test_it_is_found_on_a_response(made: Report) -> None:
    assert report(httpx.Response(200, extensions={"meshlib": made})) is made


def test_it_is_found_on_an_exception(made: Report) -> None:
    error = httpx.ConnectError("refused")
    error.meshlib_report = made  # type: ignore[attr-defined]
    assert report(error) is made


@pytest.mark.parametrize(
    "stranger",
    [httpx.Response(200), httpx.Response(200, extensions={"meshlib": {"idempotent": True}}), ValueError("x"), None, 5],
)
def test_what_did_not_come_out_of_a_mesh_has_none(stranger: object) -> None:
    with pytest.raises(ValueError, match=f"this {type(stranger).__name__} did not come out of a call through a mesh"):
        report(stranger)


REFUSED = broke(
    End.lost,
    sent=False,
    error="ConnectError: connecting to 10.0.0.1:80 failed: Connection refused",
    lasts=0.0004,
)
LATE = broke(End.timeout, error="ReadTimeout", lasts=0.5)


def test_the_page_shows_what_a_report_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "calls.md").read_text(encoding="utf-8")
    section = page.split("\n## What happened\n")[1].split("\n## ")[0]
    stage = Stage(3, balancer=RoundRobin(), rng=Draws(0.0), retry=Retry(max_attempts=2))
    long = stage.play([REFUSED, answer(503, retry_after=0.25, lasts=0.12), answer(200, lasts=0.0314)]).call.report
    short = Stage(2, balancer=RoundRobin(), rng=Draws(0.0), retry=Retry(max_attempts=2)).play([LATE, LATE]).call.report
    assert re.findall("```text\n(.*)\n```", section) == [str(long), f"meshlib: {short}"]
    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert listed == long.to_dict()["attempts"][0].keys()


def test_it_is_plain_data_too(made: Report) -> None:
    assert json.loads(json.dumps(made.to_dict())) == {
        "service": "orders",
        "attempts": [
            {
                "endpoint": "10.0.0.1:80",
                "kind": "first",
                "why": "InOrder",
                "outcome": "ok",
                "status": 200,
                "error": None,
                "seconds": pytest.approx(0.01),
                "waited": 0.0,
                "retry_after": None,
                "decision": None,
            }
        ],
    }


def test_what_is_under_way_says_so() -> None:
    call = Stage(1).call()
    attempt = call.begin(0.0)
    assert str(attempt) == "first at 10.0.0.1:80 (InOrder): under way"
    assert call.report.to_dict()["attempts"][0]["outcome"] is None
    assert attempt is not None
    call.settle(attempt, 1.5, Ending(end=End.lost, error="ReadError"))
    assert str(attempt) == "first at 10.0.0.1:80 (InOrder): failed in 1.50 s, ReadError"
