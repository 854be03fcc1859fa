"""What a device that may not, or a server that cannot be trusted, tries with the delivery of models."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from delivering import Site, message_of
from releasing import WEIGHTS, flipped

from propolis.client import fetch
from propolis.client.deliveries import Deliveries
from propolis.client.fetch import Fetcher, NotDeliveredError
from propolis.client.incoming import INCOMING_FOLDER, Incoming
from propolis.client.slots import records
from propolis.link.certificates import Tls
from propolis.link.delivery import FetchRequest, LookRequest, OpenRequest, Outcome, Release, RosterRequest
from propolis.link.options import DEVICE_OPTIONS, credentials_of
from propolis.package import Package
from propolis.secure.errors import PeerError, PropolisError, Refusal, RefusedError, StorageError, UsageError
from propolis.secure.identity import Signed
from propolis.secure.manifest import Kind, Trial
from propolis.secure.wire import encode
from propolis.server.shelf import OnOffer, Shelf

LARGE = {"model.onnx": (WEIGHTS * 4, Kind.ONNX)}  # seven chunks


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(fetch, "_LONGEST_PAUSE_S", 0.05)


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as error:
        call()
    code: grpc.StatusCode = error.value.code()
    return code


def fails_with(site: Site, reason: str, *, fetched: bool, **taking: Any) -> None:
    """A device takes nothing, says why, and has not even fetched what it could have refused before."""
    fetches: list[int] = []
    fetch_on = Fetcher._fetch_on

    async def counted(self: Fetcher, release: Release, incoming: Incoming) -> None:
        fetches.append(1)
        await fetch_on(self, release, incoming)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fetcher, "_fetch_on", counted)
        if fetched:  # it may have been the disk's fault, or the connection's: it is tried again, some times
            with pytest.raises(RefusedError):
                site.look(**taking)
        else:
            assert site.look(**taking) == []
    (rollout,) = site.rollouts.all()
    assert site.wait_for_report(rollout.release, Outcome.FAILED).reason == reason
    assert bool(fetches) == fetched
    assert records(site.device()) == {}


@contextmanager
def lying(change: Callable[[int, bytes], bytes]) -> Iterator[None]:
    """A server that changes the chunks that it sends."""
    opened = OnOffer.opened

    @contextmanager
    def liar(self: OnOffer) -> Iterator[Callable[[int], bytes]]:
        with opened(self) as chunk:
            yield lambda number: change(number, chunk(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnOffer, "opened", liar)
        yield


def test_a_revoked_device_gets_nothing_at_all(site: Site) -> None:
    rollout = site.release(1)
    site.put_roster(site.roster.revoking(1))
    asked: list[tuple[str, object]] = [
        ("Look", LookRequest((), ())), ("Open", OpenRequest(rollout.release)),
        ("Fetch", FetchRequest(rollout.release, 0)), ("FetchRoster", RosterRequest()),
    ]  # fmt: skip
    with site.serving(), site.stub(1) as stub:
        for method, request in asked:
            answer = getattr(stub, method)
            assert code_of(lambda a=answer, r=request: list(a(message_of(r))) or a(message_of(r))) is (  # type: ignore[misc]
                grpc.StatusCode.PERMISSION_DENIED
            )
        with pytest.raises(NotDeliveredError, match="is revoked"):
            site.look(1)


def test_a_device_that_is_revoked_while_it_fetches_is_cut_off(site: Site) -> None:
    rollout = site.release(1, files=LARGE)
    with site.serving(rate=200_000), site.stub(1) as stub:
        call = stub.Fetch(message_of(FetchRequest(rollout.release, 0)))
        next(call)
        site.put_roster(site.roster.revoking(1))
        assert code_of(lambda: list(call)) is grpc.StatusCode.PERMISSION_DENIED


def test_a_device_gets_its_own_key_whatever_it_asks(site: Site) -> None:
    """There is no field to name another device with; and another's key does not open."""
    rollout = site.release(1)
    with site.serving():
        sealed = set()
        for index in range(3):
            with site.stub(index) as stub:
                key = stub.Open(message_of(OpenRequest(rollout.release))).key
            assert key.index == index
            sealed.add(bytes(key.sealed))
        assert len(sealed) == 3


def test_a_server_that_hands_out_another_devices_key_is_found_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Shelf.key
    monkeypatch.setattr(Shelf, "key", lambda self, offer, name: key(self, offer, replace(name, index=1)))
    site.release(1)
    with site.serving():
        fails_with(site, "package", fetched=True)


