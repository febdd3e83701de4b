"""A status page without any framework: a mesh, one endpoint of which is dead, and the page on a port of its own.

Open the printed URL in a browser, or `meshlib top URL`; this example looks at it once by itself and ends. With
`--stay` it goes on until Ctrl-C.
"""

import sys
import threading
import time
from wsgiref.simple_server import make_server

import httpx

from meshlib import LeastRequest, Mesh, Service
from meshlib.ext.wsgi import status_app
from meshlib.testing import upstreams


def call(mesh: Mesh, over: threading.Event) -> None:
    with mesh.client("orders") as client:
        while not over.wait(0.01):
            client.get("/").raise_for_status()


with upstreams(3, delay=0.01) as (a, b, c):
    mesh = Mesh(Service("orders", [a.address, b.address, c.address], balancer=LeastRequest()))
    server = make_server("127.0.0.1", 0, status_app(mesh))
    url = f"http://127.0.0.1:{server.server_port}"
    over = threading.Event()
    threads = [threading.Thread(target=call, args=(mesh, over)), threading.Thread(target=server.serve_forever)]
    for thread in threads:
        thread.start()
    try:
        print(f"the status page is at {url}/")
        time.sleep(0.5)
        c.kill()
        time.sleep(0.5)
        for node in httpx.get(f"{url}/snapshot.json").raise_for_status().json()["services"]["orders"]["nodes"]:
            print(f"{node['endpoint']}: {node['state']}, eligible: {node['eligible']} ({node['why']})")
        while "--stay" in sys.argv:
            time.sleep(1)
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        for thread in threads:
            thread.join()
