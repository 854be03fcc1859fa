"""Where a device keeps its state between messages: one change at a time, written down before its reply leaves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, TypeVar, get_args, get_type_hints

import numpy as np

from propolis.client.he_folder import forget_former_keys, has_he_key, read_he_keys, write_he_keys
from propolis.client.seal import Seal, read_sealed, write_sealed
from propolis.secure.codec.series import Version
from propolis.secure.errors import StorageError, UsageError
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.policy import Policy
from propolis.storage import locked, remove_stale, write_atomically

T = TypeVar("T")

STATE_FILE, LOCK_FILE, MODEL_FILE = "device.state", "device.lock", "model.version"
_log = logging.getLogger("propolis.client")

# Keys of a Flower node's configuration, which is set on the device and which the server cannot change.
FOLDER_KEY = "propolis-dir"
_POLICY_KEYS: dict[str, str] = {
    "propolis-min-cohort": "min_cohort",
    "propolis-min-threshold": "min_threshold",
    "propolis-min-corrupted": "min_corrupted",
    "propolis-min-dropped": "min_dropped",
    "propolis-max-weight": "max_weight",
    "propolis-weight-key": "weight_key",
    "propolis-max-norm": "max_norm",
    "propolis-max-reveals": "max_reveals_per_model",
    "propolis-min-bits": "min_bits",
    "propolis-min-density": "min_density",
    "propolis-max-step": "max_step",
    "propolis-require-malicious": "require_malicious",
    "propolis-require-encryption": "require_encryption",
    "propolis-require-masks": "require_masks",
    "propolis-max-refused-sums": "max_refused_sums",
    "propolis-max-trainings": "max_trainings_per_model",
    "propolis-allow-unprotected": "allow_unprotected",
}


class DeviceStore(Protocol):
    """A device's state and its owner's policy."""

    @property
    def policy(self) -> Policy:
        """What the device's owner says; what depends on its keys is settled in each step, see `Policy.on_device`."""

    def change(self, step: Callable[[Device], T]) -> T:
        """Let the device take one step; its new state is kept before this returns, and only if nothing was raised.

        Raises:
            StorageError: the state could not be read or kept.
        """

    def recall_model(self) -> Version | None:
        """The last version of the global model that the device was given, which is no secret; None without one."""

    def keep_model(self, version: Version) -> None:
        """Keep a version in place of the last one, if it can be kept."""

    def he_keys(self) -> tuple[bytes, ...]:
        """The device's keys of homomorphic encryption, each a `propolis.secure.he.held.KeyBundle`.

        The first is the newest, and what the device encrypts under; models under the others may still come.
        """

    def forget_he_keys_before(self, bundle: bytes) -> None:
        """Keep no key that is older than this one; where the device has not this one, all stay."""


class SharedVersion:
    """The newest version of a model, once for many devices."""

    def __init__(self) -> None:
        self._last: Version | None = None

    def one_of(self, version: Version) -> Version:
        """The version, as the same object for all that ask with an equal one in a row."""
        last = self._last
        is_same = last is not None and (last.series, last.number) == (version.series, version.number)
        if last is None or not (is_same and np.array_equal(last.values, version.values)):
            self._last = last = version
        return last


class MemoryStore:
    """State in this process, for simulated devices.

    Args:
        state: the device's.
        policy: what the device insists on.
        shared: of the devices of this process; those that have the same version of the model share its memory.
        he_key: of homomorphic encryption, see `DeviceStore.he_keys`.
    """

    def __init__(
        self, state: DeviceState, policy: Policy, shared: SharedVersion | None = None, he_key: bytes | None = None
    ) -> None:
        self._state = state
        self._he_keys: tuple[bytes, ...] = () if he_key is None else (he_key,)
        self._lock = threading.Lock()
        self._model: Version | None = None
        self._shared = shared or SharedVersion()
        self.policy = policy

    def change(self, step: Callable[[Device], T]) -> T:
        """See `DeviceStore.change`."""
        with self._lock:
            policy = self.policy.on_device(has_he_key=bool(self._he_keys))
            device = Device(self._state.copy(), policy, time.time())
            result = step(device)
            self._state = device.state
            return result

    def recall_model(self) -> Version | None:
        """See `DeviceStore.recall_model`."""
        return self._model

    def keep_model(self, version: Version) -> None:
        """See `DeviceStore.keep_model`."""
        self._model = self._shared.one_of(version)

    def he_keys(self) -> tuple[bytes, ...]:
        """See `DeviceStore.he_keys`."""
        return self._he_keys

    def keep_he_key(self, data: bytes) -> None:
        """Keep a newer key before those that there are."""
        self._he_keys = (data, *self._he_keys)

    def forget_he_keys_before(self, bundle: bytes) -> None:
        """See `DeviceStore.forget_he_keys_before`."""
        if bundle in self._he_keys:
            self._he_keys = self._he_keys[: self._he_keys.index(bundle) + 1]


