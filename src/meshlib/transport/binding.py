"""The binding to httpx: the one place of the request path, beside the drivers' base classes, that knows its types.

Decides how a request for a service becomes a request for an endpoint, how an answer becomes an `httpx.Response`, and
which exception is which. It never decides what an exception means for a node: that is `meshlib.core.outcome`.
"""

from __future__ import annotations

import time
from typing import Any

import httpcore
import httpx

from meshlib.core.outcome import End
from meshlib.core.report import Report
from meshlib.endpoint import Endpoint

_ERRORS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
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

RETRY_AFTER_STATUS = frozenset({429, 503})


def service_name(url: httpx.URL) -> str:
    """The service a URL is for: its host, lower-cased by httpx, without the root's dot."""
    return url.host.removesuffix(".")


def core_request(request: httpx.Request, endpoint: Endpoint, host: str | None, stream: Any) -> httpcore.Request:
    """The request as one endpoint gets it.

    Args:
        request: the caller's.
        endpoint: where it goes.
        host: the service's `host` setting.
        stream: the body to send.
    """
    url = httpcore.URL(
        scheme=b"http",
        host=endpoint.host.encode("ascii"),
        port=endpoint.port,
        target=request.url.raw_path,
    )
    headers = request.headers.raw
    if host is not None:
        value = str(endpoint) if host == "endpoint" else host
        headers = [(b"Host", value.encode("ascii")), *(pair for pair in headers if pair[0].lower() != b"host")]
    return httpcore.Request(
        request.method.encode("ascii"), url, headers=headers, content=stream, extensions=request.extensions
    )


def response(answer: httpcore.Response, stream: Any, report: Report) -> httpx.Response:
    """The answer as the caller gets it; the report goes along."""
    return httpx.Response(
        answer.status,
        headers=answer.headers,
        stream=stream,
        extensions={**answer.extensions, "meshlib": report},
    )


def is_bytes(request: httpx.Request) -> bool:
    """Whether the body can be sent any number of times as it is."""
    return isinstance(request.stream, httpx.ByteStream)


def end_of(error: BaseException, *, reused: bool, answered: bool) -> End:
    """Who ended an attempt that raised.

    Args:
        error: what it raised.
        reused: whether its connection had been used before.
        answered: whether any byte of a response had come.
    """
    if isinstance(error, httpcore.PoolTimeout):
        return End.no_slot
    if isinstance(error, httpcore.TimeoutException):
        return End.timeout
    if isinstance(error, httpcore.NetworkError | httpcore.RemoteProtocolError):
        return End.stale if reused and not answered else End.lost
    return End.caller


def httpx_error(error: Exception, request: httpx.Request) -> Exception:
    """The exception in httpx's classes; what is not httpcore's is returned as it is."""
    for theirs, ours in _ERRORS:
        if isinstance(error, theirs):
            translated = ours(str(error), request=request)
            translated.__cause__ = error
            return translated
    return error


def in_words(error: BaseException) -> str:
    """An exception for the report: its class, and its text if it is about the connection and not about the request."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, httpcore.NetworkError | httpcore.TimeoutException) else name


def retry_after(answer: httpcore.Response) -> float | None:
    """The `Retry-After` of a 429 or 503 in seconds, from either of its forms; None if none can be read."""
    if answer.status not in RETRY_AFTER_STATUS:
        return None
    given = next((value for name, value in answer.headers if name.lower() == b"retry-after"), b"")
    text = given.decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    from email.utils import parsedate_to_datetime  # only a date pays for it

    try:
        # The one use of the wall clock: the header names a time of day.
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
