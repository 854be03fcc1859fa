"""``propolis predict``: one use of a model, from a file with its inputs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from propolis.secure.errors import UsageError
from propolis.serving.faults import InferenceError
from propolis.serving.model import Model
from propolis.serving.tensors import DATATYPES
from propolis.storage import write_atomically

_ENDINGS = (".npy", ".json")
# What JSON has for numpy's kinds of types, and what that is called there.
_JSON_TYPES: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}
_JSON_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number with a fraction",
    str: "a text",
    type(None): "null",
    dict: "an object",
}


def predict(model: Model, path: Path) -> dict[str, np.ndarray]:
    """The model's outputs for the inputs in a file.

    Args:
        model: to run.
        path: an ``.npy`` file for a model with one input, or ``.json``: the one input as nested lists, or an object
            with every input's name.

    Raises:
        UsageError: the file cannot be read, or its content is not what the model takes.
    """
    inputs = read_inputs(model, path)
    try:
        model.require(inputs)
        return model.run(inputs)
    except InferenceError as error:
        raise UsageError(f"{path}: {error}") from None


def read_inputs(model: Model, path: Path) -> dict[str, np.ndarray]:
    """The arrays in a file by input name, as `predict` takes it; numbers of JSON in the types that the model has."""
    require_ending(path, "--input")
    try:
        content = _read_npy(path) if path.suffix == ".npy" else json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # of numpy, which parses Python, and of JSON: they have no base class in common
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} is no {path.suffix} file: {reason:.200}") from None
    if not isinstance(content, dict):
        content = {_only_input(model, path): content}
    return {name: _as_array(model, name, value, path) for name, value in content.items()}


def write_outputs(outputs: Mapping[str, np.ndarray], path: Path) -> None:
    """Write outputs as ``.json``, or the only one as ``.npy``.

    Raises:
        UsageError: the name ends with neither, or there is more than one output for ``.npy``.
        StorageError: the file could not be written.
    """
    require_ending(path, "--output")
    if path.suffix == ".json":
        write_atomically(path, json.dumps(as_lists(outputs)).encode() + b"\n")
        return
    if len(outputs) != 1:
        raise UsageError(f"{path}: an .npy file holds one array, the model has {', '.join(outputs)}; write .json")
    file = io.BytesIO()
    np.save(file, next(iter(outputs.values())), allow_pickle=False)
    write_atomically(path, file.getvalue())


def as_lists(outputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Outputs as JSON has them: by name, nested lists."""
    return {name: array.tolist() for name, array in outputs.items()}


def require_ending(path: Path, flag: str) -> None:
    """Raise UsageError unless the file's name ends with one that is known."""
    if path.suffix not in _ENDINGS:
        raise UsageError(f"{flag} {path}: expected a name that ends with {' or '.join(_ENDINGS)}")


def _only_input(model: Model, path: Path) -> str:
    if len(model.inputs) != 1:
        names = ", ".join(spec.name for spec in model.inputs)
        raise UsageError(f"{path}: the model has the inputs {names}: write a .json object with each of them")
    return model.inputs[0].name


def _as_array(model: Model, name: str, value: Any, path: Path) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    datatype = next((spec.datatype for spec in model.inputs if spec.name == name), None)
    if datatype is None:
        return np.empty(0)  # the model has no such input, and says so
    kind = np.dtype(DATATYPES[datatype].numpy)
    if odd := _types_of(value) - _JSON_TYPES[kind.kind]:
        given = ", ".join(sorted(_JSON_NAMES.get(each, each.__name__) for each in odd))
        raise UsageError(f"{path}: input '{name}' must be nested lists of {datatype}, there is {given} in it")
    try:
        return np.array(value, kind)
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"{path}: input '{name}' must be nested lists of equal lengths, of {datatype}") from None


def _read_npy(path: Path) -> np.ndarray:
    """One array: `np.load` would take an archive, too."""
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _types_of(value: Any) -> set[type]:
    """The types of what is in nested lists, however deep."""
    found, left = set(), [value]
    while left:
        each = left.pop()
        if isinstance(each, list):
            left.extend(each)
        else:
            found.add(type(each))
    return found
