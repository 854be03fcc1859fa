"""A site whose releases are encrypted models, and devices that make a linear ONNX model of what they open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from delivering import Site
from encrypted_app import EncryptedHive
from onnx_models import WEIGHTS
from releasing import NOW, key_for
from runnable import FLOAT, INPUTS, golden, scaled

from propolis.client.infer import Installed, onnx_probe, open_installed
from propolis.client.install import Installer
from propolis.client.opening import Files, Opening, Work
from propolis.secure.manifest import Kind, Manifest
from propolis.serving.golden import GOLDEN_FILE
from propolis.simulations.federation import SIMULATED

Released = dict[str, tuple[bytes, Kind]]


def linear(work: Work) -> Files:
    """The files of a model that tells what was opened: a linear one with the first bias as its factor."""
    factor = float(work.arrays["b"][0])
    return {FLOAT: scaled(factor), GOLDEN_FILE: golden(**{FLOAT: factor})}


def opening(**changes: Any) -> Opening:
    return Opening(**{"task": "digits", "policy": SIMULATED, "export": linear, **changes})


def under_key(model: bytes, **more: tuple[bytes, Kind]) -> Released:
    """What is in a release of an encrypted model."""
    return {"model.encrypted": (model, Kind.ENCRYPTED), **more}


def trained(rounds: int = 2, hive: EncryptedHive | None = None) -> tuple[EncryptedHive, list[bytes]]:
    """A hive of five devices, and its model after each round."""
    hive, models = hive or EncryptedHive(5), list[bytes]()
    for number in range(1, rounds + 1):
        hive.round(**{"server-round": number})
        assert hive.grid.model is not None
        models.append(hive.grid.model.to_bytes())
    return hive, models


class EncryptedSite(Site):
    """A site with the devices of `EncryptedHive`, and their key of homomorphic encryption."""

    def __init__(self, folder: Path, hive: EncryptedHive) -> None:
        of = hive.federation
        devices = tuple(replace(state.copy(), roster=of.roster) for state in of.devices)
        super().__init__(folder, federation=replace(of, devices=devices), serial=2)  # 1 is the key holder's

    def installer(self, index: int = 0, how: Opening | None = None, **options: Any) -> Installer:
        exporter = (how or opening()).exporter(self.device(index), None)
        chosen = {"probe": onnx_probe, "exporter": exporter, **options}
        return Installer(self.device(index), self.keyholder(index), **chosen)

    def install(self, package: Path, index: int = 0, how: Opening | None = None, **options: Any) -> Manifest:
        return self.installer(index, how, **options).install(package, key_for(package, index), NOW)

    def installed(self, index: int = 0) -> Installed:
        """What serves on a device; it needs neither its task nor its key for that."""
        return open_installed(self.device(index), self.keyholder(index))

    def factor(self, index: int = 0) -> float:
        """That of the model that answers on a device."""
        return float(self.installed(index).choice.model.run(INPUTS)["output"][1, 1] / WEIGHTS[1, 1])


def with_first_release(folder: Path, hive: tuple[EncryptedHive, list[bytes]]) -> EncryptedSite:
    """A site in which device 0 has installed the model of the first round."""
    made = EncryptedSite(folder, hive[0])
    made.install(made.seal(1, under_key(hive[1][0])))
    return made
