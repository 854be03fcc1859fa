"""A bound on bytes per second."""

from __future__ import annotations

import asyncio
import time


class Rate:
    """Lets bytes pass at a rate; who waits is served in turn, and who no longer waits has cost nothing.

    Args:
        bytes_per_second: on average; 0 lets everything pass at once.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._turn = asyncio.Lock()

    async def take(self, count: int) -> None:
        """Wait until these bytes may pass."""
        if not self._rate:
            return
        async with self._turn:
            await asyncio.sleep(max(0.0, self._free_at - time.monotonic()))
            self._free_at = max(self._free_at, time.monotonic()) + count / self._rate
