"""A scripted HTTP/1.1 server for tests, run as a process of its own.

This program decides what bytes each request gets back: an ordinary answer, or one of the faults a real upstream
shows (silence, resets, cut bodies, malformed or endless heads). It reads every request strictly, logs it, and takes
one script step per request. It never decides when a test is over, never imports the rest of the library (it is
started by its path, so that a start costs tens of milliseconds), never keeps request bodies (only their digest and
length), and never outlives the process holding the other end of its standard input.

Control requests share the port and are neither scripted, logged nor counted: `PUT /_upstream/script`,
`PUT /_upstream/accept_reset`, `GET /_upstream/log`, `DELETE /_upstream/log` and `GET /_upstream/stats`.
A server with TLS also takes control requests, and nothing else, in plain text, so its control needs no certificates.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

CONTROL = "/_upstream/"
HEAD_LIMIT = 1 << 20
PIECE = 1 << 16
EMPTY_DIGEST = hashlib.sha256().hexdigest()
SIZES = {"drip": 100, "cut": 1000, "cut_reset": 1000, "tiny_chunks": 100, "gzip_bomb": 10 << 20}
TLS_HANDSHAKE = b"\x16"
_PATTERN = bytes(range(251)) * 263  # 251 is prime, so a lost, doubled or swapped piece of a body shows
_HEX = b"0123456789abcdefABCDEF"


class ScriptError(ValueError):
    """A script, or a step of it, that this server cannot play; the message says which key and why."""


class MalformedRequest(ValueError):
    """A request that is not HTTP/1.x as this server reads it; it is answered with 400 and a closed connection."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one request gets back.

    Args:
        status: default 200.
        headers: added to the answer, replacing defaults of the same name.
        body: text. Default a JSON description of the request.
        size: bytes of generated body in its place: 0 to 250, over and over.
        delay: seconds between the end of the request and the answer. Default 0.
        chunked: whether the body goes out in chunks. Default no.
        fault: one of `FAULTS`. Default none.
        interval: seconds between the pieces of a slow fault. Default 0.01.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: str | None = None
    size: int | None = None
    delay: float = 0.0
    chunked: bool = False
    fault: str | None = None
    interval: float = 0.01


PLAIN = Step()


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_latin(value: object) -> bool:
    return isinstance(value, str) and all(ord(letter) < 256 for letter in value)


def _is_headers(value: object) -> bool:
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list):
        return False
    return all(isinstance(p, (list, tuple)) and len(p) == 2 and _is_latin(p[0]) and _is_latin(p[1]) for p in pairs)


_RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "status": (lambda v: type(v) is int and 200 <= v <= 999, "an integer from 200 to 999"),
    "headers": (_is_headers, "an object or a list of [name, value] pairs of latin-1 text"),
    "body": (lambda v: isinstance(v, str), "text"),
    "size": (_is_count, "a number of bytes, 0 or more"),
    "delay": (_is_seconds, "a number of seconds, 0 or more"),
    "chunked": (lambda v: isinstance(v, bool), "true or false"),
    "fault": (lambda v: isinstance(v, str), "text"),
    "interval": (_is_seconds, "a number of seconds, 0 or more"),
}


def step_from(raw: object, where: str) -> Step:
    """Read one step from JSON.

    Args:
        raw: the decoded JSON value.
        where: the step's place in the script, named in errors.

    Raises:
        ScriptError: for an unknown key or fault and for a value of the wrong kind.
    """
    if not isinstance(raw, dict):
        raise ScriptError(f"{where}: a step is an object, not {raw!r}")
    for key, value in raw.items():
        if key not in _RULES:
            raise ScriptError(f"{where}: unknown key {key!r}; known keys: {', '.join(_RULES)}")
        valid, wanted = _RULES[key]
        if not valid(value):
            raise ScriptError(f"{where}: {key} must be {wanted}, not {value!r}")
    _check_fault(raw.get("fault"), where)
    if "body" in raw and "size" in raw:
        raise ScriptError(f"{where}: body and size exclude each other")
    headers = raw.get("headers", ())
    pairs = headers.items() if isinstance(headers, dict) else headers
    return Step(**{**raw, "headers": tuple((name, value) for name, value in pairs)})


def _check_fault(fault: str | None, where: str) -> None:
    if fault == "accept_reset":
        raise ScriptError(f"{where}: accept_reset happens before any request; PUT {CONTROL}accept_reset sets it")
    if fault is not None and fault not in FAULTS:
        raise ScriptError(f"{where}: unknown fault {fault!r}; known faults: {', '.join(FAULTS)}")


