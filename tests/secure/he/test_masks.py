"""Masks of ciphertexts: uniform modulo every prime, for tags as for polynomials, and gone when they are taken away."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from attacks.uniformity import looks_uniform
from encrypting import adder, decryptor, drawn, encryptor, scheme, tags
from numpy.typing import NDArray

from propolis.secure.errors import PeerError
from propolis.secure.he.masks import CiphertextMasks
from propolis.secure.he.parameters import Parameters
from propolis.secure.he.stream import Declared, Totals, encrypt_vector, open_vector
from propolis.secure.he.tag import REPETITIONS
from propolis.secure.prg import LANE_STREAM, Mask, apply_masks
from propolis.secure.ring import Ring

PARAMETERS = scheme(1000).parameters
ONE = Mask(b"1" * 32, 1)


def of_zeros(masks: list[Mask], parameters: Parameters = PARAMETERS, chunks: int = 1) -> tuple[NDArray[np.uint64], ...]:
    """What masks add to nothing: (chunks, primes, N) and (chunks, primes, 4)."""
    streams, primes = CiphertextMasks(masks, parameters), len(parameters.primes)
    polynomial, tag = np.zeros((primes, parameters.degree), np.uint64), np.zeros((primes, REPETITIONS), np.uint64)
    added = [streams.onto(polynomial, tag) for _ in range(chunks)]
    return np.stack([one for one, _ in added]), np.stack([one for _, one in added])


def test_every_residue_and_every_tag_is_uniform_and_another_one() -> None:
    for added in of_zeros([ONE], chunks=500):
        assert (added < np.array(PARAMETERS.primes, np.uint64)[:, None]).all()
        assert len(np.unique(added)) > 0.999 * added.size
        for place, prime in enumerate(PARAMETERS.primes):
            shares = (added[:, place].astype(object) * 256 // prime).astype(np.uint8)
            assert looks_uniform(shares.tobytes())


def test_residues_of_one_coefficient_tell_nothing_of_each_other() -> None:
    """From one stream both would be of one number below 2^64, where there are four times as many."""
    first, second = (of_zeros([ONE], chunks=4)[0][:, place].reshape(-1).astype(object) for place in range(2))
    p, q = PARAMETERS.primes
    whole = (first * q * pow(q, -1, p) + second * p * pow(p, -1, q)) % (p * q)
    assert np.mean(whole >= 2**64) == pytest.approx(1 - 2**64 / prod(PARAMETERS.primes), abs=0.02)


def test_no_mask_of_a_ciphertext_is_one_of_the_lanes() -> None:
    """They grow from the same seeds."""
    lanes = np.zeros(8 * PARAMETERS.degree, np.uint64)
    apply_masks(lanes, [ONE], Ring(64), LANE_STREAM)
    polynomials, tags_ = of_zeros([ONE], chunks=3)
    for place, prime in enumerate(PARAMETERS.primes):
        used = set((lanes % np.uint64(prime)).tolist())
        for added in (polynomials, tags_):
            assert not used & set(added[:, place].reshape(-1).tolist())


def test_masks_add_up_and_signs_take_away() -> None:
    other = Mask(b"2" * 32, 1)
    both, alone = of_zeros([ONE, other])[0], of_zeros([other])[0]
    again = of_zeros([ONE, other, Mask(ONE.seed, -1)])[0]
    np.testing.assert_array_equal(again, alone)
    assert (both != alone).mean() > 0.99


@pytest.mark.parametrize("seeded", [False, True])
def test_a_sum_is_opened_once_all_masks_are_off_and_not_before(seeded: bool) -> None:
    made, count, devices = scheme(10, seeded=seeded), 10_000, range(3)
    chunks = made.parameters.ciphertexts(count)
    masks = [[Mask(bytes((device, place)) * 16, 1) for place in range(2)] for device in devices]
    totals, values = Totals(adder(made), chunks), [drawn(made, count, device) for device in devices]
    for device in devices:
        totals.add(encrypt_vector(values[device], encryptor(made), tags(made, chunks), device, masks[device]))
    negative = [Mask(mask.seed, -1) for each in masks for mask in each]
    declared = Declared(devices, 3, count)
    for left in (negative[:-1], negative[1:], []):
        with pytest.raises(PeerError):
            open_vector(totals.without(left), decryptor(made), tags(made, chunks), declared)
    opened = open_vector(totals.without(negative), decryptor(made), tags(made, chunks), declared)
    np.testing.assert_array_equal(opened, sum(values))
