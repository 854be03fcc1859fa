"""Who has a registry's storage: reads no model, changes none unseen, and leads out of no folder."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registries import content, in_processes, model_file, the_blobs
from safetensors.torch import save
from sqlalchemy import text

from harness import Blobs
from propolis import clear_folder
from propolis.convert import Quantization
from propolis.secure.errors import UsageError
from propolis.secure.manifest import Kind
from propolis.server import registry_key
from propolis.server.at_rest import RegistryKey, opened, sealed
from propolis.server.convert_version import convert_version
from propolis.server.registry import Registry
from propolis.server.registry_files import NewArtifact
from propolis.server.registry_records import Lineage, Version, require_alias, require_name
from propolis.server.release import measures_of

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


def test_no_file_on_the_disk_holds_the_weights_also_after_a_conversion(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set[Path]()

    def written(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            seen.add(Path(arguments[0]).absolute())

    watching = True
    for name in ("disk", "memory"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
    monkeypatch.setattr(clear_folder, "IN_MEMORY", tmp_path / "memory")
    torch.manual_seed(0)
    weights = Blobs().model().state_dict()
    source = tmp_path / "blobs.safetensors"
    source.write_bytes(save(weights))
    run = weights["3.weight"].numpy().tobytes()  # which no norm is folded into
    assert len(run) == 64
    assert run in source.read_bytes()
    version = registry.register("blobs", source)
    source.unlink()
    sys.addaudithook(written)
    version, _ = convert_version(registry, version, "harness:Blobs", quantization=Quantization(64))
    watching = False
    assert run in registry.artifact(version, "model.onnx")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and run in path.read_bytes()] == []
    homes = (tmp_path / "memory", tmp_path / "registry")
    models = [path for path in seen if path.suffix == ".onnx"]
    assert len(models) >= 2
    assert all(any(path.is_relative_to(home) for home in homes) for path in models)


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


def test_what_a_killed_export_left_is_removed_by_the_next(
    registry: Registry, two: tuple[Version, Version], tmp_path: Path
) -> None:
    code = (
        "os.fsync = lambda _: os._exit(9)\nr = Registry(sys.argv[1])\n"
        "r.export(r.version('digits', 1), Path(sys.argv[2]))"
    )
    assert in_processes(code, tmp_path / "registry", tmp_path / "out") == [9]
    assert len(list(tmp_path.glob(".out.*"))) == 1
    registry.export(two[0], tmp_path / "out")
    assert not list(tmp_path.glob(".out.*"))


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


CHANGES = {
    "another version's file": "UPDATE propolis_version SET digest = (SELECT digest FROM propolis_version WHERE id = 2),"
    " blob = (SELECT blob FROM propolis_version WHERE id = 2) WHERE id = 1",
    "another model's name": "UPDATE propolis_version SET model = 'faces' WHERE id = 1",
    "other metrics": "UPDATE propolis_version SET metrics = '{\"accuracy\": 1.0}' WHERE id = 1",
    "other settings": 'UPDATE propolis_version SET configuration = \'{"task": "digits"}\' WHERE id = 1',
    "another run": "UPDATE propolis_version SET run_id = 'b' WHERE id = 1",
    "no code": "UPDATE propolis_version SET code = NULL WHERE id = 1",
    "no ASCII": "UPDATE propolis_version SET code = 'é' WHERE id = 1",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_version_that_the_databases_writer_changed_is_refused(location: str, tmp_path: Path, change: str) -> None:
    registry = Registry(location)
    for seed in (1, 2):
        registry.register("digits", model_file(tmp_path, seed), Lineage(run_id="a", metrics={"accuracy": 0.5}))
    written(registry, CHANGES[change])
    (version,) = [each for each in registry.versions() if (each.model, each.version) != ("digits", 2)]
    for refused in (registry.verify, registry.require_authentic, lambda it: next(registry.read(it))):
        with pytest.raises(UsageError, match="somebody without the registry's key changed what its database says"):
            refused(version)
    registry.verify(registry.version("digits", 2))


@pytest.mark.parametrize("column", ["digest", "kind", "name"])
def test_an_artifact_that_the_databases_writer_changed_or_moved_is_refused(
    location: str, tmp_path: Path, column: str
) -> None:
    registry = Registry(location)
    for seed in (1, 2):
        made = registry.register("digits", model_file(tmp_path, seed))
        registry.attach(made, "model.onnx", Kind.ONNX, b"onnx %d" % seed)
    other = registry.attach(registry.register("faces", model_file(tmp_path)), "golden.npz", Kind.GOLDEN, b"golden")
    written(
        registry,
        f"UPDATE propolis_artifact SET {column} = (SELECT {column} FROM propolis_artifact WHERE id = 3),"  # noqa: S608
        " blob = (SELECT blob FROM propolis_artifact WHERE id = 3) WHERE id = 1",
    )
    (changed,) = registry.version("digits", 1).artifacts
    with pytest.raises(UsageError, match="digits 1: somebody without the registry's key changed"):
        registry.artifact(registry.version("digits", 1), changed.name)
    assert registry.artifact(other, "golden.npz") == b"golden"
    written(registry, "DELETE FROM propolis_artifact WHERE id = 1")
    written(registry, "UPDATE propolis_artifact SET version_id = 1 WHERE id = 2")
    with pytest.raises(UsageError, match="digits 1: somebody without"):
        registry.artifact(registry.version("digits", 1), "model.onnx")


def test_no_code_is_run_because_the_database_names_it(tmp_path: Path, registry: Registry) -> None:
    version = registry.register("digits", model_file(tmp_path), Lineage(configuration={"task": "antigravity:fly"}))
    with pytest.raises(UsageError, match="'antigravity:fly', which is code: if you trust it, give --task"):
        convert_version(registry, version)
    assert "antigravity" not in sys.modules


def test_figures_of_other_data_are_not_signed_as_a_files(registry: Registry, tmp_path: Path) -> None:
    version = registry.register("digits", model_file(tmp_path))
    new = [NewArtifact("model.onnx", Kind.ONNX, b"onnx")]
    version = registry.attach_all(version, new, {"model.onnx": {"accuracy": 0.25}}, "digits")
    version = registry.add_evaluation(version, "digits:easy, model.onnx", {"accuracy": 1.0})
    assert measures_of(version) == {"model.onnx accuracy": 0.25}


def written(registry: Registry, statement: str) -> None:
    """What somebody does who can write to the database."""
    with registry._database.writing() as connection:
        connection.execute(text(statement))


def test_an_alias_is_no_number_and_a_name_no_sql(registry: Registry, two: tuple[Version, Version]) -> None:
    with pytest.raises(UsageError, match="a number is a version"):
        registry.promote("digits", 1, alias="2")
    with pytest.raises(UsageError, match="no version or alias"):
        registry.version("digits", "x' OR '1'='1")
    assert require_name("a" * 64) == "a" * 64
    assert require_name("Digits_2.v-3") == "Digits_2.v-3"
