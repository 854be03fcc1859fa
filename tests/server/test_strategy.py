from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from safetensors.numpy import load, save

from propolis.secure.errors import UsageError
from propolis.server.strategy import make_strategy, restore_strategy, strategy_state
from propolis.settings import Settings

NAMES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox")


@pytest.mark.parametrize(
    ("name", "kind"), zip(NAMES, (FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad, FedProx), strict=True)
)
def test_strategies_by_name(name: str, kind: type[FedAvg]) -> None:
    strategy = make_strategy(Settings(strategy=name, fraction=0.5, min_clients=3))
    assert type(strategy) is kind
    assert (strategy.fraction_train, strategy.min_train_nodes) == (0.5, 3)


def test_server_learning_rates_arrive() -> None:
    assert make_strategy(Settings(strategy="fedadam", server_lr=0.03)).eta == 0.03
    strategy = make_strategy(Settings(strategy="fedavgm", server_lr=0.5, server_momentum=0.7))
    assert (strategy.server_learning_rate, strategy.server_momentum) == (0.5, 0.7)
    assert make_strategy(Settings(strategy="fedprox", proximal_mu=0.2)).proximal_mu == 0.2


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_strategy_has_no_state(name: str) -> None:
    assert strategy_state(make_strategy(Settings(strategy=name))) == {}


def test_state_keeps_order_through_a_file_that_does_not() -> None:
    """FedAvgM pairs its momentum and its arrays by position; safetensors sorts by name."""
    before = make_strategy(Settings(strategy="fedavgm"))
    before.momentum_vector = [np.full(2, i, np.float32) for i in range(12)]
    before.current_arrays = ArrayRecord({name: np_array(i) for i, name in enumerate(("z", "a", "m"))})
    after = make_strategy(Settings(strategy="fedavgm"))
    restore_strategy(after, load(save(strategy_state(before))))
    assert list(after.current_arrays) == ["z", "a", "m"]
    assert [int(array[0]) for array in after.momentum_vector] == list(range(12))


def np_array(value: int) -> object:
    from flwr.app import Array

    return Array(np.full(2, value, np.float32))


def test_state_of_another_strategy_is_refused() -> None:
    adam = make_strategy(Settings(strategy="fedadam"))
    adam.m_t = {"w": np.ones(2)}
    with pytest.raises(UsageError, match="m_t is unknown to FedAvg"):
        restore_strategy(make_strategy(Settings()), strategy_state(adam))
