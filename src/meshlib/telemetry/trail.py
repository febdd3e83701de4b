"""What one call leaves behind: its span, a span for each of its attempts, and their durations.

Decides which spans there are, what is on them and when they end; a duration is recorded in the context of the span it
belongs to, so that it can be its exemplar. Where nobody records a span, nothing is worked out for it.

    call    INTERNAL   "GET orders"   from its start to the headers of its answer, or to the exception that leaves it
    attempt CLIENT     "GET"          likewise; a child of the call's

A span is over at the headers, when everything about the call is decided. A body that dies later is counted by a metric.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from time import time_ns
from typing import TYPE_CHECKING, Any

from opentelemetry import context as contexts
from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from meshlib.core.outcome import Outcome
from meshlib.telemetry.recorded import Recorder, known_method
from meshlib.telemetry.words import OTHER, error_of, error_of_status

if TYPE_CHECKING:
    from meshlib.core.report import Attempt

WAIT = "meshlib.wait"

SUPPRESSING = (
    *(
        getattr(contexts, name)
        for name in ("_SUPPRESS_INSTRUMENTATION_KEY", "_SUPPRESS_HTTP_INSTRUMENTATION_KEY")
        if hasattr(contexts, name)
    ),
    "suppress_instrumentation",
)
"""What other instrumentation looks for before it makes a span of its own. The API has no public names for them."""

SUPPRESSED = dict.fromkeys(SUPPRESSING, True)

FAILED = Status(StatusCode.ERROR)


class Line:
    """What the trails of one service share.

    Args:
        service: its name.
        scheme: what its endpoints are spoken to by.
        recorder: records durations; None for no metrics.
        tracer: makes spans; None for no traces.
        spans: which: `both`, `call`, `attempt` or `off`.
    """

    def __init__(self, service: str, scheme: str, recorder: Recorder | None, tracer: Tracer | None, spans: str) -> None:
        self.service = service
        self.recorder = recorder
        self.tracer = tracer
        self.call_tracer = tracer if spans in ("both", "call") else None
        self.attempt_tracer = tracer if spans in ("both", "attempt") else None
        self._scheme = scheme
        self._started_with: dict[str, dict[str, str]] = {}
        self.forsaken: deque[Callable[[], None]] = deque()

    def started_with(self, method: str) -> dict[str, str]:
        """What samplers see of a span, the same for every call of this method."""
        attributes = self._started_with.get(method)
        if attributes is None:
            attributes = {"http.request.method": method, "server.address": self.service, "url.scheme": self._scheme}
            self._started_with[method] = attributes
        return attributes

    def begin(self, method: str, url: Callable[[], str]) -> Trail:
        """A call begins.

        Args:
            method: the request's.
            url: what of its URL may be shown.
        """
        if self.forsaken:
            self.collect()
        context = contexts.get_current()
        if context and any(map(context.get, SUPPRESSING)):  # an exporter at work, or somebody who has said no
            return Trail(Line(self.service, self._scheme, None, None, "off"), method, url, context)
        return Trail(self, method, url, context)

    def collect(self) -> None:
        """End the trails of calls that were garbage-collected; see `Trail.forsaken`."""
        while self.forsaken:
            try:
                end = self.forsaken.popleft()
            except IndexError:  # somebody else was at it as well
                return
            end()


class Trail:
    """See the module.

    Args:
        line: the service's.
        method, url: see `Line.begin`.
        context: where the call is made.
    """

    _template: str | None = None

    def __init__(self, line: Line, method: str, url: Callable[[], str], context: Context) -> None:
        self._line = line
        self._url = url
        self._shown = ""
        self._method = method = known_method(method)
        self._context = context
        self._call: Span | None = None
        self._tries: dict[Attempt, tuple[Span, Context]] = {}
        self._count = 0
        self._error: str | None = None
        if line.call_tracer is not None:
            name = f"{'HTTP' if method == OTHER else method} {line.service}"
            span = line.call_tracer.start_span(name, self._context, attributes=line.started_with(method))
            self._context = set_span_in_context(span, self._context)
            if span.is_recording():
                span.set_attribute("url.full", self._shown_url())
                self._call = span

    def goes_by(self, template: str) -> None:
        """The URL's path is one of many that are called by this name."""
        self._template = template
        if self._call is not None:
            self._call.set_attribute("url.template", template)

    def waited(self, reason: str, seconds: float, attempt: Attempt | None = None) -> None:
        """The call has waited: `resolve` for its endpoints, `slot` for a connection, `back_off` before an attempt."""
        own = None if attempt is None or attempt not in self._tries else self._tries[attempt][0]
        span = own or self._call if reason == "slot" else self._call or own
        if span is not None and span.is_recording():
            span.add_event(WAIT, {"meshlib.wait.reason": reason, "meshlib.wait.seconds": seconds})

    def attempt_begins(self, attempt: Attempt) -> None:
        """An attempt is about to be made."""
        number, self._count = self._count, self._count + 1
        tracer = self._line.attempt_tracer
        if tracer is not None:
            method = self._method
            span = tracer.start_span(
                "HTTP" if method == OTHER else method,
                self._context,
                SpanKind.CLIENT,
                self._line.started_with(method),
            )
            self._tries[attempt] = span, set_span_in_context(span, self._context)
            if span.is_recording():
                span.set_attributes(self._seen_at_start(attempt, number))
        if attempt.waited:
            self.waited("back_off", attempt.waited, attempt)

    def _seen_at_start(self, attempt: Attempt, number: int) -> dict[str, str | int]:
        endpoint = attempt.endpoint
        attributes: dict[str, str | int] = {
            "url.full": self._shown_url(),
            "network.peer.address": endpoint.host,
            "network.peer.port": endpoint.port,
            "meshlib.attempt.kind": attempt.kind,
            "meshlib.endpoint.why": attempt.why,
        }
        if self._template is not None:
            attributes["url.template"] = self._template
        if number:
            attributes["http.request.resend_count"] = number
        return attributes

    def _shown_url(self) -> str:
        self._shown = self._shown or self._url()
        return self._shown

    def headers(self, attempt: Attempt) -> dict[str, str]:
        """What tells the next hop where in the trace it is."""
        if self._line.tracer is None:
            return {}
        carrier: dict[str, str] = {}
        propagate.inject(carrier, self._context_of(attempt))
        return carrier

    def attempt_ends(
        self, attempt: Attempt, by: BaseException | None = None, *, is_late: bool = False, at: int | None = None
    ) -> None:
        """An attempt has its headers, or has ended without.

        Args:
            attempt: it.
            by: what ended it; none, and no headers, if the other attempt of a race did.
            is_late: whether the call's time has run out.
            at: when, in nanoseconds since 1970; default now.
        """
        self._error = error = _why(attempt, by, is_late)
        span, context = self._tries.pop(attempt, (None, self._context))
        if self._line.recorder is not None:
            self._line.recorder.attempt(self._method, attempt, error, context)
        if span is not None:
            if span.is_recording():
                self._tell_end(span, attempt, error)
            span.end(at)

    def _tell_end(self, span: Span, attempt: Attempt, error: str | None) -> None:
        if attempt.outcome is not None:
            span.set_attribute("meshlib.attempt.outcome", str(attempt.outcome))
        if attempt.status is not None:
            span.set_attribute("http.response.status_code", attempt.status)
        if attempt.decision is not None:
            span.set_attribute("meshlib.retry.decision", attempt.decision)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(FAILED)

    def call_ends(
        self,
        attempts: list[Attempt],
        seconds: float,
        outcome: str,
        status: int | None,
        by: BaseException | None,
        at: int | None = None,
    ) -> None:
        """The call has its answer, or an exception leaves it."""
        if by is None:
            error = None if status is None else error_of_status(status)
        elif (error := error_of(by)) == OTHER and self._error is not None:
            error = self._error  # it is the caller's own exception, and the attempt knew what it was about
        line = self._line
        if line.recorder is not None:
            line.recorder.call(self._method, seconds, outcome, status, error, self._context, self._template)
            if len(attempts) > 1:
                line.recorder.extra(self._method, attempts, self._context)
        if self._call is not None:
            self._tell_call(self._call, len(attempts), outcome, status, error)
            self._call.end(at)

    def forsaken(self, attempts: list[Attempt], under_way: list[Attempt], seconds: float, outcome: str) -> None:
        """The call is being garbage-collected, maybe amid one of the SDK's locks: others end its spans, as of now."""
        self._line.forsaken.append(partial(self._end_forsaken, attempts, under_way, seconds, outcome, time_ns()))

    def _end_forsaken(
        self, attempts: list[Attempt], under_way: list[Attempt], seconds: float, outcome: str, at: int
    ) -> None:
        for attempt in under_way:
            self.attempt_ends(attempt, GeneratorExit(), at=at)
        self.call_ends(attempts, seconds, outcome, None, GeneratorExit(), at)

    def _tell_call(self, span: Span, attempts: int, outcome: str, status: int | None, error: str | None) -> None:
        span.set_attribute("meshlib.call.outcome", outcome)
        span.set_attribute("meshlib.call.attempts", attempts)
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(FAILED)

    def quietly(self, send: Callable[[Any], Any], attempt: Attempt) -> Callable[[Any], Any]:
        """The same function, below which nobody makes spans of what we have one of."""
        context = _suppressing(self._context_of(attempt))

        def sent(request: Any) -> Any:
            token = contexts.attach(context)
            try:
                return send(request)
            finally:
                contexts.detach(token)

        return sent

    def quietly_async(self, send: Callable[[Any], Awaitable[Any]], attempt: Attempt) -> Callable[[Any], Awaitable[Any]]:
        """See `quietly`."""
        context = _suppressing(self._context_of(attempt))

        async def sent(request: Any) -> Any:
            token = contexts.attach(context)
            try:
                return await send(request)
            finally:
                contexts.detach(token)

        return sent

    def _context_of(self, attempt: Attempt) -> Context:
        found = self._tries.get(attempt)
        return self._context if found is None else found[1]


def _why(attempt: Attempt, by: BaseException | None, is_late: bool) -> str | None:
    """What an attempt failed by, in one word; None if it did not."""
    if by is None:
        return "superseded" if attempt.status is None else error_of_status(attempt.status)
    word = error_of(by)
    if is_late and word in ("timeout", "connect_timeout"):
        return "deadline"
    return "caller" if attempt.outcome is Outcome.abandoned and word != "cancelled" else word


def _suppressing(context: Context) -> Context:
    return Context({**context, **SUPPRESSED})
