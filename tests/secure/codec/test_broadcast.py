"""Steps of the model: the same bits on both ends, nothing lost for good, and nothing that a peer sends does harm."""

from __future__ import annotations

import bz2
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from propolis.secure.codec import broadcast
from propolis.secure.codec.broadcast import NOT_PRUNED, Delta, compress, decompress, parts
from propolis.secure.errors import PeerError, Refusal

COARSENESS = [1 / 32, 0.5, 1.5]
finite = arrays(np.float32, st.integers(0, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def step_towards(
    values: np.ndarray, target: np.ndarray, pruned: np.ndarray | None, coarseness: float
) -> tuple[Delta, np.ndarray]:
    """One array, whose step is in units of the root mean square of what it lacks."""
    lacking = np.square(target.astype(np.float64) - values)
    step = min(coarseness * float(np.sqrt(lacking.mean())), float(np.sqrt(lacking.max()))) if len(values) else 0.0
    return broadcast.step_towards(values, target, (step,), (len(values),), pruned)


def apply(values: np.ndarray, delta: Delta) -> np.ndarray:
    return broadcast.apply(values, delta, (len(values),))


def drawn(count: int = 1000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def blank(count: int) -> np.ndarray:
    return np.full(count, NOT_PRUNED)


def refused(delta: Delta, values: np.ndarray) -> Refusal:
    with pytest.raises(PeerError) as caught:
        apply(values, delta)
    return caught.value.refusal


# Both ends


@given(finite, finite, st.sampled_from([1e-6, 1 / 32, 0.5, 3.5, 100.0]))
@settings(max_examples=200, deadline=None)
def test_both_ends_have_the_same_bits(values: np.ndarray, target: np.ndarray, coarseness: float) -> None:
    count = min(len(values), len(target))
    before = values[:count].copy()
    delta, ours = step_towards(values[:count], target[:count], None, coarseness)
    theirs = apply(before, delta)
    assert ours.tobytes() == theirs.tobytes()
    assert ours.dtype == np.float32
    assert broadcast.values_digest(ours) == broadcast.values_digest(theirs)
    np.testing.assert_array_equal(values[:count], before)
    assert delta.symbol_bytes in (1, 2)
    assert 0 <= delta.steps[0] <= 3.4e38


@pytest.mark.parametrize("coarseness", COARSENESS)
def test_a_step_leaves_no_more_than_the_dead_zone(coarseness: float) -> None:
    values, target = drawn(), drawn(seed=1)
    delta, after = step_towards(values, target, None, coarseness)
    rms = np.sqrt(np.mean(np.square(target - values)))
    assert delta.steps[0] == pytest.approx(coarseness * rms, rel=1e-5)
    assert np.abs(target - after).max() <= 0.6001 * delta.steps[0]
    symbols = (after - values) / np.float32(delta.steps[0])
    np.testing.assert_allclose(symbols, np.rint(symbols), atol=1e-4)
    assert np.abs(symbols).max() > 0


def test_nothing_is_sent_where_nothing_is_lacking() -> None:
    values = drawn()
    delta, after = step_towards(values, values.copy(), None, 0.5)
    assert delta.steps[0] == 0
    assert len(delta.symbols) < 60
    np.testing.assert_array_equal(after, values)


# Array by array


def test_each_array_has_a_grid_of_its_own() -> None:
    sizes, steps = (500, 0, 300, 200), (2.0, 1.0, 1e-4, 1e-2)
    target = drawn() * np.repeat(np.array([8, 1, 4e-4, 4e-2], np.float32), sizes)
    delta, after = broadcast.step_towards(blank(1000), target, steps, sizes, None)
    assert delta.steps[2:] == pytest.approx(steps[2:])
    assert broadcast.apply(blank(1000), delta, sizes).tobytes() == after.tobytes()
    lacking = [np.abs(part).max(initial=0.0) for part in parts(target - after, sizes)]
    assert all(most <= 0.6001 * step for most, step in zip(lacking, steps, strict=True))
    symbols = np.abs(after) / np.repeat(np.array(steps, np.float32), sizes)
    np.testing.assert_allclose(symbols, np.rint(symbols), atol=1e-3)
    assert all(part.max() >= 4 for part in parts(symbols, sizes) if len(part))


@pytest.mark.parametrize("steps", [(), (1.0,), (1.0, 1.0, 1.0)], ids=len)
def test_a_step_too_few_or_too_many_is_malformed(steps: tuple[float, ...]) -> None:
    values, good = np.ones(10, np.float32), Delta((1.0, 2.0), 1, compress(bytes([1] * 10)), b"")
    np.testing.assert_array_equal(broadcast.apply(values, good, (4, 6)), [2] * 4 + [3] * 6)
    with pytest.raises(PeerError, match=f"{len(steps)} steps for 2 arrays") as caught:
        broadcast.apply(values, replace(good, steps=steps), (4, 6))
    assert caught.value.refusal is Refusal.MALFORMED


# Sizes of values


@pytest.mark.parametrize(("largest", "size"), [(127, 1), (128, 2), (32_767, 2), (10**9, 2)])
def test_symbols_have_as_many_bytes_as_the_largest_one_needs(largest: int, size: int) -> None:
    target = np.full(10**4, 1, np.float32)
    target[7], values = largest, np.zeros(10**4, np.float32)
    rms = float(np.sqrt(np.mean(np.square(target, dtype=np.float64))))
    delta, after = step_towards(values, target, None, 1.0 / rms)
    assert delta.symbol_bytes == size
    assert after[7] == pytest.approx(largest, rel=1e-4)
    assert apply(values, delta).tobytes() == after.tobytes()


@pytest.mark.parametrize("sign", [1, -1])
def test_an_outlier_makes_its_arrays_step_coarser_and_no_symbol_wrap(sign: int) -> None:
    target = np.array([sign * 1e6, 1e-3, 2e-3], np.float32)
    delta, after = broadcast.step_towards(blank(3), target, (1e-3, 1e-3), (1, 2), None)
    assert delta.steps == pytest.approx((1e6 / 32_767, 1e-3))
    np.testing.assert_allclose(after, target, rtol=1e-4)


def test_each_array_has_a_step_of_its_own() -> None:
    """So a small layer does not vanish beside a large one."""
    target = np.concatenate([drawn(1000), drawn(500, 1) * np.float32(1e-4)])
    delta, after = broadcast.step_towards(blank(1500), target, (0.1, 1e-5), (1000, 500), None)
    assert delta.steps == (np.float32(0.1), np.float32(1e-5))
    assert np.abs(after - target)[:1000].max() <= 0.0601
    assert np.abs(after - target)[1000:].max() <= 0.601e-5
    for sizes in ((1500,), (1000, 400, 100)):
        with pytest.raises(PeerError, match="2 steps for"):
            broadcast.apply(blank(1500), delta, sizes)


# Zeros


def test_pruned_values_become_zero_and_stay_so_and_no_other_value_is_ever_exactly_zero() -> None:
    values = blank(999)
    pruned = np.zeros(999, np.bool_)
    for number in range(30):
        pruned = pruned | (drawn(999, number) > 2)
        target = np.where(pruned, 0, np.rint(drawn(999, number + 100))).astype(np.float32)
        delta, values = step_towards(values, target, pruned, 0.5)
        np.testing.assert_array_equal(values == 0, pruned)
    delta, _ = step_towards(values, target, pruned, 0.5)
    assert delta.zeros == b""
    assert pruned.sum() > 100


def test_a_step_that_ends_at_zero_ends_beside_it() -> None:
    delta, after = step_towards(np.ones(4, np.float32), np.zeros(4, np.float32), None, 1.0)
    assert delta.steps[0] == 1.0
    np.testing.assert_array_equal(after, NOT_PRUNED)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
def test_the_bitmap_of_zeros_has_any_length(count: int) -> None:
    pruned = np.arange(count) % 2 == 0
    _, after = step_towards(blank(count), np.where(pruned, 0, 1).astype(np.float32), pruned, 0.5)
    np.testing.assert_array_equal(after == 0, pruned)


def test_a_value_that_is_pruned_no_longer_comes_back() -> None:
    pruned = np.array([True, False])
    _, values = step_towards(np.ones(2, np.float32), np.array([0, 1], np.float32), pruned, 0.5)
    for _ in range(20):
        _, values = step_towards(values, np.ones(2, np.float32), None, 0.5)
    np.testing.assert_allclose(values, 1, atol=1e-6)


# What a peer may send


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("step", [3.4e38, 1e38, np.inf, np.nan])
def test_a_step_into_the_infinite_or_of_no_number_is_refused(step: float) -> None:
    assert refused(Delta((step,), 1, compress(b"\x7f\x00"), b""), np.ones(2, np.float32)) is Refusal.MODEL


@given(st.binary(max_size=3000))
@settings(deadline=None)
def test_what_was_compressed_comes_back(data: bytes) -> None:
    assert decompress(compress(data), len(data)) == data
    assert decompress(b"r" + data, len(data)) == data
    for wrong in (len(data) + 1, len(data) - 1):
        with pytest.raises(PeerError, match=f"expected {wrong} compressed bytes"):
            decompress(compress(data), wrong)


def deflated(data: bytes) -> bytes:
    deflating = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflating.compress(data) + deflating.flush()


PACKED = {"bz2": b"b" + bz2.compress(bytes(5000)), "deflate": b"z" + deflated(bytes(5000)), "raw": b"r" + bytes(5000)}


@pytest.mark.parametrize("how", PACKED)
def test_truncated_and_damaged_data_are_refused(how: str) -> None:
    whole = PACKED[how]
    assert decompress(whole, 5000) == bytes(5000)
    for end in range(0, len(whole) // 2, max(1, len(whole) // 50)):
        with pytest.raises(PeerError, match="expected 5000 compressed bytes"):
            decompress(whole[:end], 5000)
    with pytest.raises(PeerError):
        decompress(b"x" + whole[1:], 5000)


@given(st.sampled_from(sorted(PACKED)), st.binary(max_size=200), st.integers(0, 5100))
@settings(max_examples=200, deadline=None)
def test_garbage_is_refused_or_is_of_the_right_size(how: str, garbage: bytes, size: int) -> None:
    with suppress(PeerError):
        assert len(decompress(PACKED[how][:1] + garbage, size)) == size


@pytest.mark.parametrize("bomb", [b"b" + bz2.compress(bytes(10**8)), b"z" + deflated(bytes(10**8))], ids=["b", "z"])
@pytest.mark.parametrize("where", ["symbols", "zeros"])
def test_a_bomb_never_makes_more_than_was_declared(bomb: bytes, where: str) -> None:
    values = np.ones(100, np.float32)
    delta = replace(Delta((1.0,), 1, compress(bytes(100)), b""), **{where: bomb})
    tracemalloc.start()
    assert refused(delta, values) is Refusal.MALFORMED
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("wrong", [{"symbol_bytes": 2}, {"symbols": compress(bytes(9))}, {"zeros": compress(bytes(1))}])
def test_a_step_for_another_number_of_values_is_refused(wrong: dict[str, object]) -> None:
    delta = Delta((1.0,), 1, compress(bytes(10)), compress(bytes(2)))
    assert len(apply(np.ones(10, np.float32), delta)) == 10
    assert refused(replace(delta, **wrong), np.ones(10, np.float32)) is Refusal.MALFORMED
