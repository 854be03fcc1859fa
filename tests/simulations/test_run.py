"""Whole runs in this process: files, determinism, resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from propolis.secure.errors import TooFewPeersError, UsageError
from propolis.server.app import FederatedRun
from propolis.server.job import CHECKPOINT, RunOptions, settings_to_resume
from propolis.settings import Settings, load_settings
from propolis.simulations.run import simulate

RESULT_KEYS = {
    *("task", "clients", "rounds", "protection", "codec", "backend", "seed"),
    *("accuracy", "loss", "uplink_bytes", "downlink_bytes", "seconds", "history"),
}
ROUND_KEYS = {"round", "accuracy", "loss", "uplink_bytes", "downlink_bytes", "survivors", "dropped", "seconds"}


def job(**changes: Any) -> Settings:
    return Settings(**{"clients": 5, "rounds": 4, "epochs": 1, **changes})


def model_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_run_leaves_its_files(tmp_path: Path) -> None:
    result = simulate(job(dropout=0.3), RunOptions(tmp_path))
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result.keys() >= RESULT_KEYS
    assert result["status"] == "completed"
    assert [record["round"] for record in result["history"]] == [1, 2, 3, 4]
    for record in result["history"]:
        assert record.keys() >= ROUND_KEYS
        assert record["survivors"] + record["dropped"] == 5
    assert result["accuracy"] == result["history"][-1]["accuracy"]
    assert result["uplink_bytes"] == sum(record["uplink_bytes"] for record in result["history"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_settings(tmp_path / "config.toml") == job(dropout=0.3)
    assert {name: a.shape for name, a in load_file(tmp_path / "model.safetensors").items()} == {
        "0.weight": (128, 64),
        "0.bias": (128,),
        "2.weight": (10, 128),
        "2.bias": (10,),
    }


def test_bytes_are_those_of_the_messages(tmp_path: Path) -> None:
    """A float32 model of 9,610 parameters is 38,440 bytes; headers and names add a little."""
    result = simulate(job(rounds=1), RunOptions(tmp_path))
    for direction in ("uplink_bytes", "downlink_bytes"):
        per_device = result[direction] / 5
        assert 38_440 < per_device < 38_440 * 1.05


def test_one_seed_one_model_whatever_the_workers_and_another_seed_another(tmp_path: Path) -> None:
    runs = {"a": job(), "b": job(), "workers": job(workers=2), "seed": job(seed=1)}
    for name, settings in runs.items():
        simulate(settings, RunOptions(tmp_path / name))
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b") == model_bytes(tmp_path / "workers")
    assert model_bytes(tmp_path / "a") != model_bytes(tmp_path / "seed")


class StopAfter(FederatedRun):
    """A run that is interrupted when some rounds are done, as by Ctrl-C."""

    rounds = 2

    def _round(self, metered: Any, grid: Any, number: int) -> Any:
        if number > self.rounds:
            raise KeyboardInterrupt
        return super()._round(metered, grid, number)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    settings = job(strategy=strategy, dropout=0.3, fraction=0.8, evaluate_fraction=0.5)
    simulate(settings, RunOptions(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("propolis.server.job.FederatedRun", StopAfter)
        with pytest.raises(KeyboardInterrupt):
            simulate(settings, RunOptions(tmp_path / "cut"))
    kept = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert kept["status"] == "interrupted"
    assert len(kept["history"]) == 2
    simulate(settings_to_resume(tmp_path / "cut", {}), RunOptions(tmp_path / "cut", resume=True))
    assert model_bytes(tmp_path / "cut") == model_bytes(tmp_path / "whole")
    whole, cut = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut"))
    for record in (*whole["history"], *cut["history"]):
        del record["seconds"]
    assert cut["history"] == whole["history"]


def test_more_rounds_may_be_asked_for_when_resuming_and_nothing_else(tmp_path: Path) -> None:
    simulate(job(rounds=2), RunOptions(tmp_path / "short"))
    longer = settings_to_resume(tmp_path / "short", {"rounds": 4})
    simulate(longer, RunOptions(tmp_path / "short", resume=True))
    simulate(job(), RunOptions(tmp_path / "long"))
    assert model_bytes(tmp_path / "short") == model_bytes(tmp_path / "long")
    with pytest.raises(UsageError, match="--lr, --seed would make another run"):
        settings_to_resume(tmp_path / "short", {"lr": 0.5, "seed": 3})
    with pytest.raises(UsageError, match="has done 4 rounds already, more than 3"):
        simulate(longer.model_copy(update={"rounds": 3}), RunOptions(tmp_path / "short", resume=True))


def test_a_cosine_schedule_fixes_the_number_of_rounds(tmp_path: Path) -> None:
    simulate(job(rounds=1, lr_schedule="cosine"), RunOptions(tmp_path))
    with pytest.raises(UsageError, match="--rounds would make another run"):
        settings_to_resume(tmp_path, {"rounds": 2})


def test_a_run_stopped_before_its_first_round_starts_when_resumed(tmp_path: Path) -> None:
    simulate(job(rounds=1), RunOptions(tmp_path / "whole"))
    simulate(job(rounds=1), RunOptions(tmp_path / "cut"))
    for name in (CHECKPOINT, "result.json", "model.safetensors", "curves.png"):
        (tmp_path / "cut" / name).unlink()
    simulate(settings_to_resume(tmp_path / "cut", {}), RunOptions(tmp_path / "cut", resume=True))
    assert model_bytes(tmp_path / "cut") == model_bytes(tmp_path / "whole")


def test_another_run_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    simulate(job(rounds=1), RunOptions(tmp_path))
    before = model_bytes(tmp_path)
    with pytest.raises(UsageError, match="holds another run"):
        simulate(job(rounds=1, seed=9), RunOptions(tmp_path))
    assert model_bytes(tmp_path) == before
    simulate(job(rounds=1, seed=9), RunOptions(tmp_path, force=True))
    assert model_bytes(tmp_path) != before


def test_a_damaged_checkpoint_stops_the_resumption_and_loses_nothing(tmp_path: Path) -> None:
    simulate(job(rounds=1), RunOptions(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != CHECKPOINT}
    (tmp_path / CHECKPOINT).write_bytes(b"damaged")
    with pytest.raises(UsageError, match="is not a whole checkpoint"):
        simulate(settings_to_resume(tmp_path, {"rounds": 2}), RunOptions(tmp_path, resume=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != CHECKPOINT} == before


def test_a_failed_run_keeps_the_rounds_before_it(tmp_path: Path) -> None:
    with pytest.raises(TooFewPeersError):
        simulate(job(rounds=50, dropout=0.5, min_clients=4, attempts=1), RunOptions(tmp_path))
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_nothing_is_written_when_the_request_is_infeasible(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2000 clients cannot share 1438 examples"):
        simulate(job(clients=2000), RunOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
