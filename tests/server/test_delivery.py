"""Releases go to the devices over the link: offered, fetched, resumed, reported, rolled out to some and to all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from delivering import Site, message_of
from linked import Devices
from releasing import WEIGHTS, manifest_of

from propolis.client.deliveries import Deliveries, Taking
from propolis.client.fetch import Fetcher, NotDeliveredError
from propolis.client.incoming import INCOMING_FOLDER, Incoming
from propolis.client.install import Installer
from propolis.link.delivery import FetchRequest, LookRequest, OpenRequest, Outcome, Release, ReportRequest
from propolis.secure.envelope import SEALED_CHUNK_BYTES
from propolis.secure.errors import PropolisError, RefusedError, UsageError
from propolis.secure.manifest import Kind
from propolis.server.rollout import Progress

LARGE = {"model.onnx": (WEIGHTS * 4, Kind.ONNX)}  # seven chunks


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_device_takes_what_is_released_and_says_so(site: Site) -> None:
    with site.serving():
        assert site.look() == []
        rollout = site.release(1)
        (manifest,) = site.look()
        assert (manifest.name, manifest.sequence) == ("digits", 1)
        assert site.wait_for_report(rollout.release, Outcome.INSTALLED).device == 0
        assert site.look() == []  # it is there already
    opened = Installer(site.device(), site.keyholder()).open()
    assert opened.files["model.onnx"] == WEIGHTS  # without a network
    assert not list((site.device() / INCOMING_FOLDER).iterdir())


def test_a_connected_device_hears_of_a_release_and_of_a_roster_by_itself(site: Site) -> None:
    with site.serving():
        devices, loop_ready = Devices(), threading.Event()
        made: list[Deliveries] = []

        async def start() -> None:
            made.append(site.deliveries(0))
            loop_ready.set()
            await made[0].run()

        asyncio.run_coroutine_threadsafe(start(), devices.loop)
        assert loop_ready.wait(10)
        devices.start(site.device(0), site.address, news=made[0].news)
        rollout = site.release(1)
        site.wait_for_report(rollout.release, Outcome.INSTALLED)
        site.put_roster(site.roster.lasting(site.roster.not_after + 1))
        deadline = time.monotonic() + 20
        while site.keyholder().trust.roster.number != site.roster.number:
            assert time.monotonic() < deadline, "the roster never came"
            time.sleep(0.05)
        devices.close()


def test_each_step_of_an_installation_is_reported(site: Site) -> None:
    seen: list[Outcome] = []
    note = site.reports.note
    site.reports.note = lambda release, report: (seen.append(report.outcome), note(release, report))[1]  # type: ignore[method-assign]
    with site.serving():
        rollout = site.release(1)
        site.look(probe=lambda manifest, files: 0.0)
        site.wait_for_report(rollout.release, Outcome.INSTALLED)
    assert seen == [Outcome.FETCHED, Outcome.VERIFIED, Outcome.PROBE_PASSED, Outcome.INSTALLED]


def test_a_failed_probe_is_reported_with_its_reason(site: Site) -> None:
    with site.serving():
        rollout = site.release(1)
        with pytest.raises(RefusedError, match="differ by 1"):
            site.look(probe=lambda manifest, files: 1.0)
        assert site.wait_for_report(rollout.release, Outcome.FAILED).reason == "probe"


def test_a_model_that_takes_too_much_memory_is_reported(site: Site) -> None:
    def too_large(manifest: object, content_key: bytes, chunks: object) -> dict[str, bytes]:
        raise MemoryError

    with site.serving(), pytest.MonkeyPatch.context() as patch:
        rollout = site.release(1)
        patch.setattr("propolis.client.install.open_files", too_large)
        with pytest.raises(PropolisError, match="unexpected: MemoryError"):
            site.look()
        assert site.wait_for_report(rollout.release, Outcome.FAILED).reason == "memory"


@pytest.mark.parametrize("cut", [1, SEALED_CHUNK_BYTES, SEALED_CHUNK_BYTES + 1, 3 * SEALED_CHUNK_BYTES + 777])
def test_a_download_goes_on_where_its_file_was_cut(site: Site, cut: int) -> None:
    """Whatever the byte: what is whole of the file is not fetched again."""
    firsts: list[int] = []
    fetch = Fetcher._fetch_on

    async def counted(self: Fetcher, release: Release, incoming: Incoming) -> None:
        firsts.append(incoming.next)
        await fetch(self, release, incoming)

    with site.serving(), pytest.MonkeyPatch.context() as patch:
        rollout = site.release(1, files=LARGE)
        header_bytes = len((site.rollouts.package(rollout)).read_bytes()) - _ciphertext_size(site)
        partial = site.device() / INCOMING_FOLDER / rollout.manifest
        partial.parent.mkdir()
        partial.write_bytes(site.rollouts.package(rollout).read_bytes()[: header_bytes + cut])
        patch.setattr(Fetcher, "_fetch_on", counted)
        assert len(site.look()) == 1
    assert firsts == [cut // SEALED_CHUNK_BYTES]


def _ciphertext_size(site: Site) -> int:
    (rollout,) = site.rollouts.all()
    return manifest_of(site.rollouts.package(rollout)).ciphertext_size


def test_a_damaged_part_of_a_download_is_fetched_again(site: Site) -> None:
    with site.serving():
        rollout = site.release(1, files=LARGE)
        whole = site.rollouts.package(rollout).read_bytes()
        partial = site.device() / INCOMING_FOLDER / rollout.manifest
        partial.parent.mkdir()
        partial.write_bytes(whole[:-1000] + bytes(1000))
        assert len(site.look()) == 1


def test_a_server_that_comes_back_is_fetched_from_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server goes away in the middle and comes back: the device goes on with what is missing."""
    site.release(1, files=LARGE)
    add, half, firsts = Incoming.add, threading.Event(), list[int]()
    fetch = Fetcher._fetch_on

    def noticed(self: Incoming, chunk: bytes) -> None:
        add(self, chunk)
        if self.next == 2:
            half.set()

    async def counted(self: Fetcher, release: Release, incoming: Incoming) -> None:
        firsts.append(incoming.next)
        await fetch(self, release, incoming)

    monkeypatch.setattr(Incoming, "add", noticed)
    monkeypatch.setattr(Fetcher, "_fetch_on", counted)
    with ThreadPoolExecutor() as pool:
        with site.serving(rate=1_000_000) as link:
            taken = pool.submit(site.look)
            assert half.wait(20)
        with site.serving(listen=f"127.0.0.1:{link.port}"):
            assert [each.sequence for each in taken.result(30)] == [1]
    assert firsts[0] == 0
    assert firsts[-1] >= 2


