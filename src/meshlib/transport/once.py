"""One request on a connection of its own: how the clients speak that we run ourselves.

Decides nothing but the order of things. It goes by the same parts as a call's own attempts, which log nothing: httpcore
would log every header of an answer, and whatever instruments httpx would make a span of each of these requests.
"""

from __future__ import annotations

import httpcore

from meshlib.transport.head import Head, Pair
from meshlib.transport.http1 import CHUNK, AsyncBody, Http1
from meshlib.transport.network_asyncio import AsyncioStream

MOST_INTERIM = 16
"""Interim answers (1xx) before the answer itself. A call may get any number, until its deadline."""


async def ask(
    stream: AsyncioStream, method: bytes, target: bytes, headers: list[Pair], content: bytes = b""
) -> tuple[Head, AsyncBody]:
    """Send a request, and wait for the head of its answer.

    Args:
        stream: the connection, which is closed by whoever opened it.
        method, target, headers: of the request; the headers tell of the content, if there is any.
        content: its body.

    Raises:
        httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError: if there is no answer.
    """
    http = Http1()
    await stream.write(http.head(method, target, headers) + (http.data(content) if content else b"") + http.end())
    head = None
    while head is None:
        http.feed(await stream.read(CHUNK))
        head = http.answer()
        if http.interim > MOST_INTERIM:
            raise httpcore.RemoteProtocolError(f"more than {MOST_INTERIM} interim answers")
    return head, AsyncBody(http, stream, None)
