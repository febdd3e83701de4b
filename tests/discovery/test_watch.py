"""Resolvers are asked off the request path, and the last good answer is always at hand (rule D1)."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Any

import pytest
from played import Played

from meshlib import Endpoint, Mesh, NoEndpoints, ResolveError, Service, report
from meshlib.discovery import Resolution, watch
from meshlib.testing import ManualClock, Upstream
from waiting import until

pytestmark = pytest.mark.usefixtures("no_leaks")

A, B, C = "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"


def places(mesh: Mesh, name: str = "orders") -> list[str]:
    return [node.endpoint for node in mesh.snapshot()[name].nodes]


def test_a_mesh_that_is_not_used_asks_nobody() -> None:
    resolver = Played(A)
    mesh = Mesh(Service("orders", resolver))
    mesh.client("orders").close()
    time.sleep(0.05)
    assert resolver.asked == []
    assert mesh.snapshot()["orders"].age is None


@pytest.mark.usefixtures("hurry")
def test_what_changes_is_seen() -> None:
    resolver = Played(A)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        assert places(mesh) == [A]
        resolver.say(B, C)
        until(lambda: places(mesh) == [B, C])
        assert set(resolver.services) == {"orders"}


@pytest.mark.usefixtures("hurry")
def test_who_waits_for_news_is_given_the_last_answer() -> None:
    resolver = Played(A, ttl=None)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        resolver.say(B)
        until(lambda: places(mesh) == [B])
        resolver.say(C)
        until(lambda: places(mesh) == [C])
        until(lambda: len(resolver.asked) == 4)
    assert [previous and previous.index for previous in resolver.asked] == [None, 1, 2, 3]
    assert resolver.under_way == 0, "the last question was cancelled"


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(
    "error", [OSError("no route"), ValueError("junk"), asyncio.CancelledError(), SystemExit("bye"), KeyboardInterrupt()]
)
def test_D1_the_watch_survives_anything(error: BaseException) -> None:
    resolver = Played(A, ttl=None)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        resolver.fail(error)
        until(lambda: len(resolver.asked) >= 6)
        assert places(mesh) == [A]
        assert resolver.asked[3] is None
        assert type(error).__name__ in mesh.snapshot()["orders"].warnings[0]
        resolver.say(B)
        until(lambda: places(mesh) == [B])


@pytest.mark.usefixtures("hurry")
def test_D4_the_first_question_after_an_error_is_plain_and_so_is_one_after_an_empty_answer() -> None:
    resolver = Played(A, ttl=None)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        resolver.fail(OSError())
        until(lambda: len(resolver.asked) >= 4)
        assert resolver.asked[2:4] == [None, None]
        resolver.say()
        until(lambda: places(mesh) == [])
        assert resolver.asked[-3:-1] == [None, None]


@pytest.mark.usefixtures("hurry")
def test_who_polls_is_shown_its_last_good_answer_after_an_error() -> None:
    resolver = Played(A)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        resolver.fail(OSError())
        until(lambda: len(resolver.asked) >= 4)
    assert all(previous is not None and previous.index == 1 for previous in resolver.asked[1:])


@pytest.mark.usefixtures("hurry")
def test_D1_one_empty_answer_empties_nothing_and_repeated_ones_do(upstream: Upstream) -> None:
    resolver = Played(upstream.address)
    with Mesh(Service("orders", resolver)) as mesh, mesh.client("orders") as client:
        assert client.get("/").status_code == 200
        for _ in range(3):
            resolver.say()
            seen = len(resolver.asked)
            until(lambda seen=seen: len(resolver.asked) > seen)  # type: ignore[misc]
            resolver.say(upstream.address)
            seen = len(resolver.asked)
            until(lambda seen=seen: len(resolver.asked) > seen + 1)  # type: ignore[misc]
            assert client.get("/").status_code == 200
        resolver.say()
        until(lambda: places(mesh) == [])
        with pytest.raises(NoEndpoints, match=r"orders: it has no endpoint, as of [0-9]+ s ago \(played"):
            client.get("/")
        resolver.say(upstream.address)
        until(lambda: places(mesh) != [])
        assert client.get("/").status_code == 200


@pytest.mark.usefixtures("hurry")
def test_D1_too_old_a_set_is_none_and_age_and_source_are_seen() -> None:
    clock = ManualClock()
    resolver = Played(A, source="consul://127.0.0.1:8500/orders")
    with Mesh(Service("orders", resolver, max_stale=60), clock=clock) as mesh:
        mesh.wait_ready(5)
        assert mesh.snapshot()["orders"].source == "consul://127.0.0.1:8500/orders"
        resolver.fail(OSError("refused"))
        until(lambda: mesh.snapshot()["orders"].warnings)
        clock.advance(59)
        assert 58 < mesh.snapshot()["orders"].age < 60
        seen = len(resolver.asked)
        until(lambda: len(resolver.asked) > seen + 2)
        assert places(mesh) == [A]
        clock.advance(2)
        until(lambda: places(mesh) == [])
        why = r"as of 6[0-9] s ago \(.*refused; .*too old, 6[0-9] s \(max_stale=60\)"
        with mesh.client("orders") as client, pytest.raises(NoEndpoints, match=why):
            client.get("/")
        resolver.say(A)
        until(lambda: places(mesh) == [A])
        assert mesh.snapshot()["orders"].age < 1
        assert mesh.snapshot()["orders"].warnings == ()


@pytest.mark.usefixtures("hurry")
def test_an_error_is_said_once_for_each_kind_and_again_in_the_next_outage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="meshlib")
    resolver = Played(A, source="toy:")
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)

        def outage() -> None:
            for error in (OSError("no answer in 1 s"), OSError("no answer in 2 s"), ValueError("junk")):
                seen = len(resolver.asked)
                resolver.fail(error)
                until(lambda seen=seen: len(resolver.asked) > seen + 2)  # type: ignore[misc]
            resolver.say(A)
            until(lambda: not mesh.snapshot()["orders"].warnings)

        outage()
        outage()
    said = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    said.remove("INFO orders: 10.0.0.1:80 was added")
    one = [
        "WARNING toy:: OSError: no answer in 1 s (said once; the last good answer stays)",
        "WARNING toy:: ValueError: junk (said once; the last good answer stays)",
        "INFO toy: answers again",
    ]
    assert said == one * 2


@pytest.mark.usefixtures("hurry")
def test_T3_an_error_of_somebody_else_s_client_shows_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    resolver = Played(source="toy:")
    url = "https://user:PASSWORD@registry.internal:8443/v1/orders?token=SECRET#SECRET"
    resolver.fail(OSError(f"403 Forbidden for url '{url}'\nsee <{url}>"))
    with Mesh(Service("orders", resolver)) as mesh, pytest.raises(ResolveError) as caught:
        mesh.wait_ready(0.2)
    (said,) = [record.getMessage() for record in caplog.records]
    shown = "OSError: 403 Forbidden for url 'https://registry.internal:8443/v1/orders' see <https://registry"
    assert shown in said
    assert shown in str(caught.value)
    assert not re.search("PASSWORD|SECRET|\n", said + str(caught.value))


@pytest.mark.usefixtures("hurry")
def test_errors_that_differ_each_time_are_not_all_said(caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        asked = 0

        async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
            self.asked += 1
            raise OSError("trace " + "abcdefgh"[self.asked % 8] * self.asked)

    resolver = Odd()
    with Mesh(Service("orders", resolver)) as mesh:
        with pytest.raises(ResolveError):
            mesh.wait_ready(0.1)
        until(lambda: resolver.asked > 40, 20)
    assert len(caplog.records) == watch.KINDS


def test_D3_a_name_is_asked_for_once_a_second_at_most() -> None:
    resolver = Played(A, ttl=0.01)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        until(lambda: len(resolver.times) >= 3)
        resolver.fail(OSError())
        until(lambda: len(resolver.times) >= 5, 10)
    gaps = [later - sooner for sooner, later in zip(resolver.times, resolver.times[1:], strict=False)]
    assert min(gaps) > 0.99


def test_D4_news_is_asked_for_twice_at_once_and_then_once_a_second() -> None:
    resolver = Played(A, ttl=None)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        for _ in range(3):
            seen = len(resolver.asked)
            until(lambda seen=seen: len(resolver.asked) > seen - 1 and resolver.under_way)  # type: ignore[misc]
            resolver.say(B)
            until(lambda seen=seen: len(resolver.asked) > seen)  # type: ignore[misc]
    gaps = [later - sooner for sooner, later in zip(resolver.times, resolver.times[1:], strict=False)]
    assert gaps[0] < 0.5, "the second at once"
    assert all(gap > 0.9 for gap in gaps[1:])


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ([Endpoint("10.0.0.1", 80)], "must return a Resolution, got list"),
        (None, "must return a Resolution, got NoneType"),
        (Resolution(["10.0.0.1:80"], 1.0), "must be Endpoints, got str"),  # type: ignore[list-item]
        (Resolution([Endpoint("10.0.0.1", 80)], "5"), "ttl .* must be seconds or None, got '5'"),  # type: ignore[arg-type]
        *(
            (Resolution([Endpoint("10.0.0.1", 80)], ttl), "ttl .* must be seconds or None, got")
            for ttl in (float("nan"), -float("inf"), 10**400)
        ),
        (Resolution([Endpoint("10.0.0.1", 80)], 1.0, warnings=[None]), "warnings .* must be texts"),  # type: ignore[list-item]
    ],
)
def test_a_resolver_that_answers_something_else_is_told(answer: Any, complaint: str) -> None:
    class Wrong:
        async def resolve(self, service: str, previous: Resolution | None) -> Any:
            return answer

    with Mesh(Service("orders", Wrong())) as mesh, pytest.raises(Exception, match=complaint):
        mesh.wait_ready(0.2)


def test_one_warning_is_one() -> None:
    assert Resolution([], 1.0, warnings="a part is missing").warnings == ("a part is missing",)


@pytest.mark.usefixtures("hurry")
def test_services_with_one_source_share_one_watch() -> None:
    first, second = Played(A, key="consul"), Played(A, key="consul")
    other = Played(B, key="another")
    with Mesh(Service("a", first), Service("b", second), Service("c", other)) as mesh:
        mesh.wait_ready(5)
        assert (places(mesh, "a"), places(mesh, "b"), places(mesh, "c")) == ([A], [A], [B])
    assert (len(first.asked) > 0) + (len(second.asked) > 0) == 1


@pytest.mark.usefixtures("hurry")
def test_without_a_key_each_service_asks_in_its_own_name() -> None:
    resolver = Played(A)
    with Mesh(Service("a", resolver), Service("b", resolver)) as mesh:
        mesh.wait_ready(5)
    assert set(resolver.services) == {"a", "b"}


@pytest.mark.usefixtures("hurry")
def test_D2_what_stays_keeps_its_node(fleet: list[Upstream]) -> None:
    one, two, three = (each.address for each in fleet)
    resolver = Played(one, two)
    with Mesh(Service("orders", resolver)) as mesh, mesh.client("orders") as client:
        for _ in range(20):
            client.get("/")
        before = {node.endpoint: node.attempts for node in mesh.snapshot()["orders"].nodes}
        resolver.say(three, two)
        until(lambda: places(mesh) == [three, two])
        after = {node.endpoint: node.attempts for node in mesh.snapshot()["orders"].nodes}
        assert after == {three: 0, two: before[two]}
        assert {report(client.get("/")).attempts[-1].endpoint.place for _ in range(20)} <= {
            Endpoint.parse(two).place,
            Endpoint.parse(three).place,
        }


@pytest.mark.usefixtures("hurry")
def test_an_answer_in_another_order_changes_nothing() -> None:
    resolver = Played(A, B)
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        view = mesh._clusters["orders"].view
        for answer in ((B, A), (A, B), (B, A)):
            seen = len(resolver.asked)
            resolver.say(*answer)
            until(lambda seen=seen: len(resolver.asked) > seen + 1)  # type: ignore[misc]
        assert mesh._clusters["orders"].view is view


def test_flapping_rebuilds_twice_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PACE", 0.01)
    resolver = Played(A)
    resolver.ttl = 0.0
    views = set()
    with Mesh(Service("orders", resolver)) as mesh:
        mesh.wait_ready(5)
        began = time.monotonic()
        while time.monotonic() - began < 2.2:
            views.add(view := mesh._clusters["orders"].view)
            resolver.say(*((A, B) if len(view.nodes) == 1 else (A,)))  # always something else
            time.sleep(0.01)
    assert len(resolver.asked) > 20
    assert 2 <= len(views) <= 6
