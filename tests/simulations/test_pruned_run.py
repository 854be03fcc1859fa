"""Whole pruned runs: real zeros in the files, and the same bits however a run is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch import nn

from propolis.secure.errors import UsageError
from propolis.server.app import FederatedRun
from propolis.server.checkpoint import RunState
from propolis.server.job import RunOptions, settings_to_resume
from propolis.settings import Settings
from propolis.simulations.run import simulate
from propolis.simulations.tasks.digits import Digits

WEIGHTS = 128 * 64 + 10 * 128


def job(**changes: Any) -> Settings:
    return Settings(**{"clients": 5, "rounds": 4, "epochs": 1, "prune": 0.7, **changes})


def model_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def zeros_in(folder: Path) -> int:
    arrays = load_file(folder / "model.safetensors")
    assert arrays["0.bias"].all()
    return sum(arrays[name].size - np.count_nonzero(arrays[name]) for name in ("0.weight", "2.weight"))


@pytest.mark.parametrize("protection", ["none", "secagg"])
def test_the_model_has_exactly_its_share_of_zeros_and_the_result_says_so(tmp_path: Path, protection: str) -> None:
    result = simulate(job(protection=protection), RunOptions(tmp_path))
    assert zeros_in(tmp_path) == round(0.7 * WEIGHTS)
    half_way = 0.7 * (1 - (1 - 1 / 2) ** 3)
    expected = [round(share * WEIGHTS) / WEIGHTS for share in (half_way, 0.7, 0.7, 0.7)]
    assert [record["metrics"]["sparsity"] for record in result["history"]] == expected


@pytest.mark.parametrize("protection", ["none", "secagg"])
def test_one_seed_one_model_whatever_the_workers(tmp_path: Path, protection: str) -> None:
    for name, workers in (("one", 0), ("two", 2)):
        settings = job(protection=protection, workers=workers, dropout=0.2 if protection == "none" else 0.0)
        simulate(settings, RunOptions(tmp_path / name))
    assert model_bytes(tmp_path / "one") == model_bytes(tmp_path / "two")


class StopAfter(FederatedRun):
    """A run that is interrupted after two rounds, as by Ctrl-C."""

    def _round(self, *arguments: Any) -> RunState:
        if arguments[-1] > 2:
            raise KeyboardInterrupt
        return super()._round(*arguments)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox"])
@pytest.mark.parametrize("protection", ["none", "secagg"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, protection: str
) -> None:
    settings = job(strategy=strategy, protection=protection, prune_end=3, momentum=0.9, lr=0.02)
    simulate(settings, RunOptions(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("propolis.server.job.FederatedRun", StopAfter)
        with pytest.raises(KeyboardInterrupt):
            simulate(settings, RunOptions(tmp_path / "cut"))
    simulate(settings_to_resume(tmp_path / "cut", {}), RunOptions(tmp_path / "cut", resume=True))
    assert model_bytes(tmp_path / "cut") == model_bytes(tmp_path / "whole")
    assert zeros_in(tmp_path / "cut") == round(0.7 * WEIGHTS)


def test_rounds_that_are_added_do_not_move_the_schedule(tmp_path: Path) -> None:
    simulate(job(), RunOptions(tmp_path / "longer"))
    longer = settings_to_resume(tmp_path / "longer", {"rounds": 6})
    simulate(longer, RunOptions(tmp_path / "longer", resume=True))
    simulate(job(rounds=6, prune_end=2), RunOptions(tmp_path / "whole"))
    assert model_bytes(tmp_path / "longer") == model_bytes(tmp_path / "whole")
    with pytest.raises(UsageError, match="prune_end: expected a round from prune_begin to rounds, 1 to 1, got 2"):
        settings_to_resume(tmp_path / "longer", {"rounds": 1})
    with pytest.raises(UsageError, match="--prune, --prune-end would make another run"):
        settings_to_resume(tmp_path / "longer", {"prune": 0.5, "prune_end": 3})


class Vectors(Digits):
    """A model with nothing to prune: a scale for each pixel, summed up by a frozen matrix."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 10))
        model[1].weight.requires_grad_(False)
        return model


def test_a_model_without_weights_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Vectors()
    monkeypatch.setattr("propolis.simulations.run.load_data", lambda *_: (task, task.data()))
    with pytest.raises(UsageError, match="no trainable array of two dimensions"):
        simulate(job(), RunOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
