"""Host names in one spelling, and the addresses that are not the internet's."""

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsvl2_jax.infer.serve.addresses import domain_name, host_name, is_public

PRIVATE = """
127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 255.255.255.255 224.0.0.1 240.0.0.1
198.18.0.1 192.0.2.1 192.0.0.8 192.88.99.1 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 fe80::1 fe80::1%eth0
fc00::1 fd12::1 fec0::1 ff02::1 ff0e::1 64:ff9b::7f00:1 64:ff9b::169.254.169.254 64:ff9b:1::8.8.8.8 2002:7f00:1::
2001::1 2001:db8::1 3fff::1 100::1 4000::1 not-an-address
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_special_addresses_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "93.184.215.14",
        "2606:2800:21f:cb07::1",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "2a00:1450:4001::8",
        "192.1.2.3",
    ],
)
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


@given(st.ip_addresses())
def test_no_address_of_a_special_network_is_public(ip):
    if is_public(str(ip)):
        assert ip.is_global
        assert not (ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified)
    if ip.version == 4:
        for wrapped in (f"::ffff:{ip}", f"64:ff9b::{ip}"):
            assert is_public(wrapped) == is_public(str(ip))
        assert not is_public(str(ipaddress.IPv6Address(int(ip))))


@example("a.b.example.")
@example("１２７.０.０.１")
@example("ß" * 70)
@given(st.text(max_size=70))
def test_a_host_name_is_ascii_and_stays_as_it_is(text):
    try:
        name = host_name(text)
    except ValueError as error:
        assert "must be a host name" in str(error)
        return
    assert name.isascii()
    assert host_name(name) == host_name(name.upper()) == host_name(name + ".") == name
    with pytest.raises(ValueError):
        ipaddress.ip_address(name)


@pytest.mark.parametrize(
    ("text", "domain"),
    [("Example.COM.", "example.com"), ("*.Example.com", "*.example.com"), ("faß.de", "xn--fa-hia.de")],
)
def test_domains_are_written_in_one_way(text, domain):
    assert domain_name(text) == domain


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "*.",
        "*.com",
        "a.*.com",
        "https://a.com",
        "a.com/x",
        "a.com:443",
        "1.2.3.4",
        "127.1",
        "0x7f000001",
        "[::1]",
    ],
)
def test_what_is_no_domain_cannot_be_allowed(text):
    with pytest.raises(ValueError, match="must"):
        domain_name(text)
