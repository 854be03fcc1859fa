"""What keeps devices from decrypting whatever they are sent: tags on ciphertexts that add up as the ciphertexts do.

The tag of a device's ciphertext x in chunk c of round R is the linear MAC <r, x> + F_K(R, device, c) modulo each prime
of q, with r = PRF_K(R, c), over all the residues of x. So the tag of the sum over a set of devices is that of the
summed ciphertexts with the summed F of the set, which nobody without K knows (homomorphic MACs for linear functions:
Agrawal and Boneh, ACNS 2009, section 3.2).

An entry of r is uniform in [0, 2^16). Whatever is changed in x, at most one value of an entry hides it, so a forgery
passes with probability 2^-16, and with 2^-64 where four tags with an r each must hold. F is uniform modulo the prime.

The tag is checked before anything is decrypted, and on nothing but public numbers and K: a refusal says nothing about
the secret key. A tag inside of the ciphertext would have to be decrypted first, and whether noise that a peer adds
breaks it tells one coefficient of the key a time.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.he.field import UniformElements
from propolis.secure.he.parameters import Parameters
from propolis.secure.he.seal_format import Residues
from propolis.secure.identity import LARGEST_INDEX
from propolis.secure.prg import key_stream

# (primes, REPETITIONS) of one ciphertext, each row modulo its prime.
Tag = NDArray[np.uint64]

MAC_KEY_BYTES = 32
REPETITIONS = 4
_COEFFICIENT_BYTES = 2
# Products of a coefficient and a limb, added up over the 2^13 entries of a polynomial, are whole numbers below 2^53.
_LIMB_BITS, _LIMBS = 24, 3


class Tags:
    """The tags of one round.

    A device must never tag two ciphertexts for one round and chunk: the difference of their tags would be <r, x - x'>.

    Args:
        mac_key: K, 32 bytes, which all devices have and the server doesn't.
        round_id: R, which no other round or attempt under this key has.
        parameters: of the ciphertexts.
        chunks: how many ciphertexts a device sends.
    """

    def __init__(self, mac_key: bytes, round_id: bytes, parameters: Parameters, chunks: int) -> None:
        if len(mac_key) != MAC_KEY_BYTES:
            raise UsageError(f"the key of tags has {MAC_KEY_BYTES} bytes")
        self._key, self._round, self._parameters = mac_key, round_id, parameters
        self.chunks = chunks

    def of_device(self, device: int) -> NDArray[np.uint64]:
        """(chunks, primes, 4) F_K(R, device, chunk), what makes the device's tags its own."""
        seed = self._prf(labels.HE_OFFSETS, device)
        per_prime = [
            UniformElements(seed, prime, stream).take(self.chunks * REPETITIONS).reshape(self.chunks, REPETITIONS)
            for stream, prime in enumerate(self._parameters.primes)
        ]
        return np.stack(per_prime, axis=1)

    def of_devices(self, devices: Collection[int]) -> NDArray[np.uint64]:
        """(chunks, primes, 4) the sums of `of_device` over a set."""
        total = np.zeros((self.chunks, len(self._parameters.primes), REPETITIONS), np.uint64)
        for device in devices:
            total = add_tags(total, self.of_device(device), self._parameters)
        return total

    def of_residues(self, chunk: int, residues: Residues) -> Tag:
        """<r, x> modulo each prime, the part of a tag that depends on the ciphertext.

        Args:
            chunk: 0 <= c < chunks.
            residues: (2, primes, N) x.
        """
        if not 0 <= chunk < self.chunks:
            raise UsageError(f"there is no chunk {chunk} among {self.chunks}")
        coefficients = self._coefficients(chunk)
        primes = self._parameters.primes
        products = [
            sum(_products(coefficients[polynomial], residues[polynomial, place]) for polynomial in range(2)) % prime
            for place, prime in enumerate(primes)
        ]
        return np.array(products, np.uint64)

    def require(self, chunk: int, residues: Residues, tag: Tag, of_devices: Tag) -> None:
        """Refuse a ciphertext whose tag is not that of the devices.

        Args:
            chunk: 0 <= c < chunks.
            residues: (2, primes, N) of the sum.
            tag: of the sum.
            of_devices: the sum of F_K(R, device, chunk) over the devices.

        Raises:
            PeerError: the same for every forgery.
        """
        expected = add_tags(self.of_residues(chunk, residues), of_devices, self._parameters)
        if not hmac.compare_digest(expected.tobytes(), tag.tobytes()):
            raise refused()

    def _coefficients(self, chunk: int) -> NDArray[np.float64]:
        """(2, 4, N) r, for each polynomial and repetition."""
        count = 2 * REPETITIONS * self._parameters.degree
        stream = key_stream(self._prf(labels.HE_COEFFICIENTS, chunk), 0, 0).update(bytes(_COEFFICIENT_BYTES * count))
        return np.frombuffer(stream, "<u2").astype(np.float64).reshape(2, REPETITIONS, -1)

    def _prf(self, label: bytes, number: int) -> bytes:
        """32 bytes of HMAC-SHA256 under K."""
        return hmac.digest(self._key, labels.joined(label, self._round, number.to_bytes(8, "big")), "sha256")


