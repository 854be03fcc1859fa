"""Who belongs to the federation, and which keys are whose: a lying server, or a member, tries to say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from attacks.insiders import (
    YEAR_S,
    Founded,
    found,
    others,
    prepare_with,
    read_head,
    refuses,
    signed_head,
    signed_prekey,
    signing_key,
    upload_with,
)
from protocol import SHARED_INPUT, Cohort, Round, another_run, asking, empty_total

from propolis.protos import identity_pb2
from propolis.secure import labels
from propolis.secure.errors import Refusal, UsageError
from propolis.secure.identity import (
    Descriptor,
    Invitation,
    Prekey,
    Root,
    RosterEntry,
    Signed,
    SigningKey,
    agreement_key,
    announce_prekey,
    fingerprint,
    prekey_context,
    sign,
)
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.masks import public_half
from propolis.secure.secagg.messages import (
    RECORD_BYTES,
    HelloRequest,
    NeighbourKeys,
    PrepareReply,
    from_bytes,
    to_bytes,
)
from propolis.secure.secagg.preparation import preparation_tree, records_of, server_record
from propolis.secure.secagg.server import SecAggServer
from propolis.secure.wire import decode

SERVER = SigningKey.generate()
NO_SIGNATURE = bytes(64)


def tampered(signed: Signed) -> Signed:
    return replace(signed, payload=signed.payload[:-1] + bytes([signed.payload[-1] ^ 1]))


def unsigned(signed: Signed) -> Signed:
    return replace(signed, signature=NO_SIGNATURE)


# Every u-coordinate of small order on the curve and its twist (https://cr.yp.to/ecdh.html), with both values of the
# top bit, which X25519 ignores.
_PRIME = 2**255 - 19
_ORDER_8 = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
LOW_ORDER = [point + high for point in (0, 1, *_ORDER_8, _PRIME - 1, _PRIME, _PRIME + 1) for high in (0, 2**255)]


# Invitations, at enrolment.


@pytest.mark.parametrize(
    ("root", "label", "federation"),
    [
        (Root(SERVER), labels.INVITATION, None),
        (None, labels.INVITATION, fingerprint(SERVER.public)),
        (None, labels.ROSTER, None),
    ],
    ids=["of the server", "of another federation", "under another label"],
)
def test_a_forged_invitation_is_refused(root: Root | None, label: bytes, federation: bytes | None) -> None:
    founded, key = found(), SigningKey.generate()
    invitation = Invitation(federation or founded.root.federation, 4, "new", key.public)
    forged = sign(label, (root or founded.root).key.private, invitation, identity_pb2.Invitation)
    with refuses(Refusal.IDENTITY):
        DeviceState.enrolled(founded.root.public_key, forged, key)


def test_an_invitation_is_of_no_use_without_its_key() -> None:
    founded = found()
    _, invitation, key = founded.root.invite(founded.roster, "new")
    with pytest.raises(UsageError, match="not that of the invitation"):
        DeviceState.enrolled(founded.root.public_key, invitation, SigningKey.generate())
    assert DeviceState.enrolled(founded.root.public_key, invitation, key).index == 4


# Rosters, through hello.


def greet(cohort: Cohort, roster: Signed, index: int = 0) -> None:
    cohort.device(index).hello(to_bytes(HelloRequest(roster, bytes(32))))


def of_number(founded: Founded, number: int) -> Signed:
    return founded.root.sign_roster(replace(founded.roster, number=number))


def signed_by(founded: Founded, root: Root, federation: bytes) -> Signed:
    return root.sign_roster(replace(founded.roster, number=99, federation=federation))


def under_another_label(founded: Founded) -> Signed:
    return sign(labels.INVITATION, founded.root.key.private, founded.roster, identity_pb2.Roster)


FORGED_ROSTERS: dict[str, Callable[[Founded], Signed]] = {
    "signed by the server": lambda f: signed_by(f, Root(SERVER), f.root.federation),
    "of another root": lambda f: signed_by(f, Root(SERVER), fingerprint(SERVER.public)),
    "of another federation of this root": lambda f: signed_by(f, f.root, fingerprint(SERVER.public)),
    "with a device more": lambda f: tampered(f.federation.roster),
    "unsigned": lambda f: unsigned(f.federation.roster),
    "under another label": under_another_label,
    "expired": lambda f: f.root.sign_roster(replace(f.roster, number=99, not_after=1)),
    "older than the device's own": lambda f: of_number(f, f.roster.number - 1),
    "of the same number with a device more": lambda f: f.root.sign_roster(
        replace(f.roster, entries=(*f.roster.entries, RosterEntry("sybil", SERVER.public)))
    ),
    "of the same number with a device revoked": lambda f: f.root.sign_roster(
        replace(f.roster.revoking(3), number=f.roster.number)
    ),
}


@pytest.mark.parametrize("forge", FORGED_ROSTERS.values(), ids=FORGED_ROSTERS)
def test_a_forged_roster_is_refused_and_not_kept(forge: Callable[[Founded], Signed]) -> None:
    founded = found()
    cohort = founded.cohort()
    greet(cohort, founded.federation.roster)
    with refuses(Refusal.ROSTER):
        greet(cohort, forge(founded))
    assert founded.federation.devices[0].roster == founded.federation.roster


@pytest.mark.parametrize("name", [n for n in FORGED_ROSTERS if "own" not in n and "same number" not in n])
def test_a_forged_first_roster_is_refused(name: str) -> None:
    founded = found()
    with refuses(Refusal.ROSTER):
        greet(founded.cohort(), FORGED_ROSTERS[name](founded))
    assert founded.federation.devices[0].roster is None


def test_a_newer_roster_is_kept_and_the_same_one_is_no_surprise() -> None:
    founded = found()
    cohort, newer = founded.cohort(), of_number(founded, 99)
    for roster in (founded.federation.roster, founded.federation.roster, newer, newer):
        greet(cohort, roster)
        assert founded.federation.devices[0].roster == roster


def test_a_device_without_a_roster_prepares_nothing() -> None:
    cohort = Cohort(4)
    attempt = cohort.round()
    cohort.federation.devices[0].roster = None
    with refuses(Refusal.ROSTER):
        ask_to_prepare(attempt)


def test_a_roster_that_expired_since_hello_is_refused() -> None:
    cohort = Cohort(4)
    attempt = cohort.round()
    cohort.now += 2 * YEAR_S
    with refuses(Refusal.ROSTER, "expired"):
        ask_to_prepare(attempt)


@pytest.mark.parametrize("change", [{"roster_number": 1}, {"roster_number": 99}, {"roster_digest": b"r" * 32}], ids=str)
def test_a_plan_for_another_roster_is_refused(change: dict[str, object]) -> None:
    with refuses(Refusal.ROSTER):
        ask_to_prepare(Cohort(4).round(**change))


def test_a_device_that_has_seen_a_newer_roster_signs_nothing_for_an_older_one() -> None:
    """So whoever signs a head has seen no roster that is newer than the plan's, of which its signature is."""
    founded = found()
    cohort = founded.cohort()
    attempt = cohort.round()
    greet(cohort, of_number(founded, 99))
    with refuses(Refusal.ROSTER, "not for 99"):
        ask_to_prepare(attempt)


