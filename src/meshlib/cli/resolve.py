"""`meshlib resolve`: what a resolver sees, once or as it changes.

Decides when the resolver is asked again and what counts as a change. It asks as a mesh would, in a thread with an event
loop of its own, so that a signal ends it whatever the resolver is doing; unlike a mesh it believes every answer and
looks up no names. What a mesh would leave out (rule D5) is left out here as well, and told. See `meshlib.cli.findings`
for how an answer is shown.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from meshlib.cli.findings import Finding, shown_as
from meshlib.discovery.admission import in_words
from meshlib.discovery.failover import Failover
from meshlib.discovery.feed import parts_of
from meshlib.discovery.resolver import Resolution, Resolver, source_of
from meshlib.discovery.schemes import resolver_of
from meshlib.discovery.static import Static
from meshlib.errors import ConfigError, ResolveError
from meshlib.forbidden import is_forbidden

SHORTEST, LONGEST = 1.0, 3600.0
"""Seconds from one question to the next."""

LONGEST_AFTER_ERROR = 10.0

CLOSING = 2.0
"""Seconds for a resolver to let go of what it holds."""

Ask = Callable[[Resolution | None], Finding]


def run(urls: Sequence[str], *, service: str, is_watching: bool, wants_json: bool) -> int:
    """Ask a resolver and print what it answers.

    Args:
        urls: of the resolver; several are a failover.
        service: the name of the service that asks.
        is_watching: go on asking, and print what has changed.
        wants_json: JSON instead of tables.

    Returns:
        The exit status: 0 if it answered, 1 if it did not, 2 if a URL is not usable.
    """
    try:
        resolver = resolver_of(urls[0]) if len(urls) == 1 else Failover(*urls)
    except ConfigError as error:
        print(f"meshlib resolve: {error}", file=sys.stderr)
        return 2
    show = shown_as(source_of(resolver), wants_json=wants_json, is_watching=is_watching)
    with _asking(resolver, service) as ask:
        if is_watching:
            _watch(ask, show)
        finding = ask(None)
    show(finding)
    return 0 if finding.answer else 1


def _watch(ask: Ask, show: Callable[[Finding], None]) -> None:
    """Ask until a signal raises."""
    previous: Resolution | None = None
    news: object = None
    wait = SHORTEST
    while True:
        began = time.monotonic()
        finding = ask(previous)
        if finding.news != news:
            news = finding.news
            show(finding)
        if finding.answer is not None:
            previous, pause, wait = finding.answer, finding.answer.ttl or 0.0, SHORTEST
        else:
            # One that waits for news is asked plainly after an error, or it might wait for ever.
            previous = previous if previous is not None and previous.ttl is not None else None
            pause, wait = wait, min(2 * wait, LONGEST_AFTER_ERROR)
        time.sleep(min(max(pause, SHORTEST - (time.monotonic() - began), 0.0), LONGEST))


@contextmanager
def _asking(resolver: Resolver, service: str) -> Iterator[Ask]:
    """Gives what asks the resolver; at the end nothing of it is left running."""
    began = time.monotonic()
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(resolver, ready)), name="meshlib resolve", daemon=True)
    thread.start()
    loop, over = ready.result()

    def ask(previous: Resolution | None) -> Finding:
        asked = time.monotonic()
        future = asyncio.run_coroutine_threadsafe(_answer(resolver, service, previous), loop)
        try:
            answer, error = future.result(), ""
        except Exception as raised:  # a resolver may raise anything, and it is shown
            answer, error = None, _said(raised)
        finally:
            future.cancel()
        now = time.monotonic()
        return Finding(at=now - began, took=now - asked, answer=answer, error=error)

    try:
        yield ask
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(CLOSING)


async def _serve(resolver: Resolver, ready: Future[Any]) -> None:
    over = asyncio.Event()
    ready.set_result((asyncio.get_running_loop(), over))
    await over.wait()


async def _answer(resolver: Resolver, service: str, previous: Resolution | None) -> Resolution:
    answer = await resolver.resolve(service, previous)
    if not isinstance(answer, Resolution):
        raise ResolveError(f"{source_of(resolver)}: answered with a {type(answer).__name__}, not with a Resolution")
    return _admitted(resolver, answer)


def _admitted(resolver: Resolver, answer: Resolution) -> Resolution:
    """An answer without the endpoints that a mesh would not call; those that a URL lists itself are meant."""
    parts: list[object] = list(parts_of(resolver))
    listed = {each.place for part in parts if type(part) is Static for each in part.endpoints}
    bad = [each for each in answer.endpoints if each.place not in listed and is_forbidden(each.host)]
    if not bad:
        return answer
    words = in_words([each.host for each in bad])
    if len(bad) == len(answer.endpoints):
        raise ResolveError(f"{source_of(resolver)}: none of its endpoints may be called: {words}")
    places = {each.place for each in bad}
    kept = [each for each in answer.endpoints if each.place not in places]
    return replace(answer, endpoints=kept, warnings=(*answer.warnings, words))


def _said(error: Exception) -> str:
    if isinstance(error, ResolveError | ConfigError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}".removesuffix(": ")
