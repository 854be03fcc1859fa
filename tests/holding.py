"""A federation with a key holder, and devices that have enrolled."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from enrolling import DAY_S, Applicant, Site

from propolis.client.keyholder import Keyholder
from propolis.client.state import FileStore
from propolis.he_files import read_sealed_key
from propolis.secure.he.published import Published
from propolis.secure.manifest import Trust
from propolis.server.he_holder import HolderKey, make_holder_key
from propolis.server.he_key import Asked, Issued, issue_key
from propolis.server.membership import Membership

NOW = time.time()
SMALL = Asked(clients=10, seeded=True)


@dataclass
class Holding:
    """Root, server, holder and devices, each in a folder of its own."""

    folder: Path
    devices: list[Applicant] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.site = Site(self.folder / "fed")
        self.holder_file = self.folder / "holder" / "he.holder"
        self.holder_file.parent.mkdir()
        self.holder = self.delegate(self.holder_file)
        self.out = self.folder / "he"

    def delegate(self, out: Path, lifetime_s: int = DAY_S, now: float = NOW) -> HolderKey:
        return make_holder_key(self.site.federation, out, lifetime_s, now)

    def enroll(self, name: str) -> Applicant:
        device = Applicant(self.site.token(name))
        self.membership.admit(len(self.devices), device.state.descriptor)
        self.devices.append(device)
        return device

    @property
    def membership(self) -> Membership:
        return Membership(self.site.server)

    @property
    def trust(self) -> Trust:
        return Trust(self.membership.root_key, self.membership.roster)

    @property
    def copy(self) -> Path:
        """What the holder gets of the server's folder."""
        copy = self.folder / "fed-copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.site.server, copy)
        return copy

    def issue(self, asked: Asked = SMALL, now: float = NOW, federation: Path | None = None) -> Issued:
        return issue_key(federation or self.copy, self.holder_file, self.holder, self.out, asked, now)

    @property
    def published(self) -> Published:
        return Published.from_bytes((self.out / "he.public").read_bytes())

    def sealed(self, index: int) -> bytes:
        return read_sealed_key(self.out / "he.keys", index)

    def device(self, index: int) -> Keyholder:
        """A device that has just seen the newest roster."""
        return Keyholder.of(replace(self.devices[index].state, roster=self.membership.roster.signed))

    def home(self, index: int, **options: Any) -> Path:
        """A device's folder as its enrolment leaves it."""
        home = self.folder / f"device-{index}"
        FileStore.create(home, replace(self.devices[index].state, roster=self.membership.roster.signed), **options)
        return home


def holding(folder: Path, *names: str) -> Holding:
    made = Holding(folder)
    for name in names:
        made.enroll(name)
    return made
