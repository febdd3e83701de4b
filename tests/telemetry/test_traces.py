"""The spans of a call and of its attempts: their shape, what is on them, and what the next hop is told (rule T2)."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from opentelemetry import context as contexts
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode, format_span_id, format_trace_id
from seen import Seen

from conftest import Colour
from meshes import get_or_error, post_or_error, refusing
from meshlib import TLS, ConfigError, Connections, Endpoint, Hedge, Limit, Mesh, Retry, Service, Timeout, options
from meshlib.discovery import Resolution
from meshlib.telemetry import trail
from meshlib.testing import Upstream


@pytest.fixture
def seen() -> Seen:
    return Seen()


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    assert parent.context is not None
    return child.parent is not None and child.parent.span_id == parent.context.span_id


def sent_from(span: ReadableSpan) -> str:
    """The `traceparent` that a request made under this span carries."""
    assert span.context is not None
    trace, here = format_trace_id(span.context.trace_id), format_span_id(span.context.span_id)
    return f"00-{trace}-{here}-{span.context.trace_flags:02x}"


def traceparents(*fleet: Upstream) -> list[str]:
    return [value for each in fleet for request in each.log() for value in request.values("traceparent")]


def test_T2_a_retried_call_is_one_span_with_one_for_each_attempt(
    colour: Colour, two: list[Upstream], seen: Seen
) -> None:
    two[0].script(then={"status": 503})
    mesh = seen.mesh(*two)
    assert colour.run(mesh, lambda client: client.get("/v1/7?token=hush")).status_code == 200
    [call], [first, second] = seen.calls, seen.attempts
    assert (is_child(first, call), is_child(second, call), call.parent) == (True, True, None)
    assert (call.name, first.name) == ("GET orders", "GET")
    assert dict(call.attributes or {}) == {
        "http.request.method": "GET",
        "server.address": "orders",
        "url.scheme": "http",
        "url.full": "http://orders/v1/7",
        "http.response.status_code": 200,
        "meshlib.call.outcome": "ok",
        "meshlib.call.attempts": 2,
    }
    common = {"http.request.method": "GET", "server.address": "orders", "url.scheme": "http"}
    common |= {
        "url.full": "http://orders/v1/7",
        "network.peer.address": "127.0.0.1",
        "meshlib.endpoint.why": "PeakEwma",
    }
    assert dict(first.attributes or {}) == {
        **common,
        "network.peer.port": two[0].port,
        "meshlib.attempt.kind": "first",
        "meshlib.attempt.outcome": "rejected",
        "meshlib.retry.decision": "retried",
        "http.response.status_code": 503,
        "error.type": "503",
    }
    assert dict(second.attributes or {}) == {
        **common,
        "network.peer.port": two[1].port,
        "meshlib.attempt.kind": "retry",
        "meshlib.attempt.outcome": "ok",
        "http.response.status_code": 200,
        "http.request.resend_count": 1,
    }
    codes = [span.status.status_code for span in (call, first, second)]
    assert codes == [StatusCode.UNSET, StatusCode.ERROR, StatusCode.UNSET]
    assert first.status.description is None


def test_a_template_stands_for_many_paths_on_spans_and_calls(colour: Colour, two: list[Upstream], seen: Seen) -> None:
    async def script(client: Any) -> None:
        for number in range(3):
            await client.get(f"/v1/{number}", extensions={"meshlib": {"url_template": "/v1/{number}"}})

    with options(url_template="/of/a/block"):
        colour.run(seen.mesh(two[0]), script)
    assert {(span.attributes or {})["url.template"] for span in seen.spans} == {"/v1/{number}"}
    [(attributes, call)] = seen.points("meshlib.client.call.duration")
    assert (attributes["url.template"], call.count) == ("/v1/{number}", 3)


def test_T2_the_next_hop_is_told_which_attempt_it_is_part_of(colour: Colour, two: list[Upstream], seen: Seen) -> None:
    two[0].script(then={"status": 503})

    async def script(client: Any) -> None:
        await client.get("/", headers={"TraceParent": "00-00000000000000000000000000000001-0000000000000001-01"})

    colour.run(seen.mesh(*two), script)
    assert traceparents(*two) == [sent_from(span) for span in seen.attempts]
    assert len(set(traceparents(*two))) == 2


def test_T2_the_spans_of_the_caller_are_above(two: list[Upstream], seen: Seen) -> None:
    with seen.mesh(*two).client("orders") as client, seen.tracers.get_tracer("app").start_as_current_span("work"):
        client.get("/")
    work = next(span for span in seen.spans if span.name == "work")
    assert is_child(seen.calls[1], work)


@pytest.mark.parametrize(
    ("spans", "calls", "attempts"), [("both", 1, 2), ("call", 1, 0), ("attempt", 0, 2), ("off", 0, 0)]
)
def test_T2_spans_says_which_there_are(spans: str, calls: int, attempts: int, two: list[Upstream], seen: Seen) -> None:
    two[0].script(then={"status": 503})
    mesh = seen.mesh(*two, tell={"spans": spans})
    with mesh.client("orders") as client, seen.tracers.get_tracer("app").start_as_current_span("work"):
        client.get("/")
    work = next(span for span in seen.spans if span.name == "work")
    assert (len(seen.attempts), len([span for span in seen.calls if span is not work])) == (attempts, calls)
    told = {"both": seen.attempts, "attempt": seen.attempts, "call": [span for span in seen.calls if span is not work]}
    assert set(traceparents(*two)) == {sent_from(span) for span in told.get(spans, [work])}


def test_spans_must_be_one_of_four() -> None:
    with pytest.raises(ConfigError, match="spans: must be one of 'both', 'call', 'attempt', 'off', got 'all'"):
        Mesh(Service("orders", ["127.0.0.1:1"]), spans="all")  # type: ignore[arg-type]


def test_S2_somebody_else_is_called_identity(colour: Colour, seen: Seen, certificates: tuple[str, str]) -> None:
    bundle, certificate = certificates
    with Upstream("a", cert=certificate) as stranger:
        colour.run(seen.mesh(stranger, tls=TLS(verify=bundle, server_name="users")), post_or_error)
    [attempt], [call] = seen.attempts, seen.calls
    told = dict(attempt.attributes or {})
    assert (told["error.type"], told["meshlib.attempt.outcome"]) == ("identity", "not_sent")
    assert dict(call.attributes or {})["error.type"] == "identity"


def test_T1_a_failover_says_what_was_wrong(colour: Colour, two: list[Upstream], seen: Seen) -> None:
    with refusing() as address:
        colour.run(seen.mesh(address, two[0]), post_or_error)
    first, second = [dict(span.attributes or {}) for span in seen.attempts]
    assert (first["error.type"], first["meshlib.attempt.outcome"]) == ("connect", "not_sent")
    assert (second["meshlib.attempt.kind"], second["http.request.resend_count"]) == ("failover", 1)


def test_T1_a_dead_connection_that_was_kept_is_a_transparent_attempt(two: list[Upstream], seen: Seen) -> None:
    mesh = seen.mesh(two[0])
    with mesh.client("orders") as client:
        client.get("/")
        two[0].script({"fault": "close"})
        client.get("/")
    kinds = [(span.attributes or {})["meshlib.attempt.kind"] for span in seen.attempts]
    assert kinds == ["first", "first", "transparent"]
    assert (seen.attempts[1].attributes or {})["error.type"] == "connection_lost"
    assert seen.value("meshlib.client.call.transparent_retries") == 1
    assert seen.value("meshlib.client.call.retries") is None


def test_T2_a_hedge_is_beside_the_first_attempt(colour: Colour, two: list[Upstream], seen: Seen) -> None:
    two[0].script(then={"delay": 2.0})
    colour.run(seen.mesh(*two, hedge=Hedge(after=0.05)), get_or_error)
    [call], [first, hedge] = seen.calls, seen.attempts
    assert (is_child(first, call), is_child(hedge, call)) == (True, True)
    assert (hedge.attributes or {})["meshlib.attempt.kind"] == "hedge"
    assert (first.attributes or {})["error.type"] == "superseded"
    assert seen.value("meshlib.client.call.hedges") == 1


def test_T2_a_hedge_that_loses_ends_its_span(colour: Colour, two: list[Upstream], seen: Seen) -> None:
    two[0].script(then={"delay": 0.5})
    two[1].script(then={"fault": "hang"})
    colour.run(seen.mesh(*two, hedge=Hedge(after=0.05)), get_or_error)
    [call], [first, hedge] = seen.calls, seen.attempts
    assert (first.attributes or {})["http.response.status_code"] == 200
    assert (hedge.attributes or {})["error.type"] == "superseded"
    assert None not in (call.end_time, hedge.end_time)
    assert (hedge.end_time or 0) <= (call.end_time or 0)


def test_T2_a_wait_for_a_connection_is_on_the_attempt(two: list[Upstream], seen: Seen) -> None:
    two[0].script({"delay": 0.2})
    mesh = seen.mesh(two[0], connections=Connections(max_per_endpoint=1))
    with mesh.client("orders") as client, ThreadPoolExecutor(2) as pool:
        list(pool.map(client.get, ["/", "/"]))
    [event] = [event for span in seen.attempts for event in span.events]
    assert event.attributes is not None
    assert event.attributes["meshlib.wait.reason"] == "slot"
    assert 0.05 < float(str(event.attributes["meshlib.wait.seconds"])) < 5.0


FAILURES = [
    ({"fault": "hang"}, {"timeout": Timeout(total=2, attempt=0.1)}, "timeout", "timeout"),
    ({"fault": "hang"}, {"timeout": Timeout(total=0.1)}, "deadline", "deadline"),
    ({"fault": "reset"}, {}, "connection_lost", "connection_lost"),
    ({"status": 404}, {}, "404", "404"),
]


@pytest.mark.parametrize(("step", "settings", "of_attempt", "of_call"), FAILURES)
def test_T1_what_failed_is_one_word(
    step: dict[str, Any],
    settings: dict[str, Any],
    of_attempt: str,
    of_call: str,
    colour: Colour,
    two: list[Upstream],
    seen: Seen,
) -> None:
    two[0].script(then=step)
    colour.run(seen.mesh(two[0], retry=Retry(max_attempts=1), **settings), get_or_error)
    [call], [attempt] = seen.calls, seen.attempts
    assert ((attempt.attributes or {})["error.type"], (call.attributes or {})["error.type"]) == (of_attempt, of_call)
    assert {call.status.status_code, attempt.status.status_code} == {StatusCode.ERROR}
    assert seen.value("http.client.request.duration", error__type=of_attempt) == 1
    assert seen.value("meshlib.client.call.duration", error__type=of_call) == 1


def test_T1_a_call_that_was_not_let_in_has_a_span_and_a_duration(two: list[Upstream], seen: Seen) -> None:
    two[0].script(then={"size": 1_000_000})
    with seen.mesh(two[0], limit=Limit(max_in_flight=1)).client("orders") as client, client.stream("GET", "/"):
        assert isinstance(_error_of(client), Exception)
    attributes = dict(seen.calls[-1].attributes or {})
    assert (attributes["error.type"], attributes["meshlib.call.outcome"]) == ("overloaded", "not_sent")
    assert seen.value("meshlib.refused_calls", meshlib__refused__by="limit") == 1


def _error_of(client: httpx.Client) -> Exception | None:
    try:
        client.get("/")
    except httpx.TransportError as error:
        return error
    return None


def test_T1_a_body_of_the_callers_that_fails_is_the_callers(colour: Colour, two: list[Upstream], seen: Seen) -> None:
    def sync_body() -> Iterator[bytes]:
        raise ValueError("the marker")
        yield b""

    async def body() -> Any:
        raise ValueError("the marker")
        yield b""

    async def script(client: Any) -> None:
        with pytest.raises(ValueError, match="the marker"):
            await client.post("/", content=sync_body() if colour.is_sync else body())

    colour.run(seen.mesh(two[0]), script)
    assert [(span.attributes or {})["error.type"] for span in seen.spans] == ["caller", "caller"]


def test_T1_a_cancelled_call_ends_its_spans(two: list[Upstream], seen: Seen) -> None:
    two[0].script(then={"fault": "hang"})

    async def main() -> None:
        async with seen.mesh(two[0]).async_client("orders") as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.get("/"), 0.1)

    asyncio.run(main())
    assert [(span.attributes or {})["error.type"] for span in seen.spans] == ["cancelled", "cancelled"]
    assert (seen.calls[0].attributes or {})["meshlib.call.outcome"] == "abandoned"


@pytest.mark.parametrize(
    ("step", "hedge", "of_attempts"),
    [
        ({"fault": "hang"}, None, ["cancelled"]),
        ({"fault": "hang"}, Hedge(after=0.05), ["cancelled", "cancelled"]),
        ({"status": 503, "headers": {"retry-after": "5"}}, None, ["503"]),
    ],
    ids=["headers", "hedged", "back-off"],
)
def test_T2_a_call_that_is_garbage_collected_ends_its_spans(
    step: dict[str, Any], hedge: Hedge | None, of_attempts: list[str], two: list[Upstream], seen: Seen
) -> None:
    """But not at once: the collector may come amid one of the SDK's own locks."""
    for each in two:
        each.script(then=step)
    mesh = seen.mesh(*two, hedge=hedge)
    tasks: list[Any] = []

    async def main() -> None:
        tasks.append(asyncio.ensure_future(mesh.async_client("orders").get("/")))
        async with asyncio.timeout(30):
            while sum(len(each.log()) for each in two) < len(of_attempts):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    with warnings.catch_warnings(action="ignore"):
        tasks.clear()
        gc.collect()
    collected = time.time_ns()
    assert seen.calls == [], "something was done in a finalizer"
    assert seen.value("meshlib.client.call.duration", error__type="cancelled") == 1
    [call] = seen.calls
    assert (call.attributes or {})["meshlib.call.outcome"] == "abandoned"
    assert call.end_time is not None
    assert call.end_time <= collected
    assert [(span.attributes or {})["error.type"] for span in seen.attempts] == of_attempts
    assert seen.value("http.client.active_requests") == 0


