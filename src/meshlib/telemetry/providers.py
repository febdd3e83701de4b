"""Where OpenTelemetry's providers come from.

Decides whether there is one that records. The process's own may be set long after the mesh was made, so it is looked
for again and again; while nobody has loaded OpenTelemetry's API, nobody can have set one. It never sets one.
"""

from __future__ import annotations

import sys
from typing import Any

_OF_THE_API = ("opentelemetry.metrics", "opentelemetry.trace")


def recording(given: Any, module: str, getter: str) -> Any:
    """The provider that records, None if there is none.

    Args:
        given: what the mesh was given; None for the process's.
        module, getter: what gives the process's.
    """
    if given is None or stands_in(given):
        get = getattr(sys.modules.get(module), getter, None)
        given = None if get is None else get()
    return None if given is None or _is_of_the_api(given) else given


def may_change(given: Any) -> bool:
    """Whether there may be one that records later, if there is none now."""
    return given is None or stands_in(given)


def stands_in(provider: Any) -> bool:
    """Whether it is what the API gives out before the process's provider is set."""
    return _is_of_the_api(provider) and "Proxy" in type(provider).__name__


def _is_of_the_api(provider: Any) -> bool:
    """Those that come with the API record nothing."""
    return type(provider).__module__.startswith(_OF_THE_API)
