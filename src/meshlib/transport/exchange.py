"""One call on its way: what the sync and the async driver share of it, which is all but the waiting.

Decides which exception leaves a call and which answer is kept for the case that nothing better comes. It turns the
transport's facts into the words of `meshlib.core.call` and never does I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import httpcore
import httpx

from meshlib.core.call import TIMER_SLACK, Call
from meshlib.core.ending import Ending
from meshlib.core.outcome import End, Outcome
from meshlib.core.report import Attempt, attach
from meshlib.errors import DeadlineExceeded, NoEndpoints, Overloaded, ResolveError
from meshlib.scope import NOTHING, current_scope
from meshlib.transport import binding
from meshlib.transport.body import Bytes, Stalled
from meshlib.transport.keys import KeyOf
from meshlib.transport.network import Clock
from meshlib.transport.terms import Route

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
        route: the way to the service.
        request: the caller's.
        recorder: wraps a body that is not bytes, in the client's colour. (Some of httpx's own are of both.)

    Attributes:
        clock: the mesh's.
        terms: what holds for the call.
        started: when it began.
        body: what is sent.
        trail: what hears of it if it is observed; see `meshlib.transport.observed`.

    Raises:
        TypeError, ConfigError: for options in `extensions["meshlib"]` that cannot be.
        Exception: the caller's own, from its function for the key.
    """

    _error: Exception | None = None
    _serving = 1
    trail: Any = None

    def __init__(self, route: Route, request: httpx.Request, recorder: Recorder) -> None:
        terms = route.terms
        total = terms.total
        if (scope := current_scope()) is not NOTHING or "meshlib" in request.extensions:
            terms, left = route.terms_under(request.extensions.get("meshlib"))
            total = min(terms.total, left)
            self._retries, self._key = terms.retries, terms.key
            if scope.attempt > 1:
                self._on_behalf, self._serving = True, scope.attempt
        self.route = route
        self.service = route.service
        self.request = request
        self.terms = terms
        self.clock = clock = route.clock
        self.started = now = clock()
        repeatable = terms.idempotent
        if repeatable is None:  # rule C1
            repeatable = request.method in route.methods or binding.has(request.headers, b"idempotency-key")
        self._set_out(route.cluster, route.name, repeatable, now + total, terms.attempt)
        if route.key_of is not None:
            self._key = self._find_key(route.key_of)
        content = binding.content_of(request)
        self.body: Any = (
            recorder(request.stream, terms.recorded, clock, self.deadline) if content is None else Bytes(content)
        )

    def _find_key(self, key_of: KeyOf) -> str | None:
        """What the options say, else what the request brings."""
        key = self._key
        if key is None:
            key = key_of(self.request)
        if not key:
            self.cluster.count_keyless()
        return key

    @property
    def may_be_hedged(self) -> bool:
        """See `Call.may_be_hedged`. Of a recorded body two attempts at once would each get a part."""
        return super().may_be_hedged and self.body.content is not None

    @property
    def given_timeouts(self) -> Mapping[str, float | None]:
        """The client's own bounds for single operations."""
        given: Mapping[str, float | None] = self.request.extensions.get("timeout") or {}
        return given

    @property
    def connect_timeout(self) -> float:
        """Seconds for opening a connection."""
        given = self.given_timeouts.get("connect")
        return self.terms.connect if given is None else min(given, self.terms.connect)

    @property
    def slot_timeout(self) -> float | None:
        """Seconds for waiting for a connection, if the client has a bound of its own."""
        return self.given_timeouts.get("pool")

    @property
    def body_deadline(self) -> float:
        """When reading the response's body is given up."""
        return self.deadline if self.terms.body_deadline else math.inf

    def head(self, attempt: Attempt) -> tuple[bytes, bytes, list[tuple[bytes, bytes]]]:
        """Method, target and headers as the attempt's endpoint gets them."""
        left = self.deadline - self.clock() if self.route.send_deadline else None
        return binding.head(self.request, self.host_at(attempt), left, self.number_of(attempt))

    def number_of(self, attempt: Attempt) -> int:
        """Which of the attempts that may have reached a server this is, at least that for which the caller works."""
        if attempt.kind == "first":
            return self._serving
        before = [each for each in self.report.attempts if each is not attempt]
        return max(self._serving, 1 + sum(each.outcome is not Outcome.not_sent for each in before))

    def host_at(self, attempt: Attempt) -> str | None:
        """The `Host` header that the attempt's endpoint gets instead of the URL's, if any."""
        return str(attempt.endpoint) if self.route.host == "endpoint" else self.route.host

    def answered(self, attempt: Attempt, answer: binding.Answer) -> float | None:
        """The headers are there. Returns None if this answer is the call's, else the seconds to wait.

        Raises:
            Exception: the user's own, from a strategy.
        """
        if self.body.waited:
            self._account(attempt)
        if answer.status not in self.route.unwell:
            self.succeed(attempt, self.clock(), answer.status, answer.is_closed)
            return None
        ending = Ending(
            status=answer.status,
            retry_after=binding.retry_after(answer) if answer.status in binding.RETRY_AFTER_STATUS else None,
            resendable=self.body.is_resendable,
            whole=answer.is_closed,
            overloaded=answer.status == 503 and bool(answer.header(binding.OVERLOADED)),
            evidence=lambda: answer.evidence(self.request, self.report),
        )
        return self.settle(attempt, self.clock(), ending)

    def broke(self, attempt: Attempt, error: BaseException, connection: Any) -> float | None:
        """The attempt raised. Returns None if the call ends with it, else the seconds to wait.

        Raises:
            Exception: the caller's own, if it was its body or its request that failed, or a strategy.
        """
        stream = connection.stream if connection else None
        reused = connection is not None and connection.is_reused
        end = binding.end_of(error, reused=reused, answered=stream is not None and stream.answered)
        if (fault := self.body.error) is not None and isinstance(error, Exception):
            error, end = fault, End.caller  # whatever has become of it on its way through the transport
        if end is End.caller and isinstance(error, Exception):
            self.restart(attempt, self.clock())  # what its body took or its request lacked is not the endpoint's time
        elif self.body.waited:
            self._account(attempt)
        ending = Ending(
            end=end,
            error=binding.in_words(error),
            sent=stream is not None and stream.sent,
            resendable=self.body.is_resendable,
            evidence=lambda: binding.httpx_error(error, self.request),
        )
        again = self.settle(attempt, self.clock(), ending)
        if isinstance(error, Exception):
            if end is End.caller and not isinstance(error, Stalled):
                raise fault or binding.httpx_error(error, self.request)
            self._error = error
        return again

    def deliver(self, reply: Any) -> httpx.Response:
        """The call ends with this answer."""
        response: httpx.Response = reply.response()
        return response

    def left(self, error: BaseException) -> None:
        """The call ends with this exception."""

    def forsaken(self) -> None:
        """The call is being garbage-collected: from a finalizer, so no lock may be taken."""

    def body_died(self, error: Exception) -> Exception:
        """The exception for a body that did not end well; it carries the report, as does whatever leaves a driver."""
        self._error = error
        died = self.failure(self.body_deadline)
        attach(died, self.report)
        if self.cluster.journal.waiting:
            self.cluster.journal.deliver(self.cluster)
        return died

    def failure(self, deadline: float | None = None) -> Exception:
        """The exception that leaves a call without an answer.

        Args:
            deadline: what may have run out; default the call's.
        """
        last, self._error = self._error, None  # its traceback leads back to this object
        if last is None and not self.cluster.is_known:
            last = self._nobody()
        if self.clock() >= (self.deadline if deadline is None else deadline) - TIMER_SLACK:
            given = max(0.0, self.deadline - self.started)
            said = f"{self.report.service}: no answer within {given:.3g} s"
            if isinstance(last, ResolveError):
                said = f"{said}: {self.cluster.why_empty(0.0)}"
            error: Exception = DeadlineExceeded(said, request=self.request)
            error.__cause__ = last
        else:
            error = binding.httpx_error(last or self._nobody(), self.request)
        return error

    def _nobody(self) -> Exception:
        if self.refused:
            return Overloaded(f"{self.report.service}: {self.refused}", request=self.request)
        kind = NoEndpoints if self.cluster.is_known else ResolveError
        return kind(f"{self.report.service}: {self.cluster.why_empty(self.clock())}", request=self.request)

    def _account(self, attempt: Attempt) -> None:
        """What the source of the body took is not the endpoint's time."""
        self.restart(attempt, attempt.started + self.body.waited)
        self.body.waited = 0.0


