"""A trained model as ONNX: in float32, compared with torch, and in int8, with what that costs in accuracy."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from propolis.clear_folder import clear_folder, temporary_files_in
from propolis.model_files import SEVEN_BITS
from propolis.secure.errors import PropolisError, UsageError
from propolis.serving.model import METADATA_PREFIX, Model, load_model
from propolis.task import Examples, Task

if TYPE_CHECKING:
    import onnx

INPUT, OUTPUT = "input", "output"
_CALIBRATION_BATCH = 64
COMPARED_EXAMPLES = 256
# Of the largest output, or of one where all are smaller: what other orders of summation make of float32.
LARGEST_DIFFERENCE = 1e-4
_LARGEST_FILE = 2**31 - 1  # protobuf's bound
_COPIES = 5  # of a model that quantizing it has on the disk at once, its own and the library's


@dataclass(frozen=True, slots=True)
class Origin:
    """What an exported model says about itself, as metadata with the prefix ``propolis.``.

    Attributes:
        name: that it is served under.
        version: the same.
        task: reference of the task that it solves.
        digest: SHA-256 of the safetensors file that it was made of, in hexadecimal digits.
        round: after which it was taken, where that is known.
        parent: digest or name of the model that training started from, where there is one.
    """

    name: str
    version: str
    task: str
    digest: str
    round: int | None = None
    parent: str = ""

    def metadata(self) -> dict[str, str]:
        """Key and value of everything that is known, and the names of the model's input and output."""
        known = {name: value for name, value in asdict(self).items() if value not in ("", None)}
        return {METADATA_PREFIX + key: str(value) for key, value in {**known, "input": INPUT, "output": OUTPUT}.items()}


@dataclass(frozen=True, slots=True)
class Exported:
    """An ONNX file.

    Attributes:
        data: its content; everything is in it.
        difference: largest absolute difference of an output from torch's, on real inputs of the task.
    """

    data: bytes
    difference: float


class OnnxModule(nn.Module):
    """An ONNX model of one input and one output as a torch module, so that a task can evaluate it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # tasks ask a model for its device

    def forward(self, inputs: Tensor) -> Tensor:
        """The model's output for a batch."""
        outputs = self._model.run({self._model.inputs[0].name: np.ascontiguousarray(inputs.numpy())})
        return torch.from_numpy(outputs[self._model.outputs[0].name])


def load_trained(task: Task, data: bytes) -> nn.Module:
    """The task's model with the weights of a safetensors file, in evaluation mode.

    Args:
        task: whose model it is.
        data: the file's content.

    Raises:
        UsageError: it is no such file, or of another model.
    """
    model = task.model()
    try:
        model.load_state_dict(load(data))
    except SafetensorError as error:
        raise UsageError(f"this is no safetensors file: {error}") from None
    except RuntimeError as error:  # torch's list of what is missing, unexpected or of another shape
        raise UsageError(f"these are not weights of the task's model: {' '.join(str(error).split())[:300]}") from None
    return model.eval()


def digest_of(data: bytes) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def export_float32(task: Task, model: nn.Module, origin: Origin, inputs: Tensor | None = None) -> Exported:
    """A trained model as ONNX, for batches of any size, compared with torch.

    Args:
        task: gives real inputs.
        model: in evaluation mode, on the CPU.
        origin: what the file says about itself.
        inputs: (n, ...) real ones to compare on; None takes the first of the task's test set.

    Raises:
        UsageError: the model cannot be exported, or is too large for one file.
        PropolisError: the file computes something else than torch does.
    """
    if inputs is None:
        inputs = first_inputs(task.data().test, COMPARED_EXAMPLES)
    has_example = type(task).example_input is not Task.example_input
    proto = _to_onnx(model, task.example_input() if has_example else inputs[:1])
    data = _finished(proto, origin)
    return Exported(data, require_same_outputs(model, load_model(data), inputs))


