"""A device makes the files that it serves of a model that only devices can open: ONNX, and outputs to try it by.

What the model must compute is what torch computes on this device, for inputs of the release's golden batch or of the
device's own: there is nobody else who could say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from propolis.client.opening import Work
from propolis.convert import Converted, Quantization, convert
from propolis.export import (
    COMPARED_EXAMPLES,
    INPUT,
    Origin,
    digest_of,
    export_float32,
    first_inputs,
    load_trained,
    require_same_outputs,
    spread_inputs,
)
from propolis.model_files import FLOAT32_FILE, require_exporter
from propolis.secure.errors import UsageError
from propolis.serving.golden import GOLDEN_FILE, Golden
from propolis.serving.model import load_model
from propolis.task import DataSet, Examples, Task, frozen_names, load_task

_TRIED_EXAMPLES = 8
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, repr=False)
class Weights:
    """A model's arrays by name; `frozen` are those that came in clear, which only may be what training leaves alone."""

    arrays: Arrays
    frozen: frozenset[str]

    def file_for(self, task: Task) -> bytes:
        """The weights as a safetensors file.

        Raises:
            UsageError: an array that this task trains came in clear, where anybody could have changed it.
        """
        if odd := sorted(self.frozen - frozen_names(task.model())):
            raise UsageError(f"{odd[0]} came unencrypted, and is no parameter that training leaves alone")
        return save({name: np.array(array, order="C") for name, array in self.arrays.items()})


def export_here(work: Work) -> dict[str, bytes]:
    """The files that a device serves of an opened model, made in this process.

    Args:
        work: what is to be done.

    Returns:
        By name: ONNX in float32, and the golden batch with what it gives here.

    Raises:
        UsageError: the task or the device's data is not usable, the model is not the task's, or cannot be exported.
        PropolisError: the file computes something else than torch does, or nothing finite.
    """
    task = load_task(work.task)
    return files_of(task, sets_of(task, work.data).test, work)


def files_of(task: Task, examples: Examples, work: Work) -> dict[str, bytes]:
    """`export_here` for a task that is loaded, with real examples of it; raises as that does."""
    require_exporter()
    weights = Weights(work.arrays, work.frozen).file_for(task)
    model = load_trained(task, weights)
    origin = Origin(work.name, work.version, work.task, digest_of(weights), work.round)
    exported = export_float32(task, model, origin, first_inputs(examples, COMPARED_EXAMPLES))
    golden = _golden(model, exported.data, work.golden, spread_inputs(examples, _TRIED_EXAMPLES))
    return {FLOAT32_FILE: exported.data, GOLDEN_FILE: golden.to_bytes()}


def convert_opened(
    task: Task, sets: DataSet, weights: Weights, origin: Origin, quantization: Quantization | None
) -> tuple[bytes, Converted]:
    """The weights of an opened model as safetensors and as ONNX files, with what each is worth; raises as `convert`."""
    file = weights.file_for(task)
    return file, convert(task, sets, file, replace(origin, digest=digest_of(file)), quantization)


def sets_of(task: Task, data: str | None) -> DataSet:
    """The device's own examples, where it has a path to them, else the task's; raises UsageError without either."""
    if data is not None:
        examples = task.device_data(Path(data))
        if not len(examples):
            raise UsageError(f"{data} has no examples")
        return DataSet(examples, examples)
    try:
        return task.data()
    except Exception as error:  # of the task's own code
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".removesuffix(": ")
        raise UsageError(f"the task brings no data: give the device's own with --data ({why})") from None


def _golden(model: nn.Module, exported: bytes, released: bytes, own: Tensor) -> Golden:
    """The golden batch with this device's outputs: of the released inputs, or of its own where none were released."""
    inputs = Golden.from_bytes(released).inputs if released else {INPUT: own.numpy()}
    made = load_model(exported)
    golden = Golden.of({FLOAT32_FILE: made}, inputs)
    require_same_outputs(model, made, torch.from_numpy(np.array(inputs[INPUT])))
    return golden
