"""Whole rounds with a coarse codec: the same model as without, and far fewer bytes, whoever misses what."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg
from secure_app import Hive, answer, arrays_of, body_of, exchange_of, honest, mean_shift, metrics_of, outcome_of, record

from propolis.messages import broadcast_in
from propolis.secure.codec.profiles import PROFILES, Profile
from propolis.secure.errors import PeerError, Refusal, TooFewPeersError
from propolis.secure.secagg.messages import UploadReply, from_bytes
from propolis.secure.secagg.policy import Policy

Arrays = dict[str, np.ndarray]
DENSE, THIN = PROFILES["dense"], PROFILES["thin"]
HALF = replace(THIN, density=0.5, keep=64, broadcast=0.5)
DEVICES = 5
VALUES = 2050


def drawn(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(40, 50)).astype(np.float32), "b": rng.normal(size=50).astype(np.float32)}


MODEL, TARGETS = drawn(0), [drawn(10 + index) for index in range(DEVICES)]
TARGET = {name: np.mean([target[name] for target in TARGETS], axis=0) for name in MODEL}


def pulling(message: Message, index: int, part: float = 0.3) -> RecordDict:
    """Each device pulls the model some of the way to its own target; where the model is pruned it stays."""
    if message.metadata.message_type == "evaluate":
        return honest(message, index)
    moved = {name: a + part * (a != 0) * (TARGETS[index][name] - a) for name, a in arrays_of(message).items()}
    return answer({name: a.astype(np.float32) for name, a in moved.items()}, num_examples=1)


def hive(codec: Profile = DENSE, work: Any = pulling, **how: Any) -> Hive:
    return Hive(DEVICES, work, codec=codec, **{"max_weight": 1.0, **how})


def run(hive: Hive, rounds: int, model: Arrays = MODEL, **config: Any) -> Arrays:
    """The model after some rounds from this one on."""
    for _ in range(rounds):
        model = arrays_of(hive.round(model=model, **config))
    return model


def distance(model: Arrays, target: Arrays = TARGET) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(np.concatenate([(model[n] - target[n]).ravel() for n in MODEL])))))


def downlink(hive: Hive, since: int = 0) -> list[int]:
    """Bytes of the model's way in each upload request."""
    asked = [message for message in hive.wire.requests[since:] if exchange_of(message) == "upload"]
    return [len(broadcast_in(message.content)) for message in asked]


def uplink(hive: Hive) -> int:
    """Bytes of the last masked vector."""
    return len(from_bytes(UploadReply, body_of(hive.wire.said("upload")[-1])).vector)


# What comes out


@pytest.mark.parametrize("codec", [DENSE, HALF, replace(HALF, rotated=False, width=12), replace(DENSE, broadcast=0.0)])
def test_rounds_lead_to_the_devices_mean(codec: Profile) -> None:
    assert distance(run(hive(codec), 8)) < 0.2 < 0.9 < distance(MODEL)


@pytest.mark.parametrize("broadcast", [THIN.broadcast, 12.0])
def test_rounds_with_a_very_coarse_broadcast_do_not_diverge(broadcast: float) -> None:
    some, model, seen = hive(replace(THIN, density=1.0, broadcast=broadcast), partial(pulling, part=0.2)), MODEL, []
    for _ in range(14):
        model = run(some, 1, model)
        seen.append(distance(model))
    assert max(seen) < distance(MODEL)
    assert max(seen[-4:]) < 0.5 * distance(MODEL)


def test_the_mean_is_the_honest_shift_on_average() -> None:
    """Every coordinate moves alike, and each is rounded ten times."""
    after = run(hive(DENSE, honest, max_weight=float(DEVICES)), 10)
    moved = np.concatenate([(after[name] - MODEL[name]).ravel() for name in MODEL]) / 10
    expected = mean_shift(range(DEVICES))
    assert moved.mean() == pytest.approx(expected, rel=0.03)
    assert np.abs(moved / expected - 1).max() < 0.8


