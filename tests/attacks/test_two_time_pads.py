"""No mask is used for two uploads, and no exchange is answered twice, whatever the server repeats or restores."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attacks.uniformity import looks_uniform
from protocol import MODEL, SHARED_INPUT, Cohort, Round, another_run, pairwise_mask, shares_in

from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.identity import agreement_key
from propolis.secure.prg import VECTOR_STREAM, Mask, apply_masks
from propolis.secure.ring import Ring, Vector
from propolis.secure.secagg.addition import RingVector
from propolis.secure.secagg.client import SecAggClient
from propolis.secure.secagg.device import Device, Upload
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.masks import box_info, public_half, seed_commitment, self_mask, share_hash
from propolis.secure.secagg.messages import (
    PrepareReply,
    UnmaskReply,
    UnmaskRequest,
    UploadReply,
    UploadRequest,
    from_bytes,
    marks,
    to_bitmap,
    to_bytes,
)
from propolis.secure.shamir import combine
from propolis.simulations.federation import Federation

DIMENSION = 4096
OTHER_INPUT = b"j" * 32
Answer = Callable[[Device, bytes], bytes]


def answer_upload(device: Device, request: bytes, shared_input: bytes = SHARED_INPUT, value: int = 0) -> bytes:
    if (stored := device.begin_upload(request, shared_input)) is not None:
        return stored
    return device.upload(request, an_upload(shared_input, value))


def an_upload(shared_input: bytes, value: int = 0) -> Upload:
    update = RingVector(np.full(DIMENSION, value, np.uint32), Ring(32))
    return Upload(shared_input, MODEL, update, np.zeros(2, np.uint64), ())


ANSWERS: dict[str, Answer] = {
    "prepare": Device.prepare,
    "upload": answer_upload,
    "confirm": Device.confirm,
    "unmask": Device.unmask,
}


def prepared(devices: int = 7, malicious: bool = False) -> Round:
    """A round whose devices prepared; t = 5 of k = 6 with seven of them."""
    played = Cohort(devices).round(width=32, dimension=DIMENSION, malicious=malicious)
    played.prepare()
    return played


def until(exchange: str, malicious: bool = True) -> tuple[Round, bytes]:
    """A round just before an exchange, and the request of that exchange to device 0."""
    played = Cohort(7).round(width=32, dimension=DIMENSION, malicious=malicious)
    request: Any = played.server.prepare_request(0)
    if exchange != "prepare":
        played.prepare()
        request = played.server.upload_request(0)
    if exchange in ("confirm", "unmask"):
        played.upload()
        played.server.close_uploads()
        request = played.server.confirm_request()
    if exchange == "unmask":
        if malicious:
            played.confirm()
        request = played.server.unmask_request(0)
    return played, to_bytes(request)


def changed(exchange: str, played: Round, request: bytes) -> bytes:
    """Another request for the same exchange of the same round, which the device would have answered, too."""
    if exchange == "prepare":
        asked = played.server.prepare_request(0)
        return to_bytes(replace(asked, descriptors=asked.descriptors[::-1]))
    if exchange == "upload":
        return to_bytes(skipping(6, from_bytes(UploadRequest, request)))
    if exchange == "confirm":
        return to_bytes(replace(played.server.confirm_request(), alive=to_bitmap(range(6), 7)))
    genuine = from_bytes(UnmaskRequest, request)
    return to_bytes(replace(genuine, dropped=marks([6], range(1, 7))))


def skipping(index: int, request: UploadRequest) -> UploadRequest:
    """The request to device 0 in which this neighbour did not prepare."""
    heads = (head for other, head in enumerate(request.heads, 1) if other != index)
    return replace(request, silent=marks([index], range(1, 7)), heads=tuple(heads))


# One answer per exchange.


@pytest.mark.parametrize("exchange", ANSWERS)
@pytest.mark.parametrize("restarted", [False, True])
def test_the_same_request_gets_the_same_bytes(exchange: str, restarted: bool) -> None:
    played, request = until(exchange)
    first = ANSWERS[exchange](played.cohort.device(0), request)
    state = played.cohort.federation.devices[0]
    if restarted:
        state = DeviceState.from_bytes(state.to_bytes())
    before = state.to_bytes()
    device = Device(state, played.cohort.policy, played.cohort.now)
    assert [ANSWERS[exchange](device, request) for _ in range(2)] == [first, first]
    assert state.to_bytes() == before


@pytest.mark.parametrize(
    ("exchange", "malicious"),
    [("prepare", False), ("upload", False), ("unmask", False), ("upload", True), ("confirm", True), ("unmask", True)],
)
def test_another_request_for_an_answered_exchange_is_refused(exchange: str, malicious: bool) -> None:
    played, request = until(exchange, malicious)
    another = changed(exchange, played, request)
    twin = deepcopy(played.cohort.federation.devices[0])
    if exchange != "unmask" or not malicious:  # a confirmed set is the only one that is unmasked
        ANSWERS[exchange](Device(twin, played.cohort.policy, played.cohort.now), another)
    device = played.cohort.device(0)
    ANSWERS[exchange](device, request)
    before = device.state.to_bytes()
    for again in (device, played.cohort.device(0)):  # two that come at once meet one state
        with pytest.raises(PeerError) as caught:
            ANSWERS[exchange](again, another)
        assert caught.value.refusal is Refusal.REPEATED
    assert device.state.to_bytes() == before


@pytest.mark.parametrize("finished", [False, True])
def test_a_second_upload_with_another_model_or_other_neighbours_is_refused(finished: bool) -> None:
    """Also when the device has only begun to train for the first."""
    played, request = until("upload")
    device, other_heads = played.cohort.device(0), changed("upload", played, request)
    device.begin_upload(request, SHARED_INPUT)
    stored = device.upload(request, an_upload(SHARED_INPUT)) if finished else b""
    others = [(request, OTHER_INPUT), (other_heads, SHARED_INPUT), (other_heads, OTHER_INPUT)]
    for asked, shared_input in others if finished else [*others, (request, SHARED_INPUT)]:
        with pytest.raises(PeerError) as caught:
            played.cohort.device(0).begin_upload(asked, shared_input)
        assert caught.value.refusal is Refusal.REPEATED
    for asked, shared_input in [*others, (request, SHARED_INPUT)] if finished else others:
        with pytest.raises(PeerError, match="not the one that was begun") as caught:
            played.cohort.device(0).upload(asked, an_upload(shared_input))
        assert caught.value.refusal is Refusal.REPEATED
    if finished:
        assert device.begin_upload(request, SHARED_INPUT) == stored
    else:
        assert device.upload(request, an_upload(SHARED_INPUT))


def test_an_upload_that_was_not_begun_is_not_masked() -> None:
    played, request = until("upload")
    with pytest.raises(PeerError, match="not the one that was begun"):
        played.cohort.device(0).upload(request, an_upload(SHARED_INPUT))


@pytest.mark.parametrize(("exchange", "then"), [("prepare", "upload"), ("prepare", "unmask"), ("confirm", "unmask")])
def test_a_request_that_comes_again_after_the_next_exchange_is_refused(exchange: str, then: str) -> None:
    """Its answer is no longer there, and no other one is given."""
    played = Cohort(7).round(width=32, dimension=DIMENSION, malicious=True)
    requests = {"prepare": to_bytes(played.server.prepare_request(0))}
    played.prepare()
    played.upload()
    played.server.close_uploads()
    if then == "unmask":
        requests["confirm"] = to_bytes(played.server.confirm_request())
        played.confirm()
        played.unmask()
    with pytest.raises(PeerError, match="has gone on") as caught:
        ANSWERS[exchange](played.cohort.device(0), requests[exchange])
    assert caught.value.refusal is Refusal.PHASE


def test_the_role_masks_once() -> None:
    played, request = until("upload")
    role = SecAggClient.from_bytes(played.cohort.federation.devices[0].round, bytes(32))
    asked = from_bytes(UploadRequest, request)
    role.upload(asked, SHARED_INPUT, RingVector(np.zeros(4, np.uint32), Ring(32)), np.zeros(1, np.uint64), ())
    with pytest.raises(PeerError, match="upload is not what comes next"):
        role.upload(asked, SHARED_INPUT, RingVector(np.ones(4, np.uint32), Ring(32)), np.zeros(1, np.uint64), ())


# Rounds rise.


@pytest.mark.parametrize(
    ("number", "attempt"), [(5, 3), (5, 2), (5, 0), (4, 3), (4, 9), (0, 0)], ids=lambda value: str(value)
)
def test_a_round_or_attempt_that_does_not_rise_is_refused(number: int, attempt: int) -> None:
    cohort = Cohort(4)
    cohort.round(cohort.plan(5, 3)).through()
    old = cohort.round(cohort.plan(number, attempt, dropped_ppm=240_000))  # another plan, so another request
    before = cohort.federation.devices[0].to_bytes()
    with pytest.raises(PeerError, match="is not a new one") as caught:
        cohort.device(0).prepare(to_bytes(old.server.prepare_request(0)))
    assert caught.value.refusal is Refusal.STALE
    assert cohort.federation.devices[0].to_bytes() == before


@pytest.mark.parametrize(("number", "attempt"), [(5, 4), (6, 0), (2**31, 2**31)], ids=lambda value: str(value))
def test_a_higher_round_or_attempt_is_a_new_one(number: int, attempt: int) -> None:
    cohort = Cohort(4)
    cohort.round(cohort.plan(5, 3)).through()
    played = cohort.round(cohort.plan(number, attempt))
    vector, _ = played.through()
    assert vector.tolist() == played.expected().tolist()


def test_a_retry_of_a_round_with_the_same_name_is_refused_after_other_runs() -> None:
    cohort = Cohort(4)
    run_id = cohort.run_id
    cohort.round().prepare()
    cohort.round(run_id=another_run()).prepare()
    retry = cohort.round(run_id=run_id, width=17)
    retry.prepare()
    assert {error.refusal for error in retry.refused.values()} == {Refusal.STALE}
    assert len(retry.refused) == 4


def test_every_attempt_has_fresh_keys() -> None:
    cohort, heads = Cohort(4), []
    for attempt in range(3):
        played = cohort.round(cohort.plan(1, attempt))
        played.prepare()
        roles = [SecAggClient.from_bytes(device.round, bytes(32)) for device in cohort.federation.devices]
        heads += [secret for role in roles for secret in (role.seed, role.mask_secret, role.own.prekey_private)]
    assert len(set(heads)) == 3 * 4 * 3


def test_secrets_are_gone_as_soon_as_they_have_served() -> None:
    """After the upload the device could not mask again if it wanted to; after the unmasking it opens nothing."""
    played = prepared()
    (before, *_) = roles_of(played)
    assert (len(before.seed), len(before.mask_secret), len(before.own.prekey_private)) == (16, 16, 32)
    played.upload()
    played.server.close_uploads()
    (between, *_) = roles_of(played)
    assert (between.seed, between.mask_secret) == (b"", b"")
    played.unmask()
    (after, *_) = roles_of(played)
    assert after.own.prekey_private == b""
    kept = played.cohort.federation.devices[0].to_bytes()
    assert not any(secret in kept for secret in (before.seed, before.mask_secret, before.own.prekey_private))


# A device that was restored from an older copy.


def device_of(played: Round, state: DeviceState) -> Device:
    return Device(state, played.cohort.policy, played.cohort.now)


def roles_of(played: Round) -> list[SecAggClient]:
    """The devices' secrets, while they have them."""
    return [SecAggClient.from_bytes(device.round, bytes(32)) for device in played.cohort.federation.devices]


