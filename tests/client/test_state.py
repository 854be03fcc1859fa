"""Where a device keeps its state: nothing of a failed step stays, and no reply leaves before the state is down."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from flwr.app import Context, Message, RecordDict
from secure_app import Hive, metrics_of, outcome_of, require_mean

from propolis.client.he_folder import HE_FORMER_FILE, HE_KEY_FILE
from propolis.client.seal import Seal
from propolis.client.state import LOCK_FILE, STATE_FILE, DeviceStore, FileStore, MemoryStore
from propolis.client.update import SecureMod
from propolis.flower import set_identity
from propolis.messages import RECORD, protocol_record, refusal_of
from propolis.secure.errors import Refusal, StorageError, UsageError
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.messages import HelloRequest, to_bytes
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.states import Exchange
from propolis.simulations.federation import Federation, make_federation


@pytest.fixture(scope="module")
def federation() -> Federation:
    return make_federation(3)


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, federation: Federation, tmp_path: Path) -> DeviceStore:
    if request.param == "memory":
        return MemoryStore(federation.devices[0].copy(), Policy())
    return on_disk(federation, tmp_path / "device")


def on_disk(federation: Federation, folder: Path) -> FileStore:
    FileStore.create(folder, federation.devices[0])
    return FileStore(folder, Policy())


def count(device: Device) -> int:
    """A step that takes a moment: what is lost of two at once would be seen."""
    seen = device.state.prekey_number
    time.sleep(0.002)
    device.state.prekey_number = seen + 1
    return seen


def number(store: DeviceStore) -> int:
    return store.change(lambda device: device.state.prekey_number)


def test_a_step_that_is_taken_is_kept(store: DeviceStore) -> None:
    assert [store.change(count), store.change(count), number(store)] == [0, 1, 2]


def test_nothing_of_a_step_that_raises_is_kept(store: DeviceStore) -> None:
    def half(device: Device) -> None:
        count(device)
        device.state.runs[b"r" * 16] = (1, 0)
        device.state.reveals[b"m" * 32] = 1
        device.state.answers.clear()
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        store.change(half)
    assert number(store) == 0
    assert store.change(lambda device: (device.state.runs, device.state.reveals)) == ({}, {})


def test_many_threads_take_their_steps_one_by_one(store: DeviceStore) -> None:
    threads = [threading.Thread(target=lambda: [store.change(count) for _ in range(5)]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert number(store) == 30


STEPS = """
import sys, time
from pathlib import Path
from propolis.client.state import FileStore
from propolis.secure.secagg.policy import Policy
def count(device):
    seen = device.state.prekey_number
    time.sleep(0.002)
    device.state.prekey_number = seen + 1
store = FileStore(Path(sys.argv[1]), Policy())
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    store.change(count)
"""


def process(code: str, folder: Path) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout
    assert started.stdout.readline() == "ready\n"
    return started


def test_two_processes_take_their_steps_one_by_one(federation: Federation, tmp_path: Path) -> None:
    store = on_disk(federation, tmp_path / "device")
    both = [process(STEPS, tmp_path / "device") for _ in range(2)]
    for each in both:
        each.communicate("go\n", timeout=60)
    assert [each.returncode for each in both] == [0, 0]
    assert number(store) == 40


CRASH = """
import os, signal, sys
from pathlib import Path
from propolis.client import seal, state
from propolis.secure.secagg.policy import Policy
write = seal.write_atomically
def write_and_die(*arguments, **named):
    if sys.argv[1].endswith("after"):
        write(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)
seal.write_atomically = write_and_die
print("ready", flush=True)
sys.stdin.readline()
def count(device):
    device.state.prekey_number += 1
state.FileStore(Path(sys.argv[1]), Policy()).change(count)
print("reply", flush=True)
"""


@pytest.mark.parametrize(("when", "kept"), [("before", 0), ("after", 1)])
def test_a_crash_around_the_write_leaves_a_whole_state_and_no_reply(
    federation: Federation, tmp_path: Path, when: str, kept: int
) -> None:
    store = on_disk(federation, tmp_path / when)
    crashed = process(CRASH, tmp_path / when)
    said, _ = crashed.communicate("go\n", timeout=60)
    assert crashed.returncode == -signal.SIGKILL
    assert "reply" not in said
    assert number(store) == kept  # and its lock is gone with it


def test_the_state_is_on_the_disk_before_the_reply_is_made(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full costs the reply: the device would forget what it said."""
    store = on_disk(federation, tmp_path / "device")

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("cannot write: no space left on device")

    hello = hello_of(federation)
    assert not answer_of(store, hello).has_error()
    before = (tmp_path / "device" / STATE_FILE).read_bytes()
    monkeypatch.setattr("propolis.client.seal.write_atomically", full)
    reply = answer_of(store, hello)
    assert refusal_of(reply.error.code) is Refusal.STORAGE
    assert reply.error.reason == "storage"
    assert (tmp_path / "device" / STATE_FILE).read_bytes() == before


