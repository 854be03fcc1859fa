"""Everything is bound to its run, round, attempt, sender and receiver: moved elsewhere it is refused, or useless."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from attacks.insiders import found, others, read_head, refuses, signed_head, signing_key, upload_with
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message
from protocol import Cohort, Round, another_run, deliveries_in, pairwise_mask, shares_in, with_shares

from propolis.protos import identity_pb2, secagg_pb2
from propolis.secure import labels
from propolis.secure.envelope import seal
from propolis.secure.errors import PeerError, Refusal, RefusedError
from propolis.secure.identity import (
    Descriptor,
    Invitation,
    Prekey,
    Roster,
    Signed,
    SigningKey,
    agreement_key,
    descriptor_digest,
    fingerprint,
    prekey_context,
    prove_presence,
    require_presence,
    sign,
    verify,
)
from propolis.secure.merkle import HASH_BYTES
from propolis.secure.secagg.confirmation import confirm_alive, require_confirmation
from propolis.secure.secagg.masks import box_info, mask_private, public_half, seed_commitment, self_mask, share_hash
from propolis.secure.secagg.messages import (
    BOX_BYTES,
    RECORD_BYTES,
    TAG_BYTES,
    ConfirmReply,
    Head,
    PrepareReply,
    PrepareRequest,
    UnmaskReply,
    UploadReply,
    from_bytes,
    to_bytes,
)
from propolis.secure.secagg.plan import Kind, Plan, Terms
from propolis.secure.secagg.preparation import (
    head_context,
    preparation_tree,
    records_of,
    require_record,
    server_record,
)
from propolis.secure.shamir import SHARE_BYTES
from propolis.secure.wire import decode

PAIR = b"s" * SHARE_BYTES + b"k" * SHARE_BYTES
BASE = Cohort(4).plan()

# One thing about the plan differs.
OTHER_PLANS: dict[str, dict[str, Any]] = {
    "run": {"run_id": another_run()},
    "round": {"number": 2},
    "attempt": {"attempt": 1},
    "kind": {"kind": Kind.EVALUATE},
    "roster": {"roster_digest": b"r" * 32},
    "cohort": {"cohort": (0, 1, 2)},
    "mode": {"malicious": True},
    "encoding": {"width": 17},
}
other_plan = pytest.mark.parametrize("change", OTHER_PLANS.values(), ids=OTHER_PLANS)


@pytest.mark.of_vectors
@other_plan
def test_another_plan_has_another_digest(change: dict[str, Any]) -> None:
    cohort = Cohort(4)
    assert Terms(cohort.plan().to_bytes()).digest == Terms(cohort.plan().to_bytes()).digest
    assert Terms(cohort.plan(**change).to_bytes()).digest != Terms(cohort.plan().to_bytes()).digest


# Derived values: each of these changes with each of its arguments.

KEY, OTHER_KEY, PLAN, DIGEST = b"\x40" * 32, b"\x48" * 32, b"p" * 32, b"d" * 32
DERIVED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = {
    "pairwise mask": (
        lambda *args: pairwise_mask(*args).seed,
        (1, KEY, 2, public_half(KEY), PLAN, DIGEST),
        (3, OTHER_KEY, 4, public_half(OTHER_KEY), DIGEST, PLAN),
    ),
    "self mask": (
        lambda *args: self_mask(*args).seed,
        (KEY, 1, PLAN, DIGEST, b"request"),
        (OTHER_KEY, 2, DIGEST, PLAN, b"another"),
    ),
    "mask key": (mask_private, (KEY[:16], 1, PLAN), (OTHER_KEY[:16], 2, DIGEST)),
    "seed commitment": (seed_commitment, (KEY, 1, PLAN), (OTHER_KEY, 2, DIGEST)),
    "share hash": (share_hash, (KEY, 1, 2, b"seed", PLAN), (OTHER_KEY, 2, 3, b"key", DIGEST)),
    "box": (box_info, (1, KEY, 2, KEY, PLAN), (2, OTHER_KEY, 3, OTHER_KEY, DIGEST)),
}
ARGUMENTS = [(name, place) for name, (_, args, _) in DERIVED.items() for place in range(len(args))]


@pytest.mark.parametrize(("name", "place"), ARGUMENTS)
def test_what_is_derived_depends_on_every_argument(name: str, place: int) -> None:
    derive, args, changed = DERIVED[name]
    assert derive(*args) == derive(*args)
    assert derive(*args) != derive(*args[:place], changed[place], *args[place + 1 :])


def test_what_is_derived_depends_on_the_order_of_sender_and_receiver() -> None:
    assert share_hash(KEY, 1, 2, b"seed", PLAN) != share_hash(KEY, 2, 1, b"seed", PLAN)
    assert box_info(1, KEY, 2, OTHER_KEY, PLAN) != box_info(2, OTHER_KEY, 1, KEY, PLAN)


def test_the_two_ends_of_a_pairwise_mask_agree_on_it() -> None:
    ours = pairwise_mask(1, KEY, 2, public_half(OTHER_KEY), PLAN, DIGEST)
    theirs = pairwise_mask(2, OTHER_KEY, 1, public_half(KEY), PLAN, DIGEST)
    assert (ours.seed, ours.sign) == (theirs.seed, -theirs.sign)


# Signatures.

SIGNED: dict[bytes, tuple[object, type[Message]]] = {
    labels.INVITATION: (Invitation(DIGEST, 1, "name", KEY), identity_pb2.Invitation),
    labels.DESCRIPTOR: (Descriptor(DIGEST, 1, KEY, KEY), identity_pb2.Descriptor),
    labels.ROSTER: (Roster(DIGEST, 1, 1, ()), identity_pb2.Roster),
    labels.PREKEY: (Prekey(1, KEY), identity_pb2.Prekey),
    labels.HEAD: (Head(KEY, DIGEST[:HASH_BYTES]), secagg_pb2.Head),
}


@pytest.mark.parametrize(("label", "other"), permutations(SIGNED, 2))
def test_a_signature_under_another_label_does_not_hold(label: bytes, other: bytes) -> None:
    key, (message, proto) = SigningKey.generate(), SIGNED[label]
    assert verify(label, key.public, sign(label, key.private, message, proto), type(message), proto, Refusal.KEYS)
    with refuses(Refusal.KEYS, "signature"):
        verify(label, key.public, sign(other, key.private, message, proto), type(message), proto, Refusal.KEYS)


@pytest.mark.parametrize(
    "context", [(), (PLAN,), (KEY, PLAN), (PLAN, KEY[:-1]), (PLAN + KEY,), (PLAN, KEY, b"")], ids=len
)
def test_a_signature_in_another_context_does_not_hold(context: tuple[bytes, ...]) -> None:
    """What both ends know is signed without travelling."""
    key, (head, proto) = SigningKey.generate(), SIGNED[labels.HEAD]
    signed = sign(labels.HEAD, key.private, head, proto, PLAN, KEY)
    assert verify(labels.HEAD, key.public, signed, Head, proto, Refusal.KEYS, PLAN, KEY) == head
    with refuses(Refusal.KEYS, "signature"):
        verify(labels.HEAD, key.public, signed, Head, proto, Refusal.KEYS, *context)


def test_the_contexts_of_heads_and_prekeys_say_whose_they_are_and_where() -> None:
    assert len({head_context(index, plan) for index in (1, 2) for plan in (PLAN, DIGEST)}) == 4
    assert len({prekey_context(federation, index) for index in (1, 2) for federation in (PLAN, DIGEST)}) == 4


CONFIRMED = (PLAN, b"\x0f")


@pytest.mark.parametrize(
    ("plan", "alive"), [(DIGEST, b"\x0f"), (PLAN, b"\x0e"), (PLAN, b"\x0f\0"), (PLAN[:-1], PLAN[-1:] + b"\x0f")]
)
def test_a_confirmation_holds_for_its_round_and_alive_set_only(plan: bytes, alive: bytes) -> None:
    key = SigningKey.generate()
    require_confirmation(key.public, confirm_alive(key.private, *CONFIRMED), *CONFIRMED)
    with refuses(Refusal.SETS):
        require_confirmation(key.public, confirm_alive(key.private, plan, alive), *CONFIRMED)


@pytest.mark.parametrize("label", [each for each in vars(labels).values() if isinstance(each, bytes)])
def test_a_confirmation_holds_under_its_label_only(label: bytes) -> None:
    key, signed = SigningKey.generate(), labels.joined(label, *CONFIRMED)
    signature = Ed25519PrivateKey.from_private_bytes(key.private).sign(signed)
    if label == labels.CONFIRMATION:
        require_confirmation(key.public, signature, *CONFIRMED)
    else:
        with refuses(Refusal.SETS):
            require_confirmation(key.public, signature, *CONFIRMED)


def test_a_proof_of_presence_holds_for_its_challenge_prekey_and_device_only() -> None:
    ours, theirs = SigningKey.generate(), SigningKey.generate()
    prekey, other = Signed(KEY, KEY * 2), Signed(PLAN, KEY * 2)
    device = Descriptor(DIGEST, 1, ours.public, KEY)
    proof = prove_presence(ours, device, DIGEST, prekey)
    require_presence(device, DIGEST, prekey, proof)
    for key, challenge, claimed in ((theirs, DIGEST, prekey), (ours, PLAN, prekey), (ours, DIGEST, other)):
        with refuses(Refusal.IDENTITY):
            require_presence(Descriptor(DIGEST, 1, key.public, KEY), challenge, claimed, proof)
    for clone in (Descriptor(DIGEST, 2, ours.public, KEY), Descriptor(PLAN, 1, ours.public, KEY)):
        with refuses(Refusal.IDENTITY):  # somebody else who registered this device's key as its own
            require_presence(clone, DIGEST, prekey, proof)


def test_a_confirmation_holds_for_its_signer_only() -> None:
    signature = confirm_alive(SigningKey.generate().private, *CONFIRMED)
    with refuses(Refusal.SETS):
        require_confirmation(SigningKey.generate().public, signature, *CONFIRMED)


# Heads, requests and replies of another round.


def elsewhere(cohort: Cohort, change: dict[str, Any]) -> Round:
    """The same devices, asked to prepare for another plan: what comes of it is theirs, but not this round's."""
    copied = Cohort(4, cohort.policy, deepcopy(cohort.federation))
    attempt = copied.round(**{"run_id": another_run(), **change})
    attempt.prepare()
    assert not attempt.refused
    return attempt


