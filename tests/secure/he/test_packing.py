"""Values go into slots and their sums come out, at whatever size, and a carry never reaches the next field."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.errors import UsageError
from propolis.secure.he.packing import pack, unpack
from propolis.secure.he.parameters import choose

cases = st.tuples(st.integers(1, 2000), st.integers(1, 32))


@given(cases, st.integers(0, 2**32), st.integers(0, 50), st.sampled_from(["any", "least", "most"]))
@settings(max_examples=60, deadline=None)
def test_sums_of_slots_are_sums_of_values(case: tuple[int, int], seed: int, missing: int, extreme: str) -> None:
    parameters, rng = choose(*case), np.random.default_rng(seed)
    half = 1 << parameters.value_bits - 1
    count = parameters.values - missing
    if extreme == "any":
        values = rng.integers(-half, half, (2, count))
        scale = [1, parameters.clients - 1]  # one device, and all the others with the same values
    else:
        values, scale = np.full((2, count), -half if extreme == "least" else half - 1), [1, parameters.clients - 1]
    packed = [pack(each, parameters).astype(object) * times for each, times in zip(values, scale, strict=True)]
    slots = packed[0] + packed[1]
    assert all(0 <= slot < parameters.plain_modulus for slot in slots)
    sums = unpack(slots.astype(np.uint64), parameters, parameters.clients, count)
    np.testing.assert_array_equal(sums, values[0] * scale[0] + values[1] * scale[1])


def test_fields_fill_a_slot_from_its_lowest_bits() -> None:
    parameters = choose(10, 4)  # fields of 8 bits
    values = np.zeros(parameters.degree + 1, np.int64)
    values[0], values[-1] = -8, 7
    slots = pack(values, parameters)
    assert parameters.field_bits == 8
    assert [int(slots[0]) & 0xFF, int(slots[0]) >> 8 & 0xFF, int(slots[0]) >> 16 & 0xFF] == [0, 15, 8]


def test_what_does_not_fit_is_refused() -> None:
    parameters = choose(10, 8)
    pack(np.array([-128, 127]), parameters)
    for value in (-129, 128):
        with pytest.raises(UsageError, match="outside of 8 bits"):
            pack(np.array([value]), parameters)
    with pytest.raises(UsageError, match="a ciphertext holds"):
        pack(np.zeros(parameters.values + 1, np.int64), parameters)
