"""The global model as the server keeps it: parameters that the strategy moves, buffers that are averaged.

A strategy such as FedAdam would apply its moments to whatever it is given: batch-norm statistics would turn
negative and counters into fractions. So the strategy sees the trainable parameters alone; buffers (statistics,
counters, flags) are averaged by weight and keep their own types; frozen parameters never change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import nn

from propolis.flower import with_content
from propolis.secure.errors import UsageError
from propolis.task import frozen_names

ARRAYS_KEY = "arrays"
WEIGHT_KEY = "num-examples"


@dataclass(frozen=True, slots=True)
class GlobalModel:
    """A model by state-dict name, in the model's own order.

    Attributes:
        arrays: every entry of the state dict.
        trainable: names of the entries that the strategy aggregates.
        frozen: names of the parameters that training never changes; devices do not send them back.
    """

    arrays: Mapping[str, np.ndarray]
    trainable: frozenset[str]
    frozen: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The initial global model: a copy of a torch model's state."""
        arrays = {name: np.array(tensor.numpy(force=True)) for name, tensor in model.state_dict().items()}
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        frozen = frozen_names(model)
        return cls(arrays, frozenset(parameters - frozen), frozenset(frozen))

    @property
    def buffers(self) -> frozenset[str]:
        """Names of the entries that are neither trained nor frozen."""
        return frozenset(self.arrays) - self.trainable - self.frozen

    @property
    def is_finite(self) -> bool:
        """Whether no entry is infinite or NaN."""
        return all(bool(np.isfinite(array).all()) for array in self.arrays.values())

    def record(self, names: Iterable[str] | None = None) -> ArrayRecord:
        """The entries called `names` (all of them by default) as a Flower record, in the model's order."""
        chosen = self.arrays.keys() if names is None else set(names)
        return ArrayRecord({name: Array(array) for name, array in self.arrays.items() if name in chosen})

    def updated(self, *records: ArrayRecord) -> GlobalModel:
        """This model with the records' values, each in the shape and type that it had before.

        Integers are rounded to the nearest, flags set when most of the weight had them set.

        Raises:
            UsageError: an entry is unknown or has another shape.
        """
        arrays = dict(self.arrays)
        for record in records:
            for name, array in record.items():
                arrays[name] = like(arrays.get(name), array.numpy(), name)
        return GlobalModel(arrays, self.trainable, self.frozen)


def split_replies(replies: Iterable[Message], model: GlobalModel) -> tuple[list[Message], list[Message]]:
    """Each train reply as two: one with the trainable parameters for the strategy, one with the buffers.

    Error replies go with the first. Without buffers in the model the second list is empty.
    """
    of_parameters: list[Message] = []
    of_buffers: list[Message] = []
    for reply in replies:
        if reply.has_error() or not model.buffers:
            of_parameters.append(reply)
            continue
        of_parameters.append(_part(reply, model.trainable))
        of_buffers.append(_part(reply, model.buffers))
    return of_parameters, of_buffers


def average(replies: Iterable[Message]) -> ArrayRecord:
    """The weighted mean of the replies' arrays; empty without replies."""
    arrays, _ = FedAvg(weighted_by_key=WEIGHT_KEY).aggregate_train(0, list(replies))
    return arrays or ArrayRecord()


def _part(reply: Message, names: frozenset[str]) -> Message:
    content = RecordDict(dict(reply.content))
    for key, record in reply.content.array_records.items():
        content[key] = ArrayRecord({name: array for name, array in record.items() if name in names})
    return with_content(reply, content)


def like(old: np.ndarray | None, new: np.ndarray, name: str) -> np.ndarray:
    """`new` in the type of `old`: integers rounded to the nearest, flags set from one half on.

    Raises:
        UsageError: there is no `old`, or it has another shape.
    """
    if old is None or old.shape != new.shape:
        expected = "no such entry" if old is None else f"shape {old.shape}"
        raise UsageError(f"the aggregate's {name} has shape {new.shape}, expected {expected}")
    if old.dtype == np.bool_:
        return np.asarray(new >= 0.5)
    if np.issubdtype(old.dtype, np.integer):
        new = np.rint(new)
    return np.asarray(new, dtype=old.dtype)  # numpy turns arrays without dimensions into scalars
