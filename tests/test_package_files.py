"""Packages and keys in files: whatever the bytes are, they are a package or one of our errors."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from releasing import NOW, Publisher, flipped, key_for, manifest_of, parts_of, rewritten

from propolis.package import Package, read_key, write_key, write_keys
from propolis.secure.content import WRAPPED_BYTES, WrappedKey
from propolis.secure.envelope import SEALED_CHUNK_BYTES
from propolis.secure.errors import PeerError, PropolisError, TrustError, UsageError
from propolis.secure.kem import Kem


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return Publisher(tmp_path_factory.mktemp("publisher"))


@pytest.fixture(scope="module")
def package(publisher: Publisher) -> Path:
    return publisher.seal()


def test_a_package_is_read_in_chunks_and_copied_as_it_is(package: Path) -> None:
    with Package.open(package) as opened:
        opened.require_whole(manifest_of(package))
        sizes = [len(chunk) for chunk in opened.chunks()]
        assert sizes[:-1] == [SEALED_CHUNK_BYTES] * (len(sizes) - 1)
        assert b"".join(opened.parts()) == package.read_bytes() == b"".join(opened.parts())


def test_a_length_that_is_not_the_manifests_is_known_before_anything_is_read(package: Path) -> None:
    _, body = parts_of(package)
    for changed in (body[:-1], body + b"\0", b""):
        forged, said = rewritten(package, changed), manifest_of(package)
        with Package.open(forged) as opened, pytest.raises(TrustError, match="bytes of content, expected"):
            opened.require_whole(said)


def test_random_and_mutated_bytes_are_a_package_or_our_error(
    publisher: Publisher, package: Path, tmp_path: Path
) -> None:
    rng, whole, device = random.Random(5), package.read_bytes()[:4000], publisher.device()
    key, path = key_for(package), tmp_path / "package"
    for _ in range(1500):
        data = flipped(whole, rng.randrange(1200)) if rng.random() < 0.8 else whole[: rng.randrange(len(whole))]
        path.write_bytes(data if rng.random() < 0.9 else whole[:21] + rng.randbytes(200))
        with pytest.raises(PropolisError):
            device.install(path, key, NOW)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "empty", "text"])
def test_what_is_no_package_says_so_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "package"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "a package")
    with pytest.raises((UsageError, PeerError), match=r"cannot read|is no package"), Package.open(path):
        pass
    with pytest.raises((UsageError, PeerError)):
        read_key(path, 0)


@given(
    st.sets(st.integers(min_value=0, max_value=2**20 - 1), max_size=50),
    st.integers(min_value=0, max_value=2**20),
    st.sampled_from(Kem),
)
@settings(deadline=None, max_examples=30)
def test_every_device_finds_its_own_key_and_nobody_elses(indices: set[int], stranger: int, kem: Kem) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"keys-{os.getpid()}"  # noqa: S108, of this test alone
    size = WRAPPED_BYTES[kem]
    keys = [WrappedKey(b"m" * 32, index, index.to_bytes(4, "big") * (size // 4)) for index in sorted(indices)]
    try:
        write_keys(path, b"m" * 32, keys, kem)
        assert [read_key(path, key.index) for key in keys] == keys
        assert path.stat().st_size == 46 + (4 + size) * len(keys)
        if stranger not in indices:
            with pytest.raises(PeerError, match=f"no key for device {stranger}"):
                read_key(path, stranger)
    finally:
        path.unlink(missing_ok=True)


def test_keys_of_an_unknown_kind_are_told(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys", b"m" * 32, [WrappedKey(b"m" * 32, 3, b"s" * 80)])
    data = (tmp_path / "keys").read_bytes()
    for kind in (0, 3, 255):
        (tmp_path / "keys").write_bytes(data[:13] + bytes([kind]) + data[14:])
        with pytest.raises(PeerError, match=rf"keys of a kind \({kind}\) that this version does not know"):
            read_key(tmp_path / "keys", 3)


def test_keys_that_are_cut_anywhere_are_a_key_or_our_error(tmp_path: Path) -> None:
    keys = [WrappedKey(b"m" * 32, index, bytes([index]) * 1168) for index in range(3)]
    write_keys(tmp_path / "keys", b"m" * 32, keys, Kem.MLKEM768_X25519)
    data = (tmp_path / "keys").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "keys").write_bytes(data[:length])
        if length >= 46 + 2 * 1172:
            assert read_key(tmp_path / "keys", 1) == keys[1]
        with pytest.raises(PeerError):
            read_key(tmp_path / "keys", 2)


@pytest.mark.parametrize("kem", Kem)
def test_one_devices_key_is_a_file_too(tmp_path: Path, kem: Kem) -> None:
    key = WrappedKey(b"m" * 32, 3, b"s" * WRAPPED_BYTES[kem])
    write_key(tmp_path / "key", key)
    assert read_key(tmp_path / "key", 3) == key
    with pytest.raises(PeerError, match="no key for device 4"):
        read_key(tmp_path / "key", 4)
    (tmp_path / "key").write_bytes((tmp_path / "key").read_bytes() + bytes(2000))
    with pytest.raises(PeerError):
        read_key(tmp_path / "key", 3)
