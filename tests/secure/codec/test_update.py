"""Updates that are added up in the ring come back as their weighted mean."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from propolis.secure.codec.encoding import Encoding
from propolis.secure.codec.lanes import LANES
from propolis.secure.codec.pipeline import Pipeline
from propolis.secure.codec.quantize import wrap_free
from propolis.secure.codec.update import Mean, Update, count_lanes, decode_mean, encode_update
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.ring import Ring

MAX_WEIGHT = 100.0
ONE = {"w": np.array([0.5], np.float32)}


def encoding(
    quantized: tuple[str, ...] = ("w",),
    exact: tuple[str, ...] = (),
    width: int = 16,
    range_: float = 1.0,
    devices: int = 3,
) -> Encoding:
    grid = wrap_free(width, devices, range_)
    return Encoding(width, grid.step, grid.levels, MAX_WEIGHT, "num-examples", quantized, exact)


def pipeline_of(updates: list[Update], how: Encoding, devices: int | None = None) -> Pipeline:
    shapes = {name: change.shape for name, change in updates[0].changes.items()}
    return Pipeline(how, devices or len(updates), shapes, {})


def mean_of(updates: list[Update], how: Encoding | None = None, devices: int | None = None) -> Mean:
    """What the server reads in the sum of these updates."""
    how = how or encoding(devices=len(updates))
    pipeline = pipeline_of(updates, how, devices)
    total, lanes = Ring(how.width).zeros(pipeline.size), LANES.zeros(1)
    for place, update in enumerate(updates):
        vector, own, names = encode_update(update, pipeline, place, np.random.default_rng(place))
        total, lanes = total + vector, lanes + own
    assert len(lanes) == count_lanes(how, pipeline.shapes) + len(names)
    return decode_mean(Ring(how.width).reduce(total), lanes, names, pipeline, len(updates))


def plain_mean(updates: list[Update], name: str) -> NDArray[np.float64]:
    weighted = [update.weight * update.changes[name].astype(np.float64) for update in updates]
    return np.asarray(sum(weighted) / sum(update.weight for update in updates))


def refused(update: Update, how: Encoding | None = None) -> Refusal:
    with pytest.raises(PeerError) as caught:
        encode_update(update, pipeline_of([update], how or encoding(), 3), 0, np.random.default_rng(0))
    return caught.value.refusal


shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    shapes=shapes,
    weights=st.lists(st.floats(1e-3, MAX_WEIGHT), min_size=1, max_size=9),
    width=st.integers(8, 32),
    range_=st.sampled_from([1e-6, 0.1, 1.0, 1e4]),
    absent=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_the_mean_of_updates_is_within_a_step_of_the_grid_for_each_device(
    shapes: list[tuple[int, ...]], weights: list[float], width: int, range_: float, absent: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    named = {f"array {place}": shape for place, shape in enumerate(shapes)}
    updates = [
        Update(
            {name: rng.uniform(-range_, range_, shape).astype(np.float32) for name, shape in named.items()}, weight, {}
        )
        for weight in weights
    ]
    devices = len(weights) + absent
    how = encoding(tuple(sorted(named)), width=width, range_=range_, devices=devices)
    mean = mean_of(updates, how, devices)
    share = sum(weights) / MAX_WEIGHT
    step = how.step
    for name in named:
        assert mean.changes[name].shape == named[name]
        allowed = len(weights) * (step * 1.01 + range_ * 1e-6) / share * (1 + 1e-6)
        np.testing.assert_allclose(mean.changes[name], plain_mean(updates, name), rtol=1e-5, atol=allowed)
    assert mean.weight == pytest.approx(sum(weights), rel=1e-4)
    assert mean.saturated == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, MAX_WEIGHT), st.floats(-1e3, 1e3), st.floats(-1, 1)), min_size=1, max_size=9))
def test_metrics_come_back_as_weighted_means(devices: list[tuple[float, float, float]]) -> None:
    updates = [Update(ONE, weight, {"loss": loss, "accuracy": accuracy}) for weight, loss, accuracy in devices]
    mean, weight = mean_of(updates), sum(weight for weight, _, _ in devices)
    rounding = len(devices) * 2.0**-30 * MAX_WEIGHT / weight  # of a lane with 30 fractional bits
    assert mean.metrics["loss"] == pytest.approx(sum(w * x for w, x, _ in devices) / weight, abs=1001 * rounding)
    assert mean.metrics["accuracy"] == pytest.approx(sum(w * x for w, _, x in devices) / weight, abs=2 * rounding)


def test_rounding_is_unbiased() -> None:
    """An update of a third of a step comes back right on average, where rounding to the nearest would lose it."""
    how = encoding(width=8, devices=1)
    third = how.step / 3
    mean = mean_of([Update({"w": np.full(30_000, third, np.float32)}, MAX_WEIGHT, {})], how)
    assert mean.changes["w"].mean() == pytest.approx(third, rel=0.05)


@pytest.mark.parametrize("weight", [0.0, -1.0, inf, -inf, nan])
def test_a_weight_that_is_not_positive_and_finite_is_refused(weight: float) -> None:
    assert refused(Update(ONE, weight, {})) is Refusal.WEIGHT


def test_the_largest_weight_is_allowed() -> None:
    assert mean_of([Update(ONE, MAX_WEIGHT, {})]).weight == MAX_WEIGHT


def test_a_larger_weight_is_cut_and_counted_for_a_refusal_would_tell_it() -> None:
    mean = mean_of([Update(ONE, MAX_WEIGHT * 1.001, {}), Update(ONE, MAX_WEIGHT * 1e9, {})])
    assert mean.weight == 2 * MAX_WEIGHT
    assert mean.saturated == 2


def test_a_sum_of_next_to_no_weight_is_refused() -> None:
    """It would be a division by what a lying device made of it."""
    with pytest.raises(PeerError, match="weights add up to"):
        mean_of([Update(ONE, MAX_WEIGHT * 2.0**-22, {})])


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["grid", "lanes", "metric"])
def test_what_is_not_finite_is_refused(value: float, where: str) -> None:
    changes = {name: np.zeros(3) for name in ("w", "counter")}
    metrics = {"loss": 0.0}
    if where == "metric":
        metrics["loss"] = value
    else:
        changes["w" if where == "grid" else "counter"][1] = value
    assert refused(Update(changes, 1.0, metrics), encoding(exact=("counter",))) is Refusal.NOT_FINITE


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_change_beyond_single_precision_is_refused() -> None:
    assert refused(Update({"w": np.array([1e39])}, 1.0, {})) is Refusal.NOT_FINITE


def test_what_is_outside_of_the_range_is_cut_off_and_counted() -> None:
    updates = [
        Update({"w": np.array([3.0, -2.0, 0.5, 1.0], np.float32)}, MAX_WEIGHT, {}),
        Update({"w": np.array([0.0, -9.0, 0.5, 1.0], np.float32)}, MAX_WEIGHT, {}),
    ]
    mean = mean_of(updates)
    assert mean.saturated == 3
    assert mean.largest == pytest.approx(6.0)
    np.testing.assert_allclose(mean.changes["w"], [0.5, -1.0, 0.5, 1.0], atol=1e-4)


def test_a_metric_beyond_billions_is_cut_off_and_counted() -> None:
    mean = mean_of([Update(ONE, MAX_WEIGHT, {"loss": 1e30}), Update(ONE, MAX_WEIGHT, {"loss": 1.0})])
    assert mean.saturated == 1
    assert mean.metrics["loss"] < 2**33
    assert mean.weight == pytest.approx(2 * MAX_WEIGHT)


@pytest.mark.parametrize("weights", [(1, 2, 3), (100, 1, 7), (33,)])
def test_equal_counters_and_flags_come_back_exactly(weights: tuple[int, ...]) -> None:
    changes: dict[str, Any] = {"counter": np.array([12, -7, 0, 54321]), "flag": np.array(True), "w": np.zeros((2, 0))}
    how = encoding(exact=("counter", "flag"), devices=len(weights))
    mean = mean_of([Update(changes, float(weight), {}) for weight in weights], how)
    np.testing.assert_allclose(mean.changes["counter"], changes["counter"], atol=1e-3)
    np.testing.assert_array_equal(np.rint(mean.changes["counter"]), changes["counter"])
    assert mean.changes["flag"] == pytest.approx(1.0, abs=1e-6)
    assert mean.changes["flag"].shape == ()


def test_statistics_come_back_far_finer_than_on_the_grid() -> None:
    rng = np.random.default_rng(0)
    updates = [Update({"mean": rng.normal(size=50), "w": np.zeros(1)}, weight, {}) for weight in (10.0, 90.0)]
    mean = mean_of(updates, encoding(exact=("mean",), width=8, devices=2))
    np.testing.assert_allclose(mean.changes["mean"], plain_mean(updates, "mean"), atol=1e-7)


@pytest.mark.parametrize("share", [0.0, -1.0, 2.001])
def test_a_sum_whose_weights_are_impossible_is_refused(share: float) -> None:
    pipeline = Pipeline(encoding(), 3, {"w": (1,)}, {})
    lanes = LANES.zeros(count_lanes(pipeline.encoding, pipeline.shapes))
    lanes[1] = LANES.embed(np.rint(np.array([share]) * 2**30).astype(np.int64))[0]
    with pytest.raises(PeerError) as caught:
        decode_mean(Ring(16).zeros(1), lanes, (), pipeline, 2)
    assert caught.value.refusal is Refusal.WEIGHT


def test_the_same_seed_gives_the_same_vector() -> None:
    update = Update({"w": np.linspace(-1, 1, 99, dtype=np.float32)}, 7.0, {})
    pipeline = pipeline_of([update], encoding(), 3)
    first, again, other = (encode_update(update, pipeline, 0, np.random.default_rng(s))[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
