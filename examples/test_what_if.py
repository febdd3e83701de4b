"""What if `orders` hangs, breaks or loses a server? The tests of a small program, to be run by pytest.

    pytest examples/test_what_if.py

The fixtures come with meshlib; nothing has to be imported for them.
"""

import httpx

from meshlib import Breaker, Mesh, Retry, RoundRobin, Service, Timeout, report
from meshlib.testing import ManualResolver, faults

# The program

mesh = Mesh(Service("orders", ["10.0.0.1:8080", "10.0.0.2:8080"], timeout=Timeout(total=0.5, attempt=0.2)))


@mesh.call("orders", fallback="soon")
def state_of(client: httpx.Client, number: int) -> str:
    return client.get(f"/v1/orders/{number}").raise_for_status().text


# Its tests


def test_what_if_orders_hangs():
    with faults(mesh, "orders", hang=1.0):
        assert state_of(5) == "soon"


def test_what_if_every_tenth_answer_is_a_503(mesh_upstreams, mesh_no_backoff):
    servers = mesh_upstreams(2)
    mesh = Mesh(Service("orders", [server.address for server in servers]))
    with mesh.client("orders") as client, faults(mesh, "orders", fail=0.1, status=503) as played:
        answers = [client.get("/v1/orders/5") for _ in range(50)]
    assert {answer.status_code for answer in answers} == {200}
    assert played.hit > 0


def test_what_if_a_server_dies(mesh_upstreams):
    one, two = mesh_upstreams(2)
    with Mesh(Service("orders", [one.address, two.address])).client("orders") as client:
        one.kill()
        assert {client.get("/v1/orders/5").headers["x-upstream"] for _ in range(10)} == {two.name}


def test_what_if_the_answer_is_cut_off(mesh_upstreams):
    [server] = mesh_upstreams(1)
    server.script({"status": 500}, {"fault": "reset"}, then={"body": "shipped"})
    mesh = Mesh(Service("orders", [server.address], retry=Retry(on_status={500})))
    with mesh.client("orders") as client:
        answer = client.get("/v1/orders/5")
    assert (answer.text, len(report(answer).attempts)) == ("shipped", 3)


def test_what_if_a_minute_goes_by(mesh_upstreams, mesh_clock):
    servers = mesh_upstreams(2)
    endpoints = [server.address for server in servers]
    orders = Service("orders", endpoints, balancer=RoundRobin(), breaker=Breaker(consecutive=1))
    mesh = Mesh(orders, clock=mesh_clock)
    with mesh.client("orders") as client:
        with faults(mesh, "orders", hang=1.0, endpoint=servers[0].address):
            assert {client.get("/v1/orders/5").status_code for _ in range(4)} == {200}
        assert mesh.snapshot()["orders"].nodes[0].state == "open"
        mesh_clock.advance(60)
        client.get("/v1/orders/5")  # the probe
        assert mesh.snapshot()["orders"].nodes[0].state == "closed"


def test_what_if_endpoints_come_and_go(mesh_upstreams):
    one, two = mesh_upstreams(2)
    endpoints = ManualResolver([one.address])
    with Mesh(Service("orders", endpoints)) as mesh, mesh.client("orders") as client:
        assert client.get("/v1/orders/5").headers["x-upstream"] == one.name
        endpoints.set([two.address])
        assert client.get("/v1/orders/5").headers["x-upstream"] == two.name
        endpoints.fail(OSError("the registry is down"))
        assert client.get("/v1/orders/5").headers["x-upstream"] == two.name
