"""Keys of homomorphic encryption over the link: a device gets its own part, and believes its server in nothing."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from delivering import KeyHolder, Site, put_key
from flwr.app import Message, RecordDict
from releasing import NOW

from harness import wait_until
from propolis.client import he_fetch
from propolis.client.fetch import NotDeliveredError
from propolis.client.he_fetch import KeyFetcher
from propolis.client.he_folder import HE_KEY_FILE, read_he_keys
from propolis.client.he_key import load_he_key, open_for
from propolis.client.state import FileStore
from propolis.flower import set_identity
from propolis.link.delivery import HeKeyReply, HeKeyRequest
from propolis.messages import RECORD, protocol_record
from propolis.protos import model_pb2 as pb
from propolis.secure.errors import PeerError, RefusedError, TrustError
from propolis.secure.he.held import KeyBundle
from propolis.secure.he.messages import EncryptedPlan, Entry
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.states import Exchange
from propolis.secure.wire import decode, encode
from propolis.simulations.federation import make_federation

Bundles = dict[int, bytes]


class Served(Site):
    """A federation that has a key, on its server; its devices have seen the newest roster."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.holder = KeyHolder(self.root)
        self.first = self.holder.bundles(1, self.federation.devices)
        self.second = self.holder.bundles(2, self.federation.devices)
        self.put(self.second)
        for index in range(len(self.federation.devices)):
            self.see_roster(index)

    def put(self, bundles: Bundles) -> None:
        put_key(self.key_folder, bundles)

    def see_roster(self, index: int) -> None:
        roster = self.membership.roster.signed
        FileStore(self.device(index), Policy()).change(lambda device: device.take_roster(roster))

    def fetcher(self, index: int = 0) -> KeyFetcher:
        return KeyFetcher(self.device(index), self.address, self.tls(index))

    def take(self, index: int = 0) -> bool:
        return asyncio.run(self.fetcher(index).take())

    def kept(self, index: int = 0) -> bytes:
        """The bundle that a device has."""
        keys = read_he_keys(self.device(index), None)
        return keys[0] if keys else b""

    def number(self, index: int = 0) -> int:
        """Of the key that a device can open."""
        key = load_he_key(self.device(index), self.keyholder(index), time.time())
        assert key is not None
        return key.number

    def hand_out(self, lie: bytes) -> None:
        """Let the server give everybody this."""
        self.he_key.bundle = lambda index, have: lie  # type: ignore[method-assign]


@pytest.fixture
def site(tmp_path: Path) -> Served:
    return Served(tmp_path)


def test_a_device_fetches_its_own_part_once(site: Served) -> None:
    with site.serving():
        for index in range(3):
            assert site.take(index)
            assert site.kept(index) == site.second[index]
            assert not site.take(index)
            assert site.number(index) == 2


def test_no_request_gets_another_devices_part(site: Served) -> None:
    """There is no field to ask for it with: who asks is who the certificate says."""
    honest = encode(HeKeyRequest(b""), pb.HeKeyRequest)
    # As if there were a number of a device, in any of the next fields.
    smuggled = [honest + bytes([field << 3, 0]) for field in range(3, 16)] + [honest + b"\x1a\x01\x00"]
    with site.serving(), site.stub(1) as stub:
        for asked in [honest, *smuggled]:
            reply = stub.HeKey(pb.HeKeyRequest.FromString(asked), timeout=30)
            bundle = decode(HeKeyReply, reply.SerializeToString(), pb.HeKeyReply).bundle
            assert bundle == site.second[1]
            opened = KeyBundle.from_bytes(bundle)
            with pytest.raises(TrustError):
                open_for(site.keyholder(0), opened.published, opened.sealed, NOW)


def test_a_revoked_device_gets_no_key(site: Served) -> None:
    with site.serving():
        site.put_roster(site.roster.revoking(1))
        site.put(site.holder.bundles(3, [site.federation.devices[index] for index in (0, 2)]))
        with pytest.raises(NotDeliveredError, match="revoked"):
            site.take(1)
        assert site.take(0)


def test_a_device_that_the_key_was_not_sealed_for_is_told(site: Served) -> None:
    site.put({index: site.second[index] for index in (0, 2)})
    with site.serving():
        with pytest.raises(NotDeliveredError, match="was not sealed for this device yet"):
            site.take(1)
        assert site.kept(1) == b""
        site.put(site.second)
        assert site.take(1)


