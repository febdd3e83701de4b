"""Addresses that nobody may be sent to (rule D5).

Decides which they are: those that lead to the machine's own network, to the metadata of a cloud, or to many at once, in
every way to write them. Loopback is none of them. It never looks a name up.
"""

from __future__ import annotations

import socket
from bisect import bisect
from collections.abc import Iterator
from ipaddress import ip_network
from itertools import accumulate


class _Ranges:
    """Networks as numbers: an answer may have very many addresses, and others wait for the thread that reads it."""

    def __init__(self, *networks: str) -> None:
        ranges = sorted((int(each[0]), int(each[-1])) for each in map(ip_network, networks))
        self._firsts = [first for first, _ in ranges]
        self._lasts = [-1, *accumulate((last for _, last in ranges), max)]  # one may lie within another

    def __contains__(self, address: int) -> bool:
        return address <= self._lasts[bisect(self._firsts, address)]


_FORBIDDEN_IPV4 = _Ranges(
    "0.0.0.0/8",  # "this host", which is a way to write loopback past other guards
    "169.254.0.0/16",  # link-local, and the metadata of most clouds
    "100.100.100.200/32",  # the metadata of Alibaba Cloud
    "168.63.129.16/32",  # the like of Azure
    "192.0.0.192/32",  # the metadata of Oracle Cloud, formerly
    "224.0.0.0/4",  # multicast
    "255.255.255.255/32",
)

_FORBIDDEN_IPV6 = _Ranges(
    "::/128",
    "fe80::/10",  # link-local
    "fec0::/10",  # the same for a site, formerly
    "ff00::/8",  # multicast
    "fd00:ec2::/32",  # the metadata and the credentials of AWS
    "fd20:ce::254/128",  # the metadata of Google Cloud
)

_LAST_32_BITS = _Ranges(
    "::/96",  # IPv4-compatible
    "::ffff:0:0/96",  # IPv4-mapped
    "::ffff:0:0:0/96",  # IPv4-translated
    "64:ff9b::/96",  # NAT64
)
"""Where an IPv6 address ends in the IPv4 address that it leads to."""

_OWN_NAT64 = _Ranges("64:ff9b:1::/48")
"""NAT64 of one's own network, which chooses where in the address the IPv4 address stands (RFC 6052, section 2.2)."""

_6TO4 = 0x2002
_TEREDO = 0x20010000
_ISATAP = 0x5EFE
_LOOPBACK = 1


def is_forbidden(host: str) -> bool:
    """Whether no resolver may send us to a host. Names are looked up yet, and are not."""
    try:
        if ":" not in host:
            return int.from_bytes(socket.inet_pton(socket.AF_INET, host)) in _FORBIDDEN_IPV4
        address = int.from_bytes(socket.inet_pton(socket.AF_INET6, host.partition("%")[0]))
    except (OSError, ValueError):
        return False
    if address == _LOOPBACK:
        return False
    return address in _FORBIDDEN_IPV6 or any(each in _FORBIDDEN_IPV4 for each in _within(address))


def _within(address: int) -> Iterator[int]:
    """The IPv4 addresses that an IPv6 address leads to."""
    if address in _LAST_32_BITS or (address >> 32) & 0xFDFFFFFF == _ISATAP:
        yield address & 0xFFFFFFFF
    if address in _OWN_NAT64:
        readings = (
            address >> 48 & 0xFFFF0000 | address >> 40 & 0xFFFF,
            address >> 40 & 0xFF000000 | address >> 32 & 0xFFFFFF,
        )
        for each in (*readings, address >> 24 & 0xFFFFFFFF, address & 0xFFFFFFFF):
            if 0 < each >> 24 < 224:  # else it is the filling of another reading
                yield each
    if address >> 112 == _6TO4:
        yield address >> 80 & 0xFFFFFFFF
    if address >> 96 == _TEREDO:
        yield ~address & 0xFFFFFFFF
