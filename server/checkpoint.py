"""A run's state after each round in one file, replaced atomically: a crash leaves the old one or the new one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from propolis.secure.errors import UsageError
from propolis.server.model import GlobalModel
from propolis.storage import remove_stale, write_atomically

_FORMAT = 2

# The tensor with the history as JSON: a file's own metadata can be 100 MB at most, and a history has no such end.
_HISTORY = "history"


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One line of a run's history.

    Attributes:
        round: from 1.
        accuracy: of the new global model on the server's test set; None where the task has none.
        loss: likewise.
        uplink_bytes: serialised messages received from devices in this round, retries included.
        downlink_bytes: serialised messages sent to devices in this round, retries included.
        survivors: devices whose update is in the model.
        dropped: devices that were asked and are not.
        seconds: wall time of the round with its evaluation.
        attempts: times the round was tried.
        failures: what devices that failed said, see `propolis.server.replies.lines_of`.
        metrics: whatever else the task and the devices reported (``train-loss``, ``device-accuracy``, ...).
        retries: why the attempts before the last one failed.
    """

    round: int
    accuracy: float | None
    loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    survivors: int
    dropped: int
    seconds: float
    attempts: int
    failures: Sequence[str]
    metrics: Mapping[str, float]
    retries: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything that the next round depends on, besides the settings.

    Attributes:
        model: the global model after the last completed round.
        history: one record per completed round.
        strategy: the strategy's arrays, see `propolis.server.strategy.strategy_state`.
        grid: those of a protected run's grid, see `propolis.server.grid.SecureGrid.state`.
    """

    model: GlobalModel
    history: tuple[RoundRecord, ...]
    strategy: Mapping[str, np.ndarray]
    grid: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def completed(self) -> int:
        """Number of rounds done."""
        return len(self.history)


def save_checkpoint(path: Path, state: RunState, run: str) -> None:
    """Write `state` to `path`.

    Args:
        path: the file.
        state: what to keep.
        run: digest of what makes the run the one it is; `load_checkpoint` asks for the same.

    Raises:
        StorageError: it could not be written; the previous checkpoint is whole.
    """
    tensors = {f"model/{name}": array for name, array in state.model.arrays.items()}
    tensors.update({f"strategy/{name}": array for name, array in state.strategy.items()})
    tensors.update({f"grid/{name}": array for name, array in state.grid.items()})
    history = json.dumps([asdict(record) for record in state.history]).encode()
    tensors[_HISTORY] = np.frombuffer(history, np.uint8)
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    header = {"format": _FORMAT, "run": run, "sha256": _digest(contiguous)}
    remove_stale(path)
    write_atomically(path, save(contiguous, metadata={"propolis": json.dumps(header)}))


def load_checkpoint(path: Path, template: GlobalModel, run: str) -> RunState:
    """Read what `save_checkpoint` wrote.

    Args:
        path: the file.
        template: the task's model; the checkpoint must be of one with the same names, shapes and types.
        run: what `save_checkpoint` got.

    Raises:
        UsageError: the file is missing, corrupt, or of another model or run.
    """
    header, history, tensors = _read(path)
    arrays = {name.removeprefix("model/"): a for name, a in tensors.items() if name.startswith("model/")}
    _require_same_model(path, arrays, template)
    if header["run"] != run:
        raise UsageError(f"{path} is a checkpoint of a run with other settings than those in its folder")
    ordered = {name: arrays[name] for name in template.arrays}
    return RunState(
        GlobalModel(ordered, template.trainable, template.frozen),
        history,
        {name.removeprefix("strategy/"): a for name, a in tensors.items() if name.startswith("strategy/")},
        {name.removeprefix("grid/"): a for name, a in tensors.items() if name.startswith("grid/")},
    )


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes: the file format has no checksum of its own."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], tuple[RoundRecord, ...], dict[str, np.ndarray]]:
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}: the run has not completed a round")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["propolis"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        if header["format"] != _FORMAT:
            raise UsageError(
                f"{path} has format {header['format']}, this version reads {_FORMAT}: "
                "go on with the version of propolis that wrote it, or start the run anew"
            )
        if header["sha256"] != _digest(tensors):
            raise UsageError(f"{path} is not a whole checkpoint: its contents are not those that were written")
        history = json.loads(tensors[_HISTORY].tobytes())
        return header, tuple(RoundRecord(**record) for record in history), tensors
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise UsageError(f"{path} is not a whole checkpoint: {error}") from None


def _require_same_model(path: Path, arrays: Mapping[str, np.ndarray], template: GlobalModel) -> None:
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    expected = {name: (array.shape, array.dtype) for name, array in template.arrays.items()}
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UsageError(f"{path} is a checkpoint of another model: {', '.join(differing[:3])} differ")
