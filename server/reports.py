"""How far releases got on the devices, as these say: the last word of each, in a SQLite file of the server's folder."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from propolis.link.delivery import Outcome, Release
from propolis.secure.errors import StorageError
from propolis.server.rollout import PUBLISHED_FOLDER

REPORTS_FILE = "reports.db"
_WAIT_S = 10.0
_TABLE = """CREATE TABLE IF NOT EXISTS report (
    model TEXT NOT NULL, sequence INTEGER NOT NULL, device INTEGER NOT NULL,
    outcome INTEGER NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (model, sequence, device)
) WITHOUT ROWID"""
_NOTE = """INSERT INTO report VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET outcome = excluded.outcome, reason = excluded.reason, at = excluded.at
    WHERE outcome != excluded.outcome OR reason != excluded.reason"""
_OF = "SELECT device, outcome, reason, at FROM report WHERE model = ? AND sequence = ? ORDER BY device"


@dataclass(frozen=True, slots=True)
class Report:
    """What a device said last of a release.

    Attributes:
        device: its place in the roster.
        outcome: how far it got.
        reason: why it failed, in a word; empty where it did not.
        at: seconds since 1970, by the server's clock.
    """

    device: int
    outcome: Outcome
    reason: str
    at: float


class Reports:
    """The reports in a server's folder.

    Args:
        folder: the server's.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / PUBLISHED_FOLDER / REPORTS_FILE

    def note(self, releases: Iterable[Release], report: Report) -> None:
        """Keep what a device says of releases, in place of what it said before; raises StorageError."""
        said = (report.device, int(report.outcome), report.reason, report.at)
        with self._connected() as connection, connection:
            connection.executemany(_NOTE, [(release.name, release.sequence, *said) for release in releases])

    def of(self, release: Release) -> list[Report]:
        """What devices said of a release, by their index; raises StorageError."""
        if not self._file.exists():
            return []
        with self._connected() as connection:
            rows = connection.execute(_OF, (release.name, release.sequence)).fetchall()
        return [Report(device, Outcome(outcome), reason, at) for device, outcome, reason, at in rows]

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._file, timeout=_WAIT_S)) as connection:
                connection.execute(_TABLE)
                yield connection
        except sqlite3.Error as error:
            raise StorageError(f"the reports in {self._file}: {error}") from None