def test_a_bound_on_bandwidth_is_kept_on_both_ends(site: Site) -> None:
    site.release(1, files=LARGE)  # 1.6 MB
    for bounds, taking in (({"rate": 800_000.0}, {}), ({}, {"rate": 800_000.0})):
        with site.serving(**bounds):  # type: ignore[arg-type]
            begin = time.monotonic()
            index = 0 if bounds else 1
            assert len(site.look(index, **taking)) == 1  # type: ignore[arg-type]
            assert time.monotonic() - begin > 1.0


def test_a_rollout_reaches_a_share_of_the_devices_and_never_loses_one(tmp_path: Path) -> None:
    site = Site(tmp_path, devices=3)
    rollout = site.release(1, percent=0)
    descriptors = [bytes([index % 256, index // 256]) * 16 for index in range(2000)]
    reached = {percent: {d for d in descriptors if rollout.model_copy(update={"percent": percent}).reaches(d)}
               for percent in (0.0, 10.0, 50.0, 100.0)}  # fmt: skip
    assert not reached[0.0]
    assert reached[0.0] <= reached[10.0] <= reached[50.0] <= reached[100.0] == set(descriptors)
    assert 140 <= len(reached[10.0]) <= 260
    assert 900 <= len(reached[50.0]) <= 1100
    with site.serving():
        assert [site.look(index) for index in range(3)] == [[], [], []]
        site.rollouts.change("digits", percent=100)
        time.sleep(0.6)  # the server looks four times a second
        assert [len(site.look(index)) for index in range(3)] == [1, 1, 1]


def test_a_pause_lets_nobody_begin_and_who_has_begun_goes_on(site: Site) -> None:
    rollout = site.release(1, files=LARGE)
    begun = site.device(1) / INCOMING_FOLDER / rollout.manifest
    begun.parent.mkdir()
    begun.write_bytes(site.rollouts.package(rollout).read_bytes()[:600_000])
    site.rollouts.change("digits", progress=Progress.PAUSED)
    with site.serving():
        assert site.look(0) == []
        assert len(site.look(1)) == 1
        site.rollouts.change("digits", progress=Progress.RUNNING)
        assert len(site.look(0)) == 1


def test_a_stop_withdraws_a_release_for_good_and_offers_the_one_before_again(site: Site) -> None:
    """Also where it was for all devices already; and then that one can be stopped, too."""
    site.release(1)
    second = site.release(2)
    with site.serving(), site.stub() as stub:
        asked = message_of(OpenRequest(second.release))
        assert stub.Open(asked).key.index == 0
        assert site.rollouts.change("digits", progress=Progress.STOPPED).sequence == 2
        assert code_of(lambda: stub.Open(asked)) is grpc.StatusCode.NOT_FOUND
        assert [each.sequence for each in site.look()] == [1]
        assert site.rollouts.change("digits", percent=50).sequence == 1
        assert site.rollouts.change("digits", progress=Progress.STOPPED).sequence == 1
        assert site.look(1) == []
    for progress in (Progress.RUNNING, Progress.STOPPED):
        with pytest.raises(UsageError, match="was stopped, for good"):
            site.rollouts.change("digits", progress=progress)
    with pytest.raises(UsageError, match="release 7 of digits is not, or no longer, on offer"):
        site.rollouts.change("digits", progress=Progress.STOPPED, sequence=7)


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as error:
        call()
    code: grpc.StatusCode = error.value.code()
    return code


def test_while_a_newer_release_reaches_some_the_others_are_offered_the_older(site: Site) -> None:
    site.release(1)
    site.release(2, percent=0)
    with site.serving():
        assert [each.sequence for each in site.look()] == [1]
        site.rollouts.change("digits", percent=100)
        assert [each.sequence for each in site.look()] == [2]
    assert [each.sequence for each in site.rollouts.all()] == [2, 1]
    site.release(3)
    assert [each.sequence for each in site.rollouts.all()] == [3, 2]  # nobody needs the first one any more
    assert not (site.rollouts.home / "digits" / "1").exists()


def test_a_stop_cuts_off_who_fetches(site: Site) -> None:
    rollout = site.release(1, files=LARGE)
    with site.serving(rate=200_000), site.stub() as stub:
        call = stub.Fetch(message_of(FetchRequest(rollout.release, 0)))
        next(call)
        site.rollouts.change("digits", progress=Progress.STOPPED)
        with pytest.raises(grpc.RpcError) as stopped:
            list(call)
        assert stopped.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_device_that_enrolled_later_gets_a_key_where_the_server_has_the_content_key(site: Site) -> None:
    package, sealed = site.sealed(1)
    keys = package.with_name("package.keys")
    keys.write_bytes(keys.read_bytes()[:-84])  # the last device was not there yet
    site.rollouts.start(package, 100)
    with site.serving(), pytest.raises(NotDeliveredError, match="was not sealed for this device"):
        site.look(2)
    asked: list[bytes] = []

    def content_key(manifest: bytes) -> bytes | None:
        asked.append(manifest)
        return sealed.content_key

    with site.serving(content_keys=content_key):
        assert len(site.look(2)) == len(site.look(0)) == 1
    assert asked == [sealed.release.digest]


def test_a_device_announces_its_post_quantum_key_by_itself_and_is_given_what_is_sealed_to_it(site: Site) -> None:
    """Those of this federation enrolled before there were such keys."""
    with site.serving():
        assert site.look(0) == site.look(1) == []
        assert site.membership.announced(0) is not None
        package, sealed = site.sealed(1, post_quantum=True)
        site.rollouts.start(package, 100)
        assert len(site.look(0)) == len(site.look(1)) == 1
        with pytest.raises(NotDeliveredError, match="was not sealed for this device"):
            site.look(2)
    with site.serving(content_keys=lambda _: sealed.content_key):
        assert len(site.look(2)) == 1  # it has announced its key meanwhile


def test_a_device_that_lost_its_post_quantum_key_still_takes_other_packages(site: Site) -> None:
    with site.serving():
        site.look()
        (site.device() / "hybrid.key").unlink()
        site.look()
        (site.server_folder / "enrolled" / "0.hybrid").unlink()
        site.look()
        site.release(1)
        assert len(site.look()) == 1


def test_nothing_is_kept_of_releases_that_never_were(site: Site) -> None:
    rollout = site.release(1)
    made_up = Release("digits", 9, bytes(32))
    with site.serving(), site.stub() as stub:
        stub.Report(message_of(ReportRequest(made_up, 4, "")))
        stub.Look(message_of(LookRequest((made_up,), ())))
        assert site.reports.of(made_up) == []
        stub.Report(message_of(ReportRequest(rollout.release, 5, "no\nline")))
        assert site.wait_for_report(rollout.release, Outcome.FAILED).reason == "unprintable"


def test_one_device_fetches_twice_at_most(site: Site) -> None:
    rollout = site.release(1, files=LARGE)
    with site.serving(rate=100_000), site.stub() as stub:
        asked = message_of(FetchRequest(rollout.release, 0))
        calls = [stub.Fetch(asked), stub.Fetch(asked)]
        for call in calls:
            next(call)
        with pytest.raises(grpc.RpcError) as busy:
            next(stub.Fetch(asked))
        assert busy.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()


def test_a_device_that_asks_again_and_again_is_put_off_and_the_others_are_not(site: Site) -> None:
    with site.serving():
        with site.stub(1) as stub:

            def ask_again_and_again() -> None:
                for _ in range(300):
                    stub.Look(message_of(LookRequest((), ())))

            with pytest.raises(grpc.RpcError) as busy:
                ask_again_and_again()
        assert busy.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        site.release(1)
        assert len(site.look(0)) == 1


def test_a_server_without_models_and_no_server_are_said_in_a_line(site: Site) -> None:
    with pytest.raises(NotDeliveredError, match=r"(?i)connect|refused|unavailable"):
        site.look(address="127.0.0.1:1")
    assert Taking("h:1").rate == 0


@pytest.mark.parametrize("index", ["{}", "not json", '{"version": 2}', '{"rollouts": [{"name": "x"}]}'])
def test_a_damaged_index_is_reported_and_what_was_on_offer_stays(site: Site, index: str) -> None:
    site.release(1)
    with site.serving():
        site.rollouts.index.write_text(index)
        time.sleep(0.6)
        if index == "{}":  # an empty one is no damage
            assert site.look() == []
            return
        with pytest.raises(UsageError, match="is damaged"):
            site.rollouts.all()
        assert len(site.look()) == 1
