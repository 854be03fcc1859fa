"""A key of homomorphic encryption for the devices that have enrolled, made on the holder's machine.

What is written, in this order: what the holder keeps (with everybody whom the key will be sealed for), the sealed
parts, and last the public part, which is the only thing that says that there is a key. Whatever the instant of a crash,
the same command again, without --renew, ends with one whole key; a sealed part that is missing is made again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from propolis.he_files import sealed_keys, write_sealed_keys
from propolis.protos import he_pb2
from propolis.secure.envelope import OVERHEAD_BYTES
from propolis.secure.errors import UsageError
from propolis.secure.he.bfv import Scheme
from propolis.secure.he.keys import PublicKey, SealedKey, make_key, read_material, seal_key, state_key, verify_holder
from propolis.secure.he.parameters import choose
from propolis.secure.he.published import Published
from propolis.secure.he.tag import MAC_KEY_BYTES
from propolis.secure.identity import Roster
from propolis.secure.wire import decode
from propolis.server.he_held import HeldKey, Member, load_held, save_held
from propolis.server.he_holder import HolderKey, require_apart
from propolis.server.membership import Membership
from propolis.server.publish import Recipient, recipients_of
from propolis.storage import locked, remove_stale, write_atomically

PUBLIC_FILE, KEYS_FILE = "he.public", "he.keys"
SECRET_SUFFIX, _LOCK_SUFFIX = ".secret", ".lock"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a key is for; None is the same as before, and of the first key as `_Purpose` says.

    Attributes:
        clients: most devices of a sum.
        value_bits: of a value.
        seeded: whether devices encrypt under the secret key, to half of the bytes.
        masked: whether devices encrypt under masks only, whatever a server asks for.
        renew: make another key, whatever there is.
    """

    clients: int | None = None
    value_bits: int | None = None
    seeded: bool | None = None
    masked: bool | None = None
    renew: bool = False


