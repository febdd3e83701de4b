"""`mesh.subscribe`, and the log: who is told of an event, by whom, and that no call pays for it."""

from __future__ import annotations

import asyncio
import functools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import Colour
from meshes import mesh_of, over
from meshlib import Breaker, HealthCheck, Mesh, Overloaded, Retry, RoundRobin, Service, delivery, events
from meshlib.discovery import Resolution
from meshlib.endpoint import Endpoint
from meshlib.events import Ejected, Event, Missed, Restored
from meshlib.testing import ManualClock, upstreams
from waiting import until

LONG = 20.0
"""Seconds that a busy machine may take for what takes none."""

A, B = "10.0.0.1:80", "10.0.0.2:80"

SECRETS = ("s3cret-query", "s3cret-header", "s3cret-cookie", "s3cret-body")

pytestmark = pytest.mark.usefixtures("no_leaks")


class Heard(list[Event]):
    """A callback that remembers."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self]

    def await_(self, count: int) -> list[str]:
        until(lambda: len(self) >= count)
        return self.kinds()


def error_of(client: httpx.Client) -> Exception | None:
    try:
        client.get("/")
    except httpx.TransportError as error:
        return error
    return None


def failing(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError(f"{request.url} {request.headers} {request.read()!r}")


def broken_mesh(answer: Callable[[httpx.Request], httpx.Response] = failing, **settings: Any) -> Mesh:
    """A mesh with two endpoints whose calls all fail, so that the fifth ejects one of them."""
    return over(A, B, inner=lambda endpoint: httpx.MockTransport(answer), **settings)


def break_one(mesh: Mesh) -> None:
    with mesh.client("orders") as client:
        for _ in range(10):
            with pytest.raises(httpx.ReadError):
                client.post("/", content=b"x")


# Who is told


def test_a_callback_is_told_in_order_by_another_thread_until_it_ends() -> None:
    mesh, heard, threads = mesh_of(A, B), Heard(), set[threading.Thread]()
    stop = mesh.subscribe(heard)
    mesh.subscribe(lambda event: threads.add(threading.current_thread()))
    for place in (A, B):
        mesh.eject("orders", place)
        mesh.restore("orders", place)
    assert heard.await_(4) == ["Ejected", "Restored"] * 2
    assert [str(event.endpoint) for event in heard if isinstance(event, Ejected)] == [A, B]
    assert [event.at for event in heard] == sorted(event.at for event in heard)
    stop()
    stop()
    mesh.eject("orders", A)
    mesh.close()
    assert len(heard) == 4
    assert threading.current_thread() not in threads


def test_calls_tell_of_a_breaker_in_every_colour(colour: Colour) -> None:
    clock, heard = ManualClock(), Heard()
    answers = iter([*[500] * 5, 500, *[200] * 9])
    inner = _Scripted(answers)
    mesh = Mesh(
        Service("orders", [A, B], balancer=RoundRobin(), breaker=Breaker(ramp=0)),
        inner=lambda endpoint: inner if str(endpoint) == A else _Scripted(iter([200] * 99)),
        clock=clock,
    )
    mesh.subscribe(heard)

    async def script(client: Any) -> None:
        for rounds in (10, 1, 1):
            for _ in range(rounds):
                await client.get("/")
            clock.advance(20.0)

    colour.run(mesh, script)
    assert heard.await_(5) == ["Ejected", "Probing", "Ejected", "Probing", "Restored"]
    assert [event.again for event in heard if isinstance(event, Ejected)] == [False, True]
    assert {event.service for event in heard} == {"orders"}


class _Scripted(httpx.BaseTransport, httpx.AsyncBaseTransport):
    def __init__(self, statuses: Iterator[int]) -> None:
        self._statuses = statuses

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(next(self._statuses))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.handle_request(request)


def test_a_body_that_dies_and_a_refused_call_are_told_at_once() -> None:
    heard = Heard()
    with upstreams(2) as fleet:
        for each in fleet:
            each.script(then={"fault": "cut", "size": 1000})
        mesh = mesh_of(*fleet, breaker=Breaker(consecutive=1))
        mesh.subscribe(heard)
        with mesh.client("orders") as client, pytest.raises(httpx.RemoteProtocolError):
            client.get("/")
        assert heard.await_(1) == ["Ejected"]
        fleet[0].script(then={"status": 429})
        mesh = mesh_of(fleet[0], retry=Retry(max_attempts=1))
        mesh.subscribe(heard)
        with mesh.client("orders") as client:
            until(lambda: isinstance(error_of(client), Overloaded))
        assert heard.await_(2)[1:] == ["OverloadBegan"]


def test_a_check_is_told_without_a_call() -> None:
    heard = Heard()
    with upstreams(1) as (upstream,):
        upstream.script(then={"status": 503})
        with mesh_of(upstream, health=HealthCheck("/", interval=0.05)) as mesh:
            mesh.subscribe(heard)
            mesh.wait_ready(LONG)
            assert heard.await_(1) == ["HealthChanged"]
    assert str(heard[0]) == f"orders: {upstream.address} is unhealthy (status 503)"


def test_what_a_list_holds_from_the_start_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "meshlib")
    mesh, heard = mesh_of(A, B), Heard()
    mesh.subscribe(heard)
    mesh.snapshot()
    mesh.close()
    assert heard == caplog.records == []


# Callbacks of all kinds


def test_a_slow_callback_keeps_no_call_and_no_other_callback_waiting() -> None:
    mesh, heard, free = broken_mesh(), Heard(), threading.Event()
    mesh.subscribe(lambda event: free.wait(LONG))
    mesh.subscribe(heard)
    began = time.monotonic()
    break_one(mesh)
    assert heard.await_(1) == ["Ejected"]
    assert time.monotonic() - began < LONG / 2
    free.set()


def test_what_a_callback_raises_is_logged_once_and_reaches_no_call(caplog: pytest.LogCaptureFixture) -> None:
    mesh, heard = broken_mesh(), Heard()

    def callback(event: Event) -> None:
        heard.append(event)
        if len(heard) == 3:
            sys.exit(3)
        raise ZeroDivisionError("mine")

    mesh.subscribe(callback)
    break_one(mesh)
    for _ in range(2):
        mesh.eject("orders", A)
        mesh.restore("orders", A)
    heard.await_(4)
    mesh.close()
    said = [record for record in caplog.records if record.name == "meshlib.events"]
    assert [record.getMessage() for record in said] == [
        "a callback raised ZeroDivisionError (said once)",
        "a callback raised SystemExit (said once)",
    ]
    assert said[0].exc_info


async def _later(event: Event) -> None:
    raise AssertionError


class _Late:
    async def __call__(self, event: Event) -> None:
        raise AssertionError


@pytest.mark.parametrize("callback", [_later, functools.partial(_later), _Late(), _Late().__call__, None, 5])
def test_a_callback_is_a_plain_function(callback: Any) -> None:
    words = "must be a function" if callback is None or callback == 5 else "is a plain function: an async one"
    with pytest.raises(TypeError, match=words):
        mesh_of(A).subscribe(callback)


def test_a_function_that_gives_a_coroutine_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    mesh = mesh_of(A, B)
    mesh.subscribe(lambda event: _later(event))
    mesh.eject("orders", A)
    mesh.close()
    assert "a callback raised TypeError (said once)" in caplog.messages


def test_a_callback_may_use_the_mesh_and_leave_it() -> None:
    mesh, heard = over(A, B, inner=lambda endpoint: httpx.MockTransport(lambda request: httpx.Response(200))), Heard()

    def callback(event: Event) -> None:
        heard.append(event)
        with mesh.client("orders") as client:
            client.get("/").raise_for_status()
        assert mesh.snapshot()["orders"].nodes
        if len(heard) < 4:
            (mesh.restore if isinstance(event, Ejected) else mesh.eject)("orders", A)
            return
        mesh.close()
        stop()
        mesh.eject("orders", B)
        closed.set()

    closed = threading.Event()
    stop = mesh.subscribe(callback)
    mesh.eject("orders", A)
    assert heard.await_(4) == ["Ejected", "Restored"] * 2
    assert closed.wait(LONG)
    assert mesh.snapshot()["orders"].nodes[1].why == "taken out by hand"
    assert len(heard) == 4


def test_what_waits_when_a_callback_leaves_is_not_told() -> None:
    mesh, heard, free = mesh_of(A, B), Heard(), threading.Event()

    def callback(event: Event) -> None:
        heard.append(event)
        free.wait(LONG)
        if len(heard) == 2:
            stop()

    stop = mesh.subscribe(callback)
    mesh.eject("orders", A)
    heard.await_(1)
    for _ in range(3):
        mesh.restore("orders", A)
        mesh.eject("orders", A)
    free.set()
    mesh.close()
    assert heard.kinds() == ["Ejected", "Restored"]


def test_events_of_many_threads_come_in_their_order(no_leaks: None) -> None:
    mesh, heard = mesh_of(A, B), Heard()
    mesh.subscribe(heard)

    def work(place: str) -> None:
        for _ in range(300):
            mesh.eject("orders", place)
            mesh.restore("orders", place)

    threads = [threading.Thread(target=work, args=(place,)) for place in (A, B) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mesh.close()
    assert len(heard) > 4
    for place in (A, B):
        of_place = [type(event) for event in heard if str(event.endpoint) == place]  # type: ignore[attr-defined]
        assert of_place == [Ejected, Restored] * (len(of_place) // 2)


def test_what_a_slow_callback_misses_it_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "MOST", 3)
    mesh, heard, free, entered = mesh_of(A, B), Heard(), threading.Event(), threading.Event()

    def callback(event: Event) -> None:
        heard.append(event)
        entered.set()
        free.wait(LONG)

    mesh.subscribe(callback)
    mesh.eject("orders", A)
    assert entered.wait(LONG)
    for _ in range(4):
        mesh.restore("orders", A)
        mesh.eject("orders", A)
    free.set()
    assert heard.await_(5) == ["Ejected", "Restored", "Ejected", "Restored", "Missed"]
    assert isinstance(heard[-1], Missed)
    assert heard[-1].count == 5
    assert "orders: 5 events were dropped: whoever is told takes too long" in caplog.messages
    mesh.close()
    mesh.restore("orders", A)
    assert heard.await_(6)[5:] == ["Restored"]


# The end


def test_a_mesh_that_is_closed_has_told_everything_and_waits_for_nobody_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard, free = Heard(), threading.Event()
    with mesh_of(A, B) as mesh:
        mesh.subscribe(lambda event: time.sleep(0.1))
        mesh.subscribe(lambda event: time.sleep(0.1) or heard(event))
        mesh.eject("orders", A)
    assert heard.kinds() == ["Ejected"]
    monkeypatch.setattr(delivery, "PATIENCE", 0.1)
    mesh.subscribe(lambda event: free.wait(LONG))
    mesh.restore("orders", A)
    began = time.monotonic()
    mesh.close()
    assert 0.1 <= time.monotonic() - began < LONG / 2
    free.set()


def test_aclose_lets_the_loop_go_on_that_a_callback_needs() -> None:
    heard = Heard()

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def note(event: Event) -> None:
            await asyncio.sleep(0.01)
            heard(event)

        async with mesh_of(A, B) as mesh:
            mesh.subscribe(lambda event: asyncio.run_coroutine_threadsafe(note(event), loop).result(LONG))
            mesh.eject("orders", A)

    asyncio.run(main())
    assert heard.kinds() == ["Ejected"]


PROGRAM = """
import os, sys, time
from meshlib import Mesh, Service

