"""Residues take the bits of their primes and no more, and SEAL's own form is known to the byte."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from encrypting import adder, decryptor, encryptor, key_of, scheme
from hypothesis import given
from hypothesis import strategies as st

from propolis.secure.errors import PeerError, UsageError
from propolis.secure.he import seal_format
from propolis.secure.he.memory_file import saved_bytes
from propolis.secure.he.seal_format import Shape, pack_residues, unpack_residues

PRIMES = (97, 2**16 + 1, 2**31 - 1, 2**33 - 9, 2**60 - 93)  # of 7, 17, 31, 33 and 60 bits


@given(st.integers(0, 2**32), st.integers(1, 2), st.lists(st.sampled_from(PRIMES), min_size=1, max_size=3))
def test_residues_are_packed_and_unpacked(seed: int, count: int, primes: list[int]) -> None:
    shape, rng = Shape(bytes(32), 16, tuple(primes)), np.random.default_rng(seed)
    rows = [rng.integers(0, 2 ** prime.bit_length(), 16, np.uint64) for _ in range(count) for prime in primes]
    polynomials = np.concatenate(rows).reshape(count, len(primes), 16)
    packed = pack_residues(polynomials, shape)
    assert len(packed) == count * sum(2 * prime.bit_length() for prime in primes)
    np.testing.assert_array_equal(unpack_residues(packed, count, shape), polynomials)
    for wrong in (packed[:-1], packed + b"\0"):
        with pytest.raises(PeerError, match="expected"):
            unpack_residues(wrong, count, shape)


def test_whole_bytes_come_first_and_then_planes_of_bits() -> None:
    shape = Shape(bytes(32), 8, (1021,))  # 10 bits
    residues = np.array([[[0x0FF, 0x100, 0x200, 0x300, 0, 0, 0, 1]]], np.uint64)
    assert pack_residues(residues, shape).hex() == "ff00000000000001" + "0a" + "0c"


@pytest.mark.parametrize("compression", ["none", "zlib"])
def test_what_seal_may_save_differently_is_read_too(compression: str) -> None:
    made = scheme()
    ciphertext = adder(made).read(encryptor(made).encrypt(np.arange(made.parameters.degree, dtype=np.uint64))[0])
    saved = saved_bytes(ciphertext)
    body = seal_format._decompressed(saved)
    as_zlib = compression == "zlib"
    content = zlib.compress(body) if as_zlib else body
    header = bytearray(saved[:16])
    header[5], header[8:16] = (1 if as_zlib else 0), (16 + len(content)).to_bytes(8, "little")
    assert seal_format.ciphertext_to_wire(bytes(header) + content, made._data_shape) == seal_format.ciphertext_to_wire(
        saved, made._data_shape
    )


def test_another_version_of_seal_is_one_line() -> None:
    made = scheme()
    saved = saved_bytes(adder(made).read(encryptor(made).encrypt(np.zeros(made.parameters.degree, np.uint64))[0]))
    seal_format.ciphertext_to_wire(saved, made._data_shape)
    other_version, other_magic = bytearray(saved), bytearray(saved)
    other_version[3] = 5
    other_magic[0] ^= 1
    for wrong in (bytes(other_version), bytes(other_magic), saved[:-1], saved[:10], b""):
        with pytest.raises(UsageError, match="another format than SEAL 4"):
            seal_format.ciphertext_to_wire(wrong, made._data_shape)
    with pytest.raises(UsageError, match="another format than SEAL 4"):
        seal_format.plaintext_to_wire(saved, made._key_shape)


def test_keys_come_back_as_they_were() -> None:
    made = scheme()
    public, secret = key_of(made)
    saved = seal_format.plaintext_from_wire(secret.secret_key, made._key_shape)
    assert seal_format.plaintext_to_wire(saved, made._key_shape) == secret.secret_key
    saved = seal_format.ciphertext_from_wire(public.public_key, made._key_shape)
    assert seal_format.ciphertext_to_wire(saved, made._key_shape) == public.public_key
    assert decryptor(made).parameters == made.parameters
