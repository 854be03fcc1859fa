"""The codec from end to end: what comes out of a sum is the sum of what went in, as near as the grid is fine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.codec.encoding import Encoding
from propolis.secure.codec.pipeline import Encoded, Pipeline
from propolis.secure.codec.quantize import wrap_free
from propolis.secure.errors import UsageError
from propolis.secure.ring import Ring

NAMES = ("a", "b")
# Arithmetic in single precision may blur the rounding by this part of a step.
BLUR = 2.0**-7


def encoding(width: int = 8, devices: int = 5, range_: float = 8.0, **changes: Any) -> Encoding:
    grid = wrap_free(width, devices, range_)
    return Encoding(width, grid.step, grid.levels, 1.0, "num-examples", NAMES, (), **{"seed": b"s" * 32, **changes})


def pipeline(how: Encoding, devices: int, shapes: tuple[tuple[int, ...], tuple[int, ...]], zeros: int = 0) -> Pipeline:
    """Of a model of ones, with so many zeros at the front of its first array."""
    model = {name: np.ones(shape, np.float32) for name, shape in zip(NAMES, shapes, strict=True)}
    model["a"].ravel()[:zeros] = 0
    return Pipeline(how, devices, {name: array.shape for name, array in model.items()}, model)


def encoded(codec: Pipeline, xs: np.ndarray, places: list[int], seed: int = 0) -> list[Encoded]:
    """What the devices in these places send for the rows of xs."""
    return [
        codec.encode(x.copy(), place, np.random.default_rng([seed, place])) for place, x in zip(places, xs, strict=True)
    ]


def summed(codec: Pipeline, parts: list[Encoded]) -> np.ndarray:
    ring = codec.encoding.grid.ring
    total = ring.zeros(codec.size)
    for part in parts:
        total += part.vector
    return ring.reduce(total)


def error_of(codec: Pipeline, xs: np.ndarray, places: list[int], seed: int = 0) -> np.ndarray:
    """Decoded sum minus the sum of the clipped updates, where something travels, before the gain is applied again."""
    decoded = codec.decode_sum(summed(codec, encoded(codec, xs, places, seed)))
    support = codec.support
    every = np.arange(support.dimension) if support.positions is None else support.positions
    gain = np.ones(len(every)) if support.gain is None else support.gain.astype(np.float64)
    norms = np.linalg.norm(xs.astype(np.float64), axis=1, keepdims=True)
    clipped = xs * np.minimum(1, codec.encoding.clip / np.maximum(norms, 1e-30))
    untouched = np.ones(support.dimension, np.bool_)
    untouched[every] = False
    assert not decoded.sum[untouched].any()
    return np.asarray((decoded.sum[every] / gain) - gain * clipped.sum(axis=0)[every])


KINDS = ["normal", "zeros", "one huge", "constant"]


def updates(kind: str, count: int, dimension: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return rng.normal(size=(count, dimension)).astype(np.float32)
    xs = np.full((count, dimension), float(kind == "constant"), np.float32)
    if kind == "one huge":
        xs[:, rng.integers(dimension)] = 50.0
    return xs


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_the_sum_comes_back_within_a_step_for_each_device(data: st.DataObject) -> None:
    shapes = (
        data.draw(st.sampled_from([(1,), (3,), (5, 5), (40, 26), (1024,), (1025,), (30, 51)])),
        data.draw(st.sampled_from([(0,), (1,), (7,), (100,)])),
    )
    devices, width = data.draw(st.integers(1, 12)), data.draw(st.integers(6, 32))
    how = encoding(
        width,
        devices,
        data.draw(st.sampled_from([2.0, 200.0])),
        rotated=data.draw(st.booleans()),
        density=data.draw(st.sampled_from([1.0, 0.9, 0.3, 0.01])),
        keep=data.draw(st.sampled_from([0, 7, 100])),
        pruned=data.draw(st.booleans()),
        clip=data.draw(st.sampled_from([1e30, 10.0, 0.5])),
    )
    codec = pipeline(how, devices, shapes, zeros=data.draw(st.integers(0, 3)))
    places = data.draw(st.lists(st.integers(0, devices - 1), unique=True, min_size=1).map(sorted))
    xs = updates(data.draw(st.sampled_from(KINDS)), len(places), codec.support.dimension, data.draw(st.integers(0, 99)))
    cut = sum(part.saturated for part in encoded(codec, xs, places))
    error = error_of(codec, xs, places)
    blur = len(places) * how.grid.range * 1e-6
    if not cut:
        bound = len(places) * how.step * (1 + BLUR) * np.sqrt(codec.size) + blur * np.sqrt(codec.size)
        assert np.linalg.norm(error) <= bound
        if not how.rotated:
            assert np.abs(error).max(initial=0) <= len(places) * how.step * (1 + BLUR) + blur


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dimension", [1, 3, 1025, 1500])
def test_zeros_come_back_as_zeros_from_all_but_the_rounding(rotated: bool, dimension: int) -> None:
    """With thresholds below one zero is never rounded up: nothing at all is added."""
    codec = pipeline(encoding(rotated=rotated), 5, ((dimension,), (0,)))
    assert not error_of(codec, np.zeros((5, dimension), np.float32), list(range(5))).any()


def test_one_huge_coordinate_is_cut_off_without_the_rotation_and_survives_with_it() -> None:
    xs = updates("one huge", 5, 2048, 0)
    plain, rotated = (pipeline(encoding(16, rotated=how), 5, ((2048,), (0,))) for how in (False, True))
    assert sum(part.saturated for part in encoded(plain, xs, [*range(5)])) == 5
    assert not any(part.saturated for part in encoded(rotated, xs, [*range(5)]))
    assert np.abs(error_of(plain, xs, [*range(5)])).max() == pytest.approx(5 * (50 - 8), rel=0.01)
    assert np.abs(error_of(rotated, xs, [*range(5)])).max() < 0.1


def test_what_a_device_says_of_its_update_is_so() -> None:
    codec = pipeline(encoding(10, clip=20.0, rotated=True), 5, ((1500,), (3,)))
    x = np.random.default_rng(0).normal(size=1503).astype(np.float32)
    (part,) = encoded(codec, x[None], [2])
    norm = float(np.linalg.norm(x.astype(np.float64)))
    assert part.norm == pytest.approx(norm)
    assert part.was_clipped
    assert part.energy * len(part.vector) * codec.encoding.step**2 == pytest.approx(400, rel=1e-4)
    assert 1 < part.largest * codec.encoding.step / (20 / np.sqrt(codec.size)) < 6
    assert part.total == Ring(10).centre(part.vector).sum()
    (short,) = encoded(codec, x[None] / 100, [2])
    assert not short.was_clipped
    assert short.norm == pytest.approx(norm / 100)


@pytest.mark.parametrize(
    "how", [{}, {"rotated": True}, {"density": 0.5}, {"density": 0.3, "rotated": True, "keep": 40}]
)
def test_the_mean_over_many_rounds_is_unbiased(how: dict[str, Any]) -> None:
    """Also where all devices have the same update, so that their strata decide its rounding together."""
    x, rounds = np.tile(np.linspace(-1, 1, 120, dtype=np.float32), (3, 1)), 1200
    seen = np.zeros((rounds, 120))
    for number in range(rounds):
        codec = pipeline(encoding(6, 3, 8.0, seed=number.to_bytes(32, "big"), **how), 3, ((80,), (40,)))
        seen[number] = codec.decode_sum(summed(codec, encoded(codec, x, [0, 1, 2], number))).sum
    deviation = seen.std(axis=0).clip(1e-9) / rounds**0.5
    score = (seen.mean(axis=0) - 3 * x[0]) / deviation
    assert np.abs(score[deviation > 1e-6]).max() < 5
    assert abs(score.mean()) < 0.5


@pytest.mark.parametrize("value", [0.1, 0.5, 0.77])
def test_strata_cancel_what_independent_rounding_leaves(value: float) -> None:
    """The same update on all devices: of n independent roundings the error is n f (1 - f), of strata far less."""
    how, count = encoding(10, 8, 1.0), 20_000
    xs = np.full((8, count), how.step * (3 + value), np.float32)
    ours, independent = (pipeline(how, devices, ((count,), (0,))) for devices in (8, 1))
    stratified = error_of(ours, xs, list(range(8))) / how.step
    places = [0] * 8
    alone = [independent.encode(x.copy(), 0, np.random.default_rng(100 + i)) for i, x in enumerate(xs)]
    plain = (independent.decode_sum(summed(independent, alone)).sum - xs.sum(axis=0, dtype=np.float64)) / how.step
    assert len(places) * value * (1 - value) == pytest.approx(plain.var(), rel=0.1)
    assert stratified.var() < 0.3
    assert abs(stratified.mean()) < 0.05


def test_devices_in_other_places_have_other_strata_in_every_coordinate() -> None:
    """Of the value half all devices together round up exactly every second time."""
    how = encoding(10, 6, 1.0)
    codec = pipeline(how, 6, ((5000,), (0,)))
    xs = np.full((6, 5000), how.step / 2, np.float32)
    integers = np.array([Ring(10).centre(part.vector) for part in encoded(codec, xs, list(range(6)))])
    np.testing.assert_array_equal(integers.sum(axis=0), 3)
    assert (np.corrcoef(integers) - np.eye(6)).max() < 0.4
    np.testing.assert_allclose(integers.mean(axis=1), 0.5, atol=0.05)


@pytest.mark.parametrize("coordinates", [[0], [3, 900], list(range(0, 1024, 8))])
def test_the_total_counts_the_coordinates_that_left_the_ring(coordinates: list[int]) -> None:
    how = replace(encoding(5, rotated=False), step=1.0, levels=15)
    codec = pipeline(how, 3, ((1024,), (0,)))
    xs = np.ones((3, 1024), np.float32)
    xs[:, coordinates] = 6.0
    parts = encoded(codec, xs, [0, 1, 2])
    decoded = codec.decode_sum(summed(codec, parts))
    told = sum(part.total for part in parts)
    assert told == xs.sum()
    assert told - decoded.total == 32 * len(coordinates)
    np.testing.assert_array_equal(decoded.sum[coordinates], 18 - 32)


def test_both_ends_have_one_size_and_another_seed_another_support() -> None:
    how = encoding(density=0.1, rotated=True)
    ours, theirs = (pipeline(how, 5, ((1500,), (3,))) for _ in range(2))
    assert ours.size == theirs.size >= ours.support.size == 150
    assert np.array_equal(ours.support.positions, theirs.support.positions)
    x = np.random.default_rng(0).normal(size=(5, 1503)).astype(np.float32)
    other = pipeline(replace(how, seed=b"o" * 32), 5, ((1500,), (3,)))
    assert not np.array_equal(ours.support.positions, other.support.positions)
    decoded = other.decode_sum(summed(ours, encoded(ours, x, list(range(5)))))
    assert abs(np.corrcoef(decoded.sum, x.sum(axis=0))[0, 1]) < 0.3


@pytest.mark.parametrize(
    ("width", "levels", "rotated", "devices", "has_room"),
    [(8, 12, False, 10, True), (8, 13, False, 10, False), (8, 127, True, 10, True), (8, 128, True, 10, False)],
)
def test_a_ring_has_room_or_the_plan_is_no_good(
    width: int, levels: int, rotated: bool, devices: int, has_room: bool
) -> None:
    how = replace(encoding(width), levels=levels, rotated=rotated)
    if has_room:
        how.require_room(devices)
        return
    with pytest.raises(UsageError, match=f"a ring of {width} bits is too small for {devices} devices at {levels}"):
        how.require_room(devices)