class FileStore:
    """State in a file that only its owner may read, locked while a step is taken.

    Args:
        folder: holds the file, which `FileStore.create` made.
        policy: what the device insists on.
        seal: encrypts the file; None leaves it readable to who reads the disk.
    """

    def __init__(self, folder: Path, policy: Policy, seal: Seal | None = None) -> None:
        self._folder = folder
        self._seal = seal
        self.policy = policy

    @staticmethod
    def create(folder: Path, state: DeviceState, seal: Seal | None = None) -> None:
        """Write a new device's state; raises UsageError where there is one already."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        with locked(folder / LOCK_FILE):
            if (folder / STATE_FILE).exists():
                raise UsageError(f"{folder} holds a device's state already")
            write_sealed(folder / STATE_FILE, state.to_bytes(), seal)

    def change(self, step: Callable[[Device], T]) -> T:
        """See `DeviceStore.change`."""
        path = self._folder / STATE_FILE
        with locked(self._folder / LOCK_FILE):
            for file in (STATE_FILE, MODEL_FILE):
                remove_stale(self._folder / file)
            before = read_sealed(path, self._seal)
            policy = self.policy.on_device(has_he_key=has_he_key(self._folder))
            device = Device(DeviceState.from_bytes(before), policy, time.time())
            result = step(device)
            after = device.state.to_bytes()
            if after != before:
                write_sealed(path, after, self._seal)
            return result

    def recall_model(self) -> Version | None:
        """See `DeviceStore.recall_model`."""
        try:
            return Version.from_bytes((self._folder / MODEL_FILE).read_bytes())
        except OSError:
            return None

    def keep_model(self, version: Version) -> None:
        """See `DeviceStore.keep_model`."""
        try:
            write_atomically(self._folder / MODEL_FILE, version.to_bytes(), mode=0o600)
        except StorageError as error:  # it costs the whole model the next time, and not this round
            _log.warning("cannot keep the model: %s", error)

    def he_keys(self) -> tuple[bytes, ...]:
        """See `DeviceStore.he_keys`; raises StorageError."""
        with locked(self._folder / LOCK_FILE):
            return read_he_keys(self._folder, self._seal)

    def keep_he_key(self, data: bytes) -> None:
        """Keep a newer key of homomorphic encryption before those that there are; raises StorageError."""
        with locked(self._folder / LOCK_FILE):
            write_he_keys(self._folder, self._seal, data, read_he_keys(self._folder, self._seal))

    def forget_he_keys_before(self, bundle: bytes) -> None:
        """See `DeviceStore.forget_he_keys_before`; a file that cannot be removed is left for the next time."""
        with locked(self._folder / LOCK_FILE):
            keys = read_he_keys(self._folder, self._seal)
            if keys[:1] == (bundle,):
                forget_former_keys(self._folder)
            elif bundle in keys:  # a newer one has come meanwhile, and this is what the model is still under
                write_he_keys(self._folder, self._seal, keys[0], keys[1 : keys.index(bundle) + 1])


def policy_of(node_config: Mapping[str, Any]) -> Policy:
    """The policy in a Flower node's configuration, with `Policy`'s own values where it says nothing.

    Raises:
        UsageError: an unknown ``propolis-`` key, or a value of the wrong type or out of range.
    """
    given = {key: value for key, value in node_config.items() if key.startswith("propolis-") and key != FOLDER_KEY}
    if unknown := sorted(given.keys() - _POLICY_KEYS.keys()):
        raise UsageError(f"unknown {unknown[0]} in the node's configuration; known: {', '.join(sorted(_POLICY_KEYS))}")
    hints = get_type_hints(Policy)
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = _POLICY_KEYS[key]
        kinds = set(get_args(hints[name]) or (hints[name],)) - {NoneType}
        if type(value) not in (kinds | {int} if float in kinds else kinds):
            raise UsageError(f"{key} in the node's configuration has the wrong type, got {value!r}")
        values[name] = value
    return Policy(**values)
