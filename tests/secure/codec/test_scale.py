"""The public scale: what the next round makes room for follows from sums, and no device moves it far."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from propolis.protos import secagg_pb2 as pb
from propolis.secure.codec.encoding import LARGEST_NORM, Encoding, Shapes
from propolis.secure.codec.lanes import LANES
from propolis.secure.codec.pipeline import Pipeline
from propolis.secure.codec.profiles import CORRELATED, PROFILES, Profile
from propolis.secure.codec.rotate import padded_size
from propolis.secure.codec.scale import COLD_START_BITS, Scale, expected_size, scaled, within_twice
from propolis.secure.codec.update import Mean, Update, decode_mean, encode_update
from propolis.secure.codec.wraps import choose_grid
from propolis.secure.errors import UsageError
from propolis.secure.ring import Ring
from propolis.secure.wire import decode, encode

SHAPES: Shapes = {"w": (60, 500)}
PLAIN = Encoding(16, 1.0, 1, 1.0, "num-examples", ("w",), (), seed=b"s" * 32)
DENSE = PROFILES["dense"]


def drawn(devices: int, rms: float, correlation: float, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    common = sqrt(correlation) * rng.normal(size=SHAPES["w"])
    own = sqrt(1 - correlation) * rng.normal(size=(devices, *SHAPES["w"]))
    return [(rms * (common + each)).astype(np.float32) for each in own]


def mean_of(changes: list[np.ndarray], how: Encoding, lie: tuple[int, float] | None = None) -> Mean:
    """What the server reads; `lie` is what the first device's lane of that number says."""
    pipeline = Pipeline(how, len(changes), SHAPES, {})
    total, lanes = Ring(how.width).zeros(pipeline.size), LANES.zeros(1)
    for place, change in enumerate(changes):
        rng = np.random.default_rng([1, place])
        vector, own, _ = encode_update(Update({"w": change}, 1.0, {}), pipeline, place, rng)
        if lie and place == 0:
            own[lie[0]] = LANES.embed(np.array([lie[1] * 2.0**30]).astype(np.int64))[0]
        total, lanes = total + vector, lanes + own
    return decode_mean(Ring(how.width).reduce(total), lanes, (), pipeline, len(changes))


def encoding_of(profile: Profile, scale: Scale, devices: int) -> Encoding:
    how = replace(PLAIN, rotated=profile.rotated, density=profile.density, keep=profile.keep)
    return scaled(how, profile, scale, devices, SHAPES)


def mean(**changes: Any) -> Mean:
    values = {"alive": 5, "saturated": 0, "clipped": 0.0, "wraps": 0, "largest": 1.0, "norm": 1.0, "rms": 0.1}
    return Mean({}, {}, **{"weight": 5.0, "sum_rms": 0.3, **values, **changes})


# From round to round


@given(st.floats(1e-11, 1e11), st.floats(0, 1e300))
def test_a_scale_moves_by_a_factor_of_two_at_most(before: float, seen: float) -> None:
    after = within_twice(before, seen)
    assert before / 2 <= after <= before * 2
    if before / 2 <= seen <= before * 2:
        assert after == seen


@pytest.mark.parametrize(("seen", "factor"), [(1e30, 2.0), (1e-30, 0.5)])
def test_each_number_follows_the_mean_and_no_further_than_twice(seen: float, factor: float) -> None:
    scale = Scale(range=3.0, norm=5.0, rms=0.7)
    after = scale.following(mean(largest=seen, norm=seen, rms=seen), PLAIN)
    assert (after.range, after.norm) == (3.0 * factor, 5.0 * factor)
    assert after.rms == 0.7 * max(factor, 0.95)  # a peak falls slowly


def test_a_first_round_is_believed() -> None:
    after = Scale(range=1.0).following(mean(largest=0.3, norm=123.0, rms=0.02), PLAIN)
    assert (after.range, after.norm, after.rms) == (pytest.approx(1.2), 123.0, 0.02)


