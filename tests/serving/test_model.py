"""Models from bytes: what is looked at before the runtime sees them, and what they take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_models import PLACES, WEIGHTS, copying, external, linear, linear_proto, mixed

from propolis.secure.errors import UsageError
from propolis.serving.faults import Fault, InferenceError
from propolis.serving.model import load_model, load_model_file, require_self_contained

ONES = np.ones((3, 4), np.float32)


def test_a_model_says_its_name_and_version_and_computes() -> None:
    model = load_model(linear())
    assert (model.name, model.version) == ("linear", "3")
    assert [(spec.name, spec.datatype, spec.shape) for spec in model.inputs] == [("input", "FP32", (None, 4))]
    assert model.require({"input": ONES}) == 3
    assert np.array_equal(model.run({"input": ONES})["output"], ONES @ WEIGHTS)


def test_a_given_name_and_version_win() -> None:
    model = load_model(linear(), name="other", version="8")
    assert (model.name, model.version) == ("other", "8")
    plain = load_model(copying(TensorProto.FLOAT))
    assert (plain.name, plain.version) == ("model", "1")


def test_a_model_with_a_fixed_first_size_takes_no_batches() -> None:
    model = load_model(linear(batch=2))
    assert not model.is_batched
    assert model.require({"input": ONES[:2]}) == 1
    with pytest.raises(InferenceError, match=r"expected shape \[2, 4\], got \[3, 4\]"):
        model.require({"input": ONES})


@pytest.mark.parametrize("where", PLACES)
def test_external_data_is_refused_wherever_it_is(where: str) -> None:
    data = external(where).SerializeToString()
    with pytest.raises(UsageError, match="the model has external data"):
        require_self_contained(data)
    with pytest.raises(UsageError, match="the model has external data"):
        load_model(data)


def test_external_data_of_a_file_that_is_there_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save_model(linear_proto(), str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(UsageError, match=r"m\.onnx: the model has external data"):
        load_model_file(path)


def test_an_address_in_memory_is_refused() -> None:
    model = linear_proto()
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="*/_ORT_MEM_ADDR_/*")  # and no data_location
    with pytest.raises(UsageError, match="external data"):
        load_model(model.SerializeToString())


def test_a_constant_in_a_subgraph_that_is_whole_is_let_through() -> None:
    require_self_contained(linear())
    model = external("subgraph")
    for branch in (attribute.g for attribute in model.graph.node[1].attribute):
        tensor = branch.node[0].attribute[0].t
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    require_self_contained(model.SerializeToString())


@pytest.mark.parametrize(
    "data", [b"", b"nothing", b"\x08\x09", b"\x00\x01\x02\x03ORTM" + bytes(64), bytes(1000), linear()[:-9], b"\x3a\x00"]
)
def test_what_is_no_model_is_one_line(data: bytes) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(data)
    assert "\n" not in str(caught.value)


def test_deep_nesting_is_refused() -> None:
    graph = b"\x0a\x00"  # node {}
    for _ in range(200):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # node { attribute { g { ... } } }
            graph = tag + _varint(len(graph)) + graph
    with pytest.raises(UsageError, match="no ONNX model"):
        require_self_contained(b"\x3a" + _varint(len(graph)) + graph)


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def test_an_operator_that_the_runtime_does_not_know_is_refused() -> None:
    model = linear_proto()
    model.graph.node[0].op_type = "Nonsense"
    with pytest.raises(UsageError, match=r"ONNX Runtime cannot run this model: .*Nonsense"):
        load_model(model.SerializeToString())


def test_tensors_of_texts_are_refused() -> None:
    with pytest.raises(UsageError, match=r"is a tensor\(string\), which cannot be served"):
        load_model(copying(TensorProto.STRING))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'input' is missing"),
        ({"input": ONES, "more": ONES}, "input 'more' is unknown: expected input"),
        ({"input": ONES.astype(np.float64)}, "expected FP32, got FP64"),
        ({"input": ONES.astype(np.complex64)}, "expected FP32, got complex64"),
        ({"input": ONES[:, :3]}, r"expected shape \[-1, 4\], got \[3, 3\]"),
        ({"input": ONES[0]}, r"expected shape \[-1, 4\], got \[4\]"),
        ({"input": ONES[:0]}, r"inputs of \[0\] examples"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InferenceError, match=message) as caught:
        load_model(linear()).require(inputs)
    assert caught.value.fault is Fault.INVALID


def test_inputs_of_different_numbers_of_examples_are_refused() -> None:
    inputs = {"index": np.zeros(2, np.int64), "mask": np.ones(3, bool), "default": np.zeros(2, np.float32)}
    with pytest.raises(InferenceError, match=r"inputs of \[2, 3\] examples"):
        load_model(mixed()).require(inputs)


def test_a_run_that_fails_is_an_error_of_ours() -> None:
    inputs = {"index": np.array([7]), "mask": np.ones(1, bool), "default": np.zeros(1, np.float32)}
    with pytest.raises(InferenceError, match="the model fails on these inputs") as caught:
        load_model(mixed()).run(inputs)
    assert caught.value.fault is Fault.FAILED
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_used_is_named() -> None:
    with pytest.raises(UsageError, match=r"cannot read absent\.onnx"):
        load_model_file(Path("absent.onnx"))