def quantize_int8(data: bytes, origin: Origin, calibration: Tensor, seven_bits: bool = False) -> bytes:
    """The same model in int8: static, per channel, symmetric weights, as QDQ, which runtimes fuse.

    Args:
        data: the model in float32.
        origin: what the file says about itself.
        calibration: (n, ...) inputs, real ones; the ranges of all activations are taken from them.
        seven_bits: keep weights within 7 bits, for processors that have AVX2 or AVX-512 but not VNNI: their sums of
            two products saturate.

    Raises:
        UsageError: the model cannot be quantized.
        StorageError: there is no place for the files that the library works with; see `clear_folder`.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    failure = "this model cannot be quantized"
    with clear_folder(_COPIES * len(data)) as folder, temporary_files_in(folder), _quietly(failure):
        prepared, quantized = folder / "prepared.onnx", folder / "quantized.onnx"
        quant_pre_process(onnx.load_model_from_string(data), str(prepared))  # folds norms into the layers before them
        quantize_static(
            str(prepared),
            str(quantized),
            _reader(calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=seven_bits,
            extra_options={"WeightSymmetric": True},
        )
        return _finished(onnx.load_model(str(quantized)), origin, {SEVEN_BITS: str(seven_bits).lower()})


def evaluate_onnx(task: Task, data: bytes, examples: Examples) -> dict[str, float]:
    """The task's metrics of an ONNX file on these examples."""
    return evaluate_model(task, load_model(data), examples)


def evaluate_model(task: Task, model: Model, examples: Examples) -> dict[str, float]:
    """The task's metrics of an ONNX model on these examples."""
    metrics = task.evaluate(OnnxModule(model).eval(), examples)
    return {name: float(value) for name, value in metrics.items()}


def first_inputs(examples: Examples, count: int) -> Tensor:
    """Inputs of the first examples, at most `count` of them."""
    return examples.batch(torch.arange(min(count, len(examples))), torch.device("cpu"))[0]


def spread_inputs(examples: Examples, count: int) -> Tensor:
    """Inputs of `count` examples, or of all where there are fewer, evenly from the whole set."""
    positions = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(np.int64)
    return examples.batch(torch.from_numpy(positions), torch.device("cpu"))[0]


@torch.no_grad()
def require_same_outputs(model: nn.Module, exported: Model, inputs: Tensor) -> float:
    """Compare torch with ONNX Runtime on these inputs, all at once and the first one alone.

    Returns:
        The largest absolute difference.

    Raises:
        PropolisError: it is larger than `LARGEST_DIFFERENCE`.
    """
    worst = 0.0
    for batch in (inputs[:1], inputs):
        ours, theirs = OnnxModule(exported)(batch), model(batch)
        if ours.shape != theirs.shape:
            raise PropolisError(f"the ONNX model gives shape {tuple(ours.shape)}, torch {tuple(theirs.shape)}")
        difference, scale = float((ours - theirs).abs().max()), max(1.0, float(theirs.abs().max()))
        if not difference <= LARGEST_DIFFERENCE * scale:  # nor NaN
            raise PropolisError(
                f"the ONNX model differs from torch by {difference:.2g} where {LARGEST_DIFFERENCE * scale:.2g} may be"
            )
        worst = max(worst, difference)
    return worst


def _to_onnx(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    two = torch.cat([example, example])  # of one, the exporter would take the size for a constant
    with _quietly("this model cannot be exported to ONNX"):
        program = torch.onnx.export(
            model,
            (two,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        if program is None or len(program.model.graph.outputs) != 1:
            raise UsageError("expected a model with one output")
        return program.model_proto


def _finished(proto: onnx.ModelProto, origin: Origin, also: Mapping[str, str] | None = None) -> bytes:
    """The file's bytes, with its metadata; whole, and within what a file may be."""
    from onnx.helper import set_model_props

    set_model_props(proto, {**origin.metadata(), **(also or {})})
    if proto.ByteSize() > _LARGEST_FILE:
        raise UsageError("the model is larger than 2 GiB, which is more than one ONNX file holds")
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _reader(inputs: Tensor) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        batches: Iterator[Mapping[str, np.ndarray]] = (
            {INPUT: batch.numpy()} for batch in torch.split(inputs, _CALIBRATION_BATCH)
        )

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self.batches, None)

    return Reader()


@contextmanager
def _quietly(failure: str) -> Iterator[None]:
    """Keep what libraries say to themselves, and make one line of what they raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UsageError:
        raise
    except Exception as error:  # of four libraries
        first = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(f"{failure}: {type(error).__name__}: {first[:300]}") from None
    finally:
        logging.disable(disabled)
