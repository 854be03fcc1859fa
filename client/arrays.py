"""Torch tensors to Flower's arrays and back, without parsing the same array header again and again.

Flower's Array holds a tensor as an ``.npy`` file. For a small model, `numpy.load` spends most of a device's time on
the header, which is the same in every round; here it is parsed and written once per shape and type.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from math import prod

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from torch import Tensor

from propolis.secure.errors import UsageError

_STYPE = "numpy.ndarray"
_MAGIC = b"\x93NUMPY\x01\x00"
_LENGTH_BYTES = 2


def record_of(state: Mapping[str, Tensor]) -> ArrayRecord:
    """The tensors (on the CPU) as a record, by name."""
    return ArrayRecord({name: _array_of(tensor) for name, tensor in state.items()})


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The record's arrays as tensors of their own memory.

    Raises:
        UsageError: an array is not an ``.npy`` file of numbers, or its length is not what its shape says.
    """
    return {name: _tensor_of(name, array) for name, array in record.items()}


def _array_of(tensor: Tensor) -> Array:
    values = tensor.numpy()
    header = _header_of(values.dtype.str, values.shape)
    return Array(dtype=str(values.dtype), shape=values.shape, stype=_STYPE, data=header + values.tobytes())


def _tensor_of(name: str, array: Array) -> Tensor:
    start = len(_MAGIC) + _LENGTH_BYTES
    if array.stype != _STYPE or not array.data.startswith(_MAGIC):
        raise UsageError(f"{name}: expected an .npy array of version 1, got {array.stype} {array.data[:8]!r}")
    end = start + int.from_bytes(array.data[len(_MAGIC) : start], "little")
    dtype, shape = _parse_header(array.data[len(_MAGIC) : end])
    if len(array.data) != end + dtype.itemsize * prod(shape):
        raise UsageError(f"{name}: {len(array.data) - end} bytes are not an array of {dtype} and shape {shape}")
    return torch.from_numpy(np.frombuffer(array.data, dtype, offset=end).reshape(shape).copy())


@lru_cache(maxsize=4096)
def _header_of(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@lru_cache(maxsize=4096)
def _parse_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    try:
        shape, fortran_order, dtype = npy.read_array_header_1_0(BytesIO(header))
    except ValueError as error:
        raise UsageError(f"an array's header is malformed: {error}") from None
    if fortran_order or dtype.hasobject:
        raise UsageError(f"an array must hold numbers in C order, got {dtype}")
    return dtype, shape
