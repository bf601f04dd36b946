"""Names of hosts, in one spelling, and whether an address is the public internet's."""

from __future__ import annotations

import contextlib
import ipaddress
import re

import idna

# Letters, digits, hyphens and (of some buckets) underscores. No top-level domain begins with a digit, so that what an
# address can be written as (127.1, 0x7f000001, 2130706433) is no name.
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"(?:{_LABEL}\.)*[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])?")
_LONGEST_NAME = 253  # characters

# What the address registries call special, and Python's ipaddress (of some versions) calls global: protocol
# assignments, 6to4 relays, Teredo and its kin, 6to4, documentation.
_SPECIAL = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "2001:db8::/32", "3fff::/20")
]
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses behind a NAT64 gateway (RFC 6052)


def domain_name(text: str) -> str:
    """A domain whose pictures are allowed: a host name, or ``*.`` and one for all names below it.

    Raises ValueError when it is neither.
    """
    wildcard, rest = ("*.", text[2:]) if text.startswith("*.") else ("", text)
    name = host_name(rest)
    if wildcard and "." not in name:
        raise ValueError("must have two parts at least after the *")
    return wildcard + name


def host_name(text: str) -> str:
    """A host name as it is resolved and compared: in lower-case ASCII (IDNA 2008), without the dot at its end.

    Raises ValueError for an IP address, and for all else that is no host name.
    """
    name = ""
    if len(text) <= _LONGEST_NAME + 1:
        with contextlib.suppress(idna.IDNAError):
            name = text.lower() if text.isascii() else idna.encode(text, uts46=True).decode("ascii")
    name = name.removesuffix(".")
    if len(name) > _LONGEST_NAME or not _HOST_NAME.fullmatch(name):
        raise ValueError("must be a host name, such as images.example.com")
    return name


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, whoever's that is: no private network's, this machine's, …"""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _TRANSLATED:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _SPECIAL)
