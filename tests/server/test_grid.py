"""A SecureGrid is a Grid: strategies run on it as they are, and what the server learns is a mean."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.serverapp.strategy import Result as FlowerResult
from secure_app import (
    MODEL,
    Hive,
    Work,
    answer,
    app_of,
    arrays_of,
    body_of,
    exchange_of,
    honest,
    metrics_of,
    outcome_of,
    record,
    require_mean,
    shift,
    with_body,
)

from propolis.messages import RECORD
from propolis.secure.codec.lanes import LANES, encode_lanes
from propolis.secure.errors import TooFewPeersError, TrustError, UsageError
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.messages import (
    HelloReply,
    PrepareReply,
    PrepareRequest,
    UploadReply,
    from_bytes,
    to_bytes,
)
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.states import Exchange
from propolis.server.batch import Outcome
from propolis.server.channel import Channel
from propolis.server.exchange import GridWrapper
from propolis.server.grid import SecureGrid
from propolis.server.planner import Protection
from propolis.simulations.federation import Federation, make_federation
from propolis.simulations.local import LocalGrid

EXCHANGES = ["hello", "prepare", "upload", "confirm", "unmask"]
AVERAGING = ["FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedProx"]


# Strategies


def learning(message: Message, index: int) -> RecordDict:
    """Each device pulls the model half of the way to a target of its own."""
    if message.metadata.message_type == "evaluate":
        return honest(message, index)
    arrays = arrays_of(message)
    moved = {
        name: a + np.asarray((index - np.arange(a.size).reshape(a.shape) / 9 - a) / 2) for name, a in arrays.items()
    }
    return answer({name: a.astype(arrays[name].dtype) for name, a in moved.items()}, num_examples=index + 1, loss=1.0)


def learning_in_single(message: Message, index: int) -> RecordDict:
    """As torch does: whatever type the model came in, the parameters are float32."""
    content = learning(message, index)
    for key, array in content.array_records.items():
        content[key] = record({name: each.numpy().astype(np.float32) for name, each in array.items()})
    return content


def made(name: str) -> Strategy:
    options = {"proximal_mu": 0.1} if name == "FedProx" else {}
    strategy: Strategy = getattr(flower, name)(min_available_nodes=5, min_train_nodes=5, **options)
    return strategy


def started(strategy: Strategy, grid: Grid, rounds: int = 3) -> FlowerResult:
    return strategy.start(grid, record(MODEL), rounds, timeout=60, train_config=ConfigRecord({"lr": 0.1}))


@pytest.mark.parametrize(
    ("name", "work"),
    [
        *((name, learning) for name in AVERAGING),
        ("FedAdam", learning_in_single),  # Flower's FedAdam makes the model float64
        ("FedYogi", learning_in_single),
    ],
)
def test_a_strategy_of_flowers_starts_unmodified_and_ends_where_it_would_unprotected(name: str, work: Work) -> None:
    hive = Hive(5, work, strategy=made(name), bits=32, range=64.0)
    protected = started(made(name), hive.grid)
    plain = started(made(name), LocalGrid(partial(app_of, work, None), 5))
    for key, array in plain.arrays.items():
        np.testing.assert_allclose(protected.arrays[key].numpy(), array.numpy(), atol=2e-5)
    assert protected.train_metrics_clientapp.keys() == plain.train_metrics_clientapp.keys() == {1, 2, 3}
    for number in (1, 2, 3):
        for ours, theirs in zip(
            (protected.train_metrics_clientapp, protected.evaluate_metrics_clientapp),
            (plain.train_metrics_clientapp, plain.evaluate_metrics_clientapp),
            strict=True,
        ):
            assert {k: ours[number][k] for k in theirs[number]} == pytest.approx(dict(theirs[number]), abs=1e-6)


@pytest.mark.parametrize("bits", [8, 12, 16, 32])
def test_the_mean_is_the_unprotected_one_within_a_step_of_the_grid(bits: int) -> None:
    hive = Hive(5, bits=bits)
    reply, step = hive.round(), 5 / ((2**bits - 1) // 10) * 5 / 15
    require_mean(reply, range(5), tolerance=step + 1e-6)


SINGLE = [
    *("Krum", "MultiKrum", "Bulyan", "FedMedian", "FedTrimmedAvg", "QFedAvg", "FedXgbBagging", "FedXgbCyclic"),
    *("DifferentialPrivacyClientSideFixedClipping", "DifferentialPrivacyServerSideFixedClipping"),
    *("DifferentialPrivacyClientSideAdaptiveClipping", "DifferentialPrivacyServerSideAdaptiveClipping"),
]


def test_every_strategy_of_flowers_is_known_to_average_or_not() -> None:
    assert {*SINGLE, *AVERAGING, "Result", "Strategy"} == set(flower.__all__)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("derived", [False, True], ids=["itself", "a user's subclass"])
def test_a_strategy_that_looks_at_single_updates_is_refused_by_name(name: str, derived: bool) -> None:
    kind = getattr(flower, name)
    if derived:
        kind = type("Own", (kind,), {})
    with pytest.raises(UsageError, match=f"^{name} looks at single updates"):
        Hive(3, strategy=object.__new__(kind))


def test_a_users_own_averaging_strategy_is_welcome() -> None:
    class Krum(FedAvg):
        """Called like one of Flower's, and averages."""

    Hive(3, strategy=Krum())


