"""What is sealed opens with its key in its context, and with nothing else. The RFC's vectors are in test_vectors.py."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from propolis.secure.envelope import (
    CHUNK_BYTES,
    OVERHEAD_BYTES,
    chunk_count,
    commit_to,
    open_content,
    open_sealed,
    seal,
    seal_content,
    sealed_size,
)
from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.identity import agreement_key
from propolis.secure.kem import Kem, hybrid_key, hybrid_public

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


# To a hybrid key.

HYBRID = Kem.MLKEM768_X25519
HYBRID_PRIVATE, HYBRID_PUBLIC = hybrid_key()


def assert_hybrid_closed(sealed: bytes, private: bytes = HYBRID_PRIVATE, info: bytes = b"info") -> None:
    with pytest.raises(PeerError, match="does not open"):
        open_sealed(sealed, private, info, HYBRID)


def test_what_is_sealed_to_a_hybrid_key_opens_with_it_and_in_its_context_only() -> None:
    sealed = seal(b"secret", HYBRID_PUBLIC, b"info", HYBRID)
    assert len(sealed) == len(b"secret") + HYBRID.overhead == 6 + 1136
    assert open_sealed(sealed, HYBRID_PRIVATE, b"info", HYBRID) == b"secret"
    assert_hybrid_closed(sealed, info=b"Info")
    assert_hybrid_closed(sealed, private=hybrid_key()[0])
    for length in (0, 32, 48, 1087, 1088, 1120, len(sealed) - 1):
        assert_hybrid_closed(sealed[:length])


def test_no_bit_can_be_flipped_of_what_is_sealed_to_a_hybrid_key() -> None:
    """ML-KEM answers a changed ciphertext with another secret, and no error (FIPS 203, algorithm 18): the tag tells."""
    sealed = seal(b"secret", HYBRID_PUBLIC, b"info", HYBRID)
    for place in range(len(sealed)):
        assert_hybrid_closed(sealed[:place] + bytes([sealed[place] ^ 1 << place % 8]) + sealed[place + 1 :])


def test_either_half_of_a_hybrid_key_alone_opens_nothing() -> None:
    sealed, other = seal(b"secret", HYBRID_PUBLIC, b"info", HYBRID), hybrid_key()[0]
    assert_hybrid_closed(sealed, private=HYBRID_PRIVATE[:64] + other[64:])
    assert_hybrid_closed(sealed, private=other[:64] + HYBRID_PRIVATE[64:])


def test_hybrid_keys_are_drawn_and_have_one_public_half() -> None:
    private, public = hybrid_key()
    assert (len(private), len(public)) == (96, 1216)
    assert hybrid_public(private) == public
    parts = [
        private[:32],
        private[32:64],
        private[64:],
        HYBRID_PRIVATE[:32],
        HYBRID_PRIVATE[32:64],
        HYBRID_PRIVATE[64:],
    ]
    assert len(set(parts)) == len(parts)


HYBRID_WRONG = {
    "empty": b"",
    "short": HYBRID_PUBLIC[:-1],
    "long": HYBRID_PUBLIC + b"\0",
    "X25519 alone": PUBLIC,
    "low order": HYBRID_PUBLIC[:1184] + bytes(32),
    "not reduced": b"\xff" * 1184 + HYBRID_PUBLIC[1184:],
}


@pytest.mark.parametrize("key", HYBRID_WRONG.values(), ids=HYBRID_WRONG)
def test_what_is_no_hybrid_key_is_not_sealed_to(key: bytes) -> None:
    with pytest.raises(PeerError, match="no hybrid public key"):
        seal(b"secret", key, b"info", HYBRID)


# A content, in chunks.

KEY = bytes(range(32))


def chunks_of(plaintext: bytes) -> list[bytes]:
    return [plaintext[i : i + CHUNK_BYTES] for i in range(0, len(plaintext), CHUNK_BYTES)]


def sealed_chunks(plaintext: bytes, context: bytes = b"context") -> list[bytes]:
    chunks = chunks_of(plaintext)
    return list(seal_content(KEY, context, chunks, len(chunks)))


def assert_content_closed(chunks: list[bytes], count: int, key: bytes = KEY, context: bytes = b"context") -> None:
    with pytest.raises(TrustError) as caught:
        list(open_content(key, context, chunks, count))
    assert caught.value.refusal is Refusal.PACKAGE


@given(st.integers(min_value=1, max_value=3 * CHUNK_BYTES))
@example(CHUNK_BYTES)
@example(CHUNK_BYTES + 1)
@settings(deadline=None, max_examples=20)
def test_a_content_opens_and_is_as_long_as_said(size: int) -> None:
    plaintext = (b"content " * (size // 8 + 1))[:size]
    sealed = sealed_chunks(plaintext)
    assert len(sealed) == chunk_count(size)
    assert sum(map(len, sealed)) == sealed_size(size)
    assert b"".join(open_content(KEY, b"context", sealed, len(sealed))) == plaintext


def test_chunks_are_where_they_were_and_the_last_is_the_last() -> None:
    first, second, last = sealed = sealed_chunks(bytes(2 * CHUNK_BYTES + 1))
    for changed in ([first, second], [second, first, last], [first, last], [*sealed, last], [first, first, last], []):
        assert_content_closed(changed, 3)
        assert_content_closed(changed, max(1, len(changed)))


def test_a_content_opens_under_its_key_and_context_only() -> None:
    sealed = sealed_chunks(b"content")
    assert_content_closed(sealed, 1, key=bytes(32))
    assert_content_closed(sealed, 1, context=b"another")
    for bit in range(8 * len(sealed[0])):
        forged = bytearray(sealed[0])
        forged[bit // 8] ^= 1 << bit % 8
        assert_content_closed([bytes(forged)], 1)


def test_a_commitment_is_to_one_key() -> None:
    assert commit_to(KEY) != commit_to(bytes(32))
    assert commit_to(KEY) not in (KEY, hashlib.sha256(KEY).digest())
