"""A federation made on the fly: root, invitations and devices, with the code that real devices use."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir

from flwr.app import Context

from propolis.client.he_folder import HE_KEY_FILE
from propolis.client.state import STATE_FILE, DeviceStore, FileStore, MemoryStore, SharedVersion
from propolis.client.update import SecureMod
from propolis.secure import labels
from propolis.secure.errors import RefusedError, StorageError, UsageError
from propolis.secure.he.held import KeyBundle, scheme_of
from propolis.secure.he.keys import PublicKey, delegate_holder, make_key, read_material, seal_key, state_key
from propolis.secure.he.parameters import Parameters, choose
from propolis.secure.identity import (
    Root,
    Roster,
    Signed,
    SigningKey,
    TrustedRoster,
    descriptor_digest,
    trusted_roster,
)
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.policy import Policy
from propolis.server.roster import load_roster, save_roster
from propolis.settings import Settings
from propolis.storage import write_atomically

# A simulation shows every model as often as it likes.
SIMULATED = Policy(max_reveals_per_model=None, max_trainings_per_model=None)
_VALID_S = 365 * 24 * 3600
_HOLDER_SERIAL = 1
_ROOT_FILE = "root.key"


@dataclass(frozen=True, slots=True, repr=False)
class EncryptionKeys:
    """A key of homomorphic encryption, as its holder gives it away.

    Attributes:
        public: for the server.
        bundles: for each device by index, with the secret part sealed to it.
    """

    public: PublicKey
    bundles: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Federation:
    """Some devices that trust one root.

    Attributes:
        root: with its private key.
        roster: all the devices, signed.
        devices: the state of each device by index, with its secrets.
        he: the federation's key of homomorphic encryption, where it has one.
    """

    root: Root
    roster: Signed
    devices: tuple[DeviceState, ...]
    he: EncryptionKeys | None = None

    @property
    def root_key(self) -> bytes:
        """The root's public key, 32 bytes."""
        return self.root.public_key

    @property
    def verified_roster(self) -> TrustedRoster:
        """The roster as the server believes it."""
        return trusted_roster(self.root_key, self.roster)


def make_federation(
    devices: int, seed: int | None = None, he: Parameters | None = None, *, masked: bool = False
) -> Federation:
    """Enrol `devices` devices with new keys.

    Args:
        devices: how many.
        seed: of the randomness that devices encode with, so that a simulation can be repeated; keys and masks are
            new every time. None: that too.
        he: what its key of homomorphic encryption is for; None makes none.
        masked: whether devices encrypt under masks only.
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
    keys = make_encryption_keys(root, enrolled, he, masked=masked) if he else None
    return Federation(root, root.sign_roster(roster), tuple(enrolled), keys)


def make_encryption_keys(
    root: Root, devices: Sequence[DeviceState], parameters: Parameters, *, masked: bool = False
) -> EncryptionKeys:
    """What a key holder does that the root delegates: make a key, and seal it to every device.

    Raises:
        UsageError: TenSEAL is not installed.
    """
    holder_key = SigningKey.generate()
    holder = delegate_holder(root, _HOLDER_SERIAL, holder_key.public, time.time(), _VALID_S)
    public, secret = make_key(root.federation, scheme_of(parameters), masked=masked)
    statement = state_key(holder_key, public, number=1)
    bundles = []
    for index, device in enumerate(devices):
        digest = descriptor_digest(device.descriptor)
        sealed = seal_key(public, secret, index, digest, device.own_descriptor.hpke_key)
        bundles.append(KeyBundle(holder, statement, public.material, sealed).to_bytes())
    return EncryptionKeys(public, tuple(bundles))


def parameters_of(settings: Settings, devices: int) -> Parameters | None:
    """What the key of so many simulated devices is for; None where the settings ask for no encryption."""
    if not settings.is_encrypted:
        return None
    return choose(devices, settings.value_bits, seeded=settings.he_mode == "seeded")


class DevicesInMemory:
    """The stores of devices that stay in one process; they can be sent to a worker process.

    Args:
        devices: their states by index.
        he_keys: their keys of homomorphic encryption, where they have one.
    """

    def __init__(self, devices: tuple[DeviceState, ...], he_keys: tuple[bytes, ...] = ()) -> None:
        self._devices, self._he_keys = devices, he_keys
        self._stores: dict[int, MemoryStore] = {}
        self._shared = SharedVersion()

    def __call__(self, context: Context) -> DeviceStore:
        """The store of the device with the context's ``partition-id``."""
        index = _index_of(context)
        if index not in self._stores:
            he_key = self._he_keys[index] if self._he_keys else None
            self._stores[index] = MemoryStore(self._devices[index], SIMULATED, self._shared, he_key)
        return self._stores[index]

    def __reduce__(self) -> tuple[type, tuple[tuple[DeviceState, ...], tuple[bytes, ...]]]:
        return DevicesInMemory, (self._devices, self._he_keys)


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
        if federation.he is not None:
            FileStore(device_folder(folder, index), SIMULATED).keep_he_key(federation.he.bundles[index])


def keep_federation(federation: Federation, folder: Path) -> None:
    """Write a federation with its root's key, in place of another one, whole or not at all.

    Its devices are given the roster, as if they had been in a round: they can open what their keys open.

    Raises:
        StorageError: a file could not be written.
    """
    new = folder.with_name(f".{folder.name}")
    for old in (new, folder):
        shutil.rmtree(old, ignore_errors=True)
    try:
        new.mkdir(mode=0o700)
        devices = tuple(replace(state, roster=federation.roster) for state in federation.devices)
        write_federation(replace(federation, devices=devices), new)
        write_atomically(new / _ROOT_FILE, federation.root.key.private, mode=0o600)
        new.rename(folder)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}") from None


def recalled_federation(folder: Path, devices: int) -> Federation:
    """The federation that `keep_federation` wrote, with a key of homomorphic encryption.

    Raises:
        UsageError: the folder does not hold it.
    """
    try:
        root = Root(SigningKey((folder / _ROOT_FILE).read_bytes()))
        folders = [device_folder(folder, index) for index in range(devices)]
        states = tuple(DeviceState.from_bytes((each / STATE_FILE).read_bytes()) for each in folders)
        bundles = tuple((each / HE_KEY_FILE).read_bytes() for each in folders)
        public = read_material(root.federation, KeyBundle.from_bytes(bundles[0]).material)
    except (OSError, ValueError, RefusedError) as error:
        raise UsageError(f"{folder} does not hold the devices of the run: {error}") from None
    return Federation(root, load_roster(folder / "server").signed, states, EncryptionKeys(public, bundles))


def device_folder(folder: Path, index: int) -> Path:
    """Where `write_federation` puts a device."""
    return folder / f"device-{index}"


@contextmanager
def federation_of_run(
    run_id: int, devices: int, seed: int | None = None, he: Parameters | None = None, *, masked: bool = False
) -> Iterator[Federation]:
    """A federation for a run of Flower's simulation engine, whose devices find it by the run's id.

    It lies in the temporary folder while the run lasts, and nobody else can read it.
    """
    folder = run_folder(run_id)
    _make_private(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        federation = make_federation(devices, seed, he, masked=masked)
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
