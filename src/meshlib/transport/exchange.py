"""One call on its way: what the sync and the async driver share of it, which is all but the waiting.

Decides which exception leaves a call and which answer is kept for the case that nothing better comes. It turns the
transport's facts into the words of `meshlib.core.call` and never does I/O.
"""

from __future__ import annotations

from typing import Any

import httpcore
import httpx

from meshlib.core.call import Call
from meshlib.core.cluster import Cluster
from meshlib.core.report import Attempt
from meshlib.errors import DeadlineExceeded, NoEndpoints
from meshlib.transport import binding
from meshlib.transport.body import AsyncRecordedBody, RecordedBody
from meshlib.transport.connections import AsyncConnection, Connection
from meshlib.transport.network import Clock

DRAINED = 65536
"""Bytes of a rejected response that are read to save its connection (rule C5). More is not worth the wait."""

DRAIN_TIME = 0.1
"""Seconds that this reading may take."""

NETWORK_ERRORS = (httpcore.NetworkError, httpcore.RemoteProtocolError, httpcore.TimeoutException)
"""What may happen to a body that is read."""


class Exchange:
    """A call with its request.

    Args:
        cluster: the service's live state.
        request: the caller's.
        clock: the mesh's.
        options: from the request's `extensions["meshlib"]`.
    """

    def __init__(self, cluster: Cluster, request: httpx.Request, clock: Clock, options: dict[str, Any]) -> None:
        service = cluster.service
        self.cluster = cluster
        self.service = service
        self.request = request
        self.clock = clock
        self.call = Call(
            cluster,
            repeatable=_is_repeatable(request, service.retry.methods, options),
            deadline=clock() + service.timeout.total,
        )
        timeouts = request.extensions.get("timeout", {})
        given = timeouts.get("connect")
        self.connect_timeout = service.timeout.connect if given is None else min(given, service.timeout.connect)
        self._body = self._replayable_body(service.retry.buffer_body)
        self._error: Exception | None = None

    def begin(self) -> Attempt | None:
        """Start the next attempt; None if there can be none."""
        return self.call.begin(self.clock())

    def core_request(self, attempt: Attempt) -> httpcore.Request:
        """The request as the attempt's endpoint gets it."""
        return binding.core_request(self.request, attempt.endpoint, self.service.host, self._body)

    def answered(self, attempt: Attempt, answer: httpcore.Response) -> float | None:
        """The headers are there. Returns None if this answer is the call's, else the seconds to wait."""
        return self.call.settle(
            attempt,
            self.clock(),
            status=answer.status,
            retry_after=binding.retry_after(answer),
            resendable=self._is_resendable(),
        )

    def broke(
        self, attempt: Attempt, error: BaseException, connection: Connection | AsyncConnection | None
    ) -> float | None:
        """The attempt raised. Returns None if the call ends with it, else the seconds to wait."""
        stream = connection.stream if connection else None
        reused = connection is not None and connection.is_reused
        again = self.call.settle(
            attempt,
            self.clock(),
            end=binding.end_of(error, reused=reused, answered=stream is not None and stream.answered),
            error=binding.in_words(error),
            sent=stream is not None and stream.sent,
            resendable=self._is_resendable(),
        )
        self._error = error if isinstance(error, Exception) else None
        return again

    def body_died(self, error: Exception) -> Exception:
        """The exception for a body that did not end well."""
        self._error = error
        return self.failure()

    def failure(self) -> Exception:
        """The exception that leaves a call without an answer; it carries the report, and lists it in a note."""
        report = self.call.report
        if self.call.is_expired(self.clock()):
            total = self.service.timeout.total
            error: Exception = DeadlineExceeded(f"{report.service}: no answer within {total:g} s", request=self.request)
            error.__cause__ = self._error
        elif self._error is None:
            error = NoEndpoints(f"{report.service}: no endpoint is to be called now", request=self.request)
        else:
            error = binding.httpx_error(self._error, self.request)
        error.meshlib_report = report  # type: ignore[attr-defined]
        error.add_note(f"meshlib: {report}")
        return error

    def _replayable_body(self, limit: int) -> Any:
        stream = self.request.stream
        if binding.is_bytes(self.request):
            return stream
        # A stream may be of both colours; which one is wanted is known by the client that made the request.
        if isinstance(stream, httpx.AsyncByteStream):
            return AsyncRecordedBody(stream, limit)
        return RecordedBody(stream, limit)

    def _is_resendable(self) -> bool:
        return getattr(self._body, "is_resendable", True)


class Reply:
    """An answer whose body is still to come: what the streams of both colours share.

    It ends exactly once: when the body has ended, when it is closed, when it fails, or when it is garbage-collected.

    Args:
        exchange: the call it belongs to.
        attempt: the attempt that brought it.
        connection: where the body comes from.
        answer: the headers, and httpcore's stream.
        stacks: where the connection goes afterwards.

    Attributes:
        kept: the body, if it was read to make room for another attempt.
        is_over: whether it has ended.
    """

    def __init__(
        self, exchange: Exchange, attempt: Attempt, connection: Any, answer: httpcore.Response, stacks: Any
    ) -> None:
        connection.stream.deadline = exchange.call.deadline
        self.answer = answer
        self.kept: list[bytes] | None = None
        self.exchange = exchange
        self._attempt = attempt
        self._connection = connection
        self._stacks = stacks
        self.is_over = False

    def response(self) -> httpx.Response:
        """The answer as the caller gets it."""
        return binding.response(self.answer, self, self.exchange.call.report)

    @property
    def is_whole(self) -> bool:
        """Whether the body can still be had: unread, or kept when it was drained."""
        return not self.is_over or self.kept is not None

    def hurry(self) -> None:
        """Bound what reading the rest may take: it is only to save the connection."""
        stream = self._connection.stream
        stream.deadline = min(stream.deadline, self.exchange.clock() + DRAIN_TIME)

    def end(self, died: BaseException | None = None) -> None:
        """The body has ended or is given up: the connection goes back if it can be used again, else it is closed."""
        if self.is_over:
            return
        self.is_over = True
        if died is None and self._connection.http.is_idle():
            self._stacks.put(self._connection)
        else:
            self._stacks.drop(self._connection)
        now = self.exchange.clock()
        call = self.exchange.call
        # Whoever sets a deadline on a long body must not have the endpoint blamed for it.
        blamed = isinstance(died, NETWORK_ERRORS) and not call.is_expired(now)
        call.release(self._attempt, now, died=binding.in_words(died) if died is not None and blamed else None)

    def __del__(self) -> None:
        if not getattr(self, "is_over", True):
            # Not `end`: a finalizer may run while this very thread holds one of the locks.
            self.is_over = True
            self._stacks.orphans.append(self._connection)
            self.exchange.cluster.orphans.append(self._attempt)


def _is_repeatable(request: httpx.Request, methods: Any, options: dict[str, Any]) -> bool:
    """Rule C1."""
    if (said := options.get("idempotent")) is not None:
        return bool(said)
    return request.method in methods or "idempotency-key" in request.headers
