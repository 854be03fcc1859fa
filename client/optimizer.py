"""Optimizer steps over torch's own functional SGD and Adam.

`torch.optim.SGD(...)` imports the compiler (over a second) and keeps its state in dictionaries; a device starts
afresh every round, so the functional forms and two lists are enough. They run the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class Optimizer(Protocol):
    """One descent step in place; the state belongs to one round of one device."""

    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Move the parameters against `gradients`, in place, by the learning rate `lr`."""


class Sgd:
    """Stochastic gradient descent with classical momentum (Sutskever et al., 2013, as in torch)."""

    def __init__(self, parameters: Sequence[Tensor], momentum: float, weight_decay: float) -> None:
        self._parameters = list(parameters)
        self._momentum, self._weight_decay = momentum, weight_decay
        self._buffers: list[Tensor | None] = [None] * len(self._parameters)

    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """See `Optimizer.step`."""
        sgd(
            self._parameters,
            list(gradients),
            self._buffers,
            foreach=True,
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class Adam:
    """Adam (Kingma and Ba, 2014) with torch's defaults: beta 0.9 and 0.999, epsilon 1e-8."""

    def __init__(self, parameters: Sequence[Tensor], weight_decay: float) -> None:
        self._parameters = list(parameters)
        self._weight_decay = weight_decay
        self._means = [torch.zeros_like(p) for p in self._parameters]
        self._squares = [torch.zeros_like(p) for p in self._parameters]
        self._steps = [torch.tensor(0.0) for _ in self._parameters]

    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """See `Optimizer.step`."""
        adam(
            self._parameters,
            list(gradients),
            self._means,
            self._squares,
            [],
            self._steps,
            foreach=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )
