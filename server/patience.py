"""What one device may ask of the server, and one line of the log for what it does again and again."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from propolis.secure.errors import PropolisError

_QUIET_S, _MOST_LINES = 60.0, 4096


class BusyError(PropolisError):
    """A device asks for more than it needs."""


class Patience:
    """Counts what devices ask, by their index.

    Args:
        most: times that each may ask.
        seconds: in any time as long as this.
        at_once: how many of its questions may be under way.
    """

    def __init__(self, most: int, seconds: float, at_once: int = 1) -> None:
        self.most, self.seconds, self.at_once = most, seconds, at_once
        self._asked: dict[int, deque[float]] = {}
        self._under_way: Counter[int] = Counter()

    def ends(self, index: int) -> bool:
        """Whether this device has asked as often as it may; where it has not, it has now asked once more."""
        now, recent = time.monotonic(), self._asked.setdefault(index, deque(maxlen=self.most))
        if len(recent) == self.most and now - recent[0] < self.seconds:
            return True
        recent.append(now)
        return False

    @contextmanager
    def asking(self, index: int) -> Iterator[None]:
        """A question, while it is answered; raises BusyError where it is one too many."""
        if self._under_way[index] >= self.at_once:
            raise BusyError(f"device {index} has asked {self.at_once} things already that are not answered")
        if self.ends(index):
            raise BusyError(f"device {index} asked more than {self.most} times in {self.seconds:g} s")
        self._under_way[index] += 1
        try:
            yield
        finally:
            self._under_way[index] -= 1


class Complaints:
    """Lines of a log that devices could otherwise fill it with.

    Args:
        log: where they go.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._said: dict[tuple[int | None, str], float] = {}

    def say(self, text: str, index: int | None = None) -> None:
        """Log a line about a device, or about the server itself, unless it was logged a short time ago."""
        now, key = time.monotonic(), (index, text)
        if now - self._said.get(key, -_QUIET_S) < _QUIET_S:
            return
        if len(self._said) >= _MOST_LINES:
            self._said.clear()
        self._said[key] = now
        self._log.warning(text, extra={} if index is None else {"index": index})