def prepared(cohort: Cohort, **changes: Any) -> Round:
    attempt = cohort.round(**changes)
    attempt.prepare()
    assert not attempt.refused
    return attempt


@pytest.mark.of_vectors
@other_plan
def test_a_head_of_another_plan_is_refused_by_device_and_server(change: dict[str, Any]) -> None:
    cohort = Cohort(4)
    digest = Terms(cohort.plan(**change).to_bytes()).digest
    attempt = cohort.round()
    attempt.prepare(silent=(1,))
    reply = from_bytes(PrepareReply, cohort.device(1).prepare(to_bytes(attempt.server.prepare_request(1))))
    stray = signed_head(attempt, 1, read_head(reply.head), plan=digest)
    with refuses(Refusal.KEYS, "does not hold"):
        attempt.server.receive_prepare(1, replace(reply, head=stray))
    attempt.server.receive_prepare(1, reply)
    with refuses(Refusal.KEYS, "does not hold"):
        cohort.device(0).begin_upload(upload_with(attempt, 0, lambda _: stray), DIGEST)


REPLAYED = {"run": {}, "round": {"number": 2}, "attempt": {"attempt": 1}, "kind": {"kind": Kind.EVALUATE}}
replayed = pytest.mark.parametrize("change", REPLAYED.values(), ids=REPLAYED)


