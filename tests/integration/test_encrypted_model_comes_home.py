"""A model that was trained encrypted, from the run to an answer on a device; no server ever has it in clear."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from delivering import Site
from sklearn.datasets import load_digits

from propolis.client.encrypted_sums import open_model_file
from propolis.client.infer import probe_of_this_device
from propolis.client.installed import InstalledModels
from propolis.client.opening import Opening
from propolis.client.state import FileStore
from propolis.link.delivery import Outcome
from propolis.secure.release import delegate
from propolis.secure.secagg.policy import Policy
from propolis.server.delegated_key import make_delegated_key
from propolis.server.job import RunOptions
from propolis.server.registration import Registration
from propolis.server.registry import Registry
from propolis.settings import Settings
from propolis.simulations.deliver import deliver
from propolis.simulations.federation import recalled_federation
from propolis.simulations.run import DEVICES, simulate
from propolis.task import load_task

DEVICES_OF_RUN = 4
SETTINGS = Settings(clients=DEVICES_OF_RUN, rounds=2, epochs=2, protection="he")


@dataclass(frozen=True)
class Trained:
    folder: Path
    registry: Registry
    accuracy: float


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    there = Registration.asked(str(folder / "registry"), None, SETTINGS.task)
    result = simulate(SETTINGS, RunOptions(folder / "run", registration=there))
    assert result["registered"]["version"] == 1
    return Trained(folder, Registry(folder / "registry"), result["accuracy"])


@pytest.fixture
def site(trained: Trained, tmp_path: Path) -> Iterator[Site]:
    """The federation of the run, whose server delivers."""
    federation = recalled_federation(trained.folder / "run" / DEVICES, DEVICES_OF_RUN)
    made = Site(tmp_path / "site", federation=federation, serial=2)
    make_delegated_key(tmp_path / "release.key", lambda public: delegate(made.root, 3, public, time.time(), 3600), None)
    with made.serving():
        yield made


def publishing(trained: Trained, site: Site) -> tuple[object, ...]:
    where = ("--registry", trained.registry.name, "--federation", site.server_folder)
    return ("models", "publish", "digits", 1, *where, "--release-key", "release.key")


def test_it_is_published_fetched_opened_and_answers_as_torch_does(
    trained: Trained, site: Site, propolis: Command, tmp_path: Path
) -> None:
    done = propolis(*publishing(trained, site), "--golden-from-test-set", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {file["name"]: file["kind"] for file in said["files"]} == {
        "model.encrypted": "encrypted",
        "golden.npz": "golden",
    }
    assert (said["round"], said["evaluation"]) == (2, {})
    site.membership.look()

    opening = Opening("digits", policy=Policy())
    (manifest,) = site.look(1, opening=opening, probe=probe_of_this_device())
    assert manifest.sequence == said["sequence"]
    (rollout,) = site.rollouts.all_of("digits")
    assert site.wait_for_report(rollout.release, Outcome.INSTALLED, 1).reason == ""

    images, labels = load_digits(return_X_y=True)
    inputs = (images / 16).astype(np.float32)
    np.save(tmp_path / "images.npy", inputs)
    answer = propolis("predict", "--dir", site.device(1), "--input", "images.npy", "--json")
    assert answer.returncode == 0, answer.stderr
    outputs = np.array(json.loads(answer.stdout)["outputs"]["output"])
    assert json.loads(answer.stdout)["file"] == "model.onnx"
    (served,) = InstalledModels(site.device(1), lambda: site.keyholder(1)).open()
    np.testing.assert_array_equal(served.run({"input": inputs})["output"], outputs.astype(np.float32))

    store = FileStore(trained.folder / "run" / DEVICES / "device-0", Policy())
    model = load_task("digits").model()
    opened = open_model_file(store, trained.folder / "run" / "model.encrypted")
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in opened.arrays.items()})
    expected = model.eval()(torch.from_numpy(inputs)).detach().numpy()
    np.testing.assert_allclose(outputs, expected, atol=1e-3)
    assert np.mean(outputs.argmax(1) == labels) == np.mean(expected.argmax(1) == labels) > 0.7


def test_a_package_is_installed_from_a_file(trained: Trained, site: Site, propolis: Command, tmp_path: Path) -> None:
    done = propolis(*publishing(trained, site), "--no-rollout", "--out", "package", "--json")
    said = json.loads(done.stdout)
    installing = ("client", "install", "package", "package.keys", "--dir", site.device(2), "--json")
    assert "this device was not told its task" in propolis(*installing).stderr
    installed = propolis(*installing, "--task", "digits", "--store-plain")
    assert json.loads(installed.stdout) == {**said_of(said), "tried": "model.onnx", "difference": 0.0}
    (plain,) = site.device(2).rglob("plain")
    assert {path.name for path in plain.iterdir()} == {"model.onnx", "golden.npz"}


def said_of(manifest: dict[str, object]) -> dict[str, object]:
    return {name: manifest[name] for name in ("name", "sequence")}


def test_a_simulation_delivers_what_its_witness_saw(trained: Trained) -> None:
    federation = recalled_federation(trained.folder / "run" / DEVICES, DEVICES_OF_RUN)
    version = trained.registry.version("digits", 1)
    done = deliver(trained.registry, version, "digits", None, DEVICES_OF_RUN, federation)
    assert (done.installed, done.devices) == (DEVICES_OF_RUN, DEVICES_OF_RUN)
    assert done.device_metrics["accuracy"] == trained.accuracy


def test_publishing_says_what_devices_do_themselves(trained: Trained, site: Site, mistake: Command) -> None:
    before = trained.registry.version("digits", 1)
    why = mistake(*publishing(trained, site), "--int8")
    assert "digits 1 is encrypted: devices export it, in float32" in why
    assert trained.registry.version("digits", 1) == before
