"""Newer models for a server that runs: where they come from, and how often it looks."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from propolis.serving.model import Model

_log = logging.getLogger("propolis.serving")


@dataclass(frozen=True, slots=True)
class Refresh:
    """See the module.

    Attributes:
        newer: returns the models that have to be served in place of those of the same name, mostly none. It is called
            in a thread, once at a time; what it raises is logged, and the models stay.
        every_s: seconds between two calls.
    """

    newer: Callable[[], Sequence[Model]]
    every_s: float

    async def keep(self, install: Callable[[Model], Awaitable[None]]) -> None:
        """Look for newer models and install them, until it is cancelled; the same failure in a row is logged once."""
        said = None
        while True:
            await asyncio.sleep(self.every_s)
            try:
                for model in await _in_thread(self.newer):
                    await install(model)
                said = None
            except Exception as error:  # of whatever the models come from: what is served does not depend on it
                if (message := f"{type(error).__name__}: {error}") != said:
                    _log.warning("no newer models: those that are served stay", extra={"error": message})
                said = message


async def _in_thread(call: Callable[[], Sequence[Model]]) -> Sequence[Model]:
    """The result of a call, in a thread that is left behind when the process ends: it may wait for a network."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Sequence[Model]] = loop.create_future()

    def tell(result: Sequence[Model], error: Exception | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(result)

    def work() -> None:
        result, failure = tuple[Model, ...](), None
        try:
            result = tuple(call())
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=work, name="propolis-refresh", daemon=True).start()
    return await done
