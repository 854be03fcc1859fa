"""A golden batch: inputs, and the outputs that each file of a release gave for them where it was released."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from propolis.secure.errors import UsageError
from propolis.serving.model import Model

GOLDEN_FILE = "golden.npz"
_INPUT, _OUTPUT = "input", "output"
_LARGEST = 64 * 2**20

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Golden:
    """See the module.

    Attributes:
        inputs: by name.
        outputs: by the model's file, and then by name.
    """

    inputs: Arrays
    outputs: Mapping[str, Arrays]

    @classmethod
    def of(cls, models: Mapping[str, Model], inputs: Arrays) -> Self:
        """What these models, by file, give for these inputs; raises InferenceError where one does not take them."""
        for model in models.values():
            model.require(inputs)
        return cls(dict(inputs), {file: model.run(inputs) for file, model in models.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` made; raises UsageError when it is something else."""
        inputs, outputs = dict[str, np.ndarray](), dict[str, dict[str, np.ndarray]]()
        try:
            _require_as_large_as_it_looks(data)
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                for key in arrays.files:
                    kind, file, name = key.split("/", 2)
                    (inputs if kind == _INPUT else outputs.setdefault(file, {}))[name] = arrays[key]
        except UsageError:
            raise
        except Exception as error:  # of zip and of numpy, which have no base class in common
            raise UsageError(f"this is no golden batch: {type(error).__name__}") from None
        return cls(inputs, outputs)

    def to_bytes(self) -> bytes:
        """The batch as a file, an ``.npz``."""
        arrays = {f"{_INPUT}//{name}": array for name, array in self.inputs.items()}
        for file, outputs in self.outputs.items():
            arrays |= {f"{_OUTPUT}/{file}/{name}": array for name, array in outputs.items()}
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        return content.getvalue()

    def difference(self, model: Model, file: str) -> float:
        """Largest absolute difference of a model's outputs from the recorded ones; infinite where others are recorded.

        Args:
            model: to run.
            file: that it was loaded from; without recorded outputs it only has to run.

        Raises:
            InferenceError: it does not take the inputs, or fails on them.
        """
        model.require(self.inputs)
        found, recorded = model.run(self.inputs), self.outputs.get(file, {})
        if any(name not in found or found[name].shape != array.shape for name, array in recorded.items()):
            return float("inf")
        differences = [_difference(found[name], array) for name, array in recorded.items()]
        return float(np.max(differences, initial=0.0))  # unlike `max`, it does not lose a NaN


def _require_as_large_as_it_looks(data: bytes) -> None:
    """Whoever supplies a model supplies this, and what is compressed can be a thousand times as large."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UsageError("this is no golden batch: it is compressed")
    if (size := sum(entry.file_size for entry in entries)) > _LARGEST:
        raise UsageError(f"this is no golden batch: {size} bytes, {_LARGEST} at most")


def _difference(found: np.ndarray, recorded: np.ndarray) -> float:
    """NaN where either has one, which no bound allows."""
    if not found.size:
        return 0.0
    return float(np.max(np.abs(found.astype(np.float64) - recorded.astype(np.float64))))
