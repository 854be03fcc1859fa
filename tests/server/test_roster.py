"""The federation as the server keeps it: public, whole, and checked when it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from propolis.secure.errors import StorageError, UsageError
from propolis.server.roster import ROOT_FILE, ROSTER_FILE, load_roster, save_roster
from propolis.simulations.federation import Federation, make_federation


@pytest.fixture(scope="module")
def federation() -> Federation:
    return make_federation(3)


@pytest.fixture
def folder(federation: Federation, tmp_path: Path) -> Path:
    save_roster(tmp_path / "server", federation.root_key, federation.roster)
    return tmp_path / "server"


def test_a_roster_comes_back_as_it_was(federation: Federation, folder: Path) -> None:
    loaded = load_roster(folder)
    assert loaded.signed == federation.roster
    assert loaded.number == federation.verified_roster.number
    assert len(loaded.roster.entries) == 3
    assert loaded.digest == federation.verified_roster.digest


def test_the_server_keeps_nothing_secret(federation: Federation, folder: Path) -> None:
    kept = b"".join(path.read_bytes() for path in folder.iterdir())
    assert {path.name for path in folder.iterdir()} == {ROOT_FILE, ROSTER_FILE}
    for device in federation.devices:
        for secret in (device.signing_key.private, device.hpke_private, device.rounding_secret):
            assert secret not in kept
            assert secret.hex().encode() not in kept


def another_root(folder: Path) -> None:
    (folder / ROOT_FILE).write_text(make_federation(1).root_key.hex())


def no_key(folder: Path) -> None:
    (folder / ROOT_FILE).write_text("not hexadecimal")


def short_key(folder: Path) -> None:
    (folder / ROOT_FILE).write_text("abcd")


def no_text(folder: Path) -> None:
    (folder / ROOT_FILE).write_bytes(b"\xff\xfe")


def flipped(folder: Path) -> None:
    data = bytearray((folder / ROSTER_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / ROSTER_FILE).write_bytes(data)


def truncated(folder: Path) -> None:
    (folder / ROSTER_FILE).write_bytes((folder / ROSTER_FILE).read_bytes()[:-1])


def empty(folder: Path) -> None:
    (folder / ROSTER_FILE).write_bytes(b"")


@pytest.mark.parametrize("damage", [another_root, no_key, short_key, no_text, flipped, truncated, empty])
def test_a_federation_that_does_not_hold_is_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(UsageError, match=f"the federation in {folder} does not hold"):
        load_roster(folder)


@pytest.mark.parametrize("name", [ROOT_FILE, ROSTER_FILE])
def test_a_folder_without_a_federation_says_which_file_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"holds no federation: cannot read .*{name}: No such file"):
        load_roster(folder)


def test_a_roster_that_cannot_be_written_is_an_error(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / ROOT_FILE).mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        save_roster(tmp_path, federation.root_key, federation.roster)
