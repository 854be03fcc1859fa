"""A device that takes a release with an encrypted model: what it needs, what it says without, and its own process."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dying import die_at
from encrypted_app import EncryptedHive
from encrypted_releases import EncryptedSite, opening, trained, under_key, with_first_release
from releasing import NOW, key_for
from runnable import FLOAT, golden, scaled

from propolis.client import opening as module
from propolis.client.deliveries import Deliveries
from propolis.client.infer import onnx_probe, open_installed
from propolis.client.install import Installer
from propolis.client.keyholder import Keyholder
from propolis.client.opening import Opening, Work, export_apart, files_from
from propolis.client.own_export import export_here
from propolis.link.delivery import Outcome
from propolis.secure.errors import PeerError, PropolisError, Refusal, TrustError, UsageError
from propolis.secure.he import bfv, held
from propolis.secure.manifest import Kind
from propolis.serving.golden import GOLDEN_FILE, Golden
from propolis.serving.model import load_model
from propolis.simulations.tasks.digits import Digits

Hive = tuple[EncryptedHive, list[bytes]]
WORDS = ("task", "data", "name", "version", "round", "frozen", "golden")


@pytest.fixture(scope="module")
def hive() -> Hive:
    return trained()


@pytest.fixture
def site(tmp_path: Path, hive: Hive) -> EncryptedSite:
    return with_first_release(tmp_path, hive)


def work(task: str = "digits", data: str | None = None, **changes: object) -> Work:
    state = {name: tensor.numpy() for name, tensor in Digits().model().state_dict().items()}
    return replace(Work(task, data, "digits", "7", 3, state, frozenset()), **changes)  # type: ignore[arg-type]


def require_refused(
    site: EncryptedSite, hive: Hive, how: Opening, refusal: Refusal, why: str, sequence: int = 2
) -> None:
    """A later release is refused, and the first one stays."""
    before = site.factor()
    with pytest.raises((PeerError, TrustError), match=why) as caught:
        site.install(site.seal(sequence, under_key(hive[1][1])), how=how)
    assert caught.value.refusal is refusal
    assert "\n" not in str(caught.value)
    assert (site.factor(), site.installed().choice.manifest.sequence) == (before, 1)


def test_each_device_serves_what_it_exported_and_falls_back_to_it(site: EncryptedSite, hive: Hive) -> None:
    site.install(site.seal(2, under_key(hive[1][1])))
    assert site.factor() == pytest.approx(float(hive[0].opened().arrays["b"][0]), abs=1e-6)
    choice = site.installed().choice
    assert (choice.file, choice.kind, choice.manifest.sequence) == (FLOAT, Kind.ONNX, 2)
    assert [file.name for file in choice.manifest.files] == [GOLDEN_FILE, FLOAT]
    (site.device(0) / "models" / "digits" / "slots" / "b" / "package").write_bytes(b"damaged")
    assert site.installed().fell_back


def test_what_is_installed_opens_without_the_key(site: EncryptedSite) -> None:
    before = site.factor()
    (site.device(0) / "he.key").unlink()
    assert site.factor() == before


def test_without_its_task_a_device_says_so(site: EncryptedSite, hive: Hive) -> None:
    require_refused(site, hive, opening(task=None), Refusal.EXPORT, "this device was not told its task")


def test_without_a_key_a_device_says_so(site: EncryptedSite, hive: Hive) -> None:
    (site.device(0) / "he.key").unlink()
    require_refused(site, hive, opening(), Refusal.HE_KEY, "has no key of homomorphic encryption")


def test_without_an_exporter_or_tenseal_a_device_says_so(
    site: EncryptedSite, hive: Hive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise UsageError("export needs onnx: pip install 'propolis[export]'")

    with monkeypatch.context() as patch:
        patch.setattr(module, "require_exporter", missing)
        require_refused(site, hive, opening(), Refusal.EXPORT, "export needs onnx")
    caches = (bfv._sealapi, held.scheme_of, held._ciphers, held._opened)
    monkeypatch.setitem(__import__("sys").modules, "tenseal.sealapi", None)
    for cached in caches:
        cached.cache_clear()
    try:
        require_refused(site, hive, opening(), Refusal.EXPORT, "needs TenSEAL", sequence=3)
    finally:
        for cached in caches:
            cached.cache_clear()


def test_what_is_installed_already_is_not_opened_again(site: EncryptedSite, hive: Hive) -> None:
    package = site.seal(2, under_key(hive[1][1]))
    site.install(package)
    (export,) = (path for path in site.device(0).rglob("export") if path.parent.name == "b")
    before = export.read_bytes()
    assert site.install(package, how=opening(task=None)).sequence == 2
    assert export.read_bytes() == before
    assert site.installed().choice.manifest.sequence == 2


def test_an_export_that_does_not_run_as_it_said_is_refused(site: EncryptedSite, hive: Hive) -> None:
    def odd(_: Work) -> dict[str, bytes]:
        return {FLOAT: scaled(2), GOLDEN_FILE: golden(**{FLOAT: 3.0})}

    require_refused(site, hive, opening(export=odd), Refusal.PROBE, "outputs on the golden batch differ")


def test_killed_at_any_step_a_device_serves_the_old_model_or_the_new_one(site: EncryptedSite, hive: Hive) -> None:
    home, package = site.device(0), site.seal(2, under_key(hive[1][1]))
    served, number, killed = list[int](), 0, True

    def install(folder: Path) -> None:
        exporter = opening().exporter(folder, None)
        Installer(folder, Keyholder.load(folder), onnx_probe, exporter=exporter).install(package, key_for(package), NOW)

    while killed:
        number += 1
        copy = site.folder / f"killed-{number}"
        shutil.copytree(home, copy)
        killed = die_at(number, lambda folder=copy: install(folder))  # type: ignore[misc]
        found = open_installed(copy, Keyholder.load(copy))
        assert not found.fell_back
        served.append(found.choice.manifest.sequence)
        install(copy)
        assert open_installed(copy, Keyholder.load(copy)).choice.manifest.sequence == 2
        shutil.rmtree(copy)
    assert number > 15
    assert served == sorted(served)
    assert set(served) == {1, 2}


# Over the link


def test_a_device_installs_reports_and_is_tried_again_when_its_key_has_come(site: EncryptedSite, hive: Hive) -> None:
    rollout = site.release(2, files=under_key(hive[1][1]))
    key = site.device(1) / "he.key"
    kept = key.read_bytes()
    with site.serving():
        assert [each.sequence for each in site.look(0, opening=opening())] == [2]
        assert site.wait_for_report(rollout.release, Outcome.INSTALLED).reason == ""
        key.unlink()
        waiting = site.deliveries(1, opening=opening())
        for _ in range(4):  # more often than what fails otherwise is tried
            with pytest.raises(PropolisError, match="has no key of homomorphic encryption"):
                look(waiting)
        assert site.wait_for_report(rollout.release, Outcome.FAILED, 1).reason == "he-key"
        key.write_bytes(kept)
        assert look(waiting) == [2]
    assert site.factor(0) == site.factor(1)


def test_a_device_without_the_task_reports_that_and_fetches_nothing(
    site: EncryptedSite, hive: Hive, caplog: pytest.LogCaptureFixture
) -> None:
    rollout = site.release(2, files=under_key(hive[1][1]))
    before = site.factor()
    with site.serving():
        assert site.look(0, opening=opening(task=None)) == []
        assert "this device was not told its task" in caplog.text
        assert not list((site.device(0) / "incoming").glob("*"))
        assert site.wait_for_report(rollout.release, Outcome.FAILED).reason == "export"
    assert site.factor() == before


def look(deliveries: Deliveries) -> list[int]:
    return [manifest.sequence for manifest in asyncio.run(deliveries.look())]


# The files, and the process that makes them


def test_a_process_of_its_own_makes_the_files_and_its_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPOLIS_PASSPHRASE", "secret")
    released = Golden({"input": np.eye(64, dtype=np.float32)[:3]}, {}).to_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loud.py").write_text(
        "import os\nfrom propolis.simulations.tasks.digits import Digits\nprint('loaded')\n"
        "assert 'PROPOLIS_PASSPHRASE' not in os.environ\nclass Loud(Digits):\n    pass\n"
    )
    files = export_apart(work("loud:Loud", golden=released))
    model, batch = load_model(files[FLOAT]), Golden.from_bytes(files[GOLDEN_FILE])
    assert (model.name, model.version) == ("digits", "7")
    assert batch.inputs["input"].shape == (3, 64)
    assert batch.difference(model, FLOAT) == 0
    assert batch.outputs[FLOAT]["output"].shape == (3, 10)
    assert "PROPOLIS_PASSPHRASE" in os.environ


def test_work_survives_its_way_to_the_process() -> None:
    asked = work(data="/data", frozen=frozenset({"a", "b"}), golden=b"batch")
    told = Work.of(asked.words, asked.to_bytes())
    assert [getattr(told, name) for name in WORDS] == [getattr(asked, name) for name in WORDS]
    assert all(np.array_equal(told.arrays[name], array) for name, array in asked.arrays.items())
    assert told.arrays.keys() == asked.arrays.keys()


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hang.py").write_text("import time\ntime.sleep(300)\n")
    began = time.monotonic()
    with pytest.raises(PeerError, match="the model was not exported in 4 s") as caught:
        export_apart(work("hang:Task"), seconds=4)
    assert time.monotonic() - began < 30
    assert caught.value.refusal is Refusal.EXPORT


def test_what_the_process_refuses_is_one_line() -> None:
    with pytest.raises(PeerError, match="the model cannot be exported: unknown task 'nothing'") as caught:
        export_apart(work("nothing"))
    assert caught.value.refusal is Refusal.EXPORT
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda: work(data="/nowhere"), "is not an .npz file with inputs and labels"),
        (lambda: work(arrays={"0.weight": np.zeros((2, 2), np.float32)}), "these are not weights of the task's model"),
        (lambda: work(golden=b"none"), "this is no golden batch"),
        (lambda: work(golden=Golden({"input": np.zeros((1, 3), np.float32)}, {}).to_bytes()), "input"),
        (lambda: work(arrays={name: a * np.nan for name, a in work().arrays.items()}), "differs from torch by nan"),
    ],
    ids=["odd-data", "another-task", "no-golden", "odd-golden", "nan"],
)
def test_what_cannot_be_exported_is_one_line(change: Callable[[], Work], why: str) -> None:
    with pytest.raises(PropolisError, match=why) as caught:
        export_here(change())
    assert "\n" not in str(caught.value)


def test_a_task_without_data_needs_the_devices_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.py").write_text(
        "from propolis.simulations.tasks.digits import Digits\nclass Bare(Digits):\n"
        "    def data(self):\n        raise FileNotFoundError('no folder')\n"
    )
    with pytest.raises(UsageError, match=r"give the device's own with --data \(FileNotFoundError: no folder\)"):
        export_here(work("bare:Bare"))
    np.savez(tmp_path / "own.npz", inputs=np.eye(64, dtype=np.float32)[:5], labels=np.arange(5))
    files = export_here(work("bare:Bare", data="own.npz"))
    assert Golden.from_bytes(files[GOLDEN_FILE]).inputs["input"].shape == (5, 64)


def test_damaged_files_are_none() -> None:
    with pytest.raises(PeerError, match="the exported files are damaged"):
        files_from(b"nothing of the kind")
