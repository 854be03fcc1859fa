"""What a device process is told: the enrolment's file, its owner's, and flags on top."""

from __future__ import annotations

from pathlib import Path

import pytest

from propolis.client.config import SETTINGS_FILE, load_client_config, parse_pairs
from propolis.secure.errors import UsageError


@pytest.fixture
def device(tmp_path: Path) -> Path:
    (tmp_path / SETTINGS_FILE).write_text('server = "cloud.example:7441"\n')
    return tmp_path


def test_the_owners_file_and_then_flags_win(device: Path) -> None:
    owners = device / "owner.toml"
    owners.write_text("task = 'digits'\nthreads = 4\n[node]\npropolis-min-cohort = 5\nname = 'a'\n")
    config = load_client_config(device, owners, {"threads": 2, "task": None}, "name='b c' flag=true")
    assert (config.server, config.task, config.threads) == ("cloud.example:7441", "digits", 2)
    assert config.node == {"propolis-min-cohort": 5, "name": "b c", "flag": True}


def test_a_folder_without_an_enrolled_device_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run propolis client enroll first"):
        load_client_config(tmp_path, None, {}, "")


def test_an_unknown_key_is_told_with_its_file(device: Path) -> None:
    owners = device / "owner.toml"
    owners.write_text("taks = 'digits'\n")
    with pytest.raises(UsageError, match=r"owner\.toml: unknown key 'taks'; the nearest known one is 'task'"):
        load_client_config(device, owners, {}, "")


def test_pairs_are_those_of_flowers_own_command() -> None:
    assert parse_pairs("partition-id=3 rate=0.5  x='a b' y=\"c\" on=true") == {
        **{"partition-id": 3, "rate": 0.5},
        **{"x": "a b", "y": "c", "on": True},
    }
    assert parse_pairs("  ") == {}


@pytest.mark.parametrize("text", ["nonsense", "a=1 b", "=3", "a=b", "a=[1]  =", "a='b"])
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="node configuration"):
        parse_pairs(text)
