"""What a ciphertext tells of how its message was rounded, to who can decrypt the sum of many."""

from __future__ import annotations

import os
from math import prod
from typing import Any

import numpy as np
import pytest
from encrypting import decryptor, encryptor, key_of, scheme, summed, tags
from numpy.typing import NDArray

from propolis.secure.he.bfv import HEADER_BYTES, Encryptor, Scheme
from propolis.secure.he.field import Elements
from propolis.secure.he.parameters import Parameters
from propolis.secure.he.rounding import blur
from propolis.secure.he.seal_format import pack_residues, plaintext_coefficients
from propolis.secure.he.stream import encrypt_vector
from propolis.secure.prg import Mask

# One prime, so that residues modulo q are what travels.
SMALL = 10
COUNT = 12


def above(coefficients: Elements, parameters: Parameters) -> NDArray[np.float64]:
    """How far q m / t is above the nearest integer."""
    exact = coefficients.astype(object) * prod(parameters.primes)
    t = parameters.plain_modulus
    return np.array([((int(x) + t // 2) % t - t // 2) / t for x in exact])


def drawn(parameters: Parameters, seed: int) -> Elements:
    return np.random.default_rng(seed).integers(0, parameters.plain_modulus, parameters.degree, dtype=np.uint64)


def slope(errors: NDArray[np.float64], fractions: NDArray[np.float64]) -> float:
    """Of the line through the errors over the fractions: -1 of what is rounded, 0 of what tells nothing."""
    return float(np.polyfit(fractions, errors, 1)[0])


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("clients", [SMALL, 1000])
def test_what_is_added_is_a_gaussian_around_the_exact_quotient(clients: int, seeded: bool) -> None:
    parameters = scheme(clients, seeded=seeded).parameters
    coefficients = [drawn(parameters, seed) for seed in range(40)]
    fractions = np.concatenate([above(each, parameters) for each in coefficients])
    added = np.concatenate([blur(each, parameters, os.urandom) for each in coefficients]).astype(np.float64)
    assert slope(-fractions, fractions) == pytest.approx(-1)
    errors = added - fractions
    assert slope(errors, fractions) == pytest.approx(0, abs=0.1)
    assert np.mean(errors) == pytest.approx(0, abs=0.03)
    assert np.std(errors) == pytest.approx((4 + 1 / 12) ** 0.5, abs=0.03)
    # The next moments too: whatever the fraction is, it looks the same.
    low, high = errors[fractions < -0.25], errors[fractions > 0.25]
    assert np.var(low) == pytest.approx(np.var(high), rel=0.05)
    assert np.mean(low**4) == pytest.approx(np.mean(high**4), rel=0.1)
    assert np.abs(added).max() < 9 * 2 + 1


def secret_of(made: Scheme) -> NDArray[np.int64]:
    """(N,) the coefficients of the secret key: what (0, Delta) decrypts to."""
    parameters = made.parameters
    key_id, shape = key_of(made)[0].key_id, made._data_shape
    crafted = np.zeros((2, 1, parameters.degree), np.uint64)
    crafted[1, 0, 0] = prod(parameters.primes) // parameters.plain_modulus
    data = bytes((1, 0)) + key_id + pack_residues(crafted, shape)
    coefficients = coefficients_of(made, decryptor(made).decrypt(data))
    half = parameters.plain_modulus // 2
    return np.where(coefficients > half, coefficients.astype(np.int64) - parameters.plain_modulus, coefficients)


def coefficients_of(made: Scheme, slots: Elements) -> Elements:
    from propolis.secure.he.memory_file import saved_bytes

    return plaintext_coefficients(saved_bytes(made._encoded(slots)), made.parameters.degree)


def phase(ciphertext: NDArray[np.uint64], secret: NDArray[np.int64], q: int) -> NDArray[np.float64]:
    """(N,) c0 + c1 s modulo q, which is q m / t and the noise, as integers of Python."""
    first, second = ciphertext[0, 0].astype(np.int64), ciphertext[1, 0].astype(np.int64)
    total, degree = first.astype(object), len(secret)
    for power in np.nonzero(secret)[0]:
        turned = np.concatenate([-second[degree - power :], second[: degree - power]])
        total = total + turned * int(secret[power])
    return total % q


def errors_of(made: Scheme, encrypt: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The noise of some ciphertexts around q m / t, and the fractions of that."""
    parameters, secret = made.parameters, secret_of(made)
    assert set(np.unique(secret)) == {-1, 0, 1}
    (q,), t = parameters.primes, parameters.plain_modulus
    errors, fractions = [], []
    for seed in range(COUNT):
        slots = drawn(parameters, seed)
        coefficients = coefficients_of(made, slots)
        _, residues = getattr(encryptor(made), encrypt)(slots)
        scaled = (phase(residues, secret, q) * t - coefficients.astype(object) * q) % (q * t)
        errors.append(np.array([int(x) if 2 * x < q * t else int(x) - q * t for x in scaled]) / t)
        fractions.append(above(coefficients, parameters))
    return np.concatenate(errors), np.concatenate(fractions)


@pytest.mark.parametrize("seeded", [False, True])
def test_the_noise_of_a_blurred_ciphertext_does_not_depend_on_its_message(seeded: bool) -> None:
    """Seen with the secret key: an ordinary one shows what the message was rounded by."""
    made = scheme(SMALL, seeded=seeded)
    allowed = 5 * (240**0.5 if not seeded else 10.5**0.5) / (0.29 * (COUNT * made.parameters.degree) ** 0.5)
    assert slope(*errors_of(made, "encrypt")) == pytest.approx(-1, abs=allowed)
    assert slope(*errors_of(made, "encrypt_blurred")) == pytest.approx(0, abs=allowed)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("clients", [SMALL, 1000])
def test_a_blurred_ciphertext_is_tagged_and_opened_as_any_other(clients: int, seeded: bool) -> None:
    made = scheme(clients, seeded=seeded)
    slots = drawn(made.parameters, 1)
    data, residues = encryptor(made).encrypt_blurred(slots)
    read = decryptor(made)._scheme._read(data, key_of(made)[0].key_id)
    np.testing.assert_array_equal(decryptor(made)._scheme._whole(read, key_of(made)[0].key_id)[1], residues)
    np.testing.assert_array_equal(decryptor(made).decrypt(data), slots)


def test_what_goes_under_masks_is_blurred(monkeypatch: pytest.MonkeyPatch) -> None:
    made, called = scheme(SMALL), list[str]()
    for name in ("encrypt", "encrypt_blurred"):
        original = getattr(Encryptor, name)

        def noted(self: Encryptor, slots: Elements, name: str = name, original: Any = original) -> Any:
            called.append(name)
            return original(self, slots)

        monkeypatch.setattr(Encryptor, name, noted)
    values = np.zeros(10, np.int64)
    for masks in ((), (Mask(b"m" * 32, 1),)):
        list(encrypt_vector(values, encryptor(made), tags(made, 1), 0, masks))
    assert called == ["encrypt", "encrypt_blurred"]


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("clients", [2, 10, 100])
def test_a_full_sum_of_blurred_extremes_has_noise_budget_left(clients: int, seeded: bool) -> None:
    made = scheme(clients, seeded=seeded)
    largest = np.full(made.parameters.values, 2**15 - 1)
    masks = [Mask(b"m" * 32, 1)], [Mask(b"m" * 32, -1)]
    uploads = [
        list(encrypt_vector(largest, encryptor(made), tags(made, 1), device, masks[device % 2]))
        for device in range(clients)
    ]
    (data,) = summed(made, uploads)
    assert decryptor(made).noise_budget(data[: made.ciphertext_bytes]) > 0
    assert data[2:HEADER_BYTES] == key_of(made)[0].key_id
