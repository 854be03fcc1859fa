"""A device takes the federation's key of homomorphic encryption from its server, which is believed in nothing.

It asks when it connects, when there is news, and when a round is under a key that it has not: then the round waits for
the answer. What comes is checked, and kept, as if its owner had installed it from files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path

import grpc.aio
from flwr.app import Message, RecordDict

from propolis.client.asking import Asking
from propolis.client.fetch import Fetcher
from propolis.client.he_folder import has_he_key
from propolis.client.he_key import install_he_key, load_he_key
from propolis.client.keyholder import Keyholder
from propolis.client.seal import Seal
from propolis.link.certificates import Tls
from propolis.link.options import DEVICE_OPTIONS, credentials_of
from propolis.link.rate import Rate
from propolis.messages import open_record
from propolis.secure.errors import PropolisError, RefusedError
from propolis.secure.he.held import KeyBundle
from propolis.secure.he.messages import EncryptedPlan
from propolis.secure.secagg.messages import PrepareRequest, from_bytes
from propolis.secure.secagg.plan import Terms
from propolis.secure.secagg.states import Exchange

# A round does not wait for longer: its deadline may be near.
_LONGEST_WAIT_S = 45.0
_log = logging.getLogger("propolis.client")


class KeyFetcher:
    """See the module.

    Args:
        folder: the device's.
        server: HOST:PORT of the link.
        tls: the device's certificate and key.
        passphrase: of its state.
    """

    def __init__(self, folder: Path, server: str, tls: Tls, passphrase: bytes | None = None) -> None:
        self._folder, self._server, self._tls = folder, server, tls
        self._seal = None if passphrase is None else Seal(passphrase)
        self._asking = Asking("no new key of homomorphic encryption")
        self._taking = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def news(self, spread_s: float = 0.0) -> None:
        """There may be another key: ask within this time; called on the loop that `run` runs on."""
        self._asking.news(spread_s)

    async def run(self) -> None:
        """Take the key whenever there is news, and later where that did not work; until it is cancelled."""
        self._loop = asyncio.get_running_loop()
        await self._asking.run(self.take)

    async def take(self) -> bool:
        """Ask once, and keep the server's key where it is another one; whether it is.

        Raises:
            NotDeliveredError: the server cannot be reached, or has none for this device.
            PropolisError: what came is refused, or cannot be kept; what the device had stays.
        """
        async with self._taking:
            have = await asyncio.to_thread(self._key_id)
            credentials = credentials_of(self._tls)
            async with grpc.aio.secure_channel(self._server, credentials, options=DEVICE_OPTIONS) as channel:
                data = await Fetcher(channel, Rate(0)).he_key(have)
            if not data:
                return False
            await asyncio.to_thread(self._install, data)
            return True

    def prepare(self, message: Message) -> None:
        """Before a round: where it is under a key that this device has not, ask for that, and wait for the answer.

        Called in the app's thread. It never raises: the round itself finds out what the device has then.
        """
        try:
            wanted = _wanted(message)
        except RefusedError:  # which is for the round to say
            return
        loop = self._loop
        if loop is None or not wanted or self._key_id() == wanted:
            return
        asked = asyncio.run_coroutine_threadsafe(self.take(), loop)
        try:
            asked.result(_LONGEST_WAIT_S)
        except (PropolisError, TimeoutError, CancelledError) as error:
            asked.cancel()
            _log.warning("no key of homomorphic encryption for this round: %s", str(error) or "no answer in time")
        except Exception:  # a bug, of ours or of a library
            _log.exception("no key of homomorphic encryption for this round")

    def _key_id(self) -> bytes:
        """Of the key that the device has and may use; empty without one."""
        with suppress(PropolisError):
            if not has_he_key(self._folder):
                return b""
            key = load_he_key(self._folder, Keyholder.under(self._folder, self._seal), time.time(), self._seal)
            return b"" if key is None else key.public.key_id
        return b""

    def _install(self, data: bytes) -> None:
        bundle, device = KeyBundle.from_bytes(data), Keyholder.under(self._folder, self._seal)
        key = install_he_key(self._folder, device, bundle.published, bundle.sealed, time.time(), self._seal)
        _log.info("took key %d of homomorphic encryption", key.number)


def _wanted(message: Message) -> bytes:
    """Id of the key that a round begins under; empty of any other message. Raises PeerError where it is malformed."""
    exchange, body = open_record(message.content if message.has_content() else RecordDict())
    if exchange is Exchange.PREPARE:  # under masks the plan comes with this
        body = Terms(from_bytes(PrepareRequest, body).plan).plan.encrypted
    elif exchange is not Exchange.ENCRYPT:
        return b""
    return EncryptedPlan.from_bytes(body).key_id if body else b""
