"""What SEAL 4 writes and reads, taken apart, so that on the wire there is nothing but numbers of known sizes.

SEAL's own form has a header that a peer could set as it likes (another size, another form, compressed data of any
length), and spends 64 bits on a number of 33, or 41 when it is compressed. Here a polynomial is its residues, prime
after prime, each packed to the bits of its prime; everything else is put back by the receiver, who knows it already.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct, error

import numpy as np
from numpy.typing import NDArray

from propolis.secure.errors import PeerError, Refusal, UsageError

Residues = NDArray[np.uint64]

SEED_BYTES = 64
_WORD = 8

# magic, size of the header, version (two bytes), compression, reserved, size of all
_HEADER = Struct("<HBBBBHQ")
_MAGIC, _VERSION = 0xA15E, (4, 3)
_PLAIN, _ZLIB, _ZSTD = 0, 1, 2

# id of the parameters, whether in NTT form, number of polynomials, N, number of primes, scale, correction factor
_CIPHERTEXT = Struct("<32s?QQQdQ")
# id of the parameters, number of coefficients, scale
_PLAINTEXT = Struct("<32sQd")
_COUNT = Struct("<Q")
# kind of generator, seed
_GENERATOR = Struct(f"<B{SEED_BYTES}s")
_BLAKE2XB = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What polynomials have in common.

    Attributes:
        parameters: SEAL's id of them, 32 bytes.
        degree: N.
        primes: that residues are taken of.
        ntt: whether they are in NTT form.
    """

    parameters: bytes
    degree: int
    primes: tuple[int, ...]
    ntt: bool = False

    @property
    def words(self) -> int:
        """Words of one polynomial."""
        return self.degree * len(self.primes)

    @property
    def packed_bytes(self) -> int:
        """Bytes of one packed polynomial."""
        return sum(self.degree * prime.bit_length() for prime in self.primes) // 8


def ciphertext_residues(saved: bytes, shape: Shape) -> Residues:
    """(2, primes, N) of two polynomials, from what SEAL saved.

    Raises:
        UsageError: SEAL wrote something else than this expects: it is another version.
    """
    header, words, rest = _taken_apart(saved, _CIPHERTEXT)
    if header != _ciphertext_header(shape) or rest:
        raise _unknown_format()
    return words.reshape(2, len(shape.primes), shape.degree)


def ciphertext_to_wire(saved: bytes, shape: Shape) -> bytes:
    """Two packed polynomials; raises as `ciphertext_residues`."""
    return pack_residues(ciphertext_residues(saved, shape), shape)


def ciphertext_from_wire(data: bytes, shape: Shape) -> bytes:
    """What SEAL loads, from two packed polynomials; raises PeerError when the size is another one's."""
    words = unpack_residues(data, 2, shape)
    return _put_together(_CIPHERTEXT.pack(*_ciphertext_header(shape)), words)


def seeded_to_wire(saved: bytes, shape: Shape) -> bytes:
    """One packed polynomial and the seed of the other; raises as `ciphertext_residues`."""
    header, words, rest = _taken_apart(saved, _CIPHERTEXT)
    kind, seed = _read(_GENERATOR, _decompressed(rest))
    if header != _ciphertext_header(shape) or kind != _BLAKE2XB:
        raise _unknown_format()
    return pack_residues(words, shape) + bytes(seed)


def seeded_from_wire(data: bytes, shape: Shape) -> bytes:
    """What SEAL loads, and expands; raises PeerError when the size is another one's."""
    words = unpack_residues(data[:-SEED_BYTES], 1, shape)
    generator = _with_header(_GENERATOR.pack(_BLAKE2XB, data[-SEED_BYTES:]))
    return _put_together(_CIPHERTEXT.pack(*_ciphertext_header(shape)), words, generator)


def plaintext_coefficients(saved: bytes, degree: int) -> NDArray[np.uint64]:
    """(N,) of a message's polynomial, from what SEAL saved; raises as `ciphertext_residues`."""
    header, words, rest = _taken_apart(saved, _PLAINTEXT)
    if header[0] != bytes(32) or len(words) != degree or rest:
        raise _unknown_format()
    return words


def plaintext_to_wire(saved: bytes, shape: Shape) -> bytes:
    """A packed secret key; raises as `ciphertext_residues`."""
    header, words, rest = _taken_apart(saved, _PLAINTEXT)
    if header != (shape.parameters, shape.words, 1.0) or rest:
        raise _unknown_format()
    return pack_residues(words, shape)


