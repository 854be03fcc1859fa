"""What is sealed opens with its key in its context, and with nothing else. The RFC's vectors are in test_vectors.py."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.envelope import OVERHEAD_BYTES, open_sealed, seal
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.identity import agreement_key

PRIVATE, PUBLIC = agreement_key()


def assert_closed(sealed: bytes, private: bytes = PRIVATE, info: bytes = b"info") -> None:
    with pytest.raises(PeerError, match="does not open") as caught:
        open_sealed(sealed, private, info)
    assert caught.value.refusal is Refusal.SHARES


@given(st.binary(max_size=100), st.binary(max_size=100))
@settings(deadline=None)
def test_what_is_sealed_opens(plaintext: bytes, info: bytes) -> None:
    sealed = seal(plaintext, PUBLIC, info)
    assert len(sealed) == len(plaintext) + OVERHEAD_BYTES
    assert open_sealed(sealed, PRIVATE, info) == plaintext


def test_another_key_does_not_open() -> None:
    assert_closed(seal(b"secret", PUBLIC, b"info"), private=agreement_key()[0])


@pytest.mark.parametrize("info", [b"", b"inf", b"info\0", b"Info"])
def test_another_context_does_not_open(info: bytes) -> None:
    assert_closed(seal(b"secret", PUBLIC, b"info"), info=info)


def test_no_bit_can_be_flipped() -> None:
    sealed = seal(b"secret", PUBLIC, b"info")
    for bit in range(8 * len(sealed)):
        forged = bytearray(sealed)
        forged[bit // 8] ^= 1 << bit % 8
        assert_closed(bytes(forged))


def test_nothing_can_be_cut_off_or_added() -> None:
    sealed = seal(b"secret", PUBLIC, b"info")
    for length in range(len(sealed)):
        assert_closed(sealed[:length])
    assert_closed(sealed + b"\0")
    assert_closed(b"\0" + sealed)


def test_parts_of_two_messages_do_not_open() -> None:
    one, other = (seal(b"secret", PUBLIC, b"info") for _ in range(2))
    assert one[:32] != other[:32]
    assert_closed(one[:32] + other[32:])


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)])
def test_an_encapsulated_key_of_low_order_does_not_open(point: bytes) -> None:
    assert_closed(point + seal(b"secret", PUBLIC, b"info")[32:])


WRONG_KEYS = {"empty": b"", "short": PUBLIC[:31], "long": PUBLIC + b"\0", "zero": bytes(32), "one": b"\1" + bytes(31)}


@pytest.mark.parametrize("key", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_what_is_no_key_is_not_sealed_to(key: bytes) -> None:
    with pytest.raises(PeerError, match="no X25519 public key") as caught:
        seal(b"secret", key, b"info")
    assert caught.value.refusal is Refusal.KEYS
