"""Functions that are given a client: what `mesh.call("orders")` makes of them.

Decides what holds for the calls in such a function, and when a fallback answers for it; which functions may have one
is decided in `meshlib.signatures`. All functions of a mesh share its clients: one for each service and colour, made at
the first call. Nothing here makes a call or repeats one: a body runs once, whatever becomes of the calls in it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, TypedDict, TypeVar, overload

import httpx

from meshlib.clients import SharedClients, Transports
from meshlib.errors import UnknownService
from meshlib.policy import Timeout
from meshlib.scope import bound_to, checked, current_scope
from meshlib.signatures import annotations_of, is_coroutine_function, name_of, reader, without_client

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F")
F_co = TypeVar("F_co", covariant=True)

MISSING: Any = object()
"""Stands for a fallback that was not given: None is one."""


class CallOptions(TypedDict, total=False):
    """The options of a decorated function; see `meshlib.options`."""

    timeout: float | Timeout
    idempotent: bool
    hash_key: str | Callable[..., str | None]
    retry: bool
    replayable: bool
    body_deadline: bool
    url_template: str


class Injecting(Protocol):
    """Decorates a function that has no fallback."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[httpx.AsyncClient, P], Coroutine[Any, Any, R]], /
    ) -> Callable[P, Coroutine[Any, Any, R]]: ...

    @overload
    def __call__(self, function: Callable[Concatenate[httpx.Client, P], R], /) -> Callable[P, R]: ...


class InjectingOr(Protocol[F_co]):
    """Decorates a function with a fallback."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[httpx.AsyncClient, P], Coroutine[Any, Any, R]], /
    ) -> Callable[P, Coroutine[Any, Any, R | F_co]]: ...

    @overload
    def __call__(self, function: Callable[Concatenate[httpx.Client, P], R], /) -> Callable[P, R | F_co]: ...


class InjectingOrAwaiting(Protocol[F_co]):
    """Decorates an async function with an async fallback."""

    def __call__(
        self, function: Callable[Concatenate[httpx.AsyncClient, P], Coroutine[Any, Any, R]], /
    ) -> Callable[P, Coroutine[Any, Any, R | F_co]]: ...


class Injection:
    """What `Mesh.call` returns.

    Args:
        mesh: whose service it is.
        clients: the mesh's.
        service: its name.
        bound: what tells it from those of other meshes.
        given: the options, with a function of the arguments in the place of the key, or without.
        fallback: what to return, or a function of the arguments; `MISSING` if there is none.

    Raises:
        TypeError, ConfigError: for options that cannot be.
    """

    def __init__(
        self,
        mesh: Transports,
        clients: SharedClients,
        service: str,
        bound: object,
        given: Mapping[str, Any],
        fallback: Any,
    ) -> None:
        key = given.get("hash_key")
        self._key = key if callable(key) else None
        if isinstance(key, type):
            raise TypeError(f"hash_key must be a string, or a function of the arguments, got the class {key.__name__}")
        if self._key is not None and is_coroutine_function(self._key):
            raise TypeError("the function of mesh.call(hash_key=...) must not be async: it is asked before the call")
        plain = {name: value for name, value in given.items() if name != "hash_key" or self._key is None}
        self._options = checked(plain, "mesh.call()")
        self._mesh = mesh
        self._clients = clients
        self._service = service
        self._bound = bound
        self._fallback = fallback
        self._caught: tuple[type[Exception], ...] = ()
        if fallback is not MISSING:
            self._caught = httpx.TransportError, httpx.HTTPStatusError

    def __call__(self, function: Callable[..., Any], /) -> Callable[..., Any]:
        """Decorate a function.

        Raises:
            TypeError: if it cannot be given a client, or one of the options does not fit it.
        """
        is_async = is_coroutine_function(function)
        name = name_of(function)
        rest = without_client(function, name, is_async)
        key = None if self._key is None else reader("hash_key", self._key, name, rest)
        answer = self._answer(name, rest, is_async)
        make = self._asynchronous if is_async else self._synchronous
        wrapper = functools.wraps(function)(make(function, key, answer))
        wrapper.__signature__ = rest  # type: ignore[attr-defined]
        wrapper.__annotations__ = annotations_of(rest)
        return wrapper

    def _synchronous(self, function: Callable[..., Any], key: Any, answer: Any) -> Callable[..., Any]:
        def synchronous(*args: Any, **kwargs: Any) -> Any:
            scope = self._scope(key, args, kwargs)
            try:
                with scope:
                    return function(self._clients.take(self._mesh, self._service, False), *args, **kwargs)
            except self._caught as error:
                if not is_answered(error):
                    raise
                return answer(args, kwargs, error)

        return synchronous

    def _asynchronous(self, function: Callable[..., Any], key: Any, answer: Any) -> Callable[..., Any]:
        async def asynchronous(*args: Any, **kwargs: Any) -> Any:
            scope = self._scope(key, args, kwargs)
            try:
                with scope:
                    return await function(self._clients.take(self._mesh, self._service, True), *args, **kwargs)
            except self._caught as error:
                if not is_answered(error):
                    raise
                answered = answer(args, kwargs, error)
                return await answered if callable(self._fallback) and inspect.isawaitable(answered) else answered

        return asynchronous

    def _scope(self, key: Any, args: Any, kwargs: Any) -> contextlib.AbstractContextManager[None]:
        """The block of one call, which says what holds for what it sends to the service."""
        if key is not None:
            return bound_to(self._bound, {**self._options, "hash_key": _key(key(args, kwargs, None))})
        if self._options or self._bound in current_scope().bound:
            return bound_to(self._bound, self._options)
        return contextlib.nullcontext()

    def _answer(self, name: str, rest: inspect.Signature, is_async: bool) -> Callable[[Any, Any, Any], Any]:
        """What the fallback says of the arguments and the exception."""
        fallback = self._fallback
        if not callable(fallback):
            return lambda args, kwargs, error: fallback
        if not is_async and is_coroutine_function(fallback):
            raise TypeError(f"the fallback of {name} must not be async, since {name} is not")
        return reader("fallback", fallback, name, rest, error="error")


def is_answered(error: Exception) -> bool:
    """Whether a fallback answers for an exception: for a service that is not well, not for a mistake of ours."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return not isinstance(error, UnknownService)


def _key(found: Any) -> str | None:
    if found is None or isinstance(found, str):
        return found
    raise TypeError(f"the function of mesh.call(hash_key=...) must return a str or None, got {type(found).__name__}")
