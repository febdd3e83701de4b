"""The words of telemetry that come from closed lists.

Decides what stands in `error.type` and in `http.request.method`. Whatever is not on a list becomes `_OTHER`: an
attribute that anybody could invent values for would make a metric of as many series.
"""

from __future__ import annotations

OTHER = "_OTHER"

METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
"""Those the semantic conventions know."""

ERRORS = {
    "connect": "no connection could be opened",
    "connect_timeout": "opening one took too long",
    "identity": "the endpoint is not who it should be",
    "no_slot": "no connection of ours became free in time",
    "timeout": "sending or waiting for the answer took too long",
    "connection_lost": "the connection was lost after it was opened, or what came over it was no HTTP",
    "deadline": "the call's own time ran out",
    "caller": "the request could not be sent as it was, or its body failed",
    "cancelled": "the caller cancelled",
    "superseded": "the other attempt, of one and its hedge, ended the call",
    "overloaded": "refused here, by the throttle or a limit",
    "no_endpoints": "there was no endpoint to send it to",
    "unresolved": "the endpoints are not known",
    OTHER: "anything else",
}
"""What `error.type` may be, beside a status from 400 to 599, and what it means."""

_BY_CLASS = {
    "ConnectTimeout": "connect_timeout",
    "IdentityError": "identity",
    "ConnectError": "connect",
    "PoolTimeout": "no_slot",
    "DeadlineExceeded": "deadline",
    "Overloaded": "overloaded",
    "NoEndpoints": "no_endpoints",
    "ResolveError": "unresolved",
    "LocalProtocolError": "caller",
    "ReadError": "connection_lost",
    "WriteError": "connection_lost",
    "CloseError": "connection_lost",
    "RemoteProtocolError": "connection_lost",
    "ReadTimeout": "timeout",
    "WriteTimeout": "timeout",
    "CancelledError": "cancelled",
    "Cancelled": "cancelled",
    "GeneratorExit": "cancelled",
    "KeyboardInterrupt": "cancelled",
}
"""By the names of classes: those of httpcore and of httpx are called alike, and neither is needed here."""


def error_of(error: BaseException) -> str:
    """An exception in one of our words."""
    for each in type(error).__mro__:
        if (word := _BY_CLASS.get(each.__name__)) is not None:
            return word
    return OTHER


def error_of_status(status: int) -> str | None:
    """What is wrong with a status; None if nothing is."""
    if status < 400:
        return None
    return str(status) if status < 600 else OTHER
