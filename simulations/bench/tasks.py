"""Models that the benchmarks train besides the built-in tasks' own, over the same data."""

from __future__ import annotations

from torch import nn

from propolis.simulations.tasks.fashion_mnist import FashionMnist


class WideFashionMnist(FashionMnist):
    """Fashion-MNIST with a perceptron 784-512-10 (407,050 parameters)."""

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))


class ConvolutionalFashionMnist(FashionMnist):
    """Fashion-MNIST with two convolutions and two dense layers (49,560 parameters)."""

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1568, 26),
            nn.ReLU(),
            nn.Linear(26, 10),
        )


class LargeConvolutionalFashionMnist(FashionMnist):
    """Fashion-MNIST with two convolutions that keep the size, pooling, and two dense layers (421,642 parameters)."""

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(3136, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
