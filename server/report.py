"""What a run shows and leaves behind: rows of rounds, result.json, the model and the curves."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save

from propolis.logs import one_line
from propolis.secure.he.messages import EncryptedSum
from propolis.server.checkpoint import RoundRecord, RunState
from propolis.settings import Settings
from propolis.size import format_bytes
from propolis.storage import write_atomically

RESULT, MODEL, CURVES, CONFIG = "result.json", "model.safetensors", "curves.png", "config.toml"
# What an encrypted run leaves in place of MODEL: see `propolis.client.encrypted.open_model_file`.
ENCRYPTED_MODEL = "model.encrypted"

_CURVES = {"accuracy": "tab:green", "loss": "tab:red"}
_AXES = ("round", "MB up and down, all devices")
_FAILURES_SHOWN = 3
_COLUMNS = ("round", "accuracy", "loss", "up", "down", "survivors", "seconds")
_WIDTHS = (7, 9, 8, 10, 10, 10, 8)


class TerminalReport:
    """A row per round as it ends, above a progress bar; rows alone where the output is not a terminal."""

    def __init__(self, rounds: int, completed: int, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._bar = self._progress.add_task("", total=rounds, completed=completed)

    def __enter__(self) -> TerminalReport:
        self._console.print(_row(_COLUMNS), style="bold")
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def round_started(self, number: int, attempt: int) -> None:
        """Say so when a round is tried again."""
        if attempt:
            self._console.print(f"round {number}: too few devices survived, attempt {attempt + 1}", style="yellow")

    def round_finished(self, state: RunState) -> None:
        """Print the round's row."""
        record = state.history[-1]
        self._console.print(_row(_cells(record)), highlight=False)
        if cut := record.metrics.get("saturated"):
            self._console.print(
                f"        {cut:.0f} values were out of range and cut off", style="yellow", highlight=False
            )
        for failure in record.failures[:_FAILURES_SHOWN]:
            line = f"        a device failed: {one_line(failure)}"
            self._console.print(line, style="yellow", markup=False, highlight=False)
        self._progress.update(self._bar, completed=record.round)


class LogReport:
    """A log line per round, for Flower's own runtimes and for services."""

    def __init__(self, rounds: int, logger: str = "flwr") -> None:
        self._rounds = rounds
        self._log = logging.getLogger(logger)

    def round_started(self, number: int, attempt: int) -> None:
        """Say so when a round is tried again; a round's own line comes when it is done."""
        if attempt:
            self._log.warning("round %d: too few devices survived, attempt %d", number, attempt + 1)

    def round_finished(self, state: RunState) -> None:
        """Log the round's figures."""
        line = " ".join(f"{k}={v}" for k, v in zip(_COLUMNS[1:], _cells(state.history[-1])[1:], strict=True))
        self._log.info("round %d of %d: %s", state.completed, self._rounds, line)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run ended before its last round.

    Attributes:
        error: in one line.
        retries: why the attempts at the round under way failed.
    """

    error: str
    retries: tuple[str, ...]

    @classmethod
    def of(cls, error: BaseException, retries: Sequence[str]) -> Failure:
        """From what was raised."""
        return cls(str(error) or type(error).__name__, tuple(retries))


def result_of(settings: Settings, state: RunState, status: str, failure: Failure | None = None) -> dict[str, Any]:
    """The content of result.json; `status` is completed, interrupted or failed."""
    history = [asdict(record) for record in state.history]
    last = history[-1] if history else {"accuracy": None, "loss": None}
    named = settings.model_dump(include={"task", "clients", "rounds", "protection", "codec", "backend", "seed"})
    return {
        **named,
        "strategy": settings.strategy,
        "status": status,
        "error": failure.error if failure else None,
        "retries": list(failure.retries) if failure else [],
        "accuracy": last["accuracy"],
        "loss": last["loss"],
        "uplink_bytes": sum(record["uplink_bytes"] for record in history),
        "downlink_bytes": sum(record["downlink_bytes"] for record in history),
        "seconds": sum(record["seconds"] for record in history),
        "history": history,
    }


def write_results(
    out: Path, settings: Settings, state: RunState, status: str, failure: Failure | None = None
) -> dict[str, Any]:
    """Write result.json and, where a round was completed, the model and the curves; return the result.

    Of an encrypted run, the model is encrypted, and there is nothing for curves to show.

    Raises:
        StorageError: a file could not be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    result = result_of(settings, state, status, failure)
    write_atomically(out / RESULT, json.dumps(result, indent=2).encode() + b"\n")
    if state.history and settings.is_encrypted:
        write_atomically(out / ENCRYPTED_MODEL, _encrypted_file(state))
    elif state.history:
        arrays = {name: np.array(array, order="C") for name, array in state.model.arrays.items()}
        write_atomically(out / MODEL, save(arrays))
        if find_spec("matplotlib"):  # a device's install has none
            write_atomically(out / CURVES, _draw_curves(state.history))
    return result


def _encrypted_file(state: RunState) -> bytes:
    """The encrypted model of a run, with what training left alone."""
    frozen = {name: np.array(state.model.arrays[name], order="C") for name in sorted(state.model.frozen)}
    total = EncryptedSum.from_bytes(state.grid["model"].tobytes())
    return replace(total, frozen=save(frozen) if frozen else b"").to_bytes()


def write_config(out: Path, settings: Settings) -> None:
    """Write the resolved settings, in the form that ``--config`` reads."""
    write_atomically(out / CONFIG, tomli_w.dumps(settings.model_dump(exclude_none=True)).encode())


def _cells(record: RoundRecord) -> tuple[str, ...]:
    survivors = f"{record.survivors}/{record.survivors + record.dropped}"
    return (
        str(record.round),
        "-" if record.accuracy is None else f"{record.accuracy:.4f}",
        "-" if record.loss is None else f"{record.loss:.4f}",
        format_bytes(record.uplink_bytes),
        format_bytes(record.downlink_bytes),
        survivors,
        f"{record.seconds:.2f}",
    )


def _row(cells: Sequence[str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))


def _draw_curves(history: Sequence[RoundRecord]) -> bytes:
    """Accuracy and loss, per round and per megabyte on the wire, as a PNG."""
    from io import BytesIO

    from matplotlib.figure import Figure

    rounds = [record.round for record in history]
    megabytes = [b / 1e6 for b in accumulate(r.uplink_bytes + r.downlink_bytes for r in history)]
    known = [name for name in _CURVES if any(getattr(record, name) is not None for record in history)]
    figure = Figure(figsize=(9, 3 * max(1, len(known))), layout="constrained")
    axes = figure.subplots(max(1, len(known)), 2, sharey="row", squeeze=False)
    for row, name in enumerate(known):
        values = [np.nan if (value := getattr(record, name)) is None else value for record in history]
        for axis, x, label in zip(axes[row], (rounds, megabytes), _AXES, strict=True):
            axis.plot(x, values, color=_CURVES[name], marker="." if len(rounds) < 50 else "")
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes[row][0].set_ylabel(f"test {name}")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()
