"""Small signed integers to slots and back: several fields share a slot, and an offset makes values positive."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.errors import UsageError
from propolis.secure.he.field import Elements
from propolis.secure.he.parameters import Parameters


def pack(values: NDArray[np.signedinteger[Any]], parameters: Parameters) -> Elements:
    """The slots of one ciphertext.

    Value i goes to slot i mod N, in field i div N from the lowest bit up, as value + 2^(b-1). Where there
    are fewer values than there is room for, the rest are zeros.

    Args:
        values: (d,) with d at most `Parameters.values`, each in [-2^(b-1), 2^(b-1)).
        parameters: which say b and N.

    Raises:
        UsageError: there are more values, or one is out of range.
    """
    half = 1 << parameters.value_bits - 1
    if len(values) > parameters.values:
        raise UsageError(f"a ciphertext holds {parameters.values} values, got {len(values)}")
    if len(values) and not (-half <= int(values.min()) and int(values.max()) < half):
        raise UsageError(f"a value is outside of {parameters.value_bits} bits")
    fields = np.full(parameters.values, half, np.uint64)
    fields[: len(values)] += values.astype(np.int64).view(np.uint64)  # wraps around to what it should be
    slots = np.zeros(parameters.degree, np.uint64)
    for row in fields.reshape(parameters.fields, parameters.degree)[::-1]:
        slots <<= np.uint64(parameters.field_bits)
        slots |= row
    return slots


def unpack(slots: Elements, parameters: Parameters, summands: int, count: int) -> NDArray[np.int64]:
    """The sums in the slots of a ciphertext.

    Args:
        slots: (N,), the sum of so many packed ones.
        parameters: that they were packed with.
        summands: how many there are, whose offsets are taken off.
        count: how many values are wanted.
    """
    mask = np.uint64((1 << parameters.field_bits) - 1)
    fields = np.empty((parameters.fields, parameters.degree), np.uint64)
    for place, row in enumerate(fields):
        np.bitwise_and(slots >> np.uint64(parameters.field_bits * place), mask, out=row)
    sums = fields.reshape(-1)[:count].astype(np.int64)
    sums -= summands << parameters.value_bits - 1
    return sums
