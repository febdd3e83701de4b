"""`report()`: found on a response and on an exception, and an error on anything else."""

from __future__ import annotations

import httpx
import pytest
from scripted import OK, Stage

from meshlib import report
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