def masked(device: Device, request: bytes, shared_input: bytes = SHARED_INPUT, value: int = 0) -> Vector:
    reply = from_bytes(UploadReply, answer_upload(device, request, shared_input, value))
    return np.frombuffer(reply.vector, "<u4").copy()


def assert_hidden(one: Vector, other: Vector) -> None:
    """Of the two plain vectors, which are constant, the difference of the masked ones says nothing."""
    assert looks_uniform((one - other).tobytes())
    assert looks_uniform((one + other).tobytes())


@pytest.mark.parametrize("through_bytes", [False, True])
@pytest.mark.parametrize("shared_input", [SHARED_INPUT, OTHER_INPUT])
@pytest.mark.parametrize("silent", [None, 1, 6])
def test_rolled_back_to_before_the_upload_another_request_gets_another_mask(
    silent: int | None, shared_input: bytes, through_bytes: bool
) -> None:
    played = prepared()
    state, request = played.cohort.federation.devices[0], played.server.upload_request(0)
    older = DeviceState.from_bytes(state.to_bytes()) if through_bytes else deepcopy(state)
    another = request if silent is None else skipping(silent, request)
    first = masked(device_of(played, state), to_bytes(request))
    second = masked(device_of(played, older), to_bytes(another), shared_input, value=9)
    if another == request and shared_input == SHARED_INPUT:
        assert set(second - first) == {9}  # the very same question gets the very same mask
    else:
        assert_hidden(first, second)


