"""One attempt at one encrypted round under masks: secure aggregation whose sum the server cannot read either."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from propolis.secure.errors import PeerError, TooFewPeersError, UsageError
from propolis.secure.graph import sharing
from propolis.secure.he.keys import PublicKey
from propolis.secure.he.messages import EncryptedPlan
from propolis.secure.he.total import EncryptedTotal
from propolis.secure.identity import TrustedRoster
from propolis.secure.secagg.messages import to_bitmap
from propolis.secure.secagg.plan import Plan, Terms
from propolis.secure.secagg.server import SecAggServer
from propolis.server.batch import Batch
from propolis.server.broadcaster import WholeModel
from propolis.server.directory import Directory
from propolis.server.he_round import Asking, Collected, Given
from propolis.server.journal import Journal
from propolis.server.protected_grid import HANDSHAKE_S
from propolis.server.published_sums import PublishedSums
from propolis.server.secure_round import Deadlines, SecureRound, telling_a_sum


@dataclass(frozen=True, slots=True)
class Masking:
    """How encrypted updates are masked.

    Attributes:
        malicious, corrupted, dropped, min_difference: as in `propolis.server.planner.Protection`.
    """

    malicious: bool = False
    corrupted: float = 0.1
    dropped: float = 0.25
    min_difference: int = 3

    def __post_init__(self) -> None:
        if not (0 <= self.corrupted < 1 and 0 <= self.dropped < 1 and self.min_difference >= 1):
            raise UsageError("a Masking needs corrupted and dropped in [0, 1), and min_difference of at least 1")

    def require_feasible(self, devices: int) -> None:
        """Raise UsageError where so many devices cannot be protected so."""
        sharing(devices, self.corrupted, self.dropped, self.malicious)


class MaskedRounds:
    """The rounds of a run under masks.

    Args:
        directory: of the devices.
        masking: see `Masking`.
        min_clients: fewest devices that a sum may be over.
        journal: file in which the shares of a round are kept before they are used; None keeps none.
    """

    def __init__(self, directory: Directory, masking: Masking, min_clients: int, journal: Path | None) -> None:
        self._directory, self._masking, self._min_clients = directory, masking, min_clients
        self._published = PublishedSums(masking.min_difference)
        self._journal = Journal(journal) if journal else None

    def collect(self, asked: Asking, batch: Batch, roster: TrustedRoster) -> Collected:
        """Have the devices train, encrypt and mask, and take the masks away from the sum.

        Args:
            asked: what the round is about.
            batch: the strategy's messages.
            roster: that the devices are in.

        Raises:
            TooFewPeersError: too few devices are left, or the sum cannot be told.
            UsageError: so many devices cannot be protected as it is asked.
        """
        self._masking.require_feasible(len(asked.nodes))
        given, nodes = asked.given, dict(asked.nodes)
        terms = Terms(self._plan(asked.plan, nodes, roster).to_bytes())
        keys = {index: self._directory.spend(node_id) for index, node_id in nodes.items()}
        server = SecAggServer(terms, roster, keys, asked.total, metrics=())
        SecureRound(asked.channel, self._directory, server, nodes, self._min_clients).collect(
            WholeModel(given.content),
            Deadlines(min(asked.timeout, HANDSHAKE_S), asked.timeout),
            lambda: self._published.require_apart(batch.kind, given.model, server.alive),
        )
        if self._journal:
            self._journal.keep(replace(batch, shared_input=given.shared_input), server)
        with telling_a_sum(self._directory, asked.channel):
            summed, _ = server.sum(given.shared_input)
        self._published.remember(batch.kind, given.model, server.alive)
        return Collected(asked.plan, server.alive, summed)

    def recall(self, batch: Batch, given: Given, roster: TrustedRoster, key: PublicKey) -> Collected | None:
        """The same from what this round's devices revealed before the server was started again, if they did.

        Args:
            batch: the strategy's messages.
            given: what devices are given.
            roster: that the devices are in.
            key: of the federation, as it is now.
        """

        def total_of(terms: Terms) -> EncryptedTotal:
            return EncryptedTotal(EncryptedPlan.from_bytes(terms.plan.encrypted), key)

        recalled = self._journal.recall(batch, roster, total_of) if self._journal else None
        if recalled is None:
            return None
        before, server = recalled
        if before.shared_input != given.shared_input:
            return None
        try:
            summed, _ = server.sum(before.shared_input)
        except (PeerError, TooFewPeersError):
            return None
        self._published.remember(batch.kind, given.model, server.alive)
        return Collected(EncryptedPlan.from_bytes(server.terms.plan.encrypted), server.alive, summed)

    def _plan(self, plan: EncryptedPlan, cohort: Collection[int], roster: TrustedRoster) -> Plan:
        """The plan of the secure sum around an attempt."""
        return Plan(
            encoding=None,
            malicious=self._masking.malicious,
            run_id=plan.run_id,
            round=plan.round,
            attempt=plan.attempt,
            kind=plan.kind,
            roster_number=plan.roster_number,
            roster_digest=plan.roster_digest,
            cohort=to_bitmap(sorted(cohort), len(roster.roster.entries)),
            corrupted_ppm=round(self._masking.corrupted * 1e6),
            dropped_ppm=round(self._masking.dropped * 1e6),
            encrypted=plan.encoded,
        )
