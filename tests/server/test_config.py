"""What a server process is told: one file with tables, flags on top, and one clear line for a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from propolis.secure.errors import UsageError
from propolis.server.config import load_served


def served(tmp_path: Path, text: str, **flags: Any) -> Any:
    path = tmp_path / "server.toml"
    path.write_text(text)
    return load_served(path, flags)


def test_settings_the_process_and_the_apps_have_their_own_tables(tmp_path: Path) -> None:
    text = "rounds = 7\n[server]\nwait-for = 5\nlisten = '127.0.0.1:1'\n[run-config]\nlearning-rate = 0.5\n"
    found = served(tmp_path, text, out="elsewhere", rounds=None)
    assert (found.settings.rounds, found.settings.clients, found.settings.backend) == (7, 5, "link")
    assert (found.config.wait_for, found.config.listen, found.config.out) == (5, "127.0.0.1:1", "elsewhere")
    assert found.run_config == {"learning-rate": 0.5}


def test_flags_win(tmp_path: Path) -> None:
    found = served(tmp_path, "rounds = 7\n[server]\nheartbeat = 5\n", rounds=8, heartbeat=6)
    assert (found.settings.rounds, found.config.heartbeat) == (8, 6)


@pytest.mark.parametrize(
    ("text", "devices"),
    [("", 2), ("protection = 'secagg'", 3), ("min_clients = 9", 9), ("protection = 'secagg'\nmin_clients = 2", 3)],
)
def test_without_a_word_it_waits_for_as_many_as_a_round_takes(tmp_path: Path, text: str, devices: int) -> None:
    assert served(tmp_path, text).settings.clients == devices


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nlissten = 'x'\n", "table [server]: unknown key 'lissten'; the nearest known one is 'listen'"),
        ("roundss = 3\n", "unknown key 'roundss'; the nearest known one is 'rounds'"),
        ("clients = 3\n", "clients is for simulated devices"),
        ("partition = 'iid'\n", "partition is for simulated devices"),
        ("server = 3\n", "expected a table, got 3"),
        ("[server]\nheartbeat = 0\n", "heartbeat: expected greater than or equal to 1, got 0"),
        ("min_clients = 5\n[server]\nwait_for = 3\n", "min_clients is 5, but there are only 3 clients"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        served(tmp_path, text)
    assert said in str(caught.value)