class Script:
    """The steps still to play and the step that holds afterwards.

    Args:
        default: the step for requests beyond the list when a script names none.
    """

    def __init__(self, default: Step) -> None:
        self._default = default
        self._steps: list[Step] = []
        self._then = default
        self._taken = 0

    def replace(self, raw: object) -> None:
        """Start over with `raw`: an object with `steps` (a list, default empty) and `then` (a step)."""
        if not isinstance(raw, dict):
            raise ScriptError(f"a script is an object with steps and then, not {raw!r}")
        for key in raw:
            if key not in ("steps", "then"):
                raise ScriptError(f"script: unknown key {key!r}; known keys: steps, then")
        steps = raw.get("steps", [])
        if not isinstance(steps, list):
            raise ScriptError(f"script: steps must be a list, not {steps!r}")
        read = [step_from(step, f"step {index}") for index, step in enumerate(steps)]
        self._then = self._default if raw.get("then") is None else step_from(raw["then"], "then")
        self._steps, self._taken = read, 0

    def take(self) -> tuple[int | None, Step]:
        """Consume and return the next step with its index, or `(None, then)` once the list is used up."""
        if self._taken == len(self._steps):
            return None, self._then
        self._taken += 1
        return self._taken - 1, self._steps[self._taken - 1]


@dataclass(slots=True)
class Request:
    """One request as it was read; the fields of `record` make up its log entry."""

    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    at: float = field(default_factory=time.monotonic)
    connection: int = 0
    index: int | None = None
    step: Step = PLAIN
    digest: str = ""
    length: int = 0
    complete: bool = False

    def values(self, name: str) -> list[str]:
        """Return the comma-separated values of all headers called `name` (lower case), lower-cased."""
        lines = [value for key, value in self.headers if key.lower() == name]
        return [part.strip().lower() for line in lines for part in line.split(",")]

    def keeps_alive(self) -> bool:
        """Tell whether the connection may carry another request after this one."""
        options = self.values("connection")
        return "keep-alive" in options if self.version == "HTTP/1.0" else "close" not in options

    def record(self) -> dict[str, object]:
        """Return the log entry as JSON-ready values; `at` is in seconds of `time.monotonic()`."""
        return {
            "method": self.method,
            "target": self.target,
            "headers": self.headers,
            "body_digest": self.digest,
            "body_length": self.length,
            "connection": self.connection,
            "at": self.at,
            "step": self.index,
            "complete": self.complete,
        }


def request_from(head: bytes) -> Request:
    """Read a request line and headers; `head` ends before the blank line."""
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.1", "HTTP/1.0") or not words[0] or not words[1]:
        raise MalformedRequest(f"not a request line: {first[:200]!r}")
    headers: list[tuple[str, str]] = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip() or " " in name:
            raise MalformedRequest(f"not a header: {line[:200]!r}")
        headers.append((name, value.strip(" \t")))
    return Request(words[0], words[1], words[2], headers)


class Intake:
    """Reads one request body out of a growing buffer.

    Args:
        request: its headers say how the body is framed; its `digest`, `length` and `complete` are filled in.
        keep: whether to collect the bytes in `kept` too, as of control requests.
    """

    def __init__(self, request: Request, *, keep: bool) -> None:
        self.kept = bytearray()
        self._keep = keep
        self._request = request
        self._sum = hashlib.sha256()
        coding, lengths = request.values("transfer-encoding"), request.values("content-length")
        if coding and (lengths or coding != ["chunked"]):
            raise MalformedRequest(f"cannot frame a body by transfer-encoding {coding} and content-length {lengths}")
        if len(lengths) > 1 or (lengths and not (lengths[0].isascii() and lengths[0].isdigit())):
            raise MalformedRequest(f"not a content-length: {lengths}")
        self._state = "size" if coding else "body"
        self._left = int(lengths[0]) if lengths else 0

    def feed(self, buffer: bytearray) -> bool:
        """Take what belongs to this body from `buffer`; return whether the body is complete."""
        while self._state != "end":
            if self._state in ("body", "data"):
                self._take(buffer)
                if self._left:
                    return False
                self._state = "end" if self._state == "body" else "crlf"
            elif not self._take_line(buffer):
                return False
        self._request.digest = self._sum.hexdigest() if self._request.length else EMPTY_DIGEST
        self._request.complete = True
        return True

    def _take(self, buffer: bytearray) -> None:
        if not self._left or not buffer:
            return
        data = bytes(buffer[: self._left])
        del buffer[: len(data)]
        self._left -= len(data)
        self._request.length += len(data)
        self._sum.update(data)
        if self._keep:
            self.kept += data

    def _take_line(self, buffer: bytearray) -> bool:
        end = buffer.find(b"\r\n")
        if end < 0:
            if len(buffer) > HEAD_LIMIT:
                raise MalformedRequest("a chunk line without an end")
            return False
        line = bytes(buffer[:end])
        del buffer[: end + 2]
        if self._state == "crlf":
            if line:
                raise MalformedRequest(f"a chunk longer than it said: {line[:200]!r}")
            self._state = "size"
        elif self._state == "trailer":
            self._state = "trailer" if line else "end"
        else:
            digits = line.partition(b";")[0].strip()
            if not digits or digits.strip(_HEX):
                raise MalformedRequest(f"not a chunk size: {line[:200]!r}")
            self._left = int(digits, 16)
            self._state = "data" if self._left else "trailer"
        return True


