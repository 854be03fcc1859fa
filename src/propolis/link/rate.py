"""A bound on bytes per second."""

from __future__ import annotations

import asyncio
import time


class Rate:
    """Lets bytes pass at a rate; who waits is served in turn.

    Args:
        bytes_per_second: on average; 0 lets everything pass at once.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0

    async def take(self, count: int) -> None:
        """Wait until these bytes may pass."""
        if not self._rate:
            return
        now = time.monotonic()
        begin = max(now, self._free_at)
        self._free_at = begin + count / self._rate
        if begin > now:
            await asyncio.sleep(begin - now)
