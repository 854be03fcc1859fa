"""Long work on a device, told in its log: how far it is, every few seconds and not before."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_EVERY_S = 5.0
_log = logging.getLogger("propolis.client")


def told(pieces: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The same pieces, with a line in the log whenever five seconds have gone by.

    Args:
        pieces: of the work, as they are done.
        total: how many there will be.
        what: is being done.
    """
    last = time.monotonic()
    for done, piece in enumerate(pieces, 1):
        if (now := time.monotonic()) - last >= _EVERY_S:
            _log.info("%s: %d of %d", what, done, total)
            last = now
        yield piece
