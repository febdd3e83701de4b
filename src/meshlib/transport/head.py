"""The head of a message: its first line and its header fields, read and written.

Decides which heads are well-formed. The rules are those of h11, so lenient where servers are known to be odd (lines
that end in a bare LF, values folded over several lines, no reason phrase) and strict where leniency lets one message
pass for two: a NUL or a lone CR anywhere, a space before a colon, anything before the first line. How long a body is,
is decided in `meshlib.transport.framing`.

A head is checked by parsing all of it with one pattern that matches nothing but whole lines: if there are as many
matches as lines, every line is well-formed. And a head of ours is right if it parses to what it was made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Pair = tuple[bytes, bytes]

LONGEST_HEAD = 100 * 1024
"""Bytes of a first line with its headers, of a chunk's header, or of trailers."""

END = re.compile(rb"\n\r?\n")
"""What ends a head: its last line's end and an empty line."""

_TOKEN = rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]++"
_STATUS = re.compile(rb"HTTP/([0-9]\.[0-9]) ([0-9]{3})(?: ([^\x00\n\v\f\r]*+))?\r?\n")
_REQUEST = re.compile(_TOKEN + rb" [\x21-\x7e]++ HTTP/1\.1\r\n")
_FIELD = re.compile(
    rb"^(" + _TOKEN + rb"):[ \t]*+"
    rb"((?:[^\x00\s]++(?:[ \t]++[^\x00\s]++)*+)?+)"  # words with blanks between them, and none around
    rb"[ \t]*+\r?\n",
    re.MULTILINE,
)
_FOLD = re.compile(rb"\r?\n[ \t]+")
OPENING = b"HTTP/"
"""How every answer begins."""

_LISTS = (b"connection", b"content-length", b"transfer-encoding", b"upgrade")
"""Names whose values are looked at here as one list, however often they are given."""


class Malformed(Exception):
    """A message breaks HTTP/1.1. Whether the peer's or ours is for whoever speaks to say.

    Its text quotes nothing of the message, which may hold what is nobody else's business (rule T3).
    """


class Fields:
    """The header fields of a message in their order, as they were written.

    Args:
        pairs: names and values.

    Attributes:
        named: the value by a name in lower case: of names given repeatedly the last one's, of those that decide where a
            message ends all of them, as a list.
    """

    __slots__ = ("_pairs", "named")

    def __init__(self, pairs: list[Pair]) -> None:
        self._pairs = pairs
        self.named = named = {name.lower(): value for name, value in pairs}
        if len(named) != len(pairs):
            for name in _LISTS:
                if name in named:
                    named[name] = b", ".join(value for key, value in self if key == name)

    def __iter__(self) -> Iterator[Pair]:
        return ((name.lower(), value) for name, value in self._pairs)

    def raw_items(self) -> list[Pair]:
        """The fields with their names as they were written."""
        return self._pairs

    def has(self, name: bytes, member: bytes) -> bool:
        """Whether a list of words has this one, in lower case."""
        value = self.named.get(name)
        if value is None or member not in (value := value.lower()):
            return False
        return member in [each.strip() for each in value.split(b",")]

    def count(self, name: bytes) -> int:
        """How often a name is given."""
        return sum(key == name for key, _ in self)

    def settle(self, name: bytes, value: bytes) -> None:
        """Let a field say this, and once."""
        first = next(at for at, (key, _) in enumerate(self) if key == name)
        kept = [pair for pair in self._pairs[first + 1 :] if pair[0].lower() != name]
        self._pairs = [*self._pairs[:first], (self._pairs[first][0], value), *kept]


class Head:
    """The head of an answer.

    Attributes:
        http_version: as in `b"1.1"`.
        status_code: see HTTP.
        reason: the words beside it, which may be none.
        headers: see `Fields`.
    """

    __slots__ = ("headers", "http_version", "reason", "status_code")

    def __init__(self, http_version: bytes, status_code: int, reason: bytes, headers: Fields) -> None:
        self.http_version = http_version
        self.status_code = status_code
        self.reason = reason
        self.headers = headers


def may_open(data: bytes) -> bool:
    """Whether an answer may begin like that."""
    return data[: len(OPENING)] == OPENING[: len(data)]


def answer_head(text: bytes) -> Head:
    """The head that these lines are, the empty one at the end included.

    Raises:
        Malformed: if they are none.
    """
    line = _STATUS.match(text)
    if line is None:
        raise Malformed("illegal status line")
    version, code, reason = line.groups()
    status = int(code)
    if status < 100:
        raise Malformed(f"illegal status: {status}")
    return Head(version, status, reason or b"", Fields(pairs(text[line.end() : text.rindex(b"\n", 0, -1) + 1])))


def request_head(method: bytes, target: bytes, headers: list[Pair]) -> tuple[bytes, Fields]:
    """What opens a request, and its fields.

    Raises:
        Malformed: if the server would read something else than was meant.
    """
    line = b"%b %b HTTP/1.1\r\n" % (method, target)
    if not _REQUEST.fullmatch(line):
        raise Malformed("illegal method or target")
    lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    if _FIELD.findall(lines) != headers:
        raise Malformed(f"illegal header: {_first_illegal(headers)}")
    fields = Fields(headers)
    if b"host" not in fields.named:
        raise Malformed("no Host header")
    if len(fields.named) != len(headers) and fields.count(b"host") > 1:
        raise Malformed("several Host headers")
    return b"%b%b\r\n" % (line, lines), fields


def pairs(lines: bytes) -> list[Pair]:
    """The header fields that these lines are, each with its end.

    Raises:
        Malformed: if one of them is none.
    """
    found: list[Pair] = _FIELD.findall(lines)
    if len(found) != lines.count(b"\n"):
        lines = _FOLD.sub(b" ", lines)
        found = _FIELD.findall(lines)
        if len(found) != lines.count(b"\n"):
            all_of_them = lines.splitlines(keepends=True)
            number = next(number for number, line in enumerate(all_of_them, 1) if not _FIELD.fullmatch(line))
            raise Malformed(f"illegal header line, number {number} of {len(all_of_them)}")
    return found


def _first_illegal(headers: list[Pair]) -> str:
    name = next(pair[0] for pair in headers if _FIELD.findall(b"%b: %b\r\n" % pair) != [pair])
    return f"the value of {name.decode()}" if re.fullmatch(_TOKEN, name) else "its name is none"
