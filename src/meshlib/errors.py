"""What meshlib raises from a call.

Decides the classes and their wording, and which of httpx's own errors each of them is as well, so that code written
for httpx keeps catching what it used to catch. It never decides when one is raised. Bad settings raise `ConfigError`,
which is not an error of a call and so lives beside the rules, in `meshlib.validation`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpx

from meshlib.plain import plain
from meshlib.validation import ConfigError, Fault, bare, meant, shown

__all__ = [
    "ConfigError",
    "DeadlineExceeded",
    "Fault",
    "IdentityError",
    "MeshError",
    "NoEndpoints",
    "Overloaded",
    "ResolveError",
    "UnknownService",
]


class MeshError(httpx.TransportError):
    """A call that meshlib could not make or finish. An `httpx.TransportError`, so existing handlers see it."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the request, which httpx puts there: its headers and its body are nobody's who reads a pickle.
        told = {name: value for name, value in vars(self).items() if name != "_request"}
        return type(self), self.args, told


class UnknownService(MeshError):
    """The URL's host is not a declared service.

    Args:
        name: the host that was asked for. If it is a whole URL, nothing is kept that may be a password in it.
        known: the declared names.
        hint: what to do about it, where more is known than the name.
    """

    def __init__(self, name: str, known: Iterable[str] = (), hint: str = "") -> None:
        self.name, self.known, self.hint = bare(name), tuple(sorted(known)), hint
        super().__init__(f"no service {plain(shown(name))} in this mesh{_pointer(name, self.known, hint)}")

    def __reduce__(self) -> tuple[type[UnknownService], tuple[str, tuple[str, ...], str]]:
        return type(self), (self.name, self.known, self.hint)


class NoEndpoints(MeshError):
    """The service has no endpoint that a call could be sent to."""


class ResolveError(MeshError):
    """Where a service's endpoints are to be found out, they were not: the resolver has no answer, or a bad one."""


class Overloaded(MeshError):
    """The call was refused here, before anything was sent: by the service's `Throttle`, or by its `Limit`."""


class IdentityError(MeshError):
    """No endpoint proved to be who it should be: the certificate of the last one tried is not valid, or another's.

    Nothing was sent to it. It is no `httpx.ConnectError`: somebody was there.
    """


class DeadlineExceeded(MeshError, httpx.TimeoutException):
    """The call's total time ran out. An `httpx.TimeoutException` as well."""


def _pointer(name: str, known: tuple[str, ...], hint: str) -> str:
    if hint:
        return f": {hint}"
    return f"{meant(name, known)} (known: {', '.join(known) or 'none'})"
