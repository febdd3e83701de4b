"""The binding to httpx: the one place of the request path, beside the drivers' base classes, that knows its types.

Decides how a request for a service becomes a request for an endpoint, how an answer becomes an `httpx.Response`, and
which exception is which. It never decides what an exception means for a node: that is `meshlib.core.outcome`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from datetime import UTC
from operator import itemgetter
from typing import Any, TypeVar

import httpcore
import httpx

from meshlib import errors
from meshlib.core.outcome import End
from meshlib.core.report import Report
from meshlib.endpoint import Endpoint
from meshlib.transport.head import Head
from meshlib.transport.tls import IdentityError

E = TypeVar("E", bound=BaseException)

_ERRORS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (IdentityError, errors.IdentityError),
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.ReadTimeout, httpx.ReadTimeout),
    (httpcore.WriteTimeout, httpx.WriteTimeout),
    (httpcore.PoolTimeout, httpx.PoolTimeout),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.ReadError, httpx.ReadError),
    (httpcore.WriteError, httpx.WriteError),
    (httpcore.LocalProtocolError, httpx.LocalProtocolError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
)

DEADLINE_HEADER = b"x-meshlib-deadline-ms"
"""Tells the next hop how many milliseconds are left of the call."""

OVERLOADED = b"x-envoy-overloaded"
"""With a 503: Envoy refused the request to spare what is behind it."""
ATTEMPT_HEADER = b"x-meshlib-attempt"
"""Tells the next hop that somebody retries already, and which attempt this is (rule C10)."""

_OURS = frozenset({DEADLINE_HEADER, ATTEMPT_HEADER})

RETRY_AFTER_STATUS = frozenset({429, 503})
"""The statuses whose `Retry-After` is about being called again, and not about a move."""


def head(
    request: httpx.Request, host: str | None, left: float | None, number: int
) -> tuple[bytes, bytes, list[tuple[bytes, bytes]]]:
    """Method, target and headers of the request as one endpoint gets it.

    Args:
        request: the caller's.
        host: the `Host` header to send instead of the request's own, if any.
        left: seconds that the next hop is told it has; None to tell it nothing.
        number: which attempt it is told this is; 1 to tell it nothing.
    """
    headers = request.headers.raw
    if host is not None:
        headers = [(b"Host", host.encode("ascii")), *_without(headers, b"host")]
    for name in _passed_on(request.headers, left):
        headers = _without(headers, name)
    if left is not None:
        headers.append((DEADLINE_HEADER, _milliseconds(left)))
    if number > 1:
        headers.append((ATTEMPT_HEADER, b"%d" % number))
    return request.method.encode("ascii"), request.url.raw_path, headers


def inner_request(
    request: httpx.Request,
    scheme: str,
    endpoint: Endpoint,
    host: str | None,
    left: float | None,
    number: int,
    stream: Any,
    timeout: dict[str, float],
) -> httpx.Request:
    """The request as an inner transport gets it: the caller's, at another place; see `head`.

    It is put together by its attributes: httpx's constructors would take the URL and the headers apart again, which
    costs 40 us.
    """
    moved: httpx.Request = _blank(httpx.Request)
    moved.method = request.method
    moved.extensions = {**request.extensions, "timeout": timeout}
    moved.stream = stream
    if stream.content is not None:
        moved._content = stream.content  # what `Request.content` gives, which httpx-aiohttp asks for
    if IS_KNOWN:
        parts = request.url._uri_reference
        moved.url = url = _blank(httpx.URL)
        url._uri_reference = _tuple(_Parts, (scheme, parts[1], endpoint.host, endpoint.port, *parts[4:]))
        moved.headers = headers = _blank(httpx.Headers)
        headers._encoding = None
        headers._list = [*request.headers._list]
    else:
        moved.url = request.url.copy_with(scheme=scheme, host=endpoint.host, port=endpoint.port)
        moved.headers = headers = httpx.Headers(request.headers)
    if host is not None:
        headers["Host"] = host
    for name in _passed_on(headers, left):
        del headers[name.decode("ascii")]
    if left is not None:
        _append(headers, DEADLINE_HEADER, _milliseconds(left))
    if number > 1:
        _append(headers, ATTEMPT_HEADER, b"%d" % number)
    return moved


def origin_of(url: httpx.URL) -> object:
    """What tells apart the places that URLs name: scheme, user, host and port, as they are written."""
    if IS_KNOWN:
        return url._uri_reference[:4]
    return url.scheme, url.userinfo, url.host, url.port


def has(headers: httpx.Headers, name: bytes) -> bool:
    """What `name in headers` does, for a name in lower case, at a quarter of the price."""
    return name in map(_LOWERED, headers._list) if IS_KNOWN else name.decode("ascii") in headers


def _passed_on(headers: httpx.Headers, left: float | None) -> Iterable[bytes]:
    """Those of our own headers that an application passes on from its own caller: they are older than what we know."""
    if IS_KNOWN and _OURS.isdisjoint(map(_LOWERED, headers._list)):
        return ()
    ours = (ATTEMPT_HEADER,) if left is None else (ATTEMPT_HEADER, DEADLINE_HEADER)
    return [name for name in ours if has(headers, name)]


def _append(headers: httpx.Headers, name: bytes, value: bytes) -> None:
    if IS_KNOWN:
        headers._list.append((name, name, value))
    else:
        headers[name.decode("ascii")] = value.decode("ascii")


def _is_known() -> bool:
    url, headers, stream = httpx.URL("http://a/"), httpx.Headers(), httpx.ByteStream(b"")
    parts = getattr(getattr(url, "_uri_reference", None), "_fields", ())
    return (
        parts == ("scheme", "userinfo", "host", "port", "path", "query", "fragment")
        and vars(headers) == {"_list": [], "_encoding": None}
        and vars(stream) == {"_stream": b""}
    )


IS_KNOWN = _is_known()
"""Whether httpx keeps URLs, headers and bytes as 0.27 and 0.28 do. If not we go by its public ways, which cost more
than all of our own work on a call."""

_blank: Any = object.__new__
_tuple: Any = tuple.__new__
_Parts: Any = type(getattr(httpx.URL("http://a/"), "_uri_reference", None))

_LOWERED = itemgetter(1)
"""The part of an entry of `httpx.Headers` that is the name in lower case."""


def shown(url: httpx.URL) -> str:
    """What of a URL may be shown: no user, no query."""
    path = url.raw_path.partition(b"?")[0].decode("ascii", "replace")
    return f"{url.scheme}://{url.host}{path}"


def carrying(headers: list[tuple[bytes, bytes]], carried: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """The headers with these instead of what they had by the same names."""
    names = {name.lower().encode("latin-1") for name in carried}
    kept = [pair for pair in headers if pair[0].lower() not in names]
    return [*kept, *((name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in carried.items())]


def carry(headers: httpx.Headers, carried: Mapping[str, str]) -> None:
    """The same for the headers of a request."""
    for name, value in carried.items():
        if has(headers, lowered := name.lower().encode("latin-1")):
            del headers[name]
        _append(headers, lowered, value.encode("latin-1", "replace"))


def _milliseconds(left: float) -> bytes:
    whole = int(left * 1000)
    return b"%d" % (whole if whole > 0 else 1)


def _without(headers: list[tuple[bytes, bytes]], name: bytes) -> list[tuple[bytes, bytes]]:
    return [pair for pair in headers if pair[0].lower() != name]


class Unread(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The body of an answer of which nobody knows yet whether it is the call's."""

    def __iter__(self) -> Iterator[bytes]:
        raise self._error()

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise self._error()

    def _error(self) -> Exception:
        return httpx.StreamError("the body is not read before it is decided whether there is another attempt")


