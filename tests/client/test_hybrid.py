"""A device's hybrid key: made once, kept for its owner alone, and announced in the device's own words."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from enrolling import Applicant, Site, enrolling, serving
from releasing import NOW, WEIGHTS, Publisher, flipped, key_for

from propolis.client.enroll import enroll
from propolis.client.hybrid import HYBRID_FILE, announcement_of, load_hybrid_key
from propolis.client.install import Installer
from propolis.client.keyholder import Keyholder
from propolis.client.seal import Seal
from propolis.client.state import FileStore
from propolis.secure.announcement import verify_announcement
from propolis.secure.errors import RefusedError, StorageError, UsageError
from propolis.secure.identity import descriptor_digest
from propolis.secure.kem import hybrid_public
from propolis.server.publish import recipients_of


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "fed")


def announced_by(publisher: Publisher, home: Path, passphrase: bytes | None = None) -> bytes:
    state = publisher.states[0]
    signed = announcement_of(home, passphrase)
    return verify_announcement(state.own_descriptor, descriptor_digest(state.descriptor), signed)


def test_a_device_that_enrolled_before_makes_its_key_when_it_is_asked(publisher: Publisher) -> None:
    home = publisher.on_disk()
    assert Keyholder.load(home).hybrid_private is None
    public = announced_by(publisher, home)
    assert (home / HYBRID_FILE).stat().st_mode & 0o777 == 0o600
    assert announced_by(publisher, home) == public
    private = Keyholder.load(home).hybrid_private
    assert private is not None
    assert hybrid_public(private) == public


def test_what_is_sealed_to_the_announced_key_is_installed_from_the_folder(publisher: Publisher) -> None:
    home = publisher.on_disk()
    recipient = replace(publisher.recipients[0], hybrid_key=announced_by(publisher, home))
    package, _ = publisher.sealed(recipients=[recipient], post_quantum=True)
    installer = Installer(home, Keyholder.load(home))
    installer.install(package, key_for(package), NOW)
    assert installer.open().files["model.onnx"] == WEIGHTS


def test_the_key_owes_nothing_to_the_keys_of_the_state(publisher: Publisher, tmp_path: Path) -> None:
    """Two devices with one state, and the randomness of the system, have two hybrid keys."""
    homes = [tmp_path / "one", tmp_path / "two"]
    for home in homes:
        FileStore.create(home, replace(publisher.states[0], roster=publisher.signed_roster))
        announcement_of(home)
    one, two = (load_hybrid_key(home, None) for home in homes)
    assert one is not None
    assert two is not None
    parts = {key[place : place + 32] for key in (one, two) for place in (0, 32, 64)}
    assert len(parts | {publisher.states[0].hpke_private}) == 7


def test_with_a_passphrase_the_key_is_encrypted(publisher: Publisher, tmp_path: Path) -> None:
    home, secret = tmp_path / "sealed", b"open sesame"
    FileStore.create(home, replace(publisher.states[0], roster=publisher.signed_roster), Seal(secret))
    public = announced_by(publisher, home, secret)
    private = Keyholder.load(home, secret).hybrid_private
    assert private is not None
    assert hybrid_public(private) == public
    content = (home / HYBRID_FILE).read_bytes()
    assert not any(private[place : place + 32] in content for place in (0, 32, 64))
    for seal, line in ((None, "is encrypted: give its passphrase"), (Seal(b"open barley"), "wrong passphrase")):
        with pytest.raises(StorageError, match=line):
            load_hybrid_key(home, seal)


def test_a_key_that_others_may_read_or_that_is_damaged_is_told_and_kept(publisher: Publisher) -> None:
    home = publisher.on_disk()
    announcement_of(home)
    path = home / HYBRID_FILE
    whole = path.read_bytes()
    path.chmod(0o644)
    with pytest.raises(UsageError, match="others may read"):
        announcement_of(home)
    path.chmod(0o600)
    flips = [flipped(whole, place) for place in (0, 20, 100, 140)]
    for data in (b"", whole[:-1], whole + b"\0", *flips):
        path.write_bytes(data)
        with pytest.raises(StorageError, match="is damaged: it holds no hybrid key"):
            announcement_of(home)
        assert path.read_bytes() == data


def test_asked_by_many_at_once_a_device_has_one_key(publisher: Publisher) -> None:
    home = publisher.on_disk()
    with ThreadPoolExecutor(8) as threads:
        said = list(threads.map(lambda _: announcement_of(home), range(16)))
    assert len(set(said)) == 1


def test_a_device_announces_its_key_when_it_enrols(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "device"
    with serving(site) as address:
        enroll(enrolling(address, site.token(), folder))
    assert site.membership.announced(0) == announcement_of(folder)
    (recipient,) = recipients_of(site.membership)
    private = Keyholder.load(folder).hybrid_private
    assert private is not None
    assert recipient.hybrid_key == hybrid_public(private)
    assert all(private[at : at + 32] not in site.asked[-1].SerializeToString() for at in (0, 32, 64))


def test_without_ml_kem_a_device_enrols_without_a_hybrid_key(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("secure.kem", "client.enroll"):
        monkeypatch.setattr(f"propolis.{module}.has_hybrid", lambda: False)
    folder = tmp_path / "device"
    with serving(site) as address:
        enroll(enrolling(address, site.token(), folder))
    assert not (folder / HYBRID_FILE).exists()
    assert site.membership.announced(0) is None
    with pytest.raises(UsageError, match="need cryptography with ML-KEM"):
        announcement_of(folder)


def test_a_server_without_ml_kem_lets_devices_in(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Applicant(site.token())
    request = device.request()
    request.announcement.CopyFrom(announcement_for(device))
    for module in ("secure.kem", "server.enroll"):
        monkeypatch.setattr(f"propolis.{module}.has_hybrid", lambda: False)
    site.enrolment.answer(request, NOW)
    assert site.membership.enrolled(0) == device.state.descriptor
    assert site.membership.announced(0) is None


def announcement_for(device: Applicant) -> object:
    from propolis.protos import identity_pb2
    from propolis.secure.announcement import announce
    from propolis.secure.kem import hybrid_key
    from propolis.secure.wire import fill

    state, filled = device.state, identity_pb2.Signed()
    signed = announce(state.signing_key, state.own_descriptor.federation, state.descriptor, hybrid_key()[1])
    fill(signed, filled)
    return filled


def test_a_device_whose_announcement_does_not_hold_is_not_let_in(site: Site) -> None:
    device, other = Applicant(site.token("one")), Applicant(site.token("two"))
    request = device.request()
    request.announcement.CopyFrom(announcement_for(other))
    with pytest.raises(RefusedError, match="the signature on an announcement does not hold"):
        site.enrolment.answer(request, NOW)
    assert site.membership.enrolled(0) is None


def test_a_device_that_enrols_again_cannot_change_its_key(site: Site) -> None:
    device = Applicant(site.token())
    for number in range(2):
        request = device.request()
        request.announcement.CopyFrom(announcement_for(device))
        if number == 0:
            site.enrolment.answer(request, NOW)
            site.enrolment.answer(request, NOW)
            continue
        with pytest.raises(RefusedError, match="has announced another hybrid key before"):
            site.enrolment.answer(request, NOW)
