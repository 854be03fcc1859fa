"""A simulated device that tells how an encrypted run goes: it has the key, the server has not.

Each round it opens the encrypted model as every device does, and evaluates it on the test set. What it finds is
not part of the server's state: it goes to the terminal and into result.json, under its own name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from propolis.client.encrypted_sums import OpenedModel, open_model, open_model_file, open_sum
from propolis.client.state import MemoryStore
from propolis.secure.errors import PeerError
from propolis.secure.secagg.plan import Kind
from propolis.server.checkpoint import RunState
from propolis.server.report import ENCRYPTED_MODEL, RESULT
from propolis.simulations.federation import SIMULATED, Federation
from propolis.storage import write_atomically
from propolis.task import Examples, Task

_NAME = "device 0, which has the key"


class Witness:
    """An observer of a run.

    Args:
        federation: whose first device it is.
        task: the model and its evaluation.
        test: the test set.
        device: that evaluates.
        console: where it says what it sees; None says nothing.
    """

    def __init__(
        self, federation: Federation, task: Task, test: Examples, device: torch.device, console: Console | None = None
    ) -> None:
        if federation.he is None:
            raise AssertionError("the federation has no key of homomorphic encryption")
        state = federation.devices[0].copy()
        state.roster = federation.roster
        self._store = MemoryStore(state, SIMULATED, he_key=federation.he.bundles[0])
        self._task, self._test, self._console = task, test, console
        self._model = task.model().to(device)
        self._rounds: list[dict[str, Any]] = []

    def recall(self, out: Path) -> None:
        """Go on with what it saw of the run in this folder before, as far as that was written down."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            self._rounds = list(json.loads((out / RESULT).read_text())["opened"]["rounds"])

    def round_started(self, number: int, attempt: int) -> None:
        """Nothing: there is a model to open when the round is done."""

    def round_finished(self, state: RunState) -> None:
        """Open the round's model and evaluate it; what devices refuse has a row that says so."""
        try:
            opened = open_model(self._store, state.grid["model"].tobytes())
        except PeerError as error:
            self._rounds.append({"round": state.completed, "refused": str(error)})
            return
        arrays = {**state.model.arrays, **opened.arrays}
        row = self._note(replace(opened, arrays=arrays), self._of_evaluation(state))
        if self._console is not None:
            said = ", ".join(f"{name} {row[name]:.4f}" for name in ("accuracy", "loss") if name in row)
            self._console.print(f"        opened by device 0: {said}", highlight=False)

    def report(self, out: Path) -> dict[str, Any]:
        """Add what it saw to the result.json of a run's folder, and return the content; raises StorageError.

        It opens the folder's model where it has not seen its last round, as when that was done before a crash.
        """
        result: dict[str, Any] = json.loads((out / RESULT).read_text())
        done = len(result["history"])
        self._rounds = [row for row in self._rounds if row["round"] <= done]
        if done and (not self._rounds or self._rounds[-1]["round"] < done):
            self._note(open_model_file(self._store, out / ENCRYPTED_MODEL), {})
        last = self._rounds[-1] if self._rounds else {}
        result |= {name: last.get(name) for name in ("accuracy", "loss")}
        result["opened"] = {"by": _NAME, "rounds": self._rounds}
        write_atomically(out / RESULT, json.dumps(result, indent=2).encode() + b"\n")
        return result

    def _note(self, opened: OpenedModel, more: Mapping[str, float]) -> dict[str, Any]:
        """The row of a round, which it keeps."""
        row = {"round": opened.round, "weight": opened.weight, "saturated": opened.saturated}
        figures = {**opened.metrics, **self._evaluated(opened), **more}
        row |= {name: value for name, value in figures.items() if math.isfinite(value)}  # JSON knows no NaN
        self._rounds.append(row)
        return row

    def _evaluated(self, opened: OpenedModel) -> dict[str, float]:
        """The task's metrics of the model on the test set."""
        self._model.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in opened.arrays.items()})
        with torch.no_grad():
            return {k: float(v) for k, v in self._task.evaluate(self._model.eval(), self._test).items()}

    def _of_evaluation(self, state: RunState) -> dict[str, float]:
        """The devices' own metrics of the model, where this round asked for them."""
        if "evaluation" not in state.grid:
            return {}
        plan, opened = open_sum(self._store, state.grid["evaluation"].tobytes())
        if plan.kind != Kind.EVALUATE or plan.round != state.completed:
            return {}
        return {f"device-{name}": value for name, value in opened.metrics.items()}