@pytest.mark.of_vectors
@pytest.mark.parametrize("case", ["another neighbour set", "another model"])
def test_colluding_neighbours_do_not_lift_the_masks_of_a_device_that_was_rolled_back(case: str) -> None:
    """They take their pairwise masks away from both uploads; what is left differs in the device's own mask."""
    played = prepared()
    state, request = played.cohort.federation.devices[0], played.server.upload_request(0)
    older, roles = deepcopy(state), roles_of(played)
    another, shared_input = skipping(6, request), SHARED_INPUT
    if case == "another model":
        another, shared_input = request, OTHER_INPUT
    first = masked(device_of(played, state), to_bytes(request))
    second = masked(device_of(played, older), to_bytes(another), shared_input, value=9)
    without = len(another.heads) + 1
    for vector, asked, last in ((first, SHARED_INPUT, 7), (second, shared_input, without)):
        for index in range(1, last):
            public = public_half(roles[index].mask_private)
            lift(played, vector, pairwise_mask(0, roles[0].mask_private, index, public, played.terms.digest, asked))
    assert_hidden(first, second)


@pytest.mark.of_vectors
@pytest.mark.parametrize("case", ["another neighbour set", "another model"])
def test_the_seed_does_not_lift_the_masks_of_a_device_that_was_rolled_back(case: str) -> None:
    """The server learns the seed in the end; the mask with a neighbour, or with the other model, stays."""
    played = prepared()
    state, request = played.cohort.federation.devices[0], played.server.upload_request(0)
    older, seed = deepcopy(state), SecAggClient.from_bytes(state.round, bytes(32)).seed
    another, shared_input = skipping(6, request), SHARED_INPUT
    if case == "another model":
        another, shared_input = request, OTHER_INPUT
    first = masked(device_of(played, state), to_bytes(request))
    second = masked(device_of(played, older), to_bytes(another), shared_input, value=9)
    for vector, asked, given in ((first, request, SHARED_INPUT), (second, another, shared_input)):
        digest = labels.digest(labels.REQUEST, to_bytes(asked))
        lift(played, vector, self_mask(seed, 0, played.terms.digest, given, digest))
    assert_hidden(first, second)


