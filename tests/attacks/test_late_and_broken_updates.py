"""What comes late is discarded, what is broken is a drop-out, and an error says a code and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from attacks.insiders import refuses
from flwr.app import Message, RecordDict
from protocol import Cohort, Round
from secure_app import MODEL, Hive, answer, arrays_of, exchange_of, honest, metrics_of, outcome_of, require_mean

from propolis.messages import refusal_of
from propolis.secure.codec.quantize import wrap_free
from propolis.secure.errors import PeerError, Refusal, TooFewPeersError, UsageError
from propolis.secure.secagg.messages import UploadReply, from_bytes, to_bytes


def prepared(cohort: Cohort) -> Round:
    attempt = cohort.round()
    attempt.prepare()
    return attempt


def upload_of(attempt: Round, index: int) -> UploadReply:
    return from_bytes(UploadReply, attempt.masked(index, to_bytes(attempt.server.upload_request(index))))


# Late


def test_an_upload_after_the_close_is_discarded_and_the_sum_is_the_others() -> None:
    attempt = prepared(Cohort(5))
    late = upload_of(attempt, 3)
    attempt.upload(silent=[3])
    attempt.server.close_uploads()
    with refuses(Refusal.PHASE, "too late"):
        attempt.server.receive_upload(3, late)
    attempt.unmask()
    np.testing.assert_array_equal(attempt.sum()[0], attempt.expected())
    assert attempt.server.alive == (0, 1, 2, 4)


def test_an_upload_that_comes_twice_counts_once() -> None:
    attempt = prepared(Cohort(4))
    reply = upload_of(attempt, 0)
    attempt.server.receive_upload(0, reply)
    with refuses(Refusal.PHASE, "its second one"):
        attempt.server.receive_upload(0, reply)
    attempt.upload(silent=[0])
    attempt.server.close_uploads()
    attempt.unmask()
    np.testing.assert_array_equal(attempt.sum()[0], attempt.expected())


def test_an_upload_of_the_attempt_before_is_discarded() -> None:
    cohort = Cohort(4)
    before = prepared(cohort)
    late = upload_of(before, 0)
    again = cohort.round(attempt=1)
    again.prepare()
    again.server.upload_request(0)
    with refuses(Refusal.PHASE, "of another round"):
        again.server.receive_upload(0, late)


def test_an_upload_before_it_was_asked_for_is_discarded() -> None:
    attempt = prepared(Cohort(4))
    with refuses(Refusal.PHASE):
        attempt.server.receive_upload(0, UploadReply(attempt.terms.digest, bytes(16), bytes(24), ()))


# Broken


@pytest.mark.parametrize(
    "change",
    [
        {"vector": b""},
        {"vector": bytes(14)},
        {"vector": bytes(18)},
        {"lanes": b""},
        {"lanes": bytes(16)},
        {"lanes": bytes(32)},
        {"metrics": ("loss",)},
    ],
    ids=str,
)
def test_an_upload_of_another_size_leaves_the_sum_untouched(change: dict[str, bytes]) -> None:
    attempt = prepared(Cohort(5))
    broken = replace(upload_of(attempt, 1), **change)
    with pytest.raises(PeerError):
        attempt.server.receive_upload(1, broken)
    attempt.upload(silent=[1])
    attempt.server.close_uploads()
    attempt.unmask()
    np.testing.assert_array_equal(attempt.sum()[0], attempt.expected())


def changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message], RecordDict]:
    def work(message: Message) -> RecordDict:
        arrays = arrays_of(message)
        return answer({**arrays, "w": change(arrays["w"].copy())}, num_examples=1, loss=0.0)

    return work


def weighing(weight: float) -> Callable[[Message], RecordDict]:
    return lambda message: answer(arrays_of(message), num_examples=weight, loss=0.0)


BROKEN: dict[str, tuple[Callable[[Message], RecordDict], Refusal]] = {
    "nan": (changed(lambda w: w * np.float32("nan")), Refusal.NOT_FINITE),
    "inf": (changed(lambda w: w + np.float32("inf")), Refusal.NOT_FINITE),
    "shape": (changed(lambda w: w.T), Refusal.MODEL),
    "type": (changed(lambda w: w.astype(np.complex64)), Refusal.MODEL),
    "empty": (lambda message: answer({}, num_examples=1, loss=0.0), Refusal.MODEL),
    "weight 0": (weighing(0), Refusal.WEIGHT),
    "weight -1": (weighing(-1), Refusal.WEIGHT),
    "weight nan": (weighing(float("nan")), Refusal.WEIGHT),
}


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize("fault", BROKEN)
def test_broken_updates_of_two_devices_cost_those_two(fault: str, malicious: bool) -> None:
    work, refusal = BROKEN[fault]
    hive = Hive(8, lambda message, i: work(message) if i in (0, 5) else honest(message, i), malicious=malicious)
    reply = hive.round()
    require_mean(reply, [1, 2, 3, 4, 6, 7])
    assert outcome_of(reply).failures == (f"upload: {refusal.reason}",) * 2
    for error in (each for each in hive.wire.replies if each.has_error()):
        assert refusal_of(error.error.code) is refusal
        assert error.error.reason == refusal.reason


def test_a_round_of_broken_updates_alone_says_why() -> None:
    with pytest.raises(TooFewPeersError, match=r"0 of 4 devices sent a masked update.*upload: not-finite"):
        Hive(4, lambda message, index: BROKEN["nan"][0](message)).round()


# A ring that is too small


@pytest.mark.parametrize(("width", "devices"), [(2, 2), (4, 8), (8, 128)])
def test_a_ring_without_room_for_one_level_from_each_device_is_no_grid(width: int, devices: int) -> None:
    with pytest.raises(UsageError, match=f"a ring of {width} bits is too small for {devices} devices"):
        wrap_free(width, devices, 1.0)
    assert wrap_free(width, devices - 1, 1.0).levels == 1


@pytest.mark.of_vectors
def test_a_device_refuses_a_plan_whose_ring_could_overflow() -> None:
    attempt = Cohort(8).round(width=16)
    plan = attempt.cohort.plan()
    narrow = replace(plan, encoding=replace(plan.encoding, width=4, levels=1))
    request = replace(attempt.server.prepare_request(0), plan=narrow.to_bytes())
    with refuses(Refusal.MALFORMED, "too small for 8 devices"):
        attempt.cohort.device(0).prepare(to_bytes(request))


def test_the_narrowest_ring_with_room_adds_up_without_overflow() -> None:
    """Seven devices that all send the largest change: one level each in four bits."""

    def largest(message: Message, index: int) -> RecordDict:
        return answer({"w": arrays_of(message)["w"] + 1}, num_examples=7)

    reply = Hive(7, largest, bits=4).round(model={"w": MODEL["w"]})
    np.testing.assert_allclose(arrays_of(reply)["w"], MODEL["w"] + 1, atol=1e-6)
    assert metrics_of(reply)["saturated"] == 0


def test_too_narrow_a_ring_for_its_devices_is_the_servers_own_mistake() -> None:
    with pytest.raises(UsageError, match="a ring of 4 bits is too small for 8 devices"):
        Hive(8, bits=4).round()


def test_a_device_whose_weight_makes_the_sum_impossible_costs_an_attempt() -> None:
    """A member may mask what it likes; here its weight is minus a hundred others'."""
    from propolis.client import update

    encode, told = update.encode_update, []

    def lying(*arguments: object) -> object:
        vector, lanes, names = encode(*arguments)  # type: ignore[arg-type]
        told.append(1)
        if len(told) == 2:
            lanes[1] = np.uint64(2**64 - 100 * 2**30)
        return vector, lanes, names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "encode_update", lying)
        require_mean(Hive(5).round(), range(5))


def test_every_exchange_but_the_upload_is_the_protocols_alone() -> None:
    hive = Hive(3)
    hive.round()
    for message in hive.wire.requests:
        assert len(message.content) == (3 if exchange_of(message) == "upload" else 1)
