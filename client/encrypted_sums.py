"""Encrypted sums on a device that has the key: the global model, and what devices said of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from propolis.client.progress import told
from propolis.client.state import DeviceStore
from propolis.secure.errors import PeerError, Refusal, RefusedError, TrustError, UsageError
from propolis.secure.he.held import HeldKey, Owner, held_key
from propolis.secure.he.layout import Opened
from propolis.secure.he.messages import EncryptedPlan, EncryptedSum
from propolis.secure.identity import descriptor_digest
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.plan import Kind


@dataclass(frozen=True, slots=True, repr=False)
class OpenedModel:
    """The global model, as a device that has the key sees it.

    Attributes:
        round: after which it is the global model.
        arrays: by name; with what training left alone, where it comes from a run's file.
        metrics: weighted means of what the devices said when they trained it.
        weight: sum of their weights.
        devices: how many they are.
        saturated: values that were out of their range and were cut off, over all devices.
        frozen: names of the arrays that come from the file in clear, and that nobody vouches for.
    """

    round: int
    arrays: dict[str, NDArray[np.generic]]
    metrics: dict[str, float]
    weight: float
    devices: int
    saturated: int
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, repr=False)
class HeldKeys:
    """A device's keys, whose makers may still make keys.

    Attributes:
        newest: what it encrypts under.
        former: under which the model of a round may be that is the first one under the newest.
        kept: how many keys there are, with those whose makers may not any more.
        bundle: of the newest.
    """

    newest: HeldKey
    former: tuple[HeldKey, ...]
    kept: int
    bundle: bytes

    def open(self, total: EncryptedSum, floor: int) -> tuple[EncryptedPlan, Opened]:
        """`HeldKey.open` with the key that a sum is under.

        Which one that is it says in clear, and it is no secret whether the device has it; so that refusal says so.

        Raises:
            PeerError: see `HeldKey.open`.
            TrustError: the device has no such key.
        """
        return self.key(total.made_by().key_id).open(total, floor, partial(told, what="opening the encrypted model"))

    def key(self, key_id: bytes) -> HeldKey:
        """The key with this id; raises TrustError where the device has no such key."""
        for key in (self.newest, *self.former):
            if key.public.key_id == key_id:
                return key
        raise TrustError(Refusal.HE_KEY, "the model is under a key that this device has not, or that it has erased")


def keys_of(store: DeviceStore) -> HeldKeys:
    """The device's keys, if whoever made the newest may still make keys."""
    bundles = store.he_keys()
    if not bundles:
        raise TrustError(Refusal.HE_KEY, "this device has no key of homomorphic encryption")

    def held(device: Device) -> HeldKeys:
        state, roster = device.state, device.roster()
        owner = Owner(state.index, descriptor_digest(state.descriptor), state.hpke_private)
        newest = held_key(bundles[0], state.root_key, roster, owner, device.now)
        former = list[HeldKey]()
        for bundle in bundles[1:]:
            with suppress(RefusedError):  # its holder was revoked, or its time is over
                former.append(held_key(bundle, state.root_key, roster, owner, device.now))
        return HeldKeys(newest, tuple(former), len(bundles), bundles[0])

    return store.change(held)


def open_sum(store: DeviceStore, data: bytes) -> tuple[EncryptedPlan, Opened]:
    """What the sum of a round says, the metrics of an evaluation for example, to a device that has its key.

    Args:
        store: the device's.
        data: the bytes of an `EncryptedSum`.

    Raises:
        PeerError: it is not what it is said to be; one code, whatever is wrong.
        TrustError: the device has no such key.
    """
    return keys_of(store).open(EncryptedSum.from_bytes(data), store.policy.min_cohort)


def open_model(store: DeviceStore, data: bytes) -> OpenedModel:
    """The global model in a run's file, on a device that has its key.

    Args:
        store: the device's.
        data: the file's content.

    Raises:
        PeerError: it is not what it is said to be; one code, whatever is wrong.
        TrustError: the device has no such key.
    """
    total = EncryptedSum.from_bytes(data)
    plan, opened = open_sum(store, data)
    if plan.kind != Kind.TRAIN:
        raise PeerError(Refusal.MODEL, "these are the metrics of an evaluation, and no model")
    frozen = {}
    if total.frozen:
        try:
            frozen = load(total.frozen)
        except SafetensorError:
            raise PeerError(Refusal.MODEL, "what training left alone is no safetensors file") from None
    metrics, devices = dict(opened.metrics), len(total.devices)
    arrays, names = {**frozen, **opened.arrays}, frozenset(frozen) - opened.arrays.keys()
    return OpenedModel(plan.round, arrays, metrics, opened.weight, devices, opened.saturated, names)


def open_model_file(store: DeviceStore, path: Path) -> OpenedModel:
    """`open_model` of a file; raises UsageError where it cannot be read."""
    try:
        return open_model(store, path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
