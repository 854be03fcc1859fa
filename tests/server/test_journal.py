"""A server that crashes after the devices revealed their shares does not ask them again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from secure_app import MODEL, Hive, outcome_of, record

from propolis.secure.codec.profiles import PROFILES
from propolis.server.grid import SecureGrid
from propolis.server.planner import Protection

PROTECTION = Protection(max_weight=100.0, attempts=1)


def grid_of(hive: Hive, journal: Path, codec: str = "float32") -> SecureGrid:
    protection = replace(PROTECTION, codec=PROFILES[codec])
    return SecureGrid(hive.wire, FedAvg(), hive.federation.verified_roster, protection, journal=journal)


def asked(number: int, kind: str = "train") -> list[Message]:
    content = RecordDict({"arrays": record(MODEL), "config": ConfigRecord({"server-round": number})})
    return [Message(content, node_id, kind) for node_id in range(1, 6)]


def weights(replies: list[Message]) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in replies[0].content.array_records["arrays"].items()}


@pytest.mark.parametrize("codec", PROFILES)
def test_after_a_crash_the_same_round_costs_no_second_reveal(tmp_path: Path, codec: str) -> None:
    """Also where the devices were given a version of the model that nobody else can make again."""
    hive = Hive(5)
    first = list(grid_of(hive, tmp_path / "journal", codec).send_and_receive(asked(1)))
    before = len(hive.wire.asked("unmask"))
    again = list(grid_of(hive, tmp_path / "journal", codec).send_and_receive(asked(1)))
    assert len(hive.wire.asked("unmask")) == before
    assert outcome_of(again[0]).survivors == 5
    for name, values in weights(first).items():
        np.testing.assert_array_equal(weights(again)[name], values)


def test_what_a_killed_write_left_does_not_stay(tmp_path: Path) -> None:
    left = tmp_path / ".journal.a1b2c3d4"
    left.write_bytes(b"shares")
    list(grid_of(Hive(5), tmp_path / "journal").send_and_receive(asked(1)))
    assert not left.exists()


@pytest.mark.parametrize(("number", "kind"), [(2, "train"), (1, "evaluate")])
def test_another_round_is_asked_of_the_devices(tmp_path: Path, number: int, kind: str) -> None:
    hive = Hive(5)
    list(grid_of(hive, tmp_path / "journal").send_and_receive(asked(1)))
    before = len(hive.wire.asked("unmask"))
    list(grid_of(hive, tmp_path / "journal").send_and_receive(asked(number, kind)))
    assert len(hive.wire.asked("unmask")) == before + 5


def test_without_a_crash_the_same_batch_is_a_round_of_its_own(tmp_path: Path) -> None:
    hive = Hive(5)
    grid = grid_of(hive, tmp_path / "journal")
    list(grid.send_and_receive(asked(1)))
    before = len(hive.wire.asked("unmask"))
    list(grid.send_and_receive(asked(1)))
    assert len(hive.wire.asked("unmask")) == before + 5


@pytest.mark.parametrize("damage", [b"", b"x" * 10_000])
def test_a_journal_that_cannot_be_read_is_no_journal(tmp_path: Path, damage: bytes) -> None:
    hive, journal = Hive(5), tmp_path / "journal"
    list(grid_of(hive, journal).send_and_receive(asked(1)))
    journal.write_bytes(journal.read_bytes()[:32] + damage)
    assert outcome_of(next(iter(grid_of(hive, journal).send_and_receive(asked(1))))).survivors == 5


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    list(grid_of(Hive(5), tmp_path / "journal").send_and_receive(asked(1)))
    assert (tmp_path / "journal").stat().st_mode & 0o077 == 0