@replayed
def test_a_head_replayed_from_another_round_is_refused(change: dict[str, Any]) -> None:
    cohort = Cohort(4)
    stray = elsewhere(cohort, {"run_id": cohort.run_id, **change} if change else {}).server._members[1].signed_head
    with refuses(Refusal.KEYS, "does not hold"):
        cohort.device(0).begin_upload(upload_with(prepared(cohort), 0, lambda _: stray), DIGEST)


@replayed
@pytest.mark.parametrize("exchange", ["upload", "confirm", "unmask"])
def test_a_request_of_another_round_is_refused(exchange: str, change: dict[str, Any]) -> None:
    cohort = Cohort(4)
    digest = Terms(cohort.plan(**(change or {"run_id": another_run()})).to_bytes()).digest
    attempt = prepared(cohort, malicious=True)
    steps = {
        "upload": (lambda: attempt.server.upload_request(0), lambda data: cohort.device(0).begin_upload(data, DIGEST)),
        "confirm": (lambda: attempt.server.confirm_request(), lambda data: cohort.device(0).confirm(data)),
        "unmask": (lambda: attempt.server.unmask_request(0), lambda data: cohort.device(0).unmask(data)),
    }
    for name, (request, answer) in steps.items():
        if name == exchange:
            with refuses(Refusal.PHASE, "of another round"):
                answer(to_bytes(replace(request(), round_tag=digest[:TAG_BYTES])))
            break
        getattr(attempt, name)()
        if name == "upload":
            attempt.server.close_uploads()


