"""A device has the old model or the new one, whole, whatever happens and whenever."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from dying import die_at
from releasing import NOW, WEIGHTS, Publisher, flipped, key_for, rewritten

from propolis.client.install import Installer, Status
from propolis.client.keyholder import Keyholder
from propolis.client.slots import Slots, records
from propolis.link.delivery import Outcome
from propolis.package import Package
from propolis.secure.content import WrappedKey
from propolis.secure.errors import RefusedError, StorageError, UsageError
from propolis.secure.manifest import Kind, Manifest


def model(text: bytes) -> dict[str, tuple[bytes, Kind]]:
    return {"model.onnx": (text, Kind.ONNX)}


OLDEST, OLD = model(b"oldest"), model(b"old " * 100_000)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


def install(device: Installer, *packages: Path) -> None:
    for package in packages:
        device.install(package, key_for(package), NOW)


def slot(publisher: Publisher, letter: str, index: int = 0) -> Path:
    return publisher.folder / f"device-{index}" / "models" / "digits" / "slots" / letter


def damage(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 1))


def test_every_step_is_told_and_the_model_is_there_without_a_network(publisher: Publisher) -> None:
    package, steps, probed = publisher.seal(), list[Status](), list[Mapping[str, bytes]]()

    def probe(_: Manifest, files: Mapping[str, bytes]) -> float:
        probed.append(files)
        return 0.0

    manifest = publisher.device(probe=probe, tell=steps.append).install(package, key_for(package), NOW)
    wanted = (Outcome.FETCHED, Outcome.VERIFIED, Outcome.PROBE_PASSED, Outcome.INSTALLED)
    assert steps == [Status(outcome) for outcome in wanted]
    assert probed[0]["golden.npz"] == b"recorded outputs"
    shutil.rmtree(package.parent)
    opened = publisher.device(probe=probe).open()
    assert (opened.manifest, opened.files["model.onnx"], opened.fell_back) == (manifest, WEIGHTS, False)
    assert len(probed) == 2


def test_a_failure_is_told_with_its_reason(publisher: Publisher, tmp_path: Path) -> None:
    package, steps = publisher.seal(), list[Status]()
    device = publisher.device(tell=steps.append)
    with pytest.raises(RefusedError):
        device.install(package, key_for(package, 1), NOW)
    assert steps == [Status(Outcome.FETCHED), Status(Outcome.FAILED, "package")]
    with pytest.raises(UsageError):
        device.install(tmp_path / "nowhere", key_for(package), NOW)
    assert steps[-1] == Status(Outcome.FAILED, "storage")


def test_slots_take_turns_and_only_the_last_two_releases_stay(publisher: Publisher) -> None:
    device = publisher.device()
    for sequence, letter in [(1, "a"), (2, "b"), (3, "a"), (4, "b")]:
        install(device, publisher.seal(sequence, model(b"%d" % sequence)))
        record = records(publisher.folder / "device-0")["digits"]
        assert (record.slots[0].letter, record.slots[0].release.sequence) == (letter, sequence)
        assert [one.release.sequence for one in record.slots[1:]] == ([sequence - 1] if sequence > 1 else [])
        assert device.open().files["model.onnx"] == b"%d" % sequence
    assert sorted(path.name for path in slot(publisher, "a").parent.iterdir()) == ["a", "b"]


def test_models_have_slots_of_their_own(publisher: Publisher) -> None:
    device = publisher.device()
    install(device, publisher.seal(5, model(b"face"), name="faces"), publisher.seal(1, model(b"digit")))
    assert device.open("faces").files["model.onnx"] == b"face"
    assert device.open("digits").files["model.onnx"] == b"digit"
    with pytest.raises(UsageError, match="more than one model"):
        device.open()
    for name in ("voices", "../digits", ""):
        with pytest.raises(UsageError, match=r"is not installed|more than one"):
            device.open(name)
    (publisher.folder / "device-0" / "models" / "faces" / "installed").write_bytes(b"\xff")
    assert device.open("digits").files["model.onnx"] == b"digit"
    assert not (publisher.folder / "device-0" / "models" / "voices").exists()
    with pytest.raises(UsageError, match="no model is installed"):
        publisher.device(1).open()


@pytest.mark.parametrize("file", ["package", "key"])
def test_where_the_current_slot_does_not_open_the_one_before_does_from_then_on(publisher: Publisher, file: str) -> None:
    device, new = publisher.device(), publisher.seal(2)
    install(device, publisher.seal(1, OLD), new)
    damage(slot(publisher, "b") / file)
    opened = device.open()
    assert (opened.files["model.onnx"], opened.fell_back) == (OLD["model.onnx"][0], True)
    assert (device.open().manifest.sequence, device.open().fell_back) == (1, False)
    install(device, new)
    assert (device.open().manifest.sequence, device.open().fell_back) == (2, False)


def test_where_the_current_model_does_not_run_any_more_the_one_before_does(publisher: Publisher) -> None:
    def probe(manifest: Manifest, _: Mapping[str, bytes]) -> float:
        if manifest.sequence == 2:
            raise RuntimeError("this runtime is older than the model")
        return 0.0

    install(publisher.device(), publisher.seal(1, OLD), publisher.seal(2))
    opened = publisher.device(probe=probe).open()
    assert (opened.manifest.sequence, opened.fell_back) == (1, True)


def test_where_the_current_slot_cannot_be_read_for_a_moment_it_is_back_afterwards(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = publisher.device()
    install(device, publisher.seal(1, OLD), publisher.seal(2))
    with monkeypatch.context() as patch:
        package_open, calls = Package.open, list[Path]()

        def out_of_files(path: Path, **options: bool) -> object:
            calls.append(path)
            if len(calls) == 1:
                raise UsageError("cannot read: Too many open files")
            return package_open(path, **options)

        patch.setattr(Package, "open", out_of_files)
        assert (device.open().manifest.sequence, len(calls)) == (1, 2)
    assert (device.open().manifest.sequence, device.open().fell_back) == (2, False)


def test_where_falling_back_cannot_be_written_the_model_serves_all_the_same(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("disk full")

    device = publisher.device()
    install(device, publisher.seal(1, OLD), publisher.seal(2))
    damage(slot(publisher, "b") / "package")
    monkeypatch.setattr(Slots, "write_record", full)
    assert device.open().manifest.sequence == device.open().manifest.sequence == 1


def test_where_no_slot_opens_the_reasons_are_said_and_installing_again_mends_it(publisher: Publisher) -> None:
    package, device = publisher.seal(), publisher.device()
    install(device, package)
    damage(slot(publisher, "a") / "package")
    with pytest.raises(UsageError, match="no slot of digits can be used, install it again: a: chunk 1 of the package"):
        device.open()
    install(device, package)
    assert device.open().files["model.onnx"] == WEIGHTS


def test_installing_again_keeps_the_one_before(publisher: Publisher) -> None:
    device, new = publisher.device(), publisher.seal(2)
    install(device, publisher.seal(1, OLD), new, new)
    damage(slot(publisher, "b") / "package")
    install(device, new)
    assert slot(publisher, "a").is_dir()
    damage(slot(publisher, "b") / "package")
    assert device.open().files["model.onnx"] == OLD["model.onnx"][0]


def test_a_damaged_record_is_told(publisher: Publisher) -> None:
    package, device = publisher.seal(), publisher.device()
    install(device, package)
    (slot(publisher, "a").parents[1] / "installed").write_bytes(b"\xff")
    for act in (device.open, lambda: install(device, package)):
        with pytest.raises(StorageError, match="is damaged: remove it"):
            act()


def test_a_refused_package_leaves_no_folder(publisher: Publisher) -> None:
    package = publisher.seal(name="faces")
    with pytest.raises(RefusedError):
        publisher.device().install(package, key_for(package), NOW, name="digits")
    assert not (publisher.folder / "device-0" / "models").exists()


def test_a_package_that_changes_between_check_and_copy_is_not_kept(publisher: Publisher) -> None:
    package = publisher.seal()
    damaged = rewritten(package).read_bytes()

    def probe(*_: object) -> float:
        with package.open("r+b") as file:
            file.write(flipped(damaged, len(damaged) - 1))
        return 0.0

    with pytest.raises(RefusedError, match="is not what was released"):
        publisher.device(probe=probe).install(package, key_for(package), NOW)
    with pytest.raises(UsageError, match="no model is installed"):
        publisher.device().open()


@pytest.mark.parametrize("store_plain", [False, True])
def test_killed_at_any_step_a_device_has_the_old_model_or_the_new_one(publisher: Publisher, store_plain: bool) -> None:
    home, package = publisher.on_disk(), publisher.seal(3)
    install(publisher.device(), publisher.seal(1, OLDEST), publisher.seal(2, OLD))
    key, holder, seen, number = key_for(package), Keyholder.load(home), list[int](), 0

    def update(folder: Path, key: WrappedKey = key) -> None:
        Installer(folder, holder).install(package, key, NOW, store_plain=store_plain)

    killed = True
    while killed:
        number += 1
        copy = publisher.folder / f"killed-{number}"
        shutil.copytree(home, copy)
        killed = die_at(number, lambda folder=copy: update(folder))
        opened = Installer(copy, holder).open()
        assert not opened.fell_back
        assert opened.files["model.onnx"] in (WEIGHTS, OLD["model.onnx"][0])
        seen.append(opened.manifest.sequence)
        update(copy)
        assert Installer(copy, holder).open().files["model.onnx"] == WEIGHTS
        assert sorted(path.name for path in (copy / "models/digits/slots").iterdir()) == ["a", "b"]
        assert not list(copy.rglob(".*"))
        shutil.rmtree(copy)
    assert number > 25
    assert seen == sorted(seen)
    assert set(seen) == {2, 3}


def test_killed_at_any_step_of_falling_back_a_device_has_the_one_before(publisher: Publisher) -> None:
    home = publisher.on_disk()
    install(publisher.device(), publisher.seal(1, OLD), publisher.seal(2))
    damage(slot(publisher, "b") / "package")
    holder, number, killed = Keyholder.load(home), 0, True
    while killed:
        number += 1
        copy = publisher.folder / f"killed-{number}"
        shutil.copytree(home, copy)
        killed = die_at(number, lambda folder=copy: Installer(folder, holder).open())
        assert Installer(copy, holder).open().files["model.onnx"] == OLD["model.onnx"][0]
    assert number > 5
