"""A server that delivers releases on loopback, and devices that take them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from releasing import DAY_S, FILES, NOW, release_key

from propolis.client.deliveries import Deliveries, Taking
from propolis.client.keyholder import Keyholder
from propolis.he_files import write_sealed_keys
from propolis.link.certificates import Tls, load_tls
from propolis.link.delivery import Release
from propolis.link.options import DEVICE_OPTIONS, credentials_of
from propolis.link.spool import Spools
from propolis.protos import he_pb2, model_pb2_grpc
from propolis.protos import model_pb2 as pb
from propolis.secure.he.held import KeyBundle, scheme_of
from propolis.secure.he.keys import SealedKey, delegate_holder, make_key, seal_key, state_key
from propolis.secure.he.parameters import choose
from propolis.secure.identity import Root, Roster, SigningKey, descriptor_digest
from propolis.secure.manifest import Kind, Manifest, Trial, Trust
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.wire import decode, fill
from propolis.server.delivery import Delivery
from propolis.server.he_key import KEYS_FILE, PUBLIC_FILE
from propolis.server.he_served import KEY_FOLDER, ServedKey
from propolis.server.link import LinkOptions, LinkServer
from propolis.server.membership import Membership
from propolis.server.plaintext import PlainFile
from propolis.server.post import Post
from propolis.server.publish import Facts, Sealed, recipients_of, seal_package
from propolis.server.reports import Report, Reports
from propolis.server.rollout import Rollout, Rollouts
from propolis.server.roster import replace_roster
from propolis.server.shelf import ContentKeys, Shelf
from propolis.simulations.federation import Federation, device_folder, make_federation
from propolis.simulations.linked import SERVER_FOLDER, write_linked_federation

WAIT_S = 60.0


class Site:
    """A federation in a folder, whose releases are delivered while `serving`."""

    def __init__(self, folder: Path, devices: int = 3, federation: Federation | None = None, serial: int = 1) -> None:
        self.folder, self.server_folder = folder, folder / SERVER_FOLDER
        self.federation = federation or make_federation(devices, seed=0)
        write_linked_federation(self.federation, folder)
        self.root = self.federation.root
        self.key = release_key(self.root, serial)
        self.membership = Membership(self.server_folder)
        self.rollouts, self.reports = Rollouts(self.server_folder), Reports(self.server_folder)
        self.key_folder = self.server_folder / KEY_FOLDER
        self.he_key = ServedKey(self.key_folder, self.membership)
        self.address = ""
        self._sealed = 0

    @property
    def roster(self) -> Roster:
        return self.membership.roster.roster

    def put_roster(self, roster: Roster) -> None:
        """As the federation's owner copies a newer one to the server."""
        replace_roster(self.server_folder, self.root.sign_roster(roster))
        self.membership.look()

    def seal(self, sequence: int = 1, files: dict[str, tuple[bytes, Kind]] = FILES, **facts: Any) -> Path:
        return self.sealed(sequence, files, **facts)[0]

    def sealed(
        self,
        sequence: int = 1,
        files: dict[str, tuple[bytes, Kind]] = FILES,
        post_quantum: bool = False,
        **facts: Any,
    ) -> tuple[Path, Sealed]:
        self._sealed += 1
        home = self.folder / f"sealed-{self._sealed}"
        home.mkdir()
        for name, (content, _) in files.items():
            (home / name).write_bytes(content)
        plain = [PlainFile(home / name, kind) for name, (_, kind) in files.items()]
        told = {"name": "digits", "created": NOW, "expires": NOW + DAY_S, "trial": Trial(1e-3, 5.0), **facts}
        trust = Trust(self.membership.root_key, self.membership.roster)
        out = home / "package"
        recipients = recipients_of(self.membership)
        sealed = seal_package(
            plain, Facts(sequence=sequence, **told), self.key, recipients, trust, out, post_quantum=post_quantum
        )
        return out, sealed

    def release(self, sequence: int = 1, percent: float = 100, **changes: Any) -> Rollout:
        """Seal and hand over."""
        return self.rollouts.start(self.seal(sequence, **changes), percent)

    @contextmanager
    def serving(
        self, rate: float = 0, content_keys: ContentKeys = lambda _: None, **options: Any
    ) -> Iterator[LinkServer]:
        chosen = LinkOptions(**{"listen": "127.0.0.1:0", "run_id": 7, "run_config": {}, **options})
        delivery = Delivery(
            Shelf(self.server_folder, self.membership, content_keys), self.membership, self.reports, rate, self.he_key
        )
        post = Post(chosen.largest_message, Spools())
        tls = load_tls(self.server_folder)
        with LinkServer(chosen, tls, self.membership, post, delivery=delivery) as server:
            self.address = f"127.0.0.1:{server.port}"
            yield server

    def device(self, index: int = 0) -> Path:
        return device_folder(self.folder, index)

    def tls(self, index: int = 0) -> Tls:
        return load_tls(self.device(index))

    def keyholder(self, index: int = 0) -> Keyholder:
        return Keyholder.load(self.device(index))

    def deliveries(self, index: int = 0, address: str | None = None, **taking: Any) -> Deliveries:
        return Deliveries(self.device(index), self.tls(index), Taking(address or self.address, **taking))

    def look(self, index: int = 0, address: str | None = None, **taking: Any) -> list[Manifest]:
        """Let a device ask once; what it installed."""

        async def once() -> list[Manifest]:
            return await self.deliveries(index, address, **taking).look()

        return asyncio.run(once())

    def reported(self, release: Release, index: int = 0) -> Report | None:
        return next((each for each in self.reports.of(release) if each.device == index), None)

    def wait_for_report(self, release: Release, outcome: int, index: int = 0) -> Report:
        deadline = time.monotonic() + WAIT_S
        while (report := self.reported(release, index)) is None or report.outcome != outcome:
            assert time.monotonic() < deadline, f"never reported: {report}"
            time.sleep(0.02)
        return report

    @contextmanager
    def stub(self, index: int = 0, tls: Tls | None = None) -> Iterator[Any]:
        """The service as a device of this index may call it, to say what it likes."""
        credentials = credentials_of(tls or self.tls(index))
        with grpc.secure_channel(self.address, credentials, options=DEVICE_OPTIONS) as channel:
            yield model_pb2_grpc.DeliveryStub(channel)