@replayed
def test_the_server_takes_no_reply_of_another_round(change: dict[str, Any]) -> None:
    cohort = Cohort(4)
    digest = Terms(cohort.plan(**(change or {"run_id": another_run()})).to_bytes()).digest
    attempt = prepared(cohort, malicious=True)
    server = attempt.server
    attempt.upload(silent=(3,))
    request = to_bytes(server.upload_request(3))
    with refuses(Refusal.PHASE, "of another round"):
        server.receive_upload(
            3, replace(from_bytes(UploadReply, attempt.masked(3, request)), round_tag=digest[:TAG_BYTES])
        )
    assert 3 not in server.alive
    server.receive_upload(3, from_bytes(UploadReply, attempt.masked(3, request)))
    server.close_uploads()
    signature = confirm_alive(signing_key(cohort, 0), digest, server.confirm_request().alive)
    with refuses(Refusal.SETS, "does not hold"):
        server.receive_confirm(0, ConfirmReply(digest[:TAG_BYTES], signature))
    attempt.confirm()
    reply = from_bytes(UnmaskReply, cohort.device(0).unmask(to_bytes(server.unmask_request(0))))
    with refuses(Refusal.PHASE, "of another round"):
        server.receive_unmask(0, replace(reply, round_tag=digest[:TAG_BYTES]))
    assert not server._members[0].shares


@pytest.mark.parametrize("other", ["round", "alive set", "signer"])
def test_a_confirmation_from_elsewhere_reveals_nothing(other: str) -> None:
    cohort = Cohort(4)
    attempt = prepared(cohort, malicious=True)
    attempt.upload()
    attempt.server.close_uploads()
    plan, alive = attempt.terms.digest, attempt.server.confirm_request().alive
    forged = {
        "round": confirm_alive(signing_key(cohort, 1), DIGEST, alive),
        "alive set": confirm_alive(signing_key(cohort, 1), plan, b"\x07"),
        "signer": confirm_alive(signing_key(cohort, 2), plan, alive),
    }[other]
    with refuses(Refusal.SETS):
        attempt.server.receive_confirm(1, ConfirmReply(attempt.terms.tag, forged))
    attempt.confirm()
    request = attempt.server.unmask_request(0)
    confirmations = tuple(
        replace(each, signature=forged) if each.index == 1 else each for each in request.confirmations
    )
    with refuses(Refusal.SETS, "does not hold"):
        cohort.device(0).unmask(to_bytes(replace(request, confirmations=confirmations)))
    assert from_bytes(UnmaskReply, cohort.device(0).unmask(to_bytes(request))).shares


# Records: device 1 deals, device 0 holds. What device 1 signs, it may choose.