def test_a_device_of_another_federation_cannot_even_connect(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other")
    site.release(1)
    stranger = Tls(other.tls().private_key, other.tls().certificate, site.tls().authority)
    with site.serving(), site.stub(tls=stranger) as stub:
        assert code_of(lambda: stub.Look(message_of(LookRequest((), ())))) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("change", [lambda n, chunk: flipped(chunk, 7), lambda n, chunk: chunk[:-1],
                                    lambda n, chunk: chunk if n else b"x"])  # fmt: skip
def test_a_chunk_that_is_not_what_was_released_is_refused(site: Site, change: Callable[[int, bytes], bytes]) -> None:
    site.release(1, files=LARGE)
    with site.serving():
        with lying(change), pytest.raises(RefusedError):
            site.look()
        assert records(site.device()) == {}
        assert len(site.look()) == 1  # nothing of it is left when the server is honest again


def test_a_server_that_always_cuts_is_given_up_and_nothing_hangs(site: Site, hasty: None) -> None:
    site.release(1, files=LARGE)

    def cut(number: int, chunk: bytes) -> bytes:
        if number == 2:
            raise UsageError("no more")
        return chunk

    with site.serving(), lying(cut):
        with pytest.raises(NotDeliveredError, match="at the moment"):
            site.look()
        assert records(site.device()) == {}
    with site.serving():
        assert len(site.look()) == 1  # it goes on, with an honest one


def test_a_server_that_sends_less_than_the_header_says_is_given_up(site: Site, hasty: None) -> None:
    site.release(1, files=LARGE)
    with site.serving(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnOffer, "chunks", property(lambda self: 2))
        with pytest.raises(NotDeliveredError, match="was cut after 2 chunks"):
            site.look()
    assert records(site.device()) == {}


def test_a_server_that_sends_more_than_the_header_says_is_refused(site: Site) -> None:
    site.release(1, files=LARGE)

    @contextmanager
    def endless(self: OnOffer) -> Iterator[Callable[[int], bytes]]:
        with opened(self) as chunk:
            yield lambda number: chunk(number) if number < 7 else b"more"

    opened = OnOffer.opened
    with site.serving(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnOffer, "opened", endless)
        patch.setattr(OnOffer, "chunks", property(lambda self: 9))
        with pytest.raises(RefusedError, match="longer than its header says"):
            site.look()
    assert records(site.device()) == {}


def test_a_huge_model_is_refused_before_it_is_fetched(site: Site) -> None:
    site.release(1, files=LARGE)
    with site.serving():
        fails_with(site, "policy", fetched=False, largest=1000)


def test_an_expired_release_is_not_offered_and_not_taken(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    site.release(1, expires=int(now) + 3600)
    with site.serving():
        monkeypatch.setattr("propolis.server.shelf.Shelf._holds", lambda self, offer: True)
        monkeypatch.setattr("propolis.client.deliveries.time.time", lambda: now + 7200)
        fails_with(site, "expired", fetched=False)


def test_a_release_whose_time_is_over_is_not_offered(site: Site) -> None:
    rollout = site.release(1, created=int(time.time()) - 10, expires=int(time.time()) + 1)
    with site.serving(), site.stub() as stub:
        time.sleep(2.1)
        assert not stub.Look(message_of(LookRequest((), ()))).offers
        assert code_of(lambda: stub.Open(message_of(OpenRequest(rollout.release)))) is grpc.StatusCode.NOT_FOUND


def test_a_device_that_a_rollout_has_not_reached_is_given_nothing_of_it(site: Site) -> None:
    """Also where it has heard of the release from another device."""
    rollout = site.release(1, percent=0)
    with site.serving(), site.stub() as stub:
        for asked in (OpenRequest(rollout.release), FetchRequest(rollout.release, 0)):
            method = stub.Open if isinstance(asked, OpenRequest) else lambda message: list(stub.Fetch(message))
            assert code_of(lambda a=asked, m=method: m(message_of(a))) is grpc.StatusCode.NOT_FOUND  # type: ignore[misc]


def test_what_a_revoked_release_key_signed_is_not_offered(site: Site) -> None:
    rollout = site.release(1)
    with site.serving(), site.stub() as stub:
        site.put_roster(site.roster.revoking_release(1))
        assert not stub.Look(message_of(LookRequest((), ()))).offers
        assert code_of(lambda: stub.Open(message_of(OpenRequest(rollout.release)))) is grpc.StatusCode.NOT_FOUND


def test_what_a_revoked_release_key_signed_is_not_taken_from_a_server_that_offers_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.release(1)
    with site.serving():
        monkeypatch.setattr("propolis.server.shelf.Shelf._holds", lambda self, offer: True)
        site.put_roster(site.roster.revoking_release(1))
        fails_with(site, "release-key", fetched=False)


def test_the_header_of_another_release_than_was_offered_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.release(1)
    with Package.open(site.seal(2)) as other:
        header = other.header
    shown = Shelf.require
    monkeypatch.setattr(
        Shelf, "require", lambda self, release, name: replace(shown(self, release, name), header=header)
    )
    with site.serving():
        fails_with(site, "package", fetched=False)


def test_an_older_release_is_not_installed_over_a_newer_one(site: Site) -> None:
    """As a server may offer it, for good reasons too: the newer one was stopped."""
    with site.serving():
        old = site.seal(1)
        site.release(2)
        assert [each.sequence for each in site.look()] == [2]
        site.rollouts.index.unlink()
        site.rollouts.start(old, 100)
        assert site.look() == []
        assert site.reported(site.rollouts.all_of("digits")[0].release) is None  # it is no failure
    assert records(site.device())["digits"].slots[0].release.sequence == 2


def test_a_forged_or_older_roster_is_not_taken(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    older = site.membership.roster.signed
    site.put_roster(site.roster.lasting(site.roster.not_after + 5))
    newer, number = site.membership.roster.signed, site.roster.number
    with site.serving():
        site.look()
        assert site.keyholder().trust.roster.number == number
        site.put_roster(site.roster.lasting(site.roster.not_after + 9))
        for lie in (older, replace(newer, signature=bytes(64))):

            async def liar(self: Fetcher, lie: Signed = lie) -> Signed:
                return lie

            with monkeypatch.context() as patch:
                patch.setattr(Fetcher, "roster", liar)
                site.look()
            assert site.keyholder().trust.roster.number == number
        site.look()
        assert site.keyholder().trust.roster.number == number + 1


@pytest.mark.parametrize("name", ["../../escape", "/etc", "..", "a/b", "A", "x" * 64])
def test_names_that_lead_elsewhere_lead_nowhere(site: Site, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = site.release(1)
    trick = replace(rollout.release, name=name)
    with site.serving(), site.stub() as stub:
        assert code_of(lambda: stub.Open(message_of(OpenRequest(trick)))) is grpc.StatusCode.NOT_FOUND
        site.look()
        shown = Shelf.require
        monkeypatch.setattr(Shelf, "offers_for", lambda self, device, begun: [trick])
        monkeypatch.setattr(Shelf, "require", lambda self, asked, device: shown(self, rollout.release, device))
        before = sorted(path for path in site.folder.rglob("*") if "reports" not in path.name)
        assert site.look() == []
        after = sorted(path for path in site.folder.rglob("*") if "reports" not in path.name)
        assert [path for path in after if path not in before and "lock" not in path.name] == []


@pytest.mark.parametrize("place", ["folder", "file"])
def test_links_where_a_download_goes_are_not_followed(site: Site, place: str, tmp_path: Path) -> None:
    rollout = site.release(1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "victim").write_bytes(b"precious")
    incoming = site.device() / INCOMING_FOLDER
    if place == "folder":
        incoming.symlink_to(elsewhere)
    else:
        incoming.mkdir()
        (incoming / rollout.manifest).symlink_to(elsewhere / "victim")
    with site.serving(), pytest.raises((UsageError, StorageError), match="symbolic link"):
        site.look()
    assert (elsewhere / "victim").read_bytes() == b"precious"


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x0a\x00", b"\x12" + b"\x7f" * 200])
def test_bytes_that_are_no_request_are_refused(site: Site, data: bytes) -> None:
    site.release(1)
    with site.serving(), grpc.secure_channel(site.address, credentials_of(site.tls()), DEVICE_OPTIONS) as channel:
        for method in ("Look", "Open", "Report"):
            call = channel.unary_unary(f"/propolis.model.v1.Delivery/{method}")
            assert code_of(lambda call=call: call(data, timeout=10)) is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[misc]
        stream = channel.unary_stream("/propolis.model.v1.Delivery/Fetch")(data, timeout=10)
        assert code_of(lambda: list(stream)) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_device_that_does_not_read_is_cut_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("propolis.server.delivery._LONGEST_WRITE_S", 0.5)
    rollout = site.release(1, files={"model.onnx": (WEIGHTS * 100, Kind.ONNX)})
    with site.serving(), site.stub() as stub:
        call = stub.Fetch(message_of(FetchRequest(rollout.release, 0)))
        next(call)
        time.sleep(3)
        assert code_of(lambda: list(call)) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_device_that_is_cut_loose_leaves_no_fetch_behind(site: Site) -> None:
    rollout = site.release(1, files=LARGE)
    asked = message_of(FetchRequest(rollout.release, 0))
    with site.serving(rate=1_000_000), site.stub() as stub:
        for _ in range(6):
            call = stub.Fetch(asked)
            next(call)
            call.cancel()
            time.sleep(0.3)


def test_what_failed_is_tried_again_a_few_times_and_anew_only_with_a_roster_that_is_newer(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that claims a newer roster in every answer would else make the device try for ever."""
    tries: list[int] = []
    look = Fetcher.look

    async def boast(self: Fetcher, installed: Any, begun: Any) -> Any:
        return replace(await look(self, installed, begun), roster=2**60)

    async def scenario() -> None:
        deliveries: Deliveries = site.deliveries(probe=lambda manifest, files: tries.append(1) or 1.0)  # type: ignore[func-returns-value]
        for _ in range(5):
            with contextlib.suppress(RefusedError):
                await deliveries.look()
        assert len(tries) == 3
        monkeypatch.setattr(Fetcher, "look", boast)
        for _ in range(3):
            await deliveries.look()
        assert len(tries) == 3
        await asyncio.to_thread(site.put_roster, site.roster.lasting(site.roster.not_after + 3))
        with contextlib.suppress(RefusedError):
            await deliveries.look()
        assert len(tries) == 4

    site.release(1)
    with site.serving():
        asyncio.run(scenario())


@pytest.mark.parametrize("answer", [b"\xff\xff\xff", b"", b"\x08\x63", b"\x12" + b"\x7f" * 50])
def test_answers_that_are_none_do_not_end_the_deliveries(
    site: Site, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    """Neither malformed ones of a server nor a bug: a device that hears nothing any more hears of no revocation."""
    site.release(1)
    answers = [answer]

    def lie(reply: object, proto: Any) -> bytes:
        return answers.pop() if answers else encode(reply, proto)

    monkeypatch.setattr("propolis.server.delivery.encode", lie)
    with site.serving():
        with pytest.raises(PeerError):
            site.look()
        assert len(site.look()) == 1


def test_the_deliveries_outlive_whatever_is_raised(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[BaseException] = [MemoryError(), OSError(5, "I/O"), PeerError(Refusal.MALFORMED, "no"), KeyError("x")]
    look = Deliveries._look

    async def failing(self: Deliveries, fetcher: Fetcher) -> Any:
        if raised:
            raise raised.pop()
        return await look(self, fetcher)

    monkeypatch.setattr(Deliveries, "_look", failing)
    monkeypatch.setattr("propolis.client.asking._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("propolis.client.asking._LEAST_PAUSE_S", 0.01)
    rollout = site.release(1)

    async def run() -> None:
        deliveries = site.deliveries()
        deliveries.news()
        task = asyncio.create_task(deliveries.run())
        await asyncio.to_thread(site.wait_for_report, rollout.release, Outcome.INSTALLED)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with site.serving():
        asyncio.run(run())


def test_a_device_ends_at_once_although_a_model_is_being_tried_and_nobody_takes_its_reports(site: Site) -> None:
    """What an installation leaves at any instant is whole; so nothing has to be waited for."""
    trying = threading.Event()

    def slow(manifest: object, files: object) -> float:
        trying.set()
        time.sleep(8)
        return 0.0

    async def run() -> float:
        deliveries = site.deliveries(probe=slow)
        deliveries.news()
        task = asyncio.create_task(deliveries.run())
        await asyncio.to_thread(trying.wait, 20)
        began = time.monotonic()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return time.monotonic() - began

    site.release(1, trial=Trial(1e-3, 60.0))
    began = time.monotonic()
    with site.serving():
        assert asyncio.run(run()) < 2
    assert time.monotonic() - began < 8


def test_one_model_that_cannot_be_had_keeps_no_other_and_no_roster_away(site: Site) -> None:
    """Among them one that was sealed before this device enrolled, a damaged record, and a damaged key."""
    package = site.seal(1, name="alpha")
    keys = package.with_name("package.keys")
    keys.write_bytes(keys.read_bytes()[:-84])
    site.rollouts.start(package, 100)
    site.release(1, name="beta")
    with site.serving():
        with pytest.raises(NotDeliveredError, match="was not sealed for this device"):
            site.look(2)
        assert list(records(site.device(2))) == ["beta"]
        (site.device(2) / "models" / "beta" / "installed").write_bytes(b"damaged")
        (site.device(2) / "hybrid.key").write_bytes(b"damaged")
        (site.server_folder / "enrolled" / "2.hybrid").unlink()
        site.release(1, name="gamma")
        site.put_roster(site.roster.lasting(site.roster.not_after + 5))
        with pytest.raises(PropolisError):
            site.look(2)
        assert (site.device(2) / "models" / "gamma" / "installed").exists()
    (site.device(2) / "hybrid.key").unlink()
    assert site.keyholder(2).trust.roster.number == site.roster.number


def test_reports_that_cannot_be_kept_keep_no_model_away(site: Site) -> None:
    site.release(1)
    with site.serving():
        assert len(site.look()) == 1
        (site.server_folder / "published" / "reports.db").write_bytes(b"no database" * 1000)
        site.release(2)
        assert [each.sequence for each in site.look()] == [2]


def test_a_bound_on_bandwidth_is_not_used_up_by_who_asks_and_goes_away(site: Site) -> None:
    rollout = site.release(1, files=LARGE)
    asked = message_of(FetchRequest(rollout.release, 0))
    with site.serving(rate=2_000_000):
        with site.stub(1) as stub:
            for _ in range(100):
                call = stub.Fetch(asked)
                call.cancel()
        began = time.monotonic()
        assert len(site.look(0)) == 1
        assert time.monotonic() - began < 8  # 1.6 MB at 2 MB/s


def test_the_roster_is_fetched_twice_at_once_at_most(site: Site) -> None:
    """However many connections a device has."""
    with site.serving(rate=100.0), contextlib.ExitStack() as stack:
        stubs = [stack.enter_context(site.stub()) for _ in range(4)]
        for stub in stubs:  # who has asked before is connected
            stub.Look(message_of(LookRequest((), ())))
        calls = [stub.FetchRoster(message_of(RosterRequest())) for stub in stubs]
        ended = []
        for call in calls:
            with contextlib.suppress(grpc.RpcError):
                list(call)
            ended.append(call.code())
    assert grpc.StatusCode.RESOURCE_EXHAUSTED in ended  # the first may have been answered before the last came


def test_a_server_that_cannot_look_a_device_up_is_asked_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be opened at the moment is no reason to put a device out for good."""

    def broken(folder: Path, index: int) -> Any:
        raise UsageError("cannot read: Too many open files")

    with site.serving():
        monkeypatch.setattr("propolis.server.membership.read_enrolled", broken)
        site.membership._enrolled.clear()
        with pytest.raises(NotDeliveredError) as refused:
            site.look()
        assert not refused.value.is_final


def test_a_download_for_which_there_is_no_room_is_not_begun(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.release(1, files=LARGE)
    monkeypatch.setattr("propolis.client.incoming.shutil.disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    with site.serving(), pytest.raises(StorageError, match="no room for digits: it takes"):
        site.look()
    assert not list((site.device() / INCOMING_FOLDER).iterdir())


def test_a_disk_that_is_full_all_the_same_is_given_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training keeps its state there, too."""
    site.release(1, files=LARGE)
    written: list[int] = []

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: bytes) -> int:
            written.append(len(data))
            if len(written) > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self._file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    fdopen = os.fdopen

    def opening(descriptor: int, mode: str, **options: Any) -> Any:
        file = fdopen(descriptor, mode, **options)
        return Full(file) if mode == "r+b" else file

    monkeypatch.setattr("propolis.client.incoming.os.fdopen", opening)
    with site.serving(), pytest.raises(StorageError, match="No space left on device"):
        site.look()
    (left,) = (site.device() / INCOMING_FOLDER).iterdir()
    assert left.stat().st_size == 0
