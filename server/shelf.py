"""The server's live view of the releases on offer: for whom they are, and their bytes, from the disk."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from propolis.link.certificates import DeviceName
from propolis.link.delivery import Release
from propolis.package import Header, Package, read_key
from propolis.protos import model_pb2
from propolis.secure.content import WrappedKey, wrap_key
from propolis.secure.envelope import SEALED_CHUNK_BYTES, chunk_count
from propolis.secure.errors import PeerError, PropolisError, Refusal, RefusedError, UsageError
from propolis.secure.kem import Kem
from propolis.secure.manifest import Manifest, Trust, accept_again
from propolis.secure.wire import decode
from propolis.server.membership import Membership
from propolis.server.patience import Complaints
from propolis.server.publish import KEYS_SUFFIX, recipient_of
from propolis.server.rollout import Progress, Rollout, Rollouts
from propolis.storage import stamp_of

# By the digest of a release's manifest; None where this server has not the content key.
ContentKeys = Callable[[bytes], bytes | None]
_log = logging.getLogger("propolis.server")


@dataclass(frozen=True, slots=True)
class OnOffer:
    """A rollout, and what its package begins with.

    Attributes:
        rollout: how far it has come.
        header: of the package.
        manifest: in it.
        path: of the package.
    """

    rollout: Rollout
    header: Header
    manifest: Manifest
    path: Path

    @classmethod
    def of(cls, rollout: Rollout, path: Path) -> Self:
        """Read it; raises UsageError or PeerError where the package is not there, or none."""
        with Package.open(path, follow=False) as package:
            manifest = decode(Manifest, package.release.manifest.payload, model_pb2.Manifest)
            return cls(rollout, package.header, manifest, path)

    @property
    def chunks(self) -> int:
        """How many chunks the ciphertext has."""
        return chunk_count(self.manifest.plaintext_size)

    @contextmanager
    def opened(self) -> Iterator[Callable[[int], bytes]]:
        """Reads chunks by their number, from the disk, in any thread; raises UsageError where that fails."""
        begin = len(self.header.framed)

        def chunk(number: int) -> bytes:
            try:
                data = os.pread(file.fileno(), SEALED_CHUNK_BYTES, begin + number * SEALED_CHUNK_BYTES)
            except OSError as error:
                raise UsageError(f"cannot read {self.path}: {error.strerror}") from None
            if not data:
                raise UsageError(f"{self.path} ends before its chunk {number}")
            return data

        try:
            file = self.path.open("rb")
        except OSError as error:
            raise UsageError(f"cannot read {self.path}: {error.strerror}") from None
        with file:
            yield chunk


class NotOnOfferError(PropolisError):
    """A release is not, or no longer, for this device."""


class Shelf:
    """See the module.

    Args:
        folder: the server's.
        membership: who belongs to the federation.
        content_keys: of releases, for devices that enrolled after they were sealed.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        membership: Membership,
        content_keys: ContentKeys = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rollouts, self._membership, self._clock = Rollouts(folder), membership, clock
        self._content_keys = content_keys
        self._package_of = self._rollouts.package
        self._complaints = Complaints(_log)
        self._seen: tuple[int, int, int] | None = None
        self._fault: PropolisError | None = None  # that kept something from being offered
        self._is_read = False
        self._changes = self._reported = 0
        self._offers: dict[str, tuple[OnOffer, ...]] = {}
        self._held: dict[str, tuple[int, bool]] = {}  # with the roster that it was found out against
        self.refresh()

    def refresh(self) -> bool:
        """Look at the folder again; whether something changed since the last call."""
        self.look()
        before, self._reported = self._reported, self._changes
        return before != self._reported

    def look(self) -> None:
        """`refresh` without a report; call it often, it costs a look at one file."""
        stamp = stamp_of(self._rollouts.index)
        if self._is_read and stamp == self._seen and self._fault is None:
            return
        try:
            rollouts = self._rollouts.all()
        except UsageError as error:
            self._complaints.say(f"keeping the releases on offer: {error}")
            self._fault = error
            return
        known = {each.rollout.manifest: each for offers in self._offers.values() for each in offers}
        found, self._fault = dict[str, tuple[OnOffer, ...]](), None
        for rollout in rollouts:
            try:
                before = known.get(rollout.manifest)
                offer = replace(before, rollout=rollout) if before else OnOffer.of(rollout, self._package_of(rollout))
            except PropolisError as error:  # which may pass: look again
                self._complaints.say(f"{rollout.release} cannot be offered: {error}")
                self._fault = error
                continue
            found[rollout.name] = (*found.get(rollout.name, ()), offer)
        if found != self._offers or stamp != self._seen:
            self._changes += 1
        self._seen, self._offers, self._held = stamp, found, {}
        self._is_read = True

    def offers_for(self, name: DeviceName, begun: Collection[Release] = ()) -> list[Release]:
        """The newest release of each model that this device may begin to fetch, or go on with.

        Args:
            name: of the device.
            begun: releases that it has parts of: a pause does not end them.

        Raises:
            UsageError: what is on offer could not be read yet.
        """
        if not self._is_read:
            raise UsageError("what is on offer cannot be read")
        found = (
            next((each for each in offers if self._begins(each, name, begun)), None) for offers in self._offers.values()
        )
        return [each.rollout.release for each in found if each is not None]

    def knows(self, release: Release) -> bool:
        """Whether it is here, for whomever."""
        return any(each.rollout.release == release for each in self._offers.get(release.name, ()))

    def require(self, release: Release, name: DeviceName) -> OnOffer:
        """A release that this device may fetch, or go on to fetch.

        Raises:
            NotOnOfferError: it was stopped, has expired, is not known, or has not reached this device.
        """
        for each in self._offers.get(release.name, ()):
            if each.rollout.release == release:
                if each.rollout.progress is Progress.STOPPED:
                    raise NotOnOfferError(f"{release} was stopped")
                if not each.rollout.reaches(name.descriptor) or not self._holds(each):
                    break
                return each
        raise NotOnOfferError(f"{release} is not on offer for this device")

    def key(self, offer: OnOffer, name: DeviceName) -> WrappedKey:
        """A device's own key to a package.

        Raises:
            PeerError: it was not sealed for this device, and cannot be now.
            UsageError: the keys cannot be read.
        """
        try:
            return read_key(offer.path.with_name(offer.path.name + KEYS_SUFFIX), name.index, follow=False)
        except PeerError:
            made = self._made_key(offer, name)
        if made is None:
            raise PeerError(Refusal.PACKAGE, f"{offer.rollout.release} was not sealed for this device: publish it anew")
        return made

    def _made_key(self, offer: OnOffer, name: DeviceName) -> WrappedKey | None:
        """A key for a device that enrolled, or announced its hybrid key, after the package was sealed."""
        digest, kem = offer.rollout.release.manifest, Kem(offer.manifest.kem)
        recipient, content_key = recipient_of(self._membership, name.index), self._content_keys(digest)
        if content_key is None or recipient is None or (kem is not Kem.X25519 and recipient.hybrid_key is None):
            return None
        return wrap_key(content_key, digest, name.index, recipient.descriptor, recipient.key_for(kem), kem)

    def _begins(self, offer: OnOffer, name: DeviceName, begun: Collection[Release]) -> bool:
        rollout = offer.rollout
        goes_on = rollout.progress is Progress.PAUSED and rollout.release in begun
        if rollout.progress is not Progress.RUNNING and not goes_on:
            return False
        return rollout.reaches(name.descriptor) and self._holds(offer)

    def _holds(self, offer: OnOffer) -> bool:
        """Whether devices would still take it: its time is not over, and its release key is not revoked."""
        if self._clock() > offer.manifest.expires:
            return False
        roster, asked = self._membership.roster, offer.rollout.manifest
        if self._held.get(asked, (0, False))[0] != roster.number:
            self._held[asked] = (roster.number, _is_accepted(offer, Trust(self._membership.root_key, roster)))
        return self._held[asked][1]


def _is_accepted(offer: OnOffer, trust: Trust) -> bool:
    try:
        accept_again(offer.header.release, trust)
    except RefusedError:
        return False
    return True
