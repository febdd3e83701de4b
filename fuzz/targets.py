"""What reads bytes from outside, and what must hold for any of them.

Each target takes an input, lets the library read it as it comes from the wire, a file or an application, and raises if
anything but a documented exception comes out, or if what was read is not what it must be. It never touches the network.
`run.py` looks for inputs that make one raise; the tests run those in `seeds/`.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dns.exception
import dns.message
import dns.nameserver
import h11
import httpcore
import httpx

from meshlib import ConfigError, Endpoint, Mesh
from meshlib.config.reading import LONGEST
from meshlib.config.sources import Source
from meshlib.consul import ConsulAgent, ConsulError
from meshlib.discovery import Consul, Dns, DnsSrv
from meshlib.discovery.addresses import LONGEST as LONGEST_TTL
from meshlib.discovery.consul_entries import LONGEST_VALUE
from meshlib.discovery.resolver import Resolution, Resolver
from meshlib.discovery.schemes import BUILT_IN, resolver_of
from meshlib.errors import ResolveError
from meshlib.ext.inbound import LONGEST as LONGEST_DEADLINE
from meshlib.ext.inbound import NAMES, Inbound
from meshlib.transport.binding import Answer, retry_after
from meshlib.transport.framing import Chunked, SendChunked
from meshlib.transport.head import Fields, Head
from meshlib.transport.http1 import Http1
from meshlib.transport.received import Received

SEEDS = Path(__file__).parent / "seeds"

LONGEST_TIME = 1.0
"""Seconds of the processor that an input may take: some hundred times what one of a few KiB needs."""

SECRET = "s3cr3t-of-9431"

MORE = b"\xff"
"""Stands between the parts of an input."""

ENDS = (b"content-length", b"transfer-encoding")
"""Headers that go out once if they say the same several times."""

loop = asyncio.Runner()


def run(name: str, data: bytes) -> None:
    """Run a target on an input.

    Raises:
        AssertionError: if what was read is wrong, or took too long.
        Exception: whatever the library should not have let out.
    """
    started = time.thread_time()
    TARGETS[name](data)
    taken = time.thread_time() - started
    assert taken < LONGEST_TIME, f"{taken:.1f} s for {len(data)} bytes"


def consul(data: bytes) -> None:
    """The answer of a health query or of a prepared query."""
    kind, _, rest = data.partition(b"\n")
    told, _, body = rest.partition(b"\n")
    headers = httpx.Headers(
        [(b"x-consul-index", told), (b"x-consul-lastcontact", told), (b"x-consul-knownleader", kind)]
    )

    async def answer(agent: ConsulAgent, request: httpx.Request) -> tuple[httpx.Headers, bytes]:
        return headers, body

    asked = Consul(ConsulAgent("127.0.0.1"), "orders", is_query=kind == b"query", warning=kind == b"warning")
    with patch.object(ConsulAgent, "_exchange", answer):
        found = _resolved(asked, ConsulError)
    for each in found.endpoints if found else ():
        assert all(len(text) <= LONGEST_VALUE or name in ("tags", "node", "dc") for name, text in each.metadata.items())


def names(data: bytes) -> None:
    """Answers of a nameserver, to the question for SRV records or addresses and to those that follow."""
    kind, *sent = data.split(MORE)
    left = iter(sent)

    async def answer(self: object, request: dns.message.QueryMessage, *_: Any, **__: Any) -> dns.message.Message:
        return _dns_answer(request, next(left, b""))

    asked: Resolver = DnsSrv("orders.test", nameserver="127.0.0.1")
    if kind:
        asked = Dns("orders.test", 80, nameserver="127.0.0.1")
    with patch.object(dns.nameserver.Do53Nameserver, "async_query", answer):
        found = _resolved(asked, ResolveError)
    assert found is None or 1 <= (found.ttl or 0) <= LONGEST_TTL


def _dns_answer(request: dns.message.QueryMessage, sent: bytes) -> dns.message.Message:
    """The flags, counts and records that were sent, under the id and the question of this request."""
    asked = request.question[0]
    question = dns.message.make_query(asked.name, asked.rdtype).to_wire()[12:]
    wire = request.id.to_bytes(2) + sent[:2] + b"\0\1" + sent[2:8] + question + sent[8:]
    try:
        found = dns.message.from_wire(wire)
    except Exception as error:  # as dnspython does, which takes any for an answer of no use, but pauses after some
        raise dns.exception.FormError from error
    if not request.is_response(found):
        raise dns.exception.FormError
    return found


def urls(data: bytes) -> None:
    """The URL of a resolver; a password written into one is never repeated."""
    text = data.decode("utf-8", "surrogateescape")
    with patch("importlib.metadata.entry_points", lambda **_: ()):  # reading them takes milliseconds
        _read_url(text)
        for scheme in BUILT_IN:
            told = _read_url(f"{scheme}://user:{SECRET}@{text.partition('://')[2]}")
            assert SECRET not in told or SECRET in text, scheme


def _read_url(text: str) -> str:
    """What is told of a URL that is not taken."""
    try:
        resolver = resolver_of(text)
    except ConfigError as error:
        return str(error)
    if isinstance(resolver, Dns | DnsSrv):
        assert resolver_of(resolver.source) == resolver
    return ""


def settings(data: bytes) -> None:
    """A configuration file; what `${NAME}` stands for is in no complaint."""
    with patch.dict(os.environ, {"SECRET": SECRET}):
        try:
            found = Source().read(data)
        except ConfigError as error:
            assert error.faults
            assert all(len(each.message) <= LONGEST or each.path == "TOML" for each in error.faults)
            assert SECRET not in str(error) or SECRET.encode() in data
            return
    try:
        Mesh(*found.services, **found.options)
    except ConfigError as error:
        assert SECRET not in str(error) or SECRET.encode() in data


def retry_afters(data: bytes) -> None:
    """The header `Retry-After`."""
    answer = Answer(Head(b"1.1", 503, b"", Fields([(b"Retry-After", data)])), iter(()), None)
    seconds = retry_after(answer)
    assert seconds is None or 0 <= seconds < math.inf


def deadlines(data: bytes) -> None:
    """The headers by which a caller tells how long it waits, and which attempt this is."""
    lines = data.decode("latin-1").split("\n")
    headers = dict(zip(NAMES, lines, strict=False))
    found, bounded = Inbound.of(headers, None), Inbound.of(headers, 5.0)
    assert found.attempt >= 1
    assert found.left is None or found.left <= LONGEST_DEADLINE
    assert bounded.left == min(5.0, math.inf if found.left is None else found.left)


def answers(data: bytes) -> None:
    """What a server sends: where its answer ends cannot depend on how the network cuts it."""
    method, _, wire = data.partition(b"\n")
    half = len(wire) // 2
    whole = _read(method, [wire])
    assert _read(method, [wire[:half], wire[half:]]) == whole
    assert _read(method, [wire[at : at + 1] for at in range(len(wire))]) == whole


def _read(method: bytes, pieces: list[bytes]) -> Any:
    """Head and body of an answer; None if it was refused."""
    http, left = Http1(), iter([each for each in pieces if each])
    http.head(b"HEAD" if method == b"HEAD" else b"GET", b"/", [(b"Host", b"orders")])
    http.end()
    head, body = None, b""
    try:
        while head is None:
            http.feed(next(left, b""))
            head = http.answer()
        while (piece := http.chunk()) != b"":
            body += piece or b""
            if piece is None:
                http.feed(next(left, b""))
    except httpcore.RemoteProtocolError:
        return None
    if http.renew():  # then nothing of it is left for the answer to another request
        http.head(b"GET", b"/", [(b"Host", b"orders")])
        assert http.answer() is None
    return head.status_code, head.reason, head.headers.raw_items(), body


def requests(data: bytes) -> None:
    """Method, target and headers as an application gives them: a server reads just these, or nothing is sent."""
    method, _, others = data.partition(MORE)
    target, *rest = others.split(MORE)
    headers = [*zip(rest[::2], rest[1::2], strict=False)]
    try:
        wire = Http1().head(method, target, headers)
    except httpcore.LocalProtocolError:
        return
    server = h11.Connection(h11.SERVER)
    server.receive_data(wire)
    read = server.next_event()
    assert isinstance(read, h11.Request)
    assert (read.method, read.target) == (method, target)
    given = [(name.lower(), value) for name, value in headers if name.lower() not in ENDS]
    assert [each for each in read.headers if each[0] not in ENDS] == given
    assert isinstance(server.next_event(), h11.EndOfMessage | type(h11.NEED_DATA))


def chunks(data: bytes) -> None:
    """A body that goes out in chunks and is read again, with the next answer behind it."""
    pieces = data.split(MORE)
    sending, content, received = SendChunked(), Chunked(), Received()
    received.feed(b"".join(map(sending.data, pieces)) + sending.end() + b"HTTP/")
    read = b""
    while piece := content.take(received):
        read += piece
    assert content.is_over
    assert read == b"".join(pieces)
    assert received.most(5) == b"HTTP/"


def _resolved(resolver: Resolver, allowed: type[Exception]) -> Resolution | None:
    """What a resolver finds; None if it raised what it may raise."""
    try:
        found = loop.run(resolver.resolve("orders", None))
    except allowed as error:
        assert str(error)
        return None
    for each in found.endpoints:
        assert Endpoint.parse(str(each)).place == each.place
        assert 0 < each.weight < math.inf
    return found


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (consul, names, urls, settings, retry_afters, deadlines, answers, requests, chunks)
}
