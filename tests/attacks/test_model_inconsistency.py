"""A server that shows one device another model gets noise (Pasquini et al., CCS 2022)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attacks.uniformity import looks_uniform
from protocol import SHARED_INPUT, Cohort, Round, another_run, pairwise_mask, plain_encoding

from propolis.secure import labels
from propolis.secure.codec.lanes import LANES
from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.prg import LANE_STREAM, VECTOR_STREAM, Mask, apply_masks
from propolis.secure.ring import Vector
from propolis.secure.secagg.client import SecAggClient
from propolis.secure.secagg.masks import mask_private, public_half, self_mask
from propolis.secure.secagg.messages import UploadReply, from_bytes, to_bytes
from propolis.secure.secagg.plan import Terms

DIMENSION = 4096
OTHER_INPUT = b"j" * 32
VICTIMS = [(0,), (6,), (0, 1, 2), (0, 1, 2, 3, 4, 5)]

Uploads = dict[int, Vector]


def begin(victims: Collection[int], malicious: bool = False) -> tuple[Round, Uploads]:
    """A prepared round in which the victims are given another model, and where the masked uploads will be kept."""
    played = Cohort(7).round(width=32, dimension=DIMENSION, lanes=1024, malicious=malicious)
    uploads: Uploads = {}

    def keep(step: str, index: int, data: bytes) -> bytes:
        if step == "upload reply":
            uploads[index] = np.frombuffer(from_bytes(UploadReply, data).vector, "<u4").copy()
        return data

    played.meddle = keep
    played.inputs = {index: np.full(DIMENSION, index, np.uint32) for index in range(7)}
    played.shared_inputs = dict.fromkeys(victims, OTHER_INPUT)
    played.prepare()
    return played, uploads


def inconsistent(victims: Collection[int], malicious: bool = False) -> tuple[Round, Uploads]:
    """The same round up to the sum: nobody notices anything."""
    played, uploads = begin(victims, malicious)
    played.upload()
    played.server.close_uploads()
    if malicious:
        played.confirm()
    played.unmask()
    assert not played.refused
    return played, uploads


def input_of(played: Round, index: int) -> bytes:
    return played.shared_inputs.get(index, SHARED_INPUT)


def assert_noise(played: Round, shared_input: bytes) -> None:
    """The server notices that the sum is none, and looking at it all the same it learns nothing."""
    with pytest.raises(PeerError, match="the sum is noise") as caught:
        played.server.sum(shared_input)
    assert caught.value.refusal is Refusal.MODEL
    masks = list(played.server._masks_left(shared_input))
    vector, lanes = played.server._total.without(masks, 1), played.server._lanes
    assert lanes is not None
    lanes = lanes.copy()
    apply_masks(lanes, masks, LANES, LANE_STREAM)
    assert looks_uniform(vector.tobytes())
    assert looks_uniform(lanes.tobytes())


def without_self_masks(played: Round, uploads: Uploads, summed: Collection[int], right: bool = True) -> Vector:
    """What the server makes of some uploads with all the seeds, which it has, and each device's own model, or not."""
    ring, digest = played.terms.grid.ring, played.terms.digest
    total = ring.zeros(DIMENSION)
    for index in summed:
        seed = played.server._reconstruct(index)
        request = labels.digest(labels.REQUEST, to_bytes(played.server.upload_request(index)))
        mask = self_mask(seed, index, digest, input_of(played, index) if right else SHARED_INPUT, request)
        total += uploads[index]
        apply_masks(total, [Mask(mask.seed, -mask.sign)], ring, VECTOR_STREAM)
    return total


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize("victims", VICTIMS, ids=str)
@pytest.mark.parametrize("shared_input", [SHARED_INPUT, OTHER_INPUT, b"k" * 32])
def test_with_two_models_the_sum_is_noise(victims: tuple[int, ...], malicious: bool, shared_input: bytes) -> None:
    played, _ = inconsistent(victims, malicious)
    assert_noise(played, shared_input)


def test_with_one_model_the_sum_is_the_sum() -> None:
    """Whichever model it is: what the tests above find is the inconsistency."""
    played, uploads = inconsistent(())
    assert set(without_self_masks(played, uploads, range(7))) == {sum(range(7))}
    assert set(played.server.sum(SHARED_INPUT)[0]) == {sum(range(7))}
    played, _ = inconsistent(range(7))
    assert set(played.server.sum(OTHER_INPUT)[0]) == {sum(range(7))}


def test_with_one_model_another_digest_unmasks_nothing() -> None:
    played, _ = inconsistent(())
    assert_noise(played, OTHER_INPUT)


