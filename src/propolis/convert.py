"""Weights become the files that are served: ONNX in float32, in int8 where that is wanted, and what each is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from propolis.export import (
    COMPARED_EXAMPLES,
    INPUT,
    Origin,
    evaluate_onnx,
    export_float32,
    first_inputs,
    load_trained,
    quantize_int8,
    spread_inputs,
)
from propolis.model_files import FLOAT32_FILE, INT8_FILE
from propolis.serving.golden import Golden
from propolis.serving.model import load_model
from propolis.task import DataSet, Task


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model in int8 is made; see `quantize_int8`.

    Attributes:
        examples: of the training set, that the ranges are taken from.
        seven_bits: keep weights within 7 bits.
    """

    examples: int
    seven_bits: bool = False


@dataclass(frozen=True, slots=True)
class Converted:
    """ONNX files of one model.

    Attributes:
        files: their content by name.
        metrics: the task's, of each, on its test set.
        difference: largest one of the float32 model's outputs from torch's.
    """

    files: Mapping[str, bytes]
    metrics: Mapping[str, Mapping[str, float]]
    difference: float

    def golden(self, inputs: np.ndarray) -> Golden:
        """What the files give for these inputs, (n, ...)."""
        return Golden.of({name: load_model(data) for name, data in self.files.items()}, {INPUT: inputs})


def convert(
    task: Task, sets: DataSet, weights: bytes, origin: Origin, quantization: Quantization | None = None
) -> Converted:
    """Make ONNX files of a trained model, and evaluate them.

    Args:
        task: that it solves.
        sets: the task's data.
        weights: content of its safetensors file.
        origin: what the files say about themselves.
        quantization: of a model in int8; None for none.

    Raises:
        UsageError: the weights are not the task's, or the model cannot be exported or quantized.
        PropolisError: the file computes something else than torch does.
    """
    inputs = first_inputs(sets.test, COMPARED_EXAMPLES)
    exported = export_float32(task, load_trained(task, weights), origin, inputs)
    files = {FLOAT32_FILE: exported.data}
    if quantization is not None:
        calibration = spread_inputs(sets.train, quantization.examples)
        files[INT8_FILE] = quantize_int8(exported.data, origin, calibration, seven_bits=quantization.seven_bits)
    metrics = {name: evaluate_onnx(task, content, sets.test) for name, content in files.items()}
    return Converted(files, metrics, exported.difference)
