"""Aligned sparsity: all devices of a round send the same coordinates, drawn from the round's public seed.

What is sent counts for what is not: a coordinate that is drawn with probability p is multiplied by 1 / p, so the
mean over the rounds is that of the whole update, and nothing needs to be remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.codec.encoding import Encoding, Shapes
from propolis.secure.codec.public_random import derive_seed, random_words


@dataclass(frozen=True, slots=True, repr=False)
class Support:
    """Which coordinates of (d,) travel.

    Attributes:
        dimension: d.
        positions: (k,) int64, rising; None stands for all.
        gain: (k,) float32, root of 1 / p. Half of the correction is applied before the rounding and half after it,
            which gives the least error for a given number of bits.
    """

    dimension: int
    positions: NDArray[np.int64] | None = None
    gain: NDArray[np.float32] | None = None

    @property
    def size(self) -> int:
        """K, the number of coordinates that travel."""
        return self.dimension if self.positions is None else len(self.positions)

    def gather(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """(d,) to (k,)."""
        if self.positions is None or self.gain is None:
            return x
        taken: NDArray[np.float32] = x[self.positions] * self.gain
        return taken

    def scatter(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """(k,) to (d,), zero where nothing travelled."""
        if self.positions is None or self.gain is None:
            return y
        x = np.zeros(self.dimension)
        x[self.positions] = y * self.gain
        return x


def support_of(encoding: Encoding, shapes: Shapes, model: Mapping[str, NDArray[Any]]) -> Support:
    """The support of a round, the same on every device and on the server.

    Args:
        encoding: of the round.
        shapes: of the arrays by name.
        model: the arrays that the round starts from; only their zeros matter, and only where `encoding.pruned`.
    """
    dimension = encoding.dimension(shapes)
    if encoding.density >= 1 and not encoding.pruned:
        return Support(dimension)
    whole = np.zeros(dimension, np.bool_)
    alive = np.ones(dimension, np.bool_)
    start = 0
    for name in encoding.quantized:
        end = start + prod(shapes[name])
        whole[start:end] = end - start <= encoding.keep
        if encoding.pruned:
            alive[start:end] = ~pruned_entries(model[name]).ravel()
        start = end
    candidates = np.flatnonzero(alive & ~whole)
    drawn = _draw(candidates, encoding.density, encoding.seed)
    probability = np.ones(dimension, np.float32)
    probability[drawn] = len(drawn) / max(1, len(candidates))
    whole &= alive
    whole[drawn] = True
    positions = np.flatnonzero(whole)
    return Support(dimension, positions, np.sqrt(1 / probability[positions]))


def pruned_entries(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Which entries of an array are pruned: the exact zeros of a matrix (or of a kernel), never those of a vector."""
    return np.asarray(array == 0) if array.ndim >= 2 else np.zeros(array.shape, np.bool_)


def _draw(candidates: NDArray[np.int64], density: float, seed: bytes) -> NDArray[np.int64]:
    """A random subset of the candidates, at least one where there is one: those with the smallest random words."""
    if density >= 1 or not len(candidates):
        return candidates
    count = max(1, round(density * len(candidates)))
    if count == len(candidates):
        return candidates
    words = random_words(derive_seed(seed, b"support"), len(candidates))
    largest = np.partition(words, count - 1)[count - 1]
    chosen = words < largest
    alike = np.flatnonzero(words == largest)  # of equal words the first ones
    chosen[alike[: count - np.count_nonzero(chosen)]] = True
    drawn: NDArray[np.int64] = candidates[chosen]
    return drawn
