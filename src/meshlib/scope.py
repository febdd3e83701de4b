"""What holds for the calls made inside a block or a function: `options`, `deadline`, `behalf_of_attempt`, `bound_to`.

Decides how the settings of nested blocks add up. They live in a context variable, so they follow tasks, and threads
that were given a copy of the context. Nothing here makes a call.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from meshlib.policy import Timeout
from meshlib.validation import ConfigError, Fault, Rule, number

P = ParamSpec("P")
R = TypeVar("R")


class Scope:
    """What holds at one point of the code: the options of all blocks around it, and the earliest of their deadlines.

    Attributes:
        options: the innermost value of each.
        deadline: on `time.monotonic`; infinite if there is none.
        attempt: which attempt of another's call is being served; 1 if it is the first, or none.
        bound: what holds instead of `options` for the calls to single services; see `bound_to`.
    """

    __slots__ = ("attempt", "block", "bound", "deadline", "options", "outer")
    options: Mapping[str, Any]
    deadline: float
    attempt: int
    bound: Mapping[object, Mapping[str, Any]]

    def __init__(
        self,
        outer: Scope | None,
        options: Mapping[str, Any],
        deadline: float,
        block: object = None,
        attempt: int | None = None,
    ) -> None:
        self.outer = outer
        self.block = block
        self.attempt = attempt or (outer.attempt if outer else 1)
        self.options = {**outer.options, **options} if outer else dict(options)
        self.deadline = min(deadline, outer.deadline) if outer else deadline
        self.bound = outer.bound if outer else {}
        if self.bound and options:
            self.bound = {service: {**held, **options} for service, held in self.bound.items()}

    def options_for(self, service: object) -> Mapping[str, Any]:
        """What holds for the calls to a service."""
        return self.bound.get(service, self.options)

    def lift(self) -> None:
        """Take back this block's own deadline and attempt: they hold for no call, and no block, that begins from now
        on."""
        self.deadline = self.outer.deadline if self.outer else math.inf
        self.attempt = self.outer.attempt if self.outer else 1


NOTHING = Scope(None, {}, math.inf)

_scope: ContextVar[Scope] = ContextVar("meshlib_scope", default=NOTHING)

current_scope = _scope.get
"""What holds here. Every call asks, so there is no function around it."""


class _Block:
    """A context manager, and a decorator for functions and coroutine functions, that opens a scope.

    The scope knows its outer one, so leaving needs no token: one object may be entered by many tasks at once.
    """

    def _enter(self, outer: Scope) -> Scope:
        raise NotImplementedError

    def __enter__(self) -> None:
        _scope.set(self._enter(_scope.get()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        scope = _scope.get()
        if scope.block is self and scope.outer is not None:
            _scope.set(scope.outer)
        else:
            _leave_within(scope, self)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, staticmethod | classmethod | property):
            kind = type(function).__name__
            raise TypeError(
                f"{type(self).__name__} cannot decorate a {kind}: put it below @{kind}, next to the function"
            )
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            name = type(self).__name__
            raise TypeError(f"{name} cannot decorate the generator {function.__qualname__}: use it as a block inside")
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            coroutine_function = cast("Callable[P, Awaitable[Any]]", function)

            @functools.wraps(function)
            async def asynchronous(*args: P.args, **kwargs: P.kwargs) -> Any:
                with self:
                    return await coroutine_function(*args, **kwargs)

            return cast("Callable[P, R]", asynchronous)

        @functools.wraps(function)
        def synchronous(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return synchronous


def _leave_within(scope: Scope, block: _Block) -> None:
    """Leave a block before those inside it, as a generator does that is closed in another block: they do not go back to
    it. In a context that it was not entered in there is nothing to leave."""
    while (outer := scope.outer) is not None:
        if outer.block is block:
            scope.outer = outer.outer
            return
        scope = outer


class options(_Block):
    """Settings for every call made inside; the nearest block wins, and a request's own extension wins over it.

    Args:
        timeout: seconds for each call in all, or a `Timeout`.
        idempotent: whether the requests may be executed twice.
        hash_key: what a consistent hash goes by.
        retry: False for a single attempt per call, without retry or failover. (A kept connection that turns out to be
            dead is replaced all the same.)
        replayable: True keeps all of a request's body that is not bytes already (a file, a generator) in memory while
            it is sent, so that it can be sent again, however long it is: `Retry.buffer_body` does not count.
        body_deadline: False lets a body be read on after the call's deadline, once its headers are there.
        url_template: the URL's path with names in the place of what differs, `"/v1/orders/{id}"`, for telemetry.

    Raises:
        TypeError: for an unknown option.
        ConfigError: for a value that is not usable.
    """

    def __init__(self, **given: Any) -> None:
        self._options = checked(given, "options()")

    def _enter(self, outer: Scope) -> Scope:
        return Scope(outer, self._options, math.inf, self)


class bound_to(_Block):
    """Options for the calls to one service, in the place of those that another such block around this one has for it.

    So what a decorated function says of its own calls does not hold for functions that it calls in turn, nor for other
    services. What `options` blocks say counts on.

    Args:
        service: what tells it from all others.
        given: the options, checked.
    """

    def __init__(self, service: object, given: Mapping[str, Any]) -> None:
        self._service = service
        self._options = given

    def _enter(self, outer: Scope) -> Scope:
        scope = Scope(outer, {}, math.inf, self)
        scope.bound = {**scope.bound, self._service: {**scope.options, **self._options}}
        return scope


class deadline(_Block):
    """An instant that no call made inside outlasts; of nested ones the earliest holds. The next hop is told.

    Args:
        seconds: from the moment the block is entered; at least 0.

    Raises:
        ConfigError: if `seconds` is not a finite number of at least 0.
    """

    def __init__(self, seconds: float) -> None:
        if wrong := number(at_least=0)(seconds):
            raise ConfigError([Fault("deadline.seconds", f"{wrong}, got {seconds!r}")])
        self._seconds = seconds

    def _enter(self, outer: Scope) -> Scope:
        return Scope(outer, {}, time.monotonic() + self._seconds, self)


class behalf_of_attempt(_Block):
    """Calls made inside serve an attempt that another process has made of a call of its own (rule C10).

    If that is not its first one, the other process is retrying already. So the calls are not retried once they were
    sent, and tell the next hop the same; failovers go on, since they reach nobody twice.

    Args:
        number: what its `x-meshlib-attempt` says, from 1. Of nested blocks the innermost holds.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    def _enter(self, outer: Scope) -> Scope:
        return Scope(outer, {}, math.inf, self, self._number)


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be True or False"


