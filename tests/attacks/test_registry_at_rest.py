"""Who has a registry's storage: reads no model, changes none unseen, and leads out of no folder."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registries import content, model_file, the_blobs

from propolis.secure.errors import UsageError
from propolis.server import registry_key
from propolis.server.at_rest import RegistryKey, opened, sealed
from propolis.server.registry import Registry
from propolis.server.registry_records import Version, require_alias, require_name

KEY = RegistryKey(bytes(range(32)))
DIGEST = bytes(32)
_HEADER, _TAG = 41, 16


def blob_of(plaintext: bytes, chunk: int = 10, key: RegistryKey = KEY, digest: bytes = DIGEST) -> bytes:
    return b"".join(sealed(key, digest, io.BytesIO(plaintext), chunk))


def plaintext_of(blob: bytes, key: RegistryKey = KEY, digest: bytes = DIGEST) -> bytes:
    return b"".join(opened(key, digest, io.BytesIO(blob)))


@given(st.binary(max_size=200), st.integers(1, 50))
def test_what_is_sealed_opens_at_every_length(plaintext: bytes, chunk: int) -> None:
    assert plaintext_of(blob_of(plaintext, chunk)) == plaintext


@given(st.data())
@settings(max_examples=300)
def test_one_flipped_bit_anywhere_is_refused(data: st.DataObject) -> None:
    blob = bytearray(blob_of(b"x" * 35))
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(UsageError):
        plaintext_of(bytes(blob))


@pytest.mark.parametrize("length", [0, 30, 35])
def test_a_blob_that_is_cut_anywhere_is_refused(length: int) -> None:
    blob = blob_of(b"x" * length)
    for end in range(len(blob)):
        with pytest.raises(UsageError):
            plaintext_of(blob[:end])


def test_chunks_that_are_swapped_repeated_or_left_out_are_refused() -> None:
    blob, size = blob_of(b"x" * 40), 10 + _TAG
    head, chunks = blob[:_HEADER], [blob[_HEADER + i * size : _HEADER + (i + 1) * size] for i in range(4)]
    for order in ([1, 0, 2, 3], [0, 0, 1, 2, 3], [0, 2, 3], [0, 1, 2], [1, 2, 3], [0, 1, 2, 3, 3]):
        with pytest.raises(UsageError, match=r"chunk . is damaged, missing, or another model's"):
            plaintext_of(head + b"".join(chunks[i] for i in order))
    assert plaintext_of(blob) == b"x" * 40


def test_another_key_or_another_digest_opens_nothing() -> None:
    blob = blob_of(b"secret")
    for key, digest in ((RegistryKey(bytes(32)), DIGEST), (KEY, b"\1" * 32)):
        with pytest.raises(UsageError, match="chunk 0"):
            plaintext_of(blob, key, digest)


def test_no_two_blobs_share_a_key_stream() -> None:
    first, second = (blob_of(bytes(100), 100)[_HEADER:-_TAG] for _ in range(2))
    assert first != second


def test_a_header_does_not_decide_how_much_memory_is_taken() -> None:
    blob = bytearray(blob_of(b"x"))
    blob[5:9] = b"\xff" * 4
    with pytest.raises(UsageError, match="it says that its chunks have 4294967295 bytes"):
        plaintext_of(bytes(blob))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.make(tmp_path / "registry")


@pytest.fixture
def two(registry: Registry, tmp_path: Path) -> tuple[Version, Version]:
    return tuple(registry.register("digits", model_file(tmp_path, seed)) for seed in (1, 2))  # type: ignore[return-value]


def test_nothing_of_a_model_lies_in_clear_and_no_name_tells_which_it_is(
    registry: Registry, two: tuple[Version, Version], tmp_path: Path
) -> None:
    plain = model_file(tmp_path, 1).read_bytes()
    weights = plain[-32:]
    for path in (tmp_path / "registry").rglob("*"):
        if path.is_file():
            assert weights not in path.read_bytes()
    names = {path.name for path in the_blobs(tmp_path / "registry")}
    assert names.isdisjoint({version.digest for version in two})


def test_swapped_blobs_are_refused_before_a_byte_is_read(
    registry: Registry, two: tuple[Version, Version], tmp_path: Path
) -> None:
    a, b = the_blobs(tmp_path / "registry")
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    for version in two:
        with pytest.raises(UsageError, match="chunk 0 is damaged, missing, or another model's"):
            next(registry.read(version))


def test_damage_is_found_and_registering_again_mends_it(
    registry: Registry, two: tuple[Version, Version], tmp_path: Path
) -> None:
    for path in the_blobs(tmp_path / "registry"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"digits 1 cannot be read: .* is damaged"):
        registry.verify(two[0])
    registry.register("digits", model_file(tmp_path, 1))
    registry.verify(two[0])
    with pytest.raises(UsageError):
        registry.verify(two[1])


def test_a_damaged_blob_is_not_exported_in_part(registry: Registry, tmp_path: Path) -> None:
    version = registry.register("digits", model_file(tmp_path, size=500_000))
    (blob,) = the_blobs(tmp_path / "registry")
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError):
        registry.export(version, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_exported_model_is_for_its_owner_alone(
    registry: Registry, two: tuple[Version, Version], tmp_path: Path
) -> None:
    registry.export(two[0], tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out").read_bytes() == model_file(tmp_path, 1).read_bytes()


def test_the_key_is_for_its_owner_alone_and_says_nothing_of_itself(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "registry" / "registry.key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text().strip() not in repr(registry_key.load_key(tmp_path / "registry"))
    file.chmod(0o640)
    with pytest.raises(UsageError, match=r"others may read .*registry.key"):
        Registry(tmp_path / "registry")


def test_a_wrong_missing_or_malformed_key_is_one_line(
    registry: Registry, two: tuple[Version, Version], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "registry"
    key = (folder / "registry.key").read_text().strip()
    for said, message in (
        ("00" * 32, "the key is not that of the registry"),
        ("abc", "expected 64 hexadecimal digits"),
    ):
        monkeypatch.setenv("PROPOLIS_REGISTRY_KEY", said)
        with pytest.raises(UsageError, match=message):
            Registry(folder)
    monkeypatch.delenv("PROPOLIS_REGISTRY_KEY")
    (folder / "registry.key").unlink()
    with pytest.raises(UsageError, match=r"the registry's key is missing: .*registry.key is not there"):
        Registry.make(folder)  # and no new one is made
    assert not (folder / "registry.key").exists()
    monkeypatch.setenv("PROPOLIS_REGISTRY_KEY", key)
    assert content(Registry(folder), "digits", 1)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "a\\b",
        "-x",
        ".x",
        "a b",
        "a\n",
        "a\0",
        "é",
        "a" * 65,
        "%2e%2e",
        "a:b",
    ],
)
def test_names_that_are_paths_flags_or_too_long_are_refused(registry: Registry, tmp_path: Path, name: str) -> None:
    for check in (require_name, require_alias):
        with pytest.raises(UsageError, match="expected at most 64 letters, digits, dots, dashes and underscores"):
            check(name)
    with pytest.raises(UsageError, match="expected at most 64"):
        registry.register(name, model_file(tmp_path))
    with pytest.raises(UsageError, match="expected at most 64"):
        registry.version(name, 1)
    assert registry.versions() == []


def test_an_alias_is_no_number_and_a_name_no_sql(registry: Registry, two: tuple[Version, Version]) -> None:
    with pytest.raises(UsageError, match="a number is a version"):
        registry.promote("digits", 1, alias="2")
    with pytest.raises(UsageError, match="no version or alias"):
        registry.version("digits", "x' OR '1'='1")
    assert require_name("a" * 64) == "a" * 64
    assert require_name("Digits_2.v-3") == "Digits_2.v-3"
