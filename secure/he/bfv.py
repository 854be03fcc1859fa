"""BFV by Microsoft SEAL, through TenSEAL's bindings, which are imported here and nowhere else.

Ciphertexts are bytes outside of this file: a version, a kind, the id of the key, and packed residues
(`propolis.secure.he.seal_format`). So nothing that a peer can write makes one of another size, form or level, and
SEAL checks every residue when it loads them. TenSEAL holds Python's lock in all calls: threads gain nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.he import seal_format
from propolis.secure.he.field import Elements
from propolis.secure.he.memory_file import memory_file, saved_bytes
from propolis.secure.he.parameters import Parameters
from propolis.secure.he.rounding import blur
from propolis.secure.he.seal_format import SEED_BYTES, Residues, Shape, pack_residues

KEY_ID_BYTES = 32
_VERSION = 1
_WHOLE, _SEEDED = 0, 1
HEADER_BYTES = 2 + KEY_ID_BYTES


class Scheme:
    """BFV with certain parameters: makes keys, and whatever works with them.

    Args:
        parameters: from `propolis.secure.he.parameters.choose`.

    Raises:
        UsageError: TenSEAL is not installed, or SEAL does not take the parameters.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self._seal = seal = _sealapi()
        chosen = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
        chosen.set_poly_modulus_degree(parameters.degree)
        chosen.set_coeff_modulus([seal.Modulus(prime) for prime in parameters.key_primes])
        chosen.set_plain_modulus(seal.Modulus(parameters.plain_modulus))
        self._context = seal.SEALContext(chosen, True, seal.SEC_LEVEL_TYPE.TC128)
        if not self._context.parameters_set():
            raise UsageError(f"SEAL does not take the parameters: {self._context.parameters_error_message()}")
        self._encoder = seal.BatchEncoder(self._context)
        data, key = _id_bytes(self._context.first_parms_id()), _id_bytes(self._context.key_parms_id())
        self._data_shape = Shape(data, parameters.degree, parameters.primes)
        self._key_shape = Shape(key, parameters.degree, parameters.key_primes, ntt=True)

    @property
    def ciphertext_bytes(self) -> int:
        """Bytes of a sum."""
        return HEADER_BYTES + 2 * self._data_shape.packed_bytes

    @property
    def upload_bytes(self) -> int:
        """Bytes of a fresh ciphertext: those of a sum, or about half where it is seeded."""
        if self.parameters.seeded:
            return HEADER_BYTES + self._data_shape.packed_bytes + SEED_BYTES
        return self.ciphertext_bytes

    def generate(self) -> tuple[bytes, bytes]:
        """A new key: secret and public half."""
        generator = self._seal.KeyGenerator(self._context)
        secret = seal_format.plaintext_to_wire(saved_bytes(generator.secret_key()), self._key_shape)
        public = self._seal.PublicKey()
        generator.create_public_key(public)
        return secret, seal_format.ciphertext_to_wire(saved_bytes(public), self._key_shape)

    def public_encryptor(self, public: bytes, key_id: bytes) -> Encryptor:
        """Encrypts under a public key.

        Raises:
            PeerError: the bytes are no public key of these parameters.
        """
        key = self._seal.PublicKey()
        saved = seal_format.ciphertext_from_wire(public, self._key_shape)
        self._load(key, saved, Refusal.HE_KEY, "these bytes are no public key")
        return Encryptor(self, self._seal.Encryptor(self._context, key).encrypt, key_id)

    def secret_encryptor(self, secret: bytes, key_id: bytes) -> Encryptor:
        """Encrypts under a secret key, to half the bytes; raises as `decryptor`."""
        encryptor = self._seal.Encryptor(self._context, self._secret_key(secret))
        return Encryptor(self, encryptor.encrypt_symmetric, key_id)

    def decryptor(self, secret: bytes, key_id: bytes) -> Decryptor:
        """Decrypts.

        Raises:
            PeerError: the bytes are no secret key of these parameters.
        """
        return Decryptor(self, self._seal.Decryptor(self._context, self._secret_key(secret)), key_id)

    def adder(self, key_id: bytes) -> Adder:
        """Adds up, which takes no key."""
        return Adder(self, self._seal.Evaluator(self._context), key_id)

    def _secret_key(self, secret: bytes) -> Any:
        key = self._seal.SecretKey()
        saved = seal_format.plaintext_from_wire(secret, self._key_shape)
        self._load(key, saved, Refusal.HE_KEY, "these bytes are no secret key")
        return key

    def _payload(self, data: bytes, key_id: bytes) -> bytes:
        """What comes after the header, of the size that its kind has."""
        sizes = {_WHOLE: self.ciphertext_bytes, _SEEDED: HEADER_BYTES + self._data_shape.packed_bytes + SEED_BYTES}
        if len(data) < HEADER_BYTES or data[0] != _VERSION or len(data) != sizes.get(data[1]):
            raise PeerError(Refusal.MALFORMED, f"{len(data)} bytes are no ciphertext of these parameters")
        if data[2:HEADER_BYTES] != key_id:
            raise PeerError(Refusal.HE_KEY, "a ciphertext under another key")
        return data[HEADER_BYTES:]

    def _read(self, data: bytes, key_id: bytes) -> Any:
        """The ciphertext in a peer's bytes."""
        payload = self._payload(data, key_id)
        from_wire = seal_format.seeded_from_wire if data[1] == _SEEDED else seal_format.ciphertext_from_wire
        ciphertext = self._seal.Ciphertext(self._context)
        saved = from_wire(payload, self._data_shape)
        self._load(ciphertext, saved, Refusal.MALFORMED, "a ciphertext that SEAL does not take")
        self._require_addable(ciphertext)
        return ciphertext

    def _residues(self, data: bytes, key_id: bytes) -> Residues:
        """(2, primes, N) what a whole ciphertext consists of."""
        payload = self._payload(data, key_id)
        if data[1] != _WHOLE:
            raise PeerError(Refusal.MALFORMED, "a seed in place of a sum")
        return seal_format.unpack_residues(payload, 2, self._data_shape)

    def _require_addable(self, ciphertext: Any) -> None:
        """Refuse what is not two polynomials of the level of fresh ciphertexts, or shows its plaintext."""
        if (
            ciphertext.size() != 2
            or ciphertext.is_ntt_form()
            or ciphertext.parms_id() != self._context.first_parms_id()
        ):
            raise PeerError(Refusal.MALFORMED, "a ciphertext of another size, form or level")
        if ciphertext.is_transparent():
            raise PeerError(Refusal.MALFORMED, "a ciphertext that hides nothing")

    def _whole(self, ciphertext: Any, key_id: bytes) -> tuple[bytes, Residues]:
        """The bytes of a ciphertext, and its residues."""
        residues = seal_format.ciphertext_residues(saved_bytes(ciphertext), self._data_shape)
        return self._from_residues(residues, key_id), residues

    def _from_residues(self, residues: Residues, key_id: bytes) -> bytes:
        return bytes((_VERSION, _WHOLE)) + key_id + seal_format.pack_residues(residues, self._data_shape)

    def _seeded(self, serializable: Any, key_id: bytes) -> tuple[bytes, Residues]:
        """The bytes of a ciphertext that SEAL has a seed of, and its residues, which SEAL gives when it is loaded."""
        packed = seal_format.seeded_to_wire(saved_bytes(serializable), self._data_shape)
        data = bytes((_VERSION, _SEEDED)) + key_id + packed
        return data, seal_format.ciphertext_residues(saved_bytes(self._read(data, key_id)), self._data_shape)

    def _load(self, target: Any, saved: bytes, refusal: Refusal, message: str) -> None:
        with memory_file(saved) as path:
            try:
                target.load(self._context, path)
            except (RuntimeError, ValueError):
                raise PeerError(refusal, message) from None

    def _encoded(self, slots: Elements) -> Any:
        if len(slots) != self.parameters.degree or int(slots.max()) >= self.parameters.plain_modulus:
            raise UsageError(f"a plaintext has {self.parameters.degree} slots below the plain modulus")
        plaintext = self._seal.Plaintext()
        self._encoder.encode(slots.tolist(), plaintext)
        return plaintext


