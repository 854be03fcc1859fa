"""Signatures on who is alive: what keeps a lying server from telling devices different stories."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from propolis.secure import labels
from propolis.secure.errors import Refusal, TrustError


def confirm_alive(signing_private: bytes, plan: bytes, alive: bytes) -> bytes:
    """Sign an alive set.

    Args:
        signing_private: Ed25519 private key, 32 bytes.
        plan: digest of the round's plan.
        alive: bitmap over the roster.

    Returns:
        64 bytes.
    """
    key = Ed25519PrivateKey.from_private_bytes(signing_private)
    return key.sign(labels.joined(labels.CONFIRMATION, plan, alive))


def require_confirmation(signing_key: bytes, signature: bytes, plan: bytes, alive: bytes) -> None:
    """Check what `confirm_alive` made; raises TrustError."""
    try:
        key = Ed25519PublicKey.from_public_bytes(signing_key)
        key.verify(signature, labels.joined(labels.CONFIRMATION, plan, alive))
    except (InvalidSignature, ValueError):
        raise TrustError(Refusal.SETS, "a confirmation of the alive set does not hold") from None
