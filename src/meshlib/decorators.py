"""Functions that are given a client: what `mesh.call("orders")` makes of them.

Decides which functions can be, refuses the others when they are decorated, and when a fallback answers for one. The
clients are shared by all functions of a mesh: one for each service and colour, made at the first call. Nothing here
makes a call or repeats one: a function's body runs once, whatever becomes of the calls in it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Concatenate, ParamSpec, Protocol, TypedDict, TypeVar, get_args, overload

import httpx

from meshlib.errors import UnknownService
from meshlib.fork import inherited
from meshlib.policy import Timeout
from meshlib.scope import bound_to, checked, current_scope

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F")
F_co = TypeVar("F_co", covariant=True)

UNSAID: Any = object()
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


class Transports(Protocol):
    """What a mesh makes clients by."""

    def transport(self) -> httpx.BaseTransport: ...

    def async_transport(self) -> httpx.AsyncBaseTransport: ...


class SharedClients:
    """The clients of a mesh's decorated functions. They keep no cookies: those would go from one caller to the next."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bool], tuple[Any, Any]] = {}
        self.forget()
        inherited.add(self)

    def forget(self) -> None:
        """After a fork, in the child: nobody holds the lock. The clients see to their connections themselves."""
        self._lock = threading.Lock()

    def take(self, mesh: Transports, service: str, is_async: bool) -> Any:
        """The client of a service; a new one if somebody has closed the last."""
        key = service, is_async
        known = self._known.get(key)
        if known is None or known[0].is_closed:
            with self._lock:
                known = self._known.get(key)
                if known is None or known[0].is_closed:
                    known = self._known[key] = _made(mesh, service, is_async)
        return known[0]

    def close(self) -> None:
        """Close all, also from outside of the event loops that they were used on."""
        with contextlib.ExitStack() as stack:
            for (_, is_async), (client, transport) in self._taken():
                stack.callback(transport.shut if is_async else client.close)

    async def aclose(self) -> None:
        """Close all."""
        async with contextlib.AsyncExitStack() as stack:
            for (_, is_async), (client, _) in self._taken():
                if is_async:
                    stack.push_async_callback(client.aclose)
                else:
                    stack.callback(client.close)

    def _taken(self) -> list[tuple[tuple[str, bool], tuple[Any, Any]]]:
        with self._lock:
            known, self._known = self._known, {}
        return list(known.items())


def _made(mesh: Transports, service: str, is_async: bool) -> tuple[Any, Any]:
    from meshlib.transport.cookies import spare

    settings: dict[str, Any] = {"base_url": f"http://{service}", "timeout": None, "trust_env": False}
    client: httpx.Client | httpx.AsyncClient
    transport: Any
    if is_async:
        transport = mesh.async_transport()
        client = httpx.AsyncClient(transport=transport, **settings)
    else:
        transport = mesh.transport()
        client = httpx.Client(transport=transport, **settings)
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    spare(client)
    return client, transport


class Injection:
    """What `Mesh.call` returns.

    Args:
        mesh: whose service it is.
        clients: the mesh's.
        service: its name.
        bound: what tells it from those of other meshes.
        given: the options, with a function of the arguments in the place of the key, or without.
        fallback: what to return, or a function of the arguments; `UNSAID` if there is none.

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
        plain = {name: value for name, value in given.items() if name != "hash_key" or self._key is None}
        self._options = checked(plain, "mesh.call()")
        self._mesh = mesh
        self._clients = clients
        self._service = service
        self._bound = bound
        self._fallback = fallback
        self._caught: tuple[type[Exception], ...] = ()
        if fallback is not UNSAID:
            self._caught = httpx.TransportError, httpx.HTTPStatusError

    def __call__(self, function: Callable[..., Any], /) -> Callable[..., Any]:
        """Decorate a function.

        Raises:
            TypeError: if it cannot be given a client, or one of the options does not fit it.
        """
        is_async = _is_async(function)
        name = _name(function)
        rest = _without_client(function, name, is_async)
        key = None if self._key is None else _reader("hash_key", self._key, name, rest)
        answer = self._answer(name, rest, is_async)
        make = self._asynchronous if is_async else self._synchronous
        wrapper = functools.wraps(function)(make(function, key, answer))
        wrapper.__signature__ = rest  # type: ignore[attr-defined]
        wrapper.__annotations__ = _annotations(rest)
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
        if not is_async and _is_async(fallback):
            raise TypeError(f"the fallback of {name} must not be async, since {name} is not")
        return _reader("fallback", fallback, name, rest, error="error")


def is_answered(error: Exception) -> bool:
    """Whether a fallback answers for an exception: for a service that is not well, not for a mistake of ours."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return not isinstance(error, UnknownService)


