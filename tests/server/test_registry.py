from __future__ import annotations

import dataclasses
import os
import sqlite3
import threading
import time
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from registries import content, in_processes, model_file, the_blobs
from sqlalchemy import create_engine, event, make_url, text

from propolis.secure.errors import StorageError, UsageError
from propolis.server.at_rest import RegistryKey
from propolis.server.registry import Registry
from propolis.server.registry_history import records_of
from propolis.server.registry_key import load_or_make_key
from propolis.server.registry_records import Lineage
from propolis.storage import locked

LINEAGE = Lineage(
    federation="ab" * 32,
    run_id="run-1",
    round=30,
    configuration={"rounds": 30, "codec": "dense", "bits": None},
    metrics={"accuracy": 0.5},
    uplink_bytes=2**40,
    downlink_bytes=3,
    survivors=9,
)


def test_a_version_is_what_was_registered(location: str, tmp_path: Path) -> None:
    file = model_file(tmp_path, size=500_000)  # of several chunks
    made = Registry(location).register("digits", file, LINEAGE)
    found = Registry(location).version("digits", 1)
    assert found == made
    assert (found.version, found.lineage, found.size) == (1, LINEAGE, file.stat().st_size)
    assert content(Registry(location), "digits", 1) == file.read_bytes()
    Registry(location).verify(found)
    assert abs(found.created_at - time.time()) < 60


def test_versions_count_from_one_for_each_model(location: str, tmp_path: Path) -> None:
    registry = Registry(location)
    for model in ("digits", "digits", "faces", "digits"):
        registry.register(model, model_file(tmp_path))
    assert [(each.model, each.version) for each in registry.versions()] == [
        *(("digits", number) for number in (1, 2, 3)),
        ("faces", 1),
    ]
    assert registry.models() == ["digits", "faces"]
    assert len(the_blobs(tmp_path / "registry")) == 1  # the same file is kept once


def test_a_run_is_registered_once_and_another_one_with_the_same_model_beside_it(location: str, tmp_path: Path) -> None:
    registry, file = Registry(location), model_file(tmp_path)
    assert [registry.register("digits", file, LINEAGE).version for _ in range(2)] == [1, 1]
    assert registry.register("digits", file, dataclasses.replace(LINEAGE, run_id="run-2")).version == 2
    assert registry.register("digits", file, dataclasses.replace(LINEAGE, round=31)).version == 3


def test_a_metric_that_is_no_number_is_kept_as_none(location: str, tmp_path: Path) -> None:
    metrics = {"loss": float("nan"), "accuracy": 0.5, "odd": float("inf")}
    made = Registry(location).register("digits", model_file(tmp_path), Lineage(metrics=metrics))
    assert made.lineage.metrics == {"loss": None, "accuracy": 0.5, "odd": None}
    Registry(location).verify(made)


def test_a_parent_must_be_a_version(location: str, tmp_path: Path) -> None:
    registry, file = Registry(location), model_file(tmp_path)
    registry.register("digits", file)
    assert registry.register("digits", file, Lineage(parent=1)).lineage.parent == 1
    with pytest.raises(UsageError, match="digits has no version or alias '7': its versions are 1 to 2"):
        registry.register("digits", file, Lineage(parent=7))
    assert len(registry.versions("digits")) == 2


def test_an_alias_goes_back_through_its_history(location: str, tmp_path: Path) -> None:
    registry, file = Registry(location), model_file(tmp_path)
    for _ in range(3):
        registry.register("digits", file)
    for number in (1, 2, 3, 3):  # the second promotion of 3 is none
        registry.promote("digits", number)
    registry.promote("digits", "champion", alias="challenger")
    assert registry.version("digits", 3).aliases == ("challenger", "champion")
    assert [registry.rollback("digits").version for _ in range(2)] == [2, 1]
    with pytest.raises(UsageError, match="digits had no champion before version 1"):
        registry.rollback("digits")
    registry.promote("digits", 3)
    assert registry.rollback("digits").version == 1
    assert registry.version("digits", "challenger").version == 3  # nobody touched that one
    with pytest.raises(UsageError, match="digits has no alias 'shadow'"):
        registry.rollback("digits", "shadow")


