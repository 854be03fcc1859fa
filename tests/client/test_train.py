from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness import Blobs
from propolis.client.optimizer import Adam, Sgd
from propolis.client.train import LocalTrainer, TrainConfig, _batches, derive_seed
from propolis.secure.errors import UsageError
from propolis.task import choose_device

CPU = torch.device("cpu")


def trained(config: TrainConfig, seed: int = 0, task: Blobs | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    trainer = LocalTrainer(task or Blobs(), CPU)
    trainer.train(trainer.task.data().train, config, seed)
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_same_seed_gives_the_same_bits(optimizer: str) -> None:
    config = TrainConfig(optimizer=optimizer, epochs=2, lr=0.05)
    assert same(trained(config, seed=5), trained(config, seed=5))
    assert not same(trained(config, seed=5), trained(config, seed=6))


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01)])
def test_sgd_is_torchs(momentum: float, weight_decay: float) -> None:
    ours, theirs = (nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    optimizer = Sgd(list(ours.parameters()), momentum, weight_decay)
    compare(ours, theirs, optimizer, reference)


def test_adam_is_torchs() -> None:
    ours, theirs = (nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    reference = torch.optim.Adam(theirs.parameters(), lr=0.1, weight_decay=0.01)
    compare(ours, theirs, Adam(list(ours.parameters()), 0.01), reference)


def compare(ours: nn.Module, theirs: nn.Module, optimizer: Sgd | Adam, reference: torch.optim.Optimizer) -> None:
    for step in range(4):
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        reference.zero_grad()
        theirs(inputs).square().mean().backward()
        reference.step()
        gradients = torch.autograd.grad(ours(inputs).square().mean(), list(ours.parameters()))
        with torch.no_grad():
            optimizer.step(gradients, 0.1)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_stay_and_are_not_sent() -> None:
    torch.manual_seed(0)
    trainer = LocalTrainer(Blobs(), CPU)
    before = trainer.model.state_dict()["0.bias"].clone()
    trainer.train(trainer.task.data().train, TrainConfig(lr=0.5), seed=0)
    assert torch.equal(trainer.model.state_dict()["0.bias"], before)
    assert "0.bias" not in trainer.updated()
    assert "1.running_mean" in trainer.updated()


def test_the_proximal_term_pulls_towards_the_global_model() -> None:
    def distance(mu: float) -> float:
        start, end = trained(TrainConfig(lr=1e-9)), trained(TrainConfig(epochs=5, lr=0.05, proximal_mu=mu))
        return sum(float((end[k] - start[k]).square().sum()) for k in ("0.weight", "3.weight"))

    assert distance(10.0) < distance(1.0) < distance(0.0)


def test_clipping_bounds_the_step() -> None:
    start = trained(TrainConfig(steps=1, lr=1e-12))
    end = trained(TrainConfig(steps=1, lr=1.0, clip_norm=0.01))
    moved = math.sqrt(sum(float((end[k] - start[k]).square().sum()) for k in ("0.weight", "3.weight", "3.bias")))
    assert moved <= 0.0101


OPTIMIZERS = [
    TrainConfig(lr=0.05, momentum=0.9, weight_decay=0.01),
    TrainConfig(lr=0.05, proximal_mu=1.0, clip_norm=1.0),
    TrainConfig(lr=0.05, optimizer="adam", weight_decay=0.01),
]


def trained_from_zeros(config: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The zeros of a model with every third weight zero and biases of zero, and what training made of it."""
    torch.manual_seed(0)
    trainer = LocalTrainer(Blobs(), CPU)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for name in ("0.weight", "3.weight"):
        start[name].view(-1)[::3] = 0
    start["3.bias"].zero_()
    trainer.load(start)
    trainer.train(trainer.task.data().train, config, seed=0)
    return {name: tensor == 0 for name, tensor in start.items()}, trainer.updated()


@pytest.mark.parametrize("config", OPTIMIZERS)
def test_pruned_weights_stay_zero_under_every_optimizer_and_nothing_else_does(config: TrainConfig) -> None:
    zeros, updated = trained_from_zeros(replace(config, pruned=True, epochs=3))
    for name in ("0.weight", "3.weight"):
        assert torch.equal(updated[name] == 0, zeros[name])
    for name in ("1.bias", "3.bias"):
        assert updated[name].all()


@pytest.mark.parametrize("config", OPTIMIZERS)
def test_zeros_are_trained_where_nothing_is_pruned(config: TrainConfig) -> None:
    _, updated = trained_from_zeros(config)
    assert updated["0.weight"].all()


@pytest.mark.parametrize("config", OPTIMIZERS)
def test_a_model_without_zeros_trains_alike_pruned_or_not(config: TrainConfig) -> None:
    assert same(trained(config), trained(replace(config, pruned=True)))


def test_clipping_looks_at_the_weights_that_train_alone() -> None:
    start = trained_from_zeros(TrainConfig(steps=1, lr=1e-12, pruned=True))[1]
    end = trained_from_zeros(TrainConfig(steps=1, lr=1.0, clip_norm=0.01, pruned=True))[1]
    names = ("0.weight", "1.weight", "1.bias", "3.weight", "3.bias")
    moved = math.sqrt(sum(float((end[name] - start[name]).square().sum()) for name in names))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        return [
            TrainConfig(lr=1.0, lr_schedule=schedule, lr_decay=0.5, rounds=4, server_round=r).round_lr for r in (1, 3)
        ]

    assert rates("constant") == [1.0, 1.0]
    assert rates("cosine") == pytest.approx([1.0, 0.5])
    assert rates("exponential") == [1.0, 0.25]


@pytest.mark.parametrize(
    ("count", "config", "sizes"),
    [
        (10, TrainConfig(epochs=2, batch_size=4), [4, 4, 2, 4, 4, 2]),
        (9, TrainConfig(epochs=1, batch_size=4), [4, 5]),  # no batch of one
        (1, TrainConfig(epochs=3, batch_size=4), [1, 1, 1]),
        (3, TrainConfig(epochs=1, batch_size=1), [1, 1, 1]),
        (10, TrainConfig(steps=4, batch_size=4), [4, 4, 2, 4]),
        (10, TrainConfig(steps=1, epochs=9, batch_size=4), [4]),
    ],
)
def test_batches(count: int, config: TrainConfig, sizes: list[int]) -> None:
    assert [len(positions) for positions in _batches(count, config)] == sizes


def test_an_epoch_visits_every_example_once_in_a_new_order() -> None:
    batches = list(_batches(50, TrainConfig(epochs=2, batch_size=8)))
    first, second = torch.cat(batches[: len(batches) // 2]), torch.cat(batches[len(batches) // 2 :])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()


def test_the_configuration_is_read_from_a_record_and_checked() -> None:
    config = TrainConfig.from_record(
        {"batch-size": 8, "lr": 1, "server-round": 3, "pruned": True, "somebody-elses": "key"}
    )
    assert (config.batch_size, config.lr, config.server_round, config.pruned) == (8, 1.0, 3, True)
    for record in (
        {"lr": "fast"},
        {"epochs": 0},
        {"optimizer": "lion"},
        {"lr-schedule": "wild"},
        {"lr": -1.0},
        {"pruned": 1},
    ):
        with pytest.raises(UsageError):
            TrainConfig.from_record(record)


def test_a_model_of_another_shape_and_no_examples_are_refused() -> None:
    trainer = LocalTrainer(Blobs(), CPU)
    with pytest.raises(UsageError, match="does not fit the task's model"):
        trainer.load({"weight": torch.zeros(3)})
    nobody = trainer.task.data().train.subset(np.array([], np.int64))
    with pytest.raises(UsageError, match="no examples to train on"):
        trainer.train(nobody, TrainConfig(), seed=0)
    with pytest.raises(UsageError, match="no examples to evaluate on"):
        trainer.evaluate(nobody)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("warp-drive", "cuda:99", "meta-physical"):
        with pytest.raises(UsageError, match="is not available on this machine"):
            choose_device(name)


def test_seeds_depend_on_every_part() -> None:
    assert derive_seed("a", 1) == derive_seed("a", 1)
    assert len({derive_seed("a", 1), derive_seed("a", 2), derive_seed("b", 1), derive_seed("a1")}) == 4
    assert 0 <= derive_seed("x") < 2**63


class Restless(Blobs):
    """A model that carries something from one training to the next, and a loss that draws from numpy."""

    def model(self) -> nn.Module:
        model = super().model()
        model.register_buffer("mood", torch.zeros(1), persistent=False)
        return model

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return super().loss(outputs, labels) * float(np.random.rand() + random.random())


def test_nothing_travels_from_one_device_to_the_next() -> None:
    trainer = LocalTrainer(Restless(), CPU)
    trainer.model.get_buffer("mood").fill_(9)
    trainer.load(trainer.task.model().state_dict())
    assert trainer.model.get_buffer("mood") == 0


def test_tasks_that_draw_from_numpy_and_random_are_deterministic_too() -> None:
    assert same(trained(TrainConfig(), task=Restless()), trained(TrainConfig(), task=Restless()))
