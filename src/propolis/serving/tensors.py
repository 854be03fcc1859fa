"""Tensors as the Open Inference Protocol writes them: raw little-endian bytes, or elements one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from propolis.protos import inference_pb2 as pb
from propolis.serving.faults import Fault, InferenceError

_MOST_DIMENSIONS = 32  # numpy's own bound is 64
_MOST_ELEMENTS = 2**31  # also where a size of zero makes it none at all: numpy and the runtime multiply the others


class _Datatype(NamedTuple):
    onnx: str
    numpy: type[np.generic]
    field: str  # of InferTensorContents; "" where it has none


DATATYPES = {
    "BOOL": _Datatype("tensor(bool)", np.bool_, "bool_contents"),
    "INT8": _Datatype("tensor(int8)", np.int8, "int_contents"),
    "INT16": _Datatype("tensor(int16)", np.int16, "int_contents"),
    "INT32": _Datatype("tensor(int32)", np.int32, "int_contents"),
    "INT64": _Datatype("tensor(int64)", np.int64, "int64_contents"),
    "UINT8": _Datatype("tensor(uint8)", np.uint8, "uint_contents"),
    "UINT16": _Datatype("tensor(uint16)", np.uint16, "uint_contents"),
    "UINT32": _Datatype("tensor(uint32)", np.uint32, "uint_contents"),
    "UINT64": _Datatype("tensor(uint64)", np.uint64, "uint64_contents"),
    "FP16": _Datatype("tensor(float16)", np.float16, ""),
    "FP32": _Datatype("tensor(float)", np.float32, "fp32_contents"),
    "FP64": _Datatype("tensor(double)", np.float64, "fp64_contents"),
}
_BY_ONNX = {datatype.onnx: name for name, datatype in DATATYPES.items()}
_BY_NUMPY = {np.dtype(datatype.numpy): name for name, datatype in DATATYPES.items()}


def datatype_of_onnx(name: str) -> str | None:
    """The protocol's name of ONNX Runtime's ``tensor(float)`` and so on; None where it has none."""
    return _BY_ONNX.get(name)


def datatype_of(array: np.ndarray) -> str | None:
    """The protocol's name of an array's type; None where it has none."""
    return _BY_NUMPY.get(array.dtype)


def decode_inputs(request: pb.ModelInferRequest) -> dict[str, np.ndarray]:
    """The arrays of a request by name; raw ones are views of its bytes, and read-only.

    Raises:
        InferenceError: a datatype is unknown, a name comes twice, or content and shape do not fit (INVALID).
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise _invalid(f"{len(raw)} raw contents for {len(request.inputs)} inputs: give one for each, or none")
    arrays: dict[str, np.ndarray] = {}
    for position, tensor in enumerate(request.inputs):
        if tensor.name in arrays:
            raise _invalid(f"input '{tensor.name:.100}' comes twice")
        if raw and tensor.HasField("contents"):
            raise _invalid(f"input '{tensor.name:.100}' has contents beside raw ones: give one of the two")
        arrays[tensor.name] = _decode(tensor, raw[position] if raw else None)
    return arrays


def _decode(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> np.ndarray:
    what = f"input '{tensor.name:.100}'"
    datatype = DATATYPES.get(tensor.datatype)
    if datatype is None:
        raise _invalid(f"{what}: datatype '{tensor.datatype:.20}' is none of {', '.join(DATATYPES)}")
    shape = tuple(tensor.shape)
    if len(shape) > _MOST_DIMENSIONS or any(size < 0 for size in shape):
        raise _invalid(f"{what}: the shape must be at most {_MOST_DIMENSIONS} sizes, none below zero")
    if raw is not None:
        return _from_raw(raw, datatype, shape, what)
    return _from_elements(tensor.contents, datatype, shape, what)


def _from_raw(raw: bytes, datatype: _Datatype, shape: tuple[int, ...], what: str) -> np.ndarray:
    kind = np.dtype(datatype.numpy).newbyteorder("<")
    if len(raw) % kind.itemsize:
        raise _invalid(f"{what}: {len(raw)} bytes are no whole number of elements of {kind.itemsize}")
    _require_elements(shape, len(raw) // kind.itemsize, what)
    if kind.kind == "b" and raw.translate(None, b"\x00\x01"):
        raise _invalid(f"{what}: a BOOL is a byte 0 or 1")
    return np.frombuffer(raw, kind).reshape(shape)


def _from_elements(
    contents: pb.InferTensorContents, datatype: _Datatype, shape: tuple[int, ...], what: str
) -> np.ndarray:
    filled = [field.name for field, _ in contents.ListFields()]
    if not datatype.field:
        raise _invalid(f"{what}: this datatype has no typed contents; give raw_input_contents")
    if filled not in ([], [datatype.field]):
        raise _invalid(f"{what}: expected {datatype.field}, got {', '.join(filled)}")
    elements = getattr(contents, datatype.field)
    _require_elements(shape, len(elements), what)
    try:
        return np.fromiter(elements, datatype.numpy, len(elements)).reshape(shape)
    except OverflowError:
        raise _invalid(f"{what}: an element is out of range for {np.dtype(datatype.numpy)}") from None


def _require_elements(shape: tuple[int, ...], count: int, what: str) -> None:
    if count != math.prod(shape):
        raise _invalid(f"{what}: shape {list(shape)} is {math.prod(shape)} elements, the content has {count}")
    if math.prod(size or 1 for size in shape) > _MOST_ELEMENTS:
        raise _invalid(f"{what}: shape {list(shape)} is too large")


def encode_outputs(outputs: dict[str, np.ndarray], as_raw: bool, into: pb.ModelInferResponse) -> None:
    """Write arrays into a response, in the form that the request had, or raw where there is no other."""
    as_raw = as_raw or any(array.dtype == np.float16 for array in outputs.values())
    for name, array in outputs.items():
        datatype = _BY_NUMPY[array.dtype]
        tensor = into.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if as_raw:
            into.raw_output_contents.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        else:
            getattr(tensor.contents, DATATYPES[datatype].field).extend(array.ravel().tolist())


def shape_in_words(shape: Sequence[int | None]) -> str:
    """A shape for people and for the protocol's metadata: -1 where any size will do."""
    return str([-1 if size is None else size for size in shape])


def _invalid(message: str) -> InferenceError:
    return InferenceError(Fault.INVALID, message)
