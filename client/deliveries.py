"""A device takes the models that are released to it: hears of them, fetches, checks, tries, installs, and says so."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc.aio

from propolis.client.asking import Asking
from propolis.client.fetch import Fetcher
from propolis.client.hybrid import announcement_under
from propolis.client.incoming import Incoming, begun, remove_others
from propolis.client.install import LARGEST_MODEL, Installer, Status
from propolis.client.keyholder import Keyholder
from propolis.client.opening import Opening
from propolis.client.probe import Probe
from propolis.client.seal import Seal
from propolis.client.slots import installed_releases
from propolis.client.state import FileStore
from propolis.link.certificates import Tls
from propolis.link.delivery import Release
from propolis.link.options import DEVICE_OPTIONS, credentials_of
from propolis.link.rate import Rate
from propolis.package import Header
from propolis.secure.errors import PropolisError, Refusal, RefusedError, TrustError
from propolis.secure.identity import trusted_roster
from propolis.secure.manifest import Manifest
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.policy import Policy
from propolis.storage import alone
from propolis.worker import Worker

_LOCK = "deliveries.lock"
# A release that failed for a reason that may pass, such as a disk, or a processor that was busy while it was tried.
_MOST_TRIES = 3
_REPORTS_S = 20.0
_MOST_REMEMBERED = 4096
_log = logging.getLogger("propolis.client")


@dataclass(frozen=True, slots=True)
class Taking:
    """What a device takes.

    Attributes:
        server: HOST:PORT of the link.
        largest: bytes of a model's plain files at most.
        rate: bytes per second at most; 0 is as fast as it comes.
        store_plain: leave the plain files on the disk too, for other programs.
        probe: tries a model before it is trusted.
        opening: how a model is opened that was released encrypted.
    """

    server: str
    largest: int = LARGEST_MODEL
    rate: float = 0
    store_plain: bool = False
    probe: Probe | None = None
    opening: Opening = field(default_factory=Opening)


class Deliveries:
    """The models of one device.

    Args:
        folder: the device's.
        tls: its certificate and key.
        taking: what it takes.
        passphrase: of its state.
    """

    def __init__(self, folder: Path, tls: Tls, taking: Taking, passphrase: bytes | None = None) -> None:
        self._folder, self._tls, self._taking = folder, tls, taking
        self._seal = None if passphrase is None else Seal(passphrase)
        self._rate = Rate(taking.rate)
        self._asking = Asking("no models")
        self._tried: Counter[bytes] = Counter()  # by the manifest of a release

    def news(self, spread_s: float = 0.0) -> None:
        """There may be something new: ask within this time; called on the loop that `run` runs on."""
        self._asking.news(spread_s)

    async def run(self) -> None:
        """Look whenever there is news, and again and again where something did not work; until it is cancelled."""
        await self._asking.run(self.look)

    async def look(self) -> list[Manifest]:
        """Ask once, and install what is new.

        Returns:
            What was installed.

        Raises:
            NotDeliveredError: the server cannot be reached, or does not give what it offers.
            PropolisError: something could not be taken, for now; the rest has been. What is refused is only logged.
        """
        credentials = credentials_of(self._tls)
        with alone(self._folder / _LOCK, f"another process fetches models into {self._folder}"):
            async with grpc.aio.secure_channel(self._taking.server, credentials, options=DEVICE_OPTIONS) as channel:
                return await self._look(Fetcher(channel, self._rate))

    async def _look(self, fetcher: Fetcher) -> list[Manifest]:
        installed = await asyncio.to_thread(installed_releases, self._folder)
        seen = await fetcher.look(installed, await asyncio.to_thread(begun, self._folder))
        faults = [await _fault_of(self._take_roster(fetcher, seen.roster))]
        if seen.announce:
            faults.append(await _fault_of(self._announce(fetcher)))
        wanted = [offer for offer in seen.offers if offer not in installed and not self._is_given_up(offer)]
        unwanted = [offer.manifest for offer in (*installed, *seen.offers) if offer not in wanted]
        kept = [offer.manifest for offer in wanted]
        faults.append(await _fault_of(asyncio.to_thread(remove_others, self._folder, kept, unwanted)))
        taken = list[Manifest]()
        each_model = {offer.name: offer for offer in wanted}.values()
        faults += [await _fault_of(self._take(fetcher, offer, taken)) for offer in each_model]
        for fault in faults:
            if fault is not None:
                raise fault
        return taken

    def _is_given_up(self, release: Release) -> bool:
        return self._tried[release.manifest] >= _MOST_TRIES

    def _give_up(self, release: Release) -> None:
        if len(self._tried) > _MOST_REMEMBERED:  # a server could make up any number of them
            self._tried.clear()
        self._tried[release.manifest] = _MOST_TRIES

    async def _take_roster(self, fetcher: Fetcher, offered: int) -> None:
        """Take over a newer roster, which says who is revoked; a server that has only an older one is not believed."""
        store = FileStore(self._folder, Policy(), self._seal)
        before = await asyncio.to_thread(store.change, _roster_number)
        if offered <= before:
            return
        roster = await fetcher.roster()

        def take(device: Device) -> int:
            device.take_roster(roster)
            return _roster_number(device)

        try:
            if await asyncio.to_thread(store.change, take) > before:
                self._tried.clear()
        except TrustError as error:
            self._asking.say(f"the server's roster is not taken: {error}")

    async def _announce(self, fetcher: Fetcher) -> None:
        """Let post-quantum packages be sealed to this device; it takes the others where that does not work."""
        try:
            await fetcher.announce(await asyncio.to_thread(announcement_under, self._folder, self._seal))
        except PropolisError as error:
            _log.warning("no post-quantum key is announced: %s", error)

    async def _take(self, fetcher: Fetcher, release: Release, taken: list[Manifest]) -> None:
        """Fetch and install a release, and add it to those that were taken."""
        statuses: asyncio.Queue[Status | None] = asyncio.Queue()
        reporter = asyncio.create_task(_report(fetcher, release, statuses))
        loop = asyncio.get_running_loop()

        def tell(status: Status | None) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(statuses.put_nowait, status)

        try:
            manifest = await self._install(fetcher, release, tell)
            _log.info("installed %s", release)
            taken.append(manifest)
        finally:
            tell(None)
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                reporter.cancel()
            await asyncio.wait({reporter}, timeout=_REPORTS_S)
            reporter.cancel()

    async def _install(self, fetcher: Fetcher, release: Release, tell: Callable[[Status], None]) -> Manifest:
        device = await asyncio.to_thread(Keyholder.under, self._folder, self._seal)
        taking = self._taking
        exporter = taking.opening.exporter(self._folder, self._seal)
        installer = Installer(self._folder, device, taking.probe, largest=taking.largest, tell=tell, exporter=exporter)
        opened = await fetcher.open(release)
        await self._require_acceptable(installer, opened.header, release)
        with await asyncio.to_thread(Incoming, self._folder, opened.header) as incoming:
            await fetcher.fetch(release, incoming)
        self._tried[release.manifest] += 1
        install = partial(installer.install, name=release.name, store_plain=taking.store_plain)
        try:
            manifest = await _apart(partial(install, incoming.path, opened.key, time.time()))
        except RefusedError as error:
            if error.refusal is Refusal.HE_KEY:  # the key may come any time
                self._tried[release.manifest] -= 1
            raise
        with suppress(OSError):  # it is swept the next time
            await asyncio.to_thread(incoming.path.unlink)
        return manifest

    async def _require_acceptable(self, installer: Installer, header: Header, release: Release) -> None:
        """Look at what is signed; what that says of a release does not pass."""
        try:
            await asyncio.to_thread(installer.require_acceptable, header, time.time(), release)
        except RefusedError as error:
            self._give_up(release)
            if error.refusal is Refusal.ROLLED_BACK:  # where a newer one was stopped, an older one is offered again
                raise _RefusedForGoodError(logging.DEBUG, f"{release} is not taken: {error}") from None
            raise _RefusedForGoodError(logging.WARNING, f"{release} is refused: {error}") from None


class _RefusedForGoodError(PropolisError):
    """There is nothing to do about a release."""

    def __init__(self, level: int, text: str) -> None:
        super().__init__(text)
        self.level = level


async def _fault_of(step: Awaitable[None]) -> PropolisError | None:
    """What kept one step from being done; the others are done all the same."""
    try:
        await step
    except _RefusedForGoodError as error:
        _log.log(error.level, "%s", error)
    except PropolisError as error:
        return error
    except Exception as error:
        _log.exception("no models")
        return PropolisError(f"unexpected: {type(error).__name__}")
    return None


async def _apart(install: Callable[[], Manifest]) -> Manifest:
    """Install in a thread that no end of the process waits for: what an installation leaves at any instant is whole."""
    worker = Worker("propolis-install")
    try:
        return await worker.run(install)
    finally:
        worker.close()


async def _report(fetcher: Fetcher, release: Release, statuses: asyncio.Queue[Status | None]) -> None:
    """Tell the server; where that fails, the next look says what is installed."""
    while (status := await statuses.get()) is not None:
        with suppress(PropolisError):
            await fetcher.report(release, status.outcome, status.reason)


def _roster_number(device: Device) -> int:
    """Of the newest roster that a device has seen; 0 where it has seen none."""
    state = device.state
    return 0 if state.roster is None else trusted_roster(state.root_key, state.roster).number
