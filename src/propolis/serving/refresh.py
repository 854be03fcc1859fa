"""Newer models for a server that runs: where they come from, and how often it looks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

from propolis.serving.model import Model
from propolis.worker import Worker

_log = logging.getLogger("propolis.serving")


@dataclass(frozen=True, slots=True)
class Refresh:
    """See the module.

    Attributes:
        newer: gives the models that have to be served in place of those of the same name, mostly none. It is called and
            asked for one after the other in a thread; each is served before the next one is asked for. What it raises
            is logged, and the models stay.
        every_s: seconds between two calls.
    """

    newer: Callable[[], Iterable[Model]]
    every_s: float

    async def keep(self, install: Callable[[Model], Awaitable[None]]) -> None:
        """Look for newer models and install them, until it is cancelled; the same failure in a row is logged once."""
        said, thread = None, Worker("propolis-refresh")
        try:
            while True:
                await asyncio.sleep(self.every_s)
                try:
                    models = await thread.run(self._begin)
                    while (model := await thread.run(_next, models)) is not None:
                        await install(model)
                    said = None
                except Exception as error:  # of whatever the models come from: what is served does not depend on it
                    if (message := f"{type(error).__name__}: {error}") != said:
                        _log.warning("no newer models: those that are served stay", extra={"error": message})
                    said = message
        finally:
            thread.close()

    def _begin(self) -> Iterator[Model]:
        return iter(self.newer())


def _next(models: Iterator[Model]) -> Model | None:
    return next(models, None)