def answer_of(store: DeviceStore, content: RecordDict) -> Message:
    set_identity(1)
    message = Message(content, dst_node_id=1, message_type="train")
    return SecureMod(lambda context: store)(message, Context(1, 1, {}, RecordDict(), {}), lambda m, c: m)


def test_only_the_owner_may_read_the_state(federation: Federation, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = on_disk(federation, tmp_path / "deep" / "device")
        for _ in range(2):
            store.change(count)
    finally:
        os.umask(before)
    folder = tmp_path / "deep" / "device"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        STATE_FILE: 0o600,
        LOCK_FILE: 0o600,
    }


def test_a_device_is_not_enrolled_over_another_one(federation: Federation, tmp_path: Path) -> None:
    store = on_disk(federation, tmp_path)
    store.change(count)
    with pytest.raises(UsageError, match="holds a device's state already"):
        FileStore.create(tmp_path, federation.devices[1])
    assert number(store) == 1


def test_a_step_that_changes_nothing_writes_nothing(federation: Federation, tmp_path: Path) -> None:
    store = on_disk(federation, tmp_path)
    before = (tmp_path / STATE_FILE).stat()
    number(store)
    assert (tmp_path / STATE_FILE).stat().st_ino == before.st_ino


def test_what_a_crash_left_of_an_older_state_is_removed(tmp_path: Path) -> None:
    """It holds secrets that a closed round must not leave behind."""
    FileStore.create(tmp_path / "device", make_federation(1).devices[0])
    stale = tmp_path / "device" / ".device.state.a1b2c3d4"
    stale.write_bytes(b"old secrets")
    FileStore(tmp_path / "device", Policy()).change(lambda device: None)
    assert not stale.exists()


def test_a_lock_that_is_held_too_long_is_an_error_and_not_a_wait(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_disk(federation, tmp_path)
    monkeypatch.setattr("propolis.storage.LOCK_DEADLINE_S", 0.05)
    with (tmp_path / LOCK_FILE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match=r"locked for 0\.05 s"):
            store.change(count)
        assert refusal_of(answer_of(store, hello_of(federation)).error.code) is Refusal.STORAGE
    assert store.change(count) == 0


def hello_of(federation: Federation) -> RecordDict:
    return RecordDict({RECORD: protocol_record(Exchange.HELLO, to_bytes(HelloRequest(federation.roster, b"c" * 32)))})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * 500)


def other_format(path: Path) -> None:
    path.write_bytes(b"\x08\x63" + path.read_bytes()[2:])