def test_T2_the_spans_of_what_was_collected_end_with_the_next_call_or_the_mesh(two: list[Upstream], seen: Seen) -> None:
    two[0].script(then={"fault": "hang"})
    mesh = seen.mesh(two[0])

    def lose_one() -> None:
        call = mesh.async_client("orders").get("/")

        async def start() -> None:
            call.send(None)

        with warnings.catch_warnings(action="ignore"):
            asyncio.run(start())
            call.close()
            gc.collect()

    lose_one()
    assert seen.calls == []
    two[0].script()
    with mesh.client("orders") as client:
        client.get("/")
    assert [(span.attributes or {})["meshlib.call.outcome"] for span in seen.calls] == ["abandoned", "ok"]
    lose_one()
    child = os.fork()
    if child == 0:
        mesh.close()
        os._exit(len(seen.calls))  # those of before: the other one's end is the parent's to tell
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    mesh.close()
    assert len(seen.calls) == 3


def test_T2_waiting_is_told_by_events(two: list[Upstream], seen: Seen) -> None:
    two[0].script({"status": 503, "headers": {"retry-after": "0"}}, {"status": 503})
    with seen.mesh(two[0], retry=Retry(wait=lambda state: 0.02)).client("orders") as client:
        client.get("/")
    events = [(event.name, dict(event.attributes or {})) for event in seen.calls[0].events]
    waits = [(name, each["meshlib.wait.reason"], each["meshlib.wait.seconds"]) for name, each in events]
    assert waits == [("meshlib.wait", "back_off", 0.02)]
    assert seen.value("meshlib.client.call.retries") == 1
    assert seen.value("meshlib.client.call.retry_delay") == 1


