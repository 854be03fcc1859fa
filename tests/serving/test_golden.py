"""Golden batches: what is recorded, and how far a model may be from it."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from onnx_models import WEIGHTS, linear, linear_proto, mixed

from propolis.secure.errors import UsageError
from propolis.serving.faults import InferenceError
from propolis.serving.golden import Golden
from propolis.serving.model import load_model

INPUTS = {"input": np.arange(12, dtype=np.float32).reshape(3, 4)}


def recorded() -> Golden:
    return Golden.from_bytes(Golden.of({"model.onnx": load_model(linear())}, INPUTS).to_bytes())


def test_the_same_model_gives_the_same_outputs_after_a_round_trip() -> None:
    golden = recorded()
    assert np.array_equal(golden.outputs["model.onnx"]["output"], INPUTS["input"] @ WEIGHTS)
    assert golden.difference(load_model(linear()), "model.onnx") == 0.0


def test_another_model_differs_by_its_largest_output() -> None:
    other = linear_proto()
    other.graph.initializer[0].raw_data = (WEIGHTS + np.float32(0.5)).tobytes()
    found = recorded().difference(load_model(other.SerializeToString()), "model.onnx")
    assert found == pytest.approx(float(np.abs(0.5 * INPUTS["input"].sum(axis=1)).max()))


def test_a_file_without_recorded_outputs_only_has_to_run() -> None:
    assert recorded().difference(load_model(linear()), "other.onnx") == 0.0


def test_outputs_of_another_shape_or_nan_are_never_near_enough() -> None:
    golden = recorded()
    wrong = Golden(golden.inputs, {"model.onnx": {"output": np.zeros((3, 3), np.float32)}})
    assert wrong.difference(load_model(linear()), "model.onnx") == float("inf")
    nan = Golden(golden.inputs, {"model.onnx": {"output": np.full((3, 2), np.nan, np.float32)}})
    assert not nan.difference(load_model(linear()), "model.onnx") <= 1e9


def test_nan_in_any_of_several_outputs_is_never_near_enough() -> None:
    inputs = {"index": np.array([1]), "mask": np.array([True]), "default": np.zeros(1, np.float32)}
    golden = Golden.of({"m": load_model(mixed())}, inputs)
    assert golden.difference(load_model(mixed()), "m") == 0.0
    whole, nan = golden.outputs["m"], {"output": np.array([np.nan], np.float32)}
    for outputs in ({**nan, "left_out": whole["left_out"]}, {"left_out": whole["left_out"], **nan}):
        assert not Golden(inputs, {"m": outputs}).difference(load_model(mixed()), "m") <= 1e9


def test_inputs_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(InferenceError):
        Golden.of({"m": load_model(linear())}, {"input": np.zeros((3, 5), np.float32)})


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no zip", b"x" * 100, np.zeros(3).tobytes()])
def test_what_is_no_golden_batch_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(UsageError, match="no golden batch"):
        Golden.from_bytes(data)


def test_a_golden_batch_that_is_compressed_or_too_large_is_refused() -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **{"input//input": np.zeros(10**6, np.float32)})
    with pytest.raises(UsageError, match="no golden batch: it is compressed"):
        Golden.from_bytes(content.getvalue())
    one = io.BytesIO()
    np.save(one, np.zeros(17 * 2**18, np.float32))
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as archive:
        for number in range(4):
            archive.writestr(f"input//{number}.npy", one.getvalue())
    with pytest.raises(UsageError, match="bytes, 67108864 at most"):
        Golden.from_bytes(many.getvalue())
