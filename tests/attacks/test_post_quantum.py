"""Packages sealed to hybrid keys: a server can neither choose a device's key nor weaken what is sealed to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from attacks.test_packages import refused
from enrolling import Applicant, Site
from releasing import NOW, WEIGHTS, Publisher, flipped, key_for, manifest_of, parts_of, rewritten, signed_by

from propolis.package import Package
from propolis.protos import identity_pb2, model_pb2
from propolis.secure import labels
from propolis.secure.announcement import Announcement, announce, verify_announcement
from propolis.secure.content import wrap_key
from propolis.secure.errors import PeerError, Refusal, RefusedError, TrustError, UsageError
from propolis.secure.identity import Signed, SigningKey, descriptor_digest, sign
from propolis.secure.kem import Kem, hybrid_key
from propolis.secure.wire import encode
from propolis.server.membership import Membership
from propolis.server.publish import recipients_of


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "fed")


# The package.


def test_a_package_for_hybrid_keys_opens_for_each_device_and_stays_open(publisher: Publisher) -> None:
    package = publisher.seal(post_quantum=True)
    assert manifest_of(package).kem == Kem.MLKEM768_X25519
    for index in range(3):
        device = publisher.device(index)
        device.install(package, key_for(package, index), NOW)
        assert device.open().files["model.onnx"] == WEIGHTS


def test_a_device_cannot_open_the_hybrid_key_of_another(publisher: Publisher) -> None:
    package, key = publisher.seal(post_quantum=True), key_for(publisher.seal(post_quantum=True), 1)
    refused(publisher.device(0), package, Refusal.PACKAGE, key)
    refused(publisher.device(0), package, Refusal.PACKAGE, key_for(package, 1))
    refused(publisher.device(0), package, Refusal.PACKAGE, replace(key_for(package, 1), index=0))


def test_a_device_with_the_same_hybrid_key_but_another_descriptor_opens_nothing(publisher: Publisher) -> None:
    publisher.hybrid[1] = publisher.hybrid[0]
    package = publisher.seal(post_quantum=True)
    refused(publisher.device(0), package, Refusal.PACKAGE, key_for(package, 1))


def test_one_flipped_bit_in_a_key_for_a_hybrid_key_is_refused(publisher: Publisher) -> None:
    package = publisher.seal(post_quantum=True)
    key, device = key_for(package), publisher.device()
    for place in (*range(0, len(key.sealed), 37), len(key.sealed) - 1):
        refused(device, package, Refusal.PACKAGE, replace(key, sealed=flipped(key.sealed, place)))


def test_keys_for_x25519_are_none_for_a_package_that_says_hybrid_and_the_other_way_round(publisher: Publisher) -> None:
    """Not even from who knows the content key, as when a server would have recorded packages open one day."""
    recipient = publisher.recipients[0]
    for sequence, (post_quantum, other) in enumerate(((True, Kem.X25519), (False, Kem.MLKEM768_X25519)), start=1):
        package, sealed = publisher.sealed(sequence, post_quantum=post_quantum)
        digest, public = sealed.release.digest, recipient.key_for(other)
        key = wrap_key(sealed.content_key, digest, 0, recipient.descriptor, public, other)
        message = refused(publisher.device(), package, Refusal.PACKAGE, key)
        assert "not sealed in the way that the manifest says" in message


@pytest.mark.parametrize("kem", [1, 2, 3])
def test_which_kind_of_key_is_signed(publisher: Publisher, kem: int) -> None:
    """A package whose manifest says another kind than was signed, or one that nobody knows, is refused."""
    package = publisher.seal(post_quantum=kem == 1)
    header, _ = parts_of(package)
    payload = encode(replace(manifest_of(package), kem=kem), model_pb2.Manifest)
    changed = rewritten(package, manifest=replace(header.manifest, payload=payload))
    refused(publisher.device(), changed, Refusal.RELEASE_KEY, key_for(package))


def test_a_kind_of_key_that_nobody_knows_is_refused_although_it_is_signed(publisher: Publisher) -> None:
    package = publisher.seal()
    manifest = replace(manifest_of(package), kem=3)
    unknown = rewritten(package, manifest=signed_by(publisher.key.key, manifest))
    assert "Manifest.kem: expected 1 to 2" in refused(publisher.device(), unknown, Refusal.MALFORMED, key_for(package))


def test_a_device_without_a_hybrid_key_says_so(publisher: Publisher) -> None:
    package, device = publisher.seal(post_quantum=True), publisher.device()
    device._device = replace(publisher.keyholder(), hybrid_private=None)
    with pytest.raises(UsageError, match=r"sealed to a post-quantum key, and this device has none \(hybrid.key\)"):
        device.install(package, key_for(package), NOW)


def test_a_package_for_x25519_is_what_it_was_before_there_was_another_kind(publisher: Publisher) -> None:
    package = publisher.seal()
    with Package.open(package) as opened:
        assert not model_pb2.Manifest.FromString(opened.release.manifest.payload).HasField("kem")
    device = publisher.device()
    device._device = replace(publisher.keyholder(), hybrid_private=None)
    device.install(package, key_for(package), NOW)
    assert device.open().files["model.onnx"] == WEIGHTS


# Who is sealed to.


def test_devices_without_a_hybrid_key_are_left_out_and_can_be_given_the_key_later(publisher: Publisher) -> None:
    one, two, three = publisher.recipients
    without = replace(two, hybrid_key=None)
    package, sealed = publisher.sealed(recipients=[one, without, three], post_quantum=True)
    assert [key_for(package, index).index for index in (0, 2)] == [0, 2]
    with pytest.raises(PeerError, match="no key for device 1"):
        key_for(package, 1)
    with pytest.raises(UsageError, match="device 1 has announced no post-quantum key"):
        sealed.wrap(without)
    device = publisher.device(1)
    device.install(package, sealed.wrap(two), NOW)
    assert device.open().files["model.onnx"] == WEIGHTS


def test_where_nobody_has_a_hybrid_key_nothing_is_sealed(publisher: Publisher) -> None:
    nobody = [replace(recipient, hybrid_key=None) for recipient in publisher.recipients]
    for recipients in (nobody, []):
        with pytest.raises(UsageError, match="no device has announced a post-quantum key"):
            publisher.sealed(recipients=recipients, post_quantum=True)
    assert not list(publisher.folder.rglob("package*"))


# What a device announces.


def announced(publisher: Publisher, signed: Signed, index: int = 0) -> bytes:
    state = publisher.states[index]
    return verify_announcement(state.own_descriptor, descriptor_digest(state.descriptor), signed)


def test_what_a_device_announces_is_its_key(publisher: Publisher) -> None:
    assert announced(publisher, publisher.announcement()) == publisher.hybrid[0][1]
    assert publisher.announcement() == publisher.announcement()


def test_an_announcement_of_another_device_federation_or_key_is_refused(publisher: Publisher) -> None:
    state, (_, public) = publisher.states[0], publisher.hybrid[0]
    key, federation, descriptor = state.signing_key, publisher.root.federation, state.descriptor
    for signed, line in (
        (publisher.announcement(1), "signature on an announcement does not hold"),
        (announce(SigningKey.generate(), federation, descriptor, public), "signature on an announcement does not hold"),
        (announce(key, bytes(32), descriptor, public), "device 0 is for another federation"),
        (announce(key, federation, publisher.states[1].descriptor, public), "device 0 is for another descriptor"),
        (announce(key, federation, descriptor, public[:1184] + bytes(32)), "of low order or not canonical"),
        (announce(key, federation, descriptor, b"\xff" * 1184 + public[1184:]), "a hybrid key that is none"),
    ):
        with pytest.raises(TrustError, match=line) as caught:
            announced(publisher, signed)
        assert caught.value.refusal is Refusal.KEYS


def test_what_a_device_has_signed_for_another_purpose_announces_nothing(publisher: Publisher) -> None:
    state, (_, public) = publisher.states[0], publisher.hybrid[0]
    said = Announcement(publisher.root.federation, descriptor_digest(state.descriptor), public)
    for label in (labels.PREKEY, labels.DESCRIPTOR, labels.HYBRID_KEY):
        with pytest.raises(TrustError, match="does not hold"):
            announced(publisher, sign(label, state.signing_key.private, said, model_pb2.Announcement))


def test_one_flipped_bit_in_an_announcement_is_refused(publisher: Publisher) -> None:
    signed = publisher.announcement()
    for place in (*range(0, len(signed.payload), 41), len(signed.payload) - 1):
        with pytest.raises(RefusedError):
            announced(publisher, replace(signed, payload=flipped(signed.payload, place)))
    for place in (0, 63):
        with pytest.raises(TrustError):
            announced(publisher, replace(signed, signature=flipped(signed.signature, place)))


# What a server does with it.


def enrolled(site: Site, count: int = 2) -> list[Applicant]:
    devices = [Applicant(site.token(f"device-{index}")) for index in range(count)]
    site.membership.refresh()
    for index, device in enumerate(devices):
        site.membership.admit(index, device.state.descriptor)
    return devices


def statement(device: Applicant, public: bytes | None = None) -> Signed:
    state = device.state
    return announce(state.signing_key, state.own_descriptor.federation, state.descriptor, public or hybrid_key()[1])


def hybrid_file(site: Site, index: int) -> Path:
    return site.server / "enrolled" / f"{index}.hybrid"


def test_a_device_announces_one_key_for_life(site: Site) -> None:
    device, _ = enrolled(site)
    first = statement(device)
    assert site.membership.announced(0) is None
    for membership in (site.membership, site.membership, Membership(site.server)):
        membership.announce(0, first)
    with pytest.raises(TrustError, match="device 0 has announced another hybrid key before"):
        site.membership.announce(0, statement(device))
    assert Membership(site.server).announced(0) == first
    assert hybrid_file(site, 0).stat().st_mode & 0o777 == 0o600


def test_only_a_member_announces_and_only_for_itself(site: Site) -> None:
    one, other = enrolled(site)
    site.token("absent")
    site.federation.revoke("device-1")
    site.membership.refresh()
    for index, signed, line in (
        (0, statement(other), "the signature on an announcement does not hold"),
        (1, statement(other), r"device 1 \(device-1\) is revoked"),
        (2, statement(one), "device 2 has not enrolled"),
        (3, statement(one), "device 3 is not in the roster"),
    ):
        with pytest.raises(TrustError, match=line):
            site.membership.announce(index, signed)
    assert not list(site.server.rglob("*.hybrid"))


def of_the_server(site: Site, devices: list[Applicant]) -> Signed:
    """A key of the server's own, with the device's descriptor."""
    state = devices[0].state
    return announce(SigningKey.generate(), state.own_descriptor.federation, state.descriptor, hybrid_key()[1])


def of_another_device(site: Site, devices: list[Applicant]) -> Signed:
    return statement(devices[1])


def for_another_descriptor(site: Site, devices: list[Applicant]) -> Signed:
    """As when a device has enrolled again with the same signing key."""
    state = devices[0].state
    federation, descriptor = state.own_descriptor.federation, devices[1].state.descriptor
    return announce(state.signing_key, federation, descriptor, hybrid_key()[1])


@pytest.mark.parametrize("swapped", [of_the_server, of_another_device, for_another_descriptor])
def test_a_hybrid_key_that_the_server_swaps_is_not_sealed_to(
    site: Site, swapped: Callable[[Site, list[Applicant]], Signed]
) -> None:
    devices = enrolled(site)
    site.membership.announce(0, statement(devices[0]))
    hybrid_file(site, 0).write_bytes(encode(swapped(site, devices), identity_pb2.Signed))
    with pytest.raises(TrustError, match=r"does not hold|another descriptor"):
        recipients_of(site.membership)


def test_recipients_come_with_the_keys_that_they_have_announced(site: Site) -> None:
    one, _ = enrolled(site)
    _, public = hybrid_key()
    site.membership.announce(0, statement(one, public))
    first, second = recipients_of(site.membership)
    assert (first.hybrid_key, second.hybrid_key) == (public, None)
    hybrid_file(site, 0).write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"enrolled/0\.hybrid is damaged"):
        recipients_of(site.membership)