class Answer:
    """An answer from one of our own connections, its body still to come.

    Args:
        head: its status line and headers.
        body: an iterable, or async iterable, of bytes, with `close` or `aclose`.
        stream: what it comes from.

    Attributes:
        status: the status code.
        body: see above.
        is_closed: whether the body has been read already, so that nobody will close its stream.
    """

    __slots__ = ("_head", "_stream", "body", "status")
    is_closed = False

    def __init__(self, head: Head, body: Any, stream: Any) -> None:
        self._head = head
        self._stream = stream
        self.body = body
        self.status = head.status_code

    def header(self, name: bytes) -> bytes:
        """The first value of a header, by its name in lower case; empty if there is none."""
        return next((value for key, value in self._head.headers if key == name), b"")

    def response(self, stream: Any, report: Report) -> httpx.Response:
        """The answer as the caller gets it, with the body as `stream`; the report goes along."""
        head = self._head
        return httpx.Response(
            self.status,
            headers=head.headers.raw_items(),
            stream=stream,
            extensions={
                "http_version": b"HTTP/" + head.http_version,
                "reason_phrase": head.reason,
                "network_stream": self._stream,
                "meshlib": report,
            },
        )

    def evidence(self, request: httpx.Request, report: Report) -> httpx.Response:
        """The answer as the user's strategies see it, without its body."""
        seen = self.response(Unread(), report)
        seen.request = request
        return seen