mesh = Mesh(Service("orders", ["10.0.0.1:80", "10.0.0.2:80"]))
entered = []

def callback(event):
    entered.append(event)
    time.sleep(0.3)
    os.write(1, f"{os.getpid() == parent} {event}\\n".encode())

parent = os.getpid()
mesh.subscribe(callback)
mesh.eject("orders", "10.0.0.1:80")
while not entered:
    time.sleep(0.001)
mesh.eject("orders", "10.0.0.2:80")
pid = os.fork()
if not pid:
    mesh.restore("orders", "10.0.0.1:80")
    mesh.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
mesh.restore("orders", "10.0.0.2:80")
"""


def test_S3_a_child_hears_of_its_own_and_the_end_of_a_program_waits_for_callbacks() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if "ejected until" not in line]) == (0, [])
    assert sorted(done.stdout.splitlines()) == [
        "False orders: 10.0.0.1:80 was restored (by hand)",
        "True orders: 10.0.0.1:80 was ejected until it is restored (by hand)",
        "True orders: 10.0.0.2:80 was ejected until it is restored (by hand)",
        "True orders: 10.0.0.2:80 was restored (by hand)",
    ]


# The log


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str]]:
    return [(record.levelname, record.name, record.getMessage().partition(" for ")[0]) for record in caplog.records]


def test_the_log_warns_of_an_ejection_once_and_says_the_rest_to_those_who_ask(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock()
    inner = _Scripted(iter([*[500] * 6, 200]))
    mesh = Mesh(
        Service("orders", [A, B], balancer=RoundRobin()),
        inner=lambda endpoint: inner if str(endpoint) == A else _Scripted(iter([200] * 99)),
        clock=clock,
    )
    caplog.set_level(logging.INFO, "meshlib")
    with mesh.client("orders") as client:
        for rounds in (10, 1, 1):
            for _ in range(rounds):
                client.get("/")
            clock.advance(20.0)
    assert said(caplog) == [
        ("WARNING", "meshlib.breaker", f"orders: {A} was ejected"),
        ("INFO", "meshlib.breaker", f"orders: {A} is probed by a call"),
        ("INFO", "meshlib.breaker", f"orders: {A} stays ejected"),
        ("INFO", "meshlib.breaker", f"orders: {A} is probed by a call"),
        ("INFO", "meshlib.breaker", f"orders: {A} was restored (its probe succeeded)"),
    ]


def test_nothing_is_made_when_nobody_subscribes_and_the_logger_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(Event, "__str__", lambda event: made.append(event) or "")
    mesh = mesh_of(A, B)
    log = logging.getLogger("meshlib.breaker")
    for off in (lambda: log.setLevel(logging.ERROR), lambda: logging.disable(logging.WARNING)):
        off()
        try:
            with mesh._clusters["orders"].lock:
                assert not mesh._clusters["orders"].journal.hears(Ejected)
            mesh.eject("orders", A)
            mesh.restore("orders", A)
        finally:
            log.setLevel(logging.NOTSET)
            logging.disable(logging.NOTSET)
    assert made == []
    assert mesh._clusters["orders"].journal.hears(Ejected)
    assert not mesh._clusters["orders"].journal.hears(events.DiscoveryStale)


def test_what_logging_raises_reaches_no_call(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError("a filter's own")

    log, mesh, heard = logging.getLogger("meshlib.breaker"), broken_mesh(), Heard()
    mesh.subscribe(heard)
    log.addFilter(refuse)
    try:
        break_one(mesh)
    finally:
        log.removeFilter(refuse)
    assert heard.await_(1) == ["Ejected"]
    assert "a filter's own" in capsys.readouterr().err


def test_a_handler_of_the_log_may_call_through_the_mesh() -> None:
    heard = Heard()
    mesh = over(A, B, inner=lambda endpoint: httpx.MockTransport(lambda request: httpx.Response(200)))

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "ejected" in record.getMessage():
                mesh.restore("orders", A)
            with mesh.client("orders") as client:
                client.get("/").raise_for_status()

    log, handler = logging.getLogger("meshlib.breaker"), Handler()
    log.addHandler(handler)
    mesh.subscribe(heard)
    try:
        mesh.eject("orders", A)
    finally:
        log.removeHandler(handler)
    assert heard.await_(2) == ["Ejected", "Restored"]


def test_T3_no_secret_is_in_an_event_or_in_the_log(colour: Colour, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "meshlib")
    mesh, heard = over(A, B, inner=lambda endpoint: _Failing()), Heard()
    mesh.subscribe(heard)

    async def script(client: Any) -> None:
        for _ in range(12):
            with pytest.raises(httpx.ReadError):
                await client.post(
                    "/?token=s3cret-query",
                    headers={"authorization": "Bearer s3cret-header", "cookie": "id=s3cret-cookie"},
                    content=b"s3cret-body",
                )

    colour.run(mesh, script)
    assert "Ejected" in heard.await_(1)
    mesh.close()
    told = " ".join([*map(repr, heard), *map(str, heard), *(str(event.to_dict()) for event in heard), caplog.text])
    assert [secret for secret in SECRETS if secret in told] == []
    assert "was ejected" in caplog.text


class _Failing(httpx.BaseTransport, httpx.AsyncBaseTransport):
    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return failing(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return failing(request)


# Discovery


class _Told:
    """A resolver that answers, or raises, what it is told."""

    source = "toy"

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.error: Exception | None = None

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        if self.error is not None:
            raise self.error
        return Resolution([Endpoint.parse(each) for each in self.addresses], ttl=0.02)


@pytest.mark.usefixtures("hurry")
def test_discovery_tells_who_comes_and_goes_and_that_it_fails_and_nothing_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "meshlib")
    many = [f"10.0.1.{number}:80" for number in range(8)]
    resolver, heard = _Told(A), Heard()
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.subscribe(heard)
        mesh.wait_ready(LONG)
        assert heard.await_(1) == ["EndpointAdded"]
        resolver.addresses = (*many, B)
        assert heard.await_(11)[1:] == ["EndpointRemoved", *["EndpointAdded"] * 9]
        resolver.error = OSError("refused")
        assert heard.await_(12)[11:] == ["DiscoveryStale"]
        resolver.error = None
        assert heard.await_(13)[12:] == ["DiscoveryRecovered"]
    assert heard[11].why == "toy: OSError: refused"  # type: ignore[attr-defined]
    assert [event.at for event in heard] == sorted(event.at for event in heard)
    assert said(caplog) == [
        ("INFO", "meshlib.discovery", f"orders: {A} was added"),
        ("INFO", "meshlib.discovery", f"orders: {A} was removed"),
        ("INFO", "meshlib.discovery", f"orders: 9 endpoints were added: {', '.join(many[:5])} and 4 more"),
        ("WARNING", "meshlib.discovery", "toy: OSError: refused (said once; the last good answer stays)"),
        ("INFO", "meshlib.discovery", "toy answers again"),
    ]


# The page


def test_the_page_lists_every_event_its_fields_and_its_place_in_the_log() -> None:
    page = (Path(__file__).parents[1] / "docs" / "events.md").read_text(encoding="utf-8")
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.partition("## Callbacks")[0].splitlines()
        if line.startswith("| `")
    ]
    listed = {row[0].strip("`"): row for row in table}
    assert listed.keys() == {*events.__all__} - {"Event"}
    for name, (_, _, named, logged) in listed.items():
        kind = getattr(events, name)
        own = [each for each in kind.__dataclass_fields__ if each not in Event.__dataclass_fields__]
        assert [part.strip("` ") for part in named.split(",") if part] == own, name
        log, level = delivery._LOGS.get(kind, (None, 0))
        expected = "" if log is None else f"`{log.name}` {logging.getLevelName(level)}"
        assert logged.partition(";")[0] == expected, name


def test_what_the_page_shows_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "events.md").read_text(encoding="utf-8")
    block = page.split("```python\n")[1].split("```")[0]
    exec(compile(block, "events.md", "exec", dont_inherit=True), {"__name__": "events_page"})
    assert capsys.readouterr().out.splitlines() == page.split("```text\n")[1].split("```")[0].splitlines()
