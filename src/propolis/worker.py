"""A thread for calls that may never return: it is left behind when the process ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_POLL_S = 0.01


class Worker:
    """Makes calls, one at a time and in order, in a thread that no end of a process waits for.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """What the call returns or raises; who is cancelled meanwhile does not end it."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: BaseException | None) -> None:
            if not done.done():
                done.set_exception(error) if error else done.set_result(result)  # type: ignore[arg-type]

        def make() -> None:
            result, failure = None, None
            try:
                result = call(*arguments)
            except BaseException as error:
                failure = error
            with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(tell, result, failure)

        self._calls.put(make)
        return await done

    def close(self) -> None:
        """End the thread after the calls that it has been given."""
        self._calls.put(None)

    async def ended(self, seconds: float) -> bool:
        """Wait for so long that the thread ends, after `close`; whether it has."""
        until = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (make := self._calls.get()) is not None:
            make()
            del make  # and with it what it was called with, until there is another
