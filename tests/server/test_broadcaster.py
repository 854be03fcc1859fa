"""The model's way to the devices from the server's end: it is followed, and pruned stays pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from secure_app import MODEL, Arrays, Hive

from propolis.messages import fill_model, sizes_elsewhere
from propolis.secure.codec.broadcast import NOT_PRUNED
from propolis.secure.codec.series import MOST_DELTAS, Broadcast, ModelSeries, Version, first_version, rebuild
from propolis.secure.errors import UsageError
from propolis.server.batch import Batch
from propolis.server.broadcaster import Broadcaster

HIVE = Hive(2)
COUNT = 2000
# What is lacking is let pile up to this many moves, each times the coarseness, before it goes out.
PILE = 4


def drawn(seed: int, count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def series(coarseness: float, sizes: tuple[int, ...] = (COUNT,)) -> ModelSeries:
    return ModelSeries(b"series of a test", coarseness, sizes)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


# The first version


def test_a_model_that_begins_with_the_first_version_lacks_nothing() -> None:
    start = first_version(drawn(0), (500, 1500))
    assert series(0.5, (500, 1500)).publish(start).tobytes() == start.tobytes()
    assert 0 < np.abs(start - drawn(0)).max() < 0.2


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-12])
def test_a_small_layer_survives_beside_a_large_one(size: float) -> None:
    small = drawn(1, 100) * np.float32(size)
    first = series(1.0, (1900, 100)).publish(np.concatenate([drawn(0, 1900), small]))
    assert rms(first[1900:] - small) < 0.15 * size
    assert np.corrcoef(first[1900:], small)[0, 1] > 0.98


# The model moves


MOVES: dict[str, Callable[[int], np.ndarray]] = {
    "alike": lambda number: np.full(COUNT, 0.01, np.float32),
    "apart": lambda number: np.float32(0.01) * drawn(1),
    "at random": lambda number: np.float32(0.01) * drawn(number),
}


@pytest.mark.parametrize("coarseness", [1.0, 3.3, 12.0])
@pytest.mark.parametrize("how", MOVES)
def test_a_model_that_moves_on_and_on_is_followed_with_a_bounded_lag(how: str, coarseness: float) -> None:
    target, server = drawn(0), series(coarseness)
    server.publish(target)
    for number in range(200):
        move = MOVES[how](number + 2)
        target = target + move
        server.publish(target)
        # The first step may have left more than that, and goes out by and by.
        lag = np.abs(target - server.values).max()
        assert lag <= 0.6 * max(PILE * coarseness * rms(move), 0.25) + np.abs(move).max()
    assert lag <= 0.6 * PILE * coarseness * rms(move) + np.abs(move).max()
    assert lag < 0.2 * np.abs(target - drawn(0)).max() or how == "at random"


@pytest.mark.parametrize("coarseness", [1.0, 3.3, 12.0])
@pytest.mark.parametrize("target", [drawn(0), np.full(COUNT, 0.1, np.float32)], ids=["normal", "constant"])
def test_a_model_that_stands_still_is_reached(target: np.ndarray, coarseness: float) -> None:
    server = series(coarseness)
    for _ in range(30):
        server.publish(target)
    assert np.abs(target - server.values).max() < 1e-3 * rms(target)


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1.0, 1e10, 1e37])
def test_tiny_and_huge_models_are_followed_alike(scale: float) -> None:
    server, target = series(3.3), drawn(0) * np.float32(scale)
    for _ in range(30):
        server.publish(target)
    assert np.abs(server.values - target).max() <= 1e-3 * scale


def test_an_array_that_stands_still_beside_one_that_moves_is_not_disturbed() -> None:
    server, still = series(1.0, (1000, 1000)), drawn(0, 1000)
    for number in range(40):
        server.publish(np.concatenate([still, drawn(number, 1000) * np.float32(10)]))
    assert np.abs(server.values[:1000] - still).max() < 1e-3


@pytest.mark.parametrize("coarseness", [1.0, 3.3, 12.0])
def test_training_on_a_coarse_broadcast_does_not_diverge(coarseness: float) -> None:
    """Devices see a model that lags behind, and pull the server's one from there."""
    model, target, server = drawn(0), drawn(1), series(coarseness)
    seen = []
    for _ in range(200):
        model = model + np.float32(0.1) * (target - server.publish(model))
        seen.append(rms(model - target))
    assert max(seen) <= 1.5 * rms(drawn(0) - target)
    assert max(seen[-20:]) < 0.1


# Steps


def rebuilt(message: Broadcast, had: Version | None) -> Version:
    return rebuild(Broadcast.from_bytes(message.to_bytes()), had, (3, 7))


def test_no_more_steps_are_kept_and_sent_than_a_device_can_be_expected_to_take() -> None:
    server = series(0.5, (3, 7))
    server.publish(drawn(0, 10))
    newcomer = rebuilt(server.message_for(None), None)
    for number in range(MOST_DELTAS - 1):
        server.publish(server.values.copy())
        assert len(server.message_for(None).deltas) == number + 2
    known = server.message_for(1)
    assert (len(known.deltas), known.values) == (MOST_DELTAS - 1, b"")
    assert rebuilt(known, newcomer).values.tobytes() == server.values.tobytes()
    for _ in range(2):
        server.publish(server.values.copy())
        assert len(server.message_for(None).deltas) == MOST_DELTAS
    assert server.version == MOST_DELTAS + 2
    assert server.message_for(1).values != b""
    assert rebuilt(server.message_for(1), newcomer).values.tobytes() == server.values.tobytes()


