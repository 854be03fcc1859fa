"""What a device opens packages with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from propolis.client.seal import Seal
from propolis.client.state import FileStore
from propolis.secure.errors import UsageError
from propolis.secure.identity import descriptor_digest, trusted_roster
from propolis.secure.manifest import Trust
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.policy import Policy


@dataclass(frozen=True, slots=True, repr=False)
class Keyholder:
    """A device, as far as packages are concerned.

    Attributes:
        trust: its root, and the newest roster that it has seen.
        index: its place in the roster.
        descriptor: digest of its descriptor, 32 bytes.
        hpke_private: what content keys are sealed to.
    """

    trust: Trust
    index: int
    descriptor: bytes
    hpke_private: bytes

    @classmethod
    def of(cls, state: DeviceState) -> Self:
        """The device of this state.

        Raises:
            UsageError: it has no roster, which comes with its enrolment.
        """
        if state.roster is None:
            raise UsageError("the device has no roster yet: enrol it first")
        trust = Trust(state.root_key, trusted_roster(state.root_key, state.roster))
        return cls(trust, state.index, descriptor_digest(state.descriptor), state.hpke_private)

    @classmethod
    def load(cls, folder: Path, passphrase: bytes | None = None) -> Self:
        """The device in a folder; raises StorageError when its state cannot be read."""
        seal = None if passphrase is None else Seal(passphrase)
        return cls.of(FileStore(folder, Policy(), seal).change(lambda device: device.state))
