"""Which models that could not be served are tried again, and when: reading and loading one takes seconds."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from propolis.secure.errors import UsageError

_LONGEST_PAUSE = 128


@dataclass(slots=True)
class _Failed:
    what: object
    message: str
    pause: int  # looks that are left out, twice as many each time; 0 for all to come
    left: int


class Attempts:
    """What has failed, and is left out for more and more looks; another version is tried at once."""

    def __init__(self) -> None:
        self._failed: dict[Hashable, _Failed] = {}

    def require_due(self, name: Hashable, what: object) -> None:
        """Count a look; raises the failure of the last attempt, as a UsageError, unless it is time for another one.

        Args:
            name: which model.
            what: its version, with everything that an attempt depends on.
        """
        failed = self._failed.get(name)
        if failed is None or failed.what != what:
            return
        failed.left -= 1
        if failed.pause == 0 or failed.left >= 0:
            raise UsageError(failed.message)

    def failed(self, name: Hashable, what: object, error: Exception, lasting: bool = False) -> UsageError:
        """Note an attempt that failed; a lasting failure is not tried again.

        Returns:
            It, with the message that `require_due` gives again.
        """
        before = self._failed.get(name)
        pause = min(2 * before.pause, _LONGEST_PAUSE) if before is not None and before.what == what else 1
        message = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        self._failed[name] = _Failed(what, message, 0 if lasting else pause, pause)
        return UsageError(message)

    def succeeded(self, name: Hashable) -> None:
        """Forget what has failed."""
        self._failed.pop(name, None)
