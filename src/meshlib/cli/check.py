"""`meshlib check`: whether a configuration can be used, and with `--live` whether it leads anywhere.

Decides how faults are printed and what the exit status is. Whether something is a fault is decided where a mesh reads
its configuration, by the same code. With `--live` a mesh is made of it, and every endpoint that it finds is connected
to, as calls would; no request is sent.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpcore

from meshlib.config.reading import Configuration
from meshlib.config.schema import written
from meshlib.config.sources import of_file
from meshlib.core.doubts import Traffic, doubts_about
from meshlib.core.snapshot import ServiceSnapshot
from meshlib.endpoint import Endpoint
from meshlib.errors import ConfigError, ResolveError
from meshlib.mesh import Mesh
from meshlib.plain import printable
from meshlib.service import Service
from meshlib.transport.network import Bounded
from meshlib.transport.network_asyncio import connect
from meshlib.transport.stack import dial_to

AT_ONCE = 50
"""Connections that are being opened at the same time."""

SHOWN = 20
"""Endpoints of a service that are listed; there may be thousands."""

UNTOUCHED = Traffic(0.0, 0, 0, "")


def run(path: Path, *, is_live: bool, timeout: float) -> int:
    """Check a file and print what is wrong with it.

    Args:
        path: of the file.
        is_live: whether its services are looked for as well.
        timeout: seconds for finding the endpoints, and for connecting to each.

    Returns:
        The exit status: 0 if nothing is wrong, 1 if something is, 2 if the file cannot be read.
    """
    source = of_file(path)
    try:
        content = source.content()
    except OSError as error:
        print(f"meshlib check: {path}: {error.strerror or error}", file=sys.stderr)
        return 2
    except ConfigError as error:
        print(f"meshlib check: {error}", file=sys.stderr)
        return 2
    try:
        found = source.read(content)
    except ConfigError as error:
        for fault in error.faults:
            _say(f"{path}: {fault}")
        return 1
    for service in found.services if not is_live else ():  # else they are shown with the service
        for doubt in doubts_about(service, (), UNTOUCHED):
            _say(f"{path}: services.{service.name}: warning: {doubt.text}")
    _say(f"{path}: {_count(len(found.services), 'service')}, no faults")
    return _look(found, timeout) if is_live else 0


def print_schema() -> int:
    """Print the JSON Schema of such files."""
    print(written(), end="")
    return 0


def _look(found: Configuration, timeout: float) -> int:
    """Find the endpoints and connect to them; returns the exit status."""
    logging.getLogger("meshlib").addHandler(logging.NullHandler())  # what it has to say is printed below
    with Mesh(*found.services, **found.options) as mesh:
        try:
            mesh.wait_ready(timeout)
        except ResolveError:
            pass  # each service is shown with what it has come to
        snapshots = mesh.snapshot()
    return max(_show(service, snapshots[service.name], timeout) for service in found.services)


def _show(service: Service, snapshot: ServiceSnapshot, timeout: float) -> int:
    endpoints = [Endpoint.parse(node.endpoint) for node in snapshot.nodes]
    said = asyncio.run(_connected(service, endpoints, timeout))
    reached = sum(not wrong for wrong in said)
    answer = "no answer yet" if snapshot.age is None else _count(len(endpoints), "endpoint")
    _say(f"{service.name}: {answer}, {reached} can be connected to ({snapshot.source})")
    for warning in snapshot.warnings:
        _say(f"  warning: {warning}")
    for endpoint, wrong in list(zip(endpoints, said, strict=True))[:SHOWN]:
        _say(f"  {endpoint}: {wrong or 'connected'}")
    if len(endpoints) > SHOWN:
        _say(f"  and {len(endpoints) - SHOWN} more")
    return 0 if reached else 1


async def _connected(service: Service, endpoints: Sequence[Endpoint], timeout: float) -> list[str]:
    """For each endpoint what is wrong with connecting to it; empty if nothing is."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(endpoint: Endpoint) -> str:
        async with room:
            return await _why_not(service, endpoint, timeout)

    return await asyncio.gather(*map(one, endpoints))


async def _why_not(service: Service, endpoint: Endpoint, timeout: float) -> str:
    clock = asyncio.get_running_loop().time
    seconds = min(timeout, service.timeout.connect)
    try:
        stream: Any = await connect(dial_to(service, endpoint), seconds, Bounded(clock, clock() + seconds))
    except (httpcore.NetworkError, httpcore.TimeoutException) as error:
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {cause}".removesuffix(": ")
    stream.abort()
    return ""


def _say(words: str) -> None:
    print(printable(words), flush=True)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
