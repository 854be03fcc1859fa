"""Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747): 70,000 pictures of clothes, 28 x 28 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from propolis.secure.errors import UsageError
from propolis.simulations.data import read_idx
from propolis.task import DataSet, Examples, Task

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_CLASSES = 10
_MEAN, _DEVIATION = 0.2860, 0.3530  # of the 60,000 training pictures' pixels, scaled to [0, 1]


class FashionMnist(Task):
    """Ten classes, 784 standardised inputs, a perceptron 784-128-10 (101,770 parameters)."""

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    def data(self) -> DataSet:
        """60,000 examples to train on and 10,000 to test on."""
        folder = self.data_folder or DEBIAN_FOLDER
        return DataSet(_load(folder, "train"), _load(folder, "t10k"))

    def device_data(self, path: Path) -> Examples:
        """The training files in one device's own folder."""
        return _load(path, "train")


def _load(folder: Path, part: str) -> Examples:
    names = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
    missing = [n for n in names if not ((folder / n).exists() or (folder / f"{n}.gz").exists())]
    if missing:
        raise UsageError(
            f"fashion-mnist: no {missing[0]} in {folder}; get it with: sudo apt-get install dataset-fashion-mnist "
            "(or name a folder that has it with --data DIR)"
        )
    images = read_idx(folder, names[0], dimensions=3)
    labels = read_idx(folder, names[1], dimensions=1)
    if images.shape[1:] != (28, 28):
        raise UsageError(f"fashion-mnist: pictures in {folder} are {images.shape[1:]}, expected (28, 28)")
    if labels.size and labels.max() >= _CLASSES:
        raise UsageError(f"fashion-mnist: a label in {folder} is {labels.max()}, expected 0 to {_CLASSES - 1}")
    pixels = images.reshape(len(images), 784).astype(np.float32) / 255.0
    inputs = torch.from_numpy((pixels - _MEAN) / _DEVIATION)
    return Examples(inputs, torch.from_numpy(labels.astype(np.int64)))