@pytest.mark.parametrize("victims", VICTIMS, ids=str)
def test_a_server_that_knows_who_got_which_model_learns_nothing_either(victims: tuple[int, ...]) -> None:
    """Not the sum of all, of the victims, of the others, nor any single update."""
    played, uploads = inconsistent(victims)
    others = [index for index in range(7) if index not in victims]
    for summed in (range(7), victims, others, *([index] for index in range(7))):
        assert looks_uniform(without_self_masks(played, uploads, summed).tobytes())


@pytest.mark.parametrize("victim", [0, 3, 6])
def test_even_a_model_dependent_own_mask_alone_would_hide_the_victim(victim: int) -> None:
    """All the neighbours collude and take their pairwise masks away: with the others' model nothing opens."""
    played, uploads = begin((victim,))
    states = played.cohort.federation.devices
    roles = [SecAggClient.from_bytes(state.round, state.signing_key.private) for state in states]
    played.upload()
    played.server.close_uploads()
    played.unmask()
    vector = uploads[victim].copy()
    for other in range(7):
        if other != victim:
            key = public_half(roles[other].mask_private)
            secret = roles[victim].mask_private
            pair = pairwise_mask(victim, secret, other, key, played.terms.digest, OTHER_INPUT)
            apply_masks(vector, [Mask(pair.seed, -pair.sign)], played.terms.grid.ring, VECTOR_STREAM)
    assert looks_uniform(without_self_masks(played, {victim: vector}, [victim], right=False).tobytes())
    assert set(without_self_masks(played, {victim: vector}, [victim])) == {victim}


@pytest.mark.parametrize("victim", [0, 6])
def test_a_victim_that_is_called_dropped_is_left_out_and_stays_hidden(victim: int) -> None:
    """The sum of the others is then what every drop-out leaves: an honest sum of six. The victim's upload is noise."""
    played, _ = begin((victim,))
    request = to_bytes(played.server.upload_request(victim))
    upload = from_bytes(UploadReply, played.masked(victim, request))  # put aside
    vector = np.frombuffer(upload.vector, "<u4").copy()
    played.upload(silent=[victim])
    played.server.close_uploads()
    played.unmask()
    assert set(played.server.sum(SHARED_INPUT)[0]) == {sum(range(7)) - victim}
    key = mask_private(played.server._reconstruct(victim), victim, played.terms.digest)
    for other in range(7):
        if other != victim:
            head = played.server._members[other].head
            assert head is not None
            pair = pairwise_mask(victim, key, other, head.mask_key, played.terms.digest, OTHER_INPUT)
            apply_masks(vector, [Mask(pair.seed, -pair.sign)], played.terms.grid.ring, VECTOR_STREAM)
    assert looks_uniform(vector.tobytes())  # the seed's shares are nowhere


CHANGES: list[dict[str, Any]] = [
    {"width": 17},
    {"kind": 2},
    {"malicious": True},
    {"number": 2},
    {"attempt": 1},
    {"run_id": another_run()},
    {"corrupted_ppm": 1},
    {"dropped_ppm": 1},
    {"cohort": range(6)},
    {"roster_number": 1},
    {"roster_digest": bytes(32)},
    {"encoding": plain_encoding(("a",), range_=2.0)},
    {"encoding": plain_encoding(("a",), max_weight=2.0)},
    {"encoding": plain_encoding(("a",), weight_key="weight")},
    {"encoding": plain_encoding(("a", "b"))},
    {"encoding": plain_encoding(("a",), ("b",))},
    {"encoding": replace(plain_encoding(("a",)), clip=1.0)},
    {"encoding": replace(plain_encoding(("a",)), rotated=True)},
    {"encoding": replace(plain_encoding(("a",)), density=0.5)},
    {"encoding": replace(plain_encoding(("a",)), keep=1)},
    {"encoding": replace(plain_encoding(("a",)), pruned=True)},
    {"encoding": replace(plain_encoding(("a",)), seed=b"s" * 32)},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_devices_that_were_told_different_plans_never_mask_for_each_other(change: dict[str, Any]) -> None:
    """Everything in the plan is under the digest that heads are signed over."""
    cohort = Cohort(7)
    played = cohort.round()
    played.prepare()
    other = Terms(cohort.plan(**change).to_bytes())
    assert other.digest != played.terms.digest
    role = SecAggClient.from_bytes(cohort.federation.devices[0].round, bytes(32))
    request = played.server.upload_request(0)
    role.check_upload(request)
    role.terms = other
    with pytest.raises(TrustError, match="does not hold") as caught:
        role.check_upload(replace(request, round_tag=other.tag, heads=request.heads[: len(other.neighbours(0))]))
    assert caught.value.refusal is Refusal.KEYS
