"""When a device asks the server for what is new: when it hears that there may be something, and where that failed."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from propolis.client.fetch import NotDeliveredError, NotServedError
from propolis.secure.errors import PropolisError

_LEAST_PAUSE_S, _FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 5.0, 900.0
_log = logging.getLogger("propolis.client")


class Asking:
    """See the module; all of it runs on one loop.

    Args:
        failed: how a line of the log begins that says why there is nothing.
    """

    def __init__(self, failed: str) -> None:
        self._failed = failed
        self._news = asyncio.Event()
        self._due: float | None = None
        self._said = ""
        self._looked = -_LEAST_PAUSE_S

    def news(self, spread_s: float = 0.0) -> None:
        """There may be something new: ask within this time."""
        self._ask_by(time.monotonic() + random.uniform(0, spread_s))  # noqa: S311
        self._news.set()

    async def run(self, look: Callable[[], Awaitable[object]]) -> None:
        """Look whenever there is news, and again and again where something did not work; until it is cancelled."""
        tries = 0
        while True:
            await self._wait(tries)
            try:
                await look()
                tries, self._said = 0, ""
            except NotServedError as error:
                _log.debug("%s: %s", self._failed, error)
                tries = 0
            except NotDeliveredError as error:
                self.say(f"{self._failed}: {error}")
                tries = 0 if error.is_final else tries + 1
            except PropolisError as error:
                self.say(f"{self._failed}: {error}")
                tries += 1
            except Exception:  # a bug, of ours or of a library: the device goes on, and hears of revocations
                _log.exception(self._failed)
                tries += 1

    def say(self, text: str) -> None:
        """A line of the log, once for each reason in a row."""
        _log.log(logging.DEBUG if text == self._said else logging.WARNING, "%s", text)
        self._said = text

    async def _wait(self, tries: int) -> None:
        """Until it is time: news comes at a random moment of theirs, what failed is tried later and later."""
        if tries:
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(tries, 16)) * random.uniform(0.5, 1.0)  # noqa: S311
            self._ask_by(time.monotonic() + pause)
        while self._due is None or self._due > time.monotonic():
            self._news.clear()
            with suppress(TimeoutError):
                left = None if self._due is None else self._due - time.monotonic()
                await asyncio.wait_for(self._news.wait(), left)
        await asyncio.sleep(max(0.0, self._looked + _LEAST_PAUSE_S - time.monotonic()))
        self._due, self._looked = None, time.monotonic()

    def _ask_by(self, due: float) -> None:
        """Ask at this time, on the monotonic clock, if not earlier."""
        self._due = due if self._due is None else min(self._due, due)
