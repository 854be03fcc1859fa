"""What BFV is run with: chosen from what is added up, the same way by everyone, so that nobody has to be believed.

BFV (Fan and Vercauteren, ePrint 2012/144) with batching: a ciphertext has N slots of integers modulo a prime t, and
adding ciphertexts adds slots. Several values share a slot, each in a field wide enough for the sum. The ciphertext
modulus q is the smallest one that leaves room for the noise of the sum, and N the one that costs the fewest bytes for
a value, at 128 bits of security.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod, sqrt

from propolis.secure import labels
from propolis.secure.errors import UsageError

# Bits of q and special prime together, for ternary secrets: Homomorphic Encryption Standard (2018), table 1, 128 bits.
LARGEST_MODULUS_BITS = {2048: 54, 4096: 109, 8192: 218}
MOST_CLIENTS = 2**16
LARGEST_VALUE_BITS = 32
# SEAL computes with plain moduli and primes of at most 60 bits.
_LARGEST_PRIME_BITS = 60

# Of SEAL's errors, which are centred binomial on 2 * 21 bits, and of its ternary secrets and masks.
_ERROR_VARIANCE, _TERNARY_VARIANCE = 21 / 2, 2 / 3
# Of what hides the rounding of messages under masks, see `propolis.secure.he.rounding`.
BLUR_DEVIATION = 2.0
# A coefficient is farther out than this many standard deviations with probability 2 exp(-50) < 2^-71.
_DEVIATIONS = 10
# Divides the noise of public-key encryption, which from here on is that of rounding.
_SMALLEST_SPECIAL_PRIME = 2**16

# Deterministic below 3.3e24: Sorenson and Webster, Math. Comp. 86 (2017).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


@dataclass(frozen=True, slots=True)
class Parameters:
    """One choice, as `choose` makes it.

    Attributes:
        clients: most ciphertexts that are added up.
        value_bits: b; a value is in [-2^(b-1), 2^(b-1)).
        seeded: encrypted under the secret key, half of a ciphertext being a seed; otherwise under the public one.
        degree: N, number of slots.
        fields: values that share a slot.
        plain_modulus: t, a prime = 1 modulo 2 N.
        primes: whose product is q; each is = 1 modulo 2 N.
        special_prime: the one more that keys have and ciphertexts don't.
    """

    clients: int
    value_bits: int
    seeded: bool
    degree: int
    fields: int
    plain_modulus: int
    primes: tuple[int, ...]
    special_prime: int

    @property
    def field_bits(self) -> int:
        """Bits of a field: those of a value and of the carries of the sum."""
        return _field_bits(self.clients, self.value_bits)

    @property
    def values(self) -> int:
        """Values in a ciphertext."""
        return self.degree * self.fields

    @property
    def key_primes(self) -> tuple[int, ...]:
        """The primes of keys."""
        return (*self.primes, self.special_prime)

    @property
    def public_key_bytes(self) -> int:
        """Bytes of a packed public key: two polynomials."""
        return 2 * sum(self.degree * prime.bit_length() for prime in self.key_primes) // 8

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for all of it."""
        numbers = (
            self.clients, self.value_bits, self.seeded, self.degree, self.fields, self.plain_modulus, *self.key_primes
        )  # fmt: skip
        return labels.digest(labels.HE_PARAMETERS, *(number.to_bytes(8, "big") for number in numbers))

    def ciphertexts(self, count: int) -> int:
        """How many ciphertexts hold so many values."""
        return -(-count // self.values)


@lru_cache(maxsize=64)
def choose(clients: int, value_bits: int, *, seeded: bool = False) -> Parameters:
    """The parameters that cost the fewest bytes for a value.

    Args:
        clients: n >= 1, the most ciphertexts that are added up.
        value_bits: b >= 1; a field has b + ceil(log2 n) bits.
        seeded: whether devices encrypt under the secret key and send a seed in place of half of the ciphertext.

    Raises:
        UsageError: an argument is out of range, or a field has no room in a slot.
    """
    if not (1 <= clients <= MOST_CLIENTS and 1 <= value_bits <= LARGEST_VALUE_BITS):
        raise UsageError(
            f"homomorphic encryption takes 1 to {MOST_CLIENTS} devices and values of 1 to {LARGEST_VALUE_BITS} bits, "
            f"got {clients} and {value_bits}"
        )
    return min(_candidates(clients, value_bits, seeded), key=_cost)


def noise_bound(parameters: Parameters) -> float:
    """What the largest coefficient of the noise of a whole sum stays below, but with probability N 2^-71.

    Fresh noise is e under the secret key, and (e u + e0 + e1 s) / p + rounding (1 + s) under the public one, with the
    special prime p. Rounding q m / t adds at most 1/2 for each client, which is counted twice, so that one bit of
    SEAL's noise budget is left where all messages are alike. Under masks it is rounded to a Gaussian around q m / t.
    """
    of_degree = _TERNARY_VARIANCE * parameters.degree
    variance = _ERROR_VARIANCE
    if not parameters.seeded:
        variance = _ERROR_VARIANCE * (1 + 2 * of_degree) / parameters.special_prime**2 + (1 + of_degree) / 12
    return _DEVIATIONS * sqrt(parameters.clients * (variance + BLUR_DEVIATION**2)) + parameters.clients


def is_prime(number: int) -> bool:
    """Whether a number below 3.3e24 is prime (Miller-Rabin with enough bases to be certain)."""
    if number < 2 or any(number % prime == 0 for prime in _WITNESSES):
        return number in _WITNESSES
    odd = number - 1
    twos = (odd & -odd).bit_length() - 1
    odd >>= twos
    return all(_passes(number, base, odd, twos) for base in _WITNESSES)


def _passes(number: int, base: int, odd: int, twos: int) -> bool:
    power = pow(base, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def _field_bits(clients: int, value_bits: int) -> int:
    return value_bits + (clients - 1).bit_length()


def _cost(parameters: Parameters) -> tuple[float, int]:
    """Bits of q for each value of a slot, then the degree: time, and what a last ciphertext wastes."""
    return sum(prime.bit_length() for prime in parameters.primes) / parameters.fields, parameters.degree


def _candidates(clients: int, value_bits: int, seeded: bool) -> Iterator[Parameters]:
    field = _field_bits(clients, value_bits)
    for degree in LARGEST_MODULUS_BITS:
        # The plain modulus must stay below 2^60, and be larger than the fields.
        for fields in range(1, (_LARGEST_PRIME_BITS - 1) // field + 1):
            plain = _prime_above(1 << fields * field, degree)
            special = _prime_above(_SMALLEST_SPECIAL_PRIME, degree)
            draft = Parameters(clients, value_bits, seeded, degree, fields, plain, (), special)
            yield from _with_primes(draft)


def _with_primes(draft: Parameters) -> Iterator[Parameters]:
    """The draft with the smallest q > 2 t noise, where security allows one."""
    needed = 2 * draft.plain_modulus * int(noise_bound(draft) + 1)
    most = LARGEST_MODULUS_BITS[draft.degree] - draft.special_prime.bit_length()
    for bits in range(needed.bit_length() - 1, most + 1):
        primes = _primes_of(bits, draft)
        if prod(primes) > needed:
            yield replace(draft, primes=primes)
            return


def _primes_of(bits: int, draft: Parameters) -> tuple[int, ...]:
    """Distinct primes with so many bits together, the largest of their sizes; none, where they are too small for N."""
    count = -(-bits // _LARGEST_PRIME_BITS)
    found: list[int] = []
    for place in range(count):
        size = bits // count + (place < bits % count)
        prime = _prime_below(1 << size, draft.degree, (*found, draft.plain_modulus, draft.special_prime))
        if prime.bit_length() != size:
            return ()
        found.append(prime)
    return tuple(found)


def _prime_above(bound: int, degree: int) -> int:
    """The smallest prime above `bound` that is 1 modulo 2 N."""
    number = bound // (2 * degree) * 2 * degree + 1
    while number <= bound or not is_prime(number):
        number += 2 * degree
    return number


def _prime_below(bound: int, degree: int, others: tuple[int, ...]) -> int:
    """The largest prime below `bound` that is 1 modulo 2 N and none of the others; 0 when there is none."""
    number = (bound - 2) // (2 * degree) * 2 * degree + 1
    while number > 1 and (number in others or not is_prime(number)):
        number -= 2 * degree
    return max(0, number)
