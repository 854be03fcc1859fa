"""How a federation's rounds are encrypted, and with which strategies they can be."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from flwr.serverapp.strategy import FedAvg, Strategy

from propolis.secure.errors import UsageError
from propolis.secure.he.keys import PublicKey
from propolis.secure.he.layout import SMALLEST_VALUE_BITS
from propolis.server.masked_round import Masking


@dataclass(frozen=True, slots=True)
class Encryption:
    """How a federation's rounds are encrypted.

    Attributes:
        key: its public part, which is all that the server has.
        max_weight: largest weight of a device, public; a larger one is cut to it.
        range: smallest magnitude of a weight that the first round has room for; later ones follow the model.
        min_clients: fewest devices that a sum is over; devices have a floor of their own.
        attempts: times that a batch is tried.
        masking: how updates are masked, so that not even a device, which has the key, can open another one's; None
            leaves them without masks, which a key may forbid.
    """

    key: PublicKey
    max_weight: float
    range: float = 1.0
    min_clients: int = 3
    attempts: int = 3
    masking: Masking | None = None

    def __post_init__(self) -> None:
        if not (0 < self.max_weight < inf and 1e-12 <= self.range <= 1e12):
            raise UsageError("an Encryption needs max_weight > 0 and a range in 1e-12..1e12")
        if self.attempts < 1 or self.min_clients < 1:
            raise UsageError("an Encryption needs attempts and min_clients of at least 1")
        if self.key.parameters.value_bits < SMALLEST_VALUE_BITS:
            bits = self.key.parameters.value_bits
            raise UsageError(f"weights need {SMALLEST_VALUE_BITS} bits or more, and the key is for {bits}")
        if self.key.masked and self.masking is None:
            raise UsageError(f"the key is for {self.key.use}: an Encryption under it needs masking")


def require_blind(strategy: Strategy) -> None:
    """Refuse a strategy that does anything with the mean but to take it, see `FedAvg.aggregate_train`.

    Raises:
        UsageError: it is one; the message names it.
    """
    if isinstance(strategy, FedAvg) and type(strategy).aggregate_train is FedAvg.aggregate_train:
        return
    named = next((base for base in type(strategy).__mro__ if "aggregate_train" in vars(base)), type(strategy))
    raise UsageError(
        f"{named.__name__} computes on updates or on their mean, and under homomorphic encryption the server sees "
        "neither; use FedAvg or FedProx"
    )
