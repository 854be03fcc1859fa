from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

from harness import Blobs
from propolis.secure.errors import UsageError
from propolis.server.model import GlobalModel


def model() -> GlobalModel:
    torch.manual_seed(0)
    return GlobalModel.of(Blobs().model())


def test_entries_are_told_apart() -> None:
    it = model()
    assert it.trainable == {"0.weight", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert it.frozen == {"0.bias"}
    assert it.buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_the_model_is_a_copy() -> None:
    module = nn.Linear(2, 2)
    it = GlobalModel.of(module)
    module.weight.data.zero_()
    assert it.arrays["weight"].any()


def test_tied_weights_are_trainable_under_both_names() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    assert GlobalModel.of(module).trainable == {"0.weight", "1.weight"}


def test_records_keep_the_models_order() -> None:
    it = model()
    assert list(it.record()) == list(Blobs().model().state_dict())
    assert list(it.record({"3.bias", "0.weight"})) == ["0.weight", "3.bias"]


@pytest.mark.parametrize(
    ("old", "mean", "expected"),
    [
        (np.array(3, np.int64), np.array(4.6), np.array(5, np.int64)),
        (np.array([True, False]), np.array([0.4, 0.6]), np.array([False, True])),
        (np.array([1, 2], np.uint8), np.array([1.0, 2.0]), np.array([1, 2], np.uint8)),
        (np.array([1.0], np.float16), np.array([0.25], np.float64), np.array([0.25], np.float16)),
    ],
)
def test_updates_keep_shape_and_type(old: np.ndarray, mean: np.ndarray, expected: np.ndarray) -> None:
    it = GlobalModel({"x": old}, frozenset(), frozenset())
    new = it.updated(ArrayRecord({"x": Array(mean)})).arrays["x"]
    np.testing.assert_array_equal(new, expected)
    assert new.dtype == old.dtype


def test_updates_of_another_model_are_refused() -> None:
    for record in (ArrayRecord({"9.weight": Array(np.zeros(2))}), ArrayRecord({"3.bias": Array(np.zeros(3))})):
        with pytest.raises(UsageError, match="the aggregate's"):
            model().updated(record)
