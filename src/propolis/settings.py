"""The one typed model of a run's settings: a TOML file first, then flags (or keyword arguments) over it.

The field names are the TOML keys, the command line's flags (``batch_size`` is ``--batch-size``) and the keys of
``[tool.flwr.app.config]``; a description is the flag's help text.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from propolis.secure.errors import UsageError

M = TypeVar("M", bound=BaseModel)

PROTECTIONS = ("none", "secagg", "he", "he+secagg")
CODECS = ("float32", "dense", "thin")
# What changes a codec; without a value, the codec's own holds.
_CODEC_PARAMETERS = ("bits", "density", "keep", "update_clip", "wraps", "broadcast_step")

# Bits of a weight under homomorphic encryption: by default, and the fewest that leave it one.
_ENCRYPTED_BITS, _FEWEST_ENCRYPTED_BITS = 16, 8
# What needs the mean, or the model, on the server.
_BLIND_STRATEGIES = ("fedavg", "fedprox")
_OF_MASKS = ("malicious", "assume_corrupted", "assume_dropped")
_OF_CODECS = ("codec", *_CODEC_PARAMETERS[1:])

_LARGEST = 2**31 - 1
FEWEST_IN_A_SUM = 3

StrategyName = Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox"]


class Settings(BaseModel):
    """What a federated run does. Frozen; every field has a default; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    task: str = Field("digits", description="Built-in task (digits, fashion-mnist) or MODULE:CLASS.")
    data: str | None = Field(None, description="Folder with the task's data, where the task reads one.")
    clients: int = Field(10, ge=1, le=_LARGEST, description="Number of simulated devices.")
    rounds: int = Field(30, ge=1, le=_LARGEST, description="Number of federated rounds.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the devices that train in a round.")
    min_clients: int = Field(2, ge=1, le=_LARGEST, description="Fewest devices a round may start and end with.")
    attempts: int = Field(10, ge=1, le=_LARGEST, description="Times a round is tried before the run stops.")
    round_deadline: float = Field(3600.0, gt=0, description="Seconds that each exchange of a round may take.")
    partition: str = Field(
        "dirichlet:0.5", description="iid, dirichlet:ALPHA, shards:CLASSES or natural (by the task's users)."
    )
    strategy: StrategyName = Field("fedavg", description="Aggregation strategy of Flower.")
    server_lr: float | None = Field(
        None, gt=0, description="Server learning rate of fedavgm, fedadam, fedyogi and fedadagrad."
    )
    server_momentum: float = Field(0.9, ge=0, lt=1, description="Server momentum of fedavgm.")
    proximal_mu: float = Field(0.01, ge=0, description="Weight of fedprox's proximal term.")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="Optimizer on the device.")
    epochs: int = Field(5, ge=1, le=_LARGEST, description="Passes over a device's data in a round.")
    steps: int | None = Field(None, ge=1, le=_LARGEST, description="Batches in a round; takes the place of --epochs.")
    batch_size: int = Field(32, ge=1, le=_LARGEST, description="Examples in a batch.")
    lr: float = Field(0.1, gt=0, description="Learning rate on the device.")
    lr_schedule: Literal["constant", "cosine", "exponential"] = Field(
        "constant", description="How the learning rate moves over the rounds."
    )
    lr_decay: float = Field(0.99, gt=0, le=1, description="Factor per round of the exponential schedule.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of SGD on the device.")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty on the device.")
    clip_norm: float | None = Field(None, gt=0, description="Largest L2 norm of a batch's gradient.")
    prune: float = Field(0.0, ge=0, lt=1, description="Share of the weights that is zero in the end.")
    prune_begin: int = Field(1, ge=1, le=_LARGEST, description="First round after which weights are pruned.")
    prune_end: int | None = Field(
        None, ge=1, le=_LARGEST, description="Round after which the full share is; half of the rounds by default."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")
    evaluate_fraction: float = Field(
        0.0, ge=0, le=1, description="Share of the devices that also evaluate each new global model."
    )
    holdout: float = Field(0.1, gt=0, lt=1, description="Share of its examples a device keeps for that evaluation.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything random.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Chance that a device is lost in a round.")
    backend: Literal["local", "ray", "link"] = Field(
        "local", description="In this process, Flower's engine on Ray, or a process per device behind our link."
    )
    workers: int = Field(0, ge=0, le=16, description="Training processes of the local backend; 0 trains in this one.")
    ray_cpus: float = Field(1.0, gt=0, description="CPUs that the ray backend reserves for each device that trains.")
    protection: str = Field(
        "none",
        description="How updates are protected: none, secagg (secure sums), he (homomorphic encryption) or he+secagg.",
    )
    he_mode: Literal["public", "seeded"] = Field(
        "public", description="Key that devices encrypt with under he: the public one, or their own for half the bytes."
    )
    malicious: bool = Field(False, description="secagg also against a server that lies about who is there.")
    update_range: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="Largest change, under he largest weight, that a first round has room for; later it follows.",
    )
    max_weight: float | None = Field(
        None,
        gt=0,
        le=1e15,
        description="Largest weight of a device under secagg or he; the largest device's by default.",
    )
    assume_corrupted: float = Field(
        0.1, ge=0, lt=0.5, description="Share of the devices that secagg assumes to collude with the server."
    )
    assume_dropped: float = Field(
        0.25, ge=0, lt=0.5, description="Share of the devices that secagg assumes to drop out of a round."
    )
    codec: str = Field(
        "float32", description="How updates and models are encoded under secagg: float32, dense (4 bits) or thin."
    )
    bits: int | None = Field(
        None, ge=2, le=32, description="Bits of a value; 16, 4 (dense) and 5 (thin) by default, and 16 under he."
    )
    density: float | None = Field(
        None, gt=0, le=1, description="Share of the values that travels in a round; all, and a tenth of them in thin."
    )
    keep: int | None = Field(
        None, ge=0, le=_LARGEST, description="Arrays of at most this many values travel whole; 0, and 2048 in thin."
    )
    update_clip: float | None = Field(
        None, gt=0, description="Largest norm of a device's change, in units of their mean; 5, and none in float32."
    )
    wraps: float | None = Field(
        None, gt=0, le=1, description="Values of a round's sum that may be expected not to fit their bits; 0.01."
    )
    broadcast_step: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Coarseness of the model's way to the devices; 0 (whole), 1 (dense), 3.3 (thin).",
    )

    @field_validator("strategy", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("protection")
    @classmethod
    def _known_protection(cls, value: str) -> str:
        return _one_of(value, PROTECTIONS)

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, value: str) -> str:
        return _one_of(value, CODECS)

    @property
    def is_protected(self) -> bool:
        """Whether the server sees sums only."""
        return self.protection != "none"

    @property
    def is_encrypted(self) -> bool:
        """Whether the server sees no sums either."""
        return self.protection in ("he", "he+secagg")

    @property
    def is_masked(self) -> bool:
        """Whether nobody sees a single device's update, whatever keys they have."""
        return self.protection in ("secagg", "he+secagg")

    @property
    def value_bits(self) -> int:
        """Bits of a weight under homomorphic encryption."""
        return self.bits or _ENCRYPTED_BITS

    @model_validator(mode="after")
    def _under_encryption(self) -> Self:
        if not self.is_encrypted:
            if self.he_mode != "public":
                raise ValueError(f"he_mode {self.he_mode} is for homomorphic encryption: set protection to he")
            return self
        names = _OF_CODECS if self.is_masked else (*_OF_MASKS, *_OF_CODECS)
        if odd := [name for name in names if getattr(self, name) != type(self).model_fields[name].default]:
            kind = "he+secagg or secagg" if odd[0] in _OF_MASKS else "secagg"
            raise ValueError(
                f"{odd[0]} means nothing under {self.protection}: set protection to {kind}, or leave it out"
            )
        if self.strategy not in _BLIND_STRATEGIES:
            raise ValueError(
                f"{self.strategy} computes on the mean, which the server does not see under he: "
                f"use {' or '.join(_BLIND_STRATEGIES)}"
            )
        if self.prune:
            raise ValueError("prune: the server does not see the weights under he, so it cannot prune them")
        if self.value_bits < _FEWEST_ENCRYPTED_BITS:
            raise ValueError(f"bits: under he a weight has {_FEWEST_ENCRYPTED_BITS} to 32, got {self.value_bits}")
        return self

    @model_validator(mode="after")
    def _enough_clients(self) -> Self:
        if self.min_clients > self.clients:
            raise ValueError(f"min_clients is {self.min_clients}, but there are only {self.clients} clients")
        sampled = max(int(self.clients * self.fraction), self.min_clients)
        if self.is_protected and sampled < FEWEST_IN_A_SUM:
            raise ValueError(f"{sampled} of {self.clients} clients train in a round; a secure sum takes 3 or more")
        if self.malicious and not self.is_masked:
            raise ValueError("malicious is a kind of secagg: set protection to secagg or he+secagg")
        return self

    @model_validator(mode="after")
    def _codec_inside_a_sum(self) -> Self:
        given = [name for name in _CODEC_PARAMETERS if getattr(self, name) is not None]
        if not self.is_protected and (given or self.codec != "float32"):
            what = given[0] if given else f"codec {self.codec}"
            raise ValueError(f"{what} is for updates inside a secure sum: set protection to secagg")
        if self.codec == "float32" and (rotating := [name for name in given if name in ("update_clip", "wraps")]):
            raise ValueError(f"{rotating[0]} is for the codecs dense and thin: float32 cuts off single values only")
        if self.keep is not None and self.codec != "thin" and (self.density or 1) == 1:
            raise ValueError("keep is for arrays of which only a share would travel: set a density")
        return self

    @model_validator(mode="after")
    def _pruned_in_time(self) -> Self:
        if not self.prune:
            return self
        if self.prune_begin > self.rounds:
            raise ValueError(f"prune_begin is {self.prune_begin}, but there are only {self.rounds} rounds")
        if self.prune_end is None:  # becomes a value of its own: a resumed run of more rounds keeps its schedule
            object.__setattr__(self, "prune_end", max(self.rounds // 2, self.prune_begin))
            self.model_fields_set.add("prune_end")
        elif not self.prune_begin <= self.prune_end <= self.rounds:
            expected = f"prune_begin to rounds, {self.prune_begin} to {self.rounds}"
            raise ValueError(f"prune_end: expected a round from {expected}, got {self.prune_end}")
        return self


def load_settings(
    config: Path | None = None, overrides: Mapping[str, Any] | None = None, base: Settings | None = None
) -> Settings:
    """Settings from a TOML file with overrides on top.

    Args:
        config: TOML file with a flat table of settings; ``batch-size`` and ``batch_size`` are the same key.
        overrides: settings that win over the file's; a value of None means "not given".
        base: settings that hold where neither says anything; the defaults when absent.

    Raises:
        UsageError: the file cannot be read or parsed, a key is unknown (the message names the nearest known
            one), or a value is out of range.
    """
    values: dict[str, Any] = base.model_dump(exclude_unset=True) if base else {}
    values.update(read_toml(config) if config else {})
    values.update(given(overrides or {}))
    return build(Settings, values, source=str(config) if config else "settings")


def build(model: type[M], values: Mapping[str, Any], source: str) -> M:
    """A typed table of settings.

    Args:
        model: the table.
        values: by name, hyphens as good as underscores; None means "not given".
        source: where they come from, for the message.

    Raises:
        UsageError: a key is unknown, and the message names the nearest known one; or a value is out of range.
    """
    said = given(values)
    for key in [key for key in said if key not in model.model_fields]:
        nearest = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.0)[0]
        raise UsageError(f"{source}: unknown key '{key}'; the nearest known one is '{nearest}'")
    try:
        return model(**said)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(detail) for detail in error.errors())) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables and values of a TOML file, hyphens in the names of the first level made underscores.

    Raises:
        UsageError: it cannot be read or parsed.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    return normalized(values)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are not None, by their normalised names."""
    return {key: value for key, value in normalized(values).items() if value is not None}


def normalized(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with underscores for hyphens in the names; raises UsageError where one is then there twice."""
    same = {key.replace("-", "_"): value for key, value in values.items()}
    if len(same) < len(values):
        raise UsageError("a key is given twice, once with hyphens and once with underscores")
    return same


def _one_of(value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"'{value}' is not available in this version; choose {' or '.join(known)}")
    return value


def _explain(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if not detail["loc"]:
        return message
    return f"{detail['loc'][0]}: {message}, got {detail['input']!r}"
