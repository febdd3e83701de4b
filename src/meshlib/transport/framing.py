"""Where the body of a message ends, and how it is cut out of what was received, or put on the wire.

Decides it by the rules of RFC 9112, section 6: an answer to HEAD and those of status 204 and 304 have none, chunks go
before a length, and what has neither ends with the connection. Two lengths that differ, a length that is no number, and
any coding but `chunked` are refused, since two readers would find two ends. A request with a length and chunks as well
is refused for that reason; such an answer is read, and its connection is not used again. It never does I/O.
"""

from __future__ import annotations

import re
from typing import Protocol

from meshlib.transport.head import END, Fields, Head, Malformed, pairs
from meshlib.transport.received import Received

MOST_DIGITS = 20
"""Of a length."""

ALL = 1 << 62
"""More bytes than there are."""

_LINE = re.compile(rb"\r\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,20})(?:;.*)?[ \t]*\r\n")


def declared(fields: Fields) -> tuple[int | None, bool]:
    """The length that the headers tell, if any, and whether they tell of chunks.

    Raises:
        Malformed: if they contradict themselves, or tell of another coding.
    """
    length, is_chunked = fields.named.get(b"content-length"), False
    if (coding := fields.named.get(b"transfer-encoding")) is not None:
        is_chunked = True
        if coding != b"chunked":
            if coding.lower() != b"chunked":
                raise Malformed("only Transfer-Encoding: chunked is understood, and once")
            fields.settle(b"transfer-encoding", b"chunked")
    return None if length is None else _length(fields, length), is_chunked


def _length(fields: Fields, value: bytes) -> int:
    if b"," in value:
        said = {each.strip() for each in value.split(b",")}
        if len(said) > 1:
            raise Malformed("conflicting Content-Length headers")
        [value] = said
        fields.settle(b"content-length", value)
    if not value.isdigit() or len(value) > MOST_DIGITS:
        raise Malformed("bad Content-Length")
    return int(value)


class Sending(Protocol):
    """How the body of a request is written."""

    def data(self, chunk: bytes) -> bytes:
        """The bytes for a piece of it, which may be none."""
        ...

    def end(self) -> bytes:
        """The bytes after the last piece, which may be none."""
        ...


def sending_of(fields: Fields) -> Sending:
    """How the body of a request is written.

    Raises:
        Malformed: see `declared`; and if there are two ends to it.
    """
    length, is_chunked = declared(fields)
    if is_chunked and length is not None:
        raise Malformed("both Content-Length and Transfer-Encoding")
    return SendChunked() if is_chunked else SendCounted(length or 0)


class SendCounted:
    """A body of a known length."""

    __slots__ = ("_left",)

    def __init__(self, length: int) -> None:
        self._left = length

    def data(self, chunk: bytes) -> bytes:
        """See `Sending`."""
        chunk = b"".join((chunk,))  # copies what is not `bytes`, and refuses what cannot be
        self._left -= len(chunk)
        if self._left < 0:
            raise Malformed("Too much data for declared Content-Length")
        return chunk

    def end(self) -> bytes:
        """See `Sending`."""
        if self._left:
            raise Malformed("Too little data for declared Content-Length")
        return b""


class SendChunked:
    """A body in chunks."""

    __slots__ = ()

    def data(self, chunk: bytes) -> bytes:
        """See `Sending`."""
        return b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunk else b""  # one without bytes would be the last

    def end(self) -> bytes:
        """See `Sending`."""
        return b"0\r\n\r\n"


class Content(Protocol):
    """How the body of an answer is read.

    Attributes:
        is_over: whether all of it was taken.
    """

    is_over: bool

    def take(self, received: Received) -> bytes | None:
        """The next piece; none at the end; None if more has to be read first.

        Raises:
            Malformed: if it is no such body, or was cut.
        """
        ...


class Counted:
    """A body of a known length."""

    __slots__ = ("_left", "_length", "is_over")

    def __init__(self, length: int) -> None:
        self._left = self._length = length
        self.is_over = not length

    def take(self, received: Received) -> bytes | None:
        """See `Content`."""
        if piece := received.most(self._left):
            self._left -= len(piece)
            self.is_over = not self._left
            return piece
        if received.is_over:
            raise _cut(f"received {self._length - self._left} bytes, expected {self._length}")
        return None


class Chunked:
    """A body in chunks."""

    __slots__ = ("_is_last", "_is_within", "_left", "is_over")

    def __init__(self) -> None:
        self._left = 0  # of a chunk
        self._is_within = False  # whether its footer has not been read
        self._is_last = False
        self.is_over = False

    def take(self, received: Received) -> bytes | None:
        """See `Content`."""
        if not self._left and not self._is_last and not (self._closes(received) and self._opens(received)):
            return None
        if self._is_last:
            return self._ends(received)
        if piece := received.most(self._left):
            self._left -= len(piece)
            return piece
        if received.is_over:
            raise _cut("incomplete chunked read")
        return None

    def _closes(self, received: Received) -> bool:
        """Read the line's end after a chunk; False if it has not come yet."""
        if not self._is_within:
            return True
        end = received.peek(2)
        if not b"\r\n".startswith(end):
            raise Malformed("malformed chunk footer")
        if len(end) == 2:
            received.most(2)
            self._is_within = False
        elif received.is_over:
            raise _cut("incomplete chunked read")
        return len(end) == 2

    def _opens(self, received: Received) -> bool:
        """Read the header of a chunk; False if it has not come yet."""
        header = received.until(_LINE)
        if header is None:
            return False
        size = _CHUNK.fullmatch(header)
        if size is None:
            raise Malformed("illegal chunk header")
        self._left = int(size[1], 16)
        self._is_within = bool(self._left)
        self._is_last = not self._left
        if self._is_last:
            received.back(len(b"\r\n"))  # so that an empty line ends the trailers even if there are none
        return True

    def _ends(self, received: Received) -> bytes | None:
        """Read the trailers, which nobody asks for, but which must be well-formed."""
        trailers = received.until(END)
        if trailers is None:
            return None
        declared(Fields(pairs(trailers[2 : trailers.rindex(b"\n", 0, -1) + 1])))
        self.is_over = True
        return b""


class UntilClosed:
    """A body that ends with its connection."""

    __slots__ = ("is_over",)

    def __init__(self) -> None:
        self.is_over = False

    def take(self, received: Received) -> bytes | None:
        """See `Content`."""
        if piece := received.most(ALL):
            return piece
        self.is_over = received.is_over
        return b"" if self.is_over else None


def content_of(head: Head, method: bytes) -> tuple[Content, bool]:
    """How the body of an answer is read, and whether it is certain where it ends.

    Args:
        head: its head.
        method: of the request.

    Raises:
        Malformed: see `declared`.
    """
    status = head.status_code
    length, is_chunked = declared(head.headers)
    if status == 101 or (method == b"CONNECT" and status < 300):
        return Counted(0), False  # what follows is no HTTP
    is_certain = length is None or not is_chunked
    if method == b"HEAD" or status in (204, 304):
        return Counted(0), is_certain
    if is_chunked:
        return Chunked(), is_certain
    if length is not None:
        return Counted(length), True
    return UntilClosed(), False


def _cut(how: str) -> Malformed:
    return Malformed(f"peer closed connection without sending complete message body ({how})")