class Encryptor:
    """Encrypts slots; made by a `Scheme`."""

    def __init__(self, scheme: Scheme, encrypt: Callable[..., Any], key_id: bytes) -> None:
        self._scheme, self._encrypt, self._key_id = scheme, encrypt, key_id

    @property
    def parameters(self) -> Parameters:
        """What it encrypts with."""
        return self._scheme.parameters

    def encrypt(self, slots: Elements) -> tuple[bytes, Residues]:
        """A fresh ciphertext, and its residues, which a seed stands for half of in the bytes.

        Args:
            slots: (N,) in [0, t).

        Raises:
            UsageError: they are not.
        """
        return self._encrypted(self._scheme._encoded(slots))

    def encrypt_blurred(self, slots: Elements) -> tuple[bytes, Residues]:
        """The same, so that a sum tells who decrypts it nothing but the sum, see `propolis.secure.he.rounding`."""
        scheme, plaintext = self._scheme, self._scheme._encoded(slots)
        data, residues = self._encrypted(plaintext)
        coefficients = seal_format.plaintext_coefficients(saved_bytes(plaintext), scheme.parameters.degree)
        primes = np.array(scheme.parameters.primes, np.int64)[:, None]
        blurred = residues.copy()
        blurred[0] = (residues[0].astype(np.int64) + blur(coefficients, scheme.parameters, os.urandom)) % primes
        return self.with_first(data, blurred[0]), blurred

    def with_first(self, data: bytes, polynomial: NDArray[np.uint64]) -> bytes:
        """A ciphertext's bytes with another first polynomial, (primes, N)."""
        shape = self._scheme._data_shape
        return data[:HEADER_BYTES] + pack_residues(polynomial, shape) + data[HEADER_BYTES + shape.packed_bytes :]

    def _encrypted(self, plaintext: Any) -> tuple[bytes, Residues]:
        scheme = self._scheme
        if scheme.parameters.seeded:
            return scheme._seeded(self._encrypt(plaintext), self._key_id)
        ciphertext = scheme._seal.Ciphertext(scheme._context)
        self._encrypt(plaintext, ciphertext)
        return scheme._whole(ciphertext, self._key_id)


