"""From a registry to the devices and back: releases, their numbers, and who is interrupted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import Command
from enrolling import DAY_S, Applicant, Site
from registries import in_processes, model_file
from sqlalchemy import text

from propolis.client.install import Installer
from propolis.client.keyholder import Keyholder
from propolis.package import Package, read_key
from propolis.secure.content import wrap_key
from propolis.secure.errors import PeerError, TrustError, UsageError
from propolis.secure.identity import descriptor_digest
from propolis.secure.manifest import Kind, Manifest, Release, Trial
from propolis.secure.secagg.device_state import DeviceState
from propolis.server import release, release_cli
from propolis.server.plaintext import PlainData, PlainFile, Plaintext
from propolis.server.publish import KEYS_SUFFIX, Recipient
from propolis.server.registry import Registry
from propolis.server.registry_files import NewArtifact
from propolis.server.registry_records import Lineage
from propolis.server.registry_releases import Demand, NewRelease
from propolis.server.release import Publisher, Terms, release_version
from propolis.server.release_key import ReleaseKey, load_release_key, make_release_key
from propolis.server.rollout import newest_sequence
from propolis.server.roster import load_roster
from propolis.serving.golden import Golden

NOW = time.time()
RUN_ID = "5c" * 16
ONNX = b"onnx of version "
GOLDEN = Golden({"input": np.ones((2, 4), np.float32)}, {}).to_bytes()
TERMS = Terms(30, Trial(0.25))


class Home:
    """A federation with a release key, and a registry with versions of a model."""

    def __init__(self, folder: Path, location: str | None = None) -> None:
        self.folder = folder
        self.site = Site(folder / "fed")
        self.states: list[DeviceState] = []
        self.key = self.new_key("release.key")
        self.registry = Registry(location) if location else Registry.make(folder / "registry")

    def new_key(self, file: str, lifetime_s: int = DAY_S, models: tuple[str, ...] = ()) -> ReleaseKey:
        return make_release_key(self.site.federation, self.folder / file, lifetime_s, NOW, models)

    def enrol(self) -> Path:
        """One more device, which is enrolled."""
        index = len(self.states)
        applicant = Applicant(self.site.token(f"device-{index}"))
        self.site.membership.refresh()
        self.site.membership.admit(index, applicant.state.descriptor)
        self.states.append(applicant.state)
        return self.folder / f"device-{index}"

    def version(self, number: int) -> None:
        """One more version, with files that tell it from others."""
        lineage = Lineage(run_id=RUN_ID, round=7, metrics={"accuracy": 0.5, "loss": 1.25}, parent=number - 1 or None)
        made = self.registry.register("digits", model_file(self.folder, number), lineage)
        files = [
            NewArtifact("model.onnx", Kind.ONNX, ONNX + b"%d" % number),
            NewArtifact("golden.npz", Kind.GOLDEN, GOLDEN),
        ]
        self.registry.attach_all(made, files, {"model.onnx": {"accuracy": 0.25, "odd": float("inf")}}, "digits")

    @property
    def publisher(self) -> Publisher:
        return Publisher.of(self.site.server, self.key, "digits")

    def publish(self, wanted: int | str, out: str) -> Manifest:
        version = self.registry.version("digits", wanted)
        return release_version(self.registry, version, self.publisher, TERMS, self.folder / out)

    def install(self, index: int, package: str) -> Manifest:
        path = self.folder / package
        key = read_key(path.with_name(path.name + KEYS_SUFFIX), index)
        return self.installer(index).install(path, key, NOW, name="digits")

    def keyholder(self, index: int) -> Keyholder:
        return Keyholder.of(replace(self.states[index], roster=load_roster(self.site.server).signed))

    def installer(self, index: int) -> Installer:
        home = self.folder / f"device-{index}"
        home.mkdir(exist_ok=True)
        return Installer(home, self.keyholder(index))

    @property
    def sequences(self) -> list[tuple[int, int]]:
        found = [each for version in self.registry.versions("digits") for each in version.releases]
        return sorted((each.sequence, each.parent) for each in found)


@pytest.fixture
def home(location: str, tmp_path: Path) -> Home:
    made = Home(tmp_path, location)
    made.enrol()
    made.version(1)
    return made


@pytest.fixture
def small(tmp_path: Path) -> Home:
    """The same with a registry in a folder."""
    made = Home(tmp_path)
    made.enrol()
    made.version(1)
    return made


def test_a_release_says_what_the_registry_knows(home: Home) -> None:
    manifest = home.publish(1, "one")
    assert (manifest.name, manifest.sequence, manifest.parent, manifest.model_version) == ("digits", 1, 0, 1)
    assert (manifest.run_id.hex(), manifest.round, manifest.trial) == (RUN_ID, 7, Trial(0.25))
    assert (manifest.epsilon, manifest.delta) == (0, 0)
    assert {each.name: each.value for each in manifest.evaluation} == {
        "accuracy": 0.5,
        "loss": 1.25,
        "model.onnx accuracy": 0.25,
    }
    assert [(each.name, each.kind) for each in manifest.files] == [
        ("model.onnx", Kind.ONNX),
        ("golden.npz", Kind.GOLDEN),
    ]
    assert manifest.expires - manifest.created == 30 * DAY_S
    (noted,) = home.registry.version("digits", 1).releases
    assert (noted.sequence, noted.created_at, noted.expires_at) == (1, manifest.created, manifest.expires)
    with Package.open(home.folder / "one") as package:
        assert noted.manifest == package.release.digest.hex()
    assert home.install(0, "one") == manifest


def test_going_back_is_a_new_release_of_the_same_plaintext(home: Home) -> None:
    home.version(2)
    for number in (1, 2):
        home.registry.promote("digits", number)
        home.publish("champion", f"release-{number}")
    home.registry.rollback("digits")
    back = home.publish("champion", "release-3")
    first = home.install(0, "release-1")
    assert home.install(0, "release-2").sequence == 2
    assert home.install(0, "release-3") == back
    assert (back.sequence, back.parent, back.model_version) == (3, 2, 1)
    assert back.plaintext_digest == first.plaintext_digest
    assert back.ciphertext_digest != first.ciphertext_digest
    with pytest.raises(TrustError, match="release 1 of digits is older than 3"):
        home.install(0, "release-1")
    opened = home.installer(0).open("digits")
    assert opened.files["model.onnx"] == ONNX + b"1"
    assert home.sequences == [(1, 0), (2, 1), (3, 2)]


def test_a_device_that_enrols_later_gets_the_key_from_the_registry(home: Home) -> None:
    home.publish(1, "one")
    home.enrol()
    state = home.states[1]
    late = Recipient(1, descriptor_digest(state.descriptor), state.own_descriptor.hpke_key)
    with Package.open(home.folder / "one") as package:
        digest = package.release.digest
    content_key = home.registry.content_key(digest)
    assert content_key is not None
    wrapped = wrap_key(content_key, digest, late.index, late.descriptor, late.hpke_key)
    assert home.installer(1).install(home.folder / "one", wrapped, NOW).sequence == 1


STEPS = {
    "nothing is sealed": ("import propolis.server.release as m; m.seal_package = lambda *_, **__: os._exit(9)", []),
    "it is half sealed": ("import propolis.server.publish as m; m.write_keys = lambda *_: os._exit(9)", []),
    "it is sealed and not noted": ("Registry.add_release = lambda *_: os._exit(9)", []),
    "it is noted and not written": ("import propolis.server.release as m; m._move = lambda *_: os._exit(9)", [(1, 0)]),
}
RELEASE = """
from propolis.server.release import Publisher, Terms, release_version
from propolis.server.release_key import load_release_key
registry, folder, name = Registry(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
publisher = Publisher.of(folder / "fed" / "server", load_release_key(folder / "release.key"), "digits")
"""
PUBLISH = "release_version(registry, registry.version('digits', 1), publisher, Terms(), folder / name)"


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_leaves_an_unused_number_and_no_package(home: Home, location: str, step: str) -> None:
    break_it, noted = STEPS[step]
    code = f"{RELEASE}\n{break_it}\n{PUBLISH}"
    assert in_processes(code, location, home.folder, "one") == [9]
    assert not (home.folder / "one").exists()
    assert home.sequences == noted
    assert home.publish(1, "one").sequence == 2, "the number is never used again"
    assert home.install(0, "one").sequence == 2
    assert not list(home.folder.glob(".*")), "what was half done is gone"
    home.registry.verify(home.registry.version("digits", 1))


def test_an_error_while_it_is_noted_leaves_nothing_beside_it(small: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise UsageError("no room")

    monkeypatch.setattr(Registry, "add_release", fails)
    before = set(small.folder.iterdir())
    with pytest.raises(UsageError, match="no room"):
        small.publish(1, "one")
    assert set(small.folder.iterdir()) == before
    with pytest.raises(UsageError, match="exists: a release is never changed"):
        small.publish(1, "release.key")


def test_publishers_at_once_release_under_numbers_of_their_own(home: Home, location: str) -> None:
    code = f"{RELEASE}\nfor each in range(2):\n    name = f'package-{{os.getpid()}}-{{each}}'\n    {PUBLISH}"
    assert in_processes(code, location, home.folder, "", count=3) == [0] * 3
    assert [sequence for sequence, _ in home.sequences] == list(range(1, 7))
    assert all(parent < sequence for sequence, parent in home.sequences)


def test_publishers_at_once_with_one_name_write_one_package(home: Home, location: str) -> None:
    assert sorted(in_processes(f"{RELEASE}\n{PUBLISH}", location, home.folder, "one", count=3)) == [0, 1, 1]
    assert home.sequences == [(1, 0)], "who comes too late takes no number"
    assert home.registry.next_sequence("digits") == (2, 1)
    assert home.install(0, "one").sequence == 1
    assert not list(home.folder.glob(".*"))


def test_a_publisher_waits_for_another_one_and_takes_no_number_when_that_is_done(small: Home) -> None:
    failures = list[UsageError]()

    def publish() -> None:
        with pytest.raises(UsageError) as caught:
            small.publish(1, "one")
        failures.append(caught.value)

    second = Thread(target=publish)
    with release._beside(small.folder / "one"):
        second.start()
        second.join(1)
        assert second.is_alive()
        (small.folder / "one").write_bytes(b"of the first")
    second.join()
    assert "one exists: a release is never changed" in str(failures[0])
    assert small.registry.next_sequence("digits") == (1, 0)
    assert not list(small.folder.glob(".*"))


def test_a_package_that_comes_in_between_is_not_replaced(small: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    note = Registry.add_release

    def then_somebody_else_is_faster(*arguments: Any) -> Any:
        (small.folder / "one").write_bytes(b"another's")
        (small.folder / "one.keys").write_bytes(b"another's")
        return note(*arguments)

    monkeypatch.setattr(Registry, "add_release", then_somebody_else_is_faster)
    with pytest.raises(UsageError, match="one exists: a release is never changed"):
        small.publish(1, "one")
    assert (small.folder / "one").read_bytes() == (small.folder / "one.keys").read_bytes() == b"another's"


def test_names_that_begin_alike_do_not_share_a_place(small: Home) -> None:
    names = ["p" * 200 + end for end in ("a", "b")]
    with release._beside(small.folder / names[0]) as first:
        first.write_bytes(b"half")
        small.publish(1, names[1])
        assert first.read_bytes() == b"half"


def test_an_alias_that_moves_meanwhile_is_not_overruled(home: Home) -> None:
    home.version(2)
    for number in (1, 2):
        home.registry.promote("digits", number)
    version = home.registry.version("digits", "champion")
    home.registry.rollback("digits")
    with pytest.raises(UsageError, match="champion has moved to 1 meanwhile: nothing was released"):
        release_version(home.registry, version, home.publisher, TERMS, home.folder / "one", wanted="champion")
    assert home.sequences == []
    assert home.registry.next_sequence("digits") == (1, 0), "no number was taken"


def test_what_happens_during_the_conversion_counts(small: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    small.enrol()
    small.version(2)
    for number in (1, 2):
        small.registry.promote("digits", number)
    convert, during = release_cli.converted, list[Callable[[], object]]()

    def slowly(*arguments: Any) -> Any:
        during.pop()()
        return convert(*arguments)

    monkeypatch.setattr(release_cli, "converted", slowly)

    def publish(out: str) -> None:
        flags = {"federation": small.site.server, "release_key": small.folder / "release.key", "rollout": False}
        registry = str(small.folder / "registry")
        release_cli.publish_command("digits", "champion", out=small.folder / out, registry=registry, **flags)  # type: ignore[arg-type]

    during.append(lambda: small.registry.rollback("digits"))
    with pytest.raises(UsageError, match="champion has moved to 1 meanwhile"):
        publish("one")
    during.append(lambda: small.site.federation.revoke("device-1"))
    publish("two")
    assert read_key(small.folder / "two.keys", 0)
    with pytest.raises(PeerError, match="has no key for device 1"):
        read_key(small.folder / "two.keys", 1)


def test_a_registry_that_has_forgotten_numbers_goes_on_above_what_was_given_out(
    home: Home,
) -> None:
    registry = home.registry
    with pytest.raises(UsageError, match=r"be release 1 of digits, .* given 7: .* give --sequence-at-least 8"):
        registry.next_sequence("digits", Demand(above=7))
    assert registry.next_sequence("digits", Demand(at_least=8, above=7)) == (8, 0)
    assert registry.next_sequence("digits", Demand(at_least=3)) == (9, 0), "never a smaller one"
    with pytest.raises(UsageError, match="is the largest number"):
        registry.next_sequence("digits", Demand(at_least=2**63))
    with registry._database.writing() as connection:
        connection.execute(text("DELETE FROM propolis_sequence"))
    registry.add_release(registry.version("digits", 1), NewRelease(12, bytes(32), bytes(32), 1.0, 2.0, 0))
    assert registry.next_sequence("digits") == (13, 12)


def test_a_number_that_devices_would_refuse_is_not_sealed(small: Home) -> None:
    flags = {"federation": small.site.server, "release_key": small.folder / "release.key"}
    words = {"registry": str(small.folder / "registry"), "task": None, **flags}
    release_cli.publish_command("digits", "1", sequence_at_least=5, **words)  # type: ignore[arg-type]
    with small.registry._database.writing() as connection:
        connection.execute(text("DELETE FROM propolis_sequence"))
        connection.execute(text("DELETE FROM propolis_release"))
    with pytest.raises(UsageError, match="give --sequence-at-least 6"):
        release_cli.publish_command("digits", "1", rollout=False, out=small.folder / "x", **words)  # type: ignore[arg-type]
    assert not (small.folder / "x").exists()
    release_cli.publish_command("digits", "1", sequence_at_least=6, **words)  # type: ignore[arg-type]
    assert newest_sequence(small.site.server, "digits") == 6


def test_what_devices_would_refuse_takes_no_number(small: Home) -> None:
    def refused(key: ReleaseKey, model: str = "digits") -> str:
        with pytest.raises(UsageError) as caught:
            Publisher.of(small.site.server, key, model)
        return str(caught.value)

    assert "the release key 2 has expired" in refused(small.new_key("old.key", -1))
    assert "release key 3 is for faces, not for digits" in refused(small.new_key("faces.key", models=("faces",)))
    assert "is no name of a model" in refused(small.key, "Digits")
    other = small.new_key("revoked.key")
    small.site.federation.revoke_release_key(4)
    assert "the release key 4 is revoked" in refused(other)
    assert small.registry.next_sequence("digits") == (1, 0)


def test_a_federation_without_devices_is_said(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(UsageError, match=r"no device has enrolled in .*fed/server: nobody could open the package"):
        _ = home.publisher


def test_the_plaintext_is_that_of_the_files(tmp_path: Path) -> None:
    content = b"abc" * 200_000  # of several chunks
    (tmp_path / "model.onnx").write_bytes(content)
    ours = Plaintext([PlainData("model.onnx", Kind.ONNX, content)])
    files = Plaintext([PlainFile(tmp_path / "model.onnx", Kind.ONNX)])
    assert (ours.digest, ours.files) == (files.digest, files.files)
    assert list(ours.chunks()) == list(files.chunks())


def test_the_command_hands_the_package_to_the_server(small: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[tuple[Path, bool, float, list[int]]] = []

    def start_rollout(federation: Path, package: Path, percent: float) -> None:
        keys = package.with_name(package.name + KEYS_SUFFIX)
        noted = [each.sequence for each in small.registry.version("digits", 1).releases]
        handed.append((federation, package.exists() and keys.exists(), percent, noted))
        if percent == 1:
            raise UsageError("the server takes none")

    module = ModuleType("propolis.server.rollout")
    module.start_rollout = start_rollout  # type: ignore[attr-defined]
    module.newest_sequence = lambda *_: 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def publish(**more: object) -> None:
        flags = {"federation": small.site.server, "release_key": small.folder / "release.key", **more}
        release_cli.publish_command("digits", "1", registry=str(small.folder / "registry"), **flags)  # type: ignore[arg-type]

    publish(percent=25.0)
    assert handed == [(small.site.server, True, 25.0, [1])], "it is noted before it is given out"
    with pytest.raises(UsageError, match="the server takes none"):
        publish(percent=1.0, out=small.folder / "two")
    assert small.install(0, "two").sequence == 2
    publish(rollout=False, out=small.folder / "three")
    assert len(handed) == 2
    assert small.sequences == [(1, 0), (2, 1), (3, 2)]


def test_mistakes_are_one_line(small: Home, propolis: Command, mistake: Callable[..., str]) -> None:
    (small.folder / "registry").rename(small.folder / "models")
    publish = ("models", "publish", "digits", "1", "--federation", "fed/server", "--registry", "models")
    key = ("--release-key", "release.key")
    assert "say where to, with --out" in mistake(*publish, *key, "--no-rollout")
    assert "--percent is of a rollout" in mistake(*publish, *key, "--no-rollout", "--out", "x", "--percent", 5)
    assert "has no version or alias '7'" in mistake(*publish[:3], "7", *publish[4:], *key)
    assert "absent.key" in mistake(*publish, "--release-key", "absent.key")
    assert "nowhere" in mistake(*publish[:5], "nowhere", *publish[6:], *key)
    small.new_key("old.key", -1)
    old = mistake(*publish, "--release-key", "old.key", "--no-rollout", "--out", "x")
    assert "devices would refuse this release: the release key 2 has expired" in old
    assert "give --int8 too" in mistake(*publish, *key, "--seven-bits")
    assert "digits 1 has a golden batch" in mistake(*publish, *key, "--no-golden", "--no-rollout", "--out", "x")
    assert "without model.int8.onnx" in mistake(*publish, *key, "--int8", "--no-rollout", "--out", "x")
    done = propolis(*publish, *key, "--no-rollout", "--out", "x")
    assert done.stdout == "digits 1 is release 1 of digits, for 1 devices: x\n"
    shown = propolis("models", "show", "digits", 1, "--registry", "models").stdout
    assert "\nmodel.onnx: 17 B, sha256 " in shown
    assert "\nrelease 1, " in shown


def test_the_release_of_a_package_is_found_by_its_digest(small: Home) -> None:
    small.publish(1, "one")
    with Package.open(small.folder / "one") as package:
        found: Release = package.release
    assert len(small.registry.content_key(found.digest) or b"") == 32
    assert load_release_key(small.folder / "release.key").claimed.serial == 1
