"""``propolis bench delivery``: sealing for many devices, and many devices that fetch at once."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from propolis.package import read_key
from propolis.secure.identity import SigningKey, agreement_key
from propolis.secure.manifest import Kind, Trust
from propolis.secure.release import delegate
from propolis.server.membership import Membership
from propolis.server.plaintext import PlainFile
from propolis.server.publish import KEYS_SUFFIX, Facts, Recipient, recipients_of, seal_package
from propolis.server.release_key import ReleaseKey
from propolis.server.rollout import start_rollout
from propolis.simulations.bench.delivery_crowd import READY
from propolis.simulations.bench.link import Part
from propolis.simulations.bench.link_parts import Figure
from propolis.simulations.bench.link_processes import Process, listening_port, started, wait_until
from propolis.simulations.bench.memory import forget_peak, peak, resident_of
from propolis.simulations.federation import Federation, make_federation
from propolis.simulations.linked import SERVER_FOLDER, write_linked_federation

PACKAGES = ("grpcio", "cryptography", "propolis")
_DAY_S, _START_S = 24 * 3600, 60.0
_MB = 2**20


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done for a figure.

    Attributes:
        recipients: devices that a package is sealed for.
        devices: that fetch at once.
        megabytes: of the package's content.
        deadline_s: for all of them.
    """

    recipients: int = 10_000
    devices: int = 200
    megabytes: int = 50
    deadline_s: float = 600.0


def parts(effort: Effort) -> Mapping[str, tuple[str, Part]]:
    """What is measured."""
    return {
        "seal": (
            f"a package of {effort.megabytes} MiB sealed for {effort.recipients:,} devices",
            partial(sealing, effort),
        ),
        "crowd": (
            f"{effort.devices} devices fetch {effort.megabytes} MiB each at once from one server process",
            partial(crowd, effort),
        ),
    }


def sealing(effort: Effort) -> list[Figure]:
    """Time and size of one package for many devices."""
    with _released(effort, devices=1) as site:
        begin, few = time.monotonic(), _sealed(site, effort, "few", recipients_of(site.membership))
        one = time.monotonic() - begin
        recipients = [Recipient(index, os.urandom(32), agreement_key()[1]) for index in range(effort.recipients)]
        begin, many = time.monotonic(), _sealed(site, effort, "many", recipients)
        all_of_them = time.monotonic() - begin
        keys = many.with_name(many.name + KEYS_SUFFIX)
        begin, last = time.monotonic(), read_key(keys, effort.recipients - 1)
        found = time.monotonic() - begin
        own = len(last.sealed)
        return [
            Figure("for one device", one, "s"),
            Figure(f"for {effort.recipients:,} devices", all_of_them, "s", 5),
            Figure("each device more", keys.stat().st_size / effort.recipients, "B", 200),
            Figure("what a device gets of the keys", own, "B", 200),
            Figure("finding one device's key", found * 1e3, "ms"),
            Figure("the package beside one for one device", many.stat().st_size / few.stat().st_size, "x"),
        ]


def crowd(effort: Effort) -> list[Figure]:
    """Many devices that fetch one package at the same time."""
    with _released(effort, effort.devices) as site:
        start_rollout(
            site.folder / SERVER_FOLDER, _sealed(site, effort, "package", recipients_of(site.membership)), 100
        )
        with _serving(site.folder) as (server, address):
            out = site.folder / "seconds.json"
            arguments = [str(site.folder), str(effort.devices), address, str(out)]
            with started("propolis.simulations.bench.delivery_crowd", arguments, site.folder / "crowd.log") as devices:
                wait_until(lambda: READY in devices.log.read_text(), devices, _START_S)
                before = resident_of(server.popen.pid)
                forget_peak(server.popen.pid)
                begin = time.monotonic()
                devices.go()
                devices.wait(effort.deadline_s)
                whole, most = time.monotonic() - begin, peak(server.popen.pid)
            seconds = json.loads(out.read_text(encoding="utf-8"))
        moved = effort.devices * effort.megabytes
        return [
            Figure("growth of the server's memory", (most - before) / _MB, "MiB", 200),
            Figure("devices that have it whole", len(seconds), "", effort.devices, at_least=True),
            Figure("the first of them after", min(seconds), "s"),
            Figure("the last of them after", max(seconds), "s", effort.deadline_s),
            Figure("all together", moved / whole, "MiB/s"),
        ]


@dataclass(frozen=True, slots=True)
class _Site:
    """A federation that releases something."""

    folder: Path
    federation: Federation
    key: ReleaseKey
    membership: Membership


@contextmanager
def _released(effort: Effort, devices: int) -> Iterator[_Site]:
    with tempfile.TemporaryDirectory(prefix="propolis-bench-") as name:
        folder, federation = Path(name), make_federation(devices)
        write_linked_federation(federation, folder)
        key = SigningKey.generate()
        delegation = delegate(federation.root, 1, key.public, time.time(), _DAY_S, ())
        (folder / "model.onnx").write_bytes(os.urandom(effort.megabytes * _MB))
        yield _Site(folder, federation, ReleaseKey(key, delegation), Membership(folder / SERVER_FOLDER))


def _sealed(site: _Site, effort: Effort, name: str, recipients: list[Recipient]) -> Path:
    now, out = int(time.time()), site.folder / name
    trust = Trust(site.federation.root_key, site.membership.roster)
    files = [PlainFile(site.folder / "model.onnx", Kind.ONNX)]
    seal_package(files, Facts("model", 1, now, now + _DAY_S), site.key, recipients, trust, out)
    return out


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[Process, str]]:
    """The server command, which trains nothing, and its address."""
    arguments = ["server", "--idle", "--federation", str(folder / SERVER_FOLDER), "--listen", "127.0.0.1:0"]
    arguments += ["--enroll", "none", "--out", str(folder / "run"), "--log-format", "json"]
    with started("propolis", arguments, folder / "server.log") as process:
        yield process, f"127.0.0.1:{listening_port(process)}"
