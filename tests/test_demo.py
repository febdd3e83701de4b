"""`meshlib demo` as its users run it: a process of its own, with real upstreams, faults, signals and terminals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from meshlib.cli import demo, main, verdict
from meshlib.cli.faults import Death, schedule
from meshlib.cli.load import Record, Visit
from waiting import until

pytestmark = pytest.mark.once

BOUND = 60.0
SMALL = ("--calls", "100", "--concurrency", "8")
HEADINGS = "endpoint +state +process +in flight +calls +failures +p50 ms +p99 ms"
COMMAND = (sys.executable, "-m", "meshlib.cli")

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "error::ResourceWarning", **more}


def meshlib(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=BOUND, env=environment())


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*COMMAND, "demo", *arguments], stdout=pipe, stderr=pipe, text=True, env=environment()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def children(pid: int) -> set[int]:
    """The processes that `pid` started, from whichever of its threads."""
    lists = Path("/proc", str(pid), "task").glob("*/children")
    return {int(child) for one in lists for child in one.read_text().split()}


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path("/proc", str(pid), "stat").read_text()
    except FileNotFoundError:
        return False


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed")


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_no_call_fails_through_the_mesh_and_some_do_without(mode: str) -> None:
    done = meshlib("demo", *SMALL, "--json", *(["--sync"] if mode == "sync" else []))
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    mesh, plain, nodes = told["mesh"], told["plain"], told["snapshot"]["orders"]["nodes"]
    assert (told["calls"], told["concurrency"], told["mode"]) == (100, 8, mode)
    assert mesh["calls"] == plain["calls"] == 100
    assert (mesh["failed"], mesh["failures"]) == (0, {})
    assert plain["failed"] == sum(plain["failures"].values()) > 0
    assert told["verdict"] == f"No call failed through the mesh; {plain['failed']} of 100 failed through plain httpx."
    # Every attempt that a report told of is one that a node counted, and the other way round.
    assert sum(node["attempts"] for node in nodes) == mesh["calls"] + mesh["retries"]
    assert sum(node["failures"] for node in nodes) <= mesh["retries"]
    assert mesh["retries"] > 0
    assert 0 <= mesh["probes"] + mesh["late"] <= mesh["reached_dead"]
    assert 0 < mesh["p50"] <= mesh["p99"] <= mesh["seconds"]
    assert sum(node["in_flight"] for node in nodes) == 0
    victim, stalled, _ = (node["endpoint"] for node in nodes)
    assert told["victim"] == victim
    assert [(fault["at"], fault["act"], fault["endpoint"]) for fault in told["faults"]] == [
        (33, "kill", victim),
        (42, "start", victim),
        (70, "stop", stalled),
        (90, "continue", stalled),
    ]


def test_without_a_terminal_there_are_plain_lines() -> None:
    done = meshlib("demo", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    through_mesh, through_httpx = done.stdout.split("\nplain httpx: 100 GETs", 1)
    for run in (through_mesh, through_httpx):
        for done_to_it in ("33: .* killed", "42: .* started again", "70: .* stopped", "90: .* continued"):
            assert len(re.findall(f"call {done_to_it}", run)) == 1
        assert "100 of 100 calls done" in run
    assert re.search(HEADINGS, through_mesh)
    assert re.search(r"127\.0\.0\.1:\d+ +\w+ +killed( +\d+){3}", through_mesh)
    assert re.search(r"127\.0\.0\.1:\d+ +\w+ +stopped( +\d+){5}", through_mesh)
    assert re.search(r"calls done, 0 failed, \d+ retries, \d+ budget tokens", through_mesh)
    assert re.search(r"calls +100 +100\nfailed +0 +\d+\nretries +\d+ +-", through_httpx)
    assert done.stdout.rstrip().endswith("failed through plain httpx.")


# Ctrl-C reaches whom the terminal controls, and only a process without one can take it.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def run_on_terminal(*arguments: str, interrupt_at: bytes | None = None) -> tuple[int, str]:
    """Run the demo on a terminal of its own; optionally press Ctrl-C once it has printed something."""
    terminal, other_side = pty.openpty()
    command = [sys.executable, "-c", TAKE_TERMINAL, *COMMAND, "demo", *arguments]
    with open(terminal, "r+b", buffering=0) as screen, open(other_side, "r+b", buffering=0) as theirs:
        env = environment(TERM="xterm", COLUMNS="80", LINES="24")
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
        theirs.close()
        with process:
            told, deadline = b"", time.monotonic() + BOUND
            while select.select([screen], [], [], max(0.0, deadline - time.monotonic()))[0]:
                try:
                    piece = os.read(terminal, 65536)
                except OSError:  # how Linux tells that the other side is closed
                    break
                if not piece:
                    break
                told += piece
                if interrupt_at is not None and interrupt_at in told:
                    interrupt_at = None
                    os.write(terminal, b"\x03")
            else:
                process.kill()
        return process.returncode, told.decode()


def test_on_a_terminal_there_is_a_live_table() -> None:
    status, told = run_on_terminal(*SMALL)
    assert status == 0
    assert told.rindex("\x1b[?25h") > told.rindex("\x1b[?25l"), "the cursor was hidden, and is back"
    told = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told)
    assert max(map(len, told.replace("\r", "\n").split("\n"))) <= 80
    assert re.search(HEADINGS, told)
    assert "killed (SIGKILL)" in told
    assert re.search(r"failed +0 +\d+", told)


def test_ctrl_c_on_a_terminal_gives_the_cursor_back() -> None:
    status, told = run_on_terminal("--calls", "20000", interrupt_at=b" of 20,000 calls done")
    assert status == 130
    assert "meshlib demo: ended by SIGINT" in told
    assert "Traceback" not in told
    assert told.rindex("\x1b[?25h") > told.rindex("\x1b[?25l")


@needs_proc
@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "GETs"), (signal.SIGINT, "SIGKILL"), (signal.SIGINT, "SIGSTOP"), (signal.SIGTERM, "SIGSTOP")],
)
def test_a_signal_ends_it_and_all_its_processes(mode: str, number: signal.Signals, moment: str) -> None:
    with started(*SMALL, *(["--sync"] if mode == "sync" else [])) as process:
        read_until(process, moment)
        upstreams = children(process.pid)
        assert len(upstreams) >= 2
        process.send_signal(number)
        signalled = time.monotonic()
        _, told = process.communicate(timeout=BOUND)
        assert time.monotonic() - signalled < 10
        assert (process.returncode, told) == (128 + number, f"meshlib demo: ended by {number.name}\n")
        until(lambda: not any(map(is_alive, upstreams)), BOUND)


@needs_proc
def test_a_signal_while_it_prints_nothing_ends_it_too() -> None:
    with started(*SMALL, "--json") as process:
        until(lambda: len(children(process.pid)) == 3, BOUND)
        time.sleep(1.0)
        upstreams = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=BOUND) == ("", "meshlib demo: ended by SIGINT\n")
        assert process.returncode == 130
        until(lambda: not any(map(is_alive, upstreams)), BOUND)


@needs_proc
def test_its_processes_end_even_when_it_is_killed() -> None:
    with started(*SMALL) as process:
        read_until(process, "SIGKILL")
        upstreams = children(process.pid)
        process.kill()
        until(lambda: not any(map(is_alive, upstreams)), BOUND)


@needs_proc
def test_it_ends_quietly_when_nobody_reads_on() -> None:
    with started(*SMALL) as process:
        read_until(process, "GETs")
        assert process.stdout is not None
        assert process.stderr is not None
        upstreams = children(process.pid)
        process.stdout.close()
        assert process.wait(timeout=BOUND) == 1
        assert process.stderr.read() == ""
        until(lambda: not any(map(is_alive, upstreams)), BOUND)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--calls", "29"], "argument --calls: must be a whole number of at least 30, got '29'"),
        (["demo", "--calls", "many"], "argument --calls: must be a whole number of at least 30, got 'many'"),
        (["demo", "--concurrency", "0"], "argument --concurrency: must be a whole number of at least 1, got '0'"),
        (["demo", "--calls", "50", "--concurrency", "51"], "--concurrency must be at most --calls (50), got 51"),
        (["demo", "--colour"], "unrecognized arguments: --colour"),
        (["dmeo"], "invalid choice: 'dmeo'"),
    ],
)
def test_unusable_arguments_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_subcommand_there_is_help() -> None:
    done = meshlib()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: meshlib" in done.stderr
    assert "demo" in done.stderr


@pytest.mark.parametrize("calls", [30, 31, 100, 2000, 12345])
def test_every_fault_has_a_call_of_its_own_in_order(calls: int) -> None:
    steps = schedule(calls)
    assert [step.act for step in steps] == ["kill", "start", "stop", "continue"]
    assert calls // 3 == steps[0].at < steps[1].at < steps[2].at < steps[3].at < calls


def record(seconds: float, *visits: Visit, started: float = 0.0, failure: str | None = None) -> Record:
    return Record(started, seconds, failure, visits)


def test_a_tally_counts_what_happened() -> None:
    records = [
        record(0.1, Visit("a", 0.0), started=0.0),
        record(0.2, Visit("a", 10.0), Visit("b", 10.1), started=9.9),  # at the very instant of the death
        record(0.1, Visit("a", 10.9, is_probe=True), Visit("c", 11.0), started=10.9),
        record(0.1, Visit("a", 11.1), Visit("b", 11.1), Visit("c", 11.2), started=11.1, failure="ConnectError"),
        record(0.5, Visit("a", 12.0), started=12.0),  # it is back
        record(0.1, Visit("b", 12.0), started=12.0, failure="503"),
    ]
    counted = verdict.tally(records, "a", Death(begin=10.0, end=12.0))
    assert counted == verdict.Tally(
        calls=6,
        failed=2,
        failures={"ConnectError": 1, "503": 1},
        unpaid=1,
        retries=4,
        reached_dead=3,
        probes=1,
        late=1,
        slow=1,
        p50=0.1,
        p99=0.5,
        seconds=12.5,
    )


def test_a_failed_call_through_the_mesh_makes_the_demo_fail() -> None:
    good = verdict.tally([record(0.1, Visit("a", 0.0))], "a", Death())
    bad = verdict.tally([record(0.1, Visit("a", 0.0), failure="ReadTimeout")] * 2, "a", Death())
    assert (verdict.status(good), verdict.status(bad)) == (0, 1)
    assert verdict.sentence(good, bad) == "No call failed through the mesh; 2 of 2 failed through plain httpx."
    assert verdict.sentence(bad, good) == (
        "2 of 2 calls failed through the mesh (ReadTimeout 2); 0 of 1 failed through plain httpx. "
        "The retry budget, which pays for 35 retries at once, had run dry for 2 of them."
    )
    assert "The retry budget" not in verdict.sentence(replace(bad, unpaid=0), good)


@pytest.mark.parametrize("status", [0, 1])
def test_the_exit_status_is_that_of_the_verdict(
    status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_leaks: None
) -> None:
    monkeypatch.setattr(demo, "LENGTH", 0.3)
    monkeypatch.setattr(verdict, "status", lambda mesh: status)
    before = signal.getsignal(signal.SIGINT)
    assert main(["demo", "--calls", "30", "--concurrency", "1", "--json"]) == status
    mesh = json.loads(capsys.readouterr().out)["mesh"]
    assert (mesh["calls"], mesh["failed"]) == (30, 0)
    assert signal.getsignal(signal.SIGINT) is before
