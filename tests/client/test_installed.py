"""The installed models of a device, as what serves them asks for newer ones."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
from releasing import NOW, Publisher, key_for
from runnable import release

from propolis.client.infer import onnx_probe
from propolis.client.installed import InstalledModels
from propolis.client.keyholder import Keyholder


class Device:
    """A device that has no file left to open for so many times."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.failures, self.asked = folder, 0, 0

    def __call__(self) -> Keyholder:
        self.asked += 1
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return Keyholder.load(self.folder)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path)
    made.on_disk()
    return made


def install(publisher: Publisher, sequence: int) -> None:
    package = publisher.seal(sequence, release(float(sequence)))
    publisher.device(probe=onnx_probe).install(package, key_for(package), NOW)


def test_a_failure_that_passes_costs_no_release(publisher: Publisher, caplog: pytest.LogCaptureFixture) -> None:
    install(publisher, 1)
    device = Device(publisher.folder / "device-0")
    models = InstalledModels(device.folder, device)
    assert [model.version for model in models.open()] == ["1"]
    install(publisher, 2)
    device.failures = 3
    assert [[model.version for model in models.newer()] for _ in range(12)] == [*[[]] * 10, ["2"], []]
    assert device.asked == 5, "less and less often"
    assert caplog.text.count("Too many open files") == 1


def test_a_release_that_was_not_taken_over_is_given_again(publisher: Publisher) -> None:
    install(publisher, 1)
    device = Device(publisher.folder / "device-0")
    models = InstalledModels(device.folder, device)
    models.open()
    install(publisher, 2)
    assert [model.version for model in itertools.islice(models.newer(), 1)] == ["2"]
    assert [model.version for model in models.newer()] == ["2"]
    assert list(models.newer()) == []
