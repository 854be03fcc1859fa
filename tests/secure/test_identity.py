"""From the root to a device's prekey, every link holds, and no forged, foreign, revoked or expired one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import permutations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from propolis.protos import identity_pb2 as pb
from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal, TrustError, UsageError
from propolis.secure.identity import (
    Descriptor,
    Invitation,
    Prekey,
    Root,
    Roster,
    Signed,
    SigningKey,
    TrustedRoster,
    agreement_key,
    announce_prekey,
    describe,
    descriptor_digest,
    sign,
    trusted_roster,
    verify,
    verify_descriptor,
    verify_invitation,
    verify_prekey,
)

ROOT, OTHER_ROOT = (Root(SigningKey.generate()) for _ in range(2))
EXPIRY = 1_000_000
SIGNATURE_LABELS = (
    labels.INVITATION,
    labels.DESCRIPTOR,
    labels.ROSTER,
    labels.PREKEY,
    labels.HEAD,
    labels.CONFIRMATION,
)


@dataclass(frozen=True)
class Device:
    """A device with all it has signed."""

    invitation: Invitation
    invitation_key: SigningKey
    signing_key: SigningKey
    descriptor: Signed


def federation(root: Root, names: tuple[str, ...]) -> tuple[Roster, list[Device]]:
    roster, devices = Roster(root.federation, 1, EXPIRY, ()), []
    for name in names:
        roster, signed, key = root.invite(roster, name)
        invitation = verify_invitation(root.public_key, signed)
        signing_key = SigningKey.generate()
        descriptor = describe(invitation, key, signing_key.public, agreement_key()[1])
        devices.append(Device(invitation, key, signing_key, descriptor))
    return roster, devices


ROSTER, (ANN, BEN) = federation(ROOT, ("ann", "ben"))
TRUSTED = TrustedRoster(ROOT.public_key, ROOT.sign_roster(ROSTER))


@contextmanager
def distrust(refusal: Refusal, because: str) -> Iterator[None]:
    with pytest.raises(TrustError, match=because) as caught:
        yield
    assert caught.value.refusal is refusal


def forgeries(signed: Signed) -> Iterator[Signed]:
    """Every single flipped bit, in the payload and in the signature, and some other mischief."""
    for field in ("payload", "signature"):
        valid = getattr(signed, field)
        for bit in range(8 * len(valid)):
            forged = bytearray(valid)
            forged[bit // 8] ^= 1 << bit % 8
            yield replace(signed, **{field: bytes(forged)})
        yield replace(signed, **{field: valid[:-1]})
        yield replace(signed, **{field: valid + b"\0"})
        yield replace(signed, **{field: b""})


def test_root_to_descriptor() -> None:
    assert TRUSTED.number == 3  # 1 and one more with every invitation
    for index, (device, name) in enumerate([(ANN, "ann"), (BEN, "ben")]):
        assert (device.invitation.index, device.invitation.name) == (index, name)
        assert TRUSTED.require_member(index).name == name
        descriptor = TRUSTED.descriptor(device.descriptor)
        assert (descriptor.federation, descriptor.index) == (ROOT.federation, index)
        assert descriptor.signing_key == device.signing_key.public


def verified(prekey: Signed, descriptor: Descriptor) -> Prekey:
    return verify_prekey(prekey, descriptor.federation, descriptor.index, descriptor.signing_key)


def test_descriptor_to_prekey() -> None:
    descriptor = TRUSTED.descriptor(ANN.descriptor)
    signed = announce_prekey(ANN.signing_key, descriptor, 5, agreement_key()[1])
    assert verified(signed, descriptor).number == 5


def test_a_signature_is_over_label_and_payload_as_they_travel() -> None:
    signed = ROOT.sign_roster(ROSTER)
    framed = labels.joined(labels.ROSTER, signed.payload)
    Ed25519PublicKey.from_public_bytes(ROOT.public_key).verify(signed.signature, framed)
    assert pb.Roster.FromString(signed.payload).number == ROSTER.number


def test_a_forged_invitation_is_refused() -> None:
    _, signed, _ = ROOT.invite(ROSTER, "eve")
    verify_invitation(ROOT.public_key, signed)
    for forged in forgeries(signed):
        with distrust(Refusal.IDENTITY, "signature on an invitation does not hold"):
            verify_invitation(ROOT.public_key, forged)


def test_a_forged_roster_is_refused() -> None:
    for forged in forgeries(ROOT.sign_roster(ROSTER)):
        with distrust(Refusal.ROSTER, "signature on a roster does not hold"):
            TrustedRoster(ROOT.public_key, forged)


def test_a_forged_descriptor_is_refused() -> None:
    for forged in forgeries(ANN.descriptor):
        with pytest.raises((TrustError, PeerError)) as caught:
            TRUSTED.descriptor(forged)
        assert isinstance(caught.value, TrustError) or forged.signature == ANN.descriptor.signature
        assert caught.value.refusal in (Refusal.IDENTITY, Refusal.MALFORMED)


def test_a_forged_prekey_is_refused() -> None:
    descriptor = TRUSTED.descriptor(ANN.descriptor)
    for forged in forgeries(announce_prekey(ANN.signing_key, descriptor, 5, agreement_key()[1])):
        with distrust(Refusal.KEYS, "signature on a prekey does not hold"):
            verified(forged, descriptor)


def test_a_descriptor_with_a_key_that_was_not_invited_is_refused() -> None:
    honest = TRUSTED.descriptor(ANN.descriptor)
    for key in (BEN.invitation_key, ANN.signing_key, SigningKey.generate()):
        forged = sign(labels.DESCRIPTOR, key.private, honest, pb.Descriptor)
        with distrust(Refusal.IDENTITY, "signature on a descriptor does not hold"):
            TRUSTED.descriptor(forged)
    moved = sign(labels.DESCRIPTOR, ANN.invitation_key.private, replace(honest, index=1), pb.Descriptor)
    with distrust(Refusal.IDENTITY, "signature on a descriptor does not hold"):
        TRUSTED.descriptor(moved)


@pytest.mark.parametrize(("made", "asked"), permutations(SIGNATURE_LABELS, 2))
def test_a_signature_under_one_label_holds_under_no_other(made: bytes, asked: bytes) -> None:
    key = SigningKey.generate()
    message = Prekey(1, bytes(32))
    signed = sign(made, key.private, message, pb.Prekey)
    assert verify(made, key.public, signed, Prekey, pb.Prekey, Refusal.KEYS) == message
    with distrust(Refusal.KEYS, "does not hold"):
        verify(asked, key.public, signed, Prekey, pb.Prekey, Refusal.KEYS)


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(32), b"\xff" * 32])
def test_what_is_no_key_verifies_nothing(key: bytes) -> None:
    with distrust(Refusal.ROSTER, "does not hold"):
        TrustedRoster(key, ROOT.sign_roster(ROSTER))


def test_a_signed_payload_is_still_bounded() -> None:
    key = SigningKey.generate()
    signed = sign(labels.PREKEY, key.private, Prekey(1, bytes(31)), pb.Prekey)
    with pytest.raises(PeerError, match=r"Prekey\.public_key"):
        verify(labels.PREKEY, key.public, signed, Prekey, pb.Prekey, Refusal.KEYS)


def test_a_revoked_device_is_no_member() -> None:
    revoked = ROSTER.revoking(0)
    assert revoked.number == ROSTER.number + 1
    trusted = TrustedRoster(ROOT.public_key, ROOT.sign_roster(revoked))
    for refused in (lambda: trusted.require_member(0), lambda: trusted.descriptor(ANN.descriptor)):
        with distrust(Refusal.IDENTITY, r"device 0 \(ann\) is revoked"):
            refused()
    assert trusted.descriptor(BEN.descriptor) == TRUSTED.descriptor(BEN.descriptor)


def test_an_expired_roster_is_refused() -> None:
    TRUSTED.require_current(now=EXPIRY)
    with distrust(Refusal.ROSTER, "the roster 3 has expired"):
        TRUSTED.require_current(now=EXPIRY + 0.5)


@pytest.mark.parametrize("index", [2, 2**20 - 1])
def test_an_unknown_index_is_refused(index: int) -> None:
    with distrust(Refusal.IDENTITY, f"device {index} is not in the roster 3"):
        TRUSTED.require_member(index)
    unknown = replace(TRUSTED.descriptor(ANN.descriptor), index=index)
    with distrust(Refusal.IDENTITY, "is not in the roster"):
        TRUSTED.descriptor(sign(labels.DESCRIPTOR, ANN.invitation_key.private, unknown, pb.Descriptor))


def test_two_federations_do_not_mix() -> None:
    roster, (eve,) = federation(OTHER_ROOT, ("eve",))
    _, invitation, _ = OTHER_ROOT.invite(roster, "eve")
    assert OTHER_ROOT.federation != ROOT.federation
    with distrust(Refusal.IDENTITY, "does not hold"):
        verify_invitation(ROOT.public_key, invitation)
    with distrust(Refusal.ROSTER, "does not hold"):
        TrustedRoster(ROOT.public_key, OTHER_ROOT.sign_roster(roster))
    with distrust(Refusal.IDENTITY, "does not hold"):
        TRUSTED.descriptor(eve.descriptor)


def test_what_a_valid_key_signs_must_name_its_own_federation() -> None:
    with distrust(Refusal.ROSTER, "another federation's"):
        TrustedRoster(ROOT.public_key, ROOT.sign_roster(replace(ROSTER, federation=OTHER_ROOT.federation)))
    _, invitation, _ = ROOT.invite(ROSTER, "x")
    assert verify_invitation(ROOT.public_key, invitation).federation == ROOT.federation
    # A root that signs with its own key but claims another federation.
    liar = Root(SigningKey.generate())
    liar.federation = ROOT.federation
    with distrust(Refusal.IDENTITY, "for another federation"):
        verify_invitation(liar.public_key, liar.invite(ROSTER, "x")[1])
    elsewhere = replace(TRUSTED.descriptor(ANN.descriptor), federation=OTHER_ROOT.federation)
    with distrust(Refusal.IDENTITY, "device 0 is of another federation"):
        TRUSTED.descriptor(sign(labels.DESCRIPTOR, ANN.invitation_key.private, elsewhere, pb.Descriptor))


def test_only_the_holder_of_the_invitation_can_describe() -> None:
    for key in (BEN.invitation_key, SigningKey.generate()):
        with pytest.raises(UsageError, match="not that of the invitation"):
            describe(ANN.invitation, key, ANN.signing_key.public, bytes(32))


def test_a_prekey_of_another_device_is_refused() -> None:
    ann, ben = (TRUSTED.descriptor(device.descriptor) for device in (ANN, BEN))
    with distrust(Refusal.KEYS, "does not hold"):
        verified(announce_prekey(BEN.signing_key, ben, 1, bytes(32)), ann)
    with distrust(Refusal.KEYS, "does not hold"):
        verified(announce_prekey(BEN.signing_key, ann, 1, bytes(32)), ann)
    for claimed in (ben, replace(ann, federation=OTHER_ROOT.federation)):
        with distrust(Refusal.KEYS, "does not hold"):
            verified(announce_prekey(ANN.signing_key, claimed, 1, bytes(32)), ann)


def test_digests_stand_for_one_signed_thing() -> None:
    other = TrustedRoster(ROOT.public_key, ROOT.sign_roster(ROSTER.revoking(1)))
    assert len({TRUSTED.digest, other.digest, *map(descriptor_digest, (ANN.descriptor, BEN.descriptor))}) == 4
    assert trusted_roster(ROOT.public_key, TRUSTED.signed).digest == TRUSTED.digest


def test_a_signing_key_is_not_shown() -> None:
    key = SigningKey.generate()
    for text in (repr(key), str(key)):
        assert repr(key.private) not in text
        assert key.private.hex() not in text


def test_keys_are_new_every_time() -> None:
    assert len({SigningKey.generate().private for _ in range(10)} | {agreement_key()[0] for _ in range(10)}) == 20


def test_a_descriptor_says_what_was_described() -> None:
    _, hpke = agreement_key()
    signed = describe(ANN.invitation, ANN.invitation_key, ANN.signing_key.public, hpke)
    assert TRUSTED.descriptor(signed) == Descriptor(ROOT.federation, 0, ANN.signing_key.public, hpke)


def test_an_invitation_says_when_it_ends_and_where_the_root_is() -> None:
    _, signed, _ = ROOT.invite(ROSTER, "new", not_after=EXPIRY, root_online=True)
    invitation = verify_invitation(ROOT.public_key, signed)
    assert (invitation.not_after, invitation.root_online) == (EXPIRY, True)
    assert [invitation.expired(now) for now in (0, EXPIRY, EXPIRY + 0.5)] == [False, False, True]


def test_an_invitation_without_an_end_does_not_expire() -> None:
    _, signed, _ = ROOT.invite(ROSTER, "new")
    invitation = verify_invitation(ROOT.public_key, signed)
    assert not invitation.root_online
    assert not invitation.expired(2.0**62)


def test_a_descriptor_is_its_invitations() -> None:
    assert verify_descriptor(ANN.invitation, ANN.descriptor).index == ANN.invitation.index
    for other in (BEN.invitation, replace(ANN.invitation, public_key=BEN.invitation.public_key)):
        with distrust(Refusal.IDENTITY, "signature on a descriptor does not hold"):
            verify_descriptor(other, ANN.descriptor)
    for moved in (replace(ANN.invitation, index=7), replace(ANN.invitation, federation=bytes(32))):
        with distrust(Refusal.IDENTITY, "for another place"):
            verify_descriptor(moved, ANN.descriptor)


def test_a_roster_that_lasts_longer_is_the_next_one() -> None:
    longer = ROSTER.lasting(EXPIRY + 5)
    assert (longer.number, longer.not_after, longer.entries) == (ROSTER.number + 1, EXPIRY + 5, ROSTER.entries)