# Descriptors, through prepare. Device 0 is the one that is lied to, about device 1.


def ask_to_prepare(attempt: Round, forge: Callable[[int, NeighbourKeys], object] = lambda _, keys: keys) -> bytes:
    return attempt.cohort.device(0).prepare(prepare_with(attempt, 0, forge))


def about_device_1(forge: Callable[[NeighbourKeys], object]) -> Callable[[int, NeighbourKeys], object]:
    return lambda index, keys: forge(keys) if index == 1 else keys


def described_by(key: SigningKey, keys: NeighbourKeys, label: bytes = labels.DESCRIPTOR, **changes: object) -> Signed:
    """Device 1's descriptor with new keys, and changes, signed with `key`."""
    descriptor = decode(Descriptor, keys.descriptor.payload, identity_pb2.Descriptor)
    forged = replace(descriptor, **{"signing_key": SERVER.public, **changes})
    return sign(label, key.private, forged, identity_pb2.Descriptor)


FORGED_DESCRIPTORS: dict[str, Callable[[Founded, NeighbourKeys], Signed]] = {
    "made by the server": lambda _, keys: described_by(SERVER, keys),
    "made by another member": lambda f, keys: described_by(f.invitations[2], keys),
    "signed by the root itself": lambda f, keys: described_by(f.root.key, keys),
    "signed by the device itself": lambda f, keys: described_by(f.federation.devices[1].signing_key, keys),
    "of a place that does not exist": lambda f, keys: described_by(SERVER, keys, index=4),
    "of another federation": lambda f, keys: described_by(f.invitations[1], keys, federation=b"f" * 32),
    "with another signing key": lambda f, keys: replace(keys.descriptor, payload=described_by(SERVER, keys).payload),
    "unsigned": lambda _, keys: unsigned(keys.descriptor),
    "under another label": lambda f, keys: described_by(f.invitations[1], keys, labels.PREKEY),
}


