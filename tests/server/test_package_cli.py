"""The commands of whoever releases models, and of the device that installs them, as their users meet them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command
from enrolling import Applicant, Site
from runnable import release

from propolis.client.hybrid import announcement_of
from propolis.client.keyholder import Keyholder
from propolis.client.state import FileStore
from propolis.secure.secagg.device_state import DeviceState
from propolis.server.roster import load_roster


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "fed")


def test_a_model_goes_from_the_command_line_to_a_device_and_back_again(
    site: Site, propolis: Command, mistake: Callable[..., str], tmp_path: Path
) -> None:
    applicant = Applicant(site.token())
    site.membership.refresh()
    site.membership.admit(0, applicant.state.descriptor)
    enrol_on_disk(applicant.state, site, tmp_path / "device")
    files = {name: content for name, (content, _) in release().items()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def run(*arguments: object) -> str:
        done = propolis(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "release key 1" in run("federation", "release-key", "fed", "--out", "release.key", "--model", "digits")
    seal = ("package", "seal", "--federation", "fed/server", "--release-key", "release.key", "--onnx", "model.onnx")
    seal = (*seal, "--golden", "golden.npz", "--name", "digits")
    assert "for 1 devices" in run(*seal, "--sequence", 1, "--out", "one", "--measure", "accuracy=0.9")
    shown = json.loads(run("package", "show", "one", "--json"))
    assert (shown["name"], shown["sequence"], shown["evaluation"]) == ("digits", 1, {"accuracy": 0.9})
    assert [file["kind"] for file in shown["files"]] == ["onnx", "golden"]
    assert "not checked" in run("package", "show", "one")
    assert "holds: release 1 of digits, by key 1" in run("package", "verify", "one", "--federation", "fed/server")
    assert json.loads(run("package", "verify", "one", "--federation", "fed/server", "--json"))["release_key"] == 1
    assert "no model is installed" in run("client", "installed", "--dir", "device")
    install = ("client", "install", "one", "one.keys", "--dir", "device")
    assert run(*install) == run(*install) == "installed: release 1 of digits; tried: onnx, differs by 0\n"
    run(*seal, "--sequence", 2, "--out", "two", "--json")
    run("client", "install", "two", "two.keys", "--dir", "device", "--model", "digits", "--store-plain")
    (found,) = json.loads(run("client", "installed", "--dir", "device", "--json"))
    assert (found["name"], found["sequence"], found["slot"], found["before"]) == ("digits", 2, "b", 1)
    assert "release 2 in slot b, before it 1" in run("client", "installed", "--dir", "device")
    assert (tmp_path / "device/models/digits/slots/b/plain/model.onnx").read_bytes() == files["model.onnx"]

    refused = propolis(*install)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "release 1 of digits is older than 2" in refused.stderr
    assert "exists: a release is never changed" in mistake(*seal, "--sequence", 3, "--out", "two")
    assert "is no name of a model" in mistake(*seal[:-1], "Digits!", "--sequence", 3, "--out", "three")
    assert "devices would refuse" in mistake(*seal[:-1], "faces", "--sequence", 3, "--out", "three")
    assert "--measure has the form" in mistake(*seal, "--sequence", 3, "--out", "three", "--measure", "accuracy")
    assert "--run-id is in hexadecimal" in mistake(*seal, "--sequence", 3, "--out", "three", "--run-id", "x")
    assert "release key 1 is revoked" in run("federation", "revoke-release-key", "fed", 1)
    assert "was revoked before" in run("federation", "revoke-release-key", "fed", 1)
    verified = propolis("package", "verify", "two", "--federation", "fed/server")
    assert (verified.returncode, "release key 1 is revoked" in verified.stderr) == (1, True)


def test_a_model_is_sealed_to_the_post_quantum_keys_of_those_who_have_one(
    site: Site, propolis: Command, mistake: Callable[..., str], tmp_path: Path
) -> None:
    applicants = [Applicant(site.token(name)) for name in ("clinic", "ward")]
    site.membership.refresh()
    for index, applicant in enumerate(applicants):
        site.membership.admit(index, applicant.state.descriptor)
        enrol_on_disk(applicant.state, site, tmp_path / f"device-{index}", index)
    (tmp_path / "model.onnx").write_bytes(release()["model.onnx"][0])
    assert propolis("federation", "release-key", "fed", "--out", "release.key").returncode == 0
    seal = ("package", "seal", "--federation", "fed/server", "--release-key", "release.key", "--onnx", "model.onnx")
    seal = (*seal, "--name", "digits", "--post-quantum", "--sequence")
    assert "no device has announced a post-quantum key yet" in mistake(*seal, 1, "--out", "one")
    site.membership.announce(1, announcement_of(tmp_path / "device-1"))

    said = propolis(*seal, 1, "--out", "one").stdout
    assert "for 1 devices" in said
    assert "left out, for they have announced no post-quantum key: clinic\n" in said
    told = json.loads(propolis(*seal, 2, "--out", "two", "--json").stdout)
    assert (told["devices"], told["left_out"], told["kem"]) == ([1], ["clinic"], "mlkem768_x25519")
    assert json.loads(propolis("package", "show", "two", "--json").stdout)["kem"] == "mlkem768_x25519"
    installed = propolis("client", "install", "one", "one.keys", "--dir", "device-1")
    assert (installed.returncode, installed.stdout.split(";")[0]) == (0, "installed: release 1 of digits")
    refused = propolis("client", "install", "one", "one.keys", "--dir", "device-0")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "no key for device 0: the package is not for it" in refused.stderr
    (tmp_path / "device-1" / "hybrid.key").unlink()
    assert "this device has none (hybrid.key)" in mistake("client", "install", "two", "two.keys", "--dir", "device-1")


def enrol_on_disk(state: DeviceState, site: Site, folder: Path, index: int = 0) -> None:
    state.roster = load_roster(site.server).signed
    FileStore.create(folder, state)
    assert Keyholder.load(folder).index == index
