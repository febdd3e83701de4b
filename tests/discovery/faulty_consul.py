"""A Consul that answers what a test tells it to, for what a real one will not do on demand.

It serves HTTP/1.1 on a free port of loopback, on the event loop of the test, one request per connection; it records
what it was asked, and plays its script in order, the last answer over and over.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit


@dataclass(frozen=True)
class Answer:
    """One answer.

    `data` is sent as JSON, `raw` as it is; `delay` seconds pass before the first byte. `fault`: "close" and "reset"
    answer nothing, "hang" keeps the connection open without a word, "cut" closes it in the body, "drip" sends a byte
    of the body every 50 ms, "endless" never stops sending.
    """

    data: Any = field(default_factory=list)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    delay: float = 0
    fault: str = ""

    @property
    def body(self) -> bytes:
        return json.dumps(self.data).encode() if self.raw is None else self.raw


@dataclass(frozen=True)
class Query:
    """One request as it came in."""

    path: str
    params: list[tuple[str, str]]
    headers: dict[str, str]
    at: float

    def __getitem__(self, name: str) -> str | None:
        """The value of a parameter; None if it was not given."""
        return dict(self.params).get(name)


class FaultyConsul:
    """The server, listening while the block that it is given to is running."""

    def __init__(self, *answers: Answer, tls: ssl.SSLContext | None = None) -> None:
        self.queries: list[Query] = []
        self._answers = answers
        self._tls = tls
        self._busy: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._busy:
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            answer = self._answers[min(len(self.queries), len(self._answers) - 1)]
            self.queries.append(_read(head))
            await asyncio.sleep(answer.delay)
            await _play(answer, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        finally:
            writer.transport.abort() if writer.transport.is_closing() else writer.close()
            self._busy.discard(task)


def _read(head: str) -> Query:
    request, *lines = head.strip().split("\r\n")
    parts = urlsplit(request.split(" ")[1])
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    params = parse_qsl(parts.query, keep_blank_values=True)
    return Query(unquote(parts.path), params, headers, time.monotonic())


async def _play(answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if answer.fault == "hang":
        await reader.read()
    if answer.fault == "reset":
        writer.transport.abort()
    if answer.fault in ("hang", "reset", "close"):
        return
    length = {"content-length": str(len(answer.body))} if answer.fault != "endless" else {}
    headers = length | {"content-type": "application/json", "connection": "close"} | dict(answer.headers)
    lines = [f"HTTP/1.1 {answer.status} Said", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    if answer.fault == "drip":
        for byte in answer.body:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)
    elif answer.fault == "endless":
        while True:
            writer.write(b" " * 1_000_000)
            await writer.drain()
    else:
        writer.write(answer.body[: len(answer.body) // 2] if answer.fault == "cut" else answer.body)
    await writer.drain()