def test_rounds_say_what_the_codec_did() -> None:
    some = hive()
    model = run(some, 2)
    metrics = metrics_of(some.round(model=model))
    assert (metrics["bits"], metrics["wraps"], metrics["saturated"], metrics["clipped"]) == (4, 0, 0, 0)


@pytest.mark.parametrize("strategy", ["FedAdam", "FedAvgM"])
def test_a_strategy_that_makes_the_model_double_goes_on(strategy: str) -> None:
    made = getattr(flower, strategy)(min_available_nodes=DEVICES, min_train_nodes=DEVICES)
    some = hive(strategy=made)
    result = made.start(some.grid, record(MODEL), 4, timeout=60, train_config=ConfigRecord({"lr": 0.1}))
    after = {name: array.numpy() for name, array in result.arrays.items()}
    assert distance(after) < 0.95 * distance(MODEL)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]


# Who misses what


@pytest.mark.parametrize("exchange", ["upload", "unmask"])
@pytest.mark.parametrize("codec", [DENSE, HALF], ids=["dense", "half"])
def test_devices_that_drop_out_are_back_in_the_next_round(exchange: str, codec: Profile) -> None:
    some, model = hive(codec), MODEL
    for number in range(DEVICES):
        some.wire.lose = lambda asked, node, out=number % DEVICES + 1: asked == exchange and node == out
        reply = some.round(model=model)
        assert outcome_of(reply).survivors == DEVICES - (exchange == "upload")
        model = arrays_of(reply)
    assert distance(model) < 0.4
    assert not any(message.has_error() for message in some.wire.replies)


def test_devices_that_were_not_asked_for_some_rounds_catch_up() -> None:
    some, model = hive(), MODEL
    for number, nodes in enumerate(([1, 2, 3], [3, 4, 5], [1, 2, 3], [1, 2, 3, 4, 5], [1, 4, 5], [1, 2, 3, 4, 5])):
        reply = some.round(model=model, nodes=nodes)
        assert outcome_of(reply).survivors == len(nodes)
        model = arrays_of(reply)
        held = [version for node in nodes if (version := some.stores[node - 1].recall_model())]
        assert [version.number for version in held] == [number + 1] * len(nodes)
        assert len({version.values.tobytes() for version in held}) == 1
    assert not any(message.has_error() for message in some.wire.replies)


def forget(some: Hive, index: int) -> None:
    some.stores[index]._model = None


def damage(some: Hive, index: int) -> None:
    version = some.stores[index].recall_model()
    some.stores[index]._model = replace(version, values=version.values + np.float32(1e-6))


@pytest.mark.parametrize("lost", [forget, damage])
def test_a_device_that_lost_the_model_is_sent_the_whole_in_the_same_exchange(
    lost: Any, caplog: pytest.LogCaptureFixture
) -> None:
    some = hive()
    model = run(some, 2)
    lost(some, 3)
    since = len(some.wire.requests)
    with caplog.at_level(logging.WARNING, "flwr"):
        reply = some.round(model=model)
    assert "1 devices could not rebuild the model: they are sent the whole" in caplog.text
    assert (outcome_of(reply).survivors, outcome_of(reply).failures) == (DEVICES, ())
    asked = [m.metadata.dst_node_id for m in some.wire.requests[since:] if exchange_of(m) == "upload"]
    assert asked == [1, 2, 3, 4, 5, 4]
    sizes = downlink(some, since)
    assert sizes[-1] > sizes[0]
    assert distance(arrays_of(reply)) < distance(model)


