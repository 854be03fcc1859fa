"""A protected run goes by the newest roster and key: before each attempt at a round, and before an evaluation."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from flwr.serverapp import Grid

from propolis.secure.errors import CancelledError, PropolisError, UsageError
from propolis.secure.he.keys import PublicKey
from propolis.secure.identity import TrustedRoster
from propolis.server.he_grid import HeGrid
from propolis.server.protected_grid import ProtectedGrid

_POLL_S = 0.2
_log = logging.getLogger("propolis.server")


class Renewal:
    """See the module.

    Args:
        roster: the newest; None where it does not change.
        key: the newest of homomorphic encryption; None where it does not change. It raises UsageError while there is
            none that a round may be under.
        deadline: seconds to wait for one.
        cancelled: set by somebody else to end a wait.
    """

    def __init__(
        self,
        roster: Callable[[], TrustedRoster] | None,
        key: Callable[[], PublicKey] | None,
        deadline: float,
        cancelled: threading.Event,
    ) -> None:
        self._roster, self._key = roster, key
        self._deadline, self._cancelled = deadline, cancelled

    def renew(self, grid: Grid) -> None:
        """Bring a grid up to date: who was revoked is out, who was invited is in, and a key that is new takes over.

        Raises:
            PropolisError: there is no key that a round may be under, and none came in time; the message says why.
            CancelledError: the run was asked to stop meanwhile.
        """
        self._renew_roster(grid)
        give_up, said = time.monotonic() + self._deadline, ""
        while (fault := self._renew_key(grid)) is not None:
            if time.monotonic() >= give_up:
                raise PropolisError(fault)
            if fault != said:
                _log.warning("no round until there is another key: %s", fault)
                said = fault
            if self._cancelled.wait(_POLL_S):
                raise CancelledError("the run was asked to stop")
            self._renew_roster(grid)

    def is_good(self, grid: Grid) -> bool:
        """Bring a grid up to date where that can be done at once; False: no exchange may be under its key now."""
        self._renew_roster(grid)
        return self._renew_key(grid) is None

    def _renew_roster(self, grid: Grid) -> None:
        if isinstance(grid, ProtectedGrid) and self._roster is not None:
            grid.renew(self._roster())

    def _renew_key(self, grid: Grid) -> str | None:
        """Take over the newest key; why that cannot be, where it cannot."""
        if isinstance(grid, HeGrid) and self._key is not None:
            try:
                grid.renew_key(self._key())
            except UsageError as error:
                return str(error)
        return None
