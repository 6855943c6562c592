"""
May we go where this URL leads? Pure: jobs bring URLs, and must not make us call our own networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from common.errors import AddressRefused

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

_PORTS = {"http": 80, "https": 443}
# Stricter than RFC 3986 on purpose: where two parsers could see two hosts (a backslash, a user, a space, a host in
# percent signs), there is no URL for us.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9_.-]+|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{1,5}))?(?P<rest>[/?][!-\[\]-~]*)?",
    re.IGNORECASE,
)
# Networks that `ipaddress` calls global and that lead inside all the same: an IPv4 address inside an IPv6 one
# (NAT64 of RFC 6052 and 8215, 6to4, Teredo, IPv4-compatible), site-local, and IPv4's networks for 6to4 and protocols.
_INSIDE = tuple(
    map(
        ip_network,
        (
            "64:ff9b::/96",
            "64:ff9b:1::/48",
            "2002::/16",
            "2001::/32",
            "::/96",
            "fec0::/10",
            "192.88.99.0/24",
            "192.0.0.0/24",
        ),
    )
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a URL leads."""

    scheme: str
    host: str  # a name, or an address without brackets; lower case
    port: int
    rest: str  # path and query; starts with "/" or "?", or is empty

    @property
    def literal(self) -> Address | None:
        """The host as an address, if it is one."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What the operator allows beyond the public internet (`EGRESS_ALLOW`)."""

    hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, words: Iterable[str]) -> Allowed:
        """
        Read host names, addresses and networks.

        Raises
        ------
        ValueError
            A word is none of them.
        """
        hosts, networks = set[str](), list[Network]()
        for word in words:
            try:
                networks.append(ip_network(word))
            except ValueError:
                if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z][A-Za-z0-9_.-]*", word):
                    raise ValueError(f"{word!r} is no host name, address or network (10.0.0.0/8)") from None
                hosts.add(word.lower())
        return cls(hosts=frozenset(hosts), networks=tuple(networks))


def target_of(url: str) -> Target:
    """
    Read *url*.

    Raises
    ------
    AddressRefused
        It is no plain http(s) URL: another scheme, a user in it, or characters that parsers disagree about.
    """
    found = _URL.fullmatch(url)
    scheme = found["scheme"].lower() if found else ""
    port = int((found and found["port"]) or _PORTS.get(scheme, 0))
    if found is None or not 0 < port < 2**16:
        raise AddressRefused(
            f"{_shown(url)} is no plain http:// or https:// URL: a host, a port and a path in ASCII, no user and no "
            "other scheme. Send the content itself instead, as a data: URL."
        )
    return Target(scheme=scheme, host=found["host"].strip("[]").lower(), port=port, rest=found["rest"] or "")


def check_reach(target: Target, addresses: Sequence[str], allowed: Allowed) -> Address:
    """
    Give the address to call: the first of *addresses*, which *target*'s host has now, if all of them may be called.

    1. Has the operator allowed the host?    Then yes.
    2. Has it an address at all?             Else no.
    3. Is each of its addresses public, or   One that is not is enough for a no: whoever made the name chose
       allowed?                              them all.

    Raises
    ------
    AddressRefused
        Otherwise; the message names the host, and what the operator can do.
    """
    found = [ip_address(address.partition("%")[0]) for address in addresses]
    # (1) The host.
    if target.host in allowed.hosts and found:
        return found[0]

    # (2) No address.
    if not found:
        raise AddressRefused(f"{target.host} has no address: the name does not exist, or its servers do not answer.")

    # (3) Each address.
    for address in found:
        if not (is_public(address) or any(address in network for network in allowed.networks)):
            raise AddressRefused(
                f"{target.host} leads to an address that is not public, and jobs may only name public ones. The "
                "operator can allow it with EGRESS_ALLOW."
            )
    return found[0]


def is_public(address: Address) -> bool:
    """Is it an address of the public internet: not private, loopback, link-local, multicast, reserved or embedded?"""
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        return is_public(mapped)
    if address.is_multicast or address.is_reserved or address.is_unspecified or not address.is_global:
        return False
    return not any(address in network for network in _INSIDE if network.version == address.version)


def remote_urls(content: object) -> Iterator[str]:
    """
    Every URL in an OpenAI content that an engine would fetch: the values of keys that end in `_url`.

    `data:` URLs carry their content with them, and are none.
    """
    waiting = [content]
    while waiting:  # no recursion: a body may be nested as deep as it likes
        found = waiting.pop()
        if isinstance(found, Mapping):
            for key, value in found.items():
                url = value.get("url") if isinstance(value, Mapping) else value
                if isinstance(key, str) and key.endswith("_url") and isinstance(url, str) and not _is_data(url):
                    yield url
            waiting.extend(found.values())
        elif isinstance(found, list | tuple):
            waiting.extend(found)


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _shown(url: str) -> str:
    """The URL as a message may show it: short, and without what may be a secret in its query or user."""
    return repr(re.sub(r"//[^/@]*@", "//...@", url[:200]).partition("?")[0][:80])