def test_rolled_back_to_before_prepare_all_secrets_are_new() -> None:
    """The server can't even begin: the neighbours hold a head of the first."""
    played = Cohort(7).round(width=32, dimension=DIMENSION)
    state = played.cohort.federation.devices[0]
    older, asked = deepcopy(state), to_bytes(played.server.prepare_request(0))
    replies = [from_bytes(PrepareReply, device_of(played, each).prepare(asked)) for each in (state, older)]
    assert replies[0].head != replies[1].head
    played.server.receive_prepare(0, replies[0])
    for index in range(1, 7):
        request = to_bytes(played.server.prepare_request(index))
        played.server.receive_prepare(index, from_bytes(PrepareReply, played.cohort.device(index).prepare(request)))
    with pytest.raises(PeerError, match="has prepared already") as caught:
        played.server.receive_prepare(0, replies[1])
    assert caught.value.refusal is Refusal.REPEATED
    request = to_bytes(played.server.upload_request(0))
    first, second = (masked(device_of(played, each), request, value=each is older) for each in (state, older))
    assert_hidden(first, second)


@pytest.mark.parametrize("rolled_back", [1, 2, 4])
def test_a_rolled_back_device_reveals_its_own_share_of_both_kinds_and_no_more(rolled_back: int) -> None:
    """t = 5: as long as fewer devices are rolled back, only one of device 6's secrets comes to light."""
    played = prepared()
    victim = roles_of(played)[6]
    played.upload()
    older = deepcopy(played.cohort.federation.devices)
    seeds, keys = {}, {}
    for index in range(6):
        genuine = played.server.unmask_request(index)
        reply = from_bytes(UnmaskReply, played.cohort.device(index).unmask(to_bytes(genuine)))
        seeds[index] = shares_in(reply, played.masking(index))[6]
        if index < rolled_back:
            lie = replace(genuine, dropped=marks([6], played.masking(index)))
            reply = from_bytes(UnmaskReply, device_of(played, older[index]).unmask(to_bytes(lie)))
            keys[index] = shares_in(reply, played.masking(index))[6]
    assert combine([(index + 1, share) for index, share in seeds.items()][:5]) == victim.seed
    assert len(keys) == rolled_back < played.terms.sharing.threshold
    assert not set(keys.values()) & set(seeds.values())
    assert reconstructed(keys) != victim.mask_secret