class KeyHolder:
    """Who makes the federation's keys of homomorphic encryption, small ones.

    Args:
        root: that delegates it.
        serial: by which the root takes that back.
    """

    def __init__(self, root: Root, serial: int = 1) -> None:
        self.root, self._key = root, SigningKey.generate()
        self._delegation = delegate_holder(root, serial, self._key.public, time.time(), DAY_S)

    def bundles(self, number: int, devices: Sequence[DeviceState], masked: bool = False) -> dict[int, bytes]:
        """A new key with this number, for these devices."""
        public, secret = make_key(self.root.federation, scheme_of(choose(10, 8, seeded=True)), masked=masked)
        statement, made = state_key(self._key, public, number), dict[int, bytes]()
        for state in devices:
            digest = descriptor_digest(state.descriptor)
            sealed = seal_key(public, secret, state.index, digest, state.own_descriptor.hpke_key)
            made[state.index] = KeyBundle(self._delegation, statement, public.material, sealed).to_bytes()
        return made


def put_key(folder: Path, bundles: Mapping[int, bytes]) -> None:
    """As the federation's owner copies a key's files to the server."""
    folder.mkdir(exist_ok=True)
    opened = [KeyBundle.from_bytes(bundle) for bundle in bundles.values()]
    parts = [decode(SealedKey, each.sealed, he_pb2.SealedKey) for each in opened]
    write_sealed_keys(folder / KEYS_FILE, parts[0].key_id, len(parts[0].sealed), parts)
    (folder / PUBLIC_FILE).write_bytes(opened[0].published.to_bytes())


def message_of(asked: object) -> Any:
    """A request as it travels."""
    message = getattr(pb, type(asked).__name__)()
    fill(asked, message)
    return message