@pytest.mark.parametrize("spans", ["call", "attempt"])
def test_T2_a_wait_for_the_endpoints_is_told(spans: str, two: list[Upstream], seen: Seen, no_leaks: None) -> None:
    class Found:
        async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
            return Resolution([Endpoint.parse(two[0].address)], 60.0)

    tell: Any = {"spans": spans}
    with Mesh(Service("orders", Found()), **seen.told_to(tell)) as mesh, mesh.client("orders") as client:
        client.get("/")
        assert seen.value("meshlib.resolver.updates", meshlib__resolver__result="answered") == 1
        assert seen.value("meshlib.resolver.staleness") == 0.0
        assert 0.0 <= seen.value("meshlib.resolver.age") < 60.0
    assert seen.value("meshlib.resolver.age") is None, "a mesh that is closed looks for none"
    [span] = seen.spans
    [event] = span.events
    assert (event.attributes or {})["meshlib.wait.reason"] == "resolve"


def test_T2_nothing_is_built_for_a_span_that_nobody_records(
    colour: Colour, two: list[Upstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> Any:
        raise AssertionError("attributes were worked out")

    seen = Seen(ALWAYS_OFF)
    for name in ("_seen_at_start", "_tell_end", "_tell_call", "_shown_url"):
        monkeypatch.setattr(trail.Trail, name, never)
    two[0].script(then={"status": 503})
    assert colour.run(seen.mesh(*two), get_or_error).status_code == 200
    assert seen.spans == []
    sampled = [int(each[-2:], 16) & 1 for each in traceparents(*two)]
    assert sampled == [0, 0]  # the next hop is not to record it either


def test_T2_a_call_amid_suppressed_instrumentation_leaves_no_trail(two: list[Upstream], seen: Seen) -> None:
    with seen.mesh(two[0]).client("orders") as client:
        token = contexts.attach(contexts.set_value("suppress_instrumentation", True))
        try:
            assert client.get("/").status_code == 200
        finally:
            contexts.detach(token)
    assert seen.spans == []
    assert seen.points("http.client.request.duration") == []


def test_T1_an_unknown_method_is_other(two: list[Upstream], seen: Seen) -> None:
    with seen.mesh(two[0]).client("orders") as client:
        client.request("BREW", "/")
    assert [(span.name, (span.attributes or {})["http.request.method"]) for span in seen.spans] == [
        ("HTTP orders", "_OTHER"),
        ("HTTP", "_OTHER"),
    ]
    assert seen.value("http.client.request.duration", http__request__method="_OTHER") == 1


SECRET = re.compile("hush|sesame|crumb|Bearer|bodymark")


def test_T3_no_secret_is_in_a_span_or_a_metric(colour: Colour, two: list[Upstream], seen: Seen) -> None:
    two[0].script({"status": 503, "headers": {"x-token": "hush"}, "body": "bodymark"}, {"fault": "reset"})
    two[1].script({"fault": "reset"})

    async def script(client: Any) -> None:
        headers = {"authorization": "Bearer sesame", "cookie": "id=crumb"}
        for _ in range(3):
            try:
                await client.put("/a?token=hush#hush", content=b"bodymark", headers=headers)
                await client.put("http://hush:sesame@orders/a?token=hush", content=b"bodymark", headers=headers)
            except httpx.TransportError:
                pass

    colour.run(seen.mesh(*two, retry=Retry(max_attempts=2)), script)
    told = [span.to_json() for span in seen.spans] + [metric.to_json() for metric in seen.metrics().values()]
    assert len(seen.spans) > 6
    assert [each for each in told if SECRET.search(each)] == []