def dealt(cohort: Cohort, plan: Plan | None, record: Callable[[Round, bytes], bytes]) -> Round:
    """A round up to its unmask exchange, in which device 1 signed another record for device 0."""
    attempt = cohort.round(plan)

    def forge(step: str, index: int, data: bytes) -> bytes:
        if (step, index) != ("prepare reply", 1):
            return data
        reply = from_bytes(PrepareReply, data)
        records = records_of(reply.deliveries)
        records[0] = record(attempt, records[0])
        deliveries, last = b"".join(records), server_record(reply.seed_commitment, reply.next_prekey)
        root = preparation_tree(1, attempt.terms.digest, deliveries, last).root
        head = signed_head(attempt, 1, replace(read_head(reply.head), root=root))
        return to_bytes(replace(reply, head=head, deliveries=deliveries))

    attempt.meddle = forge
    attempt.prepare()
    attempt.upload()
    attempt.server.close_uploads()
    assert not attempt.refused
    return attempt


def revealed(attempt: Round) -> dict[int, bytes]:
    """The shares that device 0 reveals, by dealer."""
    return revealed_by(attempt, 0)


def record_of_pair(info: Callable[[bytes, bytes, bytes], bytes]) -> Callable[[Round, bytes], bytes]:
    """Device 1 seals a pair of its choice to device 0's prekey, in the context `info(ours, theirs, plan)`."""

    def make(attempt: Round, honest: bytes) -> bytes:
        devices = attempt.cohort.federation.devices
        digests = (descriptor_digest(devices[index].descriptor) for index in (1, 0))
        signed = attempt.server._members[0].keys.prekey
        prekey = decode(Prekey, signed.payload, identity_pb2.Prekey)
        return seal(PAIR, prekey.public_key, info(*digests, attempt.terms.digest)) + honest[BOX_BYTES:]

    return make


def test_a_pair_in_its_own_context_opens() -> None:
    attempt = dealt(Cohort(4), None, record_of_pair(lambda ours, theirs, plan: box_info(1, ours, 0, theirs, plan)))
    assert revealed(attempt)[1] == PAIR[:SHARE_BYTES]


@pytest.mark.parametrize(
    "info",
    [
        lambda ours, theirs, plan: box_info(1, ours, 0, theirs, Terms(BASE.to_bytes()).digest),
        lambda ours, theirs, plan: box_info(2, ours, 0, theirs, plan),
        lambda ours, theirs, plan: box_info(1, DIGEST, 0, theirs, plan),
        lambda ours, theirs, plan: box_info(1, ours, 2, theirs, plan),
        lambda ours, theirs, plan: box_info(1, ours, 0, DIGEST, plan),
        lambda ours, theirs, plan: box_info(0, theirs, 1, ours, plan),
        lambda ours, theirs, plan: labels.joined(labels.SHARE, box_info(1, ours, 0, theirs, plan)),
        lambda ours, theirs, plan: b"",
    ],
    ids=["round", "sender", "sender's keys", "receiver", "receiver's keys", "direction", "label", "none"],
)
def test_a_box_of_another_context_is_left_out(info: Callable[[bytes, bytes, bytes], bytes]) -> None:
    assert set(revealed(dealt(Cohort(4), None, record_of_pair(info)))) == {2, 3}


@replayed
def test_a_box_moved_from_another_round_is_left_out(change: dict[str, Any]) -> None:
    cohort = Cohort(4)
    old = elsewhere(cohort, {"run_id": cohort.run_id, **change} if change else {})
    assert set(revealed(dealt(cohort, None, lambda *_: old.server._members[1].record(0)))) == {2, 3}


def test_a_box_moved_to_another_device_is_left_out() -> None:
    def of_device_2(attempt: Round, honest: bytes) -> bytes:
        request = to_bytes(attempt.server.prepare_request(1))
        reply = from_bytes(PrepareReply, attempt.cohort.device(1).prepare(request))  # the stored one
        assert records_of(reply.deliveries)[0] == honest
        return records_of(reply.deliveries)[1]

    assert set(revealed(dealt(Cohort(4), None, of_device_2))) == {2, 3}


