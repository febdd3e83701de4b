"""Which endpoints of an answer may be called (rule D5).

Decides that by the very address that is dialled: no name is looked up after this. Whoever answers may lie, so addresses
that lead to the machine's own network, to the metadata of a cloud, or to many at once are left out, in every way to
write them. What settings list themselves is not held against this. It never asks and never dials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from meshlib.endpoint import Endpoint
from meshlib.plain import plain

LONGEST_ZONE = 128

SHOWN = 3
"""Addresses that a warning names."""

_FORBIDDEN = tuple(
    ip_network(each)
    for each in (
        "0.0.0.0/8",  # "this host", which is a way to write loopback past other guards
        "169.254.0.0/16",  # link-local, and the metadata of most clouds
        "100.100.100.200/32",  # the metadata of Alibaba Cloud
        "168.63.129.16/32",  # the like of Azure
        "192.0.0.192/32",  # the metadata of Oracle Cloud, formerly
        "224.0.0.0/4",  # multicast
        "255.255.255.255/32",
        "::/128",
        "fe80::/10",  # link-local
        "fec0::/10",  # the same for a site, formerly
        "ff00::/8",  # multicast
        "fd00:ec2::/32",  # the metadata and the credentials of AWS
        "fd20:ce::254/128",  # the metadata of Google Cloud
    )
)

_LAST_32_BITS = tuple(
    ip_network(each)
    for each in (
        "::ffff:0:0/96",  # IPv4-mapped
        "::/96",  # IPv4-compatible
        "::ffff:0:0:0/96",  # IPv4-translated
        "64:ff9b::/96",  # NAT64
    )
)
"""Where an IPv6 address ends in the IPv4 address that it leads to."""

_OWN_NAT64 = ip_network("64:ff9b:1::/48")
"""NAT64 of one's own network, which chooses where in the address the IPv4 address stands (RFC 6052, section 2.2)."""

_6TO4 = ip_network("2002::/16")
_ISATAP = 0x5EFE


@lru_cache(maxsize=16_384)  # 20 us for each, on a thread that others wait for
def is_forbidden(host: str) -> bool:
    """Whether no resolver may send us to a host. Names are looked up yet, and are not."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if address.is_loopback:
        return False
    if any(address in network for network in _FORBIDDEN):
        return True
    return isinstance(address, IPv6Address) and any(is_forbidden(str(each)) for each in _within(address))


def admitted(endpoints: Sequence[Endpoint]) -> tuple[tuple[Endpoint, ...], list[str]]:
    """The endpoints that may be called, with zones that may be shown, and the hosts of the others."""
    kept = tuple(_shown(endpoint) for endpoint in endpoints if not is_forbidden(endpoint.host))
    if len(kept) == len(endpoints):
        return kept, []
    return kept, [endpoint.host for endpoint in endpoints if is_forbidden(endpoint.host)]


def _shown(endpoint: Endpoint) -> Endpoint:
    zone = plain(endpoint.zone, LONGEST_ZONE)
    return endpoint if zone == endpoint.zone else replace(endpoint, zone=zone)


def in_words(dropped: Sequence[str]) -> str:
    """What people should know of those that were left out."""
    hosts = sorted(set(dropped))
    more = f" and {len(hosts) - SHOWN} more" if len(hosts) > SHOWN else ""
    return f"{len(dropped)} left out, since no resolver may send us there: {', '.join(hosts[:SHOWN])}{more}"


def _within(address: IPv6Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses that an IPv6 address leads to."""
    value = int(address)
    if any(address in network for network in _LAST_32_BITS) or (value >> 32) & 0xFDFFFFFF == _ISATAP:
        yield IPv4Address(value & 0xFFFFFFFF)
    if address in _OWN_NAT64:
        readings = (value >> 48 & 0xFFFF0000 | value >> 40 & 0xFFFF, value >> 40 & 0xFF000000 | value >> 32 & 0xFFFFFF)
        for each in (*readings, value >> 24 & 0xFFFFFFFF, value & 0xFFFFFFFF):
            if 0 < each >> 24 < 224:  # else it is the filling of another reading
                yield IPv4Address(each)
    if address in _6TO4:
        yield IPv4Address(value >> 80 & 0xFFFFFFFF)
    if address.teredo is not None:
        yield address.teredo[1]
