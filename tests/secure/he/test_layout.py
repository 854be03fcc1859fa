"""Weights, steps and lanes as integers that add up, and what is made of their sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from propolis.secure.errors import PeerError, Refusal
from propolis.secure.he.layout import Layout, Sample, step_exponents
from propolis.secure.he.messages import EncryptedPlan, Entry

ENTRIES = (Entry("w", "float32", (5, 3)), Entry("n", "int64", (), True), Entry("b", "float64", (4,)))
PLAN = EncryptedPlan(bytes(16), 1, 0, 1, 1, bytes(32), bytes(32), "num-examples", 100.0, 1.0, ENTRIES)
MODEL = {"w": np.zeros((5, 3)), "n": np.zeros(()), "b": np.full(4, 0.25)}
BITS = [8, 11, 16, 24, 32]


def sample(seed: int, weight: float = 50.0, scale: float = 0.3, **metrics: float) -> Sample:
    rng = np.random.default_rng(seed)
    arrays = {"w": rng.normal(0, scale, (5, 3)), "n": np.array(float(seed)), "b": rng.normal(0, scale, 4)}
    return Sample(arrays, weight, {"loss": float(seed), **metrics})


def encoded(layout: Layout, samples: list[Sample], model: Mapping[str, NDArray[Any]] = MODEL) -> NDArray[np.int64]:
    rows = [layout.encode(each, model, True, np.random.default_rng(i)) for i, each in enumerate(samples)]
    return np.sum(rows, axis=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("devices", [1, 2, 17])
def test_the_sum_of_integers_is_the_weighted_mean(bits: int, devices: int) -> None:
    layout = Layout(PLAN, ["loss"], devices, bits)
    samples = [replace(sample(i, scale=0.2), weight=1.0 + 5 * i) for i in range(devices)]
    total = sum(each.weight for each in samples)
    row = layout.encode(samples[0], MODEL, True, np.random.default_rng(0))
    assert row.shape == (layout.count,)
    assert -(2 ** (bits - 1)) <= row.min()
    assert row.max() < 2 ** (bits - 1)
    opened = layout.decode(encoded(layout, samples), devices)
    step = 2.0 ** (1 - bits) * devices / (total / 100)
    for name in ("w", "b"):
        mean = sum(each.weight * each.arrays[name] for each in samples) / total
        np.testing.assert_allclose(opened.arrays[name], mean, atol=step + 1e-7)
        assert opened.arrays[name].dtype == np.dtype(next(e.dtype for e in ENTRIES if e.name == name))
    assert opened.arrays["n"] == round(sum(each.weight * i for i, each in enumerate(samples)) / total)
    assert opened.metrics["loss"] == pytest.approx(sum(e.weight * i for i, e in enumerate(samples)) / total, abs=1e-6)
    assert opened.weight == pytest.approx(total, rel=1e-6)
    assert opened.saturated == 0


@given(
    st.lists(st.floats(-(2.0**26), 2.0**26), min_size=1, max_size=8),
    st.sampled_from(BITS),
)
@settings(max_examples=100, deadline=None)
def test_lanes_carry_any_number_in_their_range(values: list[float], bits: int) -> None:
    devices = len(values)
    layout = Layout(replace(PLAN, kind=2, entries=()), ["m"], devices, bits)
    opened = layout.decode(encoded(layout, [Sample({}, 100.0, {"m": value}) for value in values]), devices)
    assert opened.metrics["m"] == pytest.approx(sum(values) / devices, abs=1e-6)
    assert opened.saturated == 0


def test_a_lane_out_of_range_is_cut_and_counted() -> None:
    layout = Layout(replace(PLAN, kind=2, entries=()), ["m"], 4, 16)
    opened = layout.decode(encoded(layout, [Sample({}, 100.0, {"m": 1e15})] * 4), 4)
    assert opened.saturated == 4
    assert opened.metrics["m"] == 2**30


def test_rounding_is_unbiased() -> None:
    layout = Layout(PLAN, ["loss"], 400, 16)
    low = 0.3 * 2.0**-15
    one = Sample({"w": np.full((5, 3), low), "n": np.zeros(()), "b": np.zeros(4)}, 100.0, {"loss": 0.0})
    opened = layout.decode(encoded(layout, [one] * 400), 400)
    np.testing.assert_allclose(np.mean(opened.arrays["w"]), low, rtol=0.1)


def test_steps_follow_each_arrays_largest_value_and_leave_room_to_double() -> None:
    entries = [Entry(name, "float32", (2,)) for name in ("a", "b", "small", "zero")]
    model = {
        "a": np.array([0.0, -3.0]),
        "b": np.array([2.0, 1.0]),
        "small": np.array([1e-9, 0.0]),
        "zero": np.zeros(2),
    }
    assert step_exponents(model, entries, 16, 0.0) == [3 - 15, 2 - 15, -3 - 15, -3 - 15]
    assert step_exponents(model, entries, 16, 1.0) == [3 - 15, 2 - 15, -15, -15]
    assert step_exponents({"zero": np.zeros(2)}, entries[3:], 16, 0.0) == [-15]
    assert step_exponents({}, [], 16, 0.0) == []
    assert step_exponents({"a": np.array([1e200, 0.0])}, entries[:1], 8, 0.0) == [100]


def test_the_steps_travel_so_that_a_newcomer_can_read_the_sum() -> None:
    layout = Layout(PLAN, ["loss"], 3, 16)
    model = {**MODEL, "w": np.full((5, 3), 40.0)}
    rows = [layout.encode(sample(i, scale=30), model, False, np.random.default_rng(i)) for i in range(3)]
    opened = layout.decode(np.sum(rows, axis=0), 3)
    mean = sum(sample(i, scale=30).arrays["w"] for i in range(3)) / 3
    np.testing.assert_allclose(opened.arrays["w"], mean, atol=0.02)


@pytest.mark.parametrize("place", ["w", "n", "b", "metric"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(place: str, value: float) -> None:
    one = sample(0)
    if place == "metric":
        one = replace(one, metrics={"loss": value})
    else:
        one = replace(one, arrays={**one.arrays, place: one.arrays[place] + value})
    with pytest.raises(PeerError) as caught:
        Layout(PLAN, ["loss"], 3, 16).encode(one, MODEL, True, np.random.default_rng(0))
    assert caught.value.refusal is Refusal.NOT_FINITE


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf])
def test_a_weight_that_cannot_be_is_refused(weight: float) -> None:
    with pytest.raises(PeerError) as caught:
        Layout(PLAN, ["loss"], 3, 16).encode(sample(0, weight), MODEL, True, np.random.default_rng(0))
    assert caught.value.refusal is Refusal.WEIGHT


def test_a_tiny_weight_still_counts() -> None:
    layout = Layout(PLAN, ["loss"], 2, 16)
    total = encoded(layout, [sample(0, 1e-9), sample(1, 100)])
    assert layout.decode(total, 2).weight == pytest.approx(100, rel=1e-5)


def test_no_weight_of_honest_devices_makes_a_sum_that_is_refused() -> None:
    """A server that chooses the largest weight would else learn from a refusal how large they are."""
    for largest in (2.0**-100, 1e-3, 1.0, 1e6, 2.0**100):
        layout = Layout(replace(PLAN, max_weight=largest), ["loss"], 4, 16)
        assert layout.decode(encoded(layout, [sample(i, 37.0 + i) for i in range(4)]), 4).weight > 0


# A sum that no honest devices make is refused as a whole


def test_a_mean_that_does_not_fit_its_type_is_none() -> None:
    """Steps that all devices are said to have taken larger than they did."""
    layout = Layout(PLAN, ["loss"], 3, 16)
    sums = encoded(layout, [sample(i) for i in range(3)])
    sums[19:21] += 3 * 70
    assert np.isfinite(layout.decode(sums, 3).arrays["w"]).all()
    sums[19:21] += 3 * 40
    sums[:15] = 3 * (2**15 - 1)
    sums[19:21] = 3 * 100
    sums[21:] = encoded(layout, [sample(i, weight=1e-9) for i in range(3)])[21:]  # divides by next to nothing
    with pytest.raises(PeerError, match="too large for its type"):
        layout.decode(sums, 3)


def test_devices_that_took_different_steps_are_found_out() -> None:
    layout = Layout(PLAN, ["loss"], 3, 16)
    sums = encoded(layout, [sample(i) for i in range(3)])
    sums[19] += 1  # the first exponent, after 15 and 4 values
    with pytest.raises(PeerError) as caught:
        layout.decode(sums, 3)
    assert caught.value.refusal is Refusal.CIPHERTEXT


@pytest.mark.parametrize("exponent", [101, -101, 16383])
def test_steps_that_cannot_be_are_refused(exponent: int) -> None:
    layout = Layout(PLAN, ["loss"], 3, 16)
    sums = encoded(layout, [sample(i) for i in range(3)])
    sums[19] = 3 * exponent
    with pytest.raises(PeerError) as caught:
        layout.decode(sums, 3)
    assert caught.value.refusal is Refusal.CIPHERTEXT


@pytest.mark.parametrize("share", [0, -1, 3 << 20, 1 << 9])
def test_weights_that_do_not_add_up_are_refused(share: int) -> None:
    layout = Layout(PLAN, ["loss"], 3, 16)
    sums = encoded(layout, [sample(i) for i in range(3)])
    sums[21:25] = [share % 2**16 if share >= 0 else share, share >> 16 if share >= 0 else 0, 0, 0]
    sums[22] += 3 << 14 if share == 3 << 20 else 0
    with pytest.raises(PeerError) as caught:
        layout.decode(sums, 3)
    assert caught.value.refusal is Refusal.CIPHERTEXT
