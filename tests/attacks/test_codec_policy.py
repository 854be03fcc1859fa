"""The codec's public terms are the server's to choose within the device's limits; all else is refused, or is noise."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from protocol import Cohort, Round, another_run, plain_encoding
from secure_app import Arrays, Hive, Work, arrays_of, body_of, exchange_of, honest, outcome_of

from propolis.flower import with_content
from propolis.messages import RECORD, broadcast_in, protocol_record, refusal_of
from propolis.secure.codec.encoding import Encoding
from propolis.secure.codec.profiles import PROFILES, Profile
from propolis.secure.codec.series import ModelSeries, Pace, Version
from propolis.secure.errors import Refusal, TooFewPeersError
from propolis.secure.secagg.plan import Kind
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.states import Exchange

SEED = b"s" * 32
RNG = np.random.default_rng(0)
MODEL = {"w": RNG.normal(size=(40, 50)).astype(np.float32), "b": RNG.normal(size=50).astype(np.float32)}
SIZES = (50, 2000)  # by rising name
# A server could prune nearly everything to ask for one value.
CRAFTED = {"w": np.eye(1, 2000, dtype=np.float32).reshape(40, 50), "b": np.ones(50, np.float32)}
ALL = [0, 1, 2, 3]


def encoding(**changes: Any) -> Encoding:
    return replace(plain_encoding(("a",), devices=4), seed=SEED, **changes)


def prepared(cohort: Cohort, how: Encoding, **names: Any) -> Round:
    """A round up to the devices' answers to its plan."""
    played = cohort.round(cohort.plan(encoding=how, **names))
    played.prepare()
    return played


def refusals(played: Round) -> set[Refusal]:
    assert len(played.refused) in (0, 4)
    return {error.refusal for error in played.refused.values()}


def noting(trained: list[int]) -> Work:
    """Honest devices that note that they train."""
    return lambda message, index: (trained.append(index), honest(message, index))[1]


def held_by(hive: Hive, index: int) -> Version:
    version = hive.stores[index].recall_model()
    assert version is not None
    return version


