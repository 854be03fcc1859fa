"""What a server, a network or a lost release key can do to packages: nothing but keep them back."""

from __future__ import annotations

import hashlib
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from releasing import (
    DAY_S,
    FILES,
    GOLDEN,
    NOW,
    WEIGHTS,
    Publisher,
    flipped,
    key_for,
    manifest_of,
    parts_of,
    release_key,
    rewritten,
    signed_by,
)

from propolis.client.install import Installer, Status
from propolis.link.delivery import Outcome
from propolis.package import Package
from propolis.secure.content import WrappedKey, ciphertext_digest, wrap_key
from propolis.secure.envelope import SEALED_CHUNK_BYTES
from propolis.secure.errors import PeerError, Refusal, RefusedError, StorageError, TrustError, UsageError
from propolis.secure.identity import Root, SigningKey
from propolis.secure.manifest import Kind, Trial, sign_manifest

OTHER = {"model.onnx": (b"other weights", Kind.ONNX)}


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


def refused(
    device: Installer, package: Path, refusal: Refusal, key: WrappedKey | None = None, at: float = NOW, **options: Any
) -> str:
    """Why a device refuses a package; what it had installed before is what it has."""
    before = installed(device)
    with pytest.raises(RefusedError) as caught:
        device.install(package, key or key_for(package), at, **options)
    assert caught.value.refusal is refusal, caught.value
    assert installed(device) == before
    return str(caught.value)


def installed(device: Installer) -> bytes | None:
    try:
        return device.open("digits").files["model.onnx"]
    except UsageError:
        return None


# What is changed on the way.


def test_one_flipped_bit_in_the_ciphertext_is_refused(publisher: Publisher) -> None:
    package = publisher.seal()
    _, body = parts_of(package)
    for place in (0, SEALED_CHUNK_BYTES - 1, SEALED_CHUNK_BYTES, len(body) - 1):
        message = refused(
            publisher.device(), rewritten(package, flipped(body, place)), Refusal.PACKAGE, key_for(package)
        )
        assert f"chunk {place // SEALED_CHUNK_BYTES} of the package is not what was released" in message


def test_a_flipped_bit_is_refused_although_its_digest_was_signed(publisher: Publisher) -> None:
    """A publisher's machine that changes the ciphertext, and has a manifest signed that fits: the seal itself holds."""
    package, sealed = publisher.sealed()
    header, body = parts_of(package)
    digests, body = header.chunk_digests, flipped(body, 5)
    digests = hashlib.sha256(body[:SEALED_CHUNK_BYTES]).digest() + digests[32:]
    manifest = replace(sealed.manifest, ciphertext_digest=ciphertext_digest(digests))
    forged = rewritten(package, body, manifest=sign_manifest(manifest, publisher.key.key), chunk_digests=digests)
    assert "chunk 0 of 2 does not open" in refused(
        publisher.device(), forged, Refusal.PACKAGE, rewrap(publisher, forged, sealed.content_key)
    )


def test_files_that_are_not_those_of_the_manifest_are_refused(publisher: Publisher) -> None:
    package, sealed = publisher.sealed()
    one, other = sealed.manifest.files
    swapped = publisher.forged(package, files=(replace(one, digest=other.digest), other))
    key = rewrap(publisher, swapped, sealed.content_key)
    assert "model.onnx is not what the manifest says" in refused(publisher.device(), swapped, Refusal.PACKAGE, key)


def rewrap(publisher: Publisher, package: Path, content_key: bytes, index: int = 0) -> WrappedKey:
    recipient = publisher.recipients[index]
    with Package.open(package) as opened:
        return wrap_key(content_key, opened.release.digest, index, recipient.descriptor, recipient.hpke_key)


