"""A key is believed because the root says who makes keys, and opens on the device that it was sealed for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from encrypting import FEDERATION, adder, encryptor, key_of, scheme
from hypothesis import given
from hypothesis import strategies as st

from propolis.protos import he_pb2 as pb
from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.he.bfv import Scheme
from propolis.secure.he.keys import (
    LARGEST_MATERIAL,
    Holder,
    Material,
    SealedKey,
    Secret,
    delegate_holder,
    make_key,
    open_key,
    read_material,
    seal_key,
    state_key,
    verify_holder,
    verify_key,
)
from propolis.secure.identity import Root, Roster, SigningKey, TrustedRoster, agreement_key, sign
from propolis.secure.release import CLOCK_SKEW_S, delegate
from propolis.secure.wire import decode, encode

ROOT, HOLDER_KEY = Root(SigningKey.generate()), SigningKey.generate()
ROSTER = Roster(ROOT.federation, 1, 2**40, ())
NOW = 10_000.5
DESCRIPTOR = bytes(range(32, 64))
PRIVATE, PUBLIC = agreement_key()

both_modes = pytest.mark.parametrize("seeded", [False, True], ids=["public", "seeded"])


def trusted(roster: Roster = ROSTER, root: Root = ROOT) -> TrustedRoster:
    return TrustedRoster(root.public_key, root.sign_roster(roster))


def verified(now: float = NOW, roster: Roster = ROSTER, root: Root = ROOT) -> Holder:
    signed = delegate_holder(ROOT, 7, HOLDER_KEY.public, NOW, 60)
    return verify_holder(root.public_key, trusted(roster, root), signed, now)


def test_the_root_says_who_makes_keys_and_when() -> None:
    holder = verified()
    assert (holder.serial, holder.public_key) == (7, HOLDER_KEY.public)
    assert (holder.not_before, holder.not_after) == (10_000 - CLOCK_SKEW_S, 10_060)
    for now in (10_000 - CLOCK_SKEW_S, 10_060):
        verified(now)
    for now, reason in ((10_000 - CLOCK_SKEW_S - 1, "is not valid yet"), (10_060.5, "has expired")):
        with pytest.raises(TrustError, match=f"the key holder 7 {reason}") as caught:
            verified(now)
        assert caught.value.refusal is Refusal.HE_KEY


def test_a_holder_is_revoked_by_its_serial() -> None:
    verified(roster=ROSTER.revoking_release(6))
    with pytest.raises(TrustError, match="the key holder 7 is revoked"):
        verified(roster=ROSTER.revoking_release(7))


def test_another_root_and_other_statements_name_no_holder() -> None:
    other = Root(SigningKey.generate())
    with pytest.raises(TrustError, match="does not hold"):
        verified(root=other, roster=Roster(other.federation, 1, 2**40, ()))
    release_key = delegate(ROOT, 7, HOLDER_KEY.public, NOW, 60)
    with pytest.raises(TrustError, match="does not hold") as caught:
        verify_holder(ROOT.public_key, trusted(), release_key, NOW)
    assert caught.value.refusal is Refusal.HE_KEY
    # What the root signs for another federation is not for this one.
    elsewhere = sign(labels.HE_HOLDER, ROOT.key.private, replace(verified(), federation=bytes(32)), pb.Holder)
    with pytest.raises(TrustError, match="another federation"):
        verify_holder(ROOT.public_key, trusted(), elsewhere, NOW)


@both_modes
def test_the_holder_says_which_key_is_the_federations(seeded: bool) -> None:
    key, _ = make_key(ROOT.federation, scheme(seeded=seeded))
    signed = state_key(HOLDER_KEY, key, 3)
    assert verify_key(verified(), signed, key) == 3
    again = read_material(ROOT.federation, key.material)
    assert again == key
    assert verify_key(verified(), signed, again) == 3


def test_no_other_key_is_believed() -> None:
    made = scheme(seeded=True)
    key, other = (make_key(ROOT.federation, made)[0] for _ in range(2))
    signed = state_key(HOLDER_KEY, key, 3)
    with pytest.raises(TrustError, match="of another key") as caught:
        verify_key(verified(), signed, other)
    assert caught.value.refusal is Refusal.HE_KEY
    with pytest.raises(TrustError, match="does not hold"):
        verify_key(verified(), state_key(SigningKey.generate(), key, 3), key)
    with pytest.raises(TrustError, match="does not hold"):
        verify_key(verified(), delegate_holder(ROOT, 7, HOLDER_KEY.public, NOW, 60), key)
    # The same material in another federation is another key.
    elsewhere = read_material(FEDERATION, key.material)
    assert elsewhere.key_id != key.key_id
    with pytest.raises(TrustError, match="of another key"):
        verify_key(verified(), signed, elsewhere)
    with pytest.raises(TrustError, match="of another key"):
        verify_key(verified(), state_key(HOLDER_KEY, elsewhere, 3), elsewhere)


def test_a_holder_says_of_a_key_that_it_is_for_masks_and_nobody_else_does() -> None:
    made = scheme(seeded=True)
    key, _ = make_key(ROOT.federation, made, masked=True)
    assert key.masked
    plain, _ = make_key(ROOT.federation, made)
    assert not plain.masked
    assert "masked" not in {field.name for field, _ in pb.Material.FromString(plain.material).ListFields()}
    other = read_material(ROOT.federation, changed(key.material, masked=False))
    assert (other.masked, replace(other, material=key.material, masked=True)) == (False, key)
    with pytest.raises(TrustError, match="of another key"):
        verify_key(verified(), state_key(HOLDER_KEY, key, 3), other)


def changed(material: bytes, **changes: object) -> bytes:
    return encode(replace(decode(Material, material, pb.Material), **changes), pb.Material)  # type: ignore[arg-type]


def test_material_that_does_not_fit_together_is_refused() -> None:
    public, seeded = (make_key(FEDERATION, scheme(seeded=each))[0] for each in (False, True))
    for data, reason in (
        (changed(public.material, clients=11), "would not choose"),
        (changed(public.material, value_bits=15), "would not choose"),
        (changed(public.material, seeded=True), "would not choose"),
        (changed(public.material, parameters=bytes(32)), "would not choose"),
        (changed(public.material, public_key=b""), "a public key of 0 bytes"),
        (changed(public.material, public_key=public.public_key[:-1]), "a public key of"),
        (changed(seeded.material, public_key=b"x"), "a public key of 1 bytes"),
        (changed(seeded.material, clients=0), "expected 1 to"),
        (changed(seeded.material, value_bits=33), "expected 1 to"),
        (changed(seeded.material, version=2), "expected 1 to 1"),
        (public.material + b"\x90\x03\x01", "canonical"),
        (bytes(LARGEST_MATERIAL + 1), "public material of"),
        (b"", "expected"),
    ):
        with pytest.raises(PeerError, match=reason):
            read_material(FEDERATION, data)


@given(st.binary(max_size=300))
def test_random_bytes_are_no_material(data: bytes) -> None:
    with pytest.raises(PeerError):
        read_material(FEDERATION, data)
    with pytest.raises((PeerError, TrustError)):
        open_key(data, key_of(scheme(seeded=True))[0], DESCRIPTOR, PRIVATE)


@both_modes
def test_a_device_opens_what_was_sealed_for_it(seeded: bool) -> None:
    made = scheme(seeded=seeded)
    key, secret = key_of(made)
    sealed = seal_key(key, secret, 4, DESCRIPTOR, PUBLIC)
    opened = open_key(sealed, key, DESCRIPTOR, PRIVATE)
    assert opened == secret
    slots = np.arange(made.parameters.degree, dtype=np.uint64)
    data = encryptor(made).encrypt(slots)[0]
    np.testing.assert_array_equal(made.decryptor(opened.secret_key, key.key_id).decrypt(data), slots)
    assert secret.secret_key not in sealed
    assert secret.mac_key not in sealed


def test_nobody_else_opens_it_and_nothing_else_is_opened() -> None:
    made = scheme(seeded=True)
    (key, secret), (other, other_secret) = key_of(made), key_of(made, 1)
    sealed = seal_key(key, secret, 4, DESCRIPTOR, PUBLIC)
    damaged = bytearray(sealed)
    damaged[-1] ^= 1
    renamed = encode(replace(decode(SealedKey, sealed, pb.SealedKey), key_id=other.key_id), pb.SealedKey)
    elsewhere = read_material(ROOT.federation, key.material)
    moved = encode(replace(decode(SealedKey, sealed, pb.SealedKey), key_id=elsewhere.key_id), pb.SealedKey)
    for data, expected, descriptor, private, reason in (
        (sealed, key, DESCRIPTOR, agreement_key()[0], "does not open"),
        (sealed, key, bytes(32), PRIVATE, "does not open"),
        (bytes(damaged), key, DESCRIPTOR, PRIVATE, "does not open"),
        (sealed, other, DESCRIPTOR, PRIVATE, "another one"),
        (renamed, other, DESCRIPTOR, PRIVATE, "does not open"),
        (moved, elsewhere, DESCRIPTOR, PRIVATE, "does not open"),
        (seal_key(key, other_secret, 4, DESCRIPTOR, PUBLIC), key, DESCRIPTOR, PRIVATE, "commits to"),
        (seal_key(key, Secret(bytes(32), secret.secret_key), 4, DESCRIPTOR, PUBLIC), key, DESCRIPTOR, PRIVATE, "commi"),
    ):
        with pytest.raises(TrustError, match=reason) as caught:
            open_key(data, expected, descriptor, private)
        assert caught.value.refusal is Refusal.HE_KEY


def residues_of(made: Scheme, packed: bytes) -> list[bytes]:
    """Pieces of a packed key that are long enough not to be anywhere by chance."""
    return [packed[at : at + 16] for at in range(0, len(packed), len(packed) // 64)]


@both_modes
def test_public_material_opens_nothing(seeded: bool) -> None:
    """A server has the material and every byte that devices send; the key is in none of them."""
    made = scheme(seeded=seeded)
    key, secret = key_of(made)
    slots = np.random.default_rng(0).integers(0, made.parameters.plain_modulus, made.parameters.degree, np.uint64)
    adds = adder(made)
    sent = [encryptor(made).encrypt(slots)[0] for _ in range(2)]
    total = adds.write(adds.add(*(adds.read(data) for data in sent)))
    for public in (key.material, *sent, total):
        assert secret.mac_key not in public
        assert not any(piece in public for piece in residues_of(made, secret.secret_key))
    # Whatever key a server makes for itself shows noise, and so does the public key in place of the secret one.
    own = make_key(FEDERATION, made)[1].secret_key
    guesses = [own]
    if not seeded:
        half = len(key.public_key) // 2
        guesses += [key.public_key[:half], key.public_key[half:]]
    for guess in guesses:
        decryptor = made.decryptor(guess, key.key_id)
        assert decryptor.noise_budget(total) == 0
        right = (slots.astype(object) * 2 % made.parameters.plain_modulus).astype(np.uint64)
        assert np.count_nonzero(decryptor.decrypt(total) == right) < 3


def test_secrets_have_no_repr() -> None:
    _, secret = key_of(scheme(seeded=True))
    assert "mac_key" not in repr(secret)
    assert not hasattr(key_of(scheme(seeded=True))[0], "mac_key")