@pytest.mark.parametrize("forge", FORGED_DESCRIPTORS.values(), ids=FORGED_DESCRIPTORS)
def test_a_forged_descriptor_is_refused(forge: Callable[[Founded, NeighbourKeys], Signed]) -> None:
    founded = found()
    attempt = founded.cohort().round()

    def forged(keys: NeighbourKeys) -> NeighbourKeys:
        descriptor = forge(founded, keys)
        prekey = by_server(attempt.cohort, prekey_of(keys))
        return NeighbourKeys(descriptor, prekey if SERVER.public in descriptor.payload else keys.prekey)

    with refuses(Refusal.IDENTITY):
        ask_to_prepare(attempt, about_device_1(forged))


def test_members_of_a_root_that_the_server_made_are_strangers() -> None:
    ours, theirs = found(), found()
    strangers = theirs.cohort()
    with refuses(Refusal.IDENTITY):
        ask_to_prepare(ours.cohort().round(), lambda index, _: strangers.hello(index))


@pytest.mark.parametrize(
    "forge",
    [
        lambda attempt: prepare_with(attempt, 0, about_device_1(lambda _: None)),
        lambda attempt: prepare_with(attempt, 0, lambda _, __: None),
        lambda attempt: prepare_with(attempt, 0, about_device_1(lambda _: attempt.server._members[2].keys)),
        lambda attempt: prepare_with(attempt, 0, about_device_1(lambda _: attempt.server._members[0].keys)),
        lambda attempt: with_one_more(attempt, 1),
        lambda attempt: with_one_more(attempt, 0),
    ],
    ids=["one missing", "all missing", "one twice", "its own", "one more", "its own as one more"],
)
def test_neighbours_that_are_not_those_of_the_graph_are_refused(forge: Callable[[Round], bytes]) -> None:
    attempt = Cohort(4).round()
    with refuses(Refusal.SETS):
        attempt.cohort.device(0).prepare(forge(attempt))


def with_one_more(attempt: Round, index: int) -> bytes:
    request = attempt.server.prepare_request(0)
    keys = [attempt.server.keys_of(other) for other in (*others(attempt, 0), index)]
    return to_bytes(asking(request.plan, request.prekey_number, keys))


def second_self(founded: Founded, index: int) -> NeighbourKeys:
    """Who holds an invitation's key makes a second device of it."""
    invitation_key, federation, number = founded.invitations[index], founded.root.federation, 1000
    signing, (_, hpke), (_, prekey) = SigningKey.generate(), agreement_key(), agreement_key()
    descriptor = Descriptor(federation, index, signing.public, hpke)
    return NeighbourKeys(
        sign(labels.DESCRIPTOR, invitation_key.private, descriptor, identity_pb2.Descriptor),
        announce_prekey(signing, Descriptor(federation, index, signing.public, hpke), number, prekey),
    )