@pytest.mark.parametrize("field", [b"\x12\x21" + bytes(33), b"\x08\x02", b"\xff" * 20])
def test_a_malformed_request_is_refused(site: Served, field: bytes) -> None:
    with site.serving(), grpc.secure_channel(site.address, _credentials(site)) as channel:
        call = channel.unary_unary("/propolis.model.v1.Delivery/HeKey")
        with pytest.raises(grpc.RpcError) as caught:
            call(field, timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def _credentials(site: Served) -> grpc.ChannelCredentials:
    tls = site.tls(0)
    return grpc.ssl_channel_credentials(tls.authority, tls.private_key, tls.certificate)


# What a server may hand out, and no device takes


def older(site: Served) -> bytes:
    return site.first[0]


def anothers(site: Served) -> bytes:
    return site.holder.bundles(3, site.federation.devices)[1]


def of_another_federation(site: Served) -> bytes:
    other = make_federation(3, 1)
    return KeyHolder(other.root).bundles(3, site.federation.devices)[0]


def of_a_revoked_holder(site: Served) -> bytes:
    site.put_roster(site.roster.revoking_release(7))
    site.see_roster(0)
    return KeyHolder(site.root, serial=7).bundles(3, site.federation.devices)[0]


def of_a_holder_of_its_own(site: Served) -> bytes:
    impostor = make_federation(1, 1).root
    impostor.federation = site.root.federation
    return KeyHolder(impostor).bundles(3, site.federation.devices)[0]


def with_other_material(site: Served) -> bytes:
    newer, other = (site.holder.bundles(3, site.federation.devices)[0] for _ in range(2))
    whole, swapped = KeyBundle.from_bytes(newer), KeyBundle.from_bytes(other)
    return KeyBundle(whole.holder, whole.statement, swapped.material, swapped.sealed).to_bytes()


def another_of_this_number(site: Served) -> bytes:
    return site.holder.bundles(2, site.federation.devices)[0]


def truncated(site: Served) -> bytes:
    return site.holder.bundles(3, site.federation.devices)[0][:-1]


def halved(site: Served) -> bytes:
    whole = site.holder.bundles(3, site.federation.devices)[0]
    return whole[: len(whole) // 2]


def random_bytes(site: Served) -> bytes:
    return os.urandom(5000)


LIES = [
    *(older, anothers, of_another_federation, of_a_revoked_holder, of_a_holder_of_its_own, with_other_material),
    *(another_of_this_number, truncated, halved, random_bytes),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda f: f.__name__)
def test_a_key_that_is_not_the_devices_newest_is_refused_and_what_it_had_stays(
    site: Served, lie: Callable[[Served], bytes]
) -> None:
    with site.serving():
        site.take()
        before = site.kept()
        site.hand_out(lie(site))
        with pytest.raises(RefusedError):
            site.take()
        assert site.kept() == before
        assert site.number() == 2
        assert not (site.device() / "he.former").exists()
        site.hand_out(site.holder.bundles(3, site.federation.devices)[0])
        site.take()
        assert site.number() == 3


def test_an_unbelievable_answer_is_refused_before_it_is_parsed(site: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with site.serving():
        site.hand_out(bytes(2**20))
        with pytest.raises((PeerError, NotDeliveredError)):
            site.take()
        assert not (site.device() / HE_KEY_FILE).exists()


# A round under a key that the device has not


def round_under(key_id: bytes, exchange: Exchange = Exchange.ENCRYPT) -> Message:
    set_identity(1)
    plan = EncryptedPlan(bytes(16), 1, 0, 1, 1, bytes(32), key_id, "n", 1.0, 1.0, (Entry("w", "float32", (3,)),))
    return Message(RecordDict({RECORD: protocol_record(exchange, plan.encoded)}), dst_node_id=1, message_type="train")


class Running:
    """A device's fetcher on a loop of its own; the test is the app's thread."""

    def __init__(self, fetcher: KeyFetcher) -> None:
        self.fetcher, self.loop = fetcher, asyncio.new_event_loop()
        self.task: Any = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        self.task = self.loop.create_task(self.fetcher.run())
        try:
            self.loop.run_until_complete(self.task)
        except asyncio.CancelledError:
            self.loop.close()

    def __enter__(self) -> KeyFetcher:
        self.thread.start()
        wait_until(lambda: self.fetcher._loop is not None, 10)
        return self.fetcher

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(10)
        assert not self.thread.is_alive()


def test_a_round_waits_until_its_key_is_there(site: Served) -> None:
    key_id = site.he_key.require().key.key_id
    with site.serving(), Running(site.fetcher()) as fetcher:
        fetcher.prepare(round_under(key_id, Exchange.HELLO))
        fetcher.prepare(Message(RecordDict(), dst_node_id=1, message_type="train"))
        assert site.kept() == b""
        fetcher.prepare(round_under(key_id))
        assert site.number() == 2
        assert fetcher._key_id() == key_id


def test_a_round_goes_on_without_a_key_where_there_is_none(
    site: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put({index: site.second[index] for index in (1, 2)})
    with site.serving(), Running(site.fetcher()) as fetcher:
        fetcher.prepare(round_under(bytes(32)))
        assert "for this round: the key of homomorphic encryption was not sealed for this device yet" in caplog.text
        monkeypatch.setattr(he_fetch, "_LONGEST_WAIT_S", 0.3)

        async def never(self: KeyFetcher) -> bool:
            await asyncio.sleep(600)
            return True

        monkeypatch.setattr(KeyFetcher, "take", never)
        began = time.monotonic()
        fetcher.prepare(round_under(bytes(32)))
        assert time.monotonic() - began < 5
        assert "for this round: no answer in time" in caplog.text


def test_news_lets_a_device_ask(site: Served) -> None:
    with site.serving(), Running(site.fetcher()) as fetcher:
        loop = fetcher._loop
        assert loop is not None
        loop.call_soon_threadsafe(fetcher.news)
        wait_until(lambda: site.kept() == site.second[0], 30)
        newer = site.holder.bundles(3, site.federation.devices)
        site.put(newer)
        loop.call_soon_threadsafe(fetcher.news)
        wait_until(lambda: site.kept() == newer[0], 30)


def test_a_new_key_is_announced_to_the_devices(site: Served) -> None:
    from propolis.server.delivery import Delivery
    from propolis.server.shelf import Shelf

    delivery = Delivery(Shelf(site.server_folder, site.membership), site.membership, site.reports, he_key=site.he_key)
    delivery.refresh()
    assert not delivery.refresh()
    site.put(site.holder.bundles(3, site.federation.devices))
    assert delivery.refresh()
    assert not delivery.refresh()