def add_tags(one: NDArray[np.uint64], other: NDArray[np.uint64], parameters: Parameters) -> NDArray[np.uint64]:
    """The sums of tags, (..., primes, 4), each row modulo its prime."""
    return (one + other) % np.array(parameters.primes, np.uint64)[:, None]


def tag_bytes(parameters: Parameters) -> int:
    """Bytes of the tag of one ciphertext."""
    return 8 * REPETITIONS * len(parameters.primes)


def tag_to_wire(tag: Tag) -> bytes:
    """A tag as it travels."""
    return tag.astype("<u8").tobytes()


def tag_from_wire(data: bytes, parameters: Parameters) -> Tag:
    """The tag in a peer's bytes; raises PeerError where they are none."""
    if len(data) != tag_bytes(parameters):
        raise PeerError(Refusal.MALFORMED, f"expected a tag of {tag_bytes(parameters)} bytes, got {len(data)}")
    tag = np.frombuffer(data, "<u8").reshape(-1, REPETITIONS)
    if (tag >= np.array(parameters.primes, np.uint64)[:, None]).any():
        raise PeerError(Refusal.MALFORMED, "a tag that is not below its prime")
    return tag


def require_set(alive: Collection[int], floor: int, parameters: Parameters) -> None:
    """Refuse a set of devices that a sum may not be over.

    Args:
        alive: their indices, as the server says.
        floor: the fewest that this device accepts.
        parameters: which say how many there may be.

    Raises:
        PeerError: as for a tag that does not hold.
    """
    if (
        not max(1, floor) <= len(alive) <= parameters.clients
        or len(set(alive)) != len(alive)
        or not all(0 <= device <= LARGEST_INDEX for device in alive)
    ):
        raise refused()


def refused() -> PeerError:
    """The one refusal of a sum."""
    return PeerError(Refusal.CIPHERTEXT, "an encrypted sum is not that of the devices it is said to be of")


def _products(coefficients: NDArray[np.float64], residues: NDArray[np.uint64]) -> NDArray[Any]:
    """(4,) <r, x> for one polynomial, in Python's integers: limbs of x are multiplied in double precision, exactly."""
    limbs = np.empty((_LIMBS, len(residues)))
    for place in range(_LIMBS):
        limbs[place] = residues >> np.uint64(_LIMB_BITS * place) & np.uint64((1 << _LIMB_BITS) - 1)
    products = (coefficients @ limbs.T).astype(np.int64).astype(object)
    total: NDArray[Any] = products @ np.array([1 << _LIMB_BITS * place for place in range(_LIMBS)], object)
    return total
