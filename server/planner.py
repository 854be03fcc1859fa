"""How a federation's sums are protected, and the plan of each attempt that follows from it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from propolis.secure.codec.fixed_point import FixedPoint
from propolis.secure.codec.update import Encoding
from propolis.secure.errors import UsageError
from propolis.secure.graph import sharing
from propolis.secure.identity import TrustedRoster
from propolis.secure.secagg.messages import to_bitmap
from propolis.secure.secagg.plan import Kind, Plan
from propolis.server.batch import Batch


@dataclass(frozen=True, slots=True)
class Protection:
    """How a federation's sums are protected; devices refuse what is below their own policy.

    Attributes:
        max_weight: largest weight of a device, public; a larger one is cut to it.
        bits: width of the ring, which is what a parameter costs on the wire.
        range: largest weighted change that the first round can carry; later rounds follow the devices' mean.
        min_clients: fewest devices that a sum is over; devices have a floor of their own.
        min_difference: fewest devices that two sums over one model may differ by, if they do at all.
        malicious: protect against a server that shows devices different views: complete graph, one exchange more.
        corrupted: assumed share of the devices that collude with the server.
        dropped: assumed share of the devices that drop out of a round.
        attempts: times that a batch is tried.
    """

    max_weight: float
    bits: int = 16
    range: float = 1.0
    min_clients: int = 3
    min_difference: int = 3
    malicious: bool = False
    corrupted: float = 0.1
    dropped: float = 0.25
    attempts: int = 3

    def __post_init__(self) -> None:
        if not (0 < self.max_weight < inf and 2 <= self.bits <= 32 and 1e-12 <= self.range <= 1e12):
            raise UsageError("a Protection needs max_weight > 0, bits in 2..32 and a range in 1e-12..1e12")
        if self.attempts < 1 or self.min_clients < 1 or self.min_difference < 1:
            raise UsageError("a Protection needs attempts, min_clients and min_difference of at least 1")
        if not (0 <= self.corrupted < 1 and 0 <= self.dropped < 1):
            raise UsageError("a Protection needs corrupted and dropped in [0, 1)")

    def require_feasible(self, devices: int, range_: float) -> None:
        """What devices would refuse is our own mistake: find it out before they are asked.

        Raises:
            UsageError: so many devices cannot be protected so, or have no room in the ring.
        """
        sharing(devices, self.corrupted, self.dropped, self.malicious)
        FixedPoint(self.bits, devices, range_)


class Planner:
    """Names attempts, which rise and never come twice, and says how their updates travel.

    Args:
        roster: the members.
        protection: see `Protection`.
        weight_key: the metric that is the weight.
        exact: names of arrays that need more than a coarse grid; integers always do.
        frozen: names of arrays that devices do not send back.
    """

    def __init__(
        self,
        roster: TrustedRoster,
        protection: Protection,
        weight_key: str,
        exact: Iterable[str],
        frozen: Iterable[str],
    ) -> None:
        self._roster, self._protection, self._weight_key = roster, protection, weight_key
        self._exact, self._frozen = frozenset(exact), frozenset(frozen)
        self._run_id = os.urandom(16)
        self._number, self._attempt = 0, 0

    def plan(self, batch: Batch, cohort: Iterable[int], range_: float) -> Plan:
        """The plan of the next attempt.

        Args:
            batch: what is to be done.
            cohort: indices of the devices that are there.
            range_: of the encoding.
        """
        self._number, self._attempt = self._next_name(batch.server_round)
        protection = self._protection
        return Plan(
            encoding=self._encoding(batch, range_),
            malicious=protection.malicious,
            run_id=self._run_id,
            round=self._number,
            attempt=self._attempt,
            kind=batch.kind,
            roster_number=self._roster.number,
            roster_digest=self._roster.digest,
            cohort=to_bitmap(sorted(cohort), len(self._roster.roster.entries)),
            corrupted_ppm=round(protection.corrupted * 1e6),
            dropped_ppm=round(protection.dropped * 1e6),
        )

    def _next_name(self, server_round: int | None) -> tuple[int, int]:
        """Round and attempt of the next plan: they rise, also when the application counts otherwise."""
        number = self._number + 1 if server_round is None else max(server_round, self._number)
        return number, self._attempt + 1 if number == self._number else 0

    def _encoding(self, batch: Batch, range_: float) -> Encoding:
        names = () if batch.kind is Kind.EVALUATE else sorted(batch.model.keys() - self._frozen)
        exact = {name for name in names if name in self._exact or batch.model[name].dtype.kind != "f"}
        return Encoding(
            width=self._protection.bits,
            range=range_,
            max_weight=self._protection.max_weight,
            weight_key=self._weight_key,
            quantized=tuple(name for name in names if name not in exact),
            exact=tuple(name for name in names if name in exact),
        )