def test_t_rolled_back_devices_are_what_it_takes() -> None:
    """The other side of the boundary, so that the test above tells something."""
    played = prepared()
    victim = roles_of(played)[6]
    played.upload()
    keys = {}
    for index in range(5):
        genuine = played.server.unmask_request(index)
        lie = replace(genuine, dropped=marks([6], played.masking(index)))
        reply = from_bytes(UnmaskReply, played.cohort.device(index).unmask(to_bytes(lie)))
        keys[index] = shares_in(reply, played.masking(index))[6]
    assert reconstructed(keys) == victim.mask_secret


def reconstructed(shares: dict[int, bytes]) -> bytes | None:
    try:
        return combine([(index + 1, share) for index, share in shares.items()])
    except PeerError:
        return None


def test_a_federation_restored_from_an_old_backup_starts_over_with_new_masks() -> None:
    cohort, uploads = Cohort(4), []
    backup = deepcopy(cohort.federation.devices)
    for _ in range(2):
        cohort.federation = Federation(cohort.federation.root, cohort.federation.roster, deepcopy(backup))
        played = cohort.round(width=32, dimension=DIMENSION)
        played.prepare()
        uploads.append(masked(cohort.device(0), to_bytes(played.server.upload_request(0))))
    assert_hidden(*uploads)


# What a mask is bound to.


def lift(played: Round, vector: Vector, mask: Mask) -> None:
    """Take a mask that was added away from an upload."""
    apply_masks(vector, [Mask(mask.seed, -mask.sign)], played.terms.grid.ring, VECTOR_STREAM)


PRIVATE, PUBLIC = agreement_key()
_, OTHER_PUBLIC = agreement_key()
THIRD_PRIVATE, _ = agreement_key()
ONE, TWO = b"1" * 32, b"2" * 32
CONTEXTS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = {
    "self": (self_mask, (ONE, 1, ONE, ONE, ONE), (TWO, 2, TWO, TWO, TWO)),
    "pairwise": (
        pairwise_mask,
        (1, PRIVATE, 2, OTHER_PUBLIC, ONE, ONE),
        (3, THIRD_PRIVATE, 4, PUBLIC, TWO, TWO),
    ),
    "commitment": (seed_commitment, (ONE, 1, ONE), (TWO, 2, TWO)),
    "share": (share_hash, (ONE, 1, 2, b"seed", ONE), (TWO, 3, 4, b"key", TWO)),
    "box": (box_info, (1, ONE, 2, ONE, ONE), (3, TWO, 4, TWO, TWO)),
}
ARGUMENTS = [(name, place) for name, (_, one, _) in CONTEXTS.items() for place in range(len(one))]


@pytest.mark.parametrize(("name", "place"), ARGUMENTS)
def test_whatever_differs_in_the_context_changes_the_mask(name: str, place: int) -> None:
    function, one, other = CONTEXTS[name]
    result = function(*one)
    assert function(*one) == result
    different = function(*one[:place], other[place], *one[place + 1 :])
    assert getattr(different, "seed", different) != getattr(result, "seed", result)


def test_the_two_ends_of_a_pair_derive_opposite_masks() -> None:
    (one_private, one_public), (two_private, two_public) = agreement_key(), agreement_key()
    mask = pairwise_mask(3, one_private, 8, two_public, ONE, TWO)
    assert pairwise_mask(8, two_private, 3, one_public, ONE, TWO) == Mask(mask.seed, -mask.sign)
    assert mask.sign == 1


def test_two_encodings_of_one_key_do_not_give_one_mask() -> None:
    """X25519 ignores the highest bit; the keys as they were sent are part of the context all the same."""
    other_encoding = PUBLIC[:-1] + bytes([PUBLIC[-1] ^ 0x80])
    masks = [pairwise_mask(1, THIRD_PRIVATE, 2, key, ONE, TWO) for key in (PUBLIC, other_encoding)]
    assert masks[0] != masks[1]


@pytest.mark.parametrize("key", [0, 1, 2**255 - 19])
def test_a_mask_key_of_low_order_is_refused(key: int) -> None:
    with pytest.raises(PeerError, match="low order") as caught:
        pairwise_mask(1, PRIVATE, 2, key.to_bytes(32, "little"), ONE, TWO)
    assert caught.value.refusal is Refusal.KEYS
