"""A trained model comes home: released from the registry, sealed, and delivered to simulated devices over a real link.

Every device has a folder, keys and a certificate of its own, and does what ``propolis client run`` does.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from propolis.client.deliveries import Deliveries, Taking
from propolis.client.infer import open_installed, probe_of_this_device
from propolis.client.keyholder import Keyholder
from propolis.client.opening import Files, Opening, Work
from propolis.client.own_export import files_of
from propolis.export import evaluate_model
from propolis.link.certificates import load_tls
from propolis.link.spool import Spools
from propolis.secure.errors import PropolisError
from propolis.secure.identity import SigningKey
from propolis.secure.manifest import Manifest
from propolis.secure.release import delegate
from propolis.server.convert_version import convert_version
from propolis.server.delivery import Delivery
from propolis.server.golden_inputs import GoldenFrom
from propolis.server.link import LinkOptions, LinkServer
from propolis.server.membership import Membership
from propolis.server.post import Post
from propolis.server.registry import Registry
from propolis.server.registry_records import Version
from propolis.server.release import Publisher, Terms, release_version
from propolis.server.release_key import ReleaseKey
from propolis.server.reports import Reports
from propolis.server.rollout import start_rollout
from propolis.server.shelf import Shelf
from propolis.simulations.federation import SIMULATED, Federation, device_folder, make_federation
from propolis.simulations.linked import SERVER_FOLDER, write_linked_federation
from propolis.task import BUILT_IN, Examples, Task, check_task, load_task

_DAY_S = 24 * 3600
_SERIAL = 2  # 1 is the key holder's of homomorphic encryption
_LARGEST_MESSAGE = 2**20


@dataclass(frozen=True, slots=True)
class Delivered:
    """What became of a release.

    Attributes:
        manifest: what was released.
        package_bytes: of the package that all devices fetch.
        devices: that were to have it.
        installed: that verified, tried and installed it.
        seconds: from the first device's question to the last one's installation.
        device_metrics: the task's metrics on its test set, by one device's installed model.
    """

    manifest: Manifest
    package_bytes: int
    devices: int
    installed: int
    seconds: float
    device_metrics: dict[str, float]


class SharedExport:
    """Makes the files of an encrypted release; simulated devices are one machine, and what opened alike they share.

    Args:
        task: that the model solves.
        examples: real ones.
    """

    def __init__(self, task: Task, examples: Examples) -> None:
        self._task, self._examples = task, examples
        self._lock, self._made = threading.Lock(), dict[bytes, Files]()

    def __call__(self, work: Work) -> Files:
        """The files; raises as `files_of`."""
        with self._lock:  # torch exports one model at a time
            what = hashlib.sha256(work.words.encode() + work.to_bytes()).digest()
            if what not in self._made:
                self._made[what] = files_of(self._task, self._examples, work)
            return self._made[what]


def deliver(
    registry: Registry,
    version: Version,
    task: str,
    data: str | None,
    devices: int,
    federation: Federation | None = None,
) -> Delivered:
    """Release a version and deliver it to so many simulated devices.

    Args:
        registry: that the version is in.
        version: of the model; it is converted where it was not yet.
        task: reference of the one that it solves.
        data: folder with the task's data, where it reads one.
        devices: how many.
        federation: whose devices they are, where these have what opens an encrypted version; None makes one.

    Raises:
        UsageError: the model cannot be converted, or what that needs is not installed.
        PropolisError: not every device has installed it.
    """
    if not version.is_encrypted and not version.is_converted:
        # A simulation's devices are one machine, but the version stays: nobody was asked for real data's inputs.
        golden = GoldenFrom.NOWHERE if data and task not in BUILT_IN else GoldenFrom.DEFAULT
        version, _ = convert_version(registry, version, task, Path(data) if data else None, golden=golden)
    with TemporaryDirectory(prefix="propolis-") as name:
        folder, package = Path(name), Path(name) / "package"
        server = folder / SERVER_FOLDER
        publisher = _publisher(folder, federation or make_federation(devices), version.model)
        manifest = release_version(registry, version, publisher, Terms(), package)
        loaded = load_task(task, data)
        test = check_task(loaded).test
        start_rollout(server, package, 100)
        opening = Opening(task, None, SIMULATED, SharedExport(loaded, test))
        began = time.monotonic()
        with _served(server) as address:
            taken = asyncio.run(_look(folder, devices, address, opening))
        seconds = time.monotonic() - began
        installed = sum(found == [manifest] for found in taken)
        if installed < devices:
            raise PropolisError(f"{installed} of {devices} devices have installed the model: the log says why")
        first = device_folder(folder, 0)
        model = open_installed(first, Keyholder.load(first)).choice.model
        metrics = evaluate_model(loaded, model, test)
        return Delivered(manifest, package.stat().st_size, devices, installed, seconds, metrics)


def _publisher(folder: Path, federation: Federation, model: str) -> Publisher:
    """Have a federation's devices enrol, and its root let a new key release."""
    write_linked_federation(federation, folder)
    key = SigningKey.generate()
    delegation = delegate(federation.root, _SERIAL, key.public, time.time(), _DAY_S, (model,))
    return Publisher.of(folder / SERVER_FOLDER, ReleaseKey(key, delegation), model)


@contextmanager
def _served(server: Path) -> Iterator[str]:
    """A server that delivers, on loopback; its address."""
    membership = Membership(server)
    delivery = Delivery(Shelf(server, membership), membership, Reports(server))
    options = LinkOptions("127.0.0.1:0", 2, {}, largest_message=_LARGEST_MESSAGE)
    post = Post(_LARGEST_MESSAGE, Spools())
    with LinkServer(options, load_tls(server), membership, post, delivery=delivery) as link:
        yield f"127.0.0.1:{link.port}"


async def _look(folder: Path, devices: int, address: str, opening: Opening) -> Sequence[list[Manifest]]:
    """Let every device ask, at once; what each of them installed."""
    taking = Taking(address, probe=probe_of_this_device(), opening=opening)
    homes = [device_folder(folder, index) for index in range(devices)]
    return await asyncio.gather(*(Deliveries(home, load_tls(home), taking).look() for home in homes))
