"""Whole encrypted runs: as accurate as an unprotected one, resumable, and the server's files hold nothing readable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from safetensors.numpy import load_file

from harness import Blobs
from propolis.client.app import Participant, make_client_app
from propolis.client.encrypted_sums import OpenedModel, open_model_file
from propolis.client.state import FileStore
from propolis.client.train import LocalTrainer
from propolis.client.update import SecureMod
from propolis.secure.errors import TooFewPeersError, UsageError
from propolis.secure.he import bfv
from propolis.secure.he.keys import PublicKey
from propolis.secure.he.messages import EncryptedSum
from propolis.secure.secagg.policy import Policy
from propolis.server.app import FederatedRun, Members, initial_model
from propolis.server.checkpoint import RunState
from propolis.server.job import RunOptions, settings_to_resume
from propolis.server.report import write_results
from propolis.settings import Settings, load_settings
from propolis.simulations.apps import _members_of_run, load_data
from propolis.simulations.dropout import DropoutGrid, steps_of
from propolis.simulations.federation import (
    DevicesInMemory,
    make_federation,
    parameters_of,
    recalled_federation,
)
from propolis.simulations.local import LocalGrid
from propolis.simulations.partition import Partition
from propolis.simulations.run import simulate
from propolis.simulations.witness import Witness
from propolis.task import load_task

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("mode", ["public", "seeded"])


def job(**changes: Any) -> Settings:
    return Settings(**{"clients": 5, "rounds": 3, "epochs": 1, "protection": "he", **changes})


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def opened(folder: Path, device: int = 1) -> OpenedModel:
    return open_model_file(FileStore(folder / "devices" / f"device-{device}", Policy()), folder / "model.encrypted")


def arrays_equal(one: Path, other: Path) -> bool:
    pairs = zip(opened(one).arrays.values(), opened(other).arrays.values(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.soak
@BOTH
@pytest.mark.parametrize("protection", ["he", "he+secagg"])
def test_an_encrypted_model_is_as_accurate_as_an_unprotected_one(tmp_path: Path, mode: str, protection: str) -> None:
    """Within 0.3 points: digits as `propolis simulate` trains it by default."""
    plain = simulate(Settings(), RunOptions(tmp_path / "none"))
    ours = simulate(Settings(protection=protection, he_mode=mode), RunOptions(tmp_path / "he"))
    assert ours["accuracy"] == pytest.approx(plain["accuracy"], abs=0.003)
    assert ours["loss"] == pytest.approx(plain["loss"], abs=0.003)


def test_devices_report_and_the_servers_history_knows_nothing(tmp_path: Path) -> None:
    result = simulate(job(evaluate_fraction=1.0), RunOptions(tmp_path))
    assert result == result_of(tmp_path)
    for record in result["history"]:
        assert record["accuracy"] is record["loss"] is None
        assert record["metrics"] == {}
    assert result["opened"]["by"] == "device 0, which has the key"
    rows = result["opened"]["rounds"]
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert {"accuracy", "loss", "train-loss", "device-accuracy", "weight", "saturated"} <= rows[0].keys()
    assert (result["accuracy"], result["loss"]) == (rows[-1]["accuracy"], rows[-1]["loss"])
    plain = simulate(job(protection="none", evaluate_fraction=1.0), RunOptions(tmp_path / "none"))["history"]
    for row, record in zip(rows, plain, strict=True):
        for name in ("train-loss", "device-accuracy", "device-loss"):
            assert row[name] == pytest.approx(record["metrics"][name], abs=0.01)


def test_a_run_leaves_a_model_that_devices_can_open_and_nothing_else_can(tmp_path: Path) -> None:
    simulate(job(), RunOptions(tmp_path))
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"result.json", "model.encrypted", "config.toml", "checkpoint.safetensors", "devices"}
    model = opened(tmp_path, device=4)
    assert (model.round, model.devices) == (3, 5)
    task = load_task("digits", None)
    start = initial_model(job(), task).arrays
    assert {n: (a.dtype, a.shape) for n, a in model.arrays.items()} == {n: (a.dtype, a.shape) for n, a in start.items()}
    task.model().load_state_dict({name: torch.from_numpy(array) for name, array in model.arrays.items()})
    kept = load_file(tmp_path / "checkpoint.safetensors")
    for name, array in start.items():  # the server's model is the one that everybody knows
        np.testing.assert_array_equal(kept[f"model/{name}"], array)
    assert {name for name in kept if kept[name].dtype.kind == "f"} == {f"model/{name}" for name in start}
    secrets = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert all(array.tobytes() not in secrets for array in model.arrays.values())
    assert (tmp_path / "devices").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("protection", ["he", "he+secagg"])
def test_the_key_of_a_run_under_masks_is_for_masks(tmp_path: Path, protection: str) -> None:
    simulate(job(protection=protection, rounds=1), RunOptions(tmp_path))
    federation = recalled_federation(tmp_path / "devices", 5)
    assert federation.he is not None
    assert federation.he.public.masked == (protection == "he+secagg")


@pytest.mark.parametrize("protection", ["he", "he+secagg"])
def test_the_key_of_flowers_engine_is_for_masks_where_the_run_has_them(protection: str) -> None:
    _, data = load_data("digits", None)
    grid, settings = Mock(get_node_ids=lambda: range(3)), job(protection=protection, clients=3, min_clients=3)
    with _members_of_run(settings, data, grid, Context(os.getpid(), 1, {}, RecordDict(), {})) as (members, _):
        assert members is not None
        assert members.he_key is not None
        assert members.he_key.masked == (protection == "he+secagg")


class StopAfter(FederatedRun):
    """A run that is interrupted after two rounds, as by Ctrl-C."""

    def _round(self, *arguments: Any) -> RunState:
        if arguments[-1] > 2:
            raise KeyboardInterrupt
        return super()._round(*arguments)


RESUMED: list[dict[str, Any]] = [
    {"dropout": 0.2},
    {"he_mode": "seeded", "strategy": "fedprox"},
    {"protection": "he+secagg", "malicious": True},
    {"protection": "he+secagg", "dropout": 0.05, "assume_dropped": 0.3},
]


@pytest.mark.parametrize("changes", RESUMED, ids=str)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    settings = job(rounds=4, clients=8, **changes)
    simulate(settings, RunOptions(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("propolis.server.job.FederatedRun", StopAfter)
        with pytest.raises(KeyboardInterrupt):
            simulate(settings, RunOptions(tmp_path / "cut"))
    assert [row["round"] for row in result_of(tmp_path / "cut")["opened"]["rounds"]] == [1, 2]
    simulate(settings_to_resume(tmp_path / "cut", {}), RunOptions(tmp_path / "cut", resume=True))
    assert arrays_equal(tmp_path / "cut", tmp_path / "whole")
    assert result_of(tmp_path / "cut")["opened"] == result_of(tmp_path / "whole")["opened"]


def test_a_run_that_was_killed_before_it_could_report_is_reported_when_it_is_resumed(tmp_path: Path) -> None:
    simulate(job(), RunOptions(tmp_path))
    before = result_of(tmp_path)
    (tmp_path / "result.json").unlink()
    (tmp_path / "model.encrypted").unlink()
    after = simulate(settings_to_resume(tmp_path, {}), RunOptions(tmp_path, resume=True))
    assert (after["accuracy"], after["loss"]) == (before["accuracy"], before["loss"])


def test_without_its_devices_keys_a_run_cannot_be_resumed(tmp_path: Path, mistake: Any) -> None:
    simulate(job(rounds=1), RunOptions(tmp_path))
    (tmp_path / "devices").rename(tmp_path / "elsewhere")
    for make in (lambda: None, (tmp_path / "devices").mkdir):
        make()
        assert "does not hold the devices of the run" in mistake("simulate", "--resume", tmp_path, "--rounds", 2)


def test_another_runs_folder_is_left_alone(tmp_path: Path) -> None:
    simulate(job(rounds=1), RunOptions(tmp_path))
    before = (result_of(tmp_path), opened(tmp_path).arrays)
    with pytest.raises(UsageError, match="holds another run"):
        simulate(job(rounds=2), RunOptions(tmp_path))
    assert result_of(tmp_path) == before[0]
    assert opened(tmp_path).arrays.keys() == before[1].keys()
    simulate(job(rounds=2), RunOptions(tmp_path, force=True))
    assert opened(tmp_path).round == 2
    (tmp_path / "result.json").write_text('{"history": []}')
    with pytest.raises(UsageError, match="holds another run"):
        simulate(job(rounds=2), RunOptions(tmp_path))
    assert result_of(tmp_path) == {"history": []}


def test_a_run_that_was_killed_in_its_first_round_is_begun_anew_with_keys_that_last(tmp_path: Path) -> None:
    simulate(job(rounds=1), RunOptions(tmp_path / "before"))
    (tmp_path / "killed").mkdir()
    (tmp_path / "before" / "config.toml").rename(tmp_path / "killed" / "config.toml")
    simulate(settings_to_resume(tmp_path / "killed", {}), RunOptions(tmp_path / "killed", resume=True))
    assert opened(tmp_path / "killed").round == 1
    simulate(settings_to_resume(tmp_path / "killed", {"rounds": 2}), RunOptions(tmp_path / "killed", resume=True))
    assert opened(tmp_path / "killed").round == 2


def test_one_seed_one_model_bit_for_bit_whatever_keys_modes_and_workers(tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {"a": {}, "workers": {"workers": 2}, "seeded": {"he_mode": "seeded"}}
    for name, changed in {**changes, "seed": {"seed": 1}}.items():
        simulate(job(**changed), RunOptions(tmp_path / name))
    assert arrays_equal(tmp_path / "a", tmp_path / "workers")
    assert arrays_equal(tmp_path / "a", tmp_path / "seeded")
    assert not arrays_equal(tmp_path / "a", tmp_path / "seed")


def test_lost_rounds_are_tried_again_and_the_reasons_are_in_the_result(tmp_path: Path) -> None:
    history = simulate(job(rounds=3, dropout=0.4), RunOptions(tmp_path))["history"]
    assert sum(record["attempts"] for record in history) > len(history)
    for record in history:
        assert all(reason.startswith(f"round {record['round']}: ") for reason in record["retries"])
        assert record["survivors"] + record["dropped"] == 5


def test_a_round_below_the_devices_floor_is_tried_again_then_reported(tmp_path: Path) -> None:
    """Two of five are enough for the server's own minimum, and not for the devices' floor of three."""
    with pytest.raises(TooFewPeersError):
        simulate(job(rounds=50, dropout=0.8, min_clients=2, attempts=2), RunOptions(tmp_path))
    failed = result_of(tmp_path)
    assert failed["status"] == "failed"
    assert "3 are needed" in failed["error"]
    assert len(failed["retries"]) == 2


def blobs_run(
    settings: Settings, room: int | None = None, newest_key: Callable[[PublicKey], PublicKey] | None = None
) -> tuple[FederatedRun, LocalGrid, Witness]:
    """A run over a model with batch norm and a frozen array, whose devices are all in this process."""
    federation = make_federation(settings.clients, settings.seed, parameters_of(settings, room or settings.clients))
    assert federation.he is not None
    stores = DevicesInMemory(federation.devices, federation.he.bundles)

    def load() -> ClientApp:
        trainer, data = LocalTrainer(Blobs(), CPU), Blobs().data().train
        parts = Partition("iid").split(data, settings.clients, seed=0)

        def participant(context: Context) -> Participant:
            index = int(context.node_config["partition-id"])
            return Participant(trainer, data.subset(parts[index]), data.subset(parts[index]), str(index))

        return make_client_app(participant, [SecureMod(stores)])

    key = federation.he.public
    newest = partial(newest_key, key) if newest_key else None
    task, members = Blobs(), Members(federation.verified_roster, 240.0, he_key=key, newest_key=newest)
    run = FederatedRun(settings, task, task.data().test, device=CPU, members=members)
    witness = Witness(federation, task, task.data().test, CPU, None)
    return run, LocalGrid(load, settings.clients), witness


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_counters_stay_exact_statistics_stay_valid_and_frozen_parameters_stay(tmp_path: Path, strategy: str) -> None:
    settings = job(clients=4, rounds=6, strategy=strategy, lr=0.1)
    run, grid, witness = blobs_run(settings)
    start = run.state.model
    state = run.run(grid, witness)
    for name, array in start.arrays.items():
        np.testing.assert_array_equal(state.model.arrays[name], array)
    write_results(tmp_path, settings, state, "completed")
    report = witness.report(tmp_path)
    arrays = open_model_file(witness._store, tmp_path / "model.encrypted").arrays
    assert arrays["1.num_batches_tracked"] == 12  # two batches of 60 examples, six rounds
    assert (arrays["1.running_var"] > 0).all()  # type: ignore[operator]
    np.testing.assert_array_equal(arrays["0.bias"], start.arrays["0.bias"])
    assert {name: a.dtype for name, a in arrays.items()} == {name: a.dtype for name, a in start.arrays.items()}
    assert report["accuracy"] > 0.75


def test_a_round_asks_no_more_devices_than_its_key_has_room_for() -> None:
    """More may connect in the middle of a run, which goes on; who is in a round differs from one to the next."""
    run, grid, _ = blobs_run(job(clients=5, rounds=4, min_clients=3), room=3)
    state = run.run(grid)
    assert [(record.survivors, record.dropped) for record in state.history] == [(3, 0)] * 4
    assert len({EncryptedSum.from_bytes(state.grid[name].tobytes()).devices for name in ("model", "before")}) == 2


def test_an_evaluation_is_left_out_while_there_is_no_key_that_it_may_be_under() -> None:
    """A device is revoked while the others train: the next exchange would be under a key that it has."""
    asked = list[int]()

    def newest_key(key: PublicKey) -> PublicKey:
        asked.append(1)
        if len(asked) in (2, 3):
            raise UsageError("lab is revoked and has the key")
        return key

    run, grid, _ = blobs_run(job(clients=3, rounds=1, evaluate_fraction=1.0), newest_key=newest_key)
    assert "evaluation" not in run.run(grid).grid
    assert len(asked) == 2
    run, grid, _ = blobs_run(job(clients=3, rounds=1, evaluate_fraction=1.0), newest_key=lambda key: key)
    assert "evaluation" in run.run(grid).grid


def test_devices_lost_at_any_exchange_leave_a_run_that_learns() -> None:
    settings = job(clients=12, rounds=6, lr=0.1, dropout=0.3, fraction=0.7)
    run, grid, witness = blobs_run(settings)
    lossy = DropoutGrid(grid, settings.dropout, settings.seed, steps_of(settings))
    history = run.run(lossy, lossy, witness).history
    assert witness._rounds[-1]["accuracy"] > 0.75
    assert sum(record.dropped for record in history) > 5


def test_device_processes_behind_the_link_train_encrypted_and_masked(tmp_path: Path) -> None:
    settings = job(clients=3, rounds=2, evaluate_fraction=1.0)
    over_link = settings.model_copy(update={"backend": "link", "protection": "he+secagg"})
    linked = simulate(over_link, RunOptions(tmp_path / "link"))["opened"]
    local = simulate(settings, RunOptions(tmp_path / "local"))["opened"]
    assert linked == local
    assert arrays_equal(tmp_path / "link", tmp_path / "local")


def test_masks_change_nothing_of_what_is_learned(tmp_path: Path) -> None:
    """Nothing but the noise of the ciphertexts differs, which decryption takes away."""
    for protection in ("he", "he+secagg"):
        simulate(job(protection=protection, evaluate_fraction=1.0), RunOptions(tmp_path / protection))
    assert arrays_equal(tmp_path / "he", tmp_path / "he+secagg")
    assert result_of(tmp_path / "he")["opened"] == result_of(tmp_path / "he+secagg")["opened"]


# Mistakes are one line

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"malicious": True}, "malicious means nothing under he: set protection to he+secagg or secagg, or leave it out"),
    ({"codec": "thin"}, "codec means nothing under he: set protection to secagg, or leave it out"),
    ({"density": 0.5}, "density means nothing under he"),
    ({"broadcast_step": 1.0}, "broadcast_step means nothing under he"),
    ({"assume_corrupted": 0.2}, "assume_corrupted means nothing under he"),
    ({"assume_dropped": 0.2}, "assume_dropped means nothing under he"),
    ({"protection": "he+secagg", "codec": "thin"}, "codec means nothing under he+secagg: set protection to secagg"),
    ({"protection": "he+secagg", "strategy": "fedadam"}, "fedadam computes on the mean"),
    ({"protection": "none", "malicious": True}, "set protection to secagg or he+secagg"),
    ({"prune": 0.5}, "prune: the server does not see the weights"),
    ({"bits": 7}, "bits: under he a weight has 8 to 32, got 7"),
    ({"clients": 2}, "a secure sum takes 3 or more"),
    *(
        (
            {"strategy": name},
            f"{name} computes on the mean, which the server does not see under he: use",
        )
        for name in ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
    ),
    ({"he_mode": "private"}, "he_mode: expected 'public' or 'seeded'"),
    ({"protection": "none", "he_mode": "seeded"}, "he_mode seeded is for homomorphic encryption: set protection to he"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED, ids=lambda v: str(v)[:40])
def test_combinations_that_make_no_sense_are_one_line(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(overrides={"protection": "he", **changes})
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_the_flags_is_one_line(mistake: Any) -> None:
    assert "use fedavg or fedprox" in mistake("simulate", "--protection", "he", "--strategy", "fedadam")


def test_without_tenseal_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from propolis.secure.he import held

    monkeypatch.setitem(__import__("sys").modules, "tenseal.sealapi", None)
    for cached in (bfv._sealapi, held.scheme_of):
        cached.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"needs TenSEAL: pip install 'propolis\[he\]'"):
            simulate(job(), RunOptions(tmp_path / "out"))
    finally:
        for cached in (bfv._sealapi, held.scheme_of):
            cached.cache_clear()
    assert not (tmp_path / "out").exists()


def test_a_run_needs_a_key() -> None:
    settings = job()
    members = Members(make_federation(5).verified_roster, 240.0)
    run = FederatedRun(settings, Blobs(), Blobs().data().test, device=CPU, members=members)
    with pytest.raises(UsageError, match="needs a key of homomorphic encryption"):
        run.run(blobs_run(settings)[1])
