"""What the benchmark of homomorphic encryption compares: our BFV, and CKKS as NVFlare uses it by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from propolis.secure.errors import UsageError
from propolis.secure.he.bfv import Decryptor, Encryptor, Scheme
from propolis.secure.he.keys import make_key
from propolis.secure.he.parameters import Parameters, choose
from propolis.secure.he.stream import Declared, Totals, encrypt_vector, open_vector
from propolis.secure.he.tag import Tags

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]

_FEDERATION, _ROUND = bytes(32), b"bench"
_CKKS_DEGREE, _CKKS_BITS, _CKKS_SCALE = 8192, (60, 40, 40), 2.0**40


class Side(Protocol):
    """Devices and a server that add up vectors of real numbers in [-1, 1]."""

    name: str

    def encrypt(self, values: Reals) -> list[bytes]:
        """The next device's upload."""

    def add(self, upload: Sequence[bytes]) -> None:
        """What the server does with an upload: read it, and add it to the sums."""

    def write(self) -> list[bytes]:
        """What the server sends to the devices."""

    def open(self, sums: Sequence[bytes], count: int) -> Reals:
        """(count,) what a device reads in it: the mean over the uploads so far."""


class Key:
    """A key of ours, and all that works with it in a round.

    Args:
        parameters: from `propolis.secure.he.parameters.choose`.
        count: values of a vector.
    """

    def __init__(self, parameters: Parameters, count: int) -> None:
        self.scheme = scheme = Scheme(parameters)
        self.public, self._secret = make_key(_FEDERATION, scheme)
        self.chunks = parameters.ciphertexts(count)
        self.tags = Tags(self._secret.mac_key, _ROUND, parameters, self.chunks)

    @property
    def parameters(self) -> Parameters:
        """What the key is for."""
        return self.scheme.parameters

    def encryptor(self) -> Encryptor:
        """A device's."""
        if self.parameters.seeded:
            return self.scheme.secret_encryptor(self._secret.secret_key, self.public.key_id)
        return self.scheme.public_encryptor(self.public.public_key, self.public.key_id)

    def decryptor(self) -> Decryptor:
        """A device's."""
        return self.scheme.decryptor(self._secret.secret_key, self.public.key_id)

    def totals(self) -> Totals:
        """The server's."""
        return Totals(self.scheme.adder(self.public.key_id), self.chunks)


class Bfv:
    """Our BFV; packing, tags and bytes are in everything that it does.

    Args:
        clients: most devices of a sum.
        value_bits: b; a real number is rounded to a multiple of 1 / (2^(b-1) - 1).
        seeded: whether devices encrypt under the secret key.
        count: values of a vector.
    """

    def __init__(self, clients: int, value_bits: int, seeded: bool, count: int) -> None:
        self.key = Key(choose(clients, value_bits, seeded=seeded), count)
        self.name = f"{value_bits} bits, n <= {clients:,}, {'seeded' if seeded else 'public-key'}"
        self.levels = (1 << value_bits - 1) - 1
        self._encryptor, self._decryptor, self._totals = self.key.encryptor(), self.key.decryptor(), self.key.totals()
        self._devices = 0

    def rounded(self, values: Reals) -> Integers:
        """The integers that stand for real numbers."""
        return np.rint(values * self.levels).astype(np.int64)

    def encrypt(self, values: Reals) -> list[bytes]:
        """See `Side.encrypt`."""
        self._devices += 1
        return list(encrypt_vector(self.rounded(values), self._encryptor, self.key.tags, self._devices - 1))

    def add(self, upload: Sequence[bytes]) -> None:
        """See `Side.add`."""
        self._totals.add(upload)

    def write(self) -> list[bytes]:
        """See `Side.write`."""
        return list(self._totals.ciphertexts())

    def open(self, sums: Sequence[bytes], count: int) -> Reals:
        """See `Side.open`."""
        declared = Declared(range(self._devices), 1, count)
        opened = open_vector(sums, self._decryptor, self.key.tags, declared)
        return opened / (self.levels * self._devices)


class Ckks:
    """CKKS through TenSEAL with NVFlare's default parameters, encrypted symmetrically, a ciphertext at a time."""

    name = "CKKS as in NVFlare"

    def __init__(self) -> None:
        self._tenseal = tenseal = _tenseal()
        context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            poly_modulus_degree=_CKKS_DEGREE,
            coeff_mod_bit_sizes=list(_CKKS_BITS),
            encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        )
        context.global_scale = _CKKS_SCALE
        self._devices, self._context = 0, context
        self._server = tenseal.context_from(context.serialize(save_secret_key=False))
        self._totals: list[Any] = []

    def encrypt(self, values: Reals) -> list[bytes]:
        """See `Side.encrypt`."""
        self._devices += 1
        slots = _CKKS_DEGREE // 2
        pieces = (values[begin : begin + slots] for begin in range(0, len(values), slots))
        return [self._tenseal.ckks_vector(self._context, piece).serialize() for piece in pieces]

    def add(self, upload: Sequence[bytes]) -> None:
        """See `Side.add`."""
        read = [self._tenseal.ckks_vector_from(self._server, data) for data in upload]
        if not self._totals:
            self._totals = read
            return
        for total, one in zip(self._totals, read, strict=True):
            total.add_(one)

    def write(self) -> list[bytes]:
        """See `Side.write`."""
        return [total.serialize() for total in self._totals]

    def open(self, sums: Sequence[bytes], count: int) -> Reals:
        """See `Side.open`."""
        opened = [self._tenseal.ckks_vector_from(self._context, data).decrypt() for data in sums]
        mean: Reals = np.concatenate(opened)[:count] / self._devices
        return mean


def _tenseal() -> Any:
    try:
        import tenseal
    except ImportError:
        raise UsageError("the benchmark needs TenSEAL: pip install 'propolis[he]'") from None
    return tenseal
