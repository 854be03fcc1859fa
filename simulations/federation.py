"""A federation made on the fly: root, invitations and devices, with the code that real devices use."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from flwr.app import Context

from propolis.client.state import DeviceStore, FileStore, MemoryStore, SharedVersion
from propolis.client.update import SecureMod
from propolis.secure import labels
from propolis.secure.errors import UsageError
from propolis.secure.identity import Root, Roster, Signed, SigningKey, TrustedRoster, trusted_roster
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.policy import Policy
from propolis.server.roster import save_roster

# A simulation shows every model as often as it likes.
SIMULATED = Policy(max_reveals_per_model=None)
_VALID_S = 365 * 24 * 3600


@dataclass(frozen=True, slots=True, repr=False)
class Federation:
    """Some devices that trust one root.

    Attributes:
        root: with its private key.
        roster: all the devices, signed.
        devices: the state of each device by index, with its secrets.
    """

    root: Root
    roster: Signed
    devices: tuple[DeviceState, ...]

    @property
    def root_key(self) -> bytes:
        """The root's public key, 32 bytes."""
        return self.root.public_key

    @property
    def verified_roster(self) -> TrustedRoster:
        """The roster as the server believes it."""
        return trusted_roster(self.root_key, self.roster)


def make_federation(devices: int, seed: int | None = None) -> Federation:
    """Enrol `devices` devices with new keys.

    Args:
        devices: how many.
        seed: of the randomness that devices encode with, so that a simulation can be repeated; keys and masks are
            new every time. None: that too.
    """
    root = Root(SigningKey.generate())
    roster = Roster(root.federation, 1, int(time.time()) + _VALID_S, ())
    enrolled = []
    for index in range(devices):
        roster, invitation, key = root.invite(roster, f"device-{index}")
        state = DeviceState.enrolled(root.public_key, invitation, key)
        if seed is not None:
            state.rounding_secret = labels.digest(labels.ROUNDING, seed.to_bytes(8, "big"), index.to_bytes(8, "big"))
        enrolled.append(state)
    return Federation(root, root.sign_roster(roster), tuple(enrolled))


class DevicesInMemory:
    """The stores of devices that stay in one process; they can be sent to a worker process.

    Args:
        devices: their states by index.
    """

    def __init__(self, devices: tuple[DeviceState, ...]) -> None:
        self._devices = devices
        self._stores: dict[int, MemoryStore] = {}
        self._shared = SharedVersion()

    def __call__(self, context: Context) -> DeviceStore:
        """The store of the device with the context's ``partition-id``."""
        index = _index_of(context)
        if index not in self._stores:
            self._stores[index] = MemoryStore(self._devices[index], SIMULATED, self._shared)
        return self._stores[index]

    def __reduce__(self) -> tuple[type, tuple[tuple[DeviceState, ...]]]:
        return DevicesInMemory, (self._devices,)


@dataclass(frozen=True, slots=True)
class DevicesInFolder:
    """The stores of devices that an engine moves from process to process, in a folder that `write_federation` made."""

    folder: Path

    def __call__(self, context: Context) -> DeviceStore:
        """The store of the device with the context's ``partition-id``."""
        return FileStore(device_folder(self.folder, _index_of(context)), SIMULATED)


def write_federation(federation: Federation, folder: Path) -> None:
    """Write ``server/``, for `propolis.server.roster.load_roster`, and ``device-N/``, each a device's ``propolis-dir``.

    Raises:
        UsageError: there is a device already.
        StorageError: a file could not be written.
    """
    save_roster(folder / "server", federation.root_key, federation.roster)
    for index, state in enumerate(federation.devices):
        FileStore.create(device_folder(folder, index), state)


def device_folder(folder: Path, index: int) -> Path:
    """Where `write_federation` puts a device."""
    return folder / f"device-{index}"


@contextmanager
def federation_of_run(run_id: int, devices: int, seed: int | None = None) -> Iterator[Federation]:
    """A federation for a run of Flower's simulation engine, whose devices find it by the run's id.

    It lies in the temporary folder while the run lasts, and nobody else can read it.
    """
    folder = run_folder(run_id)
    _make_private(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        federation = make_federation(devices, seed)
        write_federation(federation, folder)
        yield federation
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_folder(run_id: int) -> Path:
    """Where the federation of a simulated run lies."""
    return Path(gettempdir()) / f"propolis-{os.getuid()}" / f"run-{run_id}"


def _store_of_run(context: Context) -> DeviceStore:
    return DevicesInFolder(run_folder(context.run_id))(context)


# `secure_mod` for devices that Flower's simulation engine makes up; their keys are those of `federation_of_run`.
simulated_mod = SecureMod(_store_of_run)


def _make_private(folder: Path) -> None:
    """Make a folder, or see that the one that is there is ours alone: its name is no secret."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(f"{folder} is not a folder of ours alone; remove it")


def _index_of(context: Context) -> int:
    return int(context.node_config["partition-id"])
