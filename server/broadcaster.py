"""The model's way to the devices: which version each device has, and what it is sent."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from propolis.messages import Arrays, model_digest, with_model_elsewhere
from propolis.secure.codec.broadcast import Values
from propolis.secure.codec.series import SERIES_BYTES, ModelSeries
from propolis.secure.codec.sparsify import pruned_entries
from propolis.secure.errors import UsageError
from propolis.server.batch import Batch
from propolis.server.channel import Content

_VALUES, _TARGET = "values", "target"


@dataclass(frozen=True, slots=True)
class WholeModel:
    """A source that sends each device the whole of the same records."""

    content: Content

    def content_for(self, index: int) -> Content:
        """See `ModelSource`."""
        del index
        return self.content

    def acknowledge(self, index: int) -> None:
        """See `ModelSource`."""

    def forget(self, index: int) -> None:
        """See `ModelSource`."""


class Broadcaster:
    """Follows the strategy's model with a series of versions.

    Args:
        coarseness: of a step, in units of the root mean square of what the devices lack.
    """

    def __init__(self, coarseness: float) -> None:
        self._coarseness = coarseness
        self._series: ModelSeries | None = None
        self._target = b""  # digest of the model that the newest version was made for
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._names: tuple[str, ...] = ()
        self._start: Values | None = None
        self._records = RecordDict()  # of the newest batch, without the values
        self._has: dict[int, int] = {}  # version by device index

    def publish(self, batch: Batch, names: Sequence[str]) -> Batch:
        """The batch over what the devices will have of its model.

        Args:
            batch: over the strategy's own model.
            names: of the arrays that travel as steps; the others travel as they are.

        Raises:
            UsageError: the model's shapes are not those of the rounds before.
        """
        model = batch.precise
        self._require_same_shapes(model)
        self._names = tuple(name for name in model if name in set(names))
        digest = model_digest(model)
        if self._series is None or digest != self._target:
            target = self._flat(model, np.float32)
            pruned = (
                self._flat({n: pruned_entries(model[n]) for n in self._names}, np.bool_) if batch.is_pruned else None
            )
            if self._series is None:
                self._series = ModelSeries(os.urandom(SERIES_BYTES), self._coarseness, len(target), self._start)
            self._series.publish(target, pruned)
            self._target = digest
        self._records = with_model_elsewhere(batch.content, self._names)
        return batch.with_model(self._rebuilt(model, self._series.values))

    def content_for(self, index: int) -> Content:
        """What is sent to a device: the application's records without the arrays' values, and the way to those."""
        return Content(self._records, self._published.message_for(self._has.get(index)).to_bytes())

    def acknowledge(self, index: int) -> None:
        """Note that a device has the newest version."""
        self._has[index] = self._published.version

    def forget(self, index: int) -> None:
        """Note that a device has nothing: it is sent the whole model next."""
        self._has.pop(index, None)

    def state(self) -> dict[str, NDArray[Any]]:
        """What a run needs to go on with the same versions: arrays by name; empty before the first."""
        if self._series is None:
            return {}
        return {_VALUES: self._series.values, _TARGET: np.frombuffer(self._target, np.uint8)}

    def resume_from(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        if state:
            self._start = np.asarray(state[_VALUES], np.float32)
            self._target = np.asarray(state[_TARGET], np.uint8).tobytes()
            if len(self._start):
                self._series = ModelSeries(os.urandom(SERIES_BYTES), self._coarseness, len(self._start), self._start)

    @property
    def _published(self) -> ModelSeries:
        if self._series is None:
            raise UsageError("no model has been published yet")
        return self._series

    def _require_same_shapes(self, model: Arrays) -> None:
        shapes = {name: array.shape for name, array in model.items()}
        if self._shapes and shapes != self._shapes:
            changed = sorted(n for n in shapes.keys() | self._shapes.keys() if shapes.get(n) != self._shapes.get(n))
            raise UsageError(f"the model's {changed[0]} has another shape than in the rounds before")
        self._shapes = shapes

    def _flat(self, arrays: Mapping[str, NDArray[Any]], dtype: type) -> NDArray[Any]:
        parts: list[NDArray[Any]] = [np.asarray(arrays[name], dtype).ravel() for name in self._names]
        return np.concatenate(parts) if parts else np.zeros(0, dtype)

    def _rebuilt(self, model: Arrays, values: Values) -> Arrays:
        """The model with these values, in its own order."""
        rebuilt, start = {}, 0
        for name, array in model.items():
            if name in self._names:
                end = start + prod(array.shape)
                rebuilt[name], start = values[start:end].reshape(array.shape), end
            else:
                rebuilt[name] = array
        return rebuilt
