"""The seeds of the masks: both roles derive them from the same secrets, bound to the same context.

What a mask is bound to is what its owner saw. A server that shows one device another model, plan or neighbour gets
an upload whose masks match nobody else's (Pasquini et al., CCS 2022), and a device that is asked twice never uses
one mask for two uploads.
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.merkle import HASH_BYTES
from propolis.secure.prg import SEED_BYTES, Mask


def index_bytes(index: int) -> bytes:
    """A device's index as it is hashed."""
    return index.to_bytes(8, "big")


def public_half(private: bytes) -> bytes:
    """The public half of an X25519 private key, 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def mask_private(secret: bytes, index: int, plan: bytes) -> bytes:
    """A device's X25519 private mask key, 32 bytes, from the 16-byte secret that is shared in its place."""
    return _derive(secret, labels.joined(labels.MASK_KEY, plan, index_bytes(index)))


def pairwise_masks(
    own: int, own_private: bytes, others: Iterable[tuple[int, bytes]], plan: bytes, shared_input: bytes
) -> list[Mask]:
    """The masks between a device and others, as the first one adds them: the others take the same away.

    Args:
        own: index of the device whose upload they are for.
        own_private: X25519 private mask key of that device.
        others: index and X25519 public mask key of each neighbour.
        plan: digest of the round's plan.
        shared_input: digest of the model, configuration and encoding that `own` was given.

    Raises:
        PeerError: a neighbour's key is of low order (RFC 7748, section 6.1).
    """
    private = X25519PrivateKey.from_private_bytes(own_private)
    own_end = (own, private.public_key().public_bytes_raw())
    masks = []
    for other, other_key in others:
        try:
            secret = private.exchange(X25519PublicKey.from_public_bytes(other_key))
        except ValueError:
            raise PeerError(Refusal.KEYS, f"the mask key of device {other} is of low order") from None
        ends = sorted([own_end, (other, other_key)])
        context = [part for index, key in ends for part in (index_bytes(index), key)]
        seed = _derive(secret, labels.joined(labels.PAIRWISE_MASK, plan, *context, shared_input))
        masks.append(Mask(seed, 1 if own < other else -1))
    return masks


def self_mask(seed: bytes, index: int, plan: bytes, shared_input: bytes, request: bytes) -> Mask:
    """A device's own mask, which the server takes away with the help of t neighbours.

    Args:
        seed: 16 bytes, shared among the neighbours.
        index: the device.
        plan: digest of the round's plan.
        shared_input: digest of the model, configuration and encoding that the device was given.
        request: digest of the very request that the upload answers.
    """
    info = labels.joined(labels.SELF_MASK, plan, index_bytes(index), shared_input, request)
    return Mask(_derive(seed, info), 1)


def seed_commitment(seed: bytes, index: int, plan: bytes) -> bytes:
    """What a device signs of its seed, 16 bytes, so that a wrong reconstruction is noticed.

    Like `share_hash` it is short: another seed for it takes 2^128 work, and two seeds with one commitment, which take
    2^64, would spoil a sum that their author can spoil anyway.
    """
    return labels.digest(labels.COMMITMENT, plan, index_bytes(index), seed)[:HASH_BYTES]


def share_hash(share: bytes, dealer: int, holder: int, kind: bytes, plan: bytes) -> bytes:
    """What a dealer signs of a share, 16 bytes, so that a corrupt one is known by itself.

    `kind` is b"seed" or b"key".
    """
    return labels.digest(labels.SHARE, plan, index_bytes(dealer), index_bytes(holder), kind, share)[:HASH_BYTES]


def box_info(dealer: int, dealer_descriptor: bytes, holder: int, holder_descriptor: bytes, plan: bytes) -> bytes:
    """The context that a pair of shares is sealed under: this round, from this device, to that one."""
    ends = (index_bytes(dealer), dealer_descriptor, index_bytes(holder), holder_descriptor)
    return labels.joined(labels.BOX, plan, *ends)


def _derive(secret: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) with an empty salt."""
    return HKDF(hashes.SHA256(), SEED_BYTES, None, info).derive(secret)
