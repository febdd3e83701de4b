"""The running process as an endpoint for others: its registration at Consul, from its first answer to its leaving.

One registration, in the order of what happens:

- `entry` says what Consul is told, and by which name;
- `readiness` knows when the application's port answers, `liveness` whether the application does;
- `ownership` says which worker of a host speaks for all of them, and who is the last to leave;
- `pulse` says when the next heartbeat is due;
- `registration` does all this, on the mesh's control plane;
- `departure` holds signals and the exit of the process up until the registry knows.
"""

from meshlib.registry.entry import Entry
from meshlib.registry.registration import Registration

__all__ = ["Entry", "Registration"]
