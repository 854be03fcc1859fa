"""Whole protected runs: the same files, determinism and resumption as unprotected ones, and as good a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp

from harness import Blobs
from propolis.client.app import Participant, make_client_app
from propolis.client.train import LocalTrainer
from propolis.client.update import SecureMod
from propolis.secure.errors import TooFewPeersError, UsageError
from propolis.server.app import FederatedRun, Members
from propolis.server.checkpoint import RunState
from propolis.server.job import RunOptions, settings_to_resume
from propolis.settings import CODECS, Settings
from propolis.simulations.dropout import DropoutGrid, steps_of
from propolis.simulations.federation import DevicesInMemory, make_federation
from propolis.simulations.local import LocalGrid
from propolis.simulations.partition import Partition
from propolis.simulations.run import simulate

CPU = torch.device("cpu")


def job(**changes: Any) -> Settings:
    return Settings(**{"clients": 5, "rounds": 3, "epochs": 1, "protection": "secagg", **changes})


def model_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@pytest.mark.parametrize("codec", CODECS)
def test_one_seed_one_model_bit_for_bit_whatever_keys_and_workers(tmp_path: Path, codec: str) -> None:
    changes: dict[str, dict[str, Any]] = {"a": {}, "again": {"workers": 2}, "malicious": {"malicious": True}}
    for name, changed in {**changes, "seed": {"seed": 1}}.items():
        simulate(job(codec=codec, **changed), RunOptions(tmp_path / name))
    a = model_bytes(tmp_path / "a")
    assert a == model_bytes(tmp_path / "again") == model_bytes(tmp_path / "malicious")
    assert a != model_bytes(tmp_path / "seed")


class StopAfter(FederatedRun):
    """A run that is interrupted after two rounds, as by Ctrl-C."""

    def _round(self, *arguments: Any) -> RunState:
        if arguments[-1] > 2:
            raise KeyboardInterrupt
        return super()._round(*arguments)


RESUMED: list[dict[str, Any]] = [
    {"dropout": 0.1},
    {"dropout": 0.1, "strategy": "fedadam"},
    {"codec": "dense"},
    {"codec": "thin", "fraction": 0.6},
    {"codec": "dense", "strategy": "fedadam", "prune": 0.5, "prune_begin": 1},
    {"codec": "thin", "strategy": "fedavgm", "prune": 0.5, "prune_begin": 2},
]


@pytest.mark.parametrize("changes", RESUMED, ids=str)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    settings = job(rounds=4, clients=8, evaluate_fraction=1.0, **changes)
    simulate(settings, RunOptions(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("propolis.server.job.FederatedRun", StopAfter)
        with pytest.raises(KeyboardInterrupt):
            simulate(settings, RunOptions(tmp_path / "cut"))
    assert len(result_of(tmp_path / "cut")["history"]) == 2
    simulate(settings_to_resume(tmp_path / "cut", {}), RunOptions(tmp_path / "cut", resume=True))
    assert model_bytes(tmp_path / "cut") == model_bytes(tmp_path / "whole")
    histories = [result_of(tmp_path / name)["history"] for name in ("cut", "whole")]
    for record in (*histories[0], *histories[1]):
        for changing in ("seconds", "uplink_bytes", "downlink_bytes"):  # a resumed run says hello again
            del record[changing]
    assert histories[0] == histories[1]


def test_a_protected_model_differs_from_the_unprotected_one_by_the_grids_steps_alone(tmp_path: Path) -> None:
    for name, settings in {"secagg": job(bits=32), "none": job(protection="none")}.items():
        simulate(settings, RunOptions(tmp_path / name))
    ours, theirs = (result_of(tmp_path / name)["loss"] for name in ("secagg", "none"))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox"])
def test_every_strategy_learns_under_the_dense_codec_while_devices_are_lost(tmp_path: Path, strategy: str) -> None:
    settings = job(codec="dense", strategy=strategy, rounds=8, clients=8, dropout=0.1, epochs=3)
    result = simulate(settings, RunOptions(tmp_path))
    assert result["accuracy"] > 0.75
    assert sum(record["metrics"]["wraps"] for record in result["history"]) == 0


@pytest.mark.soak
def test_a_coarse_codec_sends_far_less_for_the_same_accuracy(tmp_path: Path) -> None:
    """Digits as `propolis simulate` trains them by default."""
    results = {
        codec: simulate(Settings(protection="secagg", codec=codec), RunOptions(tmp_path / codec)) for codec in CODECS
    }
    plain = results["float32"]
    for codec, less in (("dense", 2.5), ("thin", 6.0)):
        assert results[codec]["accuracy"] == pytest.approx(plain["accuracy"], abs=0.01)
        assert results[codec]["uplink_bytes"] < plain["uplink_bytes"] / less
        assert results[codec]["downlink_bytes"] < plain["downlink_bytes"] / 2


def test_a_codec_for_which_there_is_no_room_is_one_line(tmp_path: Path, mistake: Any) -> None:
    flags = ("--protection", "secagg", "--codec", "dense", "--bits", 2, "--clients", 100, "--rounds", 1)
    assert "a ring of 2 bits is too small for the sum of 100 devices: use" in mistake("simulate", *flags)


def test_lost_rounds_are_tried_again_and_the_reasons_are_in_the_result(tmp_path: Path) -> None:
    result = simulate(job(rounds=3, dropout=0.4), RunOptions(tmp_path))
    history = result["history"]
    assert result_of(tmp_path)["status"] == "completed"
    assert sum(record["attempts"] for record in history) > len(history)
    for record in history:
        assert len(record["retries"]) == record["attempts"] - 1
        assert all(reason.startswith(f"round {record['round']}: ") for reason in record["retries"])
        assert record["survivors"] >= 3
        assert record["survivors"] + record["dropped"] == 5


def test_a_run_that_fails_keeps_the_model_of_the_last_good_round_and_says_why(tmp_path: Path) -> None:
    hard = job(rounds=50, dropout=0.4, attempts=2, seed=3)
    with pytest.raises(TooFewPeersError):
        simulate(hard, RunOptions(tmp_path / "failed"))
    failed = result_of(tmp_path / "failed")
    good = len(failed["history"])
    assert failed["status"] == "failed"
    assert "(tried 2 times)" in failed["error"]
    assert len(failed["retries"]) == 2
    assert 0 < good < 50
    simulate(hard.model_copy(update={"rounds": good}), RunOptions(tmp_path / "good"))
    assert model_bytes(tmp_path / "failed") == model_bytes(tmp_path / "good")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"clients": 2}, "2 of 2 clients train in a round; a secure sum takes 3 or more"),
        ({"clients": 4, "min_clients": 5}, "min_clients is 5, but there are only 4 clients"),
    ],
)
def test_too_few_clients_are_one_line(changes: dict[str, int], why: str, mistake: Any) -> None:
    flags = [word for key, value in changes.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    assert why in mistake("simulate", "--protection", "secagg", *flags)


def test_an_unusable_ring_is_one_line(tmp_path: Path, mistake: Any) -> None:
    assert "too small" in mistake("simulate", "--protection", "secagg", "--bits", 2, "--rounds", 1)


def protected_blobs(settings: Settings) -> tuple[FederatedRun, LocalGrid]:
    """A run over a model with batch norm, whose devices are all in this process."""
    federation = make_federation(settings.clients, settings.seed)
    stores = DevicesInMemory(federation.devices)

    def load() -> ClientApp:
        trainer, data = LocalTrainer(Blobs(), CPU), Blobs().data().train
        parts = Partition("iid").split(data, settings.clients, seed=0)

        def participant(context: Context) -> Participant:
            index = int(context.node_config["partition-id"])
            return Participant(trainer, data.subset(parts[index]), data.subset(parts[index]), str(index))

        return make_client_app(participant, [SecureMod(stores)])

    task, members = Blobs(), Members(federation.verified_roster, 240.0)
    return FederatedRun(settings, task, task.data().test, device=CPU, members=members), LocalGrid(
        load, settings.clients
    )


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_counters_stay_exact_statistics_stay_valid_and_frozen_parameters_stay(strategy: str) -> None:
    run, grid = protected_blobs(job(clients=4, rounds=6, strategy=strategy, lr=0.1, bits=8))
    start = run.state.model
    arrays = run.run(grid).model.arrays
    assert arrays["1.num_batches_tracked"].dtype == np.int64
    assert arrays["1.num_batches_tracked"] == 12  # two batches of 60 examples, six rounds
    assert (arrays["1.running_var"] > 0).all()
    np.testing.assert_array_equal(arrays["0.bias"], start.arrays["0.bias"])
    assert {name: a.dtype for name, a in arrays.items()} == {name: a.dtype for name, a in start.arrays.items()}
    accuracy = run.state.history[-1].accuracy
    assert accuracy is not None
    assert accuracy > 0.75


def test_device_metrics_of_evaluation_are_the_unprotected_ones() -> None:
    run, grid = protected_blobs(job(clients=4, rounds=1, evaluate_fraction=1.0))
    metrics = run.run(grid).history[0].metrics
    plain = run.evaluate(run.state.model)
    assert 0.4 < metrics["device-accuracy"] <= 1
    assert metrics["device-loss"] == pytest.approx(plain["loss"], abs=0.3)


def test_devices_lost_at_any_exchange_leave_a_run_that_learns() -> None:
    settings = job(clients=12, rounds=6, lr=0.1, dropout=0.3, malicious=True)
    run, grid = protected_blobs(settings)
    lossy = DropoutGrid(grid, settings.dropout, settings.seed, steps_of(settings))
    history = run.run(lossy, lossy).history
    assert history[-1].accuracy is not None
    assert history[-1].accuracy > 0.75
    assert sum(record.dropped for record in history) > 5


def test_a_protected_run_without_a_federation_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="needs a federation"):
        FederatedRun(job(), Blobs(), Blobs().data().test, device=CPU)


def test_a_protected_model_is_as_accurate_as_an_unprotected_one(tmp_path: Path) -> None:
    """Within 0.3 points: digits as `propolis simulate` trains it by default."""
    accuracy = {
        name: simulate(Settings(protection=name), RunOptions(tmp_path / name))["accuracy"]
        for name in ("none", "secagg")
    }
    assert accuracy["secagg"] == pytest.approx(accuracy["none"], abs=0.003)
