"""Flower's averaging strategies by name, and their state as arrays, so that a run can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Strategy,
)

from propolis.secure.errors import UsageError
from propolis.server.model import ARRAYS_KEY, WEIGHT_KEY, GlobalModel
from propolis.settings import Settings

_ADAPTIVE: dict[str, type[FedAdam | FedYogi | FedAdagrad]] = {
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
}


def make_strategy(settings: Settings) -> Strategy:
    """The strategy that the settings name, with their fractions, minimum and server learning rate."""
    common: dict[str, Any] = {
        "fraction_train": settings.fraction,
        "fraction_evaluate": settings.evaluate_fraction,
        "min_train_nodes": settings.min_clients,
        "min_evaluate_nodes": settings.min_clients,
        "min_available_nodes": settings.min_clients,
        "weighted_by_key": WEIGHT_KEY,
        "arrayrecord_key": ARRAYS_KEY,
    }
    if settings.strategy in _ADAPTIVE:
        if settings.server_lr is not None:
            common["eta"] = settings.server_lr
        return _ADAPTIVE[settings.strategy](**common, eta_l=settings.lr)
    if settings.strategy == "fedavgm":
        return FedAvgM(
            **common,
            server_learning_rate=1.0 if settings.server_lr is None else settings.server_lr,
            server_momentum=settings.server_momentum,
        )
    if settings.strategy == "fedprox":
        return FedProx(**common, proximal_mu=settings.proximal_mu)
    return FedAvg(**common)


# A strategy keeps what it learns (FedAdam's moments, FedAvgM's momentum) in attributes of a few shapes. Each is
# saved as arrays called ATTRIBUTE/SHAPE/POSITION/ENTRY, because FedAvgM pairs its entries by position and a file
# of arrays does not keep their order. What is none of these shapes is configuration, not state.


def strategy_state(strategy: Strategy) -> dict[str, np.ndarray]:
    """The arrays that a strategy has gathered over the rounds, by name."""
    state: dict[str, np.ndarray] = {}
    for attribute, value in vars(strategy).items():
        shape, entries = _entries(value)
        for position, (entry, array) in enumerate(entries.items()):
            state[f"{attribute}/{shape}/{position:06d}/{entry}"] = array
    return state


def restore_strategy(strategy: Strategy, state: Mapping[str, np.ndarray]) -> None:
    """Give a newly made strategy the state that `strategy_state` took.

    Raises:
        UsageError: the state is not one of this strategy's.
    """
    grouped: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name in sorted(state):
        attribute, shape, _, entry = (*name.split("/", 3), "", "", "")[:4]
        grouped.setdefault((attribute, shape), {})[entry] = state[name]
    for (attribute, shape), entries in grouped.items():
        if not hasattr(strategy, attribute):
            raise UsageError(f"the checkpoint's {attribute} is unknown to {type(strategy).__name__}")
        setattr(strategy, attribute, _value(shape, entries))


def go_on_from(strategy: Strategy, model: GlobalModel) -> None:
    """Tell a strategy that its aggregate was changed: FedAvgM starts its next step from its own copy of the model."""
    if isinstance(strategy, FedAvgM):
        strategy.current_arrays = model.record(model.trainable)


def _entries(value: object) -> tuple[str, dict[str, np.ndarray]]:
    if isinstance(value, ArrayRecord):
        return "record", {key: array.numpy() for key, array in value.items()}
    if isinstance(value, np.ndarray):
        return "array", {"": value}
    if isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value):
        return "list", {str(position): item for position, item in enumerate(value)}
    if isinstance(value, dict) and all(isinstance(item, np.ndarray) for item in value.values()):
        return "dict", {str(key): item for key, item in value.items()}
    return "none", {}


def _value(shape: str, entries: dict[str, np.ndarray]) -> object:
    if shape == "record":
        return ArrayRecord({key: Array(array) for key, array in entries.items()})
    if shape == "array":
        return entries[""]
    if shape == "list":
        return list(entries.values())
    return entries
