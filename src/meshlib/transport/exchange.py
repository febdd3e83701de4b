"""One call on its way: what the sync and the async driver share of it, which is all but the waiting.

Decides which exception leaves a call and which answer is kept for the case that nothing better comes. It turns the
transport's facts into the words of `meshlib.core.call` and never does I/O.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import httpcore
import httpx

from meshlib.core.call import TIMER_SLACK, Call
from meshlib.core.cluster import Cluster
from meshlib.core.outcome import End
from meshlib.core.report import Attempt
from meshlib.errors import DeadlineExceeded, NoEndpoints, ResolveError
from meshlib.policy import Timeout
from meshlib.scope import NOTHING, checked, current_scope
from meshlib.transport import binding
from meshlib.transport.body import Bytes, Stalled
from meshlib.transport.network import Clock

Recorder = Callable[[Any, float, Clock, float], Any]
"""Makes a body that can be sent again out of one that cannot; see `meshlib.transport.body.Recording`."""

DRAINED = 65536
"""Bytes of a rejected response that are read to save its connection (rule C5). More is not worth the wait."""

DRAIN_TIME = 0.1
"""Seconds that this reading may take."""

NETWORK_ERRORS = (
    httpcore.NetworkError,
    httpcore.RemoteProtocolError,
    httpcore.TimeoutException,
    httpx.TransportError,  # from an inner transport
)
"""What may happen to a body that is read."""


class Exchange(Call):
    """A call with its request.

    Args:
        cluster: the service's live state.
        request: the caller's.
        clock: the mesh's.
        recorder: wraps a body that is not bytes, in the client's colour. (Some of httpx's own are of both.)
        send_deadline: whether the next hop is told what is left of the call's time.

    Attributes:
        body: what is sent.
        body_deadline: when reading the response's body is given up.
        host: the service's setting for the `Host` header.

    Raises:
        TypeError, ConfigError: for options in `extensions["meshlib"]` that cannot be.
    """

    def __init__(
        self, cluster: Cluster, request: httpx.Request, clock: Clock, *, recorder: Recorder, send_deadline: bool
    ) -> None:
        service = cluster.service
        options, timeout, left = _in_force(request, service.timeout)
        self.service = service
        self.request = request
        self.clock = clock
        self._started = now = clock()
        super().__init__(
            cluster,
            repeatable=_is_repeatable(request, service.retry.methods, options),
            deadline=now + min(timeout.total, left),
            attempt_timeout=timeout.attempt,
            retries=options.get("retry", True),
            key=options.get("hash_key"),
        )
        self._connect = timeout.connect
        self.host = service.host
        self.body_deadline = self.deadline if options.get("body_deadline", True) else math.inf
        self._send_deadline = send_deadline
        content = binding.content_of(request)
        if content is not None:
            self.body: Any = Bytes(content)
        else:
            limit = math.inf if options.get("replayable") else service.retry.buffer_body
            self.body = recorder(request.stream, limit, clock, self.deadline)
        self._error: Exception | None = None

    @property
    def given_timeouts(self) -> Mapping[str, float | None]:
        """The client's own bounds for single operations."""
        given: Mapping[str, float | None] = self.request.extensions.get("timeout") or {}
        return given

    @property
    def connect_timeout(self) -> float:
        """Seconds for opening a connection."""
        return _shorter(self._connect, self.given_timeouts.get("connect"))

    @property
    def slot_timeout(self) -> float | None:
        """Seconds for waiting for a connection, if the client has a bound of its own."""
        return self.given_timeouts.get("pool")

    def head(self, attempt: Attempt) -> tuple[bytes, bytes, list[tuple[bytes, bytes]]]:
        """Method, target and headers as the attempt's endpoint gets them."""
        return binding.head(self.request, self._host(attempt), self._left())

    def inner_request(self, attempt: Attempt, timeout: dict[str, float]) -> httpx.Request:
        """The request as an inner transport gets it."""
        return binding.inner_request(
            self.request,
            attempt.endpoint,
            scheme="http" if self.service.tls is None else "https",
            host=self._host(attempt),
            left=self._left(),
            stream=self.body,
            timeout=timeout,
        )

    def answered(self, attempt: Attempt, answer: binding.Answer) -> float | None:
        """The headers are there. Returns None if this answer is the call's, else the seconds to wait."""
        self._account(attempt)
        return self.settle(
            attempt,
            self.clock(),
            status=answer.status,
            retry_after=binding.retry_after(answer) if answer.status in binding.RETRY_AFTER_STATUS else None,
            resendable=self.body.is_resendable,
            whole=answer.is_closed,
        )

    def broke(self, attempt: Attempt, error: BaseException, connection: Any) -> float | None:
        """The attempt raised. Returns None if the call ends with it, else the seconds to wait.

        Raises:
            Exception: the caller's own, if it was its body or its request that failed.
        """
        stream = connection.stream if connection else None
        reused = connection is not None and connection.is_reused
        end = binding.end_of(error, reused=reused, answered=stream is not None and stream.answered)
        if (fault := self.body.error) is not None and isinstance(error, Exception):
            error, end = fault, End.caller  # whatever has become of it on its way through the transport
        self._account(attempt)
        again = self.settle(
            attempt,
            self.clock(),
            end=end,
            error=binding.in_words(error),
            sent=stream is not None and stream.sent,
            resendable=self.body.is_resendable,
        )
        if isinstance(error, Exception):
            if end is End.caller and not isinstance(error, Stalled):
                raise self._with_report(fault or binding.httpx_error(error, self.request))
            self._error = error
        return again

    def body_died(self, error: Exception) -> Exception:
        """The exception for a body that did not end well."""
        self._error = error
        return self.failure(self.body_deadline)

    def failure(self, deadline: float | None = None) -> Exception:
        """The exception that leaves a call without an answer; it carries the report, and lists it in a note.

        Args:
            deadline: what may have run out; default the call's.
        """
        report = self.report
        last, self._error = self._error, None  # its traceback leads back to this object
        if last is None and not self.cluster.is_known:
            last = self._nobody()
        if self.clock() >= (self.deadline if deadline is None else deadline) - TIMER_SLACK:
            given = max(0.0, self.deadline - self._started)
            said = f"{report.service}: no answer within {given:.3g} s"
            if isinstance(last, ResolveError):
                said = f"{said}: {self.cluster.why_empty(0.0)}"
            error: Exception = DeadlineExceeded(said, request=self.request)
            error.__cause__ = last
        else:
            error = binding.httpx_error(last or self._nobody(), self.request)
        return self._with_report(error)

    def _nobody(self) -> Exception:
        kind = NoEndpoints if self.cluster.is_known else ResolveError
        return kind(f"{self.report.service}: {self.cluster.why_empty(self.clock())}", request=self.request)

    def _account(self, attempt: Attempt) -> None:
        """What the source of the body took is not the endpoint's time."""
        if self.body.waited:
            self.restart(attempt, attempt.started + self.body.waited)
            self.body.waited = 0.0

    def _with_report(self, error: Exception) -> Exception:
        error.meshlib_report = self.report  # type: ignore[attr-defined]
        error.add_note(f"meshlib: {self.report}")
        return error

    def _host(self, attempt: Attempt) -> str | None:
        return str(attempt.endpoint) if self.host == "endpoint" else self.host

    def _left(self) -> float | None:
        return self.deadline - self.clock() if self._send_deadline else None


