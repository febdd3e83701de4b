"""`meshlib top`: the status page of a running mesh, in the terminal.

Decides when it is asked again, and what to make of an answer that is none. It asks as a browser would, and changes
nothing there. See `meshlib.cli.overview` for how an answer is shown.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from meshlib.cli.endings import Stopped
from meshlib.cli.overview import Overview, shown_on

PATIENCE = 10.0
"""Seconds for an answer."""

LARGEST = 64 * 1024 * 1024
"""Bytes of an answer that are read; a snapshot of 1,000 endpoints has 0.2 million."""


class NoAnswer(Exception):
    """There is no snapshot, and why."""


def run(url: str, *, interval: float, is_once: bool) -> int:
    """Show what a status page tells, until Ctrl-C.

    Args:
        url: where the page is mounted; a user and a password in it are sent, and never shown.
        interval: seconds from one answer to the next question.
        is_once: show one answer and end.

    Returns:
        The exit status: 0 if it answered, 1 if it did not at first, 2 if the URL is not usable, 130 after Ctrl-C.
    """
    try:
        target = _target(url)
    except (httpx.InvalidURL, ValueError):
        example = "http://127.0.0.1:8000/mesh"
        print(f"meshlib top: URL: must be where a status page is mounted, for example {example}", file=sys.stderr)
        return 2
    source = _shown(target)
    with _unlogged(), httpx.Client(timeout=PATIENCE, headers={"accept": "application/json"}) as client:
        try:
            first = _ask(client, target)
        except NoAnswer as why:
            print(f"meshlib top: {source}: {why}", file=sys.stderr)
            return 1
        try:
            _show(first, client, target, source, interval=interval, is_once=is_once)
        except Stopped as stopped:
            if stopped.number != signal.SIGINT:
                raise
            return 128 + signal.SIGINT  # which is how it ends as a rule, so nothing is said of it
    return 0


@contextmanager
def _unlogged() -> Iterator[None]:
    """httpx logs URLs with a password and a query, httpcore the headers of answers (rule T3)."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("httpx", "httpcore"))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _show(
    first: Overview, client: httpx.Client, target: httpx.URL, source: str, *, interval: float, is_once: bool
) -> None:
    overview, answered_at, why = first, time.monotonic(), ""
    with shown_on(source, is_once=is_once) as show:
        show(overview, "")
        while not is_once:
            time.sleep(interval)
            try:
                overview, answered_at, why = _ask(client, target), time.monotonic(), ""
            except NoAnswer as error:
                why = f"stale for {time.monotonic() - answered_at:.0f} s: {error}"
            show(overview, why)


def _target(text: str) -> httpx.URL:
    """The URL of the snapshot.

    Raises:
        ValueError: if it cannot be one.
    """
    url = httpx.URL(text)
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(url.scheme)
    path = url.path.rstrip("/").removesuffix("/snapshot.json")
    return url.copy_with(path=f"{path}/snapshot.json", fragment=None)


def _shown(url: httpx.URL) -> str:
    """A URL without what may be secret in it."""
    return str(url.copy_with(username="", password="", query=None, fragment=None)).removesuffix("/snapshot.json")


def _ask(client: httpx.Client, url: httpx.URL) -> Overview:
    try:
        with client.stream("GET", url) as response:
            body = _body(response) if response.status_code == 200 else b""
    except httpx.HTTPError as error:
        raise NoAnswer(_said(error)) from None
    if response.status_code == 401:
        raise NoAnswer("401: it wants a user and a password: http://user:password@...")
    if response.next_request is not None:
        raise NoAnswer(f"{response.status_code}: it leads to {_shown(response.next_request.url)}")
    if response.status_code != 200:
        raise NoAnswer(f"{response.status_code} {response.reason_phrase}".rstrip())
    return _read(body)


def _body(response: httpx.Response) -> bytes:
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > LARGEST:
            break
    return bytes(body)


def _read(body: bytes) -> Overview:
    try:
        told: Any = json.loads(body)
        return Overview.of(told)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        raise NoAnswer("something else than a status page answers there") from None


def _said(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {PATIENCE:g} s"
    return str(error) or type(error).__name__