def _timeout(value: Any) -> str | None:
    if isinstance(value, Timeout):
        return None
    wrong = number(above=0)(value)
    return wrong and f"{wrong} (seconds), or a Timeout"


def _key(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else "must be a string"


def _template(value: Any) -> str | None:
    usable = isinstance(value, str) and value != "" and "?" not in value
    return None if usable else "must be a path with names in it, for example '/v1/orders/{id}', and no query"


OPTIONS: dict[str, Rule] = {
    "timeout": _timeout,
    "idempotent": _flag,
    "hash_key": _key,
    "retry": _flag,
    "replayable": _flag,
    "body_deadline": _flag,
    "url_template": _template,
}


UNSAID = {"hash_key"}
"""Options whose value may be a secret, of whatever type."""


def checked(given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Hold options against their rules.

    Args:
        given: the options.
        where: how the user wrote them, for the message.

    Raises:
        TypeError, ConfigError: see `options`.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{where} must be a dict of options, for example {{'timeout': 2.0}}, got {type(given).__name__}"
        )
    if unknown := [name for name in given if name not in OPTIONS]:
        raise TypeError(f"{where} has no option {unknown[0]!r}; known: {', '.join(OPTIONS)}")
    faults = [
        Fault(name, f"{wrong}, got {type(given[name]).__name__ if name in UNSAID else repr(given[name])}")
        for name in given
        if (wrong := OPTIONS[name](given[name]))
    ]
    if faults:
        raise ConfigError(faults)
    return given
