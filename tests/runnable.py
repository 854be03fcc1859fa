"""Releases whose models run: a linear one in two files, with the golden batch that they were recorded on."""

from __future__ import annotations

import numpy as np
from onnx_models import WEIGHTS, linear_proto

from propolis.secure.manifest import Kind
from propolis.serving.golden import GOLDEN_FILE, Golden
from propolis.serving.model import load_model

FLOAT, INT8 = "model.onnx", "model.int8.onnx"
INPUTS = {"input": np.eye(4, dtype=np.float32)}
Files = dict[str, tuple[bytes, Kind]]


def scaled(factor: float) -> bytes:
    """output = input @ WEIGHTS * factor."""
    model = linear_proto()
    model.graph.initializer[0].raw_data = (WEIGHTS * np.float32(factor)).tobytes()
    return bytes(model.SerializeToString())


def outputs_of(factor: float) -> np.ndarray:
    """What `scaled` gives for `INPUTS`."""
    return WEIGHTS * np.float32(factor)


def golden(**factors: float) -> bytes:
    """The golden batch that models with these factors gave, by file: ``golden(**{FLOAT: 1})``."""
    return Golden.of({file: load_model(scaled(factor)) for file, factor in factors.items()}, INPUTS).to_bytes()


def release(factor: float = 1.0, *, int8: float | None = None, runs_as: float | None = None) -> Files:
    """A release of the model with this factor.

    Args:
        factor: of both files where they were recorded.
        int8: factor of the int8 file on this processor; the recorded one by default.
        runs_as: factor of the float32 file on this processor; the same.
    """
    return {
        FLOAT: (scaled(factor if runs_as is None else runs_as), Kind.ONNX),
        INT8: (scaled(factor if int8 is None else int8), Kind.INT8),
        GOLDEN_FILE: (golden(**{FLOAT: factor, INT8: factor}), Kind.GOLDEN),
    }