# Batches


def batch(model: Arrays, kind: str = "train", **config: Any) -> Batch:
    return Batch.of(HIVE.messages(kind, model, **config), 60.0)


def published(server: Broadcaster, model: Arrays, kind: str = "train", **config: Any) -> Arrays:
    """The model as the devices will have it, which is the one that they rebuild."""
    ours = server.publish(batch(model, kind, **config), sorted(model))
    content = server.content_for(0)
    sizes = sizes_elsewhere(content.records)
    version = rebuild(Broadcast.from_bytes(content.broadcast), None, sizes)
    (arrays,) = fill_model(content.records, version.values).array_records.values()
    assert list(arrays) == list(ours.model) == list(model)
    for name, array in arrays.items():
        assert array.numpy().tobytes() == ours.model[name].tobytes()
    return ours.model


def half_pruned() -> Arrays:
    return {"w": np.where(np.arange(12).reshape(4, 3) % 2, MODEL["w"], 0).astype(np.float32), "b": MODEL["b"]}


def zeros_of(model: Arrays) -> int:
    return int(sum((array == 0).sum() for array in model.values()))


def test_a_model_stays_pruned_when_it_is_evaluated_without_a_word_of_it() -> None:
    server, model = Broadcaster(1.0), half_pruned()
    for kind, config in (("train", {"pruned": True}), ("evaluate", {}), ("train", {})):
        moved = {name: np.where(array == 0, 0, array + 0.01).astype(np.float32) for name, array in model.items()}
        for each in (model, moved):
            assert zeros_of(published(server, each, kind, **config)) == zeros_of({"w": model["w"]}) == 6


def test_a_model_that_was_evaluated_before_it_is_pruned_goes_out_anew_with_its_zeros() -> None:
    server, model = Broadcaster(1.0), half_pruned()
    assert zeros_of(published(server, model, "evaluate")) == 0
    assert zeros_of(published(server, model, pruned=True)) == 6
    assert zeros_of(published(server, model, "evaluate")) == 6


def test_pruning_outlives_a_restart() -> None:
    before, after = Broadcaster(1.0), Broadcaster(1.0)
    published(before, half_pruned(), pruned=True)
    after.resume_from(before.state())
    again = published(after, half_pruned())
    assert zeros_of(again) == 6


def test_the_order_of_the_arrays_does_not_matter() -> None:
    server = Broadcaster(1.0)
    there = published(server, {"w": MODEL["w"], "b": MODEL["b"]})
    version = Broadcast.from_bytes(server.content_for(0).broadcast).version
    back = published(server, {"b": MODEL["b"], "w": MODEL["w"]}, "evaluate")
    assert Broadcast.from_bytes(server.content_for(0).broadcast).version == version
    for name in MODEL:
        assert there[name].tobytes() == back[name].tobytes()
        assert np.abs(there[name] - MODEL[name]).max() < 0.2


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("first", [True, False])
def test_a_model_that_is_not_finite_is_not_published(wrong: float, first: bool) -> None:
    server = Broadcaster(1.0)
    if not first:
        published(server, MODEL)
    bad = {"w": MODEL["w"].astype(np.float64), "b": MODEL["b"]}
    bad["w"][1, 1] = wrong
    with pytest.raises(UsageError, match="the model is infinite or NaN"):
        server.publish(batch(bad), ["b", "w"])
    assert np.isfinite(published(server, MODEL)["w"]).all()


@pytest.mark.parametrize("other", [{"b": np.zeros(4, np.float32)}, {"c": MODEL["b"]}], ids=["shape", "name"])
def test_a_model_of_other_shapes_is_refused(other: Arrays) -> None:
    server = Broadcaster(1.0)
    published(server, MODEL)
    for wrong in ({**MODEL, **other}, {"w": MODEL["w"]}):
        with pytest.raises(UsageError, match="has another shape than in the rounds before"):
            server.publish(batch(wrong), sorted(wrong))


def test_who_has_what_decides_what_is_sent() -> None:
    server = Broadcaster(1.0)
    published(server, MODEL)
    first = Broadcast.from_bytes(server.content_for(1).broadcast)
    had = rebuild(first, None, (3, 12))
    server.acknowledge(1)
    moved = published(server, {name: array + np.float32(0.5) for name, array in MODEL.items()})
    sent = Broadcast.from_bytes(server.content_for(1).broadcast)
    assert (sent.first, sent.version, sent.values) == (2, 2, b"")
    np.testing.assert_array_equal(rebuild(sent, had, (3, 12)).values[3:], moved["w"].ravel())
    server.forget(1)
    assert Broadcast.from_bytes(server.content_for(1).broadcast).values != b""
    assert (had.values != 0).all()
    assert NOT_PRUNED in had.values
