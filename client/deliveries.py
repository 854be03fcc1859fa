"""A device takes the models that are released to it: hears of them, fetches, checks, tries, installs, and says so."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc.aio

from propolis.client.fetch import Fetcher, NotDeliveredError
from propolis.client.hybrid import announcement_of
from propolis.client.incoming import Incoming, remove_others
from propolis.client.install import LARGEST_MODEL, Installer, Status
from propolis.client.keyholder import Keyholder
from propolis.client.probe import Probe
from propolis.client.seal import Seal
from propolis.client.slots import records
from propolis.client.state import FileStore
from propolis.link.certificates import Tls
from propolis.link.delivery import Release
from propolis.link.options import DEVICE_OPTIONS, credentials_of
from propolis.link.rate import Rate
from propolis.secure.errors import PropolisError, Refusal, RefusedError, TrustError, UsageError
from propolis.secure.identity import trusted_roster
from propolis.secure.manifest import Manifest
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.policy import Policy

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 900.0
_log = logging.getLogger("propolis.client")


def _roster_number(device: Device) -> int:
    """Of the newest roster that a device has seen; 0 where it has seen none."""
    state = device.state
    return 0 if state.roster is None else trusted_roster(state.root_key, state.roster).number


@dataclass(frozen=True, slots=True)
class Taking:
    """What a device takes.

    Attributes:
        server: HOST:PORT of the link.
        largest: bytes of a model's plain files at most.
        rate: bytes per second at most; 0 is as fast as it comes.
        store_plain: leave the plain files on the disk too, for other programs.
        probe: tries a model before it is trusted.
    """

    server: str
    largest: int = LARGEST_MODEL
    rate: float = 0
    store_plain: bool = False
    probe: Probe | None = None


class Deliveries:
    """The models of one device.

    Args:
        folder: the device's.
        tls: its certificate and key.
        taking: what it takes.
        passphrase: of its state.
        installed: hears of every model that was installed.
    """

    def __init__(
        self,
        folder: Path,
        tls: Tls,
        taking: Taking,
        passphrase: bytes | None = None,
        installed: Callable[[Manifest], None] = lambda _: None,
    ) -> None:
        self._folder, self._tls, self._taking, self._passphrase = folder, tls, taking, passphrase
        self._rate = Rate(taking.rate)
        self._told = installed
        self._news = asyncio.Event()
        self._spread = 0.0
        self._refused: set[bytes] = set()

    def news(self, spread_s: float = 0.0) -> None:
        """There may be something new: ask within this time; called on the loop that `run` runs on."""
        self._spread = max(self._spread, spread_s)
        self._news.set()

    async def run(self) -> None:
        """Look whenever there is news, and again and again where something did not work; until it is cancelled."""
        tries = 0
        while True:
            await self._wait(tries)
            try:
                await self.look()
                tries = 0
            except NotDeliveredError as error:
                _log.log(logging.DEBUG if error.is_final else logging.INFO, "no models: %s", error)
                tries = 0 if error.is_final else tries + 1
            except PropolisError as error:
                _log.warning("no models: %s", error)
                tries += 1

    async def look(self) -> list[Manifest]:
        """Ask once, and install what is new.

        Returns:
            What was installed.

        Raises:
            NotDeliveredError: the server cannot be reached, or does not give what it offers.
            PropolisError: a model could not be taken, for now; those that are refused are only logged.
        """
        credentials = credentials_of(self._tls)
        async with grpc.aio.secure_channel(self._taking.server, credentials, options=DEVICE_OPTIONS) as channel:
            fetcher = Fetcher(channel, self._rate)
            seen = await fetcher.look(await asyncio.to_thread(self._installed))
            await self._take_roster(fetcher, seen.roster)
            if seen.announce:
                await self._announce(fetcher)
            await asyncio.to_thread(remove_others, self._folder, [offer.manifest for offer in seen.offers])
            taken = [await self._take(fetcher, offer) for offer in seen.offers if offer.manifest not in self._refused]
            return [manifest for manifest in taken if manifest is not None]

    async def _wait(self, tries: int) -> None:
        """For news, and then for a random part of its time; or, after a failure, for longer and longer."""
        pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(tries, 16)) if tries else None
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), pause)
        self._news.clear()
        spread, self._spread = self._spread, 0.0
        await asyncio.sleep(random.uniform(0, spread))  # noqa: S311

    def _installed(self) -> list[Release]:
        found = []
        for name, record in records(self._folder).items():
            if record.current is not None:
                found.append(Release(name, record.current.release.sequence, record.current.release.manifest))
        return found

    async def _take_roster(self, fetcher: Fetcher, offered: int) -> None:
        """Take over a newer roster, which says who is revoked; a server that has only an older one is not believed."""
        seal = None if self._passphrase is None else Seal(self._passphrase)
        store = FileStore(self._folder, Policy(), seal)
        if offered <= await asyncio.to_thread(store.change, _roster_number):
            return
        roster = await fetcher.roster()
        try:
            await asyncio.to_thread(store.change, lambda device: device.take_roster(roster))
        except TrustError as error:
            _log.warning("the server's roster is not taken: %s", error)
        self._refused.clear()

    async def _announce(self, fetcher: Fetcher) -> None:
        """Let post-quantum packages be sealed to this device; it takes the others where that does not work."""
        try:
            await fetcher.announce(await asyncio.to_thread(announcement_of, self._folder, self._passphrase))
        except UsageError as error:
            _log.info("no post-quantum key is announced: %s", error)
        except NotDeliveredError as error:
            _log.warning("the server does not take this device's post-quantum key: %s", error)

    async def _take(self, fetcher: Fetcher, release: Release) -> Manifest | None:
        """Fetch and install a release; None where it is there already, or was refused."""
        if release in await asyncio.to_thread(self._installed):
            return None
        statuses: asyncio.Queue[Status | None] = asyncio.Queue()
        reporter = asyncio.create_task(self._report(fetcher, release, statuses))
        loop = asyncio.get_running_loop()

        def tell(status: Status | None) -> None:
            loop.call_soon_threadsafe(statuses.put_nowait, status)

        try:
            manifest = await self._install(fetcher, release, tell)
        except RefusedError as error:  # an older one is offered again where the newer was stopped
            level = logging.DEBUG if error.refusal is Refusal.ROLLED_BACK else logging.WARNING
            _log.log(level, "%s is refused: %s", release, error)
            self._refused.add(release.manifest)
            return None
        finally:
            tell(None)
            await reporter
        _log.info("installed %s", release)
        self._told(manifest)
        return manifest

    async def _install(self, fetcher: Fetcher, release: Release, tell: Callable[[Status], None]) -> Manifest:
        device = await asyncio.to_thread(Keyholder.load, self._folder, self._passphrase)
        taking = self._taking
        installer = Installer(self._folder, device, taking.probe, largest=taking.largest, tell=tell)
        opened = await fetcher.open(release)
        await asyncio.to_thread(installer.require_acceptable, opened.header, time.time(), release)
        with await asyncio.to_thread(Incoming, self._folder, opened.header) as incoming:
            await fetcher.fetch(release, incoming)
        install = partial(installer.install, name=release.name, store_plain=taking.store_plain)
        manifest = await asyncio.to_thread(install, incoming.path, opened.key, time.time())
        await asyncio.to_thread(incoming.path.unlink, missing_ok=True)
        return manifest

    async def _report(self, fetcher: Fetcher, release: Release, statuses: asyncio.Queue[Status | None]) -> None:
        """Tell the server; where that fails, the next look says what is installed."""
        while (status := await statuses.get()) is not None:
            with suppress(NotDeliveredError):
                await fetcher.report(release, status.outcome, status.reason)
