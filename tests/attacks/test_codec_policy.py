"""The codec's public terms are the server's to choose within the device's limits; all else is refused, or is noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from protocol import Cohort, Round, plain_encoding
from secure_app import Hive, arrays_of, body_of, exchange_of, honest, outcome_of

from propolis.messages import RECORD, broadcast_in, protocol_record
from propolis.secure.codec.broadcast import values_digest
from propolis.secure.codec.encoding import Encoding
from propolis.secure.codec.profiles import PROFILES
from propolis.secure.codec.series import Broadcast, ModelSeries, Pace
from propolis.secure.errors import Refusal, TooFewPeersError
from propolis.secure.secagg.messages import UploadReply, from_bytes
from propolis.secure.secagg.plan import Kind
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.states import Exchange
from propolis.server.flower import with_content
from propolis.simulations.federation import SIMULATED

SEED = b"s" * 32
RNG = np.random.default_rng(0)
MODEL = {"w": RNG.normal(size=(40, 50)).astype(np.float32), "b": RNG.normal(size=50).astype(np.float32)}
SIZES = (50, 2000)  # by rising name


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


def test_a_server_that_starts_anew_may_come_to_the_same_seed() -> None:
    cohort, how = Cohort(4), encoding(density=0.5)
    assert refusals(prepared(cohort, how)) == set()
    assert refusals(prepared(cohort, how, run_id=b"r" * 16, number=2)) == set()


def test_the_same_seed_is_that_of_a_retry() -> None:
    cohort, how = Cohort(4), encoding(density=0.5, rotated=True)
    for attempt in range(3):
        assert refusals(prepared(cohort, how, attempt=attempt)) == set()


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


def test_a_round_that_asks_for_too_small_a_share_of_the_values_is_refused_before_training() -> None:
    trained: list[int] = []

    def work(message: Message, index: int) -> RecordDict:
        trained.append(index)
        return honest(message, index)

    for codec, model in ((replace(PROFILES["thin"], density=0.19, keep=0), MODEL), (PROFILES["dense"], CRAFTED)):
        hive = Hive(5, work, codec=codec, attempts=1, policy=replace(SIMULATED, min_density=0.2))
        with pytest.raises(TooFewPeersError, match="upload: policy"):
            hive.round(model=model, pruned=True)
    assert not trained
    enough = Hive(
        5, work, codec=replace(PROFILES["thin"], density=0.21, keep=0), policy=replace(SIMULATED, min_density=0.2)
    )
    assert outcome_of(enough.round(model=MODEL)).survivors == 5


# A server could prune nearly everything to ask for one value.
CRAFTED = {"w": np.eye(1, 2000, dtype=np.float32).reshape(40, 50), "b": np.ones(50, np.float32)}


@pytest.mark.parametrize(
    "names",
    [
        {"quantized": ("b", "a")},
        {"quantized": ("a", "a")},
        {"exact": ("a",)},
        {"exact": ("c", "b")},
        {"kind": Kind.EVALUATE},
    ],
    ids=str,
)
def test_arrays_out_of_order_named_twice_or_asked_for_by_an_evaluation_are_refused(names: dict[str, Any]) -> None:
    kind = names.get("kind", Kind.TRAIN)
    how = encoding(**{name: value for name, value in names.items() if name != "kind"})
    assert refusals(prepared(Cohort(4), how, kind=kind)) == {Refusal.MALFORMED}
    assert refusals(prepared(Cohort(4), encoding())) == set()


# Another model for one device, as a broadcast


def with_broadcast(message: Message, data: bytes) -> Message:
    ours = protocol_record(Exchange.UPLOAD, body_of(message), data)
    return with_content(message, RecordDict({**message.content, RECORD: ours}))


def another(values: np.ndarray, change: float) -> bytes:
    """A broadcast of another model, whose digest is right."""
    other = (values + np.float32(change)).astype(np.float32)
    return ModelSeries(b"another series 1", 1.0, SIZES, Pace(other, other, (1.0, 1.0))).message_for(None).to_bytes()


@pytest.mark.parametrize("victims", [{4}, {1, 2}, {2, 3, 4, 5}], ids=str)
@pytest.mark.parametrize("change", [1.0, 1e-6])
def test_a_device_that_is_shown_another_broadcast_makes_the_sum_noise(victims: set[int], change: float) -> None:
    hive = Hive(5, codec=PROFILES["dense"], attempts=1)
    hive.round(model=MODEL)
    held = hive.stores[0].recall_model()
    assert held is not None
    hive.wire.deliver = lambda exchange, message: (
        with_broadcast(message, another(held.values, change))
        if exchange == "upload" and message.metadata.dst_node_id in victims
        else message
    )
    replies = len(hive.wire.replies)
    with pytest.raises(TooFewPeersError, match="the sum is noise: some device saw another model"):
        hive.round(model=MODEL)
    assert not any(reply.has_error() for reply in hive.wire.replies[replies:])
    hive.wire.deliver = lambda exchange, message: message
    reply = hive.round(model=MODEL)
    assert outcome_of(reply).survivors == 5


def test_the_same_model_by_another_way_is_the_same() -> None:
    """What is bound to the masks is the model, not how it came: a newcomer's whole and the others' steps agree."""
    hive = Hive(5, codec=PROFILES["dense"], attempts=1)
    hive.round(model=MODEL)
    held = hive.stores[0].recall_model()
    assert held is not None
    hive.wire.deliver = lambda exchange, message: (
        with_broadcast(message, another(held.values, 0.0))
        if exchange == "upload" and message.metadata.dst_node_id == 4
        else message
    )
    assert outcome_of(hive.round(model=MODEL)).survivors == 5


def test_a_model_that_is_not_what_its_digest_says_is_not_trained_on() -> None:
    hive = Hive(5, codec=PROFILES["dense"], attempts=1)
    model = arrays_of(hive.round(model=MODEL))
    wrong: list[bytes] = []

    def swapped(exchange: str, message: Message) -> Message:
        if exchange != "upload" or message.metadata.dst_node_id != 4:
            return message
        wrong.append(broadcast_in(message.content))
        return with_broadcast(message, wrong[-1][:-1] + bytes([wrong[-1][-1] ^ 1]))

    hive.wire.deliver = swapped
    outcome = outcome_of(hive.round(model=model))
    assert (outcome.survivors, outcome.failures) == (4, ("upload: base",))
    assert len(wrong) == 2


def test_a_message_that_is_not_accepted_leaves_the_devices_model_as_it_is() -> None:
    hive = Hive(5, codec=PROFILES["dense"], attempts=1)
    model = arrays_of(hive.round(model=MODEL))
    held = hive.stores[0].recall_model()
    assert held is not None
    (asked, *_) = [m for m in hive.wire.requests if exchange_of(m) == "upload"]
    other = Broadcast(
        held.series, held.number, held.number + 1, (), b"r" + bytes(4 * 2050), values_digest(np.zeros(2050, np.float32))
    )
    junk = with_content(
        asked, RecordDict({**asked.content, RECORD: protocol_record(Exchange.UPLOAD, b"junk", other.to_bytes())})
    )
    (message_id,) = hive.wire.inner.push_messages([junk])
    (reply,) = hive.wire.inner.pull_messages([message_id])
    assert reply.has_error()
    assert hive.stores[0].recall_model() is held
    outcome = outcome_of(hive.round(model=model))
    assert (outcome.survivors, outcome.failures) == (5, ())


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
