"""What tests of code that uses meshlib need: faults below a mesh, a clock and a resolver to turn by hand, retries that
do not wait, and real upstreams to break."""

from meshlib.testing.backoff import no_backoff
from meshlib.testing.clock import ManualClock
from meshlib.testing.faults import Faults, faults
from meshlib.testing.harness import BalancerHarness
from meshlib.testing.resolver import ManualResolver
from meshlib.testing.upstream import Upstream, upstreams

__all__ = [
    "BalancerHarness",
    "Faults",
    "ManualClock",
    "ManualResolver",
    "Upstream",
    "faults",
    "no_backoff",
    "upstreams",
]