@pytest.mark.parametrize("lane", [4, 5, 6], ids=["largest", "norm", "energy"])
def test_a_device_that_lies_about_its_size_moves_the_scale_by_two_at_most(lane: int) -> None:
    changes = drawn(5, 0.01, 0.0)
    scale = Scale(1.0).following(mean_of(changes, encoding_of(DENSE, Scale(1.0), 5)), PLAIN)
    for lie in (2.0**32 / 5 - 1, -(2.0**32) / 5 + 1):
        how = encoding_of(DENSE, scale, 5)
        after = scale.following(mean_of(changes, how, (lane, lie)), how)
        for name in ("range", "norm", "rms"):
            assert getattr(scale, name) / 2 <= getattr(after, name) <= getattr(scale, name) * 2
        assert 0 <= after.correlation <= 1
        encoding_of(DENSE, after, 5).require_room(5)


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.4])
def test_the_correlation_is_estimated_and_a_margin_added(width: int, correlation: float) -> None:
    changes, profile = drawn(20, 0.01, correlation), replace(DENSE, width=width)
    scale = Scale(1.0)
    for _ in range(3):
        how = encoding_of(profile, scale, 20)
        seen = mean_of(changes, how)
        scale = scale.following(seen, how)
        assert seen.wraps == 0
        assert (scale.correlation - 0.02) / 1.5 == pytest.approx(correlation, rel=0.25, abs=0.02)
        assert scale.correlation > correlation
    assert how.width == width
    assert seen.rms == pytest.approx(0.01 * sqrt(30_000 / padded_size(30_000)), rel=0.02)
    assert seen.norm == pytest.approx(0.01 * sqrt(30_000), rel=0.02)


@pytest.mark.parametrize(("alive", "rms"), [(1, 0.1), (5, 0.0)])
def test_where_nothing_can_be_told_the_correlation_stays(alive: int, rms: float) -> None:
    assert Scale(1.0).correlation == CORRELATED
    after = Scale(1.0, 1.0, 0.1, 0.9).following(mean(alive=alive, rms=rms), PLAIN)
    assert after.correlation == 0.9


def test_one_noisy_sum_moves_the_correlation_by_a_factor_of_two() -> None:
    before = Scale(1.0, 1.0, 0.1, 0.1)
    assert before.following(mean(alive=5, rms=0.1, sum_rms=1e9), PLAIN).correlation == pytest.approx(0.22)
    assert before.following(mean(alive=5, rms=0.1, sum_rms=0.0), PLAIN).correlation == pytest.approx(0.09)
    assert Scale(1.0).following(mean(alive=5, rms=0.1, sum_rms=1e9), PLAIN).correlation == 1.0


def test_a_round_without_any_change_says_nothing() -> None:
    after = Scale(3.0, 5.0, 0.7).following(mean(largest=0.0, norm=0.0, rms=0.0), PLAIN)
    assert (after.range, after.norm, after.rms) == (1.5, 5.0, 0.7)


@given(st.floats(0, 1e9), st.floats(1e-9, 1e9))
def test_a_correlation_is_one(sum_rms: float, rms: float) -> None:
    after = Scale(1.0).following(mean(sum_rms=sum_rms, rms=rms), PLAIN)
    assert 0 <= after.correlation <= 1


@given(st.floats(1e-12, 1e12), st.floats(0, 1e12), st.floats(0, 1e12), st.floats(0, 1))
def test_a_scale_survives_as_metrics(range_: float, norm: float, rms: float, correlation: float) -> None:
    scale = Scale(range_, norm, rms, correlation)
    assert Scale.of_metrics({"loss": 1.0, **scale.metrics()}) == scale


# The grid that follows from it


def test_a_first_round_has_sixteen_bits_no_clip_and_no_possible_wrap() -> None:
    how = encoding_of(DENSE, Scale(range=2.0), 20)
    assert (how.width, how.clip) == (COLD_START_BITS, LARGEST_NORM)
    assert how.grid.is_wrap_free(20)
    assert how.grid.range == pytest.approx(2.0)
    assert encoding_of(replace(DENSE, width=20), Scale(range=2.0), 20).width == 20
    with pytest.raises(UsageError, match="a ring of 16 bits is too small for 40000 devices"):
        encoding_of(DENSE, Scale(range=2.0), 40_000)


@pytest.mark.parametrize("width", [8, 16, 32])
def test_without_rotation_no_sum_can_leave_the_ring_in_any_round(width: int) -> None:
    scale = Scale(range=2.0, norm=9.0, rms=0.1)
    how = encoding_of(Profile(width=width), scale, 5)
    assert how.width == width
    assert how.grid.is_wrap_free(5)
    assert how.grid.range == pytest.approx(2.0)


