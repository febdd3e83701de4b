"""Knot, a real DNS server, for tests.

Decides where its program comes from (the machine's own, or else a Debian package), how it is set up and how its records
change while it runs. It never answers anything itself.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import dns.exception
import dns.message
import dns.query
import dns.rcode
import dns.update

from components.absence import Missing
from components.debian import fetch, libraries
from components.process import Ports, Process

SUITE = "bookworm"
PACKAGES = ["knot", "libknot13", "libdnssec9", "libzscanner4", "liblmdb0", "liburcu8"]
PACKAGES += ["libbpf1", "libxdp1", "libcap-ng0", "libelf1"]

ZONE = "mesh.test"
BROKEN = "broken.test"
"""A zone whose file is missing: SERVFAIL."""

ZONE_FILE = f"""
$ORIGIN {ZONE}.
$TTL 2
@                    SOA   ns root 1 60 60 3600 1
@                    NS    ns
ns                   A     127.0.0.1
a                    A     127.0.0.1
b                    A     127.0.0.2
c                    A     127.0.0.3
both                 A     127.0.0.4
both                 AAAA  ::1
empty                TXT   "a name without addresses"
alias                CNAME twice
twice                CNAME both
away                 CNAME elsewhere.example.
_http._tcp.web       SRV   10 60 9001 a
_http._tcp.web       SRV   10 40 9002 b
_http._tcp.web       SRV   20 1 9003 c
_http._tcp.both      SRV   1 1 9004 both
_http._tcp.none      SRV   0 0 0 .
_http._tcp.alias     CNAME _http._tcp.web
"""

SETTINGS = """
server:
  rundir: {folder}
  listen: 127.0.0.1@{port}
  udp-workers: 1
  tcp-workers: 1
  background-workers: 1
log:
  - target: stderr
    any: warning
database:
  storage: {folder}
acl:
  - id: here
    address: 127.0.0.0/8
    action: update
zone:
  - domain: {zone}
    storage: {folder}
    file: zone
    acl: here
  - domain: {broken}
    storage: {folder}
    file: missing
"""


@cache
def program() -> tuple[str, dict[str, str] | None]:
    """The program, and the environment it needs.

    Raises:
        Missing: if it is not to be had.
    """
    if own := shutil.which("knotd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"):
        return own, None
    root = fetch(SUITE, PACKAGES)
    found = root / "usr/sbin/knotd"
    if not found.exists():
        raise Missing("its package has no knotd")
    return str(found), libraries(root)


class Knot:
    """A server with the zone above on a free port of loopback; it takes updates from there."""

    def __init__(self) -> None:
        self._program, self._environment = program()
        # The path of its control socket may not be longer than 107 characters, which pytest's folders are.
        self._folder = tempfile.TemporaryDirectory(prefix="knot-")
        self._ports = _free_port()
        self.port = self._ports["dns"]
        self.place = f"127.0.0.1:{self.port}"
        folder = Path(self._folder.name)
        (folder / "zone").write_text(ZONE_FILE)
        settings = SETTINGS.format(folder=folder, port=self.port, zone=ZONE, broken=BROKEN)
        (folder / "knot.conf").write_text(settings)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()
        self._ports.close()
        self._folder.cleanup()

    def start(self) -> None:
        """Start it, and wait until it answers by UDP and TCP."""
        folder = Path(self._folder.name)
        command = [self._program, "-c", str(folder / "knot.conf")]
        self._process = Process(command, folder / "log", self._environment)
        self._process.wait_until(lambda: self._answers(dns.query.udp) and self._answers(dns.query.tcp))

    def stop(self) -> None:
        """Stop it; its records stay."""
        self._process.stop()

    def set(self, name: str, kind: str, *values: str, ttl: int = 2) -> None:
        """Replace the records of a name and type, over the wire (RFC 2136); without values, remove them."""
        update = dns.update.UpdateMessage(f"{ZONE}.")
        update.delete(name, kind)
        for value in values:
            update.add(name, ttl, kind, value)
        response = dns.query.tcp(update, "127.0.0.1", port=self.port, timeout=10)
        assert response.rcode() == dns.rcode.NOERROR, dns.rcode.to_text(response.rcode())

    def _answers(self, query: Callable[..., dns.message.Message]) -> bool:
        question = dns.message.make_query(f"{ZONE}.", "SOA")
        try:
            return bool(query(question, "127.0.0.1", port=self.port, timeout=0.1).answer)
        except (dns.exception.Timeout, OSError, EOFError):
            return False


def _free_port() -> Ports:
    """A port that is free by TCP and UDP."""
    while True:
        ports = Ports("dns")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            try:
                udp.bind(("127.0.0.1", ports["dns"]))
            except OSError:
                ports.close()
            else:
                return ports
