"""Functions that are to be given a client: what they look like, and what is left of them for callers.

Decides which functions can be decorated, whether their parameter fits the client that they would get, and how a user's
function of some of the arguments is asked. It makes no client, and no call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

import httpx


def is_coroutine_function(function: Any) -> bool:
    """Whether it is, or is called like, an `async def`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def name_of(function: Any) -> str:
    """The function's name, if it can be decorated at all.

    Raises:
        TypeError: if not.
    """
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


def without_client(function: Callable[..., Any], name: str, is_async: bool) -> inspect.Signature:
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
    except Exception:  # whatever evaluating it raises: it is for type checkers alone then
        return annotation


def _fits(annotation: Any, client: type) -> bool:
    """Whether a parameter of that type may be given the client, as far as it says."""
    if getattr(annotation, "__metadata__", None) is not None:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return any(_fits(each, client) for each in get_args(annotation))
    if annotation in (Any, inspect.Parameter.empty):
        return True
    if isinstance(annotation, type):
        try:
            return issubclass(client, annotation)
        except TypeError:  # a protocol that is for type checkers alone
            return True
    written = getattr(annotation, "__forward_arg__", annotation)
    wrong = "Client" if client is httpx.AsyncClient else "AsyncClient"
    return not (isinstance(written, str) and written.strip("'\" ").rpartition(".")[2] == wrong)


def annotations_of(signature: inspect.Signature) -> dict[str, Any]:
    """What a function with this signature has as `__annotations__`."""
    found = {each.name: each.annotation for each in signature.parameters.values() if each.annotation is not each.empty}
    if signature.return_annotation is not signature.empty:
        found["return"] = signature.return_annotation
    return found


def reader(
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
        return _of_all(what, given, name, [each for each in wanted if each.name == error not in rest.parameters])
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


def _of_all(
    what: str, given: Callable[..., Any], name: str, errors: list[inspect.Parameter]
) -> Callable[[Any, Any, Any], Any]:
    """See `reader`; for a function of all arguments, whatever they are, and maybe of the exception."""
    for each in errors:
        if each.kind is not each.KEYWORD_ONLY:
            raise TypeError(
                f"{what} of {name} takes all arguments, so {each.name!r} has to stand behind a star: "
                f"def {what}(*args, {each.name}, **kwargs)"
            )
    return lambda args, kwargs, raised: given(*args, **kwargs, **{each.name: raised for each in errors})
