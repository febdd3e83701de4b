"""The hosts file: names that this machine knows by itself.

Decides which addresses it lists for a name. It never looks further: what is not in it is for the DNS.
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

FILE = Path("/etc/hosts")

TTL = 10.0
"""Seconds after which to read it again: it may change, and has no way to say when."""


def addresses(name: str) -> list[str]:
    """The addresses of a name; none if it is not listed, or if the file cannot be read."""
    try:
        text = FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []  # a machine without the file knows no names, and so does one that hides it
    wanted = name.lower().removesuffix(".")
    return [address for line in text.splitlines() if (address := _listed(line, wanted)) is not None]


def _listed(line: str, wanted: str) -> str | None:
    first, *names = line.partition("#")[0].split() or [""]
    if wanted not in (name.lower().removesuffix(".") for name in names):
        return None
    try:
        return str(ip_address(first))
    except ValueError:
        return None