def test_aliases_of_one_model_are_not_those_of_another(location: str, tmp_path: Path) -> None:
    registry, file = Registry(location), model_file(tmp_path)
    registry.register("digits", file)
    registry.register("faces", file)
    registry.promote("digits", 1)
    assert registry.version("faces", 1).aliases == ()
    with pytest.raises(UsageError, match="faces has no version or alias 'champion'"):
        registry.version("faces", "champion")


def test_tags_are_set_replaced_and_removed(location: str, tmp_path: Path) -> None:
    registry = Registry(location)
    registry.register("digits", model_file(tmp_path))
    registry.tag("digits", 1, {"site": "a", "stage": "test"})
    assert registry.tag("digits", 1, {"site": "b"}, removed=["stage"]).tags == {"site": "b"}
    assert registry.version("digits", 1).tags == {"site": "b"}


def test_evaluations_are_kept_beside_each_other(location: str, tmp_path: Path) -> None:
    registry = Registry(location)
    version = registry.register("digits", model_file(tmp_path))
    registry.add_evaluation(version, "clinic a", {"accuracy": 0.5, "loss": float("nan")})
    registry.add_evaluation(version, "clinic a", {"accuracy": 0.75})
    found = registry.version("digits", 1).evaluations
    assert [(each.data, each.metrics) for each in found] == [
        ("clinic a", {"accuracy": 0.5, "loss": None}),
        ("clinic a", {"accuracy": 0.75}),
    ]


def test_processes_that_register_at_once_get_versions_of_their_own(location: str, tmp_path: Path) -> None:
    file = model_file(tmp_path)
    code = "for _ in range(5): Registry(sys.argv[1]).register('digits', Path(sys.argv[2]))"
    assert in_processes(code, location, file, count=4) == [0] * 4
    registry = Registry(location)
    assert [each.version for each in registry.versions("digits")] == list(range(1, 21))
    assert content(registry, "digits", 20) == file.read_bytes()


def test_processes_that_promote_at_once_lose_no_change(location: str, tmp_path: Path) -> None:
    registry, file = Registry(location), model_file(tmp_path)
    for _ in range(2):
        registry.register("digits", file)
    code = "for n in (1, 2) * 5: Registry(sys.argv[1]).promote('digits', n)"
    assert in_processes(code, location, count=3) == [0] * 3
    walked = []
    with suppress(UsageError):  # at the first change there is no way back
        while True:
            walked.append(registry.version("digits", "champion").version)
            registry.rollback("digits")
    assert all(a != b for a, b in pairwise(walked)), "each change names the one before it"
    assert walked[-1] == 1


def test_processes_that_make_a_registry_at_once_make_one(tmp_path: Path) -> None:
    code = "Registry.make(sys.argv[1]).register('digits', Path(sys.argv[2]))"
    assert in_processes(code, tmp_path / "new", model_file(tmp_path), count=4) == [0] * 4
    assert len(Registry(tmp_path / "new").versions("digits")) == 4


