"""Parameters are secure, leave room for the noise, are the cheapest, and everybody chooses the same."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import sympy
import tenseal.sealapi as sealapi
from encrypting import scheme
from hypothesis import given
from hypothesis import strategies as st

from propolis.secure.errors import UsageError
from propolis.secure.he.parameters import LARGEST_MODULUS_BITS, Parameters, choose, is_prime, noise_bound

CASES = [(1, 1), (1, 8), (2, 16), (10, 4), (10, 16), (32, 8), (100, 16), (1000, 8), (1000, 16), (2**16, 32)]
every_case = pytest.mark.parametrize(("clients", "value_bits"), CASES)
both_modes = pytest.mark.parametrize("seeded", [False, True], ids=["public", "seeded"])


@given(st.integers(0, 2**62))
def test_primes_are_known(number: int) -> None:
    assert is_prime(number) == sympy.isprime(number)


def test_small_primes_and_the_numbers_that_pass_for_primes_are_told_apart() -> None:
    # Carmichael numbers, and the smallest that pass for prime to the first 4, 8 and 12 prime bases.
    hard = [561, 1729, 3215031751, 341550071728321, 318665857834031151167461]
    assert [is_prime(number) for number in hard] == [False] * len(hard)
    assert [number for number in range(2000) if is_prime(number)] == list(sympy.primerange(2000))


@every_case
@both_modes
def test_parameters_are_secure_and_leave_room(clients: int, value_bits: int, seeded: bool) -> None:
    chosen = choose(clients, value_bits, seeded=seeded)
    moduli = (*chosen.key_primes, chosen.plain_modulus)
    assert len(set(moduli)) == len(moduli)
    assert min(chosen.primes) > 2**16  # what the coefficients of tags are below
    assert all(sympy.isprime(each) and each % (2 * chosen.degree) == 1 for each in moduli)
    assert prod(chosen.key_primes).bit_length() <= LARGEST_MODULUS_BITS[chosen.degree]
    assert clients * (2**value_bits - 1) < 2**chosen.field_bits
    assert 2 ** (chosen.fields * chosen.field_bits) < chosen.plain_modulus < 2**60
    assert prod(chosen.primes) > 2 * chosen.plain_modulus * noise_bound(chosen)
    bits = sum(each.bit_length() for each in chosen.primes)
    assert 2 ** (bits - 1) < 2 * chosen.plain_modulus * (noise_bound(chosen) + 1)  # one bit less would not do


def test_the_bounds_are_those_that_seal_knows() -> None:
    for degree, bits in LARGEST_MODULUS_BITS.items():
        assert sealapi.CoeffModulus.MaxBitCount(degree, sealapi.SEC_LEVEL_TYPE.TC128) == bits


@pytest.mark.parametrize(
    ("clients", "value_bits", "public", "seeded"), [(1000, 16, 12, 6.5), (32, 8, 6, 3.5)], ids=["16 bits", "8 bits"]
)
def test_a_value_costs_few_bytes(clients: int, value_bits: int, public: float, seeded: float) -> None:
    for most, is_seeded in ((public, False), (seeded, True)):
        made = scheme(clients, value_bits, is_seeded)
        assert made.upload_bytes / made.parameters.values < most


# What everybody must choose alike: N, fields, t, primes. A change here is another version of the material.
PINNED = {
    (1000, 16, False): (4096, 2, 4503599627542529, (8589852673, 8589844481)),
    (1000, 16, True): (4096, 2, 4503599627542529, (8589852673, 4294828033)),
    (32, 8, False): (4096, 4, 4503599627542529, (4294828033, 2147377153)),
    (32, 8, True): (4096, 4, 4503599627542529, (2147377153, 1073692673)),
    (10, 16, False): (4096, 2, 1099511799809, (1125899906826241,)),
    (65536, 32, True): (4096, 1, 281474976768001, (8589852673, 8589844481)),
}


@pytest.mark.parametrize("case", PINNED)
def test_everybody_chooses_alike(case: tuple[int, int, bool]) -> None:
    chosen = choose(case[0], case[1], seeded=case[2])
    assert (chosen.degree, chosen.fields, chosen.plain_modulus, chosen.primes) == PINNED[case]


def test_the_digest_stands_for_every_number() -> None:
    chosen = choose(10, 16)
    changed: list[Parameters] = [
        replace(chosen, clients=11),
        replace(chosen, value_bits=15),
        replace(chosen, seeded=True),
        replace(chosen, degree=8192),
        replace(chosen, fields=1),
        replace(chosen, plain_modulus=chosen.plain_modulus + 2),
        replace(chosen, primes=(*chosen.primes, 3)),
        replace(chosen, special_prime=3),
    ]
    assert len({each.digest for each in [chosen, *changed]}) == 1 + len(changed)


@pytest.mark.parametrize(("clients", "value_bits"), [(0, 8), (2**16 + 1, 8), (10, 0), (10, 33)])
def test_what_no_parameters_can_be_chosen_for_is_refused(clients: int, value_bits: int) -> None:
    with pytest.raises(UsageError, match="takes 1 to 65536 devices"):
        choose(clients, value_bits)
