"""The sync clients, called from one thread and from twenty.

Decides how calls are spread over threads. The threads live as long as the section, so that none is started in a turn.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
from contestants import MESHED, PATIENCE, PLAIN, limits
from figure import Figure, ratios
from paired import Contestant, Sizes, measure, ratio
from subject import PATH, SUBJECT, URL
from upstream import answering, check

THREADS = (1, 20)


def figures(sizes: Sizes) -> Iterator[Figure]:
    """Ratios to plain `httpx.Client`."""
    for count in THREADS:
        with answering(3) as addresses, contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(count))
            client = stack.enter_context(httpx.Client(trust_env=False, timeout=PATIENCE, limits=limits()))
            mesh = stack.enter_context(SUBJECT.mesh(addresses))
            urls = itertools.cycle(f"http://{address}{PATH}" for address in addresses)
            contestants = [
                _contestant(PLAIN, client, urls, pool, count),
                _contestant(MESHED, stack.enter_context(mesh.client()), itertools.repeat(URL), pool, count),
            ]
            costs = measure(contestants, sizes)
        yield ratios(f"threads: {count}: {MESHED} / {PLAIN}", ratio(costs, MESHED, PLAIN))


def _contestant(
    name: str, client: httpx.Client, urls: Iterator[str], pool: ThreadPoolExecutor, threads: int
) -> Contestant:
    def work(calls: int) -> None:
        for _ in range(calls):
            response = client.get(next(urls))
            check(response.status_code, response.content)

    return Contestant(name, lambda calls: list(pool.map(work, _shares(calls, threads))), threads)


def _shares(calls: int, threads: int) -> Sequence[int]:
    """The calls of each thread."""
    return [calls // threads + (number < calls % threads) for number in range(threads)]
