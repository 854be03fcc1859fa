"""The model's way to the devices: which version each device has, and what it is sent."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from propolis.messages import MOST_VALUES, Arrays, shapes_of, with_model_elsewhere
from propolis.secure.codec.broadcast import Values
from propolis.secure.codec.series import SERIES_BYTES, ModelSeries, Pace, first_version
from propolis.secure.codec.sparsify import pruned_entries
from propolis.secure.errors import UsageError
from propolis.server.batch import Batch
from propolis.server.channel import Content


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
        coarseness: see `ModelSeries`.
    """

    def __init__(self, coarseness: float) -> None:
        self._coarseness = coarseness
        self._series: ModelSeries | None = None
        self._start: Pace | None = None
        self._is_pruned = False  # from the first batch on that is
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._names: tuple[str, ...] = ()
        self._records = RecordDict()  # of the newest batch, without the values
        self._has: dict[int, int] = {}  # version by device index
        self._ways: dict[int | None, bytes] = {}  # to the newest version, by the one that a device has

    def publish(self, batch: Batch, names: Sequence[str]) -> Batch:
        """The batch over what the devices will have of its model.

        Args:
            batch: over the strategy's own model.
            names: of the arrays that travel as steps, sorted; the others travel as they are.

        Raises:
            UsageError: the model's shapes are not those of the rounds before, or it is not finite.
        """
        model = batch.precise
        self._require_same_shapes(model)
        self._names = tuple(names)
        target = self._target(model)
        if self._series is None:
            sizes = [model[name].size for name in self._names]
            self._series = ModelSeries(os.urandom(SERIES_BYTES), self._coarseness, sizes, self._start)
            self._shapes = shapes_of(model)
        pruned_now = batch.is_pruned and not self._is_pruned
        self._is_pruned |= batch.is_pruned
        if pruned_now or self._series.pace is None or not np.array_equal(target, self._series.pace.target):
            self._series.publish(target, self._pruned(model))
            self._ways.clear()
        self._records = with_model_elsewhere(batch.content, self._names)
        return batch.with_model(self._rebuilt(model, self._series.values))

    def adopted(self, model: Arrays, names: Sequence[str]) -> Arrays:
        """A new model as its devices will have it, for the strategy to begin with: then nothing is lacking."""
        self._names = tuple(names)
        sizes = [model[name].size for name in self._names]
        rebuilt = self._rebuilt(model, first_version(self._flat(model, np.float32), sizes))
        return {name: array.astype(model[name].dtype) for name, array in rebuilt.items()}

    def content_for(self, index: int) -> Content:
        """What is sent to a device: the application's records without the arrays' values, and the way to those."""
        has = self._has.get(index)
        if has not in self._ways:
            self._ways[has] = self._published.message_for(has).to_bytes()
        return Content(self._records, self._ways[has])

    def acknowledge(self, index: int) -> None:
        """Note that a device has the newest version."""
        self._has[index] = self._published.version

    def forget(self, index: int) -> None:
        """Note that a device has nothing: it is sent the whole model next."""
        self._has.pop(index, None)

    def state(self) -> dict[str, NDArray[Any]]:
        """What a run needs to go on with the same versions: arrays by name; empty before the first."""
        if self._series is None or self._series.pace is None:
            return {}
        pace = self._series.pace
        return {
            "values": pace.values,
            "target": pace.target,
            "steps": np.array(pace.steps, np.float64),
            "pruned": np.array(self._is_pruned),
        }

    def resume_from(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        if state:
            steps = tuple(float(step) for step in state["steps"])
            self._start = Pace(np.asarray(state["values"]), np.asarray(state["target"]), steps)
            self._is_pruned = bool(state["pruned"])

    @property
    def _published(self) -> ModelSeries:
        if self._series is None:
            raise UsageError("no model has been published yet")
        return self._series

    def _pruned(self, model: Arrays) -> NDArray[np.bool_] | None:
        if not self._is_pruned:
            return None
        return self._flat({name: pruned_entries(model[name]) for name in self._names}, np.bool_)

    def _require_same_shapes(self, model: Arrays) -> None:
        shapes = shapes_of(model)
        if self._shapes and shapes != self._shapes:
            changed = sorted(n for n in shapes.keys() | self._shapes.keys() if shapes.get(n) != self._shapes.get(n))
            raise UsageError(f"the model's {changed[0]} has another shape than in the rounds before")

    def _target(self, model: Arrays) -> Values:
        if (count := sum(model[name].size for name in self._names)) > MOST_VALUES:
            raise UsageError(
                f"the model has {count} values, and only {MOST_VALUES} can go down as steps: set broadcast to 0"
            )
        target: Values = self._flat(model, np.float32)
        if not np.isfinite(target).all():
            raise UsageError("the model is infinite or NaN")
        return target

    def _flat(self, arrays: Mapping[str, NDArray[Any]], dtype: type) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            flat: list[NDArray[Any]] = [np.asarray(arrays[name]).astype(dtype).ravel() for name in self._names]
        return np.concatenate(flat) if flat else np.zeros(0, dtype)

    def _rebuilt(self, model: Arrays, values: Values) -> Arrays:
        """The model with these values, in its own order."""
        rebuilt, start = dict(model), 0
        for name in self._names:
            end = start + model[name].size
            rebuilt[name], start = values[start:end].reshape(model[name].shape), end
        return rebuilt
