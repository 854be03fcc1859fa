"""The server's live view of the federation's key of homomorphic encryption: what rounds are under, and devices fetch.

Its holder makes two files, `he.public` and `he.keys`, and somebody copies them here, also while the server runs. The
second one says whom the key was sealed for: one of them that is revoked has the key, so no round is under it any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from propolis.he_files import read_published, read_sealed_key, sealed_indices
from propolis.protos import he_pb2
from propolis.secure.errors import PropolisError, RefusedError, UsageError
from propolis.secure.he.held import KeyBundle, scheme_of
from propolis.secure.he.keys import PublicKey, SealedKey, read_material
from propolis.secure.he.published import Published, accept_key
from propolis.secure.identity import Roster
from propolis.secure.manifest import Trust
from propolis.secure.wire import decode
from propolis.server.he_key import KEYS_FILE, PUBLIC_FILE
from propolis.server.membership import Membership
from propolis.server.patience import Complaints
from propolis.server.shelf import NotOnOfferError
from propolis.settings import FEWEST_IN_A_SUM, Settings
from propolis.storage import stamp_of

KEY_FOLDER = "he"
_COMMAND = "propolis federation he-key"
_log = logging.getLogger("propolis.server")


@dataclass(frozen=True, slots=True)
class UsableKey:
    """A key that rounds may be under now.

    Attributes:
        key: its public part.
        number: that its holder gave it.
        sealed: indices of the devices that have it, or may fetch it.
    """

    key: PublicKey
    number: int
    sealed: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Found:
    """What lies in the folder: the key, where there is one, and what is wrong."""

    published: Published | None
    key_id: bytes
    sealed: frozenset[int]
    fault: str


class ServedKey:
    """See the module. It may be asked from any thread.

    Args:
        folder: with the two files.
        membership: who belongs to the federation; somebody else keeps it up to date.
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path, membership: Membership, clock: Callable[[], float] = time.time) -> None:
        self._public, self._keys = folder / PUBLIC_FILE, folder / KEYS_FILE
        self._membership, self._clock = membership, clock
        self._complaints = Complaints(_log)
        self._looking = threading.Lock()
        self._seen: object = None
        self._found = _Found(None, b"", frozenset(), "")
        self._changes = self._reported = 0
        self.refresh()

    def refresh(self) -> bool:
        """Look at the files again; whether devices should ask again since the last call."""
        self._look()
        before, self._reported = self._reported, self._changes
        return before != self._reported

    def require(self) -> UsableKey:
        """The key, if rounds may be under it now.

        Raises:
            UsageError: there is none, it is not this federation's, its holder may not make keys (any more), or a device
                that is revoked has it; the message says what to do.
        """
        found = self._look()
        if found.published is None:
            raise UsageError(found.fault)
        trust = Trust(self._membership.root_key, self._membership.roster)
        try:
            accepted = accept_key(found.published, trust, self._clock())
        except RefusedError as error:
            raise UsageError(f"{self._public}: {error}") from None
        if found.fault:
            raise UsageError(found.fault)
        return UsableKey(accepted.key, accepted.number, found.sealed)

    def bundle(self, index: int, have: bytes) -> bytes:
        """A device's own part of the key, a `KeyBundle`; empty where there is no key here, or it has it.

        Args:
            index: of the device that asks, as its certificate says.
            have: id of the key that it has; empty without one.

        Raises:
            NotOnOfferError: there is nothing for this device, for now.
            UsageError: the files cannot be read, for now.
        """
        found = self._look()
        if found.published is None and not self._public.exists():
            return b""
        if found.published is None or found.fault:
            raise NotOnOfferError("the server's key of homomorphic encryption is not to be used at the moment")
        if have == found.key_id:
            return b""
        if index not in found.sealed:
            self._complaints.say(f"the key of homomorphic encryption was not sealed for this device: {_COMMAND}", index)
            raise NotOnOfferError("the key of homomorphic encryption was not sealed for this device yet")
        sealed = read_sealed_key(self._keys, index, follow=False)
        if decode(SealedKey, sealed, he_pb2.SealedKey).key_id != found.key_id:
            raise NotOnOfferError("the key of homomorphic encryption is being replaced")
        published = found.published
        return KeyBundle(published.holder, published.statement, published.material, sealed).to_bytes()

    def _look(self) -> _Found:
        """What lies there now; read again where it, or the roster, has changed."""
        with self._looking:
            roster = self._membership.roster
            seen = (stamp_of(self._public), stamp_of(self._keys), roster.number)
            if seen != self._seen:
                before, self._found, self._seen = self._found, self._read(roster.roster), seen
                if before != self._found:
                    self._changes += 1
                    self._say(self._found)
            return self._found

    def _say(self, found: _Found) -> None:
        if found.published is not None and not found.fault:
            _log.info("the key of homomorphic encryption is sealed for %d devices", len(found.sealed))
        elif self._public.exists():
            _log.warning("%s", found.fault)

    def _read(self, roster: Roster) -> _Found:
        if not self._public.exists():
            asked = f"its holder makes one ({_COMMAND}), of which {PUBLIC_FILE} and {KEYS_FILE} belong there"
            return _Found(None, b"", frozenset(), f"no key of homomorphic encryption in {self._public.parent}: {asked}")
        try:
            published = read_published(self._public)
            key_id = read_material(roster.federation, published.material).key_id
        except PropolisError as error:
            return _Found(None, b"", frozenset(), f"{self._public} is no key: {error}")
        try:
            sealed = sealed_indices(self._keys, key_id)
        except UsageError as error:
            return _Found(published, key_id, frozenset(), str(error))
        if sealed is None:
            fault = f"{self._keys} is not of the key in {self._public}: copy both from the key's holder"
            return _Found(published, key_id, frozenset(), fault)
        return _Found(published, key_id, sealed, _gone(roster, sealed))


