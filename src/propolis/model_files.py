"""The files that a model is converted to, for who needs their names and not what makes them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from propolis.secure.errors import UsageError
from propolis.size import format_bytes

FLOAT32_FILE, INT8_FILE = "model.onnx", "model.int8.onnx"
SEVEN_BITS = "propolis.seven-bits"  # of a file in int8: "true" or "false"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_exporter() -> None:
    """Raises UsageError unless what converts models is installed."""
    if missing := [package for package in _NEEDED if find_spec(package) is None]:
        raise UsageError(f"export needs {missing[0]}: pip install 'propolis[export]'")


def has_seven_bits(data: bytes) -> bool | None:
    """Whether a file in int8 keeps its weights within seven bits; None where it does not say."""
    from propolis.protos import onnx_pb2 as pb

    said = {each.key: each.value for each in pb.Model.FromString(data).metadata_props}
    return said[SEVEN_BITS] == "true" if SEVEN_BITS in said else None


def figures_of(models: Mapping[str, Mapping[str, Any]], max_difference: float) -> str:
    """A line for each file: its size and metrics; and how far float32 is from torch."""
    lines = []
    for figures in models.values():
        metrics = ", ".join(f"{k} {v:.4f}" for k, v in sorted(figures.items()) if k not in ("file", "bytes"))
        lines.append(f"{figures['file']}: {format_bytes(figures['bytes'])}, {metrics}")
    return "\n".join([*lines, f"largest difference from torch: {max_difference:.2g}"])
