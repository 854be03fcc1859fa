"""What a device insists on, whatever the server asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from propolis.secure.errors import UsageError


@dataclass(frozen=True, slots=True)
class Policy:
    """A data holder's own limits; set on the device, never by the server.

    Attributes:
        min_cohort: fewest devices in a round.
        min_threshold: fewest neighbours whose help it takes to unmask anything of this device.
        min_corrupted: smallest share of corrupted devices that the sparse graph must stand.
        min_dropped: smallest share of drop-outs that the sparse graph must stand.
        max_weight: largest weight, in the unit of the application (mostly examples), that this device's update may
            have; its own weight is cut down to it. None leaves it to the public maximum.
        weight_key: the only metric that the server may ask for as a weight. It is in the unit of the public maximum,
            so that a server that could choose would compare any metric with any bound.
        max_norm: largest L2 norm of this device's change to the model; a larger one is scaled down. None: any.
        max_reveals_per_model: how often this device helps to unmask a sum over one model, for training and for
            evaluation each, across runs. None: any number, as in a simulation.
        require_malicious: take part only in rounds that are protected against a lying server.
        min_bits: fewest bits of the ring that updates are added up in.
        min_density: smallest share of the trained values that a round may ask for.
        max_step: coarsest grid that an update may be rounded to, in units of a weighted change. These three keep
            the training useful; what is learnt of a device is the sum in any case.
        allow_unprotected: answer the server also outside of secure rounds, which shows it this device's own update.
        require_encryption: take part only in rounds whose sums the server cannot read. None: where this device has a
            key of homomorphic encryption, see `on_device`.
        require_masks: take part only in rounds in which not even who has the federation's key of homomorphic
            encryption could read this device's own update.
        max_trainings_per_model: how often this device trains, or evaluates, one encrypted model, whatever comes of it:
            whether it fails under a configuration of the server's choice tells of the model. None: any number.
        max_refused_sums: encrypted sums that this device may find not to be what they are said to be before it uses
            their key no more; the key's holder then has to make another one.
    """

    min_cohort: int = 3
    min_threshold: int = 1
    min_corrupted: float = 0.05
    min_dropped: float = 0.05
    max_weight: float | None = None
    weight_key: str = "num-examples"
    max_norm: float | None = None
    max_reveals_per_model: int | None = 4
    require_malicious: bool = False
    min_bits: int = 2
    min_density: float = 0.001
    max_step: float = 1e6
    allow_unprotected: bool = False
    require_encryption: bool | None = None
    require_masks: bool = False
    max_refused_sums: int = 1000
    max_trainings_per_model: int | None = 16

    def __post_init__(self) -> None:
        if self.min_cohort < 2 or self.min_threshold < 1:
            raise UsageError("a policy needs min_cohort >= 2 and min_threshold >= 1")
        if not (0 <= self.min_corrupted < 1 and 0 <= self.min_dropped < 1):
            raise UsageError("a policy needs min_corrupted and min_dropped in [0, 1)")
        if any(limit is not None and not limit > 0 for limit in (self.max_weight, self.max_norm)):
            raise UsageError("a policy's max_weight and max_norm must be positive")
        if not (2 <= self.min_bits <= 32 and 0 <= self.min_density <= 1 and self.max_step > 0):
            raise UsageError("a policy needs min_bits in 2..32, min_density in [0, 1] and max_step > 0")
        if self.max_refused_sums < 1:
            raise UsageError("a policy's max_refused_sums must be at least 1")
        if self.max_trainings_per_model is not None and self.max_trainings_per_model < 1:
            raise UsageError("a policy's max_trainings_per_model must be at least 1")
        if self.max_reveals_per_model is not None and self.max_reveals_per_model < 1:
            raise UsageError("a policy's max_reveals_per_model must be at least 1")

    def on_device(self, *, has_he_key: bool) -> Policy:
        """The policy where it is known whether the device has a key of homomorphic encryption: no None is left."""
        return replace(self, require_encryption=has_he_key) if self.require_encryption is None else self
