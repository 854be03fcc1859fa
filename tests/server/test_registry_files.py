"""What is attached to a version, its releases, and the way from the tables of schema 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from registries import content, in_processes, model_file, the_blobs
from sqlalchemy import inspect, text

from propolis.secure.errors import StorageError, UsageError
from propolis.secure.manifest import Kind
from propolis.server import registry_migrations
from propolis.server.registry import Registry
from propolis.server.registry_files import NewArtifact
from propolis.server.registry_records import Version
from propolis.server.registry_releases import NewRelease

NEW_TABLES = ("propolis_release", "propolis_sequence", "propolis_artifact")
MANIFEST, CONTENT_KEY = bytes(range(32)), b"k" * 32
FILES = [NewArtifact("model.onnx", Kind.ONNX, b"onnx" * 1000), NewArtifact("golden.npz", Kind.GOLDEN, b"golden")]


def registered(location: str, folder: Path) -> tuple[Registry, Version]:
    registry = Registry(location)
    return registry, registry.register("digits", model_file(folder))


def release(sequence: int, manifest: bytes = MANIFEST, parent: int = 0) -> NewRelease:
    return NewRelease(sequence, manifest, CONTENT_KEY, 1.0, 2.0, parent)


def test_what_is_attached_is_encrypted_read_back_and_kept(location: str, tmp_path: Path) -> None:
    registry, version = registered(location, tmp_path)
    (tmp_path / "notes").write_bytes(b"from a file")
    registry.attach(version, "model.onnx", Kind.ONNX, b"onnx" * 600_000)  # of several chunks
    made = registry.attach(version, "notes.txt", Kind.OTHER, tmp_path / "notes")
    found = Registry(location).version("digits", 1)
    assert found == made
    assert [(each.name, each.kind, each.size) for each in found.artifacts] == [
        ("model.onnx", "onnx", 2_400_000),
        ("notes.txt", "other", 11),
    ]
    assert Registry(location).artifact(found, "model.onnx") == b"onnx" * 600_000
    assert registry.sweep(grace=0) == []
    assert registry.artifact(found, "notes.txt") == b"from a file"
    assert not any(b"onnxonnx" in blob.read_bytes() for blob in the_blobs(tmp_path / "registry"))
    with pytest.raises(UsageError, match=r"digits 1 has no file 'x': those attached to it are model\.onnx, notes\.txt"):
        registry.artifact(found, "x")


def test_what_is_attached_is_never_changed(location: str, tmp_path: Path) -> None:
    registry, version = registered(location, tmp_path)
    registry.attach_all(version, FILES)
    assert len(registry.attach_all(version, FILES).artifacts) == 2, "the same again changes nothing"
    for name, kind, data in (
        ("model.onnx", Kind.ONNX, b"another"),
        ("model.onnx", Kind.INT8, FILES[0].content),
        ("Model.ONNX", Kind.ONNX, FILES[0].content),
    ):
        with pytest.raises(UsageError, match=r"has a file model\.onnx already"):
            registry.attach(version, name, kind, data)
    with pytest.raises(UsageError, match="is no name for a file"):
        registry.attach(version, "../model", Kind.OTHER, b"")
    assert registry.artifact(registry.version("digits", 1), "model.onnx") == FILES[0].content


def test_a_file_that_is_damaged_or_another_ones_is_refused(location: str, tmp_path: Path) -> None:
    registry, version = registered(location, tmp_path)
    before = set(the_blobs(tmp_path / "registry"))
    version = registry.attach_all(version, FILES[:1])
    registry.verify(version)
    (blob,) = set(the_blobs(tmp_path / "registry")) - before
    blob.write_bytes(before.pop().read_bytes())
    for read in (lambda: registry.artifact(version, "model.onnx"), lambda: registry.verify(version)):
        with pytest.raises(UsageError, match=r"model\.onnx of digits 1 cannot be read"):
            read()
    assert content(registry, "digits", 1), "the version's own file is whole"


STEPS = {
    "half of a file is written": (
        "import propolis.server.vault as m\ndef half(*_):\n    yield b'half'\n    os._exit(9)\nm.sealed = half"
    ),
    "there is no row": "import propolis.server.registry_files as m; m.Files._add = lambda *_: os._exit(9)",
    "one of two rows is there": (
        "import propolis.server.registry_files as m\nbefore, calls = m.Files._add, []\n"
        "def then_die(*a):\n    before(*a)\n    calls.append(1)\n    len(calls) < 2 or os._exit(9)\n"
        "m.Files._add = then_die"
    ),
    "the figures are not there": "import propolis.server.registry as m; m._add_evaluation = lambda *_: os._exit(9)",
}
ATTACH = """
from propolis.secure.manifest import Kind
from propolis.server.registry_files import NewArtifact
files = [NewArtifact("model.onnx", Kind.ONNX, b"onnx" * 1000), NewArtifact("golden.npz", Kind.GOLDEN, b"golden")]
registry.attach_all(registry.version("digits", 1), files, {"model.onnx": {"accuracy": 0.5}}, "digits")
"""


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_before_the_commit_attaches_nothing(location: str, tmp_path: Path, step: str) -> None:
    registry, version = registered(location, tmp_path)
    assert in_processes(f"registry = Registry(sys.argv[1])\n{STEPS[step]}\n{ATTACH}", location) == [9]
    assert registry.version("digits", 1) == version
    assert registry.sweep(grace=0)
    registry.verify(version)
    assert in_processes(f"registry = Registry(sys.argv[1])\n{ATTACH}", location) == [0]
    found = registry.version("digits", 1)
    assert [each.name for each in found.artifacts] == ["model.onnx", "golden.npz"]
    assert [(each.data, each.artifact) for each in found.evaluations] == [("digits", "model.onnx")]


def test_a_file_that_is_swept_before_its_row_is_stored_again(location: str, tmp_path: Path) -> None:
    registry, version = registered(location, tmp_path)
    stored, swept = registry._vault.store, []

    def store_and_lose(*arguments: Any) -> None:
        stored(*arguments)
        if not swept:
            swept.extend(Registry(location).sweep(grace=0))

    registry._vault.store = store_and_lose  # type: ignore[method-assign]
    registry.attach_all(version, FILES)
    assert len(swept) == 1
    registry.verify(registry.version("digits", 1))


def test_publishers_at_once_never_share_a_number(location: str, tmp_path: Path) -> None:
    registry, _ = registered(location, tmp_path)
    out = tmp_path / "taken"
    code = (
        "taken = [Registry(sys.argv[1]).next_sequence('digits')[0] for _ in range(5)]\n"
        "with open(sys.argv[2], 'a') as file:\n    file.write(''.join(f'{each}\\n' for each in taken))"
    )
    assert in_processes(code, location, out, count=4) == [0] * 4
    assert sorted(map(int, out.read_text().split())) == list(range(1, 21))
    assert registry.next_sequence("digits") == (21, 0)
    assert registry.next_sequence("faces") == (1, 0)


def test_a_release_is_kept_with_its_content_key(location: str, tmp_path: Path) -> None:
    registry, version = registered(location, tmp_path)
    assert registry.next_sequence("digits") == (1, 0)
    found = registry.add_release(version, release(1))
    assert registry.next_sequence("digits") == (2, 1)
    assert registry.next_sequence("digits") == (3, 1), "a number without a release is no parent"
    registry.add_release(version, release(3, b"m" * 32, parent=1))
    found = registry.version("digits", 1)
    assert [(each.sequence, each.parent, each.manifest) for each in found.releases] == [
        (1, 0, MANIFEST.hex()),
        (3, 1, (b"m" * 32).hex()),
    ]
    assert Registry(location).content_key(MANIFEST) == CONTENT_KEY
    assert Registry(location).content_key(bytes(32)) is None
    with pytest.raises(StorageError):
        registry.add_release(version, release(3, b"n" * 32))
    with pytest.raises(StorageError):
        registry.add_release(version, release(4))


def test_a_content_key_is_encrypted_and_bound_to_its_release(location: str, tmp_path: Path) -> None:
    registry, version = registered(location, tmp_path)
    registry.add_release(version, release(1))
    registry.add_release(version, release(2, b"m" * 32))
    with registry._database.writing() as connection:
        kept = list(connection.scalars(text("SELECT content_key FROM propolis_release ORDER BY sequence")))
        assert CONTENT_KEY.hex() not in "".join(kept)
        assert kept[0][:64] != kept[1][:64], "each has a salt of its own"
        connection.execute(
            text("UPDATE propolis_release SET content_key = :kept WHERE sequence = 1"), {"kept": kept[1]}
        )
    with pytest.raises(UsageError, match="the content key of this release is damaged, or another one's"):
        registry.content_key(MANIFEST)
    assert registry.content_key(b"m" * 32) == CONTENT_KEY


def set_back_to_schema_2(registry: Registry) -> None:
    with registry._database.writing() as connection:
        connection.execute(text("ALTER TABLE propolis_version DROP COLUMN format"))
        connection.execute(text("UPDATE propolis_registry SET schema_version = 2"))


def of_schema_1(location: str, folder: Path) -> Registry:
    registry, _ = registered(location, folder)
    set_back_to_schema_2(registry)
    with registry._database.writing() as connection:
        for table in NEW_TABLES:
            connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("ALTER TABLE propolis_version DROP COLUMN code"))
        connection.execute(text("ALTER TABLE propolis_evaluation DROP COLUMN artifact"))
        connection.execute(text("UPDATE propolis_registry SET schema_version = 1"))
    return registry


def tables_of(registry: Registry) -> dict[str, Any]:
    """All that the database itself says of the tables."""
    with registry._database.reading() as connection:
        said = inspect(connection)
        return {
            table: (
                [(c["name"], str(c["type"]), c["nullable"], bool(c.get("default"))) for c in said.get_columns(table)],
                said.get_pk_constraint(table)["constrained_columns"],
                sorted(each["column_names"] for each in said.get_unique_constraints(table)),
                sorted((each["name"], each["column_names"], bool(each["unique"])) for each in said.get_indexes(table)
                       if not each.get("duplicates_constraint")),
                sorted((each["constrained_columns"], each["referred_table"]) for each in said.get_foreign_keys(table)),
            )
            for table in said.get_table_names()
        }  # fmt: skip


def test_a_registry_of_schema_1_becomes_one_of_today(location: str, tmp_path: Path) -> None:
    registry, _ = registered(location, tmp_path)
    today = tables_of(registry)
    of_schema_1(location, tmp_path)
    assert not set(NEW_TABLES) & set(tables_of(registry))
    opened = Registry(location)
    assert tables_of(opened) == today
    opened.verify(opened.version("digits", 1))
    version = opened.attach_all(opened.version("digits", 1), FILES)
    assert Registry(location).version("digits", 1) == version
    assert opened.next_sequence("digits") == (1, 0)


def test_what_a_registry_of_schema_2_says_of_its_versions_holds_in_one_of_today(location: str, tmp_path: Path) -> None:
    registry, _ = registered(location, tmp_path)
    today, version = tables_of(registry), registry.version("digits", 1)
    set_back_to_schema_2(registry)
    opened = Registry(location)
    assert tables_of(opened) == today
    opened.verify(opened.version("digits", 1))
    assert opened.version("digits", 1) == version


def test_another_key_changes_nothing_of_an_old_registry(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = of_schema_1(location, tmp_path)
    before = tables_of(old)
    with monkeypatch.context() as other:
        other.setenv("PROPOLIS_REGISTRY_KEY", "00" * 32)
        with pytest.raises(UsageError, match="the key is not that of the registry"):
            Registry(location)
    assert tables_of(old) == before
    assert content(Registry(location), "digits", 1)


def test_processes_that_open_an_old_registry_at_once_change_it_once(location: str, tmp_path: Path) -> None:
    of_schema_1(location, tmp_path)
    assert in_processes("Registry(sys.argv[1]).version('digits', 1)", location, count=4) == [0] * 4
    assert Registry(location).next_sequence("digits") == (1, 0)


@pytest.mark.parametrize("statement", range(len(registry_migrations.STEPS[1]) + 1))
def test_a_kill_between_two_statements_leaves_the_old_registry(location: str, tmp_path: Path, statement: int) -> None:
    old = of_schema_1(location, tmp_path)
    before = tables_of(old)
    code = (
        "import propolis.server.registry_migrations as m\nleft = int(sys.argv[2])\n"
        "def text(said, made=m.text):\n    global left\n    left -= any(word in said for word in ('CREATE', 'ALTER'))\n"
        "    left >= 0 or os._exit(9)\n    return made(said)\n"
        "class Last:\n    update = staticmethod(lambda: os._exit(9))\n"
        "m.text, m.registries = text, Last\nRegistry(sys.argv[1])"
    )
    assert in_processes(code, location, statement) == [9]
    assert tables_of(old) == before
    registry = Registry(location)
    assert len(registry.attach_all(registry.version("digits", 1), FILES).artifacts) == 2
