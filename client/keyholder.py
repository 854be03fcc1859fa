"""What a device opens packages with."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from propolis.client.hybrid import HYBRID_FILE, load_hybrid_key
from propolis.client.seal import Seal
from propolis.client.state import FileStore
from propolis.secure.errors import UsageError
from propolis.secure.identity import descriptor_digest, trusted_roster
from propolis.secure.kem import Kem
from propolis.secure.manifest import Trust
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.policy import Policy

_log = logging.getLogger("propolis.client")


@dataclass(frozen=True, slots=True, repr=False)
class Keyholder:
    """A device, as far as packages are concerned.

    Attributes:
        trust: its root, and the newest roster that it has seen.
        index: its place in the roster.
        descriptor: digest of its descriptor, 32 bytes.
        hpke_private: what content keys are sealed to, X25519.
        hybrid_private: what those are that should outlast X25519; None where the device has no such key.
    """

    trust: Trust
    index: int
    descriptor: bytes
    hpke_private: bytes
    hybrid_private: bytes | None = None

    @classmethod
    def of(cls, state: DeviceState) -> Self:
        """The device of this state, without a hybrid key, which is not in there.

        Raises:
            UsageError: it has no roster, which comes with its enrolment.
        """
        if state.roster is None:
            raise UsageError("the device has no roster yet: enrol it first")
        trust = Trust(state.root_key, trusted_roster(state.root_key, state.roster))
        return cls(trust, state.index, descriptor_digest(state.descriptor), state.hpke_private)

    @classmethod
    def load(cls, folder: Path, passphrase: bytes | None = None) -> Self:
        """The device in a folder; raises UsageError or StorageError when its state or a key cannot be read."""
        return cls.under(folder, None if passphrase is None else Seal(passphrase))

    @classmethod
    def under(cls, folder: Path, seal: Seal | None) -> Self:
        """`load` with what the device's files are under, for who does it often."""
        device = cls.of(FileStore(folder, Policy(), seal).change(lambda device: device.state))
        try:
            return replace(device, hybrid_private=load_hybrid_key(folder, seal))
        except UsageError as error:  # packages of the other kind open without it
            _log.warning("%s", error)
            return device

    def private_for(self, kem: int) -> bytes:
        """The key that opens what was sealed with a `Kem`.

        Raises:
            UsageError: the device has none of this kind.
        """
        if kem == Kem.X25519:
            return self.hpke_private
        if self.hybrid_private is None:
            raise UsageError(f"the package is sealed to a post-quantum key, and this device has none ({HYBRID_FILE})")
        return self.hybrid_private
