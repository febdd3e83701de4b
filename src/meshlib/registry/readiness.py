"""Whether the application's port answers.

Decides where it is looked for, and what counts: that somebody accepts a connection, which is closed at once. It never
sends a byte. Run on the control plane.
"""

from __future__ import annotations

import asyncio
import socket

from meshlib.registry.entry import Entry

WITHIN = 1.0
"""Seconds for a connection."""


async def answers(entry: Entry) -> bool:
    """Whether the port takes connections, on loopback or at the host that is told to others.

    Loopback first: behind an address translation the host may not be reached from within.
    """
    hosts = dict.fromkeys(["127.0.0.1", "::1", entry.host or socket.gethostname()])
    for host in hosts:
        try:
            async with asyncio.timeout(WITHIN):
                _, writer = await asyncio.open_connection(host, entry.port)
        except (OSError, TimeoutError):
            continue
        writer.close()
        return True
    return False