@dataclass(frozen=True, slots=True)
class _Purpose:
    """What a key is for, the first one where nothing is asked; see `Asked`."""

    clients: int = 1000
    value_bits: int = 16
    seeded: bool = False
    masked: bool = False

    @classmethod
    def of(cls, key: PublicKey) -> _Purpose:
        chosen = key.parameters
        return cls(chosen.clients, chosen.value_bits, chosen.seeded, key.masked)

    def changed(self, asked: Asked) -> _Purpose:
        """The same, but for what is asked."""
        given = {field.name: getattr(asked, field.name) for field in fields(self)}
        return replace(self, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Issued:
    """What was done.

    Attributes:
        number: of the key.
        key: its public part.
        is_new: whether it was made now.
        sealed: indices of the devices that it was sealed for now.
        devices: how many have it in all.
    """

    number: int
    key: PublicKey
    is_new: bool
    sealed: tuple[int, ...]
    devices: int


def issue_key(federation: Path, holder_file: Path, holder: HolderKey, out: Path, asked: Asked, now: float) -> Issued:
    """Make a key for the devices that have enrolled, or seal the last one for those that came later.

    Args:
        federation: a copy of the server's folder: roster and enrolled devices.
        holder_file: of the holder's key; what it keeps goes beside it.
        holder: what is in there.
        out: folder for what goes to the server, `he.public` and `he.keys`; nothing in it is secret.
        asked: what the key is for.
        now: seconds since 1970.

    Raises:
        UsageError: the holder's file is in the server's folder, the last key is for something else or has gone to a
            device that is revoked, the roster is older than the last one, or nobody has enrolled.
        TrustError: the root did not delegate to this holder, or not now, or took it back; the roster has expired.
        StorageError: something could not be written.
    """
    require_apart(holder_file, federation)
    membership = Membership(federation)
    membership.roster.require_current(now)
    verify_holder(membership.root_key, membership.roster, holder.delegation, now)
    secret_file = holder_file.with_name(holder_file.name + SECRET_SUFFIX)
    with locked(holder_file.with_name(holder_file.name + _LOCK_SUFFIX)):
        before = load_held(secret_file, holder.key)
        _require_newest(before, membership.roster.roster)
        recipients = recipients_of(membership)
        if not recipients:
            raise UsageError(f"no device has enrolled in {federation}: there is nobody to make a key for")
        if before is None or asked.renew:
            held = _made(holder, membership.roster.roster, before, asked, now)
        else:
            held = before
            _require_usable(held, membership.roster.roster, recipients, asked)
        held = _with(held, recipients, membership.roster.number)
        if held != before:
            save_held(secret_file, holder.key, held)
        sealed = _publish(held, membership.roster.roster.federation, recipients, out)
    key = read_material(membership.roster.roster.federation, held.published.material)
    return Issued(held.number, key, before is None or held.number != before.number, sealed, len(held.members))


def _made(holder: HolderKey, roster: Roster, before: HeldKey | None, asked: Asked, now: float) -> HeldKey:
    """A new key, which nobody has yet."""
    last = _Purpose()
    if before is not None:
        last = _Purpose.of(read_material(roster.federation, before.published.material))
    wanted = last.changed(asked)
    scheme = Scheme(choose(wanted.clients, wanted.value_bits, seeded=wanted.seeded))
    key, secret = make_key(roster.federation, scheme, masked=wanted.masked)
    # Seconds since 1970, so that it also rises from one holder to the next, who does not know the last number.
    number = max(int(now), 1 if before is None else before.number + 1)
    published = Published(holder.delegation, state_key(holder.key, key, number), key.material)
    return HeldKey(published, number, secret.mac_key, secret.secret_key, roster.number, ())


def _require_newest(held: HeldKey | None, roster: Roster) -> None:
    """An older roster would bring back a device that was revoked."""
    if held is not None and roster.number < held.roster:
        raise UsageError(f"this is roster {roster.number}, and {held.roster} was seen before: copy the newest one here")


def _require_usable(held: HeldKey, roster: Roster, recipients: Sequence[Recipient], asked: Asked) -> None:
    """Refuse to go on with a key that somebody has who should not, or that is another one than is asked for."""
    key = read_material(roster.federation, held.published.material)
    has = _Purpose.of(key)
    if has.changed(asked) != has:
        mode = "seeded" if has.seeded else "public-key"
        raise UsageError(
            f"the key is for {has.clients} devices and {has.value_bits} bits, {mode}, and for {key.use}: --renew makes "
            "another one, for all devices"
        )
    if gone := [roster.entries[member.index].name for member in held.members if roster.entries[member.index].revoked]:
        raise UsageError(f"the key was sealed for {gone[0]}, which is revoked now: --renew makes a new key without it")
    known = {member.index: member.descriptor for member in held.members}
    for one in recipients:
        if known.get(one.index, one.descriptor) != one.descriptor:
            raise UsageError(
                f"{roster.entries[one.index].name} is here with other keys than it was sealed the key for: revoke it, "
                "and --renew"
            )


def _with(held: HeldKey, recipients: Sequence[Recipient], roster: int) -> HeldKey:
    """The key with the newcomers noted: they count as having it from before it is sealed for them."""
    known = {member.index for member in held.members}
    new = [Member(one.index, one.descriptor) for one in recipients if one.index not in known]
    members = tuple(sorted((*held.members, *new), key=lambda member: member.index))
    return replace(held, roster=roster, members=members)


def _publish(held: HeldKey, federation: bytes, recipients: Sequence[Recipient], out: Path) -> tuple[int, ...]:
    """Write what goes to the server; the indices of those who were sealed for."""
    key = read_material(federation, held.published.material)
    out.mkdir(parents=True, exist_ok=True)
    keys_file, public_file = out / KEYS_FILE, out / PUBLIC_FILE
    have = {sealed.index for sealed in sealed_keys(keys_file, key.key_id)}
    missing = [one for one in recipients if one.index not in have]
    if missing or not keys_file.exists():
        kept, new = sealed_keys(keys_file, key.key_id), _sealed(key, held, missing)
        merged = heapq.merge(kept, new, key=lambda sealed: sealed.index)
        remove_stale(keys_file)
        write_sealed_keys(keys_file, key.key_id, OVERHEAD_BYTES + MAC_KEY_BYTES + len(held.secret_key), merged)
    public = held.published.to_bytes()
    if not public_file.exists() or public_file.read_bytes() != public:
        remove_stale(public_file)
        write_atomically(public_file, public)
    return tuple(one.index for one in missing)


def _sealed(key: PublicKey, held: HeldKey, recipients: Sequence[Recipient]) -> Iterator[SealedKey]:
    for one in recipients:
        sealed = seal_key(key, held.secret, one.index, one.descriptor, one.hpke_key)
        yield decode(SealedKey, sealed, he_pb2.SealedKey)
