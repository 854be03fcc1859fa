"""A device that is killed while it installs serves the old model or the new one when it comes back, whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from dying import die_at
from releasing import NOW, Publisher, key_for
from runnable import INPUTS, outputs_of, release

from propolis.client.infer import onnx_probe, open_installed
from propolis.client.keyholder import Keyholder
from propolis.client.models_cli import install_command

OLD, NEW = 1.0, 2.0


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    """Its device has the old model."""
    made = Publisher(tmp_path)
    made.on_disk()
    package = made.seal(1, release(OLD))
    made.device(probe=onnx_probe).install(package, key_for(package), NOW)
    return made


def computed(folder: Path) -> np.ndarray:
    """What a process that starts now computes with the model that is installed."""
    found = open_installed(folder, Keyholder.load(folder))
    assert not found.fell_back
    return found.choice.model.run(INPUTS)["output"]


def update(package: Path, folder: Path) -> None:
    """The command, in this process."""
    install_command(package, Path(f"{package}.keys"), folder)


def test_killed_at_any_step_of_the_command_a_device_serves_the_old_model_or_the_new_one(publisher: Publisher) -> None:
    """Steps of the device's own state, of its keys and of the trial included."""
    home, package = publisher.folder / "device-0", publisher.seal(2, release(NEW))
    served, number, killed = list[float](), 0, True
    while killed:
        number += 1
        copy = publisher.folder / f"killed-{number}"
        shutil.copytree(home, copy)
        killed = die_at(number, lambda folder=copy: update(package, folder))  # type: ignore[misc]
        outputs = computed(copy)
        served.extend(factor for factor in (OLD, NEW) if np.array_equal(outputs, outputs_of(factor)))
        assert len(served) == number
        update(package, copy)
        assert np.array_equal(computed(copy), outputs_of(NEW))
        shutil.rmtree(copy)
    assert number > 20
    assert served == sorted(served)
    assert set(served) == {OLD, NEW}
