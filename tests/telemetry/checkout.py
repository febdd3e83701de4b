"""A program that calls services and is scraped by Prometheus, until its standard input ends.

How its services fare is up to the endpoints it is given: `python checkout.py '{"orders": ["127.0.0.1:8000"], ...}'`.
With `astray` after them, the resolver of `stock` fails after its first answer, which was some minutes ago, and the one
of `parts` never answers. It prints the port to be scraped.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from itertools import cycle
from math import inf
from threading import Thread

import httpx

from meshlib import Breaker, Endpoint, HealthCheck, Hedge, Limit, Mesh, RoundRobin, Service, Timeout, telemetry
from meshlib.discovery import Resolution

CALLERS = {"orders": 8, "search": 2, "users": 2, "mail": 1, "bills": 1, "stock": 1, "parts": 1, "rates": 1}
PAUSE = 0.03

HASTY = Breaker(consecutive=1, open_for=0.1, ramp=0)

LATER = 600.0
"""Seconds that the clock of what is astray is ahead once there was an answer: nobody wants to wait for so long."""


class Found:
    """A resolver that answers once a second, with one endpoint after the other; it fails after so many answers."""

    def __init__(self, places: list[str], answers: float = inf) -> None:
        self._endpoints = cycle([Endpoint.parse(place) for place in places])
        self._left = answers

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        if self._left <= 0:
            raise OSError("nobody is there")
        self._left -= 1
        return Resolution([next(self._endpoints)], 1.0)


def listed(places: dict[str, list[str]]) -> Mesh:
    return Mesh(
        Service("orders", places["orders"], timeout=Timeout(attempt=0.5, total=5)),
        Service("search", places["search"]),
        Service(
            "users", places["users"], hedge=Hedge(after=0.05), health=HealthCheck("/", interval=0.5), limit=Limit(50)
        ),
        *[Service(name, places[name], balancer=RoundRobin(), breaker=HASTY) for name in ("mail", "bills")],
    )


def call(client: httpx.Client) -> None:
    while True:
        time.sleep(PAUSE)
        with suppress(httpx.TransportError):  # the metrics say so
            client.get("/")


def main(places: dict[str, list[str]], *, is_astray: bool) -> None:
    ahead = 0.0
    stock = Service("stock", Found(places["stock"], 1 if is_astray else inf))
    parts = Service("parts", Found(places["parts"], 0 if is_astray else inf), timeout=Timeout(total=0.5))
    rates = Service("rates", Found(places["rates"]))
    with (
        telemetry.setup("checkout", prometheus_port=0) as running,
        listed(places) as mesh,
        Mesh(stock, parts, rates, clock=lambda: time.monotonic() + ahead) as found,
    ):
        for name, count in CALLERS.items():
            client = (found if name in found.snapshot() else mesh).client(name)
            for _ in range(count):
                Thread(target=call, args=(client,), daemon=True).start()
        if is_astray:
            while not found.snapshot()["stock"].nodes:
                time.sleep(0.01)
            ahead = LATER
        print(running.prometheus_port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), is_astray=sys.argv[2:] == ["astray"])
