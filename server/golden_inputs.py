"""Which inputs a golden batch is made of. Every device that opens a release can read them: whose they are matters."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path

import numpy as np

from propolis.export import INPUT, first_inputs, spread_inputs
from propolis.secure.errors import UsageError
from propolis.serving.golden import Golden
from propolis.task import BUILT_IN, DataSet

GOLDEN_EXAMPLES = 8


class GoldenFrom(Enum):
    """Where a golden batch comes from, unless a file has its inputs."""

    DEFAULT = "default"  # the test set, where nobody has to be asked
    TEST_SET = "test set"
    NOWHERE = "nowhere"  # there is none


GoldenChoice = Path | GoldenFrom


def require_golden_choice(choice: GoldenChoice, task: str, data: Path | None) -> None:
    """Raises UsageError where inputs of somebody's own data would go to every device without being asked for."""
    if choice is GoldenFrom.DEFAULT and data is not None and task not in BUILT_IN:
        raise UsageError(
            f"{GOLDEN_EXAMPLES} test inputs from {data} would go to every device, now and later: give --golden FILE "
            "with inputs that may, --no-golden, or --golden-from-test-set"
        )


def golden_inputs(choice: GoldenChoice, sets: DataSet) -> np.ndarray | None:
    """The inputs of a golden batch, (n, ...); None where there is to be none.

    Raises:
        UsageError: the file cannot be read, or has no inputs of the task.
    """
    if choice is GoldenFrom.NOWHERE:
        return None
    if isinstance(choice, Path):
        return read_inputs(choice, first_inputs(sets.test, 1).numpy())
    return np.asarray(spread_inputs(sets.test, GOLDEN_EXAMPLES).numpy())


def read_inputs(path: Path, like: np.ndarray) -> np.ndarray:
    """The inputs in a file, (n, ...), in the type and shape that the task's have; raises UsageError."""
    try:
        inputs = np.asarray(_content(path)).astype(like.dtype, casting="same_kind")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, EOFError, RecursionError, KeyError) as error:
        raise UsageError(f"{path} has no inputs for a golden batch: {str(error)[:200]}") from None
    if inputs.shape[1:] != like.shape[1:] or inputs.ndim != like.ndim or not len(inputs):
        wanted, found = ("x".join(map(str, shape)) for shape in (("n", *like.shape[1:]), inputs.shape))
        raise UsageError(f"{path} has inputs of shape {found or 'one number'}, the task's are {wanted}")
    if not np.isfinite(inputs).all():
        raise UsageError(f"{path} has inputs that are no finite numbers")
    return inputs


def _content(path: Path) -> object:
    """What is in a file of inputs."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        return Golden.from_bytes(path.read_bytes()).inputs[INPUT]
    if path.suffix == ".json":
        found = json.loads(path.read_bytes())
        return found[INPUT] if isinstance(found, dict) else found
    raise UsageError(f"--golden {path}: expected a name that ends with .npy, .json or .npz")
