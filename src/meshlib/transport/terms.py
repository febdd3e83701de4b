"""What holds for a call: its service's settings, under the options of its request and of the blocks around it.

Decides how they add up. Most calls come without options, so what the service says is worked out once, with the route to
it, and shared by them all. Nothing here makes a call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from meshlib.core.cluster import Cluster
from meshlib.core.outcome import REJECTING
from meshlib.policy import Timeout
from meshlib.scope import checked, current_scope
from meshlib.service import Service
from meshlib.transport.keys import key_of
from meshlib.transport.network import Clock


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for a call.

    Attributes:
        total, attempt, connect: see `Timeout`.
        idempotent: whether the request may be executed twice; None leaves that to the request.
        retries: whether there may be more than one attempt.
        key: what a consistent hash goes by.
        body_deadline: whether the deadline bounds the body of the answer as well.
        recorded: how many bytes of a body that is not bytes already are kept for another attempt.
        template: what telemetry calls the URL's path; None for nothing.
    """

    total: float
    attempt: float
    connect: float
    recorded: float
    idempotent: bool | None = None
    retries: bool = True
    key: str | None = None
    body_deadline: bool = True
    template: str | None = None

    @classmethod
    def of(cls, timeout: Timeout, recorded: float, options: Mapping[str, Any]) -> Terms:
        """What the timeout and the options come to."""
        return cls(
            timeout.total,
            timeout.attempt,
            timeout.connect,
            math.inf if options.get("replayable") else recorded,
            options.get("idempotent"),
            options.get("retry", True),
            options.get("hash_key"),
            options.get("body_deadline", True),
            options.get("url_template"),
        )


class Route:
    """The way to a service, as it is set at the moment.

    Args:
        cluster: the service's live state.
        service: its settings.
        clock: the mesh's.
        send_deadline: whether the next hop is told what is left of the call's time.
        host: the `Host` header to send instead of the URL's, or `"endpoint"`; None for the URL's.

    Attributes:
        key_of: how a request's key is found; None if the balancer goes by none.
        name: the service's.
        scheme: what its endpoints are spoken to by.
        methods: those of its repeatable requests.
        unwell: the statuses that are rejections or worth another attempt. Any other is the call's answer.
        terms: what holds for a call without options.
    """

    __slots__ = (
        "clock",
        "cluster",
        "host",
        "key_of",
        "methods",
        "name",
        "scheme",
        "send_deadline",
        "service",
        "terms",
        "unwell",
    )

    def __init__(self, cluster: Cluster, service: Service, clock: Clock, send_deadline: bool, host: str | None) -> None:
        self.cluster = cluster
        self.clock = clock
        self.send_deadline = send_deadline
        self.host = host
        self.service = service
        self.name = service.name
        self.scheme = "http" if service.tls is None else "https"
        self.methods = service.retry.methods
        self.unwell = REJECTING.union(service.retry.on_status)
        self.key_of = key_of(service.balancer)
        self.terms = Terms.of(service.timeout, service.retry.buffer_body, {})

    def terms_under(self, own: Any) -> tuple[Terms, float]:
        """The terms under a request's own options and those of the blocks around it, and the seconds they leave.

        Precedence: the request's extension, the nearest block, the service.

        Raises:
            TypeError, ConfigError: for options that cannot be.
        """
        scope, timeout = current_scope(), self.service.timeout
        options = scope.options_for(self.cluster)
        if own:
            options = {**options, **checked(own, "extensions['meshlib']")}
        if (given := options.get("timeout")) is not None:
            timeout = given if isinstance(given, Timeout) else replace(timeout, total=given)
        # Blocks measure by the real clock, since they belong to no mesh; what is left is the same on every clock.
        left = scope.deadline - time.monotonic() if scope.deadline < math.inf else math.inf
        return Terms.of(timeout, self.service.retry.buffer_body, options), left