def plaintext_from_wire(data: bytes, shape: Shape) -> bytes:
    """What SEAL loads as a secret key; raises PeerError when the size is another one's."""
    words = unpack_residues(data, 1, shape)
    return _put_together(_PLAINTEXT.pack(shape.parameters, shape.words, 1.0), words)


def pack_residues(polynomials: Residues, shape: Shape) -> bytes:
    """Residues, each in the bits of its prime: the lower bytes of all of a prime, then their upper bits one by one."""
    parts = []
    for residues, prime in _by_prime(polynomials, shape):
        whole, bits = divmod(prime.bit_length(), 8)
        parts.append(residues.astype("<u8", copy=False).view(np.uint8).reshape(-1, _WORD)[:, :whole].tobytes())
        upper = (residues >> np.uint64(8 * whole)).astype(np.uint8)
        parts += [np.packbits(upper >> bit & 1, bitorder="little").tobytes() for bit in range(bits)]
    return b"".join(parts)


def unpack_residues(data: bytes, count: int, shape: Shape) -> Residues:
    """(count, primes, N), the inverse of `pack_residues`; SEAL refuses residues that are not below their primes.

    Raises:
        PeerError: the data is not exactly as long as `count` polynomials.
    """
    if len(data) != count * shape.packed_bytes:
        expected = count * shape.packed_bytes
        raise PeerError(Refusal.MALFORMED, f"expected {expected} bytes of {count} polynomials, got {len(data)}")
    polynomials, at = np.zeros((count, len(shape.primes), shape.degree), "<u8"), 0
    for residues, prime in _by_prime(polynomials, shape):
        whole, bits = divmod(prime.bit_length(), 8)
        octets = residues.view(np.uint8).reshape(-1, _WORD)
        octets[:, :whole] = np.frombuffer(data, np.uint8, shape.degree * whole, at).reshape(shape.degree, whole)
        at += shape.degree * whole
        for bit in range(bits):
            plane = np.frombuffer(data, np.uint8, shape.degree // 8, at)
            octets[:, whole] |= np.unpackbits(plane, bitorder="little") << bit
            at += shape.degree // 8
    return polynomials


def _by_prime(polynomials: Residues, shape: Shape) -> list[tuple[Residues, int]]:
    rows = polynomials.reshape(-1, shape.degree)
    return [(row, shape.primes[place % len(shape.primes)]) for place, row in enumerate(rows)]


def _ciphertext_header(shape: Shape) -> tuple[bytes, bool, int, int, int, float, int]:
    return shape.parameters, shape.ntt, 2, shape.degree, len(shape.primes), 1.0, 1


def _put_together(header: bytes, words: Residues, rest: bytes = b"") -> bytes:
    return _with_header(header + _with_header(_COUNT.pack(words.size) + words.tobytes()) + rest)


def _with_header(body: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, _HEADER.size, *_VERSION, _PLAIN, 0, _HEADER.size + len(body)) + body


def _taken_apart(saved: bytes, layout: Struct) -> tuple[Sequence[object], Residues, bytes]:
    """Header, words, and what comes after them, of something that SEAL saved."""
    body = _decompressed(saved)
    header = _read(layout, body[: layout.size])
    begin = layout.size + _HEADER.size + _COUNT.size
    (count,) = _read(_COUNT, body[begin - _COUNT.size : begin])
    end = begin + _WORD * int(count)
    if end > len(body):
        raise _unknown_format()
    return header, np.frombuffer(body, "<u8", int(count), begin), body[end:]


def _decompressed(saved: bytes) -> bytes:
    """What SEAL put under a header."""
    import zstandard

    magic, size, major, minor, compression, _, total = _read(_HEADER, saved[: _HEADER.size])
    if (magic, size, (major, minor), total) != (_MAGIC, _HEADER.size, _VERSION, len(saved)):
        raise _unknown_format()
    body = saved[_HEADER.size :]
    if compression == _ZSTD:
        return zstandard.ZstdDecompressor().decompressobj().decompress(body)
    return zlib.decompress(body) if compression == _ZLIB else body


def _read(layout: Struct, data: bytes) -> tuple[int, ...]:
    try:
        return layout.unpack(data)
    except error:
        raise _unknown_format() from None


def _unknown_format() -> UsageError:
    return UsageError(
        "TenSEAL writes another format than SEAL 4.3's: pip install 'propolis[he]' installs one that fits"
    )