def test_a_box_moved_from_another_dealer_is_left_out() -> None:
    def of_dealer_2(attempt: Round, _: bytes) -> bytes:
        request = to_bytes(attempt.server.prepare_request(2))
        return records_of(from_bytes(PrepareReply, attempt.cohort.device(2).prepare(request)).deliveries)[0]

    assert set(revealed(dealt(Cohort(4), None, of_dealer_2))) == {2, 3}


# Delivery: what the server passes on must be what the dealer signed.


def delivered(change: Callable[[Round, Any], Any], **plan: Any) -> tuple[Round, bytes]:
    """A round before unmask, and a request to device 0 whose first delivery, device 1's, is changed."""
    attempt = prepared(Cohort(4), **plan)
    attempt.upload()
    attempt.server.close_uploads()
    request = attempt.server.unmask_request(0)
    first, *rest = deliveries_in(request, attempt.terms, 0, attempt.masking(0))
    return attempt, to_bytes(replace(request, deliveries=b"".join([change(attempt, first), *rest])))


def with_bit_flipped(delivery: bytes, bit: int) -> bytes:
    changed = bytearray(delivery)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize(
    "bit", [0, 8 * BOX_BYTES - 1, 8 * BOX_BYTES, 8 * (BOX_BYTES + HASH_BYTES), 8 * RECORD_BYTES - 1]
)
def test_a_record_with_a_flipped_bit_is_refused(bit: int) -> None:
    attempt, request = delivered(lambda _, delivery: with_bit_flipped(delivery, bit))
    with refuses(Refusal.SHARES, "not under the root"):
        attempt.cohort.device(0).unmask(request)


@pytest.mark.parametrize(
    "change",
    [
        lambda attempt, delivery: attempt.server._delivery(2, 0),
        lambda attempt, delivery: attempt.server._delivery(3, 0),
        lambda attempt, delivery: attempt.server._delivery(1, 2),
        lambda attempt, delivery: attempt.server._delivery(1, 3),
        lambda attempt, delivery: delivery[:-HASH_BYTES],
        lambda attempt, delivery: delivery + bytes(HASH_BYTES),
        lambda attempt, delivery: delivery[:RECORD_BYTES],
    ],
    ids=["dealer 2", "dealer 3", "receiver 2", "receiver 3", "short path", "long path", "no path"],
)
def test_a_record_that_its_dealer_did_not_sign_for_this_device_is_refused(change: Callable[[Round, Any], Any]) -> None:
    attempt, request = delivered(change)
    with pytest.raises(RefusedError) as caught:
        attempt.cohort.device(0).unmask(request)
    assert caught.value.refusal in (Refusal.SHARES, Refusal.SETS)


def test_a_record_replayed_from_another_round_is_refused() -> None:
    old = prepared(Cohort(4))
    attempt, request = delivered(lambda _, __: old.server._delivery(1, 0))
    with refuses(Refusal.SHARES, "not under the root"):
        attempt.cohort.device(0).unmask(request)


@pytest.mark.parametrize("holder", [0, 2, 3])
def test_one_record_is_verified_alone(holder: int) -> None:
    attempt = prepared(Cohort(4))
    head, delivery = attempt.server._members[1].head, attempt.server._delivery(1, holder)
    assert head is not None
    position = others(attempt, 1).index(holder)
    record, path, plan = delivery[:RECORD_BYTES], delivery[RECORD_BYTES:], attempt.terms.digest
    require_record(head.root, 1, plan, position, 3, record, path)
    for dealer, context, place, forged in (
        (1, plan, position, with_bit_flipped(record, 0)),
        (1, plan, (position + 1) % 3, record),
        (2, plan, position, record),
        (1, DIGEST, position, record),
    ):
        with refuses(Refusal.SHARES):
            require_record(head.root, dealer, context, place, 3, forged, path)


# Shares, at the server. Device 1 signs a hash of its share for device 0 in a context of its choice.


