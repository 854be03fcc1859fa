from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from propolis.secure.errors import UsageError
from propolis.settings import Settings, load_settings


def test_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('rounds = 7\nbatch-size = 8\nstrategy = "FedAdam"\n')
    settings = load_settings(file, {"rounds": 9, "lr": None})
    assert (settings.rounds, settings.batch_size, settings.strategy) == (9, 8, "fedadam")
    assert settings.lr == Settings().lr


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("ruonds = 7\n")
    with pytest.raises(UsageError, match=r"unknown key 'ruonds'; the nearest known one is 'rounds'"):
        load_settings(file)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rounds", -1, "rounds: expected greater than or equal to 1, got -1"),
        ("rounds", "many", "rounds: expected a valid integer"),
        ("fraction", 0, "fraction: expected greater than 0"),
        ("fraction", 1.5, "fraction: expected less than or equal to 1"),
        ("lr", float("nan"), "lr: "),
        ("strategy", "krum", "strategy: expected 'fedavg'"),
        ("dropout", 1.0, "dropout: expected less than 1"),
        ("protection", "tee", "'tee' is not available in this version; choose none or secagg or he"),
        ("malicious", True, "malicious is a kind of secagg"),
        ("bits", 33, "bits: expected less than or equal to 32"),
        ("codec", "int8", "'int8' is not available in this version; choose float32 or dense or thin"),
        ("codec", "dense", "codec dense is for updates inside a secure sum: set protection to secagg"),
        ("bits", 8, "bits is for updates inside a secure sum: set protection to secagg"),
        ("density", 0.0, "density"),
        ("density", 1.5, "density"),
        ("broadcast_step", -1.0, "broadcast_step"),
        ("clients", 1, "min_clients is 2, but there are only 1 clients"),
        ("prune", 1.0, "prune: expected less than 1"),
        ("prune", -0.1, "prune: expected greater than or equal to 0"),
        ("prune_begin", 0, "prune_begin: expected greater than or equal to 1"),
        ("prune_end", 0, "prune_end: expected greater than or equal to 1"),
        ("seed", -1, "seed: "),
        ("rounds", True, "rounds: expected a valid integer"),
        ("rounds", "3", "rounds: expected a valid integer"),
        ("batch_size", 10**20, "batch_size: expected less than or equal to 2147483647"),
    ],
)
def test_a_value_out_of_range_is_one_clear_line(key: str, value: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(overrides={key: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune_begin": 31}, "prune_begin is 31, but there are only 30 rounds"),
        ({"prune_end": 31}, "prune_end: expected a round from prune_begin to rounds, 1 to 30, got 31"),
        ({"prune_begin": 9, "prune_end": 8}, "prune_end: expected a round from prune_begin to rounds, 9 to 30, got 8"),
    ],
)
def test_pruning_ends_within_the_run(values: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        load_settings(overrides={"prune": 0.5, **values})
    assert load_settings(overrides=values)  # without pruning they mean nothing


def test_pruning_ends_half_way_and_keeps_to_that_when_rounds_are_added() -> None:
    settings = Settings(prune=0.5)
    assert settings.prune_end == 15
    assert load_settings(base=settings, overrides={"rounds": 60}).prune_end == 15
    assert Settings(prune=0.5, prune_begin=20).prune_end == 20
    assert Settings(prune=0.5, rounds=1).prune_end == 1
    assert Settings(prune=0.5, prune_end=30).prune_end == 30
    assert Settings().prune_end is None


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load_settings(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    for text in ("rounds = = 3", "rounds = " + "9" * 5000, "rounds = " + "[" * 5000):
        broken.write_text(text)
        with pytest.raises(UsageError, match="not valid TOML"):
            load_settings(broken)
    broken.write_text("batch-size = 1\nbatch_size = 2")
    with pytest.raises(UsageError, match="given twice"):
        load_settings(broken)


def test_settings_are_frozen_and_hashable() -> None:
    assert hash(Settings()) == hash(Settings())
    with pytest.raises(ValueError, match="frozen"):
        Settings().rounds = 3  # type: ignore[misc]


def test_flowers_configuration_lists_the_settings_with_their_defaults() -> None:
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
    listed = project["tool"]["flwr"]["app"]["config"]
    assert listed.pop("out") == ""
    assert listed.pop("federation") == ""
    elsewhere = {"clients", "backend", "workers", "ray_cpus", "data", "dropout"}
    defaults = {k: v for k, v in Settings().model_dump(exclude_none=True).items() if k not in elsewhere}
    assert {key.replace("-", "_"): value for key, value in listed.items()} == defaults
