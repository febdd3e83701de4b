"""What a resolver is asked, and what it answers.

Decides the shape of both, and when an object cannot be a resolver. It never asks one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from meshlib.endpoint import Endpoint


@dataclass(frozen=True)
class Resolution:
    """What a resolver found: the whole set.

    Args:
        endpoints: all of them; a host may be a name, which is then looked up in the DNS.
        ttl: seconds after which to ask again; None to ask again at once, for a resolver that then waits until there is
            something newer.
        index: whatever the resolver wants to find in `previous` when it is asked again.
        warnings: what people should know of this answer: that it may be old, that a part of it was left out.
    """

    endpoints: Sequence[Endpoint]
    ttl: float | None
    index: Any = None
    warnings: Sequence[str] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "endpoints", tuple(self.endpoints))
        warnings = (self.warnings,) if isinstance(self.warnings, str) else tuple(self.warnings)
        object.__setattr__(self, "warnings", warnings)


@runtime_checkable
class Resolver(Protocol):
    """Anything that knows the endpoints of a service.

    It may have three more attributes: `source`, which says in a word or a URL where its answers come from, for people;
    `watch_key`, a hashable value by which two services share one watch instead of asking for the same twice; and
    `pace`, the seconds from each of its answers or errors to the next question, where ours are not wanted.
    """

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        """Find the endpoints.

        Args:
            service: the name of the service that asks.
            previous: the answer before, if there is one to wait for something newer than; None wants an answer now.

        Raises:
            Exception: whatever went wrong; the last good answer stays in force, and the resolver is asked again.
        """
        ...


def source_of(resolver: Resolver) -> str:
    """Where a resolver's answers come from, for people."""
    return str(getattr(resolver, "source", None) or type(resolver).__name__)


def wrong_with(resolver: Any) -> str | None:
    """What would be right, and what this is instead, if it cannot be a resolver; else None."""
    import inspect  # only what is not built in is looked at

    if isinstance(resolver, type):
        return f"must be a resolver, {resolver.__name__}(...), got the class"
    given = f"got an object of type {type(resolver).__name__}"  # whose repr may show a token
    resolve = getattr(resolver, "resolve", None)
    if not callable(resolve):
        return f"must be a resolver URL or an object with 'async def resolve(self, service, previous)', {given}"
    if inspect.isroutine(resolve) and not inspect.iscoroutinefunction(inspect.unwrap(resolve)):
        return f"must be a resolver whose 'resolve' is an 'async def', {given}"
    try:
        source_of(resolver)
    except Exception as error:  # it may be a property, or have a `__str__`, of the user's
        return f"must be a resolver whose 'source' can be told, {given}: it raised {type(error).__name__}"
    try:
        hash(getattr(resolver, "watch_key", None))
    except TypeError:
        return f"must be a resolver whose 'watch_key' is hashable, {given}"
    return None
