"""A key of homomorphic encryption on a device: where it comes from, and what the device does with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from propolis.protos import he_pb2 as pb
from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.he.bfv import Decryptor, Encryptor, Scheme
from propolis.secure.he.keys import LARGEST_MATERIAL, LARGEST_SEALED, Holder, PublicKey, Secret, Statement, open_key
from propolis.secure.he.layout import Arrays, Layout, Opened, Sample
from propolis.secure.he.messages import EncryptedPlan, EncryptedSum, EncryptedUpload, pieces
from propolis.secure.he.parameters import Parameters
from propolis.secure.he.published import LARGEST_PUBLISHED, Published, accept_key
from propolis.secure.he.stream import Declared, encrypt_vector, open_vector
from propolis.secure.he.tag import Tags, refused, tag_bytes
from propolis.secure.identity import Signed, TrustedRoster
from propolis.secure.manifest import Trust
from propolis.secure.prg import Mask
from propolis.secure.wire import decode, encode, sized, version_field

_LARGEST_SEALED = LARGEST_SEALED + 2**10
LARGEST_BUNDLE = LARGEST_PUBLISHED + _LARGEST_SEALED + 2**10


# Passes pieces of work on, of which there will be so many.
Watch = Callable[[Iterable[bytes], int], Iterable[bytes]]


def _unwatched(pieces: Iterable[bytes], total: int) -> Iterable[bytes]:
    del total
    return pieces


@dataclass(frozen=True, slots=True, repr=False)
class KeyBundle:
    """What a device keeps of a key; the secret part is sealed to it.

    Attributes:
        holder: delegation of who made the key, by the root.
        statement: on the key, by the holder.
        material: all that is public about it.
        sealed: the secret part, for this device.
    """

    holder: Signed
    statement: Signed
    material: bytes = sized(1, LARGEST_MATERIAL)
    sealed: bytes = sized(1, _LARGEST_SEALED)
    version: int = version_field()

    @property
    def published(self) -> Published:
        """What the server handed out."""
        return Published(self.holder, self.statement, self.material)

    @property
    def number(self) -> int:
        """Of the key; it proves nothing yet."""
        return decode(Statement, self.statement.payload, pb.Statement).number

    @property
    def serial(self) -> int:
        """Of the holder; it proves nothing yet."""
        return decode(Holder, self.holder.payload, pb.Holder).serial

    def to_bytes(self) -> bytes:
        """As it travels, and as a device keeps it."""
        return encode(self, pb.KeyBundle)

    @classmethod
    def from_bytes(cls, data: bytes) -> KeyBundle:
        """From bytes; raises PeerError when they are none."""
        return decode(cls, data, pb.KeyBundle, LARGEST_BUNDLE)


@dataclass(frozen=True, slots=True, repr=False)
class Owner:
    """The device that opens a bundle.

    Attributes:
        index: its place in the roster.
        descriptor: digest of its descriptor, 32 bytes.
        hpke_private: what the secret part is sealed to.
    """

    index: int
    descriptor: bytes
    hpke_private: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Assignment:
    """What a device is asked to encrypt its part of.

    Attributes:
        plan: of the attempt.
        model: the arrays of the global model by name.
        is_first: whether that is the public one that a run begins with.
        shared_input: digest of the model and all else that the devices were given, 32 bytes.
    """

    plan: EncryptedPlan
    model: Arrays
    is_first: bool
    shared_input: bytes


@dataclass(frozen=True, slots=True, repr=False)
class EncodedUpdate:
    """A device's integers, and what encrypts them; a `propolis.secure.secagg.addition.Addend`.

    `watched` sees the ciphertexts as they are made, and how many there will be.
    """

    round_tag: bytes
    metrics: tuple[str, ...]
    values: NDArray[np.int64]
    encryptor: Encryptor
    tags: Tags
    device: int
    watched: Watch = _unwatched

    def masked(self, masks: Sequence[Mask]) -> bytes:
        """The bytes of an `EncryptedUpload`; without masks, who has the key can open it."""
        ciphertexts = encrypt_vector(self.values, self.encryptor, self.tags, self.device, masks)
        watched = self.watched(ciphertexts, self.tags.chunks)
        return EncryptedUpload(self.round_tag, self.metrics, b"".join(watched)).to_bytes()


class HeldKey:
    """A device's key, whose origin `held_key` has checked.

    Args:
        public: what everybody may know.
        secret: what devices know.
        device: this one's index.
    """

    def __init__(self, public: PublicKey, secret: Secret, device: int) -> None:
        self._scheme = scheme_of(public.parameters)
        self._mac_key, self._device = secret.mac_key, device
        self._encryptor, self._decryptor = _ciphers(public, secret)
        self.public = public

    def require_plan(self, plan: EncryptedPlan) -> None:
        """Refuse what is under another key; raises TrustError."""
        if plan.key_id != self.public.key_id:
            raise TrustError(Refusal.HE_KEY, "the round is under another key than this device's")

    def encoded(self, assignment: Assignment, sample: Sample, rng: np.random.Generator) -> EncodedUpdate:
        """What a device has to say, ready to be encrypted; a plan must never be answered twice.

        Args:
            assignment: what it was asked to do.
            sample: what the device has to say.
            rng: for the rounding.

        Raises:
            PeerError: see `Layout.encode`.
        """
        plan, names = assignment.plan, tuple(sorted(sample.metrics))
        layout = layout_of(plan, names, self.public.parameters)
        values = layout.encode(sample, assignment.model, assignment.is_first, rng)
        tags = self._tags(plan.round_id(names, assignment.shared_input), layout)
        return EncodedUpdate(plan.tag, names, values, self._encryptor, tags, self._device)

    def open(self, total: EncryptedSum, floor: int, watched: Watch = _unwatched) -> tuple[EncryptedPlan, Opened]:
        """The sum of a round: the plan that it was made under, and what it says.

        Args:
            total: as it came.
            floor: fewest devices that this one opens a sum of.
            watched: sees the ciphertexts as they are opened, and how many there are.

        Raises:
            PeerError: with one code and one text, whatever is wrong with it.
        """
        try:
            plan = total.made_by()
            sums = self._sums(plan, total, floor, watched)
            return plan, layout_of(plan, total.metrics, self.public.parameters).decode(sums, len(total.devices))
        except PeerError:
            raise refused() from None

    def _sums(self, plan: EncryptedPlan, total: EncryptedSum, floor: int, watched: Watch) -> NDArray[np.int64]:
        layout = layout_of(plan, total.metrics, self.public.parameters)
        tags = self._tags(plan.round_id(total.metrics, total.shared_input), layout)
        size = self._scheme.ciphertext_bytes + tag_bytes(self.public.parameters)
        if len(total.ciphertexts) != size * tags.chunks:
            raise refused()
        declared = Declared(total.devices, floor, layout.count)
        ciphertexts = watched(pieces(total.ciphertexts, size), tags.chunks)
        return open_vector(ciphertexts, self._decryptor, tags, declared)

    def _tags(self, round_id: bytes, layout: Layout) -> Tags:
        parameters = self.public.parameters
        return Tags(self._mac_key, round_id, parameters, parameters.ciphertexts(layout.count))


def held_key(data: bytes, root_key: bytes, roster: TrustedRoster, owner: Owner, now: float) -> HeldKey:
    """The key in a device's bundle.

    Args:
        data: the bundle.
        root_key: of the federation, 32 bytes.
        roster: the newest that the device knows.
        owner: the device.
        now: seconds since 1970.

    Raises:
        TrustError: no holder that the root delegates, and that is not revoked, stands behind it, it is not for this
            device, or the roster has expired.
        PeerError: it is malformed.
    """
    bundle = KeyBundle.from_bytes(data)
    return _opened(bundle, accept_key(bundle.published, Trust(root_key, roster), now).key, owner)


def layout_of(plan: EncryptedPlan, metrics: Sequence[str], parameters: Parameters) -> Layout:
    """Which integer is what, under a key of these parameters."""
    return Layout(plan, metrics, parameters.clients, parameters.value_bits)


@lru_cache(maxsize=4)
def scheme_of(parameters: Parameters) -> Scheme:
    """BFV with these parameters, made once."""
    return Scheme(parameters)


@lru_cache(maxsize=4)
def _ciphers(public: PublicKey, secret: Secret) -> tuple[Encryptor, Decryptor]:
    """What works with a key: the same for all devices of a process, whose key is one."""
    scheme = scheme_of(public.parameters)
    decryptor = scheme.decryptor(secret.secret_key, public.key_id)
    if public.parameters.seeded:
        return scheme.secret_encryptor(secret.secret_key, public.key_id), decryptor
    return scheme.public_encryptor(public.public_key, public.key_id), decryptor


@lru_cache(maxsize=1024)
def _opened(bundle: KeyBundle, public: PublicKey, owner: Owner) -> HeldKey:
    """The key, opened once in a process: the devices of a simulation are asked again and again."""
    return HeldKey(public, open_key(bundle.sealed, public, owner.descriptor, owner.hpke_private), owner.index)


def forget_opened() -> None:
    """Let this process forget the keys that it has opened: those that are still needed are opened again."""
    _opened.cache_clear()
    _ciphers.cache_clear()