@pytest.mark.parametrize("damage", [truncate, empty, scribble, other_format, Path.unlink])
def test_a_damaged_or_missing_state_is_an_error_and_a_code(
    federation: Federation, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    store = on_disk(federation, tmp_path)
    damage(tmp_path / STATE_FILE)
    with pytest.raises(StorageError, match="the device's state"):
        store.change(count)
    reply = answer_of(store, hello_of(federation))
    assert refusal_of(reply.error.code) is Refusal.STORAGE
    assert str(tmp_path) not in reply.error.reason


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot lock"):
        FileStore(tmp_path / "gone", Policy()).change(count)


def test_devices_on_disk_take_part_in_rounds(federation: Federation, tmp_path: Path) -> None:
    hive = Hive(3, federation=federation)
    for index, state in enumerate(federation.devices):
        FileStore.create(tmp_path / str(index), state)
        hive.stores[index] = FileStore(tmp_path / str(index), Policy())
    require_mean(hive.round(), range(3))
    assert metrics_of(hive.round("evaluate"))["accuracy"] == pytest.approx((0 + 2 * 1 / 8 + 3 * 2 / 8) / 6)
    require_mean(hive.round(), range(3))
    states = [DeviceState.from_bytes((tmp_path / str(index) / STATE_FILE).read_bytes()) for index in range(3)]
    assert all(list(state.reveals.values()) == [1, 2] for state in states)


def test_a_device_that_loses_its_state_in_a_round_is_a_drop_out(tmp_path: Path) -> None:
    hive = Hive(5)
    FileStore.create(tmp_path, hive.federation.devices[1])
    hive.stores[1] = FileStore(tmp_path, Policy())

    def lose(exchange: str, node_id: int) -> bool:
        if (exchange, node_id) == ("upload", 2):
            (tmp_path / STATE_FILE).unlink()
        return False

    hive.wire.lose = lose
    reply = hive.round()
    assert outcome_of(reply).failures == ("upload: storage",)
    require_mean(reply, [0, 2, 3, 4])


# Encrypted.


@pytest.fixture(scope="module")
def sealed_folder(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    FileStore.create(folder, federation.devices[0], Seal(b"open sesame"))
    return folder


def test_a_sealed_state_is_kept_from_step_to_step_and_shows_nothing(
    federation: Federation, sealed_folder: Path
) -> None:
    for seal in (Seal(b"open sesame"), Seal(b"open sesame")):
        store = FileStore(sealed_folder, Policy(), seal)
        before = number(store)
        assert [store.change(count), store.change(count)] == [before, before + 1]
    kept = (sealed_folder / STATE_FILE).read_bytes()
    for secret in (federation.devices[0].signing_key.private, federation.devices[0].descriptor.payload):
        assert secret not in kept


def test_sealing_the_same_twice_gives_other_bytes() -> None:
    seal = Seal(b"open sesame")
    assert seal.close(b"state") != seal.close(b"state")


def test_the_key_is_derived_once(monkeypatch: pytest.MonkeyPatch, sealed_folder: Path) -> None:
    derived = []
    monkeypatch.setattr("propolis.client.seal.Scrypt", lambda **named: derived.append(named) or Scrypt(**named))
    store = FileStore(sealed_folder, Policy(), Seal(b"open sesame"))
    for _ in range(3):
        store.change(count)
    assert len(derived) == 1


@pytest.mark.parametrize(
    ("seal", "line"),
    [
        (Seal(b"open barley"), "cannot be opened: wrong passphrase, or damaged"),
        (None, "is encrypted: give its passphr"),
    ],
)
def test_without_its_passphrase_a_state_cannot_be_opened(sealed_folder: Path, seal: Seal | None, line: str) -> None:
    with pytest.raises(StorageError, match=line):
        FileStore(sealed_folder, Policy(), seal).change(count)


def test_a_passphrase_does_not_open_what_is_not_sealed(federation: Federation, tmp_path: Path) -> None:
    """Else who writes to the disk could put other keys in place of the sealed ones."""
    on_disk(federation, tmp_path)
    with pytest.raises(StorageError, match="is not encrypted, but there is a passphrase"):
        FileStore(tmp_path, Policy(), Seal(b"open sesame")).change(count)


@pytest.mark.parametrize("place", [0, 15, 16, 20, 31, 32, 43, 44, 60, -1])
def test_a_flipped_bit_of_a_sealed_state_is_told(place: int) -> None:
    sealed = bytearray(Seal(b"open sesame").close(bytes(range(64))))
    sealed[place] ^= 1
    with pytest.raises(StorageError, match=r"cannot be opened|is not encrypted"):
        Seal(b"open sesame").open(bytes(sealed))


@pytest.mark.parametrize("length", [16, 20, 40, 50])
def test_a_cut_sealed_state_is_told(length: int) -> None:
    seal = Seal(b"open sesame")
    with pytest.raises(StorageError, match="cannot be opened"):
        seal.open(seal.close(bytes(64))[:length])


def test_a_key_of_homomorphic_encryption_is_under_the_devices_passphrase(tmp_path: Path) -> None:
    folder = tmp_path / "device"
    seal = Seal(b"passphrase")
    FileStore.create(folder, make_federation(1).devices[0], seal)
    store = FileStore(folder, Policy(), seal)
    assert store.he_keys() == ()
    store.keep_he_key(b"a key of many bytes")
    assert store.he_keys() == (b"a key of many bytes",)
    store.keep_he_key(b"another key of as many")
    assert store.he_keys() == (b"another key of as many", b"a key of many bytes")
    for file in (HE_KEY_FILE, HE_FORMER_FILE):
        assert b"key of" not in (folder / file).read_bytes()
    with pytest.raises(StorageError):
        FileStore(folder, Policy()).he_keys()
    store.forget_he_keys_before(b"a key that it has not")
    assert len(store.he_keys()) == 2
    store.forget_he_keys_before(b"another key of as many")
    assert store.he_keys() == (b"another key of as many",)