def test_a_strategy_names_its_own_weight() -> None:
    def by_duration(message: Message, index: int) -> RecordDict:
        return answer(arrays_of(Message(honest(message, index), reply_to=message)), minutes=index + 0.5)

    policy = Policy(weight_key="minutes", max_reveals_per_model=None)
    hive = Hive(3, by_duration, policy=policy, strategy=FedAvg(weighted_by_key="minutes"))
    reply = hive.round()
    expected = sum((index + 0.5) * shift(index) for index in range(3)) / 4.5
    np.testing.assert_allclose(arrays_of(reply)["w"], MODEL["w"] + expected, atol=1e-3)
    assert metrics_of(reply)["minutes"] == pytest.approx(4.5)
    assert "num-examples" not in metrics_of(reply)


# What it refuses


def test_single_messages_are_refused() -> None:
    hive = Hive(3)
    for call in (lambda: hive.grid.push_messages(hive.messages()), lambda: hive.grid.pull_messages(["1"])):
        with pytest.raises(UsageError, match="sends whole rounds"):
            call()
    assert not hive.wire.requests


def tailored(messages: list[Message]) -> None:
    content = messages[1].content
    messages[1].content = RecordDict({**content, "config": ConfigRecord({"lr": 0.25})})


def other_model(messages: list[Message]) -> None:
    moved = {name: array + np.float32(1e-7) for name, array in MODEL.items()}
    messages[1].content = RecordDict({**messages[1].content, "arrays": record(moved)})


def something_more(messages: list[Message]) -> None:
    messages[1].content = RecordDict({**messages[1].content, "more": MetricRecord({"x": 1})})


def twice(messages: list[Message]) -> None:
    messages.append(messages[0])


def mixed(messages: list[Message]) -> None:
    messages[1].metadata.message_type = "evaluate"


def queries(messages: list[Message]) -> None:
    for message in messages:
        message.metadata.message_type = "query"


def actions(messages: list[Message]) -> None:
    for message in messages:
        message.metadata.message_type = "train.own"


