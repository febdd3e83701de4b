"""Whole stories of faults, told twice each: rules B1 to B6 and D6 for a service as its users meet them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from story import START, Story

from meshlib import (
    Breaker,
    Budget,
    ConsistentHash,
    LeastRequest,
    PeakEwma,
    Random,
    Retry,
    RoundRobin,
    Throttle,
    Timeout,
)
from meshlib.core.outcome import End

pytestmark = pytest.mark.once

BALANCERS = [PeakEwma(), LeastRequest(), RoundRobin(), Random(), ConsistentHash()]
EVERY_BALANCER = pytest.mark.parametrize("balancer", BALANCERS, ids=lambda each: type(each).__name__)

KEYS = 100
"""Of the calls in a story; only a consistent hash looks at them."""


def told(tell: Callable[[], Story]) -> Story:
    """The story, which comes out the same when it is told again."""
    story, again = tell(), tell()
    assert story.log == again.log
    assert story.calls == again.calls
    assert story.log
    return story


def extra(story: Story) -> float:
    """Attempts per call."""
    return len(story.log) / len(story.calls)


def latency(story: Story, since: float, until: float, quantile: float) -> float:
    """Of the calls that began in these seconds."""
    seconds = sorted(call.ended - call.started for call in story.between(since, until))
    return seconds[int(quantile * len(seconds))]


# Outage


def outage(balancer: Any, count: int, dead: Sequence[int], rate: float, keeps: bool) -> Story:
    story = Story(count, seed=3, balancer=balancer, keeps=keeps)
    for server in dead:
        story.at(1, story.servers[server].die)
        story.at(4, story.servers[server].rise)
    return story.load(rate, 6, keys=KEYS)


@EVERY_BALANCER
@pytest.mark.parametrize(("count", "dead"), [(3, [0, 1]), (8, [0, 1, 2, 3])], ids=["2 of 3", "4 of 8"])
@pytest.mark.parametrize(("rate", "keeps"), [(50, True), (500, False)], ids=["50 rps", "500 rps, lost"])
def test_B3_half_of_the_nodes_die_at_once_and_no_get_fails(
    balancer: Any, count: int, dead: list[int], rate: float, keeps: bool
) -> None:
    story = told(partial(outage, balancer, count, dead, rate, keeps))
    assert story.failed == []
    assert len(story.log) > len(story.calls), "nothing had to be tried again"


def total_outage(rate: float, how: str) -> Story:
    story = Story(seed=3, balancer=Random(), timeout=Timeout(attempt=1.0, total=5.0))
    for server in story.servers:
        if how == "refused":
            server.die()
        elif how == "hang":
            server.hang()
        else:
            server.failing, server.failure = 1.0, 503 if how == "503" else End.lost
    return story.load(rate, 60, callers=50 if how != "hang" else int(5 * rate))


@pytest.mark.parametrize(
    ("rate", "bar", "how"),
    [(5, 1.25, "refused"), (5, 1.25, "503"), (5, 1.25, "hang"), (50, 1.10, "lost"), (50, 1.10, "hang")],
)
def test_B1_in_a_total_outage_the_extra_attempts_dry_up(rate: float, bar: float, how: str) -> None:
    story = told(partial(total_outage, rate, how))
    assert extra(story) <= bar
    first = story.between(0, 1)
    assert sum(call.sent for call in first) / len(first) <= 3.0
    assert len(story.failed) == len(story.calls)


def test_B1_in_a_total_outage_at_500_rps() -> None:
    assert extra(total_outage(500, "503")) <= 1.05


def half_a_second(balancer: Any, rate: float, callers: int) -> Story:
    story = Story(seed=3, balancer=balancer)
    story.set(2, 0, 1, 2, failing=1.0)
    story.set(2.5, 0, 1, 2, failing=0.0)
    return story.load(rate, 3.5, callers=callers, keys=KEYS)


@EVERY_BALANCER
@pytest.mark.parametrize(("rate", "callers"), [(50, 16), (300, 100)])
def test_B4_all_nodes_answer_503_for_half_a_second_and_calls_succeed_again_within_200_ms(
    balancer: Any, rate: float, callers: int
) -> None:
    story = told(partial(half_a_second, balancer, rate, callers))
    assert len(story.failed) > rate / 5
    assert max(call.started for call in story.failed) < START + 2.5
    assert min(call.ended for call in story.calls if not call.failed and call.ended > START + 2.5) < START + 2.7


# Errors


def one_fails_often(balancer: Any, rate: float, seconds: float, failure: int | End) -> Story:
    story = Story(seed=3, balancer=balancer)
    story.set(0, 0, failing=0.3, failure=failure)
    return story.load(rate, seconds)


NAIVE = {
    "throttle": Throttle(enforce=False),
    "breaker": Breaker(enforce=False),
    "retry": Retry(budget=Budget(capacity=1e9)),
}


def jammed(rate: float, processes: int = 1, **service: Any) -> Story:
    """A server at 0.8 load stands still from 10 s to 20 s; it works through what came, whoever still waits for it."""
    told = Story(1, processes=processes, mean=0.8 / rate, slots=1, timeout=Timeout(attempt=0.5, total=1.0), **service)
    told.at(10, told.servers[0].hang)
    told.at(20, told.servers[0].resume)
    return told.load(rate, 32, callers=int(3 * rate), total=1.0)


def good(told: Story, since: float, until: float) -> float:
    """The share of the calls begun in these seconds that succeeded."""
    calls = told.between(since, until)
    return sum(not call.failed for call in calls) / len(calls)


@pytest.mark.parametrize(("rate", "processes"), [(50, 1), (200, 1), (100, 4)])
def test_B4_a_server_that_stood_still_for_10_s_has_its_calls_back_within_5_s(rate: float, processes: int) -> None:
    told = jammed(rate, processes)
    assert good(told, 11, 20) < 0.05
    assert [good(told, second, second + 1) >= 0.95 for second in range(25, 30)] == [True] * 5
    naive = jammed(rate, processes, **NAIVE)
    assert good(naive, 25, 32) < 0.5, "callers that just retry do not let it come back"


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("rate", "bar"), [(5, 1.25), (50, 1.10)])
def test_B1_in_an_outage_whose_answers_ask_for_fewer_there_are_fewer(rate: float, bar: float, status: int) -> None:
    told = Story(3)
    told.set(10, 0, 1, 2, failing=1.0, failure=status, retry_after=0.2)
    calls = told.load(rate, 70, total=5.0).between(10, 70)
    assert sum(call.attempts for call in calls) <= bar * len(calls)


@pytest.mark.parametrize(
    ("balancer", "failure"),
    [(PeakEwma(), 503), (Random(), 503), (Random(), End.lost)],
    ids=["PeakEwma, 503", "Random, 503", "Random, reset"],
)
def test_one_endpoint_fails_30_percent_of_its_calls_and_users_see_a_thousandth_at_most(
    balancer: Any, failure: int | End
) -> None:
    calls = failed = 0
    for rate, seconds in ((5, 1000), (50, 200), (500, 10)):
        story = one_fails_often(balancer, rate, seconds, failure)
        assert len(story.failed) <= 0.001 * len(story.calls), f"{rate} rps"
        calls, failed = calls + len(story.calls), failed + len(story.failed)
        if balancer == PeakEwma():  # which leaves it alone before there are calls to judge by
            assert story.shares(0, seconds)[0] < 0.03 * len(story.calls)
        else:
            assert story.ejections() > 0
    assert calls > 19_000
    assert failed <= 0.001 * calls


def test_B2_a_node_that_fails_every_tenth_call_stays() -> None:
    story = Story(seed=3, balancer=Random())
    story.set(0, 0, failing=0.1)
    story.load(50, 60)
    assert story.failed == []
    assert story.ejections() == 0


def test_B2_without_the_success_rate_the_node_that_fails_every_third_call_would_stay() -> None:
    story = Story(seed=3, balancer=Random(), breaker=Breaker(success_rate=0.0))
    story.set(0, 0, failing=0.3)
    story.load(50, 100)
    assert story.shares(0, 100)[0] > len(story.calls) / 5


# Brown-out


def brown_out(balancer: Any, slow: Sequence[int], breaker: Breaker) -> Story:
    story = Story(seed=3, balancer=balancer, breaker=breaker)
    story.set(2, *slow, pace=0.1)
    story.set(12, *slow, pace=1.0)
    return story.load(100, 40)


def test_a_node_that_is_ten_times_slower_is_hardly_called_by_the_default_balancer() -> None:
    story = told(partial(brown_out, PeakEwma(), [0], Breaker()))
    assert story.failed == []
    assert story.ejections() == 0
    assert latency(story, 3, 12, 0.99) < 0.03
    assert story.shares(3, 12)[0] < 0.05 * len(story.between(3, 12))


def test_B2_a_node_with_slow_answers_is_ejected_if_they_count_as_failures_and_comes_back() -> None:
    story = told(partial(brown_out, RoundRobin(), [0], Breaker(slow_call=0.04)))
    assert story.failed == []
    assert story.ejections() > 0
    assert latency(story, 3, 12, 0.95) < 0.03
    assert story.states() == ["closed"] * 3
    assert story.shares(35, 40)[0] > 0.2 * len(story.between(35, 40))


@pytest.mark.parametrize("slow_call", [None, 0.04])
def test_B3_when_all_are_ten_times_slower_nobody_is_left_out_and_no_call_fails(slow_call: float | None) -> None:
    story = told(partial(brown_out, LeastRequest(), [0, 1, 2], Breaker(slow_call=slow_call)))
    assert story.failed == []
    assert min(story.shares(3, 12)) > 0.15 * len(story.between(3, 12))
    assert latency(story, 14, 40, 0.99) < 0.03
    assert story.states() == ["closed"] * 3


# Recovery


def flapping() -> Story:
    """A node dies soon after each of its recoveries: as soon as it is called again."""
    story = Story(seed=3, balancer=Random())
    flappy = story.servers[0]

    def look(known: int) -> None:
        if story.world.now > START + 120:
            return
        if not flappy.is_up:
            flappy.rise()
            story.world.after(1.0, look, len(flappy.reached))
        elif len(flappy.reached) > known:
            flappy.die()
            story.world.after(1.0, look, 0)
        else:
            story.world.after(0.3, look, known)

    story.at(2, look, 0)
    return story.load(50, 120)


def test_B2_a_node_that_dies_after_each_recovery_costs_no_get_and_few_attempts() -> None:
    story = told(flapping)
    deaths = story.servers[0].life
    assert deaths > 10
    assert story.failed == []
    assert story.shares(2, 120)[0] < 5 * deaths
    assert len(story.log) - len(story.calls) <= 8 * deaths, "five failures, a probe, and what was on its way"


def recovery(balancer: Any, processes: int, count: int, dead: int, rate: float, until: float) -> Story:
    story = Story(count, seed=3, balancer=balancer, processes=processes)
    for server in story.servers[:dead]:
        story.at(2, server.die)
        story.at(8, server.rise)
    return story.load(rate, until, callers=48, keys=KEYS)


@pytest.mark.parametrize(
    ("balancer", "processes", "count", "dead", "rate", "until"),
    [
        (PeakEwma(), 8, 3, 1, 60, 90),
        (LeastRequest(), 8, 3, 1, 200, 25),
        (LeastRequest(), 1, 2, 1, 200, 25),
        (RoundRobin(), 8, 4, 2, 200, 25),
        (Random(), 1, 4, 2, 200, 25),
        (ConsistentHash(), 8, 3, 1, 200, 25),
    ],
    ids=repr,
)
def test_B2_a_node_that_has_recovered_gets_at_most_twice_its_fair_share_in_the_first_5_s(
    balancer: Any, processes: int, count: int, dead: int, rate: float, until: float
) -> None:
    story = told(partial(recovery, balancer, processes, count, dead, rate, until))
    assert story.failed == []
    for number, server in enumerate(story.servers[:dead]):
        first = next(at for at in server.reached if at >= START + 8) - START
        for since, until_then in ((first, first + 5), (first, first + 1), (first + 4, first + 5)):
            shares = story.shares(since, until_then)
            assert shares[number] <= 2 * sum(shares) / count
        shares = story.shares(first, first + 2)
        assert shares[number] <= 0.5 * sum(shares) / count, "it did not begin with a few"
        assert sum(story.shares(first, until)[:dead]) > 0.02 * sum(story.shares(first, until)), "it has not come back"


def slow_probes() -> Story:
    """Probes of a node that hangs take a second, while 50 callers look for something to call."""
    story = Story(seed=3, balancer=LeastRequest(), timeout=Timeout(attempt=1.0))
    story.at(2, story.servers[0].hang)
    story.at(20, story.servers[0].resume)
    return story.load(200, 40, callers=50)


def test_B2_at_most_one_probe_of_a_node_is_in_flight_with_50_concurrent_callers() -> None:
    story = told(slow_probes)
    assert story.failed == []
    assert story.processes[0].most_probes == 1
    assert sum(entry[4] == "probe" for entry in story.log) >= 3
    assert story.states() == ["closed"] * 3


# Time


def leaping(balancer: Any, at: float) -> Story:
    story = Story(seed=3, balancer=balancer)
    story.at(2, story.servers[0].die)
    story.at(at, story.world.leap, 3600.0)
    story.at(at, story.servers[0].rise)
    story.at(3612, story.world.leap, 1.0)
    return story.load(100, 3615, keys=KEYS)


@pytest.mark.parametrize("at", [2.05, 5.0], ids=["while it is found out", "while it is ejected"])
@EVERY_BALANCER
def test_the_clock_leaps_by_an_hour_and_no_call_fails(balancer: Any, at: float) -> None:
    story = told(partial(leaping, balancer, at))
    assert [call for call in story.failed if call.ended - call.started < 30] == []
    assert [call for call in story.failed if call.started > START + 3600] == []
    assert story.states() == ["closed"] * 3


def coarse(balancer: Any) -> Story:
    story = Story(seed=3, balancer=balancer, grain=1 / 64)
    story.at(1, story.servers[0].die)
    story.at(2, story.servers[0].rise)
    return story.load(200, 18, keys=KEYS)


@EVERY_BALANCER
def test_a_coarse_clock_on_which_much_happens_at_equal_times(balancer: Any) -> None:
    story = told(partial(coarse, balancer))
    assert story.failed == []
    assert story.processes[0].most_probes <= 1
    if balancer != PeakEwma():  # which takes a minute to try it again
        assert story.states() == ["closed"] * 3
        assert story.shares(15, 18)[0] > 0.1 * len(story.between(15, 18))


def stalled() -> Story:
    story = Story(seed=3, balancer=LeastRequest(), mean=0.05)
    story.at(2, story.processes[0].freeze, 15.0)
    return story.load(500, 20, callers=100)


def test_B6_a_stall_of_our_own_process_ejects_nobody() -> None:
    story = told(stalled)
    assert sum(entry[5] == "failed" for entry in story.log) > 10, "no timer went off late"
    assert story.ejections() == 0
    assert all(node.breaker.is_healthy for node in story.processes[0].cluster.view.nodes)
    assert story.failed == []


# Levels


def level_dies(balancer: Any, priorities: Sequence[int], rate: float, lasts: float) -> Story:
    story = Story(len(priorities), seed=3, balancer=balancer, priorities=priorities)
    for server in story.servers[: priorities.count(0)]:
        story.at(2, server.die)
        story.at(2 + lasts, server.rise)
    return story.load(rate, 2 + lasts + 35, keys=KEYS)


@pytest.mark.parametrize(
    ("priorities", "rate", "lasts"),
    [([0, 1], 1, 300), ([0, 0, 0, 1, 1, 1], 5, 300), ([0, 1], 50, 10), ([0, 0, 1, 1], 50, 100)],
)
@pytest.mark.parametrize("balancer", [PeakEwma(), RoundRobin()], ids=["PeakEwma", "RoundRobin"])
def test_D6_a_level_dies_at_the_cost_of_no_call_and_is_back_within_25_s_of_its_recovery(
    balancer: Any, priorities: list[int], rate: float, lasts: float
) -> None:
    story = told(partial(level_dies, balancer, priorities, rate, lasts))
    assert story.failed == []
    back, best = 2 + lasts, priorities.count(0)
    assert sum(story.shares(back - 5, back)[:best]) == 0
    assert sum(story.shares(back - 5, back)[best:]) > 0
    assert sum(story.shares(back + 25, back + 35)[best:]) == 0
    assert min(story.shares(back + 25, back + 35)[:best]) > 0
    for port in range(1, best + 1):
        tried = [entry[7] - START for entry in story.log if entry[2] == port and entry[7] - START < back]
        assert max(b - a for a, b in pairwise([*tried, back])) <= 15 + 8 / rate, "left alone for too long"


# The same everywhere


TELL = """
import hashlib, sys
sys.path.insert(0, {here!r})
from test_stories import ConsistentHash, PeakEwma, outage, level_dies
stories = [outage(PeakEwma(), 8, [1, 2, 5, 6], 100, True), level_dies(ConsistentHash(), [0, 0, 1, 1], 20, 10)]
print(hashlib.sha256(repr([story.log for story in stories]).encode()).hexdigest())
"""


def test_a_story_does_not_depend_on_the_seed_of_hashes() -> None:
    script = TELL.format(here=str(Path(__file__).parent))
    digests = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 65
