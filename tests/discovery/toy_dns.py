"""A DNS server in this process, for what a real one will not do: it breaks in any way it is told to, and remembers
every question with its time.

It runs in a thread of its own, on UDP and TCP of one port, and answers from a plain dict that tests change meanwhile.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

RCODES = ("SERVFAIL", "REFUSED", "NXDOMAIN", "NODATA", "FORMERR", "NOTIMP")

FAULTS = (*RCODES, "silence", "wrong id", "garbage", "truncated", "cut", "hang up")
"""`truncated`: UDP answers are empty and say so. `cut`: UDP answers have three records and do not say so. `hang up`:
TCP connections are closed without an answer."""


@dataclass(frozen=True)
class Query:
    """A question that arrived."""

    at: float
    name: str
    kind: str
    transport: str
    payload: int
    """What the asker takes by UDP, by EDNS; 0 without."""


@dataclass
class ToyDns:
    """Args:
    additional: whether the addresses of SRV targets are sent along.
    soa: the negative TTL; None leaves the SOA record out.
    chase: whether an alias is followed in one answer, as far as it is known here.
    """

    additional: bool = True
    soa: int | None = 7
    chase: bool = True
    delay: float = 0.0
    port: int = 0
    address: str = "127.0.0.1"
    queries: list[Query] = field(default_factory=list)
    faults: dict[tuple[str, str], str] = field(default_factory=dict)
    """By name and type, "*" for any."""

    records: dict[tuple[str, str], dns.rrset.RRset] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.address}:{self.port}"

    def set(self, name: str, kind: str, *values: str, ttl: int = 30) -> None:
        """Replace the records of a name and type; without values, remove them."""
        if values:
            self.records[name, kind] = dns.rrset.from_text(f"{name}.", ttl, "IN", kind, *values)
        else:
            self.records.pop((name, kind), None)

    def fail(self, fault: str | None, name: str = "*", kind: str = "*") -> None:
        """Fail in this way from now on; None ends it."""
        assert fault is None or fault in FAULTS
        if fault is None:
            self.faults.pop((name, kind), None)
        else:
            self.faults[name, kind] = fault

    def asked(self) -> list[tuple[str, str, str]]:
        """What was asked, in the order of names, without the times."""
        return sorted((query.name, query.kind, query.transport) for query in self.queries)

    def __enter__(self) -> ToyDns:
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._ended = asyncio.Event()
        tcp = udp = None
        while tcp is None:
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            udp.bind((self.address, self.port))
            try:
                tcp = await asyncio.start_server(self._converse, *udp.getsockname())
            except OSError:  # somebody else has this one's TCP side
                udp.close()
                assert not self.port
        assert udp is not None
        transport, _ = await self._loop.create_datagram_endpoint(lambda: _Datagrams(self), sock=udp)
        self.port = tcp.sockets[0].getsockname()[1]
        self._started.set()
        await self._ended.wait()
        transport.close()
        tcp.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(2), "big")
                wire = self.answer(await reader.readexactly(length), "tcp")
                await asyncio.sleep(self.delay)
                if wire == b"":
                    break
                if wire is not None:
                    writer.write(len(wire).to_bytes(2, "big") + wire)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def answer(self, wire: bytes, transport: str) -> bytes | None:
        """The answer to a question; None is silence, and nothing at all hangs up."""
        query = dns.message.from_wire(wire)
        name = query.question[0].name.canonicalize().to_text(True)
        kind = dns.rdatatype.to_text(query.question[0].rdtype)
        self.queries.append(Query(time.monotonic(), name, kind, transport, query.payload if query.edns >= 0 else 0))
        fault = next(
            (self.faults[key] for key in ((name, kind), (name, "*"), ("*", kind), ("*", "*")) if key in self.faults),
            "",
        )
        response = dns.message.make_response(query)
        if fault in RCODES:
            self._refuse(response, name, fault)
        else:
            self._fill(response, name, kind)
        return self._broken(response, fault, transport, query)

    def _broken(
        self, response: dns.message.Message, fault: str, transport: str, query: dns.message.Message
    ) -> bytes | None:
        if fault == "silence":
            return None
        if fault == "garbage":
            return b"\xff" * 40
        if fault == "hang up" and transport == "tcp":
            return b""
        if fault == "wrong id":
            response.id ^= 1
        if transport == "tcp":
            return response.to_wire(max_size=65535)
        if fault == "cut":
            response.answer = [
                dns.rrset.from_rdata_list(each.name, each.ttl, list(each)[:3]) for each in response.answer
            ]
            response.additional = []
        try:
            if fault == "truncated":
                raise dns.exception.TooBig
            return response.to_wire(max_size=max(512, query.payload if query.edns >= 0 else 512))
        except dns.exception.TooBig:
            response.flags |= dns.flags.TC
            response.answer, response.additional = [], []
            return response.to_wire()

    def _refuse(self, response: dns.message.Message, name: str, fault: str) -> None:
        if fault != "NODATA":
            response.set_rcode(dns.rcode.from_text(fault))
        if fault in ("NODATA", "NXDOMAIN"):
            self._add_soa(response, name)

    def _fill(self, response: dns.message.Message, name: str, kind: str) -> None:
        current, followed = name, 0
        while (alias := self.records.get((current, "CNAME"))) is not None and followed < 20:
            response.answer.append(alias)
            current, followed = alias[0].target.canonicalize().to_text(True), followed + 1
            if not self.chase:
                return
        found = self.records.get((current, kind))
        if found is not None:
            response.answer.append(found)
            if kind == "SRV" and self.additional:
                self._send_along(response, found)
        else:
            if not any(known == current for known, _ in self.records):
                response.set_rcode(dns.rcode.NXDOMAIN)
            self._add_soa(response, current)

    def _send_along(self, response: dns.message.Message, found: dns.rrset.RRset) -> None:
        targets = dict.fromkeys(record.target.canonicalize().to_text(True) for record in found)
        response.additional = [
            rrset for target in targets for kind in ("A", "AAAA") if (rrset := self.records.get((target, kind)))
        ]

    def _add_soa(self, response: dns.message.Message, name: str) -> None:
        if self.soa is not None:
            zone = name.rpartition(".")[2] or "."
            text = f"ns.{zone}. root.{zone}. 1 60 60 3600 {self.soa}"
            response.authority.append(dns.rrset.from_text(f"{zone}.", 3600, "IN", "SOA", text))


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: ToyDns) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._send: Callable[..., None] = transport.sendto

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        wire = self._server.answer(data, "udp")
        if wire:
            asyncio.get_running_loop().call_later(self._server.delay, self._send, wire, addr)
