"""Aligned sparsity: one support for all, of exactly the size that was asked for, and unbiased over the seeds."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.codec.encoding import Encoding
from propolis.secure.codec.sparsify import Support, pruned_entries, support_of

SHAPES = {"a matrix": (20, 30), "bias": (30,), "small": (4, 3)}
SIZE = 642
SEED = b"s" * 32


def encoding(density: float = 0.1, keep: int = 0, pruned: bool = False, seed: bytes = SEED, **more: Any) -> Encoding:
    names = more.pop("names", tuple(sorted(SHAPES)))
    return Encoding(
        4, 1.0, 7, 1.0, "num-examples", names, (), density=density, keep=keep, pruned=pruned, seed=seed, **more
    )


def model(zeros: int = 0) -> dict[str, np.ndarray]:
    """Ones, with so many zeros at the front of the large matrix and some in the vector."""
    arrays = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    arrays["a matrix"].ravel()[:zeros] = 0
    arrays["bias"][:5] = 0
    return arrays


def positions_of(support: Support) -> np.ndarray:
    assert support.positions is not None
    return support.positions


def where(name: str) -> range:
    """The coordinates of an array: they lie in the order of the names."""
    start = {"a matrix": 0, "bias": 600, "small": 630}[name]
    return range(start, start + prod(SHAPES[name]))


def test_everything_travels_at_density_one() -> None:
    support = support_of(encoding(density=1.0), SHAPES, {})
    x = np.arange(SIZE, dtype=np.float32)
    assert support.size == support.dimension == SIZE
    np.testing.assert_array_equal(support.gather(x), x)
    np.testing.assert_array_equal(support.scatter(x.astype(np.float64)), x)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.333, 0.5, 0.999])
def test_exactly_the_share_that_was_asked_for_travels(density: float) -> None:
    support = support_of(encoding(density), SHAPES, model())
    positions = positions_of(support)
    assert support.size == len(positions) == round(density * SIZE)
    assert np.all(np.diff(positions) > 0)
    assert positions.min() >= 0
    assert positions.max() < SIZE


@pytest.mark.parametrize("density", [1e-6, 1e-3, 7e-4])
def test_at_least_one_coordinate_travels(density: float) -> None:
    assert support_of(encoding(density), SHAPES, model()).size == 1


@pytest.mark.parametrize("shapes", [{"a": (0,)}, {"a": (1,)}, {"a": (2, 2), "b": (0, 5)}])
@pytest.mark.parametrize("pruned", [False, True])
def test_tiny_models_have_a_support_too(shapes: dict[str, tuple[int, ...]], pruned: bool) -> None:
    arrays = {name: np.ones(shape) for name, shape in shapes.items()}
    support = support_of(encoding(0.1, pruned=pruned, names=tuple(shapes)), shapes, arrays)
    size = sum(map(prod, shapes.values()))
    assert support.size == min(1, size)
    assert support.scatter(np.ones(support.size)).shape == (size,)


def test_small_arrays_travel_whole_and_without_a_gain() -> None:
    support = support_of(encoding(0.1, keep=30), SHAPES, model())
    positions = positions_of(support)
    assert support.gain is not None
    small = {*where("bias"), *where("small")}
    assert small <= set(positions)
    assert support.size == len(small) + 60
    is_small = np.isin(positions, list(small))
    np.testing.assert_array_equal(support.gain[is_small], 1)
    np.testing.assert_allclose(support.gain[~is_small] ** 2, 10, rtol=1e-6)
    assert set(positions[~is_small]) <= set(where("a matrix"))


def test_an_array_of_one_entry_more_than_is_kept_is_thinned() -> None:
    kept = positions_of(support_of(encoding(1e-3, keep=12), SHAPES, model()))
    thinned = positions_of(support_of(encoding(1e-3, keep=11), SHAPES, model()))
    assert set(where("small")) <= set(kept)
    assert len(kept) == 12 + 1
    assert len(thinned) == 1


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("keep", [0, 30, 600])
def test_pruned_entries_never_travel_and_the_share_is_of_those_that_are_left(density: float, keep: int) -> None:
    for seed in range(20):
        support = support_of(encoding(density, keep, True, bytes([seed] * 32)), SHAPES, model(zeros=500))
        assert positions_of(support).min() >= 500
        candidates = SIZE - 500 - sum(prod(s) for s in SHAPES.values() if prod(s) <= keep) + (500 if keep == 600 else 0)
        whole = SIZE - 500 - candidates
        assert support.size == whole + (candidates if density == 1 else round(density * candidates))


def test_zeros_of_vectors_are_not_pruned() -> None:
    positions = positions_of(support_of(encoding(1.0, pruned=True), SHAPES, model(zeros=10)))
    assert len(positions) == SIZE - 10
    assert not pruned_entries(np.zeros(5)).any()
    assert not pruned_entries(np.zeros(())).any()
    np.testing.assert_array_equal(pruned_entries(np.eye(2)), np.eye(2) == 0)
    np.testing.assert_array_equal(pruned_entries(np.array([[-0.0, 1e-45]])), [[True, False]])


def test_a_model_that_is_pruned_altogether_sends_nothing() -> None:
    support = support_of(encoding(0.5, pruned=True, names=("a matrix",)), SHAPES, model(zeros=600))
    assert support.size == 0
    assert not support.scatter(np.zeros(0)).any()


def test_values_do_not_matter_where_nothing_is_pruned() -> None:
    first, second = (positions_of(support_of(encoding(), SHAPES, arrays)) for arrays in (model(300), {}))
    np.testing.assert_array_equal(first, second)


def test_both_ends_draw_the_same_support_and_another_seed_another_one() -> None:
    ours, theirs = (positions_of(support_of(encoding(), SHAPES, model())) for _ in range(2))
    np.testing.assert_array_equal(ours, theirs)
    other = positions_of(support_of(encoding(seed=b"o" * 32), SHAPES, model()))
    assert len(np.intersect1d(ours, other)) < 30
    assert ours[:8].tolist() == [15, 22, 29, 32, 49, 50, 56, 66]


@given(st.floats(0.05, 0.95), st.integers(0, 40), st.booleans())
@settings(max_examples=10, deadline=None)
def test_what_is_scattered_is_unbiased_over_the_seeds(density: float, keep: int, pruned: bool) -> None:
    x = np.linspace(1, 2, SIZE, dtype=np.float32)
    seeds, total, arrays = 300, np.zeros(SIZE), model(zeros=200)
    for seed in range(seeds):
        support = support_of(encoding(density, keep, pruned, seed.to_bytes(32, "big")), SHAPES, arrays)
        total += support.scatter(support.gather(x).astype(np.float64))
    alive = np.ones(SIZE, np.bool_)
    alive[:200] = not pruned
    assert not total[~alive].any()
    relative = total[alive] / seeds / x[alive] - 1
    error = ((1 / density - 1) / seeds) ** 0.5
    assert np.abs(relative).max() <= 6 * error + 1e-6
    assert abs(relative.mean()) <= 0.02 * error + 0.01
