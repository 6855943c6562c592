"""
Where URLs in jobs may lead: nowhere but to public addresses, however they are written.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AddressRefused
from common.may_reach import Allowed, check_reach, is_public, remote_urls, target_of

NOTHING = Allowed()
PUBLIC = "93.184.216.34"

INSIDE = [
    "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1", "240.0.0.1",
    "255.255.255.255", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
    "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::", "2001:0:7f00::1", "fe80::1", "fe80::1%eth0", "fc00::1",
    "fd00::1", "fec0::1", "ff02::1", "2001:db8::1",
]  # fmt: skip
OUTSIDE = [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"]


def parts(content: Any) -> list[str]:
    return list(remote_urls(content))


@pytest.mark.parametrize("address", INSIDE)
def test_no_address_of_ours_is_called(address: str) -> None:
    """Private, loopback, link-local, shared, reserved, multicast, and IPv4 hidden in IPv6."""
    assert not is_public(ip_address(address.partition("%")[0]))
    with pytest.raises(AddressRefused, match="EGRESS_ALLOW"):
        check_reach(target_of("http://hooks.example/x"), [address], NOTHING)


@pytest.mark.parametrize("address", OUTSIDE)
def test_public_addresses_are_called(address: str) -> None:
    """The address that is given back is the one that was checked."""
    assert check_reach(target_of("https://hooks.example"), [address], NOTHING) == ip_address(address)


@pytest.mark.parametrize("others", [[PUBLIC], [PUBLIC, "8.8.8.8"], []])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_private_address_among_public_ones_is_enough_for_a_no(others: list[str], position: int) -> None:
    """Whoever made the name chose all of its addresses; which one is called is a matter of luck."""
    addresses = [*others[:position], "10.0.0.1", *others[position:]]
    with pytest.raises(AddressRefused, match="not public"):
        check_reach(target_of("http://hooks.example"), addresses, NOTHING)


def test_a_name_without_an_address_leads_nowhere() -> None:
    """Also one that the operator allows."""
    for allowed in (NOTHING, Allowed.parse(["hooks.example"])):
        with pytest.raises(AddressRefused, match="no address"):
            check_reach(target_of("http://hooks.example"), [], allowed)


@pytest.mark.parametrize(
    ("words", "address", "goes"),
    [
        (["10.0.0.0/8"], "10.1.2.3", True),
        (["10.0.0.0/8"], "11.1.2.3", True),  # public anyway
        (["10.0.0.0/8"], "192.168.0.1", False),
        (["10.0.0.7"], "10.0.0.7", True),
        (["10.0.0.7"], "10.0.0.8", False),
        (["fd00::/8"], "fd00::1", True),
        (["fd00::/8"], "10.0.0.1", False),
        (["Hooks.Example"], "10.0.0.1", True),
        (["other.example"], "10.0.0.1", False),
        (["example"], "10.0.0.1", False),  # a name is that name, and not what ends with it
    ],
)
def test_the_operator_can_allow_hosts_and_networks(words: list[str], address: str, *, goes: bool) -> None:
    """And nothing else by it."""
    target, allowed = target_of("http://hooks.example/"), Allowed.parse(words)
    if goes:
        assert str(check_reach(target, [address], allowed)) == address
    else:
        with pytest.raises(AddressRefused):
            check_reach(target, [address], allowed)


@pytest.mark.parametrize("word", ["10.0.0.0/33", "10.0.0.1/8", "a b", "http://x", "", "*"])
def test_a_word_that_allows_nothing_is_an_error(word: str) -> None:
    """Rather than a rule that silently does not hold."""
    with pytest.raises(ValueError, match="no host name, address or network"):
        Allowed.parse([word])


@pytest.mark.parametrize(
    ("url", "host", "port", "rest"),
    [
        ("http://a.example", "a.example", 80, ""),
        ("HTTPS://A.Example/Path?q=1", "a.example", 443, "/Path?q=1"),
        ("https://a.example:8443/x", "a.example", 8443, "/x"),
        ("http://a.example?q", "a.example", 80, "?q"),
        ("http://[::1]:80/", "::1", 80, "/"),
        ("http://1.2.3.4/", "1.2.3.4", 80, "/"),
    ],
)
def test_a_plain_url_is_read_as_it_is(url: str, host: str, port: int, rest: str) -> None:
    """Scheme and host in lower case, the port that the scheme means."""
    found = target_of(url)
    assert (found.host, found.port, found.rest) == (host, port, rest)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://a.example/x", "gopher://a.example", "unix:///run/x", "//a.example/x", "a.example",
        "http://", "http:///x", "http://user@a.example/", "http://user:word@a.example/", "http://good.example\\@bad/",
        "http://a.example#@b.example/", "http://a example/", "http://a.example/\n", "http://a.example\t/", " http://a",
        "http://a.example:0/", "http://a.example:65536/", "http://a.example:x/", "http://%31%32%37.0.0.1/",
        "http://bücher.example/", "http://[::1", "http://[fe80::1%25eth0]/", "http://a.example/ü", "javascript:x",
    ],
)  # fmt: skip
def test_what_two_parsers_may_read_differently_is_no_url(url: str) -> None:
    """The engine that fetches it has a parser of its own."""
    with pytest.raises(AddressRefused, match="no plain"):
        target_of(url)


def test_what_is_refused_is_shown_without_its_secrets() -> None:
    """A user's password and a query's token stay out of errors, which are stored and logged."""
    with pytest.raises(AddressRefused) as refused:
        target_of("http://user:planted-secret@a.example/?token=planted-secret")
    assert "planted-secret" not in refused.value.message


@given(st.text(max_size=40))
def test_no_text_breaks_the_reading(url: str) -> None:
    """It is a plain URL, or it is refused."""
    try:
        found = target_of(f"http://{url}")
    except AddressRefused:
        return
    assert found.host
    assert found.host.isascii()


def test_urls_are_found_wherever_an_engine_would_look() -> None:
    """In all parts of all messages, as an object or as plain text; what carries its content is none."""
    content = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}, {"text": "http://no"}]},
        {"role": "user", "content": [{"image_url": "http://b"}, {"video_url": {"url": "http://c"}}]},
        {"role": "user", "content": [{"audio_url": {"url": "DATA:audio/wav;base64,xx"}}, {"image_url": None}]},
        {"role": "user", "content": {"nested": {"image_url": {"url": "http://d", "more": {"x_url": "http://e"}}}}},
    ]
    assert sorted(parts(content)) == ["http://a", "http://b", "http://c", "http://d", "http://e"]
    assert parts("text with http://x") == []
    assert parts(None) == []


def test_a_url_is_found_at_any_depth() -> None:
    """Deeper than Python would recurse."""
    content: Any = {"image_url": "http://deep"}
    for _ in range(50_000):
        content = [content]
    assert parts(content) == ["http://deep"]
    while isinstance(content, list):  # taken apart by hand: Python's own way is recursive
        content = content.pop()