def for_all(**records: Any) -> Callable[[list[Message]], None]:
    def change(messages: list[Message]) -> None:
        for message in messages:
            message.content = RecordDict({k: v for k, v in {**message.content, **records}.items() if v is not None})

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (tailored, "different models or configurations"),
        (other_model, "different models or configurations"),
        (something_more, "different models or configurations"),
        (twice, "one message in a round"),
        (mixed, "train or evaluate messages"),
        (queries, "train or evaluate messages, got query"),
        (actions, r"train or evaluate messages, got train\.own"),
        (for_all(arrays=None), "one ArrayRecord.*got 0"),
        (for_all(second=record(MODEL)), "one ArrayRecord.*got 2"),
        (for_all(**{RECORD: ConfigRecord()}), "record name propolis is taken"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_batch_of_one_content_is_refused_before_anything_is_sent(
    change: Callable[[list[Message]], None], why: str
) -> None:
    hive = Hive(3)
    messages = hive.messages()
    change(messages)
    with pytest.raises(UsageError, match=why):
        hive.grid.send_and_receive(messages)
    assert not hive.wire.requests


def test_no_messages_are_no_round() -> None:
    assert Hive(3).grid.send_and_receive([]) == []


def test_equal_contents_need_not_be_one_object() -> None:
    hive = Hive(3)
    messages = [message for node in (1, 2, 3) for message in hive.messages(nodes=[node], lr=0.5)]
    (reply,) = hive.grid.send_and_receive(messages)
    require_mean(reply, range(3))


def test_more_corrupted_devices_than_a_graph_stands_are_our_own_mistake() -> None:
    with pytest.raises(UsageError, match="more than any neighbour graph stands"):
        Hive(5, malicious=True, corrupted=0.8).round()


# What comes back, and what does not cross the wire


def test_metrics_of_training_and_evaluation_come_back_as_weighted_means() -> None:
    hive = Hive(5)
    trained, evaluated = metrics_of(hive.round()), metrics_of(hive.round("evaluate"))
    assert trained["num-examples"] == evaluated["num-examples"] == pytest.approx(15)
    assert trained["loss"] == pytest.approx(sum((i + 1) * (2 + i) for i in range(5)) / 15)
    assert evaluated["accuracy"] == pytest.approx(sum((i + 1) * i / 8 for i in range(5)) / 15)
    assert set(evaluated) == {"num-examples", "accuracy"}


def test_evaluation_sends_no_arrays_up_and_gets_none_back() -> None:
    hive = Hive(3)
    reply = hive.round("evaluate")
    assert not reply.content.array_records
    assert {len(from_bytes(UploadReply, body_of(each)).vector) for each in hive.wire.said("upload")} == {0}


def test_integers_flags_and_statistics_come_back_exactly() -> None:
    model = {
        "w": np.zeros(4, np.float32),
        "mean": np.zeros(4, np.float32),
        "count": np.array(40, np.int64),
        "small": np.array([250, 3], np.uint8),
        "flag": np.array([True, False, False]),
    }

    def work(message: Message, index: int) -> RecordDict:
        new = {name: array.copy() for name, array in arrays_of(message).items()}
        new["mean"] += np.float32(1e-6 * (index + 1))
        new["count"] = new["count"] + 12
        new["small"] -= np.array([50, 1], np.uint8)
        new["flag"] = np.array([True, True, index == 0])
        return answer(new, num_examples=index + 1)

    arrays = arrays_of(Hive(3, work, exact=["mean"], bits=6).round(model=model))
    assert {name: array.dtype for name, array in arrays.items()} == {name: a.dtype for name, a in model.items()}
    assert arrays["count"] == 52
    assert arrays["small"].tolist() == [200, 2]
    assert arrays["flag"].tolist() == [True, True, False]
    np.testing.assert_allclose(arrays["mean"], 1e-6 * 14 / 6, rtol=1e-2)


def test_nothing_of_one_device_crosses_the_wire_in_clear() -> None:
    """Neither as Flower would write it nor as the encoding does: lanes and vector are looked for without masks."""
    weight, loss, change = 3.0625, 0.123456789, np.full(64, 0.0, np.float32)

    def work(message: Message, index: int) -> RecordDict:
        return answer({"w": arrays_of(message)["w"] + change}, num_examples=weight, loss=loss)

    model = {"w": np.linspace(1, 2, 64, dtype=np.float32)}
    hive = Hive(3, work, max_weight=4.0)
    assert metrics_of(hive.round(model=model))["num-examples"] == pytest.approx(3 * weight)
    assert metrics_of(hive.round("evaluate", model=model))["loss"] == pytest.approx(loss)
    share = weight / 4.0
    lanes, _ = encode_lanes(np.array([share, share * loss]), 3)
    uplink = hive.wire.uplink()
    for value in (weight, loss, share, share * loss):
        for kind in ("<f4", ">f4", "<f8", ">f8"):
            assert np.array(value, kind).tobytes() not in uplink
    for lane in lanes:
        assert LANES.pack(np.array([lane], np.uint64)) not in uplink
    assert model["w"][:4].tobytes() not in uplink
    assert bytes(16) not in uplink  # the vector of a change of zero
    assert {reply.metadata.message_type for reply in hive.wire.replies} == {"train", "evaluate"}
    assert all(set(reply.content) == {RECORD} for reply in hive.wire.replies)


def test_the_range_follows_the_devices() -> None:
    hive = Hive(3)
    ranges = [
        metrics_of(hive.round(model={"w": MODEL["w"] + np.float32(number)}))["update-range"] for number in range(1, 9)
    ]
    assert ranges[:4] == [1.0, 0.5, 0.25, 0.125]
    largest = sum((index + 1) / 3 * shift(index) for index in range(3)) / 3
    assert ranges[-1] == pytest.approx(4 * largest, rel=0.05)
    hive.round("evaluate")
    assert hive.grid.scale.range == pytest.approx(4 * largest, rel=0.05)


def test_a_grid_goes_on_with_the_range_of_the_run_before() -> None:
    hive, other = Hive(3), Hive(3)
    other.grid.resume_from(metrics_of(hive.round()), hive.grid.state())
    assert other.grid.scale.range == hive.grid.scale.range


def test_what_is_out_of_range_is_reported_and_the_range_grows(caplog: pytest.LogCaptureFixture) -> None:
    hive = Hive(3, range=0.01)
    with caplog.at_level(logging.WARNING, "flwr"):
        metrics = metrics_of(hive.round())
    assert metrics["saturated"] == 30  # the two devices with the larger weighted changes: 15 parameters each
    assert "30 values were out of range" in caplog.text
    assert hive.grid.scale.range == 0.02


# Drop-outs


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_device_that_is_lost_at_any_exchange_costs_itself_alone(exchange: str, malicious: bool) -> None:
    hive = Hive(6, malicious=malicious)
    hive.wire.lose = lambda asked, node: node == 3 and EXCHANGES.index(asked) >= EXCHANGES.index(exchange)
    reply = hive.round()
    alive = range(6) if exchange in ("confirm", "unmask") else [0, 1, 3, 4, 5]
    require_mean(reply, alive)
    assert outcome_of(reply) == Outcome(len(alive), 6, ())
    assert metrics_of(reply)["num-examples"] == pytest.approx(sum(index + 1 for index in alive))
    assert bool(hive.wire.asked("confirm")) is malicious
    if exchange in ("hello", "prepare"):
        assert hive.wire.asked("upload") == [1, 2, 4, 5, 6]


def test_devices_lost_at_different_exchanges_leave_the_sum_of_the_others() -> None:
    hive = Hive(9)
    gone = {1: "hello", 4: "prepare", 9: "unmask"}
    hive.wire.lose = lambda asked, node: node in gone and EXCHANGES.index(asked) >= EXCHANGES.index(gone[node])
    reply = hive.round()
    require_mean(reply, [1, 2, 4, 5, 6, 7, 8])
    assert (outcome_of(reply).survivors, outcome_of(reply).asked) == (7, 9)


@pytest.mark.parametrize("exchange", ["hello", "prepare", "upload", "unmask"])
def test_a_device_that_was_lost_is_back_in_the_next_round(exchange: str) -> None:
    hive = Hive(5)
    hive.wire.lose = lambda asked, node: node == 2 and asked == exchange
    hive.round()
    hive.wire.requests.clear()
    hive.wire.lose = lambda asked, node: False
    reply = hive.round(model={"w": MODEL["w"] + 1})
    require_mean(reply, range(5), model={"w": MODEL["w"] + 1})
    assert hive.wire.asked("hello") == ([2] if exchange in ("hello", "prepare") else [])


def test_too_few_devices_at_hello_are_an_error_that_says_how_many() -> None:
    hive = Hive(4, attempts=1)
    hive.wire.lose = lambda asked, node: node > 2
    with pytest.raises(TooFewPeersError, match="2 of 4 devices said hello, 3 are needed"):
        hive.round()
    assert not hive.wire.asked("prepare")


@pytest.mark.parametrize("min_clients", [3, 5])
@pytest.mark.parametrize(("exchange", "said"), [("prepare", "prepared"), ("upload", "sent a masked update")])
def test_a_sum_is_over_as_many_devices_as_it_must_be(exchange: str, said: str, min_clients: int) -> None:
    hive = Hive(6, min_clients=min_clients, attempts=1)
    hive.wire.lose = lambda asked, node: asked == exchange and node >= min_clients
    with pytest.raises(TooFewPeersError, match=rf"\d of 6 devices {said}, {min_clients} are needed"):
        hive.round()
    assert not hive.wire.asked("unmask")


# Retries


def lose_once(hive: Hive, exchange: str, nodes: Iterable[int]) -> None:
    """These nodes are lost in the first attempt, at this exchange."""
    gone = set(nodes)

    def lose(asked: str, node: int) -> bool:
        if asked == exchange and node in gone:
            gone.remove(node)
            return True
        return False

    hive.wire.lose = lose


@pytest.mark.parametrize("exchange", ["hello", "prepare", "upload", "unmask"])
def test_too_few_survivors_are_tried_again_with_all_that_are_there(exchange: str) -> None:
    hive = Hive(5)
    lose_once(hive, exchange, [1, 2, 3])
    require_mean(hive.round(), range(5))


def test_an_attempt_shares_no_key_and_no_mask_with_the_one_before() -> None:
    hive = Hive(5)
    lose_once(hive, "unmask", [1, 2, 3])
    hive.round()
    uploads = [from_bytes(UploadReply, body_of(reply)) for reply in hive.wire.said("upload")]
    heads = [from_bytes(PrepareReply, body_of(reply)) for reply in hive.wire.said("prepare")]
    assert len(uploads) == len(heads) == 10
    assert len({upload.round_tag for upload in uploads}) == 2
    assert len({upload.vector for upload in uploads}) == len({upload.lanes for upload in uploads}) == 10
    assert len({head.head.payload for head in heads}) == 10
    assert len({head.next_prekey.payload for head in heads}) == 10
    words = [np.frombuffer(upload.vector, np.uint16) for upload in uploads]
    for node in range(5):  # what an attempt and its retry have in common is the update alone, and that is masked
        assert np.count_nonzero(words[node] == words[node + 5]) < 5


@pytest.mark.parametrize("attempts", [1, 2, 4])
def test_attempts_end_with_an_error(attempts: int) -> None:
    hive = Hive(4, attempts=attempts)
    hive.wire.lose = lambda asked, node: asked == "upload" and node > 2
    with pytest.raises(TooFewPeersError, match="2 of 4 devices sent a masked update"):
        hive.round()
    assert len(hive.wire.asked("upload")) == 4 * attempts


@pytest.mark.parametrize("odd", [0, 2])
def test_a_device_with_other_metrics_than_the_rest_is_left_out_also_when_it_was_first(odd: int) -> None:
    def work(message: Message, index: int) -> RecordDict:
        content = honest(message, index)
        if index == odd:
            content["metrics"]["mood"] = 1.0
        return content

    hive = Hive(5, work)
    reply = hive.round()
    require_mean(reply, [index for index in range(5) if index != odd])
    assert len(outcome_of(reply).failures) == 1
    assert "mood" not in metrics_of(reply)


def test_an_app_may_begin_to_send_another_metric_in_a_later_round() -> None:
    def work(message: Message, index: int) -> RecordDict:
        content = honest(message, index)
        if arrays_of(message)["b"][0] > 4:
            content["metrics"]["mood"] = 1.0
        return content

    hive = Hive(3, work)
    for number in range(6):
        reply = hive.round(model={"b": MODEL["b"] + np.float32(number)})
    assert metrics_of(reply)["mood"] == pytest.approx(1.0)


def test_a_dealer_that_shares_another_secret_than_it_signed_is_banned_and_the_retry_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from propolis.secure.secagg import client

    split, dealt = client.split, []

    def cheating(secret: bytes, *arguments: Any) -> Any:
        dealt.append(secret)
        return split(bytes(16) if len(dealt) == 3 else secret, *arguments)  # the seed of the second device

    monkeypatch.setattr(client, "split", cheating)
    hive = Hive(5)
    require_mean(hive.round(), [0, 2, 3, 4])
    assert hive.wire.asked("upload") == [1, 2, 3, 4, 5, 1, 3, 4, 5]
    reply = hive.round(model={"w": MODEL["w"] + 1})
    assert outcome_of(reply).survivors == 4
    assert "hello: device 1 has cheated in this run" in outcome_of(reply).failures


# A wire that is not to be trusted


def test_a_device_that_got_another_model_makes_the_attempt_fail_and_nothing_is_learnt() -> None:
    def other_for_one(exchange: str, message: Message) -> Message:
        if (exchange, message.metadata.dst_node_id) != ("upload", 4):
            return message
        other = {name: array + np.float32(1e-6) for name, array in MODEL.items()}
        return hive.wire.create_message(RecordDict({**message.content, "arrays": record(other)}), "train", 4, "")

    hive = Hive(5, attempts=2)
    hive.wire.deliver = other_for_one
    with pytest.raises(TooFewPeersError, match="the sum is noise: some device saw another model"):
        hive.round()
    assert len(hive.wire.asked("unmask")) == 10


@pytest.mark.parametrize("record_name", ["config", "more"])
def test_a_device_that_got_another_configuration_makes_the_attempt_fail(record_name: str) -> None:
    def other_for_one(exchange: str, message: Message) -> Message:
        if (exchange, message.metadata.dst_node_id) != ("upload", 1):
            return message
        other = RecordDict({**message.content, record_name: ConfigRecord({"lr": 0.1})})
        return hive.wire.create_message(other, "train", 1, "")

    hive = Hive(5, attempts=1)
    hive.wire.deliver = other_for_one
    with pytest.raises(TooFewPeersError, match="the sum is noise"):
        hive.round(lr=0.10001)


def reordered(content: RecordDict, what: str) -> RecordDict:
    """The same records, in which something comes in another order."""
    records = {name: content[name] for name in (RECORD, "arrays", "config")}
    if what == "arrays":
        records["arrays"] = ArrayRecord(dict(reversed(content.array_records["arrays"].items())))
    if what == "config":
        records["config"] = ConfigRecord(dict(reversed(content.config_records["config"].items())))
    names = list(content) if what != "records" else list(reversed(list(content)))
    return RecordDict({name: records[name] for name in names})


@pytest.mark.parametrize("what", ["arrays", "config", "records", "group"])
def test_a_device_that_got_the_same_in_another_order_makes_the_attempt_fail(what: str) -> None:
    """Apps take arrays by their position: in another order they are another model (Pasquini et al., CCS 2022)."""

    def other_for_one(exchange: str, message: Message) -> Message:
        if (exchange, message.metadata.dst_node_id) != ("upload", 4):
            return message
        group = "another" if what == "group" else ""
        return hive.wire.create_message(reordered(message.content, what), "train", 4, group)

    hive = Hive(5, attempts=1)
    hive.wire.deliver = other_for_one
    with pytest.raises(TooFewPeersError, match="the sum is noise"):
        hive.round(lr=0.1, momentum=0.9)


@pytest.mark.parametrize("how", ["boxes that do not open", "shares beyond the field"])
def test_a_dealer_whose_shares_are_of_no_use_is_banned_and_the_retry_succeeds(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from propolis.secure.secagg import client

    seal, split, calls = client.seal, client.split, {"seal": 0, "split": 0}

    def sealing(plaintext: bytes, public_key: bytes, info: bytes) -> bytes:
        calls["seal"] += 1  # the second device seals four boxes
        return seal(plaintext, public_key, b"?" if how.startswith("boxes") and 4 < calls["seal"] <= 8 else info)

    def splitting(secret: bytes, threshold: int, xs: Sequence[int], random_bytes: Any) -> list[bytes]:
        calls["split"] += 1
        shares = split(secret, threshold, xs, random_bytes)
        return [b"\xff" * 16] * len(shares) if how.startswith("shares") and calls["split"] == 3 else shares

    monkeypatch.setattr(client, "seal", sealing)
    monkeypatch.setattr(client, "split", splitting)
    hive = Hive(5)
    require_mean(hive.round(), [0, 2, 3, 4])
    assert hive.wire.asked("upload") == [1, 2, 3, 4, 5, 1, 3, 4, 5]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_garbage_for_a_reply_is_a_drop_out(exchange: str) -> None:
    hive = Hive(6, malicious=True)
    hive.wire.meddle = lambda said, node, body: b"garbage" if (said, node) == (exchange, 5) else body
    reply = hive.round()
    alive = range(6) if exchange in ("confirm", "unmask") else [0, 1, 2, 3, 5]
    require_mean(reply, alive)
    (failure,) = outcome_of(reply).failures
    assert failure.startswith(f"{exchange}: ")


@pytest.mark.parametrize("exchange", ["hello", "prepare", "upload"])
def test_one_devices_reply_in_anothers_name_is_a_drop_out(exchange: str) -> None:
    """In a hello it would bring in a device twice; later it would stand for a device that said nothing."""
    first: dict[str, bytes] = {}

    def copied(said: str, node: int, body: bytes) -> bytes:
        if said == exchange and node == 2:
            return first[said]
        first.setdefault(said, body)
        return body

    hive = Hive(5, attempts=1)
    hive.wire.meddle = copied
    if exchange == "upload":  # nothing in a masked update is signed: it folds, and what comes out is noise
        with pytest.raises(TooFewPeersError, match="the sum is noise"):
            hive.round()
        return
    reply = hive.round()
    require_mean(reply, [0, 2, 3, 4])
    assert len(outcome_of(reply).failures) == 1


def test_a_recorded_hello_does_not_speak_for_a_device() -> None:
    """The server never saw it, so its prekey is new; but it answers another challenge."""
    recorded: list[bytes] = []

    def replayed(said: str, node: int, body: bytes) -> bytes:
        if (said, node) != ("hello", 2):
            return body
        recorded.append(body)
        return b"garbage" if len(recorded) == 1 else recorded[0]

    hive = Hive(5)
    hive.wire.meddle = replayed
    hive.round()
    reply = hive.round(model={"w": MODEL["w"] + 1})
    require_mean(reply, [0, 2, 3, 4], model={"w": MODEL["w"] + 1})
    assert len(recorded) == 2
    assert [failure.split(":")[0] for failure in outcome_of(reply).failures] == ["hello"]


def test_of_two_nodes_with_one_index_one_takes_part() -> None:
    hive = Hive(5)
    hive.stores[3] = hive.stores[1]
    reply = hive.round()
    require_mean(reply, [0, 1, 2, 4])
    assert 4 not in hive.wire.asked("prepare")


def test_a_device_of_another_federation_is_no_member() -> None:
    ours, theirs = make_federation(5), make_federation(5)
    hive = Hive(5, federation=Federation(ours.root, ours.roster, (*ours.devices[:4], theirs.devices[4])))
    reply = hive.round()
    require_mean(reply, range(4))
    (failure,) = outcome_of(reply).failures
    assert failure.startswith("hello: ")


def test_a_descriptor_of_another_federation_is_refused_by_the_server_too() -> None:
    ours, theirs = Hive(5), Hive(5)
    theirs.round()
    foreign = body_of(theirs.wire.said("hello")[1])
    ours.wire.meddle = lambda said, node, body: foreign if (said, node) == ("hello", 2) else body
    reply = ours.round()
    require_mean(reply, [0, 2, 3, 4])
    assert outcome_of(reply).survivors == 4


def test_a_second_descriptor_of_an_index_is_refused() -> None:
    """Enrolled twice with one invitation: the server would have two devices to choose from."""
    hive = Hive(5)
    hive.round()
    directory = hive.grid._directory
    reply = from_bytes(HelloReply, body_of(hive.wire.said("hello")[1]))
    directory._descriptors[1] = b"another" * 4
    with pytest.raises(TrustError):
        directory.take_hello(2, b"c" * 32, reply)
    directory.spend(2)
    assert outcome_of(hive.round(model={"w": MODEL["w"] + 1})).failures == (
        "hello: device 1 comes with a second descriptor",
    )


class Slow(GridWrapper):
    """A reply to an upload of node 2 comes when the exchange is over, with the next pull."""

    def __init__(self, inner: Grid) -> None:
        super().__init__(inner)
        self.held: list[Message] = []
        self.delivered = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for reply in self.inner.pull_messages(message_ids):
            if exchange_of(reply) == "upload" and reply.metadata.src_node_id == 2:
                self.held.append(reply)
                continue
            if exchange_of(reply) == "unmask" and self.held:
                self.delivered += 1
                yield self.held.pop()
            yield reply


def test_a_reply_that_comes_in_a_later_exchange_is_discarded() -> None:
    hive = Hive(5)
    slow = hive.grid.inner = Slow(hive.wire)
    (reply,) = hive.grid.send_and_receive(hive.messages(), timeout=1.0)
    require_mean(reply, [0, 2, 3, 4])
    assert slow.delivered == 1


@pytest.mark.parametrize("application", [{}, {"server-round": 7}, {"server-round": 0}])
def test_rounds_have_rising_names_however_the_application_counts(application: dict[str, Any]) -> None:
    hive = Hive(3)
    for number in range(3):
        require_mean(
            hive.round(model={"w": MODEL["w"] + number}, **application), range(3), model={"w": MODEL["w"] + number}
        )


def test_an_app_without_the_mod_is_named() -> None:
    federation = make_federation(3)
    grid = SecureGrid(
        LocalGrid(partial(app_of, honest, None), 3), FedAvg(), federation.verified_roster, Protection(3.0)
    )
    messages = [grid.create_message(RecordDict({"arrays": record(MODEL)}), "train", node, "") for node in (1, 2, 3)]
    with pytest.raises(TooFewPeersError, match="said hello"):
        grid.send_and_receive(messages)


# Descriptors are sent once


def told(hive: Hive, node: int) -> list[int]:
    """How many descriptors each prepare request to a node had."""
    requests = [m for m in hive.wire.requests if exchange_of(m) == "prepare" and m.metadata.dst_node_id == node]
    return [len(from_bytes(PrepareRequest, body_of(request)).descriptors) for request in requests]


def forget_peers(hive: Hive, index: int, peers: Iterable[int]) -> None:
    def forget(device: Device) -> None:
        for peer in peers:
            del device.state.peers[peer]

    hive.stores[index].change(forget)


def test_a_device_that_forgot_its_peers_is_told_again_in_the_same_attempt() -> None:
    hive = Hive(5, attempts=1)
    require_mean(hive.round(), range(5))
    forget_peers(hive, 2, [4])
    forget_peers(hive, 3, [0, 1, 2, 4])
    for _ in range(2):
        reply = hive.round(model={"w": MODEL["w"] + 1})
        assert (outcome_of(reply).survivors, outcome_of(reply).failures) == (5, ())
    assert [told(hive, node) for node in (1, 3, 4)] == [[4, 0, 0], [4, 0, 4, 0], [4, 0, 4, 0]]


def test_a_device_that_fell_silent_is_told_again_of_what_it_may_not_have_heard() -> None:
    hive = Hive(5)
    hive.wire.lose = lambda exchange, node: (exchange, node) == ("prepare", 2)
    require_mean(hive.round(), [0, 2, 3, 4])
    hive.wire.lose = lambda exchange, node: False
    later = {"w": MODEL["w"] + 1}
    require_mean(hive.round(model=later), range(5), model=later)
    assert told(hive, 2) == [4, 4]
    assert told(hive, 1) == [4, 0]


def test_a_device_that_knows_no_peer_although_it_was_sent_them_all_is_not_asked_again() -> None:
    def shifty(exchange: str, message: Message) -> Message:
        """To node 3 nobody is ever introduced."""
        if (exchange, message.metadata.dst_node_id) != ("prepare", 3):
            return message
        return with_body(message, to_bytes(replace(from_bytes(PrepareRequest, body_of(message)), descriptors=())))

    hive = Hive(5)
    hive.wire.deliver = shifty
    reply = hive.round()
    require_mean(reply, [0, 1, 3, 4])
    assert outcome_of(reply).failures == ("prepare: unknown-peer",)
    assert told(hive, 3) == [4]


@pytest.mark.parametrize(("taken", "left"), [(20, [40]), (58, [2]), (59.5, []), (61, [])])
def test_asking_a_second_time_gets_what_the_first_has_left(
    taken: float, left: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that says it has forgotten its peers must not lengthen an attempt; in the next one it is told."""
    asked: list[float] = []

    class Timed(Channel):
        def ask(self, *arguments: Any) -> Iterator[tuple[int, bytes]]:
            yield from super().ask(*arguments)
            if arguments[0] is Exchange.PREPARE:
                asked.append(arguments[2])

    hive = Hive(5, attempts=1)
    hive.round()
    forget_peers(hive, 2, [0, 1, 3, 4])
    with monkeypatch.context() as patch:
        patch.setattr("propolis.server.grid.Channel", Timed)
        patch.setattr("propolis.server.secure_round.time", SimpleNamespace(monotonic=lambda: taken * len(asked)))
        reply = hive.round(model={"w": MODEL["w"] + 1})
    assert asked == [60, *left]
    assert outcome_of(reply).failures == (() if left else ("prepare: unknown-peer",))
    assert outcome_of(hive.round(model={"w": MODEL["w"] + 2})).survivors == 5
    assert told(hive, 3) == [4, 0, 4, 0] if left else [4, 0, 4]


def test_where_no_memory_of_who_was_told_is_left_everything_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("propolis.server.directory._MOST_TOLD_BYTES", 0)
    hive = Hive(5, attempts=1)
    for change in range(3):
        model = {"w": MODEL["w"] + change}
        require_mean(hive.round(model=model), range(5), model=model)
    assert told(hive, 1) == [4, 4, 4]


def test_another_grid_tells_everything_again() -> None:
    """As after a restart of the server: what devices know already is no surprise to them."""
    hive = Hive(5)
    hive.round()
    hive.grid = SecureGrid(hive.wire, FedAvg(), hive.federation.verified_roster, hive.protection)
    require_mean(hive.round(), range(5))
    assert told(hive, 1) == [4, 4]
