"""Pruning while training: how many weights are zero after each round, and which ones.

A weight is pruned exactly when it is zero in the global model. So the mask travels inside the model: devices leave
alone what comes as zero, and nothing else has to be sent or kept in a checkpoint. Weights are the trainable arrays of
two or more dimensions (matrices, kernels); biases, norms, buffers and frozen parameters are never pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from propolis.secure.codec.sparsify import pruned_entries
from propolis.secure.errors import UsageError
from propolis.server.model import GlobalModel
from propolis.settings import Settings

_WEIGHT_DIMENSIONS = 2


@dataclass(frozen=True, slots=True)
class Pruning:
    """A run's pruning: gradual, by magnitude over all the weights together.

    Attributes:
        share: of the weights that is zero in the end, in (0, 1).
        begin: first round after which weights are pruned, from 1.
        end: round after which the full share is.
        weights: the names of each prunable array. Tied weights have several, in the order in which a module loads
            them: the last one counts.
    """

    share: float
    begin: int
    end: int
    weights: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, settings: Settings, model: nn.Module) -> Self | None:
        """What the settings ask for; None where that is no pruning.

        Raises:
            UsageError: the model has nothing that could be pruned.
        """
        if not settings.prune or settings.prune_end is None:
            return None
        weights = _weights_of(model)
        if not weights:
            raise UsageError(f"prune is {settings.prune:g}, but the model has no trainable array of two dimensions")
        return cls(settings.prune, settings.prune_begin, settings.prune_end, weights)

    def has_begun(self, number: int) -> bool:
        """Whether the model that devices train in a round has been pruned; before, its zeros are like any value."""
        return number > self.begin

    def share_after(self, number: int) -> float:
        """Share of the weights that is to be zero after a round.

        It rises fast at first, while there is much to spare, and ever slower towards the end: the cubic schedule of
        Zhu and Gupta (2017, arXiv 1710.01878, equation 1) with s_i = 0, t_0 = begin - 1 and t_0 + n dt = end.
        """
        if number < self.begin:
            return 0.0
        left = max(self.end - number, 0) / (self.end - self.begin + 1)
        return self.share * (1 - left**3)

    def apply(self, number: int, before: GlobalModel, after: GlobalModel) -> GlobalModel:
        """The model after a round, pruned.

        Args:
            number: the round.
            before: the model that the devices trained; what was pruned in it stays so, whatever the strategy's
                momentum made of it.
            after: the model that the strategy made of their updates.
        """
        if number < self.begin:
            return after
        magnitudes = [np.abs(after.arrays[names[-1]]) for names in self.weights]
        if self.has_begun(number):
            for names, magnitude in zip(self.weights, magnitudes, strict=True):
                magnitude[pruned_entries(before.arrays[names[-1]])] = 0
        total = sum(magnitude.size for magnitude in magnitudes)
        masks = smallest(magnitudes, round(self.share_after(number) * total))
        arrays = dict(after.arrays)
        for names, mask in zip(self.weights, masks, strict=True):
            arrays.update({name: np.where(mask, 0, arrays[name]) for name in names})
        return replace(after, arrays=arrays)

    def sparsity(self, model: GlobalModel) -> float:
        """Share of the weights that is zero in `model`."""
        weights = [model.arrays[names[-1]] for names in self.weights]
        pruned = sum(int(np.count_nonzero(pruned_entries(weight))) for weight in weights)
        return pruned / sum(weight.size for weight in weights)


def smallest(magnitudes: Sequence[NDArray[Any]], count: int) -> list[NDArray[np.bool_]]:
    """The `count` smallest entries of all the arrays together, as flags in the arrays' shapes.

    What is zero is among them, also where that is more than `count`. Of equal entries the first ones are taken, in
    the order of the arrays. The largest entry of every array stays, unless the array is zero altogether.

    Args:
        magnitudes: non-empty arrays of finite numbers >= 0.
        count: how many.
    """
    flat = np.concatenate([magnitude.ravel() for magnitude in magnitudes])
    ends = np.cumsum([magnitude.size for magnitude in magnitudes])
    largest = [end - m.size + int(m.argmax()) for m, end in zip(magnitudes, ends, strict=True) if m.any()]
    flat[largest] = np.inf
    count = min(count, flat.size - len(largest))
    chosen = flat == 0
    if count > 0:
        threshold = np.partition(flat, count - 1)[count - 1]
        below = flat < threshold
        chosen |= below
        chosen[np.flatnonzero(flat == threshold)[: count - np.count_nonzero(below)]] = True
    parts = np.split(chosen, ends[:-1])
    return [part.reshape(magnitude.shape) for part, magnitude in zip(parts, magnitudes, strict=True)]


def _weights_of(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and parameter.ndim >= _WEIGHT_DIMENSIONS and parameter.numel():
            names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(each) for each in names.values())
