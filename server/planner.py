"""How a federation's sums are protected, and the plan of each attempt that follows from it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from numpy.typing import NDArray

from propolis.secure import labels
from propolis.secure.codec.encoding import SEED_BYTES, Encoding
from propolis.secure.codec.profiles import PROFILES, Profile
from propolis.secure.codec.scale import Scale, scaled
from propolis.secure.errors import UsageError
from propolis.secure.graph import sharing
from propolis.secure.identity import TrustedRoster
from propolis.secure.secagg.messages import to_bitmap
from propolis.secure.secagg.plan import Kind, Plan
from propolis.server.batch import Batch
from propolis.server.protected_grid import Attempts


@dataclass(frozen=True, slots=True)
class Protection:
    """How a federation's sums are protected; devices refuse what is below their own policy.

    Attributes:
        max_weight: largest weight of a device, public; a larger one is cut to it.
        codec: how updates and models are encoded.
        range: largest weighted change that the first round can carry; later rounds follow the devices' mean.
        min_clients: fewest devices that a sum is over; devices have a floor of their own.
        min_difference: fewest devices that two sums over one model may differ by, if they do at all.
        malicious: protect against a server that shows devices different views: complete graph, one exchange more.
        corrupted: assumed share of the devices that collude with the server.
        dropped: assumed share of the devices that drop out of a round.
        attempts: times that a batch is tried.
        seed: what the codec's public randomness derives from, so that a simulation can be repeated. None: new
            randomness every round.
    """

    max_weight: float
    codec: Profile = PROFILES["float32"]
    range: float = 1.0
    min_clients: int = 3
    min_difference: int = 3
    malicious: bool = False
    corrupted: float = 0.1
    dropped: float = 0.25
    attempts: int = 3
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (0 < self.max_weight < inf and 1e-12 <= self.range <= 1e12):
            raise UsageError("a Protection needs max_weight > 0 and a range in 1e-12..1e12")
        if self.attempts < 1 or self.min_clients < 1 or self.min_difference < 1:
            raise UsageError("a Protection needs attempts, min_clients and min_difference of at least 1")
        if not (0 <= self.corrupted < 1 and 0 <= self.dropped < 1):
            raise UsageError("a Protection needs corrupted and dropped in [0, 1)")

    def require_feasible(self, devices: int, parameters: int) -> None:
        """What devices would refuse is our own mistake: find it out before they are asked.

        Args:
            devices: in a round.
            parameters: of the model.

        Raises:
            UsageError: so many devices cannot be protected so, or have no room in the ring.
        """
        sharing(devices, self.corrupted, self.dropped, self.malicious)
        self.codec.require_room(devices, parameters)


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
        self._names = Attempts()
        self._seed = self._new_seed(0)

    def renew(self, roster: TrustedRoster) -> None:
        """Go by a newer roster."""
        self._roster = roster

    def plan(self, batch: Batch, cohort: Collection[int], scale: Scale) -> Plan:
        """The plan of the next attempt.

        Args:
            batch: what is to be done.
            cohort: indices of the devices that are there.
            scale: of the updates, as far as it is known.

        Raises:
            UsageError: the codec's ring is too small for so many devices.
        """
        before = self._names.number
        self._names.next(batch.server_round)
        if self._names.number != before:
            self._seed = self._new_seed(self._names.number)
        protection = self._protection
        return Plan(
            encoding=scaled(self._encoding(batch), protection.codec, scale, len(cohort), batch.shapes),
            malicious=protection.malicious,
            run_id=self._names.run_id,
            round=self._names.number,
            attempt=self._names.attempt,
            kind=batch.kind,
            roster_number=self._roster.number,
            roster_digest=self._roster.digest,
            cohort=to_bitmap(sorted(cohort), len(self._roster.roster.entries)),
            corrupted_ppm=round(protection.corrupted * 1e6),
            dropped_ppm=round(protection.dropped * 1e6),
        )

    def quantized(self, model: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
        """Names of the arrays that devices train and for which a coarse grid will do, sorted."""
        names = model.keys() - self._frozen - self._exact
        return tuple(name for name in sorted(names) if model[name].dtype.kind == "f")

    def _new_seed(self, number: int) -> bytes:
        if self._protection.seed is None:
            return os.urandom(SEED_BYTES)
        return labels.digest(labels.CODEC, self._protection.seed.to_bytes(8, "big"), number.to_bytes(8, "big"))

    def _encoding(self, batch: Batch) -> Encoding:
        """What goes how; the grid is still to be chosen."""
        codec, trains = self._protection.codec, batch.kind is Kind.TRAIN
        quantized = self.quantized(batch.model) if trains else ()
        exact = sorted(batch.model.keys() - self._frozen - set(quantized)) if trains else []
        return Encoding(
            width=codec.width,
            step=1.0,
            levels=1,
            rotated=codec.rotated,
            density=codec.density,
            keep=codec.keep,
            pruned=batch.is_pruned,
            seed=self._seed,
            max_weight=self._protection.max_weight,
            weight_key=self._weight_key,
            quantized=quantized,
            exact=tuple(exact),
        )
