"""Makes the picture of the status page that stands in the documentation.

Decides what happens to the mesh in it: one endpoint of a service is killed and another is slow, while a second service
is well. Run by `nox -s screenshot`; arguments after the file's name go to the browser.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from components import chromium
from meshlib import Breaker, LeastRequest, Mesh, RoundRobin, Service
from meshlib.ext.wsgi import status_app
from meshlib.testing import upstreams
from served import served

LOOKS = 60
"""Snapshots that the page has seen, in a third of a second each: the browser waits for answers in real time alone."""


def main(path: Path, *flags: str) -> None:
    """Make the picture."""
    with upstreams(3, delay=0.012) as orders, upstreams(2, delay=0.004) as users:
        mesh = Mesh(
            Service(
                "orders",
                [each.address for each in orders],
                balancer=LeastRequest(),
                breaker=Breaker(open_for=60.0, slow_call=0.3),
            ),
            Service("users", [each.address for each in users], balancer=RoundRobin()),
        )
        asked = 0

        def auth(request: Any) -> bool:
            nonlocal asked
            if request.path == "/snapshot.json":
                asked += 1
                time.sleep(0.33)
                if asked == LOOKS // 3:
                    orders[2].script(then={"delay": 0.045})
                if asked == LOOKS * 2 // 3:
                    orders[1].kill()
            return True

        for service, pause in (("orders", 0.004), ("users", 0.02)):
            for _ in range(3):
                threading.Thread(target=call, args=(mesh, service, pause), daemon=True).start()
        size = ["--window-size=1360,530", f"--screenshot={path.resolve()}"]
        with served(status_app(mesh, auth=auth)) as url:
            chromium.load(url, *size, *flags, seconds=LOOKS)


def call(mesh: Mesh, service: str, pause: float) -> None:
    """Calls for ever, at an uneven pace."""
    with mesh.client(service) as client:
        for number in range(sys.maxsize):
            client.get("/").raise_for_status()
            time.sleep(pause * (1 + number % 7))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
