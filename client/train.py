"""Local training: plain torch, deterministic under a seed."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from propolis.client.optimizer import Adam, Optimizer, Sgd
from propolis.secure.errors import UsageError
from propolis.task import Examples, Task, frozen_names


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How a device trains in one round, as the server asked for it.

    The fields are the keys of the message's ConfigRecord with hyphens turned into underscores; keys that are not
    ours are left alone, absent ones take the defaults.
    """

    server_round: int = 1
    rounds: int = 1
    optimizer: str = "sgd"
    epochs: int = 1
    steps: int = 0
    batch_size: int = 32
    lr: float = 0.1
    lr_schedule: str = "constant"
    lr_decay: float = 0.99
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    proximal_mu: float = 0.0
    pruned: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise UsageError(f"unknown optimizer '{self.optimizer}': expected sgd or adam")
        if self.lr_schedule not in ("constant", "cosine", "exponential"):
            raise UsageError(f"unknown schedule '{self.lr_schedule}': expected constant, cosine or exponential")
        if self.batch_size < 1 or self.epochs < 1 or self.steps < 0:
            raise UsageError("batch_size and epochs must be at least 1 and steps not negative")
        if not self.lr > 0:
            raise UsageError(f"the learning rate must be positive, got {self.lr}")

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> TrainConfig:
        """The configuration in a ConfigRecord of a train message.

        Raises:
            UsageError: a value has the wrong type or is out of range.
        """
        values: dict[str, Any] = {}
        defaults = cls()
        for name in (field.name for field in fields(cls)):
            value = record.get(name.replace("_", "-"))
            expected: type = type(getattr(defaults, name))
            if value is None:
                continue
            if not isinstance(value, (int, float) if expected is float else expected):
                raise UsageError(f"{name}: expected {expected.__name__}, got {value!r}")
            values[name] = expected(value)
        return cls(**values)

    @property
    def round_lr(self) -> float:
        """The learning rate of this round; the cosine ends at zero one round after the last."""
        if self.lr_schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * (self.server_round - 1) / self.rounds)) / 2
        if self.lr_schedule == "exponential":
            return float(self.lr * self.lr_decay ** (self.server_round - 1))
        return self.lr


def derive_seed(*parts: object) -> int:
    """A 63-bit seed bound to all the parts and to nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _seed_everything(seed: int, device: torch.device) -> None:
    """Seed the generators that training uses.

    `torch.manual_seed` also queues a call with a whole stack trace for every kind of device that is not there,
    which costs more than a small device's training.
    """
    random.seed(seed)  # a task may draw from any of the usual three
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class LocalTrainer:
    """One model of a task, reused for every round and every simulated device of this process."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.device = device
        self.model: nn.Module = task.model().to(device)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        travelling = self.model.state_dict().keys()
        # What does not travel with the model must not travel from one device to the next either.
        self._local_buffers = {k: b.clone() for k, b in self.model.named_buffers() if k not in travelling}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a global model.

        Raises:
            UsageError: names or shapes are not those of the task's model.
        """
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"the global model does not fit the task's model: {reason}") from None
        for name, buffer in self._local_buffers.items():
            self.model.get_buffer(name).copy_(buffer)

    def train(self, examples: Examples, config: TrainConfig, seed: int) -> float:
        """Train the loaded model on a device's examples.

        Args:
            examples: the device's own n examples.
            config: optimizer, schedule, epochs or steps and penalties.
            seed: decides the order of the examples and the model's own randomness.

        Returns:
            The mean training loss over all the batches.
        """
        if len(examples) == 0:
            raise UsageError("this device has no examples to train on")
        _seed_everything(seed, self.device)
        self.model.train()
        optimizer = self._optimizer(config)
        start = [p.detach().clone() for p in self._parameters] if config.proximal_mu else []
        kept = [(~pruned_entries(p.detach())).to(p.dtype) for p in self._parameters] if config.pruned else []
        lr, losses, sizes = config.round_lr, [], []
        for positions in _batches(len(examples), config):
            inputs, labels = examples.batch(positions, self.device)
            loss = self.task.loss(self.model(inputs), labels)
            gradients = self._gradients(loss, config, start, kept)
            with torch.no_grad():
                optimizer.step(gradients, lr)
            losses.append(loss.detach())
            sizes.append(len(positions))
        weights = torch.tensor(sizes, dtype=torch.float64)
        return float(torch.stack(losses).cpu().double() @ weights / weights.sum())

    @torch.no_grad()
    def evaluate(self, examples: Examples) -> dict[str, float]:
        """The task's metrics of the loaded model on `examples`."""
        if len(examples) == 0:
            raise UsageError("this device has no examples to evaluate on")
        return self.task.evaluate(self.model.eval(), examples)

    def updated(self) -> dict[str, Tensor]:
        """What training may have changed: trainable parameters and buffers, on the CPU, by state-dict name."""
        fixed = frozen_names(self.model)
        return {key: tensor.cpu() for key, tensor in self.model.state_dict().items() if key not in fixed}

    def _optimizer(self, config: TrainConfig) -> Optimizer:
        if config.optimizer == "adam":
            return Adam(self._parameters, config.weight_decay)
        return Sgd(self._parameters, config.momentum, config.weight_decay)

    def _gradients(self, loss: Tensor, config: TrainConfig, start: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
        gradients = list(torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True))
        if start:  # gradient of mu/2 |w - w_t|^2 (Li et al., FedProx, 2020, equation 2)
            pairs = zip(gradients, self._parameters, start, strict=True)
            gradients = [g + config.proximal_mu * (p.detach() - p0) for g, p, p0 in pairs]
        if kept:  # a zero without a gradient has no momentum, decay or proximal term either: it stays zero
            gradients = [g * k for g, k in zip(gradients, kept, strict=True)]
        if config.clip_norm:
            norm = nn.utils.get_total_norm(gradients)
            scale = torch.clamp(config.clip_norm / (norm + 1e-6), max=1.0)
            gradients = [g * scale for g in gradients]
        return gradients


def pruned_entries(parameter: Tensor) -> Tensor:
    """Which entries of a pruned model's parameter are pruned, in its shape: the zeros of two or more dimensions."""
    return parameter == 0 if parameter.ndim > 1 else torch.zeros_like(parameter, dtype=torch.bool)


def _batches(count: int, config: TrainConfig) -> Iterator[Tensor]:
    """Positions of each batch: whole passes in a new order each, cut after `steps` batches where given."""
    done = 0
    while True:
        parts = _one_pass(count, config.batch_size)
        for positions in parts:
            yield positions
            done += 1
            if done == config.steps:
                return
        if not config.steps and done >= config.epochs * len(parts):
            return


def _one_pass(count: int, batch_size: int) -> list[Tensor]:
    """The positions 0..count-1 shuffled and cut into batches; the order inside a single batch is nobody's business.

    A last batch of one example joins the batch before it, because batch normalisation cannot train on one.
    """
    if count <= batch_size:
        return [torch.arange(count)]
    parts = list(torch.split(torch.randperm(count), batch_size))
    if len(parts[-1]) == 1 and batch_size > 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