class Reply:
    """An answer whose body is still to come: what the streams of both colours share. See `inner.WholeAnswer` as well.

    It ends exactly once: when the body has ended, when it is closed, when it fails, or when it is garbage-collected.

    Args:
        exchange: the call it belongs to.
        attempt: the attempt that brought it.
        connection: where the body comes from.
        answer: the headers, and the stream of the body.
        stacks: where the connection goes afterwards.

    Attributes:
        kept: the body, if it was read to make room for another attempt.
        is_over: whether it has ended.
    """

    is_over = False
    kept: list[bytes] | None = None

    def __init__(
        self, exchange: Exchange, attempt: Attempt, connection: Any, answer: binding.Answer, stacks: Any
    ) -> None:
        connection.stream.deadline = exchange.body_deadline
        self.answer = answer
        self.exchange = exchange
        self._attempt = attempt
        self._connection = connection
        self._stacks = stacks

    def response(self) -> httpx.Response:
        """The answer as the caller gets it."""
        return self.answer.response(self, self.exchange.report)

    @property
    def is_whole(self) -> bool:
        """Whether the body can still be had: unread, or kept when it was drained."""
        return not self.is_over or self.kept is not None

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
        # A module without its names is one that the end of the interpreter has emptied; the socket goes with that.
        if binding is not None and not getattr(self, "is_over", True):
            self.is_over = True
            self._stacks.abandon(self._connection)
            self.exchange.cluster.orphans.append(self._attempt)

    def __del__(self) -> None:
        self.let_go()