@pytest.mark.parametrize(
    ("context", "taken"),
    [
        ((1, 0, b"seed", None), True),
        ((1, 0, b"seed", DIGEST), False),
        ((2, 0, b"seed", None), False),
        ((1, 2, b"seed", None), False),
        ((0, 1, b"seed", None), False),
        ((1, 0, b"key", None), False),
    ],
    ids=["its own", "round", "sender", "receiver", "direction", "kind"],
)
def test_a_share_is_taken_in_its_own_context_only(context: tuple[int, int, bytes, bytes | None], taken: bool) -> None:
    dealer, holder, kind, plan = context
    share = PAIR[:SHARE_BYTES]

    def with_hash(attempt: Round, honest: bytes) -> bytes:
        in_context = share_hash(share, dealer, holder, kind, plan or attempt.terms.digest)
        return honest[:BOX_BYTES] + in_context + honest[BOX_BYTES + HASH_BYTES :]

    attempt = dealt(Cohort(4), None, with_hash)
    reply = with_shares(UnmaskReply(attempt.terms.tag, b"", b""), attempt.masking(0), {1: share})
    attempt.server.receive_unmask(0, reply)
    assert (1 in attempt.server._members[0].shares) is taken


@pytest.mark.parametrize("source", ["dealer", "holder", "round"])
def test_a_share_of_another_dealer_holder_or_round_is_dropped(source: str) -> None:
    attempt, old = prepared(Cohort(4)), prepared(Cohort(4))
    for each in (attempt, old):
        each.upload()
        each.server.close_uploads()
    ours, theirs, olds = (revealed_by(each, holder) for each, holder in ((attempt, 0), (attempt, 2), (old, 0)))
    stray = {"dealer": ours[3], "holder": theirs[1], "round": olds[1]}[source]
    reply = with_shares(UnmaskReply(attempt.terms.tag, b"", b""), attempt.masking(0), {1: stray, 2: ours[2]})
    attempt.server.receive_unmask(0, reply)
    assert attempt.server._members[0].shares == {2: ours[2]}


def revealed_by(attempt: Round, holder: int) -> dict[int, bytes]:
    reply = attempt.cohort.device(holder).unmask(to_bytes(attempt.server.unmask_request(holder)))
    return shares_in(from_bytes(UnmaskReply, reply), attempt.masking(holder))


# Prepare requests.


@pytest.mark.parametrize(
    ("then", "refusal"),
    [
        ({"number": 5, "attempt": 3}, Refusal.REPEATED),
        ({"number": 5, "attempt": 2}, Refusal.STALE),
        ({"number": 4, "attempt": 9}, Refusal.STALE),
        ({"number": 5, "attempt": 3, "kind": Kind.EVALUATE}, Refusal.STALE),
    ],
    ids=["same", "older attempt", "older round", "same with another plan"],
)
def test_a_round_that_was_taken_part_in_is_not_prepared_again(then: dict[str, Any], refusal: Refusal) -> None:
    cohort = Cohort(4)
    prepared(cohort, number=5, attempt=3)
    attempt = cohort.round(**then)
    with refuses(refusal):
        cohort.device(0).prepare(to_bytes(attempt.server.prepare_request(0)))


def test_a_request_to_one_device_is_of_no_use_to_another() -> None:
    attempt = Cohort(4).round()
    with pytest.raises(PeerError) as caught:
        attempt.cohort.device(0).prepare(to_bytes(attempt.server.prepare_request(1)))
    assert caught.value.refusal is Refusal.SETS


def test_the_devices_of_one_federation_are_strangers_to_another() -> None:
    ours, theirs = found(), found()
    assert fingerprint(ours.root.public_key) != fingerprint(theirs.root.public_key)
    request = from_bytes(PrepareRequest, to_bytes(ours.cohort().round().server.prepare_request(0)))
    theirs.cohort().round()
    with refuses(Refusal.ROSTER):
        theirs.cohort().device(0).prepare(to_bytes(request))


def test_mask_keys_are_new_in_every_round() -> None:
    cohort = Cohort(4)
    keys = [read_head(prepared(cohort, number=n).server._members[0].signed_head).mask_key for n in (1, 2, 3)]  # type: ignore[arg-type]
    assert len({*keys, agreement_key()[1]}) == 4