# Each step of a registration, the last before the commit and the first after it.
STEPS = {
    "a temporary file is open": "import propolis.server.vault as m; m.sealed = lambda *_: os._exit(9)",
    "half of it is written": (
        "import propolis.server.vault as m\ndef half(*_):\n    yield b'half'\n    os._exit(9)\nm.sealed = half"
    ),
    "it is not on the disk": "os.fsync = lambda _: os._exit(9)",
    "it has not its name": "Path.replace = lambda *_: os._exit(9)",
    "its name is not on the disk": "import propolis.server.blobs as m; m.sync_folder = lambda _: os._exit(9)",
    "there is no row": "Registry._add = lambda *_: os._exit(9)",
    "the row is not committed": (
        "before = Registry._add\ndef then_die(*a):\n    before(*a)\n    os._exit(9)\nRegistry._add = then_die"
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_before_the_commit_registers_nothing_and_loses_nothing(location: str, tmp_path: Path, step: str) -> None:
    registry, first, second = Registry(location), model_file(tmp_path, 1), model_file(tmp_path, 2)
    registry.register("digits", first)
    code = f"registry = Registry(sys.argv[1])\n{STEPS[step]}\nregistry.register('digits', Path(sys.argv[2]))"
    assert in_processes(code, location, second) == [9]

    registry = Registry(location)
    assert [each.version for each in registry.versions("digits")] == [1]
    assert len(the_blobs(tmp_path / "registry")) == 2  # what was left is found, and nothing else is removed
    assert len(registry.sweep(grace=0)) == 1
    assert content(registry, "digits", 1) == first.read_bytes()
    assert registry.register("digits", second).version == 2
    assert content(registry, "digits", 2) == second.read_bytes()


def test_a_kill_after_the_commit_has_registered(location: str, tmp_path: Path) -> None:
    file = model_file(tmp_path)
    code = "Registry(sys.argv[1]).register('digits', Path(sys.argv[2])); os._exit(9)"
    assert in_processes(code, location, file) == [9]
    assert content(Registry(location), "digits", 1) == file.read_bytes()


@pytest.mark.parametrize("step", ["load_or_make_key", "Database.create", "metadata.create_all"])
def test_a_kill_while_a_registry_is_made_is_mended_by_the_same_command(tmp_path: Path, step: str) -> None:
    code = (
        "import propolis.server.registry_making as m, propolis.server.registry_database as d\n"
        "Database, metadata = m.Database, d.metadata\n"
        f"owner = m if '{step}' == 'load_or_make_key' else {step.partition('.')[0] if '.' in step else 'm'}\n"
        f"setattr(owner, '{step.rpartition('.')[2]}', lambda *_: os._exit(9))\n"
        "Registry.make(sys.argv[1])"
    )
    assert in_processes(code, tmp_path / "new") == [9]
    with pytest.raises(UsageError, match=r"there is no registry in .*new: propolis models init makes one"):
        Registry(tmp_path / "new")
    assert Registry.make(tmp_path / "new").register("digits", model_file(tmp_path)).version == 1


def test_what_is_young_or_referenced_is_not_swept(location: str, tmp_path: Path) -> None:
    registry = Registry(location)
    registry.register("digits", model_file(tmp_path))
    (tmp_path / "registry" / "blobs" / ("f" * 64)).write_bytes(b"an orphan")
    assert registry.sweep() == []
    assert registry.sweep(grace=0, remove=False) == ["f" * 64]
    assert registry.sweep(grace=0) == ["f" * 64]
    assert registry.sweep(grace=0) == []
    registry.verify(registry.version("digits", 1))


def test_a_blob_that_is_swept_before_its_row_is_stored_again(location: str, tmp_path: Path) -> None:
    registry, file = Registry(location), model_file(tmp_path)
    stored, swept = registry._vault.store, []

    def store_and_lose(*arguments: object) -> None:
        stored(*arguments)  # type: ignore[arg-type]
        if not swept:
            swept.extend(Registry(location).sweep(grace=0))

    registry._vault.store = store_and_lose  # type: ignore[method-assign]
    assert registry.register("digits", file).version == 1
    assert len(swept) == 1
    assert content(registry, "digits", 1) == file.read_bytes()


def test_sweeping_while_others_register_removes_nothing_that_is_needed(location: str, tmp_path: Path) -> None:
    registry, done, failed = Registry(location), threading.Event(), []

    def sweeps() -> None:
        while not done.wait(0.002):
            try:
                registry.sweep(grace=0)
            except Exception as error:
                failed.append(error)

    sweeping = threading.Thread(target=sweeps)
    sweeping.start()
    try:
        for seed in range(15):  # a temporary file may be swept, too, with no grace: then the upload says so
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    registry.register("digits", model_file(tmp_path, seed))
                    break
                except StorageError:
                    continue
    finally:
        done.set()
        sweeping.join()
    assert failed == []
    versions = registry.versions("digits")
    assert len(versions) == 15
    for version in versions:
        registry.verify(version)


def test_a_sweep_that_waits_for_a_registration_sees_it_whatever_the_databases_default_is(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(location)
    if "://" in location:
        database = make_url(location).database
        engine = create_engine(make_url(location).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            level = "SET default_transaction_isolation = 'repeatable read'"
            connection.execute(text(f"ALTER DATABASE {database} {level}"))
        engine.dispose()
    sweeping = threading.Thread(target=lambda: Registry(location).sweep(grace=0))
    add = Registry._add

    def while_a_sweep_waits(self: Registry, *arguments: Any) -> int:
        sweeping.start()
        time.sleep(2)  # it has begun its transaction, and waits for this one's lock
        return add(self, *arguments)

    monkeypatch.setattr(Registry, "_add", while_a_sweep_waits)
    version = registry.register("digits", model_file(tmp_path))
    sweeping.join()
    registry.verify(version)


def test_who_reads_sees_one_state_and_cannot_write(location: str, tmp_path: Path) -> None:
    registry = Registry(location)
    with registry._database.reading() as connection:
        assert records_of(connection) == []
        Registry(location).register("digits", model_file(tmp_path))
        assert records_of(connection) == []
    if "://" in location:
        with pytest.raises(StorageError, match="read-only transaction"), registry._database.reading() as connection:
            connection.execute(text("DELETE FROM propolis_tag"))


@pytest.mark.parametrize("wanted", ["9" * 10, "9" * 20, "9" * 5000, str(2**31), "\udcff", "x" * 100])
def test_a_version_that_no_database_can_be_asked_for_is_one_line(location: str, tmp_path: Path, wanted: str) -> None:
    registry, file = Registry(location), model_file(tmp_path)
    registry.register("digits", file)
    with pytest.raises(UsageError, match="digits has no version or alias '") as caught:
        registry.version("digits", wanted)
    assert len(str(caught.value).encode()) < 200
    if len(wanted) == 20:
        with pytest.raises(UsageError, match="digits has no version or alias"):
            registry.register("digits", file, Lineage(parent=int(wanted)))
    if not wanted.isdecimal():
        with pytest.raises(UsageError, match="expected at most 64"):
            registry.rollback("digits", wanted)
        with pytest.raises(UsageError, match="expected a text"):
            registry.tag("digits", 1, {"key": f"{wanted}\udcff"})
        registry.tag("digits", 1, {}, [wanted])


def test_two_that_make_a_registry_with_one_key_file_use_one_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROPOLIS_REGISTRY_KEY_FILE", str(tmp_path / "key"))
    drawn = os.urandom

    def after_somebody_else(count: int) -> bytes:
        monkeypatch.setattr(os, "urandom", drawn)
        others.append(load_or_make_key(None))
        return drawn(count)

    others = list[RegistryKey]()
    monkeypatch.setattr(os, "urandom", after_somebody_else)
    mine = load_or_make_key(None)
    assert [mine] == others == [load_or_make_key(None)]


def test_a_file_that_changes_meanwhile_is_not_registered(location: str, tmp_path: Path) -> None:
    registry, file = Registry(location), model_file(tmp_path)
    whole = file.read_bytes()
    registry.register("digits", file)
    stored = registry._vault.store

    def changed(path: Path, digest: bytes) -> None:
        path.write_bytes(whole[:-8] + bytes(8))
        stored(path, digest)

    registry._vault.store = changed  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="changed while it was registered"):
        registry.register("digits", file)
    assert content(registry, "digits", 1) == whole
    assert len(registry.versions("digits")) == 1


def test_what_is_no_model_is_refused(location: str, tmp_path: Path) -> None:
    registry = Registry(location)
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UsageError, match="is no file of safetensors"):
        registry.register("digits", tmp_path / "pickle")
    with pytest.raises(UsageError, match=r"cannot read .*absent: No such file"):
        registry.register("digits", tmp_path / "absent")
    with pytest.raises(UsageError, match="there is no model 'digits'"):
        registry.version("digits", 1)


@pytest.mark.parametrize(("schema", "age"), [(0, "an older"), (4, "a newer")])
def test_the_schema_of_another_version_is_said(location: str, schema: int, age: str) -> None:
    url = location.replace("postgresql://", "postgresql+psycopg://") if "://" in location else None
    with create_engine(url or f"sqlite:///{location}/registry.db").begin() as connection:
        connection.execute(text("UPDATE propolis_registry SET schema_version = :schema"), {"schema": schema})
    with pytest.raises(
        UsageError, match=f"has schema {schema}, this version of Propolis reads 3: it was made by {age} one"
    ):
        Registry(location)


def test_a_writer_waits_for_another_one_and_a_reader_does_not(tmp_path: Path) -> None:
    registry, file = Registry.make(tmp_path / "registry"), model_file(tmp_path)
    registry.register("digits", file)
    with closing(sqlite3.connect(tmp_path / "registry" / "registry.db", check_same_thread=False)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        waiting = threading.Thread(target=registry.promote, args=("digits", 1))
        waiting.start()
        assert registry.version("digits", 1).aliases == ()
        waiting.join(timeout=1)
        assert waiting.is_alive()
        other.execute("COMMIT")
        waiting.join(timeout=30)
    assert registry.version("digits", 1).aliases == ("champion",)


def test_a_reader_that_takes_its_time_holds_up_no_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("propolis.server.registry_database._WAIT_S", 1)
    registry = Registry.make(tmp_path / "registry")
    registry.register("digits", model_file(tmp_path))
    with registry._database.reading() as connection:
        connection.execute(text("SELECT * FROM propolis_version")).all()
        registry.promote("digits", 1)


def test_who_makes_a_registry_waits_for_who_does_so_already(tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    making = threading.Thread(target=Registry.make, args=(folder,))
    with locked(folder / ".lock"):
        making.start()
        making.join(timeout=1)
        assert not (folder / "registry.key").exists()
    making.join(timeout=30)
    assert Registry(folder).versions() == []


def test_a_full_disk_is_one_line_and_registers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry.make(tmp_path / "registry")
    registry.register("digits", model_file(tmp_path, 1))
    kept = os.fsync

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        registry.register("digits", model_file(tmp_path, 2))
    monkeypatch.setattr(os, "fsync", kept)
    assert len(registry.versions("digits")) == 1
    assert registry.sweep(grace=0) == []


def test_a_full_disk_under_the_database_is_one_line(tmp_path: Path) -> None:
    registry = Registry.make(tmp_path / "registry")
    pages = "PRAGMA max_page_count = 12"  # SQLite's own limit gives the error that a full disk gives
    event.listen(registry._database._engine, "connect", lambda connection, _: connection.cursor().execute(pages))
    lineage = Lineage(configuration={"text": "x" * 200_000})
    with pytest.raises(StorageError, match=r"the registry in .*: database or disk is full"):
        registry.register("digits", model_file(tmp_path), lineage)
    assert Registry(tmp_path / "registry").versions() == []


def test_a_database_that_cannot_be_reached_is_one_line_without_the_password() -> None:
    with pytest.raises(StorageError, match=r"postgresql://me:\*\*\*@127\.0\.0\.1:1/models: ") as caught:
        Registry("postgresql://me:sesame@127.0.0.1:1/models")
    assert "sesame" not in str(caught.value)
    for query in ("password", "sslpassword", "nonsense"):
        with pytest.raises(StorageError) as caught:
            Registry(f"postgresql://me@127.0.0.1:1/models?{query}=sesame")
        assert "sesame" not in str(caught.value)
    with pytest.raises(UsageError, match="a folder or a URL of PostgreSQL"):
        Registry("mysql://me:sesame@127.0.0.1/models")


def test_a_moved_folder_is_the_same_registry(tmp_path: Path) -> None:
    file = model_file(tmp_path)
    Registry.make(tmp_path / "here").register("digits", file)
    (tmp_path / "here").rename(tmp_path / "there")
    assert content(Registry(tmp_path / "there"), "digits", 1) == file.read_bytes()
