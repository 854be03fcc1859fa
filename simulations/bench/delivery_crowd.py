"""Many devices in one process that fetch a release at once: ``python -m`` this module.

Arguments: the federation's folder, how many devices, the server's address, and a file for the figures. Each device has
its own certificate and connection, and checks every chunk; none is kept, or the disk of one machine would be measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import grpc.aio

from propolis.client.fetch import Fetcher
from propolis.link.certificates import load_tls
from propolis.link.delivery import Release
from propolis.link.options import DEVICE_OPTIONS, credentials_of
from propolis.link.rate import Rate
from propolis.package import Header
from propolis.secure.content import require_chunk
from propolis.secure.identity import DIGEST_BYTES
from propolis.simulations.federation import device_folder

READY = "ready"


class Checked:
    """Checks the chunks of a package and lets them go."""

    def __init__(self, header: Header) -> None:
        self._digests = header.chunk_digests
        self.next = 0

    @property
    def is_whole(self) -> bool:
        """Whether all chunks have come."""
        return self.next * DIGEST_BYTES == len(self._digests)

    def add(self, chunk: bytes) -> None:
        """Check a chunk; raises TrustError."""
        require_chunk(self.next, chunk, self._digests)
        self.next += 1


async def fetch_one(folder: Path, index: int, address: str) -> float:
    """One device looks, opens and fetches what it is offered; seconds."""
    began, credentials = time.monotonic(), credentials_of(load_tls(device_folder(folder, index)))
    async with grpc.aio.secure_channel(address, credentials, options=DEVICE_OPTIONS) as channel:
        fetcher = Fetcher(channel, Rate(0))
        release: Release
        (release,) = (await fetcher.look(())).offers
        opened = await fetcher.open(release)
        await fetcher.fetch(release, Checked(opened.header))
    return time.monotonic() - began


async def fetch_all(folder: Path, devices: int, address: str) -> list[float]:
    """All of them at once, as soon as a line comes on standard input."""
    print(READY, file=sys.stderr, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    return await asyncio.gather(*(fetch_one(folder, index, address) for index in range(devices)))


if __name__ == "__main__":
    where, count, server, figures = sys.argv[1:]
    seconds = asyncio.run(fetch_all(Path(where), int(count), server))
    Path(figures).write_text(json.dumps(seconds), encoding="utf-8")