class Decryptor:
    """Decrypts sums; made by a `Scheme`.

    It decrypts whatever it is given, so what a peer sends must have been found authentic before: even whether a
    decryption looks right tells the peer about the key.
    """

    def __init__(self, scheme: Scheme, decryptor: Any, key_id: bytes) -> None:
        self._scheme, self._decryptor, self._key_id = scheme, decryptor, key_id

    @property
    def parameters(self) -> Parameters:
        """What it decrypts with."""
        return self._scheme.parameters

    def residues(self, data: bytes) -> Residues:
        """(2, primes, N) what a sum consists of, which needs no key; raises as `decrypt`."""
        return self._scheme._residues(data, self._key_id)

    def decrypt(self, data: bytes) -> Elements:
        """(N,) slots in [0, t).

        Raises:
            PeerError: the bytes are no ciphertext under this key id.
        """
        ciphertext, plaintext = self._scheme._read(data, self._key_id), self._scheme._seal.Plaintext()
        self._decryptor.decrypt(ciphertext, plaintext)
        return np.array(self._scheme._encoder.decode_uint64(plaintext), np.uint64)

    def noise_budget(self, data: bytes) -> int:
        """Bits that the noise may still grow by; 0 is too late. Raises as `decrypt`."""
        return int(self._decryptor.invariant_noise_budget(self._scheme._read(data, self._key_id)))


class Adder:
    """Ciphertexts in memory, and their sums; made by a `Scheme`."""

    def __init__(self, scheme: Scheme, evaluator: Any, key_id: bytes) -> None:
        self._scheme, self._evaluator, self._key_id = scheme, evaluator, key_id

    @property
    def parameters(self) -> Parameters:
        """What it adds up with."""
        return self._scheme.parameters

    def read(self, data: bytes) -> Any:
        """The ciphertext in a peer's bytes; raises PeerError where there is none under this key id."""
        return self._scheme._read(data, self._key_id)

    def write(self, ciphertext: Any) -> bytes:
        """The bytes of a sum."""
        return self._scheme._whole(ciphertext, self._key_id)[0]

    def residues(self, ciphertext: Any) -> Residues:
        """(2, primes, N) what a sum consists of."""
        return self._scheme._whole(ciphertext, self._key_id)[1]

    def whole(self, residues: Residues) -> bytes:
        """The bytes of a sum that consists of these residues."""
        return self._scheme._from_residues(residues, self._key_id)

    def add(self, one: Any, other: Any) -> Any:
        """The sum of two ciphertexts, which stay as they are; raises PeerError when it would hide nothing."""
        total = self._scheme._seal.Ciphertext(self._scheme._context)
        try:
            self._evaluator.add(one, other, total)
        except RuntimeError:  # what SEAL says of a sum that hides nothing
            raise PeerError(Refusal.MALFORMED, "a ciphertext that takes the others away") from None
        return total


@cache
def _sealapi() -> Any:
    try:
        import tenseal.sealapi as sealapi
        import zstandard  # noqa: F401  (what SEAL compresses with)
    except ImportError:
        raise UsageError("homomorphic encryption needs TenSEAL: pip install 'propolis[he]'") from None
    return sealapi


def _id_bytes(words: list[int]) -> bytes:
    return np.array(words, "<u8").tobytes()