@pytest.mark.parametrize("statement", ["manifest", "delegation"])
@pytest.mark.parametrize("part", ["payload", "signature"])
def test_one_flipped_bit_in_what_is_signed_is_refused(publisher: Publisher, statement: str, part: str) -> None:
    package = publisher.seal()
    signed = getattr(parts_of(package)[0], statement)
    for place in (0, len(getattr(signed, part)) // 2, len(getattr(signed, part)) - 1):
        forged = replace(signed, **{part: flipped(getattr(signed, part), place)})
        message = refused(
            publisher.device(), rewritten(package, **{statement: forged}), Refusal.RELEASE_KEY, key_for(package)
        )
        assert f"the signature on a {statement} does not hold" in message


def test_one_flipped_bit_in_a_wrapped_key_is_refused(publisher: Publisher) -> None:
    package = publisher.seal()
    key = key_for(package)
    for place in range(len(key.sealed)):
        forged = replace(key, sealed=flipped(key.sealed, place))
        refused(publisher.device(), package, Refusal.PACKAGE, forged)


def test_other_digests_of_chunks_than_were_signed_are_refused(publisher: Publisher) -> None:
    package = publisher.seal()
    header, body = parts_of(package)
    body = flipped(body, 0)
    digests = hashlib.sha256(body[:SEALED_CHUNK_BYTES]).digest() + header.chunk_digests[32:]
    forged = rewritten(package, body, chunk_digests=digests)
    assert "digests of the chunks are not" in refused(publisher.device(), forged, Refusal.PACKAGE, key_for(package))


def test_chunks_that_are_cut_off_added_or_moved_are_refused(publisher: Publisher) -> None:
    package = publisher.seal()
    _, body = parts_of(package)
    first, second = body[:SEALED_CHUNK_BYTES], body[SEALED_CHUNK_BYTES:]
    for changed in (first, body[:-1], b"", body + b"\0", body + first, second + first, first + first[: len(second)]):
        refused(publisher.device(), rewritten(package, changed), Refusal.PACKAGE, key_for(package))


def test_a_file_that_shrinks_or_grows_while_it_is_read_is_refused(publisher: Publisher) -> None:
    package = publisher.seal()
    with Package.open(package) as opened:
        manifest = manifest_of(package)
        opened.require_whole(manifest)
        whole = package.read_bytes()
        package.write_bytes(whole[: -len(whole) // 2])
        with pytest.raises(TrustError):
            list(opened.chunks())
        package.write_bytes(whole + whole)
        with pytest.raises(TrustError):
            list(opened.chunks())


# Who it is from, and whom it is for.


def test_a_package_of_another_federation_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    package = Publisher(tmp_path / "other").seal()
    refused(publisher.device(), package, Refusal.RELEASE_KEY)


def test_a_manifest_for_another_federation_is_refused_although_the_key_is_good(publisher: Publisher) -> None:
    forged = publisher.forged(publisher.seal(), federation=bytes(32))
    assert "another federation" in refused(publisher.device(), forged, Refusal.PACKAGE, key_for(publisher.seal(2)))


def test_a_delegation_for_another_federation_is_refused_although_the_root_signed_it(publisher: Publisher) -> None:
    package = publisher.seal()
    elsewhere = Root(SigningKey.generate())
    elsewhere.key, elsewhere.federation = publisher.root.key, elsewhere.federation
    key = release_key(elsewhere)
    manifest = signed_by(key.key, replace(manifest_of(package), federation=elsewhere.federation))
    forged = rewritten(package, delegation=key.delegation, manifest=manifest)
    message = refused(publisher.device(), forged, Refusal.RELEASE_KEY, key_for(package))
    assert "another federation" in message


def test_a_package_of_another_model_is_refused(publisher: Publisher) -> None:
    package = publisher.seal(name="faces")
    device = publisher.device()
    assert "expected digits" in refused(device, package, Refusal.PACKAGE, name="digits")
    device.install(package, key_for(package), NOW)
    assert installed(device) is None
    assert device.open("faces").files["model.onnx"] == WEIGHTS


def test_a_release_key_releases_only_its_models(publisher: Publisher) -> None:
    package = publisher.seal()
    narrow = release_key(publisher.root, models=("faces", "voices"))
    forged = rewritten(package, delegation=narrow.delegation, manifest=signed_by(narrow.key, manifest_of(package)))
    assert "not for digits" in refused(publisher.device(), forged, Refusal.RELEASE_KEY, key_for(package))


def test_a_key_that_the_root_did_not_delegate_is_refused(publisher: Publisher) -> None:
    package, stranger = publisher.seal(), SigningKey.generate()
    own = release_key(Root(stranger))
    for delegation in (own.delegation, parts_of(package)[0].delegation):
        forged = rewritten(package, delegation=delegation, manifest=signed_by(own.key, manifest_of(package)))
        refused(publisher.device(), forged, Refusal.RELEASE_KEY, key_for(package))


def test_a_release_key_is_good_in_its_time_only(publisher: Publisher) -> None:
    package = publisher.seal(expires=NOW + 1000 * DAY_S)
    late, early = NOW + 91 * DAY_S, NOW - DAY_S
    assert "has expired" in refused(publisher.device(), package, Refusal.RELEASE_KEY, at=late)
    assert "not valid yet" in refused(publisher.device(), package, Refusal.RELEASE_KEY, at=early)
    publisher.device().install(package, key_for(package), NOW + 89 * DAY_S)


def test_a_revoked_release_key_is_refused_also_for_what_is_installed(publisher: Publisher) -> None:
    package = publisher.seal()
    publisher.device().install(package, key_for(package), NOW)
    publisher.roster = publisher.roster.revoking_release(1)
    device = publisher.device()
    with pytest.raises(UsageError, match="release key 1 is revoked"):
        device.open()
    refused(device, package, Refusal.RELEASE_KEY)


def test_a_device_whose_roster_has_ended_installs_nothing(publisher: Publisher) -> None:
    """Else a server could keep a revocation back for ever."""
    package = publisher.seal(expires=NOW + 5000 * DAY_S, key=release_key(publisher.root, lifetime_s=5000 * DAY_S))
    refused(publisher.device(), package, Refusal.ROSTER, at=NOW + 4000 * DAY_S)


def test_a_device_cannot_open_the_key_of_another(publisher: Publisher) -> None:
    package = publisher.seal()
    theirs = key_for(package, 1)
    assert "another device's" in refused(publisher.device(), package, Refusal.PACKAGE, theirs)
    refused(publisher.device(), package, Refusal.PACKAGE, replace(theirs, index=0))


def test_a_package_that_is_not_for_a_device_has_no_key_for_it(publisher: Publisher) -> None:
    package, _ = publisher.sealed(recipients=publisher.recipients[1:])
    with pytest.raises(PeerError, match="no key for device 0"):
        key_for(package)


def test_a_key_of_a_device_with_the_same_hpke_key_does_not_open(publisher: Publisher) -> None:
    """Who enrols with somebody else's public key gets nothing that it could pass on: the descriptor is bound."""
    copied = replace(publisher.recipients[1], hpke_key=publisher.recipients[0].hpke_key)
    package, _ = publisher.sealed(recipients=[copied])
    refused(publisher.device(), package, Refusal.PACKAGE, replace(key_for(package, 1), index=0))


def test_a_key_of_another_package_is_refused(publisher: Publisher) -> None:
    package, other = publisher.seal(1), publisher.seal(2)
    assert "for another package" in refused(publisher.device(), package, Refusal.PACKAGE, key_for(other))
    with Package.open(package) as opened:
        relabelled = replace(key_for(other), manifest=opened.release.digest)
    assert "does not open" in refused(publisher.device(), package, Refusal.PACKAGE, relabelled)


def test_of_two_content_keys_only_the_one_that_was_committed_to_is_used(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AES-GCM commits to no key: a ciphertext can be made that opens to two models, one for each of two keys."""
    package, _ = publisher.sealed()
    decrypted: list[bytes] = []
    monkeypatch.setattr("propolis.client.install.open_files", lambda _, key, __: decrypted.append(key))
    second = rewrap(publisher, package, bytes(32))
    assert "commits to" in refused(publisher.device(), package, Refusal.PACKAGE, second)
    assert decrypted == []


# When it comes.


def test_an_expired_manifest_is_refused(publisher: Publisher) -> None:
    package = publisher.seal()
    refused(publisher.device(), package, Refusal.EXPIRED, at=NOW + DAY_S + 1)
    publisher.device().install(package, key_for(package), NOW + DAY_S)


def test_an_older_release_is_refused(publisher: Publisher) -> None:
    old, new = publisher.seal(1, OTHER), publisher.seal(2)
    device = publisher.device()
    device.install(new, key_for(new), NOW)
    assert "is older than 2" in refused(device, old, Refusal.ROLLED_BACK)


def test_going_back_is_a_new_release_and_cannot_be_replayed(publisher: Publisher) -> None:
    first, second = publisher.seal(1, OTHER), publisher.seal(2)
    back = publisher.seal(3, OTHER, parent=2)
    assert manifest_of(back).plaintext_digest == manifest_of(first).plaintext_digest
    fixed = publisher.seal(4, {"model.onnx": (b"mended", Kind.ONNX)})
    device = publisher.device()
    for package in (first, second, back, fixed):
        device.install(package, key_for(package), NOW)
    assert "older" in refused(device, back, Refusal.ROLLED_BACK)
    assert installed(device) == b"mended"


def test_a_release_that_was_trusted_but_not_installed_still_counts(publisher: Publisher) -> None:
    def failing(*_: object) -> float:
        raise RuntimeError

    older, newer = publisher.seal(5), publisher.seal(6)
    refused(publisher.device(probe=failing), newer, Refusal.PROBE)
    refused(publisher.device(), older, Refusal.ROLLED_BACK)
    publisher.device().install(newer, key_for(newer), NOW)


def test_a_second_release_of_one_number_is_refused(publisher: Publisher) -> None:
    one, other = publisher.seal(1), publisher.seal(1, OTHER)
    device = publisher.device()
    device.install(one, key_for(one), NOW)
    assert "not the one of that number" in refused(device, other, Refusal.ROLLED_BACK)


def test_who_had_a_key_that_is_revoked_has_not_used_up_the_numbers(publisher: Publisher) -> None:
    stolen = release_key(publisher.root, 2)
    last = publisher.seal(2**62, OTHER, key=stolen)
    publisher.device().install(last, key_for(last), NOW)
    publisher.roster = publisher.roster.revoking_release(2)
    mended = publisher.seal(7)
    publisher.device().install(mended, key_for(mended), NOW)
    assert installed(publisher.device()) == WEIGHTS
    assert "older" in refused(publisher.device(), publisher.seal(6), Refusal.ROLLED_BACK)


# What it says of itself.


def test_a_declared_size_beyond_the_devices_own_limit_is_refused_before_memory_is_taken(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = publisher.seal()
    monkeypatch.setattr("propolis.client.install.open_files", None)
    small = publisher.device(largest=len(WEIGHTS))
    assert "this device takes" in refused(small, package, Refusal.POLICY)
    one, other = manifest_of(package).files
    huge = publisher.forged(package, files=(replace(one, size=2**32 - 1), other), plaintext_size=2**32)
    refused(publisher.device(), huge, Refusal.POLICY, key_for(package))
    refused(publisher.device(), publisher.forged(package, plaintext_size=2**60), Refusal.MALFORMED, key_for(package))


def test_sizes_that_do_not_add_up_are_refused(publisher: Publisher) -> None:
    package = publisher.seal()
    one, other = manifest_of(package).files
    size = manifest_of(package).plaintext_size
    for changes in (
        {"plaintext_size": size - 1},
        {"ciphertext_size": size},
        {"files": (replace(one, size=one.size + 1), other)},
        {"files": (one,)},
        {"files": ()},
    ):
        refused(publisher.device(), publisher.forged(package, **changes), Refusal.MALFORMED, key_for(package))


def test_a_huge_header_is_refused_before_it_is_read(publisher: Publisher, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.write_bytes(b"propolis package\x01" + b"\xff" * 4)
    assert "4294967295 bytes" in refused(publisher.device(), huge, Refusal.MALFORMED, key_for(publisher.seal()))


@pytest.mark.parametrize(
    "name",
    ["../device.state", "/etc/passwd", "a/b", "..", ".", ".hidden", "a\\b", "a\n", "a\0", "C:x", "\u202etxt", " a"],
)
def test_names_of_files_that_lead_elsewhere_are_refused(publisher: Publisher, name: str) -> None:
    package = publisher.seal()
    one, other = manifest_of(package).files
    forged = publisher.forged(package, files=(replace(one, name=name), other))
    message = refused(publisher.device(), forged, Refusal.MALFORMED, key_for(package), store_plain=True)
    assert "name that none can have" in message


def test_two_files_of_one_name_are_refused(publisher: Publisher) -> None:
    package = publisher.seal()
    one, other = manifest_of(package).files
    forged = publisher.forged(package, files=(one, replace(other, name="MODEL.onnx")))
    assert "one name" in refused(publisher.device(), forged, Refusal.MALFORMED, key_for(package))


@pytest.mark.parametrize("name", ["..", "../digits", "a/b", "Digits", "", ".a", "a\n"])
def test_names_of_models_that_lead_elsewhere_are_refused(publisher: Publisher, name: str) -> None:
    package = publisher.seal()
    refused(publisher.device(), publisher.forged(package, name=name), Refusal.MALFORMED, key_for(package))


def test_a_parent_that_comes_later_is_refused(publisher: Publisher) -> None:
    package = publisher.seal()
    refused(publisher.device(), publisher.forged(package, parent=1), Refusal.MALFORMED, key_for(package))


# What it does on the device.


@pytest.mark.parametrize("difference", [2e-3, float("nan"), float("inf")])
def test_a_model_with_other_outputs_is_not_installed(publisher: Publisher, difference: float) -> None:
    before, package = publisher.seal(1, OTHER), publisher.seal(2)
    publisher.device().install(before, key_for(before), NOW)
    outcomes: list[Status] = []
    device = publisher.device(probe=lambda *_: difference, tell=outcomes.append)
    with pytest.raises(PeerError, match="differ by"):
        device.install(package, key_for(package), NOW)
    assert outcomes[-1] == Status(Outcome.FAILED, "probe")
    assert installed(publisher.device()) == b"other weights"


def test_a_model_that_hangs_or_fails_is_not_installed(publisher: Publisher) -> None:
    def fail(*_: object) -> float:
        raise MemoryError("no")

    package = publisher.seal(trial=Trial(1e-3, 0.05))
    waiting = threading.Event()
    hanging = publisher.device(probe=lambda *_: float(waiting.wait(60)))
    try:
        assert "has not answered" in refused(hanging, package, Refusal.PROBE)
    finally:
        waiting.set()
    assert "does not run" in refused(publisher.device(probe=fail), package, Refusal.PROBE)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may have more bytes than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 10, 300_000])
def test_a_full_disk_keeps_what_was_installed(publisher: Publisher, size: int) -> None:
    before, package = publisher.seal(1, OTHER), publisher.seal(2)
    device = publisher.device()
    device.install(before, key_for(before), NOW)
    with full_disk(size), pytest.raises(StorageError):
        device.install(package, key_for(package), NOW)
    opened = device.open()
    assert (opened.files["model.onnx"], opened.fell_back) == (b"other weights", False)
    device.install(package, key_for(package), NOW)
    assert installed(device) == WEIGHTS
    slots = publisher.folder / "device-0" / "models" / "digits" / "slots"
    assert sorted(path.name for path in slots.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("place", ["models", "models/digits", "models/digits/slots", "models/digits/slots/a"])
def test_symbolic_links_among_the_slots_are_not_followed(publisher: Publisher, tmp_path: Path, place: str) -> None:
    package, elsewhere = publisher.seal(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("here")
    device = publisher.device()
    link = tmp_path / "device-0" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(UsageError, match="is a symbolic link"):
        device.install(package, key_for(package), NOW)
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


@pytest.mark.parametrize("file", ["package", "key"])
def test_a_slot_whose_file_is_a_symbolic_link_is_not_opened(publisher: Publisher, file: str) -> None:
    package, device = publisher.seal(), publisher.device()
    device.install(package, key_for(package), NOW)
    path = publisher.folder / "device-0" / "models" / "digits" / "slots" / "a" / file
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))
    with pytest.raises(UsageError, match=r"Too many levels of symbolic links|symbolic"):
        device.open()


def test_packages_that_change_places_on_the_disk_are_refused(publisher: Publisher) -> None:
    """A slot that somebody put an older release into, with its key, is not what the record says."""
    old, new = publisher.seal(1, OTHER), publisher.seal(2)
    device = publisher.device()
    for package in (old, new):
        device.install(package, key_for(package), NOW)
    slots = publisher.folder / "device-0" / "models" / "digits" / "slots"
    (slots / "a").rename(slots / "c")
    (slots / "b").rename(slots / "a")
    (slots / "c").rename(slots / "b")
    with pytest.raises(UsageError, match="another package than was installed"):
        device.open()


def test_plain_weights_are_nowhere_on_the_disk(publisher: Publisher) -> None:
    package, device = publisher.seal(), publisher.device()
    device.install(package, key_for(package), NOW)
    home = publisher.folder / "device-0"
    content = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
    assert b"weights " not in content
    assert GOLDEN not in content
    device.install(package, key_for(package), NOW, store_plain=True)
    plain = home / "models" / "digits" / "slots" / "a" / "plain"
    assert {path.name: path.read_bytes() for path in plain.iterdir()} == {
        name: content for name, (content, _) in FILES.items()
    }
    assert all(path.stat().st_mode & 0o077 == 0 for path in (plain, *plain.iterdir()))


def test_what_no_package_can_carry_is_not_sealed(publisher: Publisher) -> None:
    with pytest.raises(UsageError, match="devices would refuse"):
        publisher.seal(created=NOW + 91 * DAY_S, expires=NOW + 100 * DAY_S)
    publisher.roster = publisher.roster.revoking_release(1)
    with pytest.raises(UsageError, match="release key 1 is revoked"):
        publisher.seal()
