"""Tensors on the wire: every datatype in both forms, and what cannot be one."""

from __future__ import annotations

import numpy as np
import pytest

from propolis.protos import inference_pb2 as pb
from propolis.serving.faults import Fault, InferenceError
from propolis.serving.tensors import DATATYPES, decode_inputs, encode_outputs

Tensor = pb.ModelInferRequest.InferInputTensor


def example(datatype: str) -> np.ndarray:
    kind = np.dtype(DATATYPES[datatype].numpy)
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        return np.array([[limits.min, limits.max, 1]], kind)
    return np.array([[0, 1, 0.5 if kind.kind == "f" else 1]], kind)


@pytest.mark.parametrize("as_raw", [True, False])
@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_goes_both_ways(datatype: str, as_raw: bool) -> None:
    array = example(datatype)
    response = pb.ModelInferResponse()
    encode_outputs({"x": array}, as_raw, response)
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("x", datatype, [1, 3])
    assert bool(response.raw_output_contents) == (as_raw or datatype == "FP16")
    request = pb.ModelInferRequest(
        inputs=[Tensor.FromString(output.SerializeToString())], raw_input_contents=response.raw_output_contents
    )
    decoded = decode_inputs(request)["x"]
    assert decoded.dtype == array.dtype
    assert np.array_equal(decoded, array)


def raw(data: bytes, datatype: str = "FP32", shape: tuple[int, ...] = (2,)) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(inputs=[Tensor(name="x", datatype=datatype, shape=shape)], raw_input_contents=[data])


def typed(datatype: str, shape: tuple[int, ...] = (1,), **contents: list[object]) -> pb.ModelInferRequest:
    elements = pb.InferTensorContents(**contents)  # type: ignore[arg-type]
    return pb.ModelInferRequest(inputs=[Tensor(name="x", datatype=datatype, shape=shape, contents=elements)])


TWICE = pb.ModelInferRequest(inputs=[Tensor(name="x", datatype="BOOL", shape=[0])] * 2)
UNEVEN = pb.ModelInferRequest(inputs=[Tensor(name="x", datatype="BOOL", shape=[0])], raw_input_contents=[b"", b""])
BOTH = typed("FP32", fp32_contents=[1.0])
BOTH.raw_input_contents.append(bytes(4))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (raw(bytes(8), "BYTES"), "datatype 'BYTES' is none of BOOL"),
        (raw(bytes(8), ""), "datatype ''"),
        (raw(bytes(7)), "7 bytes are no whole number of elements of 4"),
        (raw(bytes(12)), r"shape \[2\] is 2 elements, the content has 3"),
        (raw(bytes(8), shape=(-1, 2)), "none below zero"),
        (raw(bytes(8), shape=(2**62, 2**62)), "the content has 2"),
        (raw(bytes(8), shape=(1,) * 33), "at most 32 sizes"),
        (raw(b"", shape=(0, 2**62, 2**62)), "is too large"),
        (typed("FP32", shape=(0, 2**31 + 1)), "is too large"),
        (raw(b"\x00\x02", "BOOL"), "a BOOL is a byte 0 or 1"),
        (typed("FP32", fp64_contents=[1.0]), "expected fp32_contents, got fp64_contents"),
        (typed("FP32", fp32_contents=[1.0], bool_contents=[True]), "expected fp32_contents, got bool_contents"),
        (typed("FP32"), r"shape \[1\] is 1 elements, the content has 0"),
        (typed("FP16", fp32_contents=[1.0]), "no typed contents"),
        (typed("INT8", int_contents=[128]), "out of range for int8"),
        (typed("UINT16", uint_contents=[2**16]), "out of range for uint16"),
        (TWICE, "input 'x' comes twice"),
        (UNEVEN, "2 raw contents for 1 inputs"),
        (BOTH, "contents beside raw ones"),
    ],
)
def test_what_cannot_be_a_tensor_is_refused(request_: pb.ModelInferRequest, message: str) -> None:
    with pytest.raises(InferenceError, match=message) as caught:
        decode_inputs(request_)
    assert caught.value.fault is Fault.INVALID
