"""Handwritten digits, 8 x 8 pixels: 1,797 examples that come with scikit-learn (UCI, Alpaydin and Kaynak, 1998)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from propolis.secure.errors import UsageError
from propolis.task import DataSet, Examples, Task

_TEST_SHARE = 0.2
_MEAN, _DEVIATION = 4.884, 6.017  # of all the pixels, which are 0 to 16


class Digits(Task):
    """Ten classes, 64 standardised inputs, a perceptron 64-128-10 (9,610 parameters)."""

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def data(self) -> DataSet:
        """1,438 examples to train on and 359 to test on, always the same ones."""
        if self.data_folder is not None:
            raise UsageError(f"the task digits reads no folder: leave out --data {self.data_folder}")
        table = _bundled_table()
        pixels, labels = table[:, :-1], table[:, -1]
        order = np.random.default_rng(0).permutation(len(labels))
        test = int(_TEST_SHARE * len(labels))
        inputs = torch.from_numpy(((pixels - _MEAN) / _DEVIATION).astype(np.float32)[order])
        classes = torch.from_numpy(labels.astype(np.int64)[order])
        return DataSet(Examples(inputs[test:], classes[test:]), Examples(inputs[:test], classes[:test]))


def _bundled_table() -> np.ndarray:
    """scikit-learn's own file, (1797, 65): importing the package to call `load_digits` would take two seconds."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UsageError("the task digits needs scikit-learn: pip install 'propolis[sim]'")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"cannot read scikit-learn's digits: {error}") from None