def content_of(request: httpx.Request) -> bytes | None:
    """The body of a request that is all bytes; None if it is of any other kind."""
    # Not `request.content`: httpx makes the request of a redirect without one.
    stream = request.stream
    if IS_KNOWN and type(stream) is httpx.ByteStream:
        return stream._stream
    return b"".join(stream) if isinstance(stream, httpx.ByteStream) else None


def end_of(error: BaseException, *, reused: bool, answered: bool) -> End:
    """Who ended an attempt that raised.

    Args:
        error: what it raised.
        reused: whether its connection had been used before.
        answered: whether any byte of a response had come.
    """
    if isinstance(error, httpcore.PoolTimeout):
        return End.no_slot
    if isinstance(error, IdentityError):
        return End.identity
    if isinstance(error, httpcore.TimeoutException):
        return End.timeout
    if isinstance(error, httpcore.NetworkError | httpcore.RemoteProtocolError):
        return End.stale if reused and not answered else End.lost
    return End.caller


def httpx_error(error: E, request: httpx.Request) -> E | httpx.TransportError:
    """The exception in httpx's classes; what is not httpcore's is returned as it is."""
    for theirs, ours in _ERRORS:
        if isinstance(error, theirs):
            if isinstance(error.__cause__, httpx.TransportError):
                return error.__cause__  # an inner transport's own
            translated = ours(str(error), request=request)
            translated.__cause__ = error
            return translated
    return error


def core_error(error: httpx.TransportError) -> Exception:
    """The other way round: an inner transport's exception in httpcore's classes."""
    for theirs, ours in _ERRORS:
        if isinstance(error, ours):
            return theirs(str(error))
    if isinstance(error, httpx.UnsupportedProtocol):
        return error
    return (httpcore.ReadTimeout if isinstance(error, httpx.TimeoutException) else httpcore.ReadError)(str(error))


def in_words(error: BaseException) -> str:
    """An exception for the report: its class, and its text if it is about the connection and not about the request."""
    name = type(error).__name__
    if isinstance(error.__cause__, httpx.TransportError):
        return name  # an inner transport's text may hold the whole URL
    words = " ".join(str(error).split())
    return f"{name}: {words}" if isinstance(error, httpcore.NetworkError | httpcore.TimeoutException) else name


def retry_after(answer: Answer) -> float | None:
    """The `Retry-After` in seconds, from either of its forms; None if none can be read."""
    text = answer.header(b"retry-after").decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    from email.utils import parsedate_to_datetime  # only a date pays for it

    try:
        moment = parsedate_to_datetime(text)
        if moment.tzinfo is None:  # the oldest of HTTP's three forms does not say that it is GMT
            moment = moment.replace(tzinfo=UTC)
        # The one use of the wall clock: the header names a time of day.
        return max(0.0, moment.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
