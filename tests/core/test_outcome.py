"""The outcome table, row by row, without a call around it."""

from __future__ import annotations

import pytest

from meshlib.core.outcome import End, Outcome, outcome_of_end, outcome_of_status, verdict_of


def test_429_and_5xx_but_501_and_505_are_rejected_and_every_other_status_is_ok() -> None:
    judged = {status for status in range(100, 600) if outcome_of_status(status) is Outcome.rejected}
    assert judged == {429, *range(500, 600)} - {501, 505}
    assert {outcome_of_status(status) for status in range(100, 600)} == {Outcome.ok, Outcome.rejected}


@pytest.mark.parametrize("status", [600, 700, 999])
def test_a_status_beyond_5xx_is_ok(status: int) -> None:
    assert outcome_of_status(status) is Outcome.ok


@pytest.mark.parametrize(
    ("end", "sent", "outcome"),
    [
        (End.lost, False, Outcome.not_sent),  # refused
        (End.identity, False, Outcome.not_sent),
        (End.lost, True, Outcome.failed),
        (End.stale, False, Outcome.not_sent),
        (End.stale, True, Outcome.failed),
        (End.timeout, False, Outcome.not_sent),  # connect timeout
        (End.timeout, True, Outcome.failed),
        (End.no_slot, False, Outcome.not_sent),
        (End.caller, False, Outcome.abandoned),
        (End.caller, True, Outcome.abandoned),
    ],
)
def test_an_end_without_an_answer_is_judged_by_who_ended_it_and_whether_a_byte_was_sent(
    end: End, sent: bool, outcome: Outcome
) -> None:
    assert outcome_of_end(end, sent=sent, lasted=5.0, usual=0.1) is outcome


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize(
    ("lasted", "usual", "outcome"),
    [
        (0.999, None, Outcome.abandoned),
        (1.0, None, Outcome.failed),
        (0.499, 0.05, Outcome.abandoned),
        (0.5, 0.05, Outcome.failed),
        (5.0, 0.6, Outcome.abandoned),  # a slow node is not blamed for the caller's short patience
        (6.0, 0.6, Outcome.failed),
    ],
)
def test_an_attempt_cut_by_the_deadline_is_failed_after_ten_times_the_usual_or_a_second(
    lasted: float, usual: float | None, outcome: Outcome, sent: bool
) -> None:
    assert outcome_of_end(End.deadline, sent=sent, lasted=lasted, usual=usual) is outcome


@pytest.mark.parametrize(
    ("outcome", "status", "end", "verdict"),
    [
        (Outcome.ok, 200, None, True),
        (Outcome.ok, 404, None, True),
        (Outcome.ok, 501, None, True),
        (Outcome.rejected, 500, None, False),
        (Outcome.rejected, 503, None, False),
        (Outcome.rejected, 429, None, None),
        (Outcome.failed, None, End.lost, False),
        (Outcome.failed, None, End.timeout, False),
        (Outcome.failed, None, End.deadline, False),
        (Outcome.failed, None, End.stale, None),  # C8 blames no breaker
        (Outcome.not_sent, None, End.lost, False),
        (Outcome.not_sent, None, End.timeout, False),
        (Outcome.not_sent, None, End.stale, None),
        (Outcome.not_sent, None, End.no_slot, None),
        (Outcome.abandoned, None, End.caller, None),
        (Outcome.abandoned, None, End.deadline, None),
    ],
)
def test_what_the_breaker_hears(outcome: Outcome, status: int | None, end: End | None, verdict: bool | None) -> None:
    assert verdict_of(outcome, status, end) is verdict