class Reply:
    """An answer whose body is still to come: what the streams of both colours share.

    It ends exactly once: when the body has ended, when it is closed, when it fails, or when it is garbage-collected.

    Args:
        exchange: the call it belongs to.
        attempt: the attempt that brought it.
        connection: where the body comes from.
        answer: the headers, and the stream of the body.
        stacks: where the connection goes afterwards.

    Attributes:
        kept: the body, if it was read to make room for another attempt.
        is_over: whether it has ended. An answer whose body came along with the headers has.
    """

    def __init__(
        self, exchange: Exchange, attempt: Attempt, connection: Any, answer: binding.Answer, stacks: Any
    ) -> None:
        connection.stream.deadline = exchange.body_deadline
        self.answer = answer
        self.kept: list[bytes] | None = None
        self.exchange = exchange
        self._attempt = attempt
        self._connection = connection
        self._stacks = stacks
        self.is_over: bool = answer.is_closed

    def response(self) -> httpx.Response:
        """The answer as the caller gets it."""
        return self.answer.response(self, self.exchange.report)

    @property
    def is_whole(self) -> bool:
        """Whether the body can still be had: unread, or kept when it was drained."""
        return not self.is_over or self.kept is not None or self.answer.is_closed

    def is_enough(self, drained: int) -> bool:
        """Whether so many bytes, or the time they took, are more than a connection is worth."""
        return drained > DRAINED or self.exchange.clock() >= self._connection.stream.deadline

    def hurry(self) -> None:
        """Bound what reading the rest may take: it is only to save the connection."""
        stream = self._connection.stream
        stream.deadline = min(stream.deadline, self.exchange.deadline, self.exchange.clock() + DRAIN_TIME)

    def end(self, died: BaseException | None = None) -> None:
        """The body has ended or is given up: the connection goes back if it can be used again, else it is closed."""
        if self.is_over:
            return
        self.is_over = True
        if died is None and self._connection.renew():
            self._stacks.put(self._connection)
        else:
            self._stacks.drop(self._connection)
        now = self.exchange.clock()
        # A long body that outlasts the caller's own deadline is not the endpoint's fault.
        blamed = isinstance(died, NETWORK_ERRORS) and not self.exchange.is_expired(now)
        self.exchange.release(self._attempt, now, died=binding.in_words(died) if died is not None and blamed else None)

    def let_go(self) -> None:
        """End it from a finalizer, which may run while this very thread holds one of the locks."""
        if not getattr(self, "is_over", True):
            self.is_over = True
            self._stacks.abandon(self._connection)
            self.exchange.cluster.orphans.append(self._attempt)

    def __del__(self) -> None:
        self.let_go()


def _in_force(request: httpx.Request, timeout: Timeout) -> tuple[Mapping[str, Any], Timeout, float]:
    """The options of the request and of the blocks around it, the timeout they make, and the seconds to the deadline.

    Precedence: the request's extension, the nearest block, the service.
    """
    scope = current_scope()
    own = request.extensions.get("meshlib")
    if scope is NOTHING and not own:
        return NOTHING.options, timeout, math.inf
    options = scope.options
    if own:
        options = {**options, **checked(own, "extensions['meshlib']")}
    if (given := options.get("timeout")) is not None:
        timeout = given if isinstance(given, Timeout) else replace(timeout, total=given)
    # Blocks measure by the real clock, since they belong to no mesh; what is left is the same on every clock.
    return options, timeout, scope.deadline - time.monotonic() if scope.deadline < math.inf else math.inf


def _shorter(one: float, other: float | None) -> float:
    return one if other is None or one < other else other


def _is_repeatable(request: httpx.Request, methods: Collection[str], options: Mapping[str, Any]) -> bool:
    """Rule C1."""
    if (said := options.get("idempotent")) is not None:
        return bool(said)
    return request.method in methods or "idempotency-key" in request.headers