def test_a_second_descriptor_of_one_invitation_is_refused_in_a_later_round() -> None:
    founded = found()
    cohort = founded.cohort()
    ask_to_prepare(cohort.round())
    with refuses(Refusal.IDENTITY, "second descriptor"):
        ask_to_prepare(cohort.round(number=2), about_device_1(lambda _: second_self(founded, 1)))


def test_a_second_descriptor_is_remembered_after_a_restart() -> None:
    founded = found()
    cohort = founded.cohort()
    ask_to_prepare(cohort.round())
    forged = prepare_with(cohort.round(number=2), 0, about_device_1(lambda _: second_self(founded, 1)))
    restarted = DeviceState.from_bytes(founded.federation.devices[0].to_bytes())
    with refuses(Refusal.IDENTITY, "second descriptor"):
        Device(restarted, cohort.policy, cohort.now).prepare(forged)


def test_two_descriptors_of_one_invitation_are_refused_in_one_round() -> None:
    founded = found()
    attempt = founded.cohort().round()
    request = attempt.server.prepare_request(0)
    second = second_self(founded, 1)
    for descriptors in ((second.descriptor, *request.descriptors), (*request.descriptors, second.descriptor)):
        both = to_bytes(replace(request, descriptors=descriptors))
        with refuses(Refusal.SETS):
            attempt.cohort.device(0).prepare(both)


@pytest.mark.parametrize(
    ("revoked", "members"),
    [(0, (0, 1, 2, 3)), (1, (0, 1, 2, 3)), (1, (0, 2, 3))],
    ids=["itself", "another", "a neighbour beside the cohort"],
)
def test_a_revoked_device_is_refused(revoked: int, members: tuple[int, ...]) -> None:
    founded = found()
    cohort = founded.cohort()
    cohort.signed_roster = founded.root.sign_roster(founded.roster.revoking(revoked))
    keys = [cohort.hello(index) for index in range(4)]
    plan = cohort.plan(cohort=members).to_bytes()
    with refuses(Refusal.IDENTITY, "revoked"):
        cohort.device(0).prepare(to_bytes(asking(plan, prekey_of(keys[0]).number, keys[1:])))


# Prekeys, through prepare.


def prekey_of(keys: NeighbourKeys) -> Prekey:
    return decode(Prekey, keys.prekey.payload, identity_pb2.Prekey)


def with_prekey(keys: NeighbourKeys, prekey: Signed) -> NeighbourKeys:
    return replace(keys, prekey=prekey)


def new_prekey(keys: NeighbourKeys, **changes: object) -> Prekey:
    return replace(prekey_of(keys), **{"public_key": agreement_key()[1], **changes})


def by_server(cohort: Cohort, prekey: Prekey) -> Signed:
    context = prekey_context(fingerprint(cohort.federation.root_key), 1)
    return sign(labels.PREKEY, SERVER.private, prekey, identity_pb2.Prekey, *context)


FORGED_PREKEYS: dict[str, Callable[[Cohort, NeighbourKeys], Signed]] = {
    "made by the server": lambda c, keys: by_server(c, new_prekey(keys)),
    "signed by another device": lambda c, keys: signed_prekey(c, 2, new_prekey(keys)),
    "of another device": lambda c, keys: c.hello(2).prekey,
    "signed as another device's": lambda c, keys: signed_prekey(c, 1, new_prekey(keys), index=2),
    "signed by another device as this one's": lambda c, keys: signed_prekey(c, 2, new_prekey(keys), index=1),
    "of another federation": lambda c, keys: signed_prekey(c, 1, new_prekey(keys), federation=b"f" * 32),
    "signed without saying whose it is": lambda c, keys: sign(
        labels.PREKEY, signing_key(c, 1), new_prekey(keys), identity_pb2.Prekey
    ),
    "under another label": lambda c, keys: signed_prekey(c, 1, new_prekey(keys), labels.HEAD),
    "with another key": lambda c, keys: tampered(keys.prekey),
    "unsigned": lambda c, keys: unsigned(keys.prekey),
    "that is no key": lambda c, keys: signed_prekey(c, 1, new_prekey(keys, public_key=bytes(32))),
}