def _gone(roster: Roster, sealed: frozenset[int]) -> str:
    """What is wrong with a key that was sealed for these devices; nothing, where none of them is revoked."""
    gone = [entry.name for index, entry in enumerate(roster.entries) if entry.revoked and index in sealed]
    if not gone:
        return ""
    return (
        f"{gone[0]} is revoked and has the key of homomorphic encryption: its holder makes another ({_COMMAND} --renew)"
    )


def key_for(served: ServedKey, settings: Settings) -> PublicKey:
    """The key that a run's next round is under.

    Raises:
        UsageError: as `ServedKey.require`; it is for other values, another mode, masks that the run has not or fewer
            devices than a round takes, or sealed for fewer; or TenSEAL is not installed.
    """
    usable = served.require()
    parameters, least = usable.key.parameters, max(settings.min_clients, FEWEST_IN_A_SUM)
    bits, mode = parameters.value_bits, "seeded" if parameters.seeded else "public"
    if bits != settings.value_bits:
        raise UsageError(f"bits: the federation's key is for values of {bits}, and the run has {settings.value_bits}")
    if mode != settings.he_mode:
        raise UsageError(f"he_mode: the federation's key is for {mode}, and the run is {settings.he_mode}")
    if usable.key.masked and not settings.is_masked:
        raise UsageError(
            f"protection: the federation's key is for {usable.key.use}, and the run is he: set it to he+secagg"
        )
    require_room(parameters.clients, least)
    if len(usable.sealed) < least:
        raise UsageError(
            f"the federation's key is sealed for {len(usable.sealed)} devices, and a round takes {least}: {_COMMAND} "
            "seals it for those that have enrolled"
        )
    scheme_of(parameters)
    return usable.key


def require_room(most: int, devices: int) -> None:
    """Refuse a key for fewer devices than these; raises UsageError."""
    if devices > most:
        raise UsageError(
            f"the federation's key is for sums of {most} devices at most, and {devices} train in a round: "
            f"{_COMMAND} --renew --clients {devices} makes one for more"
        )


def largest_round(settings: Settings, roster: Roster) -> int:
    """How many devices train in a round, when all members are there."""
    members = max(sum(not entry.revoked for entry in roster.entries), settings.clients)
    return max(int(members * settings.fraction), settings.min_clients)
