"""Federations made on the fly: where their devices' secrets lie, and for how long."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from propolis.client.state import STATE_FILE, FileStore, MemoryStore
from propolis.secure.errors import UsageError
from propolis.secure.secagg.device_state import DeviceState
from propolis.server.roster import load_roster
from propolis.simulations.federation import (
    SIMULATED,
    DevicesInFolder,
    DevicesInMemory,
    device_folder,
    federation_of_run,
    make_federation,
    run_folder,
    write_federation,
)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place for temporary files, for this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def context(index: int) -> Context:
    return Context(1, index + 1, {"partition-id": index, "num-partitions": 3}, RecordDict(), {})


def test_devices_of_one_seed_round_alike_and_share_no_key() -> None:
    first, again, other = make_federation(3, seed=7), make_federation(3, seed=7), make_federation(3, seed=8)
    assert [d.rounding_secret for d in first.devices] == [d.rounding_secret for d in again.devices]
    assert len({d.rounding_secret for f in (first, other, make_federation(3)) for d in f.devices}) == 9
    assert len({d.signing_key.private for f in (first, again) for d in f.devices}) == 6
    assert first.root_key != again.root_key


def test_a_federation_on_disk_is_the_one_that_was_made(tmp_path: Path) -> None:
    federation = make_federation(3)
    write_federation(federation, tmp_path)
    assert load_roster(tmp_path / "server").signed == federation.roster
    assert {path.name for path in tmp_path.iterdir()} == {"server", "device-0", "device-1", "device-2"}
    for index, device in enumerate(federation.devices):
        store = DevicesInFolder(tmp_path)(context(index))
        assert store.change(lambda d: d.state.to_bytes()) == device.to_bytes()
        assert store.policy == SIMULATED


def test_devices_secrets_are_their_owners_alone(tmp_path: Path) -> None:
    write_federation(make_federation(2), tmp_path)
    for index in range(2):
        assert device_folder(tmp_path, index).stat().st_mode & 0o777 == 0o700
        assert (device_folder(tmp_path, index) / STATE_FILE).stat().st_mode & 0o777 == 0o600


def test_a_federation_is_not_written_over_another(tmp_path: Path) -> None:
    write_federation(make_federation(2), tmp_path)
    before = (device_folder(tmp_path, 0) / STATE_FILE).read_bytes()
    with pytest.raises(UsageError, match="holds a device's state already"):
        write_federation(make_federation(2), tmp_path)
    assert (device_folder(tmp_path, 0) / STATE_FILE).read_bytes() == before


def test_a_runs_federation_is_private_while_it_lasts_and_gone_at_its_end(temporary: Path) -> None:
    with federation_of_run(17, 3, seed=0) as federation:
        folder = run_folder(17)
        assert folder.is_relative_to(temporary)
        assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
        store = DevicesInFolder(folder)(context(2))
        assert isinstance(store, FileStore)
        assert store.change(lambda device: device.state.index) == 2
        assert len(federation.devices) == 3
    assert not folder.exists()


def test_a_runs_federation_is_gone_also_when_the_run_fails(temporary: Path) -> None:
    with pytest.raises(RuntimeError), federation_of_run(17, 2, seed=0):  # noqa: PT012
        assert run_folder(17).exists()
        raise RuntimeError
    assert not run_folder(17).exists()


def test_what_a_crashed_run_left_is_replaced(temporary: Path) -> None:
    write_federation(make_federation(2), run_folder(17))
    run_folder(17).parent.chmod(0o700)
    left = (device_folder(run_folder(17), 0) / STATE_FILE).read_bytes()
    with federation_of_run(17, 2, seed=0):
        assert (device_folder(run_folder(17), 0) / STATE_FILE).read_bytes() != left


def test_two_runs_at_once_have_federations_of_their_own(temporary: Path) -> None:
    with federation_of_run(1, 2, seed=0) as one, federation_of_run(2, 2, seed=0) as two:
        assert one.root_key != two.root_key
        for run_id, federation in ((1, one), (2, two)):
            state = DeviceState.from_bytes((device_folder(run_folder(run_id), 0) / STATE_FILE).read_bytes())
            assert state.root_key == federation.root_key


def open_to_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)


def link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def file(folder: Path) -> None:
    folder.touch(mode=0o600)


def dangling_link(folder: Path) -> None:
    folder.symlink_to(folder.parent / "nowhere")


@pytest.mark.parametrize("prepare", [open_to_others, link, file, dangling_link])
def test_a_place_that_others_may_have_prepared_is_refused(temporary: Path, prepare: Callable[[Path], None]) -> None:
    prepare(run_folder(17).parent)
    with pytest.raises(UsageError, match="is not a folder of ours alone"), federation_of_run(17, 2, seed=0):
        pytest.fail("secrets were written")


def test_a_folder_of_another_user_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(17).parent.mkdir(mode=0o700)
    theirs = run_folder(17).parent
    monkeypatch.setattr("propolis.simulations.federation.os.getuid", lambda: 12345)
    theirs.rename(run_folder(17).parent)
    with pytest.raises(UsageError, match="is not a folder of ours alone"), federation_of_run(17, 2, seed=0):
        pytest.fail("secrets were written")


def test_devices_in_memory_reach_another_process_with_their_state_and_meet_one_store_there() -> None:
    devices = DevicesInMemory(make_federation(3).devices)
    devices(context(1)).change(lambda device: device.state.reveals.update({b"m": 1}))
    arrived = pickle.loads(pickle.dumps(devices))  # noqa: S301
    assert isinstance(arrived(context(1)), MemoryStore)
    assert arrived(context(1)) is arrived(context(1))
    assert arrived(context(1)) is not arrived(context(2))
    for index in range(3):
        sent, got = (each(context(index)).change(lambda d: d.state.signing_key.private) for each in (devices, arrived))
        assert sent == got


def test_devices_in_a_folder_can_be_sent_to_another_process(tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(DevicesInFolder(tmp_path))) == DevicesInFolder(tmp_path)  # noqa: S301