@pytest.mark.parametrize("forge", FORGED_PREKEYS.values(), ids=FORGED_PREKEYS)
def test_a_forged_prekey_is_refused(forge: Callable[[Cohort, NeighbourKeys], Signed]) -> None:
    attempt = Cohort(4).round()
    with refuses(Refusal.KEYS):
        ask_to_prepare(attempt, about_device_1(lambda keys: with_prekey(keys, forge(attempt.cohort, keys))))


@pytest.mark.parametrize("key", LOW_ORDER, ids=hex)
def test_a_prekey_of_low_order_is_refused(key: int) -> None:
    attempt = Cohort(4).round()

    def weak(keys: NeighbourKeys) -> NeighbourKeys:
        prekey = new_prekey(keys, public_key=key.to_bytes(32, "little"))
        return with_prekey(keys, signed_prekey(attempt.cohort, 1, prekey))

    with refuses(Refusal.KEYS, "low order"):
        ask_to_prepare(attempt, about_device_1(weak))


@pytest.mark.parametrize("later", [{"number": 2}, {"attempt": 1}, {"run_id": another_run()}], ids=str)
def test_a_prekey_is_sealed_to_once(later: dict[str, object]) -> None:
    cohort = Cohort(4)
    attempt = cohort.round()
    ask_to_prepare(attempt)
    with refuses(Refusal.KEYS, "used before"):
        ask_to_prepare(cohort.round(**later), about_device_1(lambda _: attempt.server._members[1].keys))


@pytest.mark.parametrize("number", [0, 6])
def test_an_older_prekey_is_not_sealed_to_either(number: int) -> None:
    cohort = Cohort(4)

    def numbered(number: int) -> Callable[[int, NeighbourKeys], object]:
        return about_device_1(lambda keys: with_prekey(keys, signed_prekey(cohort, 1, new_prekey(keys, number=number))))

    ask_to_prepare(cohort.round(), numbered(7))
    with refuses(Refusal.KEYS, "used before"):
        ask_to_prepare(cohort.round(number=2), numbered(number))


def test_every_hello_announces_a_new_prekey() -> None:
    cohort = Cohort(4)
    first, second = cohort.hello(1), cohort.hello(1)
    assert prekey_of(first).number < prekey_of(second).number
    assert prekey_of(first).public_key != prekey_of(second).public_key
    assert public_half(cohort.federation.devices[1].prekey_private) == prekey_of(second).public_key


@pytest.mark.parametrize("step", [-1, 1])
def test_a_plan_with_another_prekey_of_this_device_is_refused(step: int) -> None:
    cohort = Cohort(4)
    attempt = cohort.round()
    request = attempt.server.prepare_request(0)
    with refuses(Refusal.KEYS, "another prekey"):
        cohort.device(0).prepare(to_bytes(replace(request, prekey_number=request.prekey_number + step)))


def test_a_device_without_a_prekey_prepares_nothing() -> None:
    cohort = Cohort(4)
    attempt = cohort.round()
    cohort.federation.devices[0].prekey_private = b""
    with refuses(Refusal.KEYS, "another prekey"):
        ask_to_prepare(attempt)


# Mask keys, through begin_upload.


def prepared(cohort: Cohort) -> Round:
    attempt = cohort.round()
    attempt.prepare()
    assert not attempt.refused
    return attempt


def ask_to_upload(attempt: Round, forge: Callable[[Signed], object]) -> None:
    """Device 0 is asked to mask for device 1, whose head is forged, and the others."""
    attempt.masked(0, upload_with(attempt, 0, forge))


def with_mask_key(attempt: Round, mask_key: bytes) -> Callable[[Signed], Signed]:
    return lambda signed: signed_head(attempt, 1, replace(read_head(signed), mask_key=mask_key))


def mask_key(attempt: Round, index: int) -> bytes:
    head = attempt.server._members[index].head
    assert head is not None
    return head.mask_key


def test_an_honest_head_is_masked_for() -> None:
    attempt = prepared(Cohort(4))
    ask_to_upload(attempt, with_mask_key(attempt, agreement_key()[1]))