def test_where_no_time_is_left_a_device_that_lost_the_model_is_sent_the_whole_in_the_next_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A SuperLink would refuse a message that has no time left to live, and the run would end."""
    some = hive(attempts=1)
    model = run(some, 2)
    forget(some, 3)
    with monkeypatch.context() as patch:
        clock = SimpleNamespace(monotonic=lambda: 100.0 * some.wire.asked("upload").count(4))
        patch.setattr("propolis.server.secure_round.time", clock)
        reply = some.round(model=model)
    assert (outcome_of(reply).survivors, outcome_of(reply).failures) == (DEVICES - 1, ("upload: base",))
    assert some.wire.asked("upload").count(4) == 3
    assert outcome_of(some.round(model=arrays_of(reply))).survivors == DEVICES
    assert some.wire.asked("upload").count(4) == 4


@pytest.mark.parametrize("error", [MemoryError, ValueError, PeerError(Refusal.NOT_FINITE, "infinite")], ids=repr)
def test_any_error_after_training_counts_as_a_reveal(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hive = Hive(4, codec=PROFILES["dense"], policy=Policy(max_reveals_per_model=3), attempts=1)
    monkeypatch.setattr("propolis.client.update.encode_update", MagicMock(side_effect=error))
    with pytest.raises(TooFewPeersError):
        hive.round(model=MODEL)
    assert [store.change(lambda d: list(d.state.reveals.values())) for store in hive.stores] == [[1]] * 4


# What travels


@pytest.mark.parametrize("codec", [DENSE, HALF])
def test_pruned_zeros_stay_zero_and_are_not_sent(codec: Profile) -> None:
    pruned = np.random.default_rng(5).random((40, 50)) < 0.75
    model = {"w": np.where(pruned, 0, MODEL["w"]).astype(np.float32), "b": MODEL["b"]}
    some, whole = hive(codec), hive(codec)
    after = run(some, 4, model, pruned=True)
    np.testing.assert_array_equal(after["w"] == 0, pruned)
    version = some.stores[0].recall_model()
    assert version is not None
    np.testing.assert_array_equal((version.values == 0).sum(), pruned.sum())
    run(whole, 4)
    assert uplink(some) < 0.55 * uplink(whole)
    assert np.abs(after["w"] - TARGET["w"])[~pruned].mean() < np.abs(model["w"] - TARGET["w"])[~pruned].mean() / 2


def test_uploads_are_four_bits_a_value_from_the_second_round_on() -> None:
    some = hive()
    run(some, 1)
    assert uplink(some) == pytest.approx(2 * VALUES, rel=0.05)
    run(some, 1)
    assert uplink(some) == pytest.approx(VALUES / 2, rel=0.05)


def test_a_round_after_the_first_sends_a_step_and_not_the_model() -> None:
    some = hive()
    model = run(some, 1)
    first, since = downlink(some), len(some.wire.requests)
    run(some, 1, model)
    assert max(downlink(some, since)) < 0.7 * min(first) < min(first) < VALUES * 4


def test_an_evaluation_of_the_model_that_devices_have_sends_next_to_nothing() -> None:
    some = hive()
    model = run(some, 2)
    some.round("evaluate", model)
    since = len(some.wire.requests)
    assert metrics_of(some.round("evaluate", model))["accuracy"] > 0
    assert max(downlink(some, since)) < 100
    assert {store.recall_model().number for store in some.stores} == {3}


def test_all_devices_train_on_the_same_bits_which_follow_the_strategys_model() -> None:
    seen: list[Message] = []
    some = hive(work=lambda message, index: (seen.append(message), pulling(message, index))[1], strategy=FedAvg())
    model = MODEL
    for _ in range(4):
        seen.clear()
        sent, model = model, run(some, 1, model)
        assert len({arrays_of(message)["w"].tobytes() for message in seen}) == 1
        assert distance(arrays_of(seen[0]), sent) < 0.25


def test_coarse_uploads_are_as_masked_as_fine_ones() -> None:
    """Four bits of a masked vector tell nothing: the same in two rounds they are as often as chance has it."""
    hive = Hive(5, codec=PROFILES["dense"])
    for _ in range(3):
        hive.round(model=MODEL)
    last, before = (
        np.frombuffer(from_bytes(UploadReply, body_of(hive.wire.said("upload")[place])).vector, np.uint8)
        for place in (-1, -6)
    )
    same = np.mean([(last & 15) == (before & 15), (last >> 4) == (before >> 4)])
    assert same == pytest.approx(1 / 16, abs=0.03)
