"""Sealing: what is made is what devices accept, for those who have enrolled, and as a stream."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from enrolling import Applicant, Site
from releasing import DAY_S, FILES, NOW, WEIGHTS, Publisher, key_for, manifest_of

from propolis.client.keyholder import Keyholder
from propolis.package import Package
from propolis.secure.content import unwrap_key
from propolis.secure.envelope import CHUNK_BYTES
from propolis.secure.errors import PeerError, StorageError, TrustError, UsageError
from propolis.secure.identity import TrustedRoster, descriptor_digest
from propolis.secure.manifest import Expected, Kind, Measure, Trial, accept
from propolis.server.plaintext import PlainFile, Plaintext
from propolis.server.publish import Facts, recipients_of, seal_package


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


def test_a_manifest_says_what_is_in_the_package(publisher: Publisher) -> None:
    package = publisher.seal(
        9,
        model_version=4,
        parent=8,
        run_id=b"run",
        round=30,
        epsilon=2.0,
        delta=1e-6,
        evaluation={"loss": 0.5, "acc": 1.0},
    )
    said = manifest_of(package)
    assert (said.name, said.sequence, said.model_version, said.parent) == ("digits", 9, 4, 8)
    assert (said.run_id, said.round, said.epsilon, said.delta) == (b"run", 30, 2.0, 1e-6)
    assert said.evaluation == (Measure("acc", 1.0), Measure("loss", 0.5))
    assert (said.created, said.expires, said.trial) == (NOW, NOW + DAY_S, Trial(1e-3, 5.0))
    plaintext = b"".join(content for content, _ in FILES.values())
    assert (said.plaintext_size, said.plaintext_digest) == (len(plaintext), hashlib.sha256(plaintext).digest())
    assert [(file.name, file.kind) for file in said.files] == [("model.onnx", Kind.ONNX), ("golden.npz", Kind.GOLDEN)]
    assert WEIGHTS[:100] not in package.read_bytes()


@pytest.mark.parametrize(
    "sizes", [(1,), (CHUNK_BYTES,), (CHUNK_BYTES + 1, 0), (0, CHUNK_BYTES - 1, 2), (2 * CHUNK_BYTES,)]
)
def test_what_is_sealed_is_what_a_device_opens(publisher: Publisher, sizes: tuple[int, ...]) -> None:
    files = {f"file-{i}": (bytes([i]) * size, Kind.OTHER) for i, size in enumerate(sizes)}
    package, device = publisher.seal(files=files), publisher.device(2)
    device.install(package, key_for(package, 2), NOW)
    assert device.open().files == {name: content for name, (content, _) in files.items()}


def test_a_device_that_comes_later_can_be_given_the_key(publisher: Publisher) -> None:
    package, sealed = publisher.sealed(recipients=publisher.recipients[:1])
    with pytest.raises(PeerError, match="no key for device 2"):
        key_for(package, 2)
    device = publisher.device(2)
    device.install(package, sealed.wrap(publisher.recipients[2]), NOW)
    assert device.open().files["model.onnx"] == WEIGHTS


def test_two_packages_of_one_model_have_nothing_in_common(publisher: Publisher) -> None:
    one, other = publisher.seal(1), publisher.seal(1)
    assert manifest_of(one).key_commitment != manifest_of(other).key_commitment
    assert one.read_bytes()[-1000:] != other.read_bytes()[-1000:]


def test_who_has_enrolled_and_is_not_revoked_is_a_recipient(tmp_path: Path) -> None:
    site = Site(tmp_path / "fed")
    applicants = [Applicant(site.token(name)) for name in ("one", "two", "three", "late")]
    site.membership.refresh()
    for index in range(3):
        site.membership.admit(index, applicants[index].state.descriptor)
    site.federation.revoke("two")
    site.membership.refresh()
    found = recipients_of(site.membership)
    assert [recipient.index for recipient in found] == [0, 2]
    assert found[1].descriptor == descriptor_digest(applicants[2].state.descriptor)
    (site.server / "enrolled" / "2").write_bytes((site.server / "enrolled" / "0").read_bytes())
    site.membership._enrolled.clear()
    assert [recipient.index for recipient in recipients_of(site.membership)] != [0, 1]


def test_a_release_is_never_changed_and_a_missing_file_is_one_line(publisher: Publisher, tmp_path: Path) -> None:
    package = publisher.seal()
    facts = Facts("digits", 2, NOW, NOW + DAY_S)

    def seal(path: Path, out: Path) -> None:
        seal_package([PlainFile(path, Kind.ONNX)], facts, publisher.key, [], publisher.trust, out)

    model = package.parent / "model.onnx"
    with pytest.raises(UsageError, match="a release is never changed"):
        seal(model, package)
    for path, message in [
        (tmp_path / "nowhere.onnx", "cannot read"),
        (tmp_path, "cannot read|no name"),
        (Path("/dev/null"), "1 to 4294967296 bytes"),
    ]:
        with pytest.raises(UsageError, match=message):
            seal(path, tmp_path / "out")
    with pytest.raises(StorageError, match="cannot write"):
        seal(model, tmp_path / "no folder" / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_while_it_is_sealed_is_told(publisher: Publisher, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    plaintext = Plaintext([PlainFile(path, Kind.ONNX)])
    path.write_bytes(b"after!")
    with pytest.raises(UsageError, match="changed while it was sealed"):
        list(plaintext.chunks())


def test_a_full_disk_leaves_no_package(publisher: Publisher) -> None:
    home = publisher.seal().parent
    for path in (home / "package", home / "package.keys"):
        path.unlink()
    files, facts = [PlainFile(home / "model.onnx", Kind.ONNX)], Facts("digits", 1, NOW, NOW + DAY_S)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(StorageError):
            seal_package(files, facts, publisher.key, [], publisher.trust, home / "package")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in home.iterdir()) == ["golden.npz", "model.onnx"]


MEMORY = """
import resource, sys, time
from pathlib import Path
sys.path.insert(0, "{tests}")
from releasing import Publisher
from propolis.secure.manifest import Kind
folder = Path(sys.argv[1])
publisher = Publisher(folder)
publisher.seal()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
from propolis.server.plaintext import PlainFile
from propolis.server.publish import Facts, seal_package
with (folder / "large.onnx").open("wb") as file:
    file.truncate(100 * 2**20)
facts = Facts("digits", 2, int(time.time()), int(time.time()) + 1000)
files = [PlainFile(folder / "large.onnx", Kind.ONNX)]
seal_package(files, facts, publisher.key, publisher.recipients, publisher.trust, folder / "large")
print(peak() - before)
"""


def test_a_large_model_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    code = MEMORY.format(tests=Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 * 2**20


def test_the_key_that_is_wrapped_is_the_one_of_the_package(publisher: Publisher) -> None:
    package, sealed = publisher.sealed()
    device: Keyholder = publisher.keyholder(1)
    with Package.open(package) as opened:
        accepted = accept(opened.release, device.trust, Expected(NOW, 2**30))
    key = key_for(package, 1)
    assert unwrap_key(key, accepted, device.descriptor, device.hpke_private) == sealed.content_key
    with pytest.raises(TrustError):
        unwrap_key(replace(key, manifest=bytes(32)), accepted, device.descriptor, device.hpke_private)
    assert isinstance(device.trust.roster, TrustedRoster)