@pytest.mark.parametrize("key", LOW_ORDER, ids=hex)
def test_a_mask_key_of_low_order_is_refused(key: int) -> None:
    attempt = prepared(Cohort(4))
    request = upload_with(attempt, 0, with_mask_key(attempt, key.to_bytes(32, "little")))
    with refuses(Refusal.KEYS, "low order"):
        attempt.cohort.device(0).begin_upload(request, SHARED_INPUT)


@pytest.mark.parametrize("owner", [0, 2], ids=["its own", "another neighbour's"])
def test_a_mask_key_that_is_somebody_elses_is_refused(owner: int) -> None:
    attempt = prepared(Cohort(4))
    with refuses(Refusal.KEYS, "one mask key"):
        ask_to_upload(attempt, with_mask_key(attempt, mask_key(attempt, owner)))


FORGED_HEADS: dict[str, tuple[Refusal, Callable[[Round, Signed], Signed]]] = {
    "with the server's mask key": (
        Refusal.KEYS,
        lambda a, signed: replace(signed, payload=with_mask_key(a, agreement_key()[1])(signed).payload),
    ),
    "unsigned": (Refusal.KEYS, lambda _, signed: unsigned(signed)),
    "tampered": (Refusal.KEYS, lambda _, signed: tampered(signed)),
    "signed by another device": (Refusal.KEYS, lambda a, signed: signed_head(a, 2, read_head(signed), index=1)),
    "under another label": (
        Refusal.KEYS,
        lambda a, signed: signed_head(a, 1, read_head(signed), labels.CONFIRMATION),
    ),
    "of another plan": (
        Refusal.KEYS,
        lambda a, signed: signed_head(a, 1, read_head(signed), plan=b"p" * 32),
    ),
    "of the device itself": (Refusal.KEYS, lambda a, _: a.server._members[0].signed_head),  # type: ignore[dict-item]
    "signed as another device's": (Refusal.KEYS, lambda a, signed: signed_head(a, 1, read_head(signed), index=2)),
    "of another neighbour": (Refusal.KEYS, lambda a, _: a.server._members[2].signed_head),  # type: ignore[dict-item]
}


@pytest.mark.parametrize(("refusal", "forge"), FORGED_HEADS.values(), ids=FORGED_HEADS)
def test_a_forged_head_is_refused(refusal: Refusal, forge: Callable[[Round, Signed], Signed]) -> None:
    attempt = prepared(Cohort(4))
    with refuses(refusal):
        ask_to_upload(attempt, lambda signed: forge(attempt, signed))


# The server, which devices lie to.


def reply_of(attempt: Round, index: int) -> PrepareReply:
    request = to_bytes(attempt.server.prepare_request(index))
    return from_bytes(PrepareReply, attempt.cohort.device(index).prepare(request))


def resigned(
    attempt: Round, reply: PrepareReply, signer: int = 1, index: int = 1, plan: bytes | None = None, **changes: object
) -> PrepareReply:
    head = replace(read_head(reply.head), **changes)
    return replace(reply, head=signed_head(attempt, signer, head, index=index, plan=plan))


def with_records(attempt: Round, reply: PrepareReply, records: list[bytes]) -> PrepareReply:
    deliveries, last = b"".join(records), server_record(reply.seed_commitment, reply.next_prekey)
    honest = resigned(attempt, reply, root=preparation_tree(1, attempt.terms.digest, deliveries, last).root)
    return replace(honest, deliveries=deliveries)


