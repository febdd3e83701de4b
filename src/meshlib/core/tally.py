"""What has happened to a service so far, as numbers that only grow.

Decides nothing: it is written by the cluster, its calls and the control plane, and read by whoever shows it. What is
true of a node alone is on the node; but nodes come and go, and these numbers must not shrink when one goes.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from meshlib.core.breaker import Fault, State

Decision = Literal[
    "retried",
    "not_repeatable",
    "not_retryable",
    "on_behalf",
    "switched_off",
    "attempts_exhausted",
    "deadline",
    "no_budget",
    "throttled",
    "strategy",
]
"""Whether another attempt followed one that ended badly, and if not, why:

- `retried`: one did, as a retry, a failover or a transparent one
- `not_repeatable`: the request must not be executed twice, or its body cannot be sent again
- `not_retryable`: the answer's status asks for none, or no endpoint has proved to be who it should be
- `on_behalf`: the caller is itself at work for a retry (rule C10)
- `switched_off`: by `options(retry=False)`
- `attempts_exhausted`: there were as many as there may be
- `deadline`: no time is left, or less than would have to be waited
- `no_budget`, `throttled`: the retry budget or the throttle would not have it
- `strategy`: neither would the user's `Retry(stop=, on=)`
"""


class Tally:
    """What has happened to a service; touched under the cluster's lock.

    Attributes:
        ejections: nodes taken out, by what was found (`manual`: by hand) and whether that was enforced.
        turns: changes of a breaker's state, by the new one.
        refusals: calls that were not let in, by who refused them.
        decisions: see `Decision`.
        checks: health checks, by whether they were passed.
        answers: what resolvers brought, by whether it was an answer, or an error.
        changes: how often the endpoints became others.
        dropped: endpoints left out of resolvers' answers, since no resolver may send us there (rule D5).
        bodies_died: answers whose body did not end well, after their headers had been handed out.
    """

    __slots__ = (
        "answers",
        "bodies_died",
        "changes",
        "checks",
        "decisions",
        "dropped",
        "ejections",
        "refusals",
        "turns",
    )

    def __init__(self) -> None:
        self.ejections: Counter[tuple[Fault | Literal["manual"], bool]] = Counter()
        self.turns: Counter[State] = Counter()
        self.refusals: Counter[Literal["limit", "throttle"]] = Counter()
        self.decisions: Counter[Decision] = Counter()
        self.checks: Counter[bool] = Counter()
        self.answers: Counter[bool] = Counter()
        self.changes = self.bodies_died = self.dropped = 0
