"""The shares of the round under way on disk, before they are used: a crash costs the devices no second reveal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from propolis.secure.errors import StorageError
from propolis.secure.identity import TrustedRoster
from propolis.secure.secagg.addition import Total
from propolis.secure.secagg.plan import Terms, of_ring
from propolis.secure.secagg.server import SecAggServer
from propolis.server.batch import Batch
from propolis.storage import remove_stale, write_atomically

_DIGEST = 32  # bytes


class Journal:
    """One file with the last round that was unmasked.

    Args:
        path: the file; it holds a masked sum and the shares that unmask it, so it says no more than the sum.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_fresh = True

    def keep(self, batch: Batch, server: SecAggServer[Any]) -> None:
        """Write a round down; raises StorageError."""
        self._is_fresh = False
        remove_stale(self._path)
        write_atomically(self._path, batch.asked + batch.shared_input + server.to_bytes(), mode=0o600)

    def recall(
        self, batch: Batch, roster: TrustedRoster, total_of: Callable[[Terms], Total[Any]] = of_ring
    ) -> tuple[Batch, SecAggServer[Any]] | None:
        """The round that was written down for the same batch before this process was started, if there is one.

        Args:
            batch: what is to be done.
            roster: that the round's devices are in.
            total_of: see `SecAggServer.from_bytes`.

        Returns:
            The batch over the very content that its devices masked for, and the server's role.
        """
        if not self._is_fresh or not self._path.is_file():
            return None
        self._is_fresh = False
        data = self._path.read_bytes()
        asked, shared_input, state = data[:_DIGEST], data[_DIGEST : 2 * _DIGEST], data[2 * _DIGEST :]
        if asked != batch.asked:
            return None
        try:
            server = SecAggServer.from_bytes(state, roster, total_of)
        except StorageError:  # of another roster, or another version
            return None
        return (replace(batch, shared_input=shared_input), server) if server.terms.kind is batch.kind else None