FORGED_PREPARATIONS: dict[str, tuple[Refusal, Callable[[Round, PrepareReply], PrepareReply]]] = {
    "of another device": (Refusal.KEYS, lambda a, _: reply_of(a, 2)),
    "signed as another device's": (Refusal.KEYS, lambda a, r: resigned(a, r, index=2)),
    "signed by another device": (Refusal.KEYS, lambda a, r: resigned(a, r, signer=2)),
    "of another plan": (Refusal.KEYS, lambda a, r: resigned(a, r, plan=b"p" * 32)),
    "unsigned": (Refusal.KEYS, lambda _, r: replace(r, head=unsigned(r.head))),
    "under another label": (
        Refusal.KEYS,
        lambda a, r: replace(r, head=signed_head(a, 1, read_head(r.head), labels.PREKEY)),
    ),
    "with a record that was not signed": (
        Refusal.SHARES,
        lambda _, r: replace(r, deliveries=bytes([r.deliveries[0] ^ 1]) + r.deliveries[1:]),
    ),
    "with records in another order": (
        Refusal.SHARES,
        lambda _, r: replace(r, deliveries=b"".join(reversed(records_of(r.deliveries)))),
    ),
    "with a record too few": (Refusal.SHARES, lambda a, r: with_records(a, r, records_of(r.deliveries)[:-1])),
    "with a record too many": (
        Refusal.SHARES,
        lambda a, r: with_records(a, r, [*records_of(r.deliveries), bytes(RECORD_BYTES)]),
    ),
    "with a copied mask key": (Refusal.KEYS, lambda a, r: resigned(a, r, mask_key=mask_key(a, 0))),
    "with a mask key of low order": (Refusal.KEYS, lambda a, r: resigned(a, r, mask_key=bytes(32))),
    "with another next prekey": (Refusal.SHARES, lambda a, r: replace(r, next_prekey=tampered(r.next_prekey))),
    "with another seed commitment": (Refusal.SHARES, lambda a, r: replace(r, seed_commitment=bytes(16))),
}


@pytest.mark.parametrize(("refusal", "forge"), FORGED_PREPARATIONS.values(), ids=FORGED_PREPARATIONS)
def test_the_server_refuses_a_forged_preparation_and_takes_the_honest_one(
    refusal: Refusal, forge: Callable[[Round, PrepareReply], PrepareReply]
) -> None:
    attempt = Cohort(4).round()
    attempt.prepare(silent=(1, 2, 3))
    reply = reply_of(attempt, 1)
    with refuses(refusal):
        attempt.server.receive_prepare(1, forge(attempt, reply))
    assert attempt.server.prepared == (0,)
    attempt.server.receive_prepare(1, reply)
    assert attempt.server.prepared == (0, 1)


@pytest.mark.parametrize("forge", [lambda a, r: r, lambda a, r: resigned(a, r, mask_key=agreement_key()[1])])
def test_the_server_takes_one_preparation_of_each_device(forge: Callable[[Round, PrepareReply], PrepareReply]) -> None:
    attempt = Cohort(4).round()
    reply = reply_of(attempt, 1)
    attempt.server.receive_prepare(1, reply)
    with refuses(Refusal.REPEATED):
        attempt.server.receive_prepare(1, forge(attempt, reply))
    assert attempt.server._members[1].signed_head == reply.head


def made_by_server(keys: NeighbourKeys) -> NeighbourKeys:
    descriptor = decode(Descriptor, keys.descriptor.payload, identity_pb2.Descriptor)
    prekey = announce_prekey(SERVER, descriptor, prekey_of(keys).number, prekey_of(keys).public_key)
    return NeighbourKeys(described_by(SERVER, keys), prekey)


@pytest.mark.parametrize(
    ("refusal", "forge"),
    [
        (Refusal.IDENTITY, made_by_server),
        (Refusal.IDENTITY, lambda keys: replace(keys, descriptor=unsigned(keys.descriptor))),
        (Refusal.KEYS, lambda keys: replace(keys, prekey=made_by_server(keys).prekey)),
        (Refusal.KEYS, lambda keys: replace(keys, prekey=unsigned(keys.prekey))),
    ],
    ids=["a stranger's", "unsigned descriptor", "a stranger's prekey", "unsigned prekey"],
)
def test_nobody_is_asked_to_seal_to_forged_keys(
    refusal: Refusal, forge: Callable[[NeighbourKeys], NeighbourKeys]
) -> None:
    attempt = Cohort(4).round()
    keys = {index: attempt.cohort.hello(index) for index in range(4)}
    with refuses(refusal):
        SecAggServer(attempt.terms, attempt.cohort.roster, {**keys, 1: forge(keys[1])}, empty_total(attempt.terms))
