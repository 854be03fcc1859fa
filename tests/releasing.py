"""A federation that releases models to devices, and the means to forge what it releases."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from propolis.client.install import Installer, Status
from propolis.client.keyholder import Keyholder
from propolis.client.probe import Probe
from propolis.client.state import FileStore
from propolis.package import Header, Package, read_key
from propolis.protos import model_pb2
from propolis.secure import labels
from propolis.secure.announcement import announce
from propolis.secure.content import WrappedKey
from propolis.secure.identity import Root, Roster, Signed, SigningKey, TrustedRoster, descriptor_digest, sign
from propolis.secure.kem import hybrid_key
from propolis.secure.manifest import Kind, Manifest, Trial, Trust, sign_manifest
from propolis.secure.release import delegate
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.wire import decode
from propolis.server.plaintext import PlainFile
from propolis.server.publish import Facts, Recipient, Sealed, seal_package
from propolis.server.release_key import ReleaseKey

DAY_S = 24 * 3600
NOW = int(time.time())
WEIGHTS, GOLDEN = b"weights " * 50_000, b"recorded outputs"  # two chunks
FILES = {"model.onnx": (WEIGHTS, Kind.ONNX), "golden.npz": (GOLDEN, Kind.GOLDEN)}


def release_key(root: Root, serial: int = 1, **arguments: Any) -> ReleaseKey:
    key = SigningKey.generate()
    chosen = {"now": NOW, "lifetime_s": 90 * DAY_S, **arguments}
    return ReleaseKey(key, delegate(root, serial, key.public, **chosen))


@dataclass
class Publisher:
    """Everything that a federation has, in one hand."""

    folder: Path
    devices: int = 3

    def __post_init__(self) -> None:
        self.root = Root(SigningKey.generate())
        self.roster = Roster(self.root.federation, 1, NOW + 10 * 365 * DAY_S, ())
        self.states: list[DeviceState] = []
        for index in range(self.devices):
            self.roster, invitation, key = self.root.invite(self.roster, f"device-{index}")
            self.states.append(DeviceState.enrolled(self.root.public_key, invitation, key))
        self.hybrid = [hybrid_key() for _ in self.states]
        self.key = release_key(self.root)
        self.count = 0

    @property
    def signed_roster(self) -> Signed:
        return self.root.sign_roster(self.roster)

    @property
    def trust(self) -> Trust:
        return Trust(self.root.public_key, TrustedRoster(self.root.public_key, self.signed_roster))

    @property
    def recipients(self) -> list[Recipient]:
        return [
            Recipient(index, descriptor_digest(state.descriptor), state.own_descriptor.hpke_key, self.hybrid[index][1])
            for index, state in enumerate(self.states)
        ]

    def announcement(self, index: int = 0) -> Signed:
        """A device's hybrid key in its own words."""
        state = self.states[index]
        return announce(state.signing_key, self.root.federation, state.descriptor, self.hybrid[index][1])

    def seal(self, sequence: int = 1, files: dict[str, tuple[bytes, Kind]] = FILES, **changes: Any) -> Path:
        """A new package in a file of its own, with its keys beside it."""
        return self.sealed(sequence, files, **changes)[0]

    def sealed(
        self,
        sequence: int = 1,
        files: dict[str, tuple[bytes, Kind]] = FILES,
        key: ReleaseKey | None = None,
        recipients: list[Recipient] | None = None,
        *,
        post_quantum: bool = False,
        **facts: Any,
    ) -> tuple[Path, Sealed]:
        self.count += 1
        home = self.folder / f"release-{self.count}"
        home.mkdir()
        for name, (content, _) in files.items():
            (home / name).write_bytes(content)
        plain = [PlainFile(home / name, kind) for name, (_, kind) in files.items()]
        told = {"name": "digits", "created": NOW, "expires": NOW + DAY_S, "trial": Trial(1e-3, 5.0), **facts}
        out = home / "package"
        chosen = self.recipients if recipients is None else recipients
        given, by = Facts(sequence=sequence, **told), key or self.key
        return out, seal_package(plain, given, by, chosen, self.trust, out, post_quantum=post_quantum)

    def keyholder(self, index: int = 0) -> Keyholder:
        """A device that has just seen the newest roster."""
        device = Keyholder.of(replace(self.states[index], roster=self.signed_roster))
        return replace(device, hybrid_private=self.hybrid[index][0])

    def device(
        self,
        index: int = 0,
        probe: Probe | None = None,
        *,
        folder: str | None = None,
        tell: Callable[[Status], None] = lambda _: None,
        **options: Any,
    ) -> Installer:
        home = self.folder / (folder or f"device-{index}")
        home.mkdir(exist_ok=True)
        return Installer(home, self.keyholder(index), probe, tell=tell, **options)

    def on_disk(self, index: int = 0) -> Path:
        """A device's folder as its enrolment leaves it."""
        home = self.folder / f"device-{index}"
        FileStore.create(home, replace(self.states[index], roster=self.signed_roster))
        return home

    def forged(self, package: Path, **changes: Any) -> Path:
        """A package with another manifest, which the release key has signed; sizes and digests stay as they say."""
        return rewritten(package, manifest=sign_manifest(replace(manifest_of(package), **changes), self.key.key))


def key_for(package: Path, index: int = 0) -> WrappedKey:
    return read_key(package.with_name(package.name + ".keys"), index)


def manifest_of(package: Path) -> Manifest:
    with Package.open(package) as opened:
        return decode(Manifest, opened.release.manifest.payload, model_pb2.Manifest)


def parts_of(package: Path) -> tuple[Header, bytes]:
    """Header and ciphertext."""
    with Package.open(package) as opened:
        return opened.header, package.read_bytes()[len(opened.header.framed) :]


def rewritten(package: Path, body: bytes | None = None, **header: Any) -> Path:
    """Another package, with parts of it replaced."""
    before, ciphertext = parts_of(package)
    out = package.with_name(f"{package.name}-rewritten")
    out.write_bytes(replace(before, **header).framed + (ciphertext if body is None else body))
    return out


def signed_by(key: SigningKey, manifest: Manifest) -> Signed:
    return sign(labels.MANIFEST, key.private, manifest, model_pb2.Manifest)


def flipped(data: bytes, place: int) -> bytes:
    """The data with one bit changed."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
