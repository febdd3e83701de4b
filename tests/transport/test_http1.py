"""HTTP/1.1 as we read and write it, beside h11, which does the same for httpcore.

Whatever a peer sends, in whatever pieces, we and h11 agree on what it said, or both refuse it. Where we do not agree
we are the stricter; that is on purpose and listed here:

- `twice_framed`: an answer with a length and chunks as well is read by its chunks, as h11 does, but its connection is
  not used again. Somebody between us and the server may have gone by the length.
- `until_closed`: a connection whose end was the end of a body is never used again. h11 would.
- Heads, chunk headers and trailers above the limit are refused even if they arrive in one piece.
- An answer that does not begin with `HTTP/` is refused at once, not when its head has ended.
- A request with a length and chunks as well is refused: it is how requests are smuggled. h11 sends both.
- Header fields of a request go out in their order. h11 puts `Host` first.
- What follows the last byte of a body of known length is asked for by nobody, so closing such a response without asking
  keeps its connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import h11
import httpcore
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshlib.transport.framing import Chunked, Counted, content_of
from meshlib.transport.head import END, LONGEST_HEAD, Fields, answer_head
from meshlib.transport.http1 import Http1
from meshlib.transport.received import Received

Headers = list[tuple[bytes, bytes]]
HOST: Headers = [(b"Host", b"a")]


@dataclass
class Read:
    """What became of an answer.

    Attributes:
        head: version, status, reason and headers, if it came to that.
        body: all of it.
        refused: whether it was.
        until_closed: whether it was over only when the peer had closed.
        reusable: whether another request may follow.
    """

    head: tuple[bytes, int, bytes, Headers] | None = None
    body: bytes = b""
    refused: bool = False
    until_closed: bool = False
    reusable: bool = False


def ours(pieces: Iterable[bytes], method: bytes = b"GET", headers: Headers = HOST) -> Read:
    http, read, over = Http1(), Read(), False
    http.head(method, b"/", headers)
    http.end()
    try:
        for piece in (*pieces, b""):
            if over and not piece:
                break
            http.feed(piece)
            read.until_closed = not piece
            if read.head is None:
                if (head := http.answer()) is None:
                    continue
                read.head = (head.http_version, head.status_code, head.reason, head.headers.raw_items())
            while not over and (chunk := http.chunk()) is not None:
                read.body += chunk
                over = not chunk
    except httpcore.RemoteProtocolError:
        read.refused = True
    assert read.refused or over
    read.reusable = http.renew()
    return read


def theirs(pieces: Iterable[bytes], method: bytes = b"GET", headers: Headers = HOST) -> Read:
    peer, read, over = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST_HEAD), Read(), False
    peer.send(h11.Request(method=method, target=b"/", headers=headers))
    peer.send(h11.EndOfMessage())
    try:
        for piece in (*pieces, b""):
            if over and not piece:
                break
            if not piece and read.head is None:
                raise h11.RemoteProtocolError("closed without a response")  # as httpcore does
            peer.receive_data(piece)
            read.until_closed = not piece
            while not over and (event := peer.next_event()) is not h11.NEED_DATA:
                over = _heard(event, read)
    except h11.RemoteProtocolError:
        read.refused = True
    assert read.refused or over
    done = peer.our_state is h11.DONE and peer.their_state is h11.DONE
    read.reusable = done and not peer.trailing_data[0]
    return read


def _heard(event: Any, read: Read) -> bool:
    """Take an event in; whether it was the last one."""
    if isinstance(event, h11.Response) or (isinstance(event, h11.InformationalResponse) and event.status_code == 101):
        read.head = (event.http_version, event.status_code, event.reason, event.headers.raw_items())
    elif isinstance(event, h11.Data):
        read.body += event.data
    return isinstance(event, h11.EndOfMessage) or event is h11.PAUSED


def expected(read: Read) -> Read:
    """What we make of what h11 makes of it: see the top."""
    names = {name.lower() for name, _ in read.head[3]} if read.head else set()
    twice_framed = names >= {b"content-length", b"transfer-encoding"}
    read = replace(read, reusable=read.reusable and not read.until_closed and not twice_framed)
    return replace(read, body=b"", until_closed=False) if read.refused else read


def agree(stream: bytes, cuts: Iterable[int] = (), method: bytes = b"GET", headers: Headers = HOST) -> Read:
    """Read it both ways, in pieces; gives what we made of it."""
    pieces = list(cut(stream, cuts))
    mine, others = ours(pieces, method, headers), theirs(pieces, method, headers)
    assert (replace(mine, body=b"", until_closed=False) if mine.refused else mine) == expected(others)
    return mine


def cut(stream: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    at = 0
    for stop in (*sorted(set(cuts)), len(stream)):
        if at < stop <= len(stream):
            yield stream[at:stop]
            at = stop


# Answers that may come


def mostly(usual: list[bytes], odd: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.sampled_from(usual * (8 * len(odd) // len(usual) + 1) + odd)


EOL = mostly([b"\r\n"], [b"\n"])
ODD = st.sampled_from([bytes((each,)) for each in b"\r\n\t \x00\x0b\x0c\x7f\x80\xff:;,.-/019afFHhTx"])
TOKENS = st.text("aZ09-_!#$%&'*+.^`|~", min_size=1, max_size=8).map(str.encode)
VALUES = st.text("ab ,;=\t\x01\xe9\x80", max_size=12).map(lambda text: text.encode("latin-1"))
LENGTHS = [b"0", b"1", b"05", b"5, 5", b"5,6", b"5,", b"", b"+5", b"-1", b"5 5", b"0x5", b"9" * 20, b"9" * 21, b"\xb2"]
CODINGS = [b"Chunked", b"gzip", b"gzip, chunked", b"chunked, chunked", b"identity", b"", b"chunked;a=b"]
CONNECTIONS = [b"close", b"Close", b"keep-alive", b"x,  CLOSE", b"closed", b""]
KNOWN = [
    *[(b"Content-Length", each) for each in LENGTHS],
    *[(b"content-length", b"5")] * 8,
    *[(b"Transfer-Encoding", each) for each in CODINGS],
    *[(b"transfer-encoding", b"chunked")] * 4,
    *[(b"Connection", each) for each in CONNECTIONS],
    (b"Upgrade", b"x"),
]
HARMLESS = st.tuples(TOKENS, VALUES) | st.sampled_from([(b"Set-Cookie", b"a=b"), (b"Connection", b"keep-alive")])
SPACES = mostly([b" "], [b"", b"\t", b"   ", b"\r\n ", b"\n\t", b" \r\n  \r\n "])
AFTER = mostly([b""], [b" ", b"\t ", b"\r\n x", b"\x00", b"\r"])


def lines(fields: st.SearchStrategy[tuple[bytes, bytes]], most: int = 3) -> st.SearchStrategy[bytes]:
    line = st.tuples(fields, SPACES, AFTER, EOL).map(lambda it: it[0][0] + b":" + it[1] + it[0][1] + it[2] + it[3])
    return st.lists(line, max_size=most).map(b"".join)


STATUS = st.tuples(
    st.just(b"HTTP/"),
    mostly([b"1.1"], [b"1.0", b"2.0", b"0.9", b"1.2", b"1.10"]),
    st.just(b" "),
    mostly([b"200", b"200", b"404", b"204", b"304"], [b"999", b"2000", b"20", b"099", b"101", b"100"]),
    mostly([b" OK", b"", b" ", b"  two words ", b" \xe9\x80\x01\t"], [b" a\x0cb", b" a\x00"]),
    EOL,
).map(b"".join)
INTERIM = mostly([b""], [b"HTTP/1.1 100 \r\n\r\n", b"HTTP/1.1 103\ncontent-length: 5\n\r\n", b"HTTP/1.0 199\r\n\r\n"])
SIZES = mostly([b"%x", b"%X", b"000%x", b"%020x", b"%x;a=b", b"%x "], [b"%021x", b"%x ;a", b"0x%x", b"%x;a\nb"])
LAST = mostly([b"0", b"000", b"0;a\rb", b"0\t"], [b"", b"0\n"])


@st.composite
def chunked(draw: st.DrawFn) -> bytes:
    body = b""
    for data in draw(st.lists(st.binary(min_size=1, max_size=20), max_size=3)):
        body += draw(SIZES) % len(data) + b"\r\n" + data + b"\r\n"
    return body + draw(LAST) + b"\r\n" + draw(lines(HARMLESS, 1)) + b"\r\n"


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Most are well-formed; of the rest, most are nearly so."""
    fields, body = draw(
        st.sampled_from([(b"Content-Length: 5\r\n", b"hello"), (b"content-length:0\n", b""), (b"", b"hello")])
        | st.tuples(st.sampled_from([b"transfer-encoding: chunked\r\n", b"Transfer-Encoding:Chunked\n"]), chunked())
    )
    more = draw(st.sampled_from([HARMLESS] * 3 + [st.sampled_from(KNOWN)]).flatmap(lines))
    rest = draw(mostly([b""], [b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n"]))
    return draw(INTERIM) + draw(STATUS) + more + fields + draw(EOL) + body + rest


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Answers, of which some have been tampered with."""
    stream = draw(answers())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at, until = sorted((draw(st.integers(0, len(stream))), draw(st.integers(0, len(stream)))))
        odd = draw(ODD)
        stream = draw(
            st.sampled_from(
                [
                    stream[:at] + odd + stream[at:],
                    stream[:at] + odd + stream[at + 1 :],
                    stream[:at] + stream[until:],
                    stream[:until] + stream[at:],
                    stream[:until],
                ]
            )
        )
    return stream


ASKED = st.sampled_from(
    [(b"GET", HOST)] * 6
    + [(b"HEAD", HOST), (b"CONNECT", HOST), (b"GET", [*HOST, (b"Upgrade", b"x")])]
    + [(b"GET", [*HOST, (b"connection", b"x, Close")])]
)


@settings(max_examples=600, deadline=None)
@given(streams(), st.lists(st.integers(0, 300), max_size=12), ASKED)
@example(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n\r\n", [], (b"GET", HOST))
def test_we_and_h11_read_the_same(stream: bytes, cuts: list[int], asked: tuple[bytes, Headers]) -> None:
    agree(stream, cuts, *asked)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6), st.data())
def test_a_chunked_body_is_read_whatever_it_is_cut_into(chunks: list[bytes], data: st.DataObject) -> None:
    stream = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    stream += b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in chunks) + b"0\r\n\r\n"
    read = agree(stream, data.draw(st.lists(st.integers(0, len(stream)))))
    assert (read.body, read.reusable) == (b"".join(chunks), True)


WELL: dict[str, tuple[bytes, bytes, bool]] = {
    "a length": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", b"hello", True),
    "a length twice": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nContent-Length: 5, 5\r\n\r\nhello", b"hello", True),
    "no reason": (b"HTTP/1.1 200\r\ncontent-length: 5\r\n\r\nhello", b"hello", True),
    "bare LF": (b"HTTP/1.1 200 OK\ncontent-length: 5\n\nhello", b"hello", True),
    "folded": (b"HTTP/1.1 200 OK\r\nx: a\r\n\t b\r\ncontent-length:\r\n 5\r\n\r\nhello", b"hello", True),
    "of 1.0": (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\nhello", b"hello", False),
    "to be closed": (b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\ncontent-length: 5\r\n\r\nhello", b"hello", False),
    "closed, then kept": (
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\nhello",
        b"hello",
        False,
    ),
    "more than the length": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello!", b"hello", False),
    "more than the chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n!", b"", False),
    "without a length": (b"HTTP/1.1 200 OK\r\n\r\nhello", b"hello", False),
    "204 with a length": (b"HTTP/1.1 204 OK\r\ncontent-length: 5\r\n\r\n", b"", True),
    "trailers": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n5;a=b \r\nhello\r\n0\r\nx: y\r\n z\r\n\r\n",
        b"hello",
        True,
    ),
    "a length and chunks": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"hello",
        False,
    ),
}


@pytest.mark.parametrize("what", WELL)
def test_what_is_right_is_read_byte_by_byte_as_in_one_piece(what: str) -> None:
    stream, body, reusable = WELL[what]
    for cuts in ((), range(len(stream))):
        read = agree(stream, cuts)
        assert (read.refused, read.body, read.reusable) == (False, body, reusable)


REFUSED = {
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    "two lengths in one": b"HTTP/1.1 200 OK\r\ncontent-length: 5, 6\r\n\r\nhello!",
    "two codings": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
    "a space before the colon": b"HTTP/1.1 200 OK\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    "a lone CR": b"HTTP/1.1 200 OK\r\nx: a\rcontent-length: 5\r\n\r\nhello",
    "a NUL": b"HTTP/1.1 200 OK\r\nx: a\x00b\r\ncontent-length: 5\r\n\r\nhello",
    "a NUL in the reason": b"HTTP/1.1 200 O\x00K\r\ncontent-length: 5\r\n\r\nhello",
    "a fold before any header": b"HTTP/1.1 200 OK\r\n x: a\r\ncontent-length: 5\r\n\r\nhello",
    "an empty line before it": b"\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    "a chunk without CR": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
    "a chunk that is too long": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhello\r\n0\r\n\r\n",
    "21 digits": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%021x\r\nhello\r\n0\r\n\r\n" % 5,
    "trailers that lie": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\ncontent-length: x\r\n\r\n",
    "a malformed trailer": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx : y\r\n\r\n",
    "a body cut short": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell",
    "chunks cut short": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
    "a footer cut short": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r",
    "an interim answer that lies": b"HTTP/1.1 100 OK\r\ncontent-length: x\r\n\r\nHTTP/1.1 204 OK\r\n\r\n",
    "a switch nobody asked for": b"HTTP/1.1 101 OK\r\nupgrade: x\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\n\r\nHTTP/1.1 204 OK\r\n\r\n",
    "a length of 21 digits": b"HTTP/1.1 200 OK\r\ncontent-length: %021d\r\n\r\nhello" % 5,
    "a chunk with another end": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhell!!0\r\n\r\n",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_refused_byte_by_byte_as_in_one_piece(what: str) -> None:
    for cuts in ((), range(len(REFUSED[what]))):
        assert agree(REFUSED[what], cuts).refused


def test_what_follows_a_switch_of_protocols_is_no_body_and_no_answer() -> None:
    upgrade = [*HOST, (b"Upgrade", b"x")]
    read = agree(b"HTTP/1.1 101 OK\r\nupgrade: x\r\n\r\nfoo", (), b"GET", upgrade)
    assert (read.body, read.refused, read.reusable) == (b"", False, False)
    assert not agree(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfoo", (), b"CONNECT").reusable
    assert agree(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", (), b"GET", upgrade).reusable


# What nobody else does


LONG = b"b" * LONGEST_HEAD


@pytest.mark.parametrize("step", [50_000, 1 << 20])
@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 200 OK\r\nx: " + LONG + b"\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;" + LONG + b"\r\nx\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: " + LONG + b"\r\n\r\n",
    ],
    ids=["head", "chunk", "trailers"],
)
def test_what_is_too_long_is_refused_however_it_arrives(stream: bytes, step: int) -> None:
    assert ours(cut(stream, range(step, len(stream), step))).refused
    fitting = stream.replace(LONG, LONG[:-200])
    assert ours(cut(fitting, range(step, len(fitting), step))).reusable


@pytest.mark.parametrize("opening", [b"S", b"SSH-2.0-x\r\n", b"HTTQ", b"\x15\x03\x03", b"\r", b"http/1.1 200 OK\r\n"])
def test_who_does_not_speak_http_is_not_waited_for(opening: bytes) -> None:
    http = Http1()
    http.head(b"GET", b"/", HOST)
    http.feed(opening)
    with pytest.raises(httpcore.RemoteProtocolError, match="illegal status line"):
        http.answer()


@pytest.mark.parametrize("sent", [True, False])
def test_a_connection_is_used_again_if_all_of_the_request_was_sent(sent: bool) -> None:
    http = Http1()
    http.head(b"PUT", b"/", [*HOST, (b"content-length", b"5")])
    assert http.data(b"hello") == b"hello"
    http.end()
    if not sent:
        http.cut()
    http.feed(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    assert http.answer() is not None
    assert not http.renew()
    assert http.chunk() == b"ok"
    assert http.renew() is sent


def test_what_is_beyond_the_length_of_a_request_is_not_written() -> None:
    http = Http1()
    http.head(b"PUT", b"/", [*HOST, (b"content-length", b"5")])
    assert http.data(b"hell") == b"hell"
    with pytest.raises(httpcore.LocalProtocolError, match="Too much data"):
        http.data(b"o!")


def test_an_answer_before_the_end_of_the_request_ends_the_connection() -> None:
    http = Http1()
    http.head(b"PUT", b"/", [*HOST, (b"transfer-encoding", b"chunked")])
    http.data(b"hello")
    http.feed(b"HTTP/1.1 204 OK\r\n\r\n")
    assert http.answer().status_code == 204
    assert not http.renew()


# Requests

METHODS = mostly([b"GET", b"m-search"], [b"", b"G T", b"GET\r\n", b"G\x00T", b"(", b"\xe9"])
TARGETS = mostly([b"/", b"*", b"http://a/?b#c"], [b"/a b", b"/\r\nx: y", b"/\x00", b"", b"/\xe9", b"/\x7f"])
PAIRS = st.sampled_from([st.tuples(TOKENS, TOKENS)] * 9 + [st.tuples(TOKENS | VALUES, VALUES | ODD), st.just(HOST[0])])
CONTENTS: st.SearchStrategy[tuple[Headers, list[bytes]]] = st.one_of(
    st.just(([], [])),
    st.just(([(b"Content-Length", b"5")], [b"he", b"", b"llo"])),
    st.tuples(st.just([(b"transfer-encoding", b"chunked")]), st.lists(st.binary(max_size=20), max_size=3)),
    st.tuples(st.lists(st.sampled_from(KNOWN), max_size=2), st.just([b"hello"])),
    st.tuples(st.lists(st.sampled_from(KNOWN), max_size=2), st.lists(st.binary(max_size=5), max_size=2)),
)


def written(http: Any, chunks: list[bytes]) -> bytes | None:
    try:
        return b"".join([http.open(), *map(http.data, chunks), http.end()])
    except (httpcore.LocalProtocolError, h11.LocalProtocolError):
        return None


class Ours(Http1):
    def __init__(self, *request: Any) -> None:
        super().__init__()
        self.open = lambda: self.head(*request)


class Theirs:
    def __init__(self, method: bytes, target: bytes, headers: Headers) -> None:
        peer = h11.Connection(h11.CLIENT)
        self.open = lambda: peer.send(h11.Request(method=method, target=target, headers=headers))
        self.data = lambda chunk: peer.send(h11.Data(data=chunk))
        self.end = lambda: peer.send(h11.EndOfMessage())


def host_first(text: bytes | None) -> bytes | None:
    if text is None:
        return None
    head, end, body = text.partition(b"\r\n\r\n")
    line, *fields = head.split(b"\r\n")
    return b"\r\n".join([line, *sorted(fields, key=lambda each: not each.lower().startswith(b"host:"))]) + end + body


@settings(max_examples=400, deadline=None)
@given(METHODS, TARGETS, st.lists(PAIRS.flatmap(lambda each: each), max_size=2), CONTENTS)
@example(b"GET", b"/", [(b"x", b"a\r\nb: c")], ([], []))
@example(b"GET", b"/", [(b"x", b"a\nb")], ([], []))
@example(b"GET", b"/", [(b"x: y\r\nz", b"a")], ([], []))
@example(b"GET", b"/", [(b"x", b" a")], ([], []))
@example(b"PUT", b"/", [], ([(b"content-length", b"5"), (b"Content-Length", b"5, 5")], [b"hello"]))
@example(b"PUT", b"/", [], ([(b"transfer-encoding", b"CHUNKED")], [b"hello", b"", b"h"]))
def test_we_and_h11_write_the_same(
    method: bytes, target: bytes, headers: Headers, content: tuple[Headers, list[bytes]]
) -> None:
    framing, chunks = content
    request = (method, target, [*headers, *framing, *HOST])
    mine, others = written(Ours(*request), chunks), host_first(written(Theirs(*request), chunks))
    if {name.lower() for name, _ in framing} >= {b"content-length", b"transfer-encoding"}:
        assert mine is None
    else:
        assert host_first(mine) == others


def test_a_request_is_told_what_is_wrong_with_it() -> None:
    for headers, said in [
        ([], "no Host"),
        ([*HOST, *HOST], "several Host"),
        ([*HOST, (b"x", b"hush\r\nb: c")], "^illegal header: the value of x$"),
        ([*HOST, (b"hush hush", b"hush")], "^illegal header: its name is none$"),
        ([*HOST, (b"content-length", b"5"), (b"transfer-encoding", b"chunked")], "both"),
    ]:
        with pytest.raises(httpcore.LocalProtocolError, match=said):
            Http1().head(b"GET", b"/", headers)


# The rooms


def test_a_long_body_is_handed_on_without_a_copy() -> None:
    received, body, data = Received(), Counted(200_000), bytes(100_000)
    received.feed(data)
    assert body.take(received) is data
    assert (body.take(received), body.is_over) == (None, False)
    received.feed(data)
    assert body.take(received) is data
    assert body.is_over


def test_what_was_searched_is_not_searched_again() -> None:
    received = Received()
    for byte in b"HTTP/1.1 200 OK\r\n\r":
        received.feed(bytes((byte,)))
        assert received.until(END) is None
    assert received._seen >= len(b"HTTP/1.1 200 OK")
    received.feed(b"\nrest")
    assert received.until(END) == b"HTTP/1.1 200 OK\r\n\r\n"
    assert received.most(100) == b"rest"
    assert not received


def test_chunks_are_cut_out_of_one_piece() -> None:
    received, body = Received(), Chunked()
    received.feed(b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\nnext")
    assert [body.take(received) for _ in range(3)] == [b"a", b"bc", b""]
    assert body.is_over
    assert received.most(10) == b"next"


@pytest.mark.parametrize(
    ("method", "text", "kind", "is_certain"),
    [
        (b"GET", b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n", "Counted", True),
        (b"GET", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", "Chunked", True),
        (b"GET", b"HTTP/1.1 200 OK\r\n\r\n", "UntilClosed", False),
        (b"HEAD", b"HTTP/1.1 200 OK\r\n\r\n", "Counted", True),
        (b"CONNECT", b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n", "Counted", False),
        (b"CONNECT", b"HTTP/1.1 400 OK\r\ntransfer-encoding: chunked\r\n\r\n", "Chunked", True),
    ],
)
def test_where_a_body_ends(method: bytes, text: bytes, kind: str, is_certain: bool) -> None:
    content, certain = content_of(answer_head(text), method)
    assert (type(content).__name__, certain) == (kind, is_certain)


def test_a_head_keeps_the_order_and_the_case_of_its_fields() -> None:
    head = answer_head(b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-a: 2\r\nCONTENT-LENGTH: 5\r\n\r\n")
    assert head.headers.raw_items() == [(b"X-A", b"1"), (b"x-a", b"2"), (b"CONTENT-LENGTH", b"5")]
    assert list(head.headers) == [(b"x-a", b"1"), (b"x-a", b"2"), (b"content-length", b"5")]


def test_a_field_that_is_settled_says_it_once() -> None:
    fields = Fields([(b"A", b"1"), (b"b", b"2"), (b"a", b"3"), (b"c", b"4")])
    fields.settle(b"a", b"5")
    assert fields.raw_items() == [(b"A", b"5"), (b"b", b"2"), (b"c", b"4")]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"hush/1.1 200 OK\r\n\r\n", "illegal status line"),
        (b"HTTP/1.1 hush\r\n\r\n", "illegal status line"),
        (b"HTTP/1.1 200 OK\r\nA: b\r\nset-cookie hush\r\n\r\n", "illegal header line, number 2 of 2"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: hush\r\n\r\n", "bad Content-Length"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: hush\r\n\r\n", "only Transfer-Encoding: chunked is"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nhush\r\n", "illegal chunk header"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nhush\r\n", "malformed chunk footer"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nhush\r\n\r\n", "illegal header line"),
    ],
)  # fmt: skip
def test_T3_nothing_of_what_is_malformed_is_quoted(answer: bytes, said: str) -> None:
    http = Http1()
    http.head(b"GET", b"/", HOST)
    with pytest.raises(httpcore.RemoteProtocolError) as caught:  # noqa: PT012  # whichever of them finds it
        http.feed(answer)
        http.answer()
        while http.chunk():
            pass
    assert str(caught.value).startswith(said)
    assert "hush" not in str(caught.value)
