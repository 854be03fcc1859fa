from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from propolis.client.arrays import record_of, tensors_of
from propolis.secure.errors import UsageError

DTYPES = st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_])


@given(DTYPES.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))))
def test_flower_reads_what_we_write_and_we_read_what_flower_writes(values: np.ndarray) -> None:
    tensor = torch.from_numpy(np.array(values))
    np.testing.assert_array_equal(record_of({"x": tensor})["x"].numpy(), values)
    read = tensors_of(ArrayRecord({"x": Array(np.array(values))}))["x"].numpy()
    np.testing.assert_array_equal(read, values)
    assert (read.dtype, read.shape) == (values.dtype, values.shape)


def test_tensors_own_their_memory() -> None:
    record = record_of({"x": torch.zeros(3)})
    tensors_of(record)["x"].fill_(7)
    assert record["x"].numpy().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x05\x00abcde", b"\x93NUMPY\x02\x00" + bytes(80)],
)
def test_malformed_arrays_raise_only_our_error(data: bytes) -> None:
    with pytest.raises(UsageError):
        tensors_of(ArrayRecord({"x": Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)}))


def test_wrong_lengths_and_objects_are_refused() -> None:
    whole = Array(np.zeros(4, np.float32)).data
    for data in (whole[:-1], whole + b"\0"):
        with pytest.raises(UsageError, match="are not an array of float32"):
            tensors_of(ArrayRecord({"x": Array(dtype="float32", shape=(4,), stype="numpy.ndarray", data=data)}))
    pickled = np.lib.format.magic(1, 0) + whole[8:].replace(b"'<f4'", b"'|O' ")
    with pytest.raises(UsageError, match="must hold numbers"):
        tensors_of(ArrayRecord({"x": Array(dtype="object", shape=(4,), stype="numpy.ndarray", data=pickled)}))