def _pieces(size: int) -> Iterator[bytes]:
    for start in range(0, size, PIECE):
        phase = start % 251
        yield _PATTERN[phase : phase + min(PIECE, size - start)]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Server:
    """What all connections share: the script, the log and the counts.

    Args:
        name: told in every answer.
        default: the step for requests no script covers.
    """

    def __init__(self, name: str, default: Step) -> None:
        self.name = name
        self.script = Script(default)
        self.log: list[Request] = []
        self.requests = 0
        self.open = 0
        self.total = 0
        self.serials = 0
        self.accept_reset = False

    def control(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        """Carry out one control request; return the status and the JSON value to answer."""
        call = (method, path.removeprefix(CONTROL))
        try:
            if call == ("PUT", "script"):
                self.script.replace(json.loads(body))
            elif call == ("PUT", "accept_reset"):
                self.accept_reset = bool(json.loads(body))
            elif call == ("DELETE", "log"):
                self.log = []
            elif call == ("GET", "log"):
                return 200, [request.record() for request in self.log]
            elif call == ("GET", "stats"):
                return 200, self._stats()
            else:
                return 404, {"error": f"no control {method} {path}"}
        except ValueError as error:
            return 400, {"error": str(error)}
        return 200, {}

    def _stats(self) -> dict[str, int]:
        return {"requests": self.requests, "connections_open": self.open, "connections_total": self.total}

    def describe(self, request: Request) -> bytes:
        """Return the JSON body of an answer whose step names no body."""
        about = {"upstream": self.name, "method": request.method, "path": request.target}
        return json.dumps({**about, "digest": request.digest, "length": request.length}).encode()


class Connection(asyncio.Protocol):
    """One client connection: cuts requests out of the byte stream and gives each its step's answer.

    A client that closes its sending side is taken to have left.

    Args:
        server: the shared state.
        control_only: whether to refuse all but control requests: plain text on a TLS port. Default no.
    """

    def __init__(self, server: Server, *, control_only: bool = False) -> None:
        self.server = server
        self.made = False
        self.transport: asyncio.Transport
        self._control_only = control_only
        self._counted = True
        self._serial = 0
        self._buffer = bytearray()
        self._request: Request | None = None
        self._intake: Intake
        self._busy = False
        self._task: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.made = True

    def connection_lost(self, exc: Exception | None) -> None:
        self._busy = True
        if self._counted:
            self.server.open -= 1
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._advance()

    def _advance(self) -> None:
        try:
            while not self._busy and self._read():
                pass
        except MalformedRequest as error:
            body = json.dumps({"error": str(error)}).encode()
            self.transport.write(head(self.server, Step(400), len(body), keep=False) + body)
            self.close()

    def _read(self) -> bool:
        if self._request is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > HEAD_LIMIT:
                    raise MalformedRequest(f"a head of more than {HEAD_LIMIT} bytes")
                return False
            request = request_from(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            self._open(request)
            if self._busy:
                return False
        assert self._request is not None
        if not self._intake.feed(self._buffer):
            return False
        self._answer(self._request)
        return True

    def _open(self, request: Request) -> None:
        control = request.target.startswith(CONTROL)
        if self._control_only and not control:
            raise MalformedRequest("this port speaks TLS; only control requests may be plain")
        self._intake = Intake(request, keep=control)
        self._request = request
        self._count(not control)
        if not control:
            self._log(request)
        if request.step.fault == "stall_reader":
            self._busy = True
            self.transport.pause_reading()
        elif "100-continue" in request.values("expect") and not self._buffer:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _log(self, request: Request) -> None:
        if not self._serial:
            self.server.serials += 1
            self._serial = self.server.serials
        request.connection = self._serial
        request.index, request.step = self.server.script.take()
        self.server.requests += 1
        self.server.log.append(request)

    def _count(self, counted: bool) -> None:
        """Count this connection for as long as it is not known to carry only control requests."""
        if counted is self._counted or (self._serial and not counted):
            return
        self._counted = counted
        change = 1 if counted else -1
        self.server.open += change
        self.server.total += change

    def _answer(self, request: Request) -> None:
        step = request.step
        if request.target.startswith(CONTROL):
            status, value = self.server.control(request.method, request.target, bytes(self._intake.kept))
            self._write_whole(request, Step(status), json.dumps(value).encode())
        elif step.fault is None and not step.delay and step.size is None and not step.chunked:
            body = self.server.describe(request) if step.body is None else step.body.encode()
            self._write_whole(request, step, body)
        else:
            self._busy = True
            self._task = asyncio.get_running_loop().create_task(self._act(request))

    def _write_whole(self, request: Request, step: Step, body: bytes) -> None:
        keep = request.keeps_alive()
        first = head(self.server, step, len(body), keep=keep)
        self.transport.write(first if _bodyless(request) else first + body)
        self._request = None
        if not keep or _says_close(step):
            self.close()

    async def _act(self, request: Request) -> None:
        try:
            await asyncio.sleep(request.step.delay)
            await FAULTS.get(request.step.fault or "", _plain)(self, request)
        except Exception:
            self.transport.abort()  # a fault of this program must not pass for a hanging upstream
            raise

    async def send(self, data: bytes) -> None:
        """Write `data` and wait until the client has taken enough of what was written."""
        self.transport.write(data)
        if self._room is not None:
            await self._room
        else:
            await asyncio.sleep(0)

    def done(self, request: Request) -> None:
        """End an answer: close the connection if either side asked for that, else go on to the next request."""
        if not request.keeps_alive() or _says_close(request.step):
            self.close()
            return
        self._request, self._busy = None, False
        self._advance()

    def close(self) -> None:
        """Close with a FIN after everything written was sent."""
        self._busy = True
        self.transport.close()

    async def reset(self) -> None:
        """Close with a RST once the kernel has taken everything written."""
        self.transport.set_write_buffer_limits(high=1, low=0)  # at high=0 a TLS transport pauses for good
        await self.send(b"")
        _linger_zero(self.transport.get_extra_info("socket"))
        self.transport.abort()


def _linger_zero(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _bodyless(request: Request) -> bool:
    return request.method == "HEAD" or request.step.status in (204, 304)


def _says_close(step: Step) -> bool:
    return any(name.lower() == "connection" and "close" in value.lower() for name, value in step.headers)


def head(server: Server, step: Step, length: int | None, *, keep: bool, coding: str = "") -> bytes:
    """Return an answer's status line and headers.

    Args:
        server: the shared state.
        step: what the request gets.
        length: the content-length in bytes, or None for a chunked body.
        keep: whether the connection stays open; else the answer says so.
        coding: a content-encoding to name. Default none.
    """
    reason = {2: "OK", 3: "Redirect", 4: "Client Error", 5: "Server Error"}.get(step.status // 100, "Scripted")
    kind = "application/json" if step.size is None and step.fault not in SIZES else "application/octet-stream"
    kind = kind if step.body is None else "text/plain; charset=utf-8"
    fields = [("x-upstream", server.name), ("content-type", kind)]
    if length is None:
        fields.append(("transfer-encoding", "chunked"))
    elif step.status != 204:
        fields.append(("content-length", str(length)))
    if coding:
        fields.append(("content-encoding", coding))
    if not keep:
        fields.append(("connection", "close"))
    given = {name.lower() for name, _ in step.headers}
    lines = [f"{name}: {value}\r\n" for name, value in fields if name not in given]
    lines += [f"{name}: {value}\r\n" for name, value in step.headers]
    return f"HTTP/1.1 {step.status} {reason}\r\n{''.join(lines)}\r\n".encode("latin-1")


def _body(server: Server, request: Request) -> tuple[int, Iterable[bytes]]:
    step = request.step
    size = SIZES.get(step.fault or "") if step.size is None else step.size
    if step.body is None and size is not None:
        return size, _pieces(size)
    whole = server.describe(request) if step.body is None else step.body.encode()
    return len(whole), [whole] if whole else []


async def _plain(connection: Connection, request: Request) -> None:
    await _respond(connection, request)
    connection.done(request)


async def _respond(connection: Connection, request: Request, *, drip_head: bool = False) -> None:
    length, pieces = _body(connection.server, request)
    chunked = request.step.chunked
    first = head(connection.server, request.step, None if chunked else length, keep=request.keeps_alive())
    if drip_head:
        await _drip_bytes(connection, first, request.step.interval)
    elif isinstance(pieces, list) and not chunked and not _bodyless(request):
        # As servers do with a short answer: one that is killed has sent all of it, or nothing.
        await connection.send(b"".join([first, *pieces]))
        return
    else:
        await connection.send(first)
    if not _bodyless(request):
        await _send_body(connection, pieces, chunked=chunked)


async def _send_body(connection: Connection, pieces: Iterable[bytes], *, chunked: bool) -> None:
    for piece in pieces:
        await connection.send(_chunk(piece) if chunked else piece)
    if chunked:
        await connection.send(b"0\r\n\r\n")


async def _drip_bytes(connection: Connection, data: bytes, interval: float) -> None:
    for position in range(len(data)):
        await connection.send(data[position : position + 1])
        await asyncio.sleep(interval)


async def _hang(connection: Connection, request: Request) -> None:
    await asyncio.get_running_loop().create_future()


async def _reset(connection: Connection, request: Request) -> None:
    await connection.reset()


async def _close(connection: Connection, request: Request) -> None:
    connection.close()


async def _half_status(connection: Connection, request: Request) -> None:
    await connection.send(b"HTTP/1.1 20")
    connection.close()


async def _garbage(connection: Connection, request: Request) -> None:
    await connection.send(b"\x00\xffthis is not HTTP\xfe\x01\r\n\r\n\x80\x81\r\n")
    connection.close()


async def _big_headers(connection: Connection, request: Request) -> None:
    length, pieces = _body(connection.server, request)
    chunked = request.step.chunked
    first = head(connection.server, request.step, None if chunked else length, keep=request.keeps_alive())
    # 32 lines: many clients cap the count of headers as well, and it is the size this fault is about
    bulk = b"".join(b"x-big-%d: %s\r\n" % (line, b"b" * 4096) for line in range(32))
    await connection.send(first[:-2] + bulk + b"\r\n")
    if not _bodyless(request):
        await _send_body(connection, pieces, chunked=chunked)
    connection.done(request)


async def _endless_1xx(connection: Connection, request: Request) -> None:
    while True:
        await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await asyncio.sleep(request.step.interval)
        await connection.send(b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n")
        await asyncio.sleep(request.step.interval)


async def _drip_headers(connection: Connection, request: Request) -> None:
    await _respond(connection, request, drip_head=True)
    connection.done(request)


async def _drip(connection: Connection, request: Request) -> None:
    length, pieces = _body(connection.server, request)
    await connection.send(head(connection.server, request.step, length, keep=request.keeps_alive()))
    for piece in pieces:
        await _drip_bytes(connection, piece, request.step.interval)
    connection.done(request)


async def _send_half(connection: Connection, request: Request) -> None:
    length, pieces = _body(connection.server, request)
    chunked = request.step.chunked
    await connection.send(head(connection.server, request.step, None if chunked else length, keep=True))
    left = length // 2
    for piece in pieces:
        part = piece[:left]
        left -= len(part)
        if part:
            await connection.send(_chunk(part) if chunked else part)


async def _cut(connection: Connection, request: Request) -> None:
    await _send_half(connection, request)
    connection.close()


async def _cut_reset(connection: Connection, request: Request) -> None:
    await _send_half(connection, request)
    await connection.reset()


async def _tiny_chunks(connection: Connection, request: Request) -> None:
    _, pieces = _body(connection.server, request)
    await connection.send(head(connection.server, request.step, None, keep=request.keeps_alive()))
    single = (piece[at : at + 1] for piece in pieces for at in range(len(piece)))
    await _send_body(connection, single, chunked=True)
    connection.done(request)


async def _gzip_bomb(connection: Connection, request: Request) -> None:
    step = request.step
    packed = await _packed_zeros(SIZES["gzip_bomb"] if step.size is None else step.size)
    length = None if step.chunked else len(packed)
    await connection.send(head(connection.server, step, length, keep=request.keeps_alive(), coding="gzip"))
    pieces = (packed[at : at + PIECE] for at in range(0, len(packed), PIECE))
    await _send_body(connection, pieces, chunked=step.chunked)
    connection.done(request)


async def _packed_zeros(size: int) -> bytes:
    packer = zlib.compressobj(level=9, wbits=31)
    packed = bytearray()
    zeros = bytes(1 << 20)
    for start in range(0, size, len(zeros)):
        packed += packer.compress(zeros[: size - start])
        await asyncio.sleep(0)
    return bytes(packed + packer.flush())


async def _close_after(connection: Connection, request: Request) -> None:
    await _respond(connection, request)
    connection.close()


FAULTS: dict[str, Callable[[Connection, Request], Awaitable[None]]] = {
    "hang": _hang,
    "reset": _reset,
    "close": _close,
    "half_status": _half_status,
    "garbage": _garbage,
    "big_headers": _big_headers,
    "endless_1xx": _endless_1xx,
    "drip_headers": _drip_headers,
    "drip": _drip,
    "cut": _cut,
    "cut_reset": _cut_reset,
    "tiny_chunks": _tiny_chunks,
    "gzip_bomb": _gzip_bomb,
    "close_after": _close_after,
    "stall_reader": _hang,
}
"""The faults a step may name; `stall_reader` stops the reading before it gets to its entry here."""


class Listener:
    """Accepts connections, or resets them, and starts TLS on them.

    Args:
        server: the shared state.
        sock: the listening socket.
        tls: a server context, or None.
    """

    def __init__(self, server: Server, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        self._server = server
        self._sock = sock
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self) -> None:
        """Take every connection that waits on the listening socket."""
        while True:
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            sock.setblocking(False)
            self._server.total += 1
            if self._server.accept_reset:
                _linger_zero(sock)
                sock.close()
                continue
            self._server.open += 1
            task = asyncio.get_running_loop().create_task(self._serve(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        plain = self._tls is None or await _first_byte(sock) != TLS_HANDSHAKE
        connection = Connection(self._server, control_only=plain and self._tls is not None)
        tls = None if plain else self._tls
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock, ssl=tls)
        except OSError:
            if not connection.made:
                self._server.open -= 1


async def _first_byte(sock: socket.socket) -> bytes:
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
        return sock.recv(1, socket.MSG_PEEK)
    except OSError:
        return b""
    finally:
        loop.remove_reader(sock)


def _tls_context(cert: str | None, key: str | None, ca: str | None) -> ssl.SSLContext | None:
    if cert is None:
        return None
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    context.load_cert_chain(cert, key)
    if ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _listen(port: int) -> socket.socket:
    # The protocol is named because asyncio turns Nagle off only on sockets that say they are TCP.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(1024)
    sock.setblocking(False)
    return sock


async def _run(options: argparse.Namespace) -> None:
    tls = _tls_context(options.cert, options.key, options.ca)
    sock = _listen(options.port)
    listener = Listener(Server(options.name, Step(delay=options.delay)), sock, tls)
    loop = asyncio.get_running_loop()
    loop.add_reader(sock, listener.accept)
    print(json.dumps({"name": options.name, "port": sock.getsockname()[1]}), flush=True)
    await loop.create_future()


def _leave_with_parent() -> None:
    """Exit when standard input ends; a blocking thread does this for pipes, terminals and files alike."""
    try:
        while os.read(0, 4096):
            pass
    finally:
        os._exit(0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A scripted HTTP/1.1 server on 127.0.0.1.", allow_abbrev=False)
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0, the default, takes a free one")
    parser.add_argument("--name", default="a", help="name told in every answer; default a")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before an unscripted answer; default 0")
    parser.add_argument("--cert", help="PEM file with the server's certificate; turns TLS on")
    parser.add_argument("--key", help="PEM file with the certificate's key; default: the one in --cert")
    parser.add_argument("--ca", help="PEM file of authorities; requires client certificates they signed")
    return parser.parse_args()


def main() -> None:
    """Run the program: print `{"name": ..., "port": ...}` once listening, serve until standard input ends."""
    options = _options()
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        asyncio.run(_run(options))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
