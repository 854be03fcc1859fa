"""The drawn coordinates are those with the smallest public random words; of equal words, the first ones."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from propolis.secure.codec import sparsify


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("different", [1, 4, 2**32])
def test_the_smallest_words_are_drawn(density: float, different: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(different).integers(0, different, 301, np.uint64).astype(np.uint32)

    def drawn_words(seed: bytes, count: int) -> NDArray[np.uint32]:
        assert count == len(words)
        return words

    monkeypatch.setattr(sparsify, "random_words", drawn_words)
    candidates = np.arange(301) * 3
    order = np.argsort(words, kind="stable")[: round(density * 301)]
    np.testing.assert_array_equal(sparsify._draw(candidates, density, bytes(32)), candidates[np.sort(order)])
