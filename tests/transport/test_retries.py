"""Retries as servers and the user's strategies see them: `x-meshlib-attempt` (C10), and what `on` is shown."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import tenacity
from doubles import Body, Factory

from conftest import Colour
from meshes import mesh_of, outcomes, over, refusing
from meshlib import Connections, Mesh, Retry, RoundRobin, Service, Timeout, options, report
from meshlib.scope import behalf_of_attempt, current_scope
from meshlib.testing import Upstream
from meshlib.transport import binding
from meshlib.transport.inner import InnerAnswer

HEADER = "x-meshlib-attempt"
CLOSE = {"connection": "close"}  # so that what is lost is not taken for a dead kept connection
BUSY: dict[str, Any] = {"status": 503}


def told(upstream: Upstream) -> list[list[str]]:
    """What each request said of its number."""
    return [request.values(HEADER) for request in upstream.log()]


# C10: what the next hop is told


def test_C10_attempts_after_the_first_tell_their_number(colour: Colour, upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        assert (await client.get("/")).status_code == 200
        response = await client.get("/", headers=[(HEADER.title(), "7"), (HEADER, "8"), ("x-mine", "9")])
        assert response.request.headers[HEADER] == "7, 8"
        await client.get("/", headers={HEADER: "7"})

    for send_deadline in (True, False):
        upstream.script(BUSY, BUSY, {}, BUSY)
        colour.run(Mesh(Service("orders", [upstream.address]), send_deadline=send_deadline), script)
    assert told(upstream) == [[], ["2"], ["3"], [], ["2"], []] * 2
    assert [request.values("x-mine") for request in upstream.log()[3:6]] == [["9"], ["9"], []]


@dataclass(frozen=True)
class InOrder:
    """Offers the endpoints in the order of the settings."""

    def prepare(self, nodes: Any, rng: Any) -> Any:
        return lambda now, key: iter(nodes)


def test_C10_an_attempt_that_reached_nobody_does_not_count(fleet: list[Upstream]) -> None:
    fleet[0].script(BUSY)

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/")

    with refusing() as address:
        response = Colour("sync").run(mesh_of(address, *fleet[:2], balancer=InOrder()), script)
    assert outcomes(response) == [("first", "not_sent"), ("failover", "rejected"), ("retry", "ok")]
    assert [told(fleet[0]), told(fleet[1])] == [[[]], [["2"]]]


def test_C10_a_request_lost_with_a_kept_connection_counts(upstream: Upstream) -> None:
    upstream.script({}, {"fault": "reset"})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        await client.get("/")
        return await client.get("/")

    assert outcomes(Colour("sync").run(mesh_of(upstream), script))[1] == ("transparent", "ok")
    assert told(upstream) == [[], [], ["2"]]


def test_C10_an_inner_transport_is_told_as_well(colour: Colour, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([503, 200] * 4)
    factory = Factory({"10.0.0.1:80": lambda request: httpx.Response(next(answers))})
    mesh = over("10.0.0.1:80", inner=factory)

    async def script(client: httpx.AsyncClient) -> None:
        for headers in ({}, {HEADER: "7"}):
            await client.get("/", headers=headers)

    colour.run(mesh, script)
    monkeypatch.setattr("meshlib.transport.binding.IS_KNOWN", False)
    colour.run(mesh, script)
    assert [each.headers.get_list(HEADER) for each in factory.requests] == [[], ["2"]] * 4


def test_C10_on_behalf_of_a_retry_a_call_is_not_retried_and_tells_the_next_hop(upstream: Upstream) -> None:
    upstream.script(then=BUSY)
    mesh = mesh_of(upstream, retry=Retry(max_attempts=2))

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        with behalf_of_attempt(2):
            responses = [await client.get("/")]
            with options(timeout=5.0, retry=True):
                responses += [await client.get("/")]
            with behalf_of_attempt(1):
                responses += [await client.get("/")]
        assert current_scope().attempt == 1
        with behalf_of_attempt(1):
            return [*responses, await client.get("/")]

    responses = Colour("sync").run(mesh, script)
    assert [len(report(response).attempts) for response in responses] == [1, 1, 2, 2]
    assert told(upstream) == [["2"], ["2"], [], ["2"], [], ["2"]]


def test_C10_on_behalf_of_a_retry_a_failover_goes_on_and_tells_no_less(upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        with behalf_of_attempt(3):
            return [await client.post("/") for _ in range(2)]

    with refusing() as address:
        responses = Colour("sync").run(mesh_of(address, upstream, balancer=RoundRobin()), script)
    assert [("first", "not_sent"), ("failover", "ok")] in [outcomes(response) for response in responses]
    assert told(upstream) == [["3"], ["3"]]


# C9: what servers say of coming again

FORMS = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y")
"""Those of RFC 9110, section 5.6.7."""


def said(value: Any) -> float | None:
    answer: Any = InnerAnswer(httpx.Response(503, headers={"retry-after": value}), None)
    return binding.retry_after(answer)


@pytest.mark.parametrize("form", FORMS)
def test_C9_a_date_is_so_many_seconds_from_now_wherever_we_are(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC-5")
    time.tzset()
    try:
        later = said(time.strftime(form, time.gmtime(time.time() + 100)))
        assert later is not None
        assert 60 < later <= 100
        assert said(time.strftime(form, time.gmtime(time.time() - 100))) == 0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_C9_seconds_are_whole_numbers_and_what_cannot_be_read_was_not_said() -> None:
    assert [said(value) for value in ("0", " 7 ", "007", "9" * 400)] == [0, 7, 7, 999999999999]
    for junk in ("", "soon", "-1", "1.5", "1e3", "1, 2", "Fri, 99 Foo 2026 00:00:00 GMT", b"\xb2"):
        assert said(junk) is None, junk


# What strategies see


def test_on_sees_the_answer_without_its_body(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"status": 500, "headers": {"x-again": "yes"}, "body": "no"}, {"status": 500, "body": "no"})
    seen: list[httpx.Response] = []

    def on(response: httpx.Response) -> bool:
        seen.append(response)
        return response.headers.get("x-again") == "yes"

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/path?q=1")

    response = colour.run(mesh_of(upstream, retry=Retry(on=tenacity.retry_if_result(on))), script)
    assert (response.status_code, response.text) == (500, "no"), "the last answer's own body is the caller's"
    assert outcomes(response) == [("first", "rejected"), ("retry", "rejected")]
    assert [str(each.url) for each in seen] == ["http://orders/path?q=1"] * 2
    assert report(seen[0]) is report(response)
    for look in (lambda: seen[0].text, seen[0].json):
        with pytest.raises(httpx.ResponseNotRead):
            look()
    with pytest.raises(httpx.StreamError, match="not read before it is decided"):
        seen[0].read()


def test_on_sees_the_exception_that_would_leave_the_call(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"fault": "hang"}, {}, {"fault": "reset"})
    on = tenacity.retry_if_exception_type(httpx.ReadTimeout)
    mesh = mesh_of(upstream, retry=Retry(on=on), timeout=Timeout(attempt=0.3))

    async def script(client: httpx.AsyncClient) -> None:
        assert outcomes(await client.get("/", headers=CLOSE)) == [("first", "failed"), ("retry", "ok")]
        with options(timeout=Timeout(attempt=5.0)), pytest.raises(httpx.TransportError) as caught:
            await client.get("/")
        assert len(report(caught.value).attempts) == 1

    colour.run(mesh, script)


@pytest.mark.parametrize("whole", [True, False])
def test_on_sees_the_answer_of_an_inner_transport(colour: Colour, whole: bool) -> None:
    bodies: list[Body] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if whole:
            return httpx.Response(500, headers={"x-a": "b"}, text="no")
        bodies.append(Body(b"no"))
        return httpx.Response(500, headers={"x-a": "b"}, stream=bodies[-1])

    def on(response: httpx.Response) -> bool:
        assert (response.headers["x-a"], str(response.url)) == ("b", "http://orders/")
        with pytest.raises(httpx.ResponseNotRead):
            _ = response.content
        return True

    mesh = over(
        "10.0.0.1:80",
        inner=Factory({"10.0.0.1:80": answer}),
        retry=Retry(max_attempts=2, on=tenacity.retry_if_result(on)),
    )

    async def script(client: httpx.AsyncClient) -> Any:
        response = await client.get("/")
        assert response.text == "no"
        return response

    assert len(report(colour.run(mesh, script)).attempts) == 2
    assert all(body.closed for body in bodies)


class Mine(Exception):
    """What a strategy raises."""


def raising(state: Any) -> Any:
    raise Mine


@pytest.mark.parametrize("step", [{"status": 503, "size": 1 << 20}, {"fault": "reset"}], ids=["answer", "error"])
def test_C7_what_a_strategy_raises_leaves_the_call_and_nothing_behind(
    colour: Colour, upstream: Upstream, step: dict[str, Any]
) -> None:
    upstream.script(step, {}, step, {})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1), retry=Retry(stop=raising))
    headers = CLOSE if "fault" in step else {}
    kept: list[Exception] = []  # with the frames it came through

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(2):
            with pytest.raises(Mine) as caught:
                await client.get("/", headers=headers)
            kept.append(caught.value)
            assert len(report(caught.value).attempts) == 1
            assert mesh.snapshot()["orders"].in_flight == 0
            assert (await client.get("/", headers=headers)).status_code == 200

    colour.run(mesh, script)
    assert mesh.snapshot()["orders"].budget_tokens == 500


def test_C7_what_a_strategy_raises_over_an_inner_transport_closes_the_answer(colour: Colour) -> None:
    body = Body(b"busy")
    mesh = over(
        "10.0.0.1:80",
        inner=Factory({"10.0.0.1:80": lambda _: httpx.Response(503, stream=body)}),
        retry=Retry(on=raising),
    )

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(Mine):
            await client.get("/")

    colour.run(mesh, script)
    assert body.closed == 1
    assert mesh.snapshot()["orders"].in_flight == 0
