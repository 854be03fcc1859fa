"""Addresses as people write them."""

from __future__ import annotations

import pytest

from propolis.link.address import Address
from propolis.secure.errors import UsageError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("a.example:7000", "a.example", 7000), ("[::1]:80", "::1", 80), ("10.0.0.1:65535", "10.0.0.1", 65535)],
)
def test_an_address_is_read_and_written_alike(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)
    assert str(Address(host, port)) == text


@pytest.mark.parametrize("default", ["cloud", "::1"])
def test_a_missing_host_is_the_default(default: str) -> None:
    assert Address.parse(":7000", default) == Address(default, 7000)
    assert Address.parse("other:1", default).host == "other"


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", ":7000", "host:0", "host:65536", "host:-1", "host:x", "::1:80", "a b:1", "u@h:1", "h:\u0661"],
)
def test_what_is_no_address_is_told(text: str) -> None:
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        Address.parse(text)
