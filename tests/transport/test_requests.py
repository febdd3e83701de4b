"""One request through the mesh, in every colour, against real upstream processes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from conftest import Colour
from meshes import mesh_of, outcomes, refusing
from meshlib import (
    Connections,
    DeadlineExceeded,
    Endpoint,
    Mesh,
    MeshError,
    Retry,
    RoundRobin,
    Service,
    Timeout,
    UnknownService,
    options,
    report,
)
from meshlib.testing import Upstream, upstreams
from meshlib.transport.stack import AsyncConnection, Stack, SyncTurn


def test_a_call_reaches_an_endpoint_and_the_answer_is_whole(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"status": 201, "headers": {"x-a": "b"}, "size": 100_000})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/orders?x=1", content=b"hello", headers={"x-c": "d"})

    response = colour.run(mesh_of(upstream), script)
    assert response.status_code == 201
    assert response.headers["x-a"] == "b"
    assert len(response.content) == 100_000
    [request] = upstream.log()
    assert (request.method, request.target) == ("POST", "/v1/orders?x=1")
    assert request.body_digest == hashlib.sha256(b"hello").hexdigest()
    assert request.values("x-c") == ["d"]


@pytest.mark.parametrize(("setting", "sent"), [(None, "orders"), ("endpoint", None), ("o.internal", "o.internal")])
def test_the_host_header_is_the_services_unless_said_otherwise(
    colour: Colour, upstream: Upstream, setting: str | None, sent: str | None
) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        await client.get("/")

    colour.run(mesh_of(upstream, host=setting), script)
    assert upstream.log()[0].values("host") == [sent or upstream.address]


@pytest.mark.parametrize("url", ["http://orders/x", "http://ORDERS/x", "http://orders./x", "http://orders:80/x"])
def test_a_service_is_matched_by_the_urls_host(colour: Colour, upstream: Upstream, url: str) -> None:
    async def script(client: httpx.AsyncClient) -> int:
        return (await client.get(url)).status_code

    assert colour.run(mesh_of(upstream), script, service=None) == 200
    assert upstream.log()[0].target == "/x"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://order/", "did you mean 'orders'"),
        ("http://example.org/", "known: orders"),
        ("http://orders:8080/", "without ':8080'"),
        ("https://orders/", "has no TLS"),
        ("http://orders@evil/", "'evil'"),
    ],
)
def test_S1_only_declared_services_are_called(colour: Colour, upstream: Upstream, url: str, said: str) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(UnknownService, match=said) as caught:
            await client.get(url)
        assert isinstance(caught.value, httpx.TransportError)

    colour.run(mesh_of(upstream), script, service=None)
    assert upstream.log() == []


def test_S1_a_redirect_does_not_leave_the_mesh(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"status": 302, "headers": {"location": f"http://{upstream.address}/elsewhere"}})

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(UnknownService):
            await client.get("/", follow_redirects=True)

    colour.run(mesh_of(upstream), script)
    assert len(upstream.log()) == 1


def test_a_client_for_an_unknown_service_is_refused_at_once() -> None:
    mesh = Mesh(Service("orders", ["127.0.0.1:1"]))
    with pytest.raises(UnknownService, match="did you mean 'orders'"):
        mesh.client("oders")
    with pytest.raises(UnknownService, match="did you mean 'orders'"):
        mesh.async_client("oders")


def test_an_unknown_option_is_a_type_error(colour: Colour, upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(TypeError, match="no option 'idempotant'"):
            await client.post("/", extensions={"meshlib": {"idempotant": True}})

    colour.run(mesh_of(upstream), script)


def test_C2_a_refused_connection_fails_over_even_for_a_post(colour: Colour, upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post("/", content=b"once") for _ in range(4)]

    with refusing() as dead:
        responses = colour.run(mesh_of(dead, upstream, balancer=RoundRobin()), script)
    assert {response.status_code for response in responses} == {200}
    assert [("first", "not_sent"), ("failover", "ok")] in map(outcomes, responses)
    assert len(upstream.log()) == 4


def test_C1_a_post_that_may_have_arrived_is_not_repeated(colour: Colour, fleet: list[Upstream]) -> None:
    for upstream in fleet:
        upstream.script(then={"fault": "close"})

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            await client.post("/", content=b"once")
        assert outcomes(caught.value) == [("first", "failed")]

    colour.run(mesh_of(*fleet), script)
    assert sum(len(upstream.log()) for upstream in fleet) == 1


@pytest.mark.parametrize("how", ["header", "extension"])
def test_C1_a_post_marked_idempotent_is_repeated(colour: Colour, fleet: list[Upstream], how: str) -> None:
    for upstream in fleet[:2]:
        upstream.script({"fault": "reset"})
    marked = (
        {"headers": {"Idempotency-Key": "1"}} if how == "header" else {"extensions": {"meshlib": {"idempotent": True}}}
    )

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post("/", content=b"again", **marked) for _ in range(6)]

    responses = colour.run(mesh_of(*fleet, balancer=RoundRobin()), script)
    assert {response.status_code for response in responses} == {200}
    bodies = {request.body_digest for upstream in fleet for request in upstream.log()}
    assert bodies == {hashlib.sha256(b"again").hexdigest()}
    assert sum(len(upstream.log()) for upstream in fleet) == 8


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_rejected_get_is_retried_elsewhere(colour: Colour, fleet: list[Upstream], status: int) -> None:
    fleet[0].script(then={"status": status})

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(3)]

    responses = colour.run(mesh_of(*fleet, balancer=RoundRobin()), script)
    assert [response.status_code for response in responses] == [200, 200, 200]
    retried = next(response for response in responses if len(report(response).attempts) > 1)
    assert outcomes(retried) == [("first", "rejected"), ("retry", "ok")]
    first, second = report(retried).attempts
    assert (first.status, second.status) == (status, 200)
    assert first.endpoint != second.endpoint
    assert second.waited == 0


@pytest.mark.parametrize("status", [400, 404, 500, 501])
def test_other_answers_are_the_callers(colour: Colour, upstream: Upstream, status: int) -> None:
    upstream.script({"status": status})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/")

    response = colour.run(mesh_of(upstream), script)
    assert response.status_code == status
    assert len(upstream.log()) == 1


def test_when_all_reject_the_last_answer_is_returned_whole(colour: Colour, fleet: list[Upstream]) -> None:
    for upstream in fleet:
        upstream.script(then={"status": 503, "body": f"busy {upstream.name}"})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/")

    response = colour.run(mesh_of(*fleet), script)
    assert response.status_code == 503
    assert response.text.startswith("busy ")
    assert outcomes(response) == [("first", "rejected"), ("retry", "rejected"), ("retry", "rejected")]
    assert len({attempt.endpoint for attempt in report(response).attempts}) == 3


def test_an_answer_is_kept_when_nothing_better_comes(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"status": 503, "body": "busy"}, then={"fault": "reset"})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/")

    response = colour.run(mesh_of(upstream), script)
    assert (response.status_code, response.text) == (503, "busy")
    assert outcomes(response)[0] == ("first", "rejected")
    assert {outcome for _, outcome in outcomes(response)[1:]} == {"failed"}


def test_C2_a_single_endpoint_is_tried_again(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"fault": "reset"})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/")

    assert outcomes(colour.run(mesh_of(upstream), script)) == [("first", "failed"), ("retry", "ok")]


def test_when_nobody_listens_the_last_error_leaves_with_the_report(colour: Colour, no_leaks: None) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ConnectError, match="connecting to 127") as caught:
            await client.get("/secret?token=hidden")
        attempts = report(caught.value).attempts
        assert [attempt.kind for attempt in attempts][:2] == ["first", "failover"]
        assert {str(attempt.outcome) for attempt in attempts} == {"not_sent"}
        assert caught.value.request.url.path == "/secret"
        [note] = caught.value.__notes__
        assert "first at 127.0.0.1:" in note
        assert "hidden" not in note

    with refusing() as one, refusing() as two:
        colour.run(mesh_of(one, two), script)


def test_the_total_time_bounds_a_call(colour: Colour, fleet: list[Upstream]) -> None:
    for upstream in fleet:
        upstream.script(then={"fault": "hang"})

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(DeadlineExceeded, match=r"orders: no answer within 0.4 s") as caught:
            await client.get("/")
        assert isinstance(caught.value, httpx.TimeoutException)
        assert isinstance(caught.value, MeshError)
        assert len(report(caught.value).attempts) == 2

    colour.run(mesh_of(*fleet, timeout=Timeout(total=0.4, attempt=0.25)), script)


def test_connections_are_kept_and_the_last_used_goes_first(colour: Colour, upstream: Upstream) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(20):
            await client.get("/")

    colour.run(mesh_of(upstream), script)
    assert {request.connection for request in upstream.log()} == {1}


def test_C8_a_kept_connection_that_died_costs_one_free_retry(colour: Colour, upstream: Upstream) -> None:
    upstream.script({}, {"fault": "reset"})

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(2)]

    mesh = mesh_of(upstream)
    before = mesh.snapshot()["orders"].budget_tokens
    responses = colour.run(mesh, script)
    assert outcomes(responses[1]) == [("first", "failed"), ("transparent", "ok")]
    snapshot = mesh.snapshot()["orders"]
    assert snapshot.nodes[0].failures == 0
    assert snapshot.budget_tokens == before


def test_C8_a_connection_closed_while_idle_is_not_even_tried(colour: Colour, upstream: Upstream) -> None:
    upstream.script(then={"fault": "close_after"})

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        responses = []
        for _ in range(5):
            responses.append(await client.post("/", content=b"x"))
            await asyncio.sleep(0.05) if colour.name != "trio" else await _trio_sleep()
        return responses

    responses = colour.run(mesh_of(upstream), script)
    assert [outcomes(response) for response in responses] == [[("first", "ok")]] * 5
    assert len(upstream.log()) == 5


async def _trio_sleep() -> None:
    import trio

    await trio.sleep(0.05)


def test_C6_a_call_is_in_flight_until_its_body_has_ended(colour: Colour, upstream: Upstream) -> None:
    upstream.script(then={"size": 5_000_000})
    mesh = mesh_of(upstream)
    if colour.is_sync:
        with mesh.client("orders") as client:
            with client.stream("GET", "/") as response:
                assert mesh.snapshot()["orders"].in_flight == 1
                assert len(response.read()) == 5_000_000
                assert mesh.snapshot()["orders"].in_flight == 0
            with client.stream("GET", "/"):
                assert mesh.snapshot()["orders"].in_flight == 1
            assert mesh.snapshot()["orders"].in_flight == 0
        return

    async def script(client: httpx.AsyncClient) -> None:
        async with client.stream("GET", "/") as response:
            assert mesh.snapshot()["orders"].in_flight == 1
            assert len(await response.aread()) == 5_000_000
            assert mesh.snapshot()["orders"].in_flight == 0
        async with client.stream("GET", "/"):
            assert mesh.snapshot()["orders"].in_flight == 1
        assert mesh.snapshot()["orders"].in_flight == 0

    colour.run(mesh, script)


def test_a_body_that_dies_is_one_failure(colour: Colour, upstream: Upstream) -> None:
    upstream.script({"fault": "cut", "size": 1000})
    mesh = mesh_of(upstream)

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            await client.get("/")
        assert outcomes(caught.value) == [("first", "failed")]

    colour.run(mesh, script)
    [node] = mesh.snapshot()["orders"].nodes
    assert (node.attempts, node.failures, node.in_flight) == (1, 1, 0)


def test_a_caller_that_sends_rubbish_blames_nobody(colour: Colour, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.LocalProtocolError) as caught:
            await client.get("/", headers={"x-a": "line\nfeed"})
        assert outcomes(caught.value) == [("first", "abandoned")]
        assert (await client.get("/")).status_code == 200

    colour.run(mesh, script)
    assert mesh.snapshot()["orders"].nodes[0].failures == 0


def test_waiting_for_a_connection_is_bounded_and_nobodys_fault(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"delay": 2})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1), retry=Retry(max_attempts=1))

    async def main() -> list[object]:
        async with mesh.async_client("orders") as client:
            holder = asyncio.ensure_future(client.get("/"))
            while not upstream.log():
                await asyncio.sleep(0.01)
            with options(timeout=0.3):
                results = await asyncio.gather(*(client.get("/") for _ in range(2)), return_exceptions=True)
            assert (await holder).status_code == 200
        return results

    assert [type(result) for result in asyncio.run(main())] == [DeadlineExceeded] * 2
    assert upstream.stats()["connections_total"] == 1
    [node] = mesh.snapshot()["orders"].nodes
    assert (node.in_flight, node.failures) == (0, 0)


def test_sixteen_calls_share_two_connections(no_leaks: None, upstream: Upstream) -> None:
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=2))

    async def main() -> list[httpx.Response]:
        async with mesh.async_client("orders") as client:
            return await asyncio.gather(*(client.get("/") for _ in range(16)))

    assert {response.status_code for response in asyncio.run(main())} == {200}
    assert upstream.stats()["connections_total"] == 2


def test_the_snapshot_is_json_and_tells_what_happened(colour: Colour, upstream: Upstream) -> None:
    mesh = mesh_of(upstream)

    async def script(client: httpx.AsyncClient) -> None:
        for _ in range(3):
            await client.get("/")

    colour.run(mesh, script)
    snapshot = json.loads(json.dumps(mesh.snapshot()["orders"].to_dict()))
    assert (snapshot["name"], snapshot["in_flight"], snapshot["panic"]) == ("orders", 0, False)
    [node] = snapshot["nodes"]
    assert node["endpoint"] == upstream.address
    assert (node["state"], node["eligible"], node["attempts"], node["failures"]) == ("closed", True, 3, 0)
    assert 0 < node["p50"] <= node["p99"]
    assert node["rate"] > 0


def test_a_report_is_only_had_from_a_mesh() -> None:
    with pytest.raises(ValueError, match="did not come out of a call"):
        report(httpx.Response(200))


@pytest.mark.parametrize("address", ["localhost", "[::1]"])
def test_localhost_and_ipv6_are_dialled(colour: Colour, upstream: Upstream, address: str) -> None:
    async def script(client: httpx.AsyncClient) -> int | type:
        try:
            return (await client.get("/")).status_code
        except httpx.ConnectError as error:
            return type(error)

    mesh = mesh_of(f"{address}:{upstream.port}")
    assert colour.run(mesh, script) == (200 if address == "localhost" else httpx.ConnectError)


def test_two_services_and_a_foreign_client(no_leaks: None) -> None:
    with upstreams(2) as (a, b):
        mesh = Mesh(Service("orders", [a.address]), Service("users", [Endpoint("127.0.0.1", b.port)]))
        with httpx.Client(transport=mesh.transport()) as client:
            assert client.get("http://orders/").headers["x-upstream"] == "a"
            assert client.get("http://users/").headers["x-upstream"] == "b"


def test_one_mesh_serves_both_colours_and_what_one_learns_the_other_knows(upstream: Upstream, no_leaks: None) -> None:
    with refusing() as dead:
        mesh = mesh_of(dead, upstream, balancer=RoundRobin())

        async def main() -> httpx.Response:
            async with mesh.async_client("orders") as client:
                return await client.get("/")

        with mesh.client("orders") as client:
            for _ in range(12):
                client.get("/")
        assert [node.state for node in mesh.snapshot()["orders"].nodes] == ["open", "closed"]
        assert outcomes(asyncio.run(main())) == [("first", "ok")]


@pytest.mark.parametrize(
    ("url", "said"),
    [("ftp://orders/", "only http and https"), ("/x", "the URL has no host")],
    ids=["scheme", "no host"],
)
def test_a_url_that_reaches_no_service_is_told_why(colour: Colour, upstream: Upstream, url: str, said: str) -> None:
    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(UnknownService, match=said) as caught:
            await client.get(url)
        assert report(caught.value).attempts == []

    colour.run(mesh_of(upstream), script, service=None)


@pytest.mark.parametrize("keyword", ["transport", "proxy", "verify", "cert", "limits", "http2"])
def test_what_would_go_past_the_mesh_is_refused(keyword: str) -> None:
    mesh = Mesh(Service("orders", ["127.0.0.1:1"]))
    with pytest.raises(TypeError, match=f"takes no '{keyword}': "):
        mesh.client("orders", **{keyword: None})
    with pytest.raises(TypeError, match=f"takes no '{keyword}': "):
        mesh.async_client("orders", **{keyword: None})


@pytest.mark.parametrize(
    ("method", "status", "content"), [("GET", 302, b""), ("POST", 307, b"body"), ("PUT", 307, b"body")]
)
def test_a_redirect_within_the_service_is_followed(
    colour: Colour, upstream: Upstream, method: str, status: int, content: bytes
) -> None:
    upstream.script({"status": status, "headers": {"location": "/elsewhere"}})

    async def script(client: httpx.AsyncClient) -> httpx.Response:
        return await client.request(method, "/", content=content, follow_redirects=True)

    assert colour.run(mesh_of(upstream), script).status_code == 200
    assert [request.target for request in upstream.log()] == ["/", "/elsewhere"]
    assert {request.body_digest for request in upstream.log()} == {hashlib.sha256(content).hexdigest()}


def test_those_who_wait_for_a_connection_are_served_in_turn(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"delay": 0.002})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1))
    counts = [0] * 4

    def work(client: httpx.Client, number: int) -> None:
        while sum(counts) < 200:
            client.get("/")
            counts[number] += 1

    with mesh.client("orders") as client:
        threads = [threading.Thread(target=work, args=(client, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert min(counts) >= 30, counts


class Silent:
    """A stream that only knows whether it was dropped."""

    is_readable = is_dropped = False

    def abort(self) -> None:
        self.is_dropped = True


def test_a_connection_that_is_too_old_is_not_handed_to_those_who_wait() -> None:
    settings = Connections(max_per_endpoint=1, max_age=10.0)
    stack = Stack[Any](Service("orders", ["127.0.0.1:1"], connections=settings), Endpoint("127.0.0.1", 1))
    assert stack.reserve()
    stream = Silent()
    connection = AsyncConnection(stream, stack, 0.0, None)  # type: ignore[arg-type]
    first, second = SyncTurn(), SyncTurn()
    stack.waiting.extend([first, second])
    stack.put(connection, 10.0)
    assert first.gift is connection
    assert not stream.is_dropped
    stack.put(connection, 10.1)
    assert second.is_set()
    assert second.gift is None, "the room for a new one goes on to the next"
    assert stream.is_dropped
    assert stack.size == 1


def test_tasks_that_wait_for_a_connection_are_served_in_turn(no_leaks: None, upstream: Upstream) -> None:
    upstream.script(then={"delay": 0.002})
    mesh = mesh_of(upstream, connections=Connections(max_per_endpoint=1))
    counts = [0] * 4

    async def work(client: httpx.AsyncClient, number: int) -> None:
        while sum(counts) < 200:
            await client.get("/")
            counts[number] += 1

    async def main() -> None:
        async with mesh.async_client("orders") as client:
            await asyncio.gather(*(work(client, number) for number in range(4)))

    asyncio.run(main())
    assert min(counts) >= 30, counts


class StorageError(Exception):
    """What a caller's own body may raise."""


