"""Who is invited and who is revoked: what the root says, where its private key is.

A change is one atomic write of the roster. A token is written before it and printed after it, so whatever the instant
of a crash, the same command again ends with one whole member.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from propolis.link.authority import fingerprint_of
from propolis.link.certificates import (
    AUTHORITY_FILE,
    DeviceName,
    load_pem,
    parse_certificate,
    to_der,
)
from propolis.link.keys import load_signing_key, read_private
from propolis.link.token import Token
from propolis.protos import identity_pb2 as pb
from propolis.secure.errors import UsageError
from propolis.secure.he.keys import delegate_holder
from propolis.secure.identity import Root, Roster, RosterEntry, Signed, descriptor_digest
from propolis.secure.release import delegate
from propolis.secure.wire import encode
from propolis.server.foundation import INVITATIONS_FOLDER, ROOT_KEY_FILE, SERVER_FOLDER
from propolis.server.membership import ENROLLED_FOLDER, read_enrolled
from propolis.server.roster import ROOT_FILE, load_root, load_roster_of, replace_roster
from propolis.storage import locked, remove_stale, write_atomically

LOCK_FILE, RELEASES_FOLDER, HOLDERS_FOLDER = "federation.lock", "releases", "he-holders"


@dataclass(frozen=True, slots=True)
class Member:
    """A place of the roster, as far as this folder knows.

    Attributes:
        state: invited, enrolled, expired (an invitation that this folder does not know to be used) or revoked.
        node_id: on the link, of a device that has enrolled.
    """

    index: int
    name: str
    state: str
    node_id: int | None = None


class Federation:
    """A federation in a folder: its own, or the server's; changes need the root's key.

    Args:
        folder: that `found` made, or the folder `server` of it.
        passphrase: of the root's key.

    Raises:
        UsageError: there is no federation, or it does not hold.
    """

    def __init__(self, folder: Path, passphrase: bytes | None = None) -> None:
        self.server = folder / SERVER_FOLDER if (folder / SERVER_FOLDER / ROOT_FILE).exists() else folder
        self._home = self.server if self.root_online else folder
        self._root_key = load_root(self.server)
        self._passphrase = passphrase
        load_roster_of(self._root_key, self.server)

    @property
    def roster(self) -> Roster:
        """The newest roster of this folder."""
        return load_roster_of(self._root_key, self.server).roster

    @property
    def root_online(self) -> bool:
        """Whether the root's key is in the server's folder."""
        return (self.server / ROOT_KEY_FILE).exists()

    def invite(self, name: str, lifetime_s: int, now: float, replace: bool = False) -> str:
        """A token for a new device; the same one again for as long as it is valid.

        Args:
            name: the device's, which no other one has that is not revoked.
            lifetime_s: how long it may be used, in seconds.
            now: seconds since 1970.
            replace: revoke the place that the name has, also where it cannot be known whether it is in use.

        Raises:
            UsageError: the name is taken, or cannot be one.
        """
        if not name.isprintable() or name != name.strip():
            raise UsageError("a device's name has printable characters, and no blanks around it")
        with self._changing() as root:
            roster = self.roster
            index = _place_of(name, roster)
            if index is not None:
                token = self._token(index, roster.entries[index])
                if token and not replace and not token.verified().expired(now):
                    return token.to_text()
                self._require_replaceable(index, name, replace)
                roster = roster.revoking(index)
            return self._invite(root, roster, name, int(now) + lifetime_s)

    def revoke(self, name: str) -> bool:
        """Take a device out of the federation.

        Returns:
            False when it was revoked before.

        Raises:
            UsageError: nobody has this name.
        """
        with self._changing() as root:
            roster = self.roster
            index = _place_of(name, roster)
            if index is None:
                if any(entry.name == name for entry in roster.entries):
                    return False
                raise UsageError(
                    f"there is no device {name!r} among {len(roster.entries)}: see propolis federation list"
                )
            replace_roster(self.server, root.sign_roster(roster.revoking(index)))
            return True

    def renew_roster(self, not_after: float) -> None:
        """Sign the roster anew, to be valid until `not_after`, in seconds since 1970."""
        with self._changing() as root:
            replace_roster(self.server, root.sign_roster(self.roster.lasting(int(not_after))))

    def delegate_release_key(self, public_key: bytes, lifetime_s: int, now: float, models: tuple[str, ...]) -> Signed:
        """Let a key release models, and keep what was said; for the arguments see `propolis.secure.release.delegate`.

        Raises:
            UsageError: a name is none of a model.
        """
        with self._changing() as root:
            serial = self._next_serial()
            signed = delegate(root, serial, public_key, now, lifetime_s, models)
            return self._keep_delegation(RELEASES_FOLDER, serial, signed)

    def delegate_key_holder(self, public_key: bytes, lifetime_s: int, now: float) -> Signed:
        """Let a key holder make keys of homomorphic encryption, and keep what was said.

        Args:
            public_key: of the holder, Ed25519, 32 bytes.
            lifetime_s: how long its keys are believed, in seconds.
            now: seconds since 1970.
        """
        with self._changing() as root:
            serial = self._next_serial()
            signed = delegate_holder(root, serial, public_key, now, lifetime_s)
            return self._keep_delegation(HOLDERS_FOLDER, serial, signed)

    def revoke_release_key(self, serial: int) -> bool:
        """Let devices refuse all that a release key signed; False when they do already.

        Raises:
            UsageError: this folder knows no such key.
        """
        return self._revoke_delegation(RELEASES_FOLDER, serial, "release key")

    def revoke_key_holder(self, serial: int) -> bool:
        """Let devices refuse all keys that a holder made; False when they do already.

        Raises:
            UsageError: this folder knows no such holder.
        """
        return self._revoke_delegation(HOLDERS_FOLDER, serial, "key holder")

    def members(self, now: float) -> list[Member]:
        """All the places; `now` is in seconds since 1970."""
        roster = self.roster
        return [self._member(index, entry, roster.federation, now) for index, entry in enumerate(roster.entries)]

    def _next_serial(self) -> int:
        """One that no release key and no key holder has: a roster revokes both by it."""
        known = (serial for folder in (RELEASES_FOLDER, HOLDERS_FOLDER) for serial in self._serials(folder))
        return max((*known, *self.roster.revoked_releases), default=0) + 1

    def _serials(self, name: str) -> list[int]:
        """Of those whom this folder knows to be delegated to."""
        folder = self._home / name
        return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []

    def _keep_delegation(self, name: str, serial: int, signed: Signed) -> Signed:
        folder = self._home / name
        folder.mkdir(mode=0o700, exist_ok=True)
        write_atomically(folder / str(serial), encode(signed, pb.Signed))
        return signed

    def _revoke_delegation(self, name: str, serial: int, what: str) -> bool:
        with self._changing() as root:
            if serial not in self._serials(name) and serial not in self.roster.revoked_releases:
                raise UsageError(f"there is no {what} {serial} in {self._home / name}")
            if serial in self.roster.revoked_releases:
                return False
            replace_roster(self.server, root.sign_roster(self.roster.revoking_release(serial)))
            return True

    def _member(self, index: int, entry: RosterEntry, federation: bytes, now: float) -> Member:
        if entry.revoked:
            return Member(index, entry.name, "revoked")
        descriptor = read_enrolled(self.server, index)
        if descriptor is not None:
            name = DeviceName(federation, index, descriptor_digest(descriptor))
            return Member(index, entry.name, "enrolled", name.node_id)
        token = self._token(index, entry)
        return Member(index, entry.name, "expired" if token and token.verified().expired(now) else "invited")

    def _invite(self, root: Root, roster: Roster, name: str, not_after: int) -> str:
        """Token first, roster last: a token that no roster knows was never shown, and is overwritten."""
        index = len(roster.entries)
        following, invitation, key = root.invite(roster, name, not_after=not_after, root_online=self.root_online)
        authority = fingerprint_of(to_der(parse_certificate(load_pem(self.server / AUTHORITY_FILE))))
        token = Token(invitation, key.private, self._root_key, authority).to_text()
        remove_stale(self._token_file(index))
        write_atomically(self._token_file(index), token.encode() + b"\n", mode=0o600)
        replace_roster(self.server, root.sign_roster(following))
        return token

    def _require_replaceable(self, index: int, name: str, replace: bool) -> None:
        """A place is taken back only when nobody is in it, or somebody said so."""
        if replace:
            return
        if read_enrolled(self.server, index) is not None:
            raise UsageError(f"{name} has enrolled; --replace revokes that device and invites a new one by this name")
        if not (self.server / ENROLLED_FOLDER).is_dir():
            raise UsageError(
                f"the invitation of {name} is over, and this folder does not know whether it was used: --replace "
                "revokes whoever used it and makes a new one"
            )

    def _token_file(self, index: int) -> Path:
        return self._home / INVITATIONS_FOLDER / str(index)

    def _token(self, index: int, entry: RosterEntry) -> Token | None:
        """The token of a place, if it is here and still the place's."""
        path = self._token_file(index)
        if not path.exists():
            return None
        token = Token.from_text(read_private(path).decode(errors="replace"))
        return token if token.key.public == entry.public_key else None

    @contextmanager
    def _changing(self) -> Iterator[Root]:
        """The root, while nobody else changes the roster."""
        path = self._home / ROOT_KEY_FILE
        if not path.exists():
            raise UsageError(f"{path} is not here: run this where the federation's root key is kept")
        root = Root(load_signing_key(path, self._passphrase))
        if root.public_key != self._root_key:
            raise UsageError(f"{path} is not the key of this federation's root")
        with locked(self._home / LOCK_FILE):
            yield root


def _place_of(name: str, roster: Roster) -> int | None:
    """The place of the device with this name that is not revoked."""
    places = (index for index, entry in enumerate(roster.entries) if entry.name == name and not entry.revoked)
    return next(places, None)