def _key(found: Any) -> str | None:
    if found is None or isinstance(found, str):
        return found
    raise TypeError(f"the function of mesh.call(hash_key=...) must return a str or None, got {type(found).__name__}")


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _name(function: Any) -> str:
    """The function's name, if it can be decorated at all."""
    if isinstance(function, staticmethod | classmethod | type) or not callable(function):
        raise TypeError(f"mesh.call() decorates functions, got {_described(function)}")
    name: str = getattr(function, "__qualname__", "") or f"the {type(function).__name__}"
    inside = inspect.unwrap(function)
    if any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in (function, inside)):
        raise TypeError(f"mesh.call() cannot decorate the generator {name}: take a client inside")
    around = name.rpartition(".")[0]
    if inspect.ismethod(function) or (around and not around.endswith("<locals>")):
        raise TypeError(_METHOD.format(name))
    return name


_METHOD = (
    "mesh.call() cannot decorate the method {}, which has its object in the place of the client: "
    "give the object a client, mesh.client(...), and the method options(...)"
)


def _described(given: Any) -> str:
    if isinstance(given, staticmethod | classmethod):
        return f"the {type(given).__name__} {given.__qualname__}, which needs none of this: give its class a client"
    return f"the class {given.__qualname__}" if isinstance(given, type) else f"an object of type {type(given).__name__}"


def _without_client(function: Callable[..., Any], name: str, is_async: bool) -> inspect.Signature:
    """The signature that is left when the client is taken out, with annotations in the place of their names.

    Raises:
        TypeError: if there is nowhere to put the client, or something else is expected there.
    """
    signature = _signature(function)
    parameters = [_resolved(each, function) for each in signature.parameters.values()]
    client = httpx.AsyncClient if is_async else httpx.Client
    first = parameters[0] if parameters else None
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        example = f"{'async ' if is_async else ''}def {name}(client: httpx.{client.__name__}, ...)"
        raise TypeError(f"{name} has no parameter for the client: {example}")
    if first.name in ("self", "cls"):
        raise TypeError(_METHOD.format(name))
    if not _fits(first.annotation, client):
        raise TypeError(
            f"{name} gets an httpx.{client.__name__}, since it is {'an' if is_async else 'no'} 'async def'; "
            f"its first parameter is {first}"
        )
    taken = 0 if first.kind is first.VAR_POSITIONAL else 1
    returned = _evaluated(signature.return_annotation, function)
    return signature.replace(parameters=parameters[taken:], return_annotation=returned)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):  # where names that are there for type checkers alone would raise
        from annotationlib import Format

        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)


def _resolved(parameter: inspect.Parameter, function: Callable[..., Any]) -> inspect.Parameter:
    return parameter.replace(annotation=_evaluated(parameter.annotation, function))


def _evaluated(annotation: Any, function: Any) -> Any:
    """What an annotation in quotes stands for, if that is there at run time."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    except Exception:
        return annotation


def _fits(annotation: Any, client: type) -> bool:
    """Whether a parameter of that type may be given the client, as far as it says."""
    if getattr(annotation, "__metadata__", None) is not None:
        annotation = get_args(annotation)[0]
    if isinstance(annotation, type) and annotation is not inspect.Parameter.empty:
        try:
            return issubclass(client, annotation)
        except TypeError:  # a protocol that is for type checkers alone
            return True
    written = getattr(annotation, "__forward_arg__", annotation)
    wrong = "Client" if client is httpx.AsyncClient else "AsyncClient"
    return not (isinstance(written, str) and written.strip("'\" ").rpartition(".")[2] == wrong)


def _annotations(signature: inspect.Signature) -> dict[str, Any]:
    found = {each.name: each.annotation for each in signature.parameters.values() if each.annotation is not each.empty}
    if signature.return_annotation is not signature.empty:
        found["return"] = signature.return_annotation
    return found


def _reader(
    what: str, given: Callable[..., Any], name: str, rest: inspect.Signature, error: str = ""
) -> Callable[[Any, Any, Any], Any]:
    """A user's function of some of the arguments, which it names, as a function of all of them.

    Args:
        what: which option it is.
        given: the user's function.
        name, rest: of the decorated function, the client left out.
        error: what it calls the exception, if there is one to tell.

    Raises:
        TypeError: if it asks for something that there is not.
    """
    try:
        wanted = list(_signature(given).parameters.values())
    except ValueError:  # some built-in classes have none, such as `dict`
        return lambda args, kwargs, raised: given()
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in wanted):
        return lambda args, kwargs, raised: given(*args, **kwargs)
    known = [*rest.parameters, *filter(None, [error])]
    names = [each.name for each in wanted if each.name in known and each.kind is not each.POSITIONAL_ONLY]
    for each in wanted:
        if each.name not in names and each.default is each.empty:
            there = ", ".join(known) or "none"
            raise TypeError(f"{what} of {name} takes {each.name!r}, which is none of its arguments: {there}")

    def read(args: Any, kwargs: Any, raised: Any) -> Any:
        bound = rest.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = {error: raised, **bound.arguments}
        return given(**{each: arguments[each] for each in names})

    return read