LIMITS: dict[str, tuple[Policy, dict[str, Any], dict[str, Any]]] = {
    "bits": (Policy(min_bits=8), {"width": 7, "levels": 15}, {"width": 8, "levels": 31}),
    "step": (Policy(max_step=0.5), {"step": 0.51}, {"step": 0.5}),
    "default step": (Policy(), {"step": 1.1e6}, {"step": 1e6}),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_device_refuses_terms_beyond_its_limits(limit: str) -> None:
    policy, beyond, within = LIMITS[limit]
    assert refusals(prepared(Cohort(4, policy), encoding(**beyond))) == {Refusal.POLICY}
    assert refusals(prepared(Cohort(4, policy), encoding(**within))) == set()


@pytest.mark.parametrize("draws", [{"density": 0.5}, {"rotated": True}], ids=str)
def test_a_seed_of_another_round_is_refused(draws: dict[str, Any]) -> None:
    """With one support again and again the same few values would be asked for."""
    cohort = Cohort(4)
    assert refusals(prepared(cohort, encoding(**draws))) == set()
    assert refusals(prepared(cohort, encoding(**draws), number=2)) == {Refusal.POLICY}
    assert refusals(prepared(cohort, replace(encoding(**draws), seed=b"o" * 32), number=2)) == set()


def test_a_retry_and_another_run_may_have_the_same_seed() -> None:
    cohort, how = Cohort(4), encoding(density=0.5, rotated=True)
    runs = another_run(b"r" * 8), another_run(b"s" * 8)
    again = [{"attempt": 1}, {"attempt": 2}, {"run_id": runs[0]}, {"run_id": runs[1], "number": 2}]
    for names in ({}, *again):
        assert refusals(prepared(cohort, how, **names)) == set()


def test_where_nothing_is_drawn_from_it_the_seed_does_not_matter() -> None:
    cohort = Cohort(4)
    for number in (1, 2):
        assert refusals(prepared(cohort, encoding(), number=number)) == set()


ROOM = [
    ({"width": 8, "levels": 31}, True),
    ({"width": 8, "levels": 32}, False),
    ({"width": 8, "levels": 127, "rotated": True}, True),
    ({"width": 8, "levels": 128, "rotated": True}, False),
    ({"width": 4, "levels": 7, "rotated": True}, True),
    ({"width": 4, "levels": 7}, False),
]


@pytest.mark.parametrize(("how", "has_room"), ROOM, ids=str)
def test_a_ring_that_a_sum_or_a_single_device_could_overflow_is_refused(how: dict[str, Any], has_room: bool) -> None:
    played = prepared(Cohort(4), encoding(**how))
    assert refusals(played) == (set() if has_room else {Refusal.MALFORMED})
    assert all("a ring of" in str(error) for error in played.refused.values())


def trained_by(codec: Profile, least: float, model: Arrays = MODEL, **config: Any) -> list[int]:
    """Which devices train; the others refuse by their policy."""
    trained: list[int] = []
    hive = Hive(4, noting(trained), policy=Policy(min_density=least), codec=codec, attempts=1)
    with suppress(TooFewPeersError):
        hive.round(model=model, **config)
    refused = [refusal_of(reply.error.code) for reply in hive.wire.replies if reply.has_error()]
    assert refused == [Refusal.POLICY] * (4 - len(trained))
    return sorted(trained)


SHARES = [(0.1, 0, 0.1, True), (0.1, 0, 0.1001, False), (0.05, 64, 0.07, True), (0.05, 64, 0.08, False)]


@pytest.mark.parametrize(("density", "keep", "least", "is_enough"), SHARES)
@pytest.mark.parametrize("codec", ["float32", "thin"])
def test_too_small_a_share_of_the_values_is_refused_before_training(
    density: float, keep: int, least: float, is_enough: bool, codec: str
) -> None:
    assert trained_by(replace(PROFILES[codec], density=density, keep=keep), least) == (ALL if is_enough else [])


@pytest.mark.parametrize("codec", ["float32", "dense"])
def test_a_model_crafted_of_zeros_does_not_single_a_few_values_out(codec: str) -> None:
    """What is pruned does not travel: 51 of 2050 values do."""
    assert trained_by(PROFILES[codec], 51.5 / 2050, CRAFTED, pruned=True) == []
    assert trained_by(PROFILES[codec], 50.5 / 2050, CRAFTED, pruned=True) == ALL
    assert trained_by(PROFILES[codec], 51.5 / 2050, CRAFTED) == ALL


NAMES: dict[str, tuple[Kind, tuple[str, ...], tuple[str, ...], bool]] = {
    "sorted": (Kind.TRAIN, ("a", "c"), ("b", "d"), True),
    "quantized in another order": (Kind.TRAIN, ("c", "a"), (), False),
    "exact in another order": (Kind.TRAIN, (), ("c", "a"), False),
    "twice": (Kind.TRAIN, ("a", "a"), (), False),
    "both": (Kind.TRAIN, ("a", "b"), ("b",), False),
    "none to evaluate": (Kind.EVALUATE, (), (), True),
    "quantized to evaluate": (Kind.EVALUATE, ("a",), (), False),
    "exact to evaluate": (Kind.EVALUATE, (), ("a",), False),
}


@pytest.mark.parametrize("names", NAMES)
def test_arrays_out_of_order_named_twice_or_asked_for_by_an_evaluation_are_refused(names: str) -> None:
    kind, quantized, exact, is_right = NAMES[names]
    played = prepared(Cohort(4), encoding(quantized=quantized, exact=exact), kind=kind)
    assert refusals(played) == (set() if is_right else {Refusal.MALFORMED})


# Another model for one device, as a broadcast


def with_broadcast(message: Message, data: bytes, body: bytes | None = None) -> Message:
    ours = protocol_record(Exchange.UPLOAD, body_of(message) if body is None else body, data)
    return with_content(message, RecordDict({**message.content, RECORD: ours}))


def another(values: np.ndarray, change: float) -> bytes:
    """A broadcast of another model, whose digest is right."""
    other = (values + np.float32(change)).astype(np.float32)
    return ModelSeries(b"another series 1", 1.0, SIZES, Pace(other, other, (1.0, 1.0))).message_for(None).to_bytes()


def deceiving(victims: Collection[int], change: float) -> Hive:
    """After a round; in the next ones some devices are shown another model."""
    hive = Hive(5, codec=PROFILES["dense"], attempts=1)
    hive.round(model=MODEL)
    held = held_by(hive, 0)
    hive.wire.deliver = lambda exchange, message: (
        with_broadcast(message, another(held.values, change))
        if exchange == "upload" and message.metadata.dst_node_id in victims
        else message
    )
    return hive


@pytest.mark.parametrize("victims", [{4}, {1, 2}, {2, 3, 4, 5}], ids=str)
@pytest.mark.parametrize("change", [1.0, 1e-6])
def test_a_device_that_is_shown_another_broadcast_makes_the_sum_noise(victims: set[int], change: float) -> None:
    hive = deceiving(victims, change)
    replies = len(hive.wire.replies)
    with pytest.raises(TooFewPeersError, match="the sum is noise: some device saw another model"):
        hive.round(model=MODEL)
    assert not any(reply.has_error() for reply in hive.wire.replies[replies:])
    hive.wire.deliver = lambda exchange, message: message
    reply = hive.round(model=MODEL)
    assert outcome_of(reply).survivors == 5


def test_the_same_model_by_another_way_is_the_same() -> None:
    """What is bound to the masks is the model, not how it came: a newcomer's whole and the others' steps agree."""
    hive = deceiving({4}, 0.0)
    assert outcome_of(hive.round(model=MODEL)).survivors == 5


def test_a_model_that_is_not_what_its_digest_says_is_not_trained_on() -> None:
    hive = Hive(5, codec=PROFILES["dense"], attempts=1)
    model = arrays_of(hive.round(model=MODEL))

    def swapped(exchange: str, message: Message) -> Message:
        if exchange != "upload" or message.metadata.dst_node_id != 4:
            return message
        data = broadcast_in(message.content)
        return with_broadcast(message, data[:-1] + bytes([data[-1] ^ 1]))

    hive.wire.deliver = swapped
    reply = hive.round(model=model)
    assert (outcome_of(reply).survivors, outcome_of(reply).failures) == (4, ("upload: base",))
    assert hive.wire.asked("upload")[-2:].count(4) == 1
    hive.wire.deliver = lambda exchange, message: message
    assert outcome_of(hive.round(model=arrays_of(reply))).survivors == 5


def intruder(hive: Hive, how: str) -> Message:
    """A message to the second device with another model, which is not the next one of its round."""
    asked = [m for m in hive.wire.requests if exchange_of(m) == "upload" and m.metadata.dst_node_id == 2]
    body = {"garbage": b"\xff" * 40, "old": body_of(asked[0])}.get(how)
    message = with_broadcast(asked[-1], another(held_by(hive, 1).values, 1.0), body)
    return hive.grid.create_message(message.content, "evaluate" if how == "another kind" else "train", 2, "")


@pytest.mark.parametrize("how", ["garbage", "old", "again", "another kind"])
@pytest.mark.parametrize("within", [False, True], ids=["between rounds", "within one"])
def test_a_message_that_is_not_accepted_leaves_the_devices_model_as_it_is(how: str, within: bool) -> None:
    trained: list[int] = []
    hive = Hive(4, noting(trained), codec=PROFILES["dense"])
    model = arrays_of(hive.round(model=arrays_of(hive.round(model=MODEL))))
    trained.clear()

    def intrude() -> None:
        before = held_by(hive, 1)
        (reply,) = hive.wire.inner.send_and_receive([intruder(hive, how)], timeout=60)
        assert reply.has_error()
        assert held_by(hive, 1) is before
        assert not trained

    def delivered(exchange: str, message: Message) -> Message:
        if exchange == "prepare" and within and message.metadata.dst_node_id == 4:  # the second is in the new round
            intrude()
        return message

    hive.wire.deliver = delivered
    if not within:
        intrude()
    assert outcome_of(hive.round(model=model)).survivors == 4
    assert sorted(trained) == ALL
    assert not any(reply.has_error() for reply in hive.wire.replies)
