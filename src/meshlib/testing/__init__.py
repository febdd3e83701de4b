"""What tests of code that uses meshlib need: a clock to turn by hand, and real upstreams to break."""

from meshlib.testing.clock import ManualClock
from meshlib.testing.harness import BalancerHarness
from meshlib.testing.upstream import Upstream, upstreams

__all__ = ["BalancerHarness", "ManualClock", "Upstream", "upstreams"]
