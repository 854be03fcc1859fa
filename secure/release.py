"""Who may release models: keys that the federation's root delegates, for a time, and revokes in the roster.

So the root's key stays where it is, and whoever publishes needs a key that can be lost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from propolis.protos import model_pb2 as pb
from propolis.secure import labels
from propolis.secure.errors import Refusal, TrustError, UsageError
from propolis.secure.identity import DIGEST_BYTES, KEY_BYTES, Root, Signed, TrustedRoster, verify
from propolis.secure.wire import between, sized, version_field

LARGEST_NUMBER = 2**62
LONGEST_MODEL_NAME, _MOST_MODELS = 64, 64
# A delegation names 64 models at most.
_LARGEST_DELEGATION = 8192
_MODEL_NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{LONGEST_MODEL_NAME - 1}}}")
# A device's clock may be behind the root's.
CLOCK_SKEW_S = 3600


@dataclass(frozen=True, slots=True)
class Delegation:
    """What the root says of a release key.

    Attributes:
        federation: fingerprint of the root, 32 bytes.
        serial: what a roster revokes it by.
        public_key: Ed25519, 32 bytes.
        not_before, not_after: seconds since 1970.
        models: that it may release; none of them: all.
    """

    federation: bytes = sized(DIGEST_BYTES)
    serial: int = between(1, LARGEST_NUMBER)
    public_key: bytes = sized(KEY_BYTES)
    not_before: int = between(0, LARGEST_NUMBER)
    not_after: int = between(0, LARGEST_NUMBER)
    models: tuple[str, ...] = sized(1, LONGEST_MODEL_NAME, count=_MOST_MODELS, default=())
    version: int = version_field()

    def require_valid(self, now: float) -> None:
        """Refuse a key whose time is not now; `now` is in seconds since 1970."""
        require_in_time(Refusal.RELEASE_KEY, f"the release key {self.serial}", self.not_before, self.not_after, now)

    def require_model(self, name: str) -> None:
        """Refuse a model that this key may not release."""
        if self.models and name not in self.models:
            allowed = ", ".join(self.models)
            raise TrustError(Refusal.RELEASE_KEY, f"the release key {self.serial} is for {allowed}, not for {name}")


def delegate(
    root: Root, serial: int, public_key: bytes, now: float, lifetime_s: int, models: tuple[str, ...] = ()
) -> Signed:
    """Let a key release models.

    Args:
        root: of the federation.
        serial: that no other delegation of this root has.
        public_key: of the release key, 32 bytes.
        now: seconds since 1970.
        lifetime_s: how long it may be used, in seconds.
        models: names that it may release; none of them: all.

    Raises:
        UsageError: a name is none.
    """
    if len(models) > _MOST_MODELS:
        raise UsageError(f"a release key is for all models or for {_MOST_MODELS} at most, got {len(models)}")
    for name in models:
        require_model_name(name)
    delegation = Delegation(root.federation, serial, public_key, *lifetime(now, lifetime_s), models)
    return root.sign(labels.DELEGATION, delegation, pb.Delegation)


def verify_delegation(root_key: bytes, roster: TrustedRoster, signed: Signed) -> Delegation:
    """A delegation of this root that is not revoked; whether its time is now is not looked at.

    Args:
        root_key: of the federation, 32 bytes.
        roster: the newest that is known, which holds the revocations.
        signed: the delegation.

    Raises:
        TrustError: it is not this root's, of another federation, or revoked.
        PeerError: it is malformed.
    """
    refusal = Refusal.RELEASE_KEY
    delegation = verify(
        labels.DELEGATION, root_key, signed, Delegation, pb.Delegation, refusal, limit=_LARGEST_DELEGATION
    )
    require_standing(refusal, "the release key", delegation.federation, delegation.serial, roster)
    return delegation


def require_in_time(refusal: Refusal, what: str, not_before: int, not_after: int, now: float) -> None:
    """Refuse what the root delegated to for another time; `now` is in seconds since 1970."""
    if now < not_before:
        raise TrustError(refusal, f"{what} is not valid yet")
    if now > not_after:
        raise TrustError(refusal, f"{what} has expired")


def require_standing(refusal: Refusal, what: str, federation: bytes, serial: int, roster: TrustedRoster) -> None:
    """Refuse what the root of another federation delegated to, or what the roster revokes by its serial."""
    if federation != roster.roster.federation:
        raise TrustError(refusal, f"{what} is another federation's")
    if serial in roster.roster.revoked_releases:
        raise TrustError(refusal, f"{what} {serial} is revoked")


def lifetime(now: float, lifetime_s: int) -> tuple[int, int]:
    """From when until when a delegation of now holds, in seconds since 1970."""
    return max(0, int(now) - CLOCK_SKEW_S), int(now) + lifetime_s


def is_model_name(name: str) -> bool:
    """Whether a model may be called so: lower case, digits and ``._-``, so that it is also the name of a folder."""
    return _MODEL_NAME.fullmatch(name) is not None


def require_model_name(name: str) -> None:
    """Refuse what no model can be called; raises UsageError."""
    if not is_model_name(name):
        raise UsageError(
            f"{name!r} is no name of a model: 1 to {LONGEST_MODEL_NAME} of a-z, 0-9, dot, - and _, "
            "the first a letter or digit"
        )