def test_the_callers_own_exception_leaves_the_call_as_it_is(colour: Colour, fleet: list[Upstream]) -> None:
    raised = StorageError("disk")

    def sync() -> Iterator[bytes]:
        yield b"x"
        raise raised from httpx.ReadError("a cause that is none of ours")

    async def later() -> AsyncIterator[bytes]:
        yield b"x"
        raise raised from httpx.ReadError("a cause that is none of ours")

    mesh = mesh_of(*fleet)

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(StorageError) as caught:
            await client.put("/", content=sync() if colour.is_sync else later())
        assert caught.value is raised
        assert outcomes(raised) == [("first", "abandoned")]

    colour.run(mesh, script)
    assert [node.failures for node in mesh.snapshot()["orders"].nodes] == [0, 0, 0]


def test_C3_a_body_whose_source_broke_is_not_played_again(colour: Colour, fleet: list[Upstream]) -> None:
    """Not even when what it raised looks like the network's: a repeat would send a cut body as a whole one."""

    def sync() -> Iterator[bytes]:
        yield b"0123456789"
        raise httpx.ReadError("the source's")

    async def later() -> AsyncIterator[bytes]:
        yield b"0123456789"
        raise httpx.ReadError("the source's")

    async def script(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ReadError, match="the source's"):
            await client.put("/", content=sync() if colour.is_sync else later())

    colour.run(mesh_of(*fleet), script)
    assert not any(request.complete for upstream in fleet for request in upstream.log())


def test_the_drain_of_one_answer_is_not_the_next_endpoints_time(colour: Colour, fleet: list[Upstream]) -> None:
    fleet[0].script(then={"status": 503, "fault": "drip", "size": 1000})

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/") for _ in range(2)]

    responses = colour.run(mesh_of(*fleet[:2], balancer=RoundRobin()), script)
    retried = next(response for response in responses if len(report(response).attempts) == 2)
    assert report(retried).attempts[1].seconds < 0.1


@pytest.mark.parametrize("passthrough", [False, True])
def test_a_client_of_the_other_colour_is_told_which_transport_it_takes(passthrough: bool) -> None:
    mesh = Mesh(Service("orders", ["10.0.0.1:80"]), passthrough=passthrough)
    wrong: Any = mesh.transport(), mesh.async_transport()
    with pytest.raises(AttributeError, match=r"for httpx\.AsyncClient take mesh\.async_transport\(\)$"):
        asyncio.run(httpx.AsyncClient(transport=wrong[0]).get("http://orders/"))
    with pytest.raises(AttributeError, match=r"for httpx\.Client take mesh\.transport\(\)$"):
        httpx.Client(transport=wrong[1]).get("http://orders/")
