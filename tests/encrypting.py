"""Keys and encrypted sums for tests: whatever takes time is made once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from propolis.secure.he.bfv import Adder, Decryptor, Encryptor, Scheme
from propolis.secure.he.keys import PublicKey, Secret, make_key
from propolis.secure.he.parameters import choose
from propolis.secure.he.stream import Totals, encrypt_vector
from propolis.secure.he.tag import Tags

FEDERATION = bytes(range(32))
ROUND = b"run 7, round 3, attempt 1"


def scheme(clients: int = 10, value_bits: int = 16, seeded: bool = False) -> Scheme:
    return _scheme(clients, value_bits, seeded)


@cache
def _scheme(clients: int, value_bits: int, seeded: bool) -> Scheme:
    return Scheme(choose(clients, value_bits, seeded=seeded))


def key_of(made_with: Scheme, number: int = 0) -> tuple[PublicKey, Secret]:
    return _key_of(made_with, number)


@cache
def _key_of(made_with: Scheme, number: int) -> tuple[PublicKey, Secret]:
    return make_key(FEDERATION, made_with)


def encryptor(made_with: Scheme, number: int = 0) -> Encryptor:
    public, secret = key_of(made_with, number)
    if made_with.parameters.seeded:
        return made_with.secret_encryptor(secret.secret_key, public.key_id)
    return made_with.public_encryptor(public.public_key, public.key_id)


def decryptor(made_with: Scheme, number: int = 0) -> Decryptor:
    public, secret = key_of(made_with, number)
    return made_with.decryptor(secret.secret_key, public.key_id)


def adder(made_with: Scheme, number: int = 0) -> Adder:
    return made_with.adder(key_of(made_with, number)[0].key_id)


def tags(made_with: Scheme, chunks: int, round_id: bytes = ROUND) -> Tags:
    return Tags(key_of(made_with)[1].mac_key, round_id, made_with.parameters, chunks)


def drawn(made_with: Scheme, count: int, seed: int) -> NDArray[np.int64]:
    """(count,) values of any size that fits."""
    half = 1 << made_with.parameters.value_bits - 1
    return np.random.default_rng(seed).integers(-half, half, count)


def upload(made_with: Scheme, device: int, values: NDArray[np.int64]) -> list[bytes]:
    chunks = made_with.parameters.ciphertexts(len(values))
    return list(encrypt_vector(values, encryptor(made_with), tags(made_with, chunks), device))


def summed(made_with: Scheme, uploads: Sequence[Sequence[bytes]]) -> list[bytes]:
    totals = Totals(adder(made_with), len(uploads[0]))
    for each in uploads:
        totals.add(each)
    return list(totals.ciphertexts())
