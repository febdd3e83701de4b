"""Call a service by its name from sync code; one of its endpoints is down, and no call notices.

The three upstreams are started here so that the example runs anywhere; yours are running somewhere already.
"""

from meshlib import Mesh, Service, report
from meshlib.testing import upstreams

with upstreams(3) as (a, b, c):
    c.kill()
    mesh = Mesh(Service("orders", [a.address, b.address, c.address]))
    with mesh.client("orders") as client:  # a plain httpx.Client
        for number in range(10):
            response = client.get(f"/v1/orders/{number}")
            response.raise_for_status()
            print(report(response))
    for node in mesh.snapshot()["orders"].nodes:
        print(f"{node.endpoint}: {node.state}, {node.attempts} attempts, {node.failures} failures")