def test_later_rounds_have_the_grid_of_the_scale() -> None:
    scale = Scale(range=2.0, norm=9.0, rms=0.1, correlation=0.1)
    how = encoding_of(DENSE, scale, 20)
    width, grid = choose_grid(padded_size(30_000), 20, 4, 0.1)
    assert (how.width, how.levels) == (width, 7)
    assert how.step == pytest.approx(1.1 * 0.1 * grid)
    assert how.clip == pytest.approx(9 * DENSE.clip)


def test_devices_that_are_too_much_alike_get_a_wider_ring() -> None:
    how = encoding_of(DENSE, Scale(range=2.0, norm=9.0, rms=0.1, correlation=1.0), 1000)
    assert how.width > 4
    assert how.levels == 2 ** (how.width - 1) - 1
    how.require_room(1000)


@pytest.mark.parametrize(("density", "keep", "size"), [(1.0, 0, 30_030), (0.1, 0, 3003), (0.1, 30, 3030), (1e-6, 0, 1)])
def test_the_expected_size_is_that_of_the_vector_that_travels(density: float, keep: int, size: int) -> None:
    shapes = {"w": (60, 500), "b": (30,)}
    how = replace(PLAIN, quantized=("b", "w"), density=density, keep=keep, rotated=True)
    assert expected_size(how, shapes) == padded_size(size) == Pipeline(how, 5, shapes, {}).size


def test_a_round_in_which_nothing_changed_does_not_shrink_the_scale_of_the_next() -> None:
    nothing, something = [np.zeros(SHAPES["w"], np.float32)] * 5, drawn(5, 0.01, 0.0)
    scale = Scale(1.0)
    for changes in (nothing, something, something):
        how = encoding_of(DENSE, scale, 5)
        seen = mean_of(changes, how)
        scale = scale.following(seen, how)
    assert seen.clipped == 0
    np.testing.assert_allclose(seen.changes["w"].std(), np.mean(something, axis=0).std(), rtol=0.5)


@pytest.mark.parametrize("rms", [1e-5, 1e-7])
def test_updates_that_are_small_against_the_first_range_are_measured(rms: float) -> None:
    seen = mean_of(drawn(5, rms, 0.0), encoding_of(DENSE, Scale(1.0), 5))
    assert seen.rms == pytest.approx(rms, rel=0.1)


def test_the_smallest_range_is_one_that_a_plan_can_say() -> None:
    scale = Scale(1.0)
    for _ in range(60):
        scale = scale.following(mean(largest=0.0, norm=0.0, rms=0.0), PLAIN)
    how = encoding_of(Profile(width=32), scale, 3)
    assert decode(Encoding, encode(how, pb.Encoding), pb.Encoding) == how


# Profiles


@pytest.mark.parametrize(
    "wrong",
    [
        *({"width": width} for width in (1, 33, 0)),
        *({"density": density} for density in (0.0, -0.1, 1.1, nan)),
        {"keep": -1},
        *({"clip": clip} for clip in (0.0, -1.0, inf, nan)),
        *({"wraps": wraps} for wraps in (0.0, 1.5, nan)),
        *({"broadcast": step} for step in (-0.1, 101.0, inf, nan)),
    ],
    ids=str,
)
def test_a_profile_that_makes_no_sense_is_one_error(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"^a codec needs "):
        Profile(**wrong)


@pytest.mark.parametrize("name", PROFILES)
def test_the_named_profiles_have_room_for_a_hundred_devices(name: str) -> None:
    PROFILES[name].require_room(100, 1_000_000)


def test_a_profile_without_room_says_how_many_bits_do() -> None:
    narrow = replace(DENSE, width=4)
    with pytest.raises(UsageError, match="a ring of 4 bits is too small for the sum of 5000 devices: use ") as caught:
        narrow.require_room(5000, 10**6)
    enough = int(str(caught.value).rsplit(" ", 1)[1])
    replace(narrow, width=enough).require_room(5000, 10**6)
    with pytest.raises(UsageError):
        replace(narrow, width=enough - 1).require_room(5000, 10**6)
    with pytest.raises(UsageError, match="a ring of 4 bits is too small for 8 devices"):
        Profile(width=4).require_room(8, 10)
