"""Shares and uploads that are corrupt, misdirected or too few: what the server sorts out, and where it has to stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from attacks.insiders import read_head, signed_head
from attacks.uniformity import looks_uniform
from protocol import SHARED_INPUT, Cohort, Round, deliveries_in, pairwise_mask, server_from, shares_in, with_shares

from propolis.secure import labels
from propolis.secure.codec.lanes import LANES
from propolis.secure.envelope import open_sealed, seal
from propolis.secure.errors import PeerError, Refusal, RefusedError, TooFewPeersError, TrustError
from propolis.secure.graph import sharing
from propolis.secure.identity import agreement_key, descriptor_digest
from propolis.secure.merkle import HASH_BYTES, MerkleTree
from propolis.secure.prg import VECTOR_STREAM, Mask, apply_masks
from propolis.secure.ring import Vector
from propolis.secure.secagg import server as server_module
from propolis.secure.secagg.client import SecAggClient
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.masks import box_info, mask_private, public_half, seed_commitment, self_mask
from propolis.secure.secagg.messages import (
    BOX_BYTES,
    RECORD_BYTES,
    TAG_BYTES,
    Head,
    PrepareReply,
    UnmaskReply,
    UploadReply,
    from_bytes,
    marks,
    to_bytes,
)
from propolis.secure.secagg.preparation import head_context, preparation_tree, records_of, server_record
from propolis.secure.shamir import PRIME, SHARE_BYTES, combine, split

# Ten devices: k = 9, t = 7, so two of the holders of every secret may fail.
DEVICES, THRESHOLD = 10, 7

Replies = dict[int, UnmaskReply]


def uploaded(silent: Collection[int] = (), devices: int = DEVICES, **changes: Any) -> Round:
    played = Cohort(devices).round(**changes)
    played.prepare()
    played.upload(silent)
    played.server.close_uploads()
    return played


def replies_of(played: Round) -> Replies:
    """The genuine shares of all who are alive."""
    requests = {index: to_bytes(played.server.unmask_request(index)) for index in played.server.alive}
    return {
        index: from_bytes(UnmaskReply, played.cohort.device(index).unmask(request))
        for index, request in requests.items()
    }


def summed(played: Round, replies: Replies) -> list[int]:
    """The sum that a server in the same state makes of other shares."""
    server = server_from(played.server.to_bytes(), played.cohort.roster)
    for index, reply in replies.items():
        with suppress(PeerError):  # what is not one share for each record that opened is dropped as a whole
            server.receive_unmask(index, reply)
    total = server.sum(SHARED_INPUT, threads=1)[0]
    return (played.opened(total) if played.terms.is_encrypted else total).tolist()


# Corrupt shares.


def with_value(change: Callable[[bytes], bytes]) -> Callable[[int, UnmaskReply, Replies], UnmaskReply]:
    def corrupt(index: int, reply: UnmaskReply, replies: Replies) -> UnmaskReply:
        shares = {dealer: change(share) for dealer, share in shares_of(index, reply).items()}
        return with_shares(reply, all_but(index), shares)

    return corrupt


def all_but(index: int) -> list[int]:
    """The neighbours of a device of a complete graph in which all prepared."""
    return [other for other in range(DEVICES) if other != index]


def shares_of(index: int, reply: UnmaskReply) -> dict[int, bytes]:
    return shares_in(reply, all_but(index))


def misdirected(index: int, reply: UnmaskReply, replies: Replies) -> UnmaskReply:
    """Another holder's genuine shares."""
    others = [shares_of(other, each) for other, each in replies.items() if other != index]
    stray = {dealer: next(each[dealer] for each in others if dealer in each) for dealer in all_but(index)}
    return with_shares(reply, all_but(index), stray)


def mixed_up(index: int, reply: UnmaskReply, replies: Replies) -> UnmaskReply:
    """Its own shares, in another order."""
    return replace(reply, shares=reply.shares[SHARE_BYTES:] + reply.shares[:SHARE_BYTES])


def absent(index: int, reply: UnmaskReply, replies: Replies) -> UnmaskReply:
    return with_shares(reply, all_but(index), {})


CORRUPT: dict[str, Callable[[int, UnmaskReply, Replies], UnmaskReply]] = {
    "one bit": with_value(lambda value: value[:-1] + bytes([value[-1] ^ 1])),
    "first bit": with_value(lambda value: bytes([value[0] ^ 1]) + value[1:]),
    "zero": with_value(lambda value: bytes(SHARE_BYTES)),
    "one more than genuine": with_value(
        lambda value: ((int.from_bytes(value, "big") + 1) % PRIME).to_bytes(SHARE_BYTES, "big")
    ),
    "of a field of 17 bytes": with_value(lambda value: b"\0" + value),
    "the prime": with_value(lambda value: PRIME.to_bytes(SHARE_BYTES, "big")),
    "beyond the field": with_value(lambda value: b"\xff" * SHARE_BYTES),
    "truncated": with_value(lambda value: value[:-1]),
    "longer": with_value(lambda value: value + b"\0"),
    "empty": with_value(lambda value: b""),
    "misdirected": misdirected,
    "mixed up": mixed_up,
    "absent": absent,
}


@pytest.mark.parametrize("corrupt", CORRUPT.values(), ids=CORRUPT)
def test_corrupt_shares_are_dropped_and_the_sum_is_exact(
    corrupt: Callable[[int, UnmaskReply, Replies], UnmaskReply],
) -> None:
    played = uploaded()
    genuine = replies_of(played)
    expected = played.expected().tolist()
    for holders in [(0, 1), (4, 7), (8, 9)]:
        forged = {
            index: corrupt(index, reply, genuine) if index in holders else reply for index, reply in genuine.items()
        }
        assert summed(played, forged) == expected
    three = {index: corrupt(index, reply, genuine) if index < 3 else reply for index, reply in genuine.items()}
    # Shares that are wrong are their holders' fault; those that nobody gives are taken for the dealer's.
    said = "what device 3 sealed does not open" if corrupt is absent else "6 shares of device 3 came, 7 are needed"
    with pytest.raises((TooFewPeersError, PeerError), match=said):
        summed(played, three)


def test_any_two_corrupt_holders_of_nine_are_survived_and_any_three_are_not() -> None:
    played = uploaded()
    genuine, corrupt = replies_of(played), CORRUPT["one bit"]
    expected = played.expected().tolist()
    for holders in combinations(range(DEVICES), 2):
        forged = {i: corrupt(i, reply, genuine) if i in holders else reply for i, reply in genuine.items()}
        assert summed(played, forged) == expected
    for holders in combinations(range(0, DEVICES, 2), 3):
        forged = {i: corrupt(i, reply, genuine) if i in holders else reply for i, reply in genuine.items()}
        with pytest.raises(TooFewPeersError):
            summed(played, forged)


@pytest.mark.parametrize("dropped", [0, 5, 9])
def test_corrupt_shares_of_a_dropped_devices_key_are_dropped_too(dropped: int) -> None:
    played = uploaded(silent=[dropped])
    genuine = replies_of(played)
    for holders in combinations(played.server.alive, 2):
        forged = dict(genuine)
        for index in holders:
            shares = {**shares_of(index, genuine[index]), dropped: bytes(SHARE_BYTES)}
            forged[index] = with_shares(genuine[index], all_but(index), shares)
        assert summed(played, forged) == played.expected().tolist()


def test_each_share_is_hashed_once_however_many_are_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search over subsets: n (n - 1) hashes and n reconstructions, with two corrupt holders as with none."""
    played = uploaded()
    genuine, calls = replies_of(played), {"share_hash": 0, "combine": 0}
    for name in calls:
        original = getattr(server_module, name)

        def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(server_module, name, counted)
    for holders in ((), (0, 1)):
        calls.update(share_hash=0, combine=0)
        summed(played, {i: CORRUPT["zero"](i, r, genuine) if i in holders else r for i, r in genuine.items()})
        assert calls == {"share_hash": DEVICES * (DEVICES - 1), "combine": DEVICES}


def test_shares_come_from_those_who_were_asked_and_for_this_round() -> None:
    played = uploaded(silent=[9])
    genuine = replies_of(played)
    with pytest.raises(PeerError, match="device 9 was not asked for shares") as caught:
        played.server.receive_unmask(9, genuine[0])
    assert caught.value.refusal is Refusal.PHASE
    with pytest.raises(PeerError, match="of another round") as caught:
        played.server.receive_unmask(0, replace(genuine[0], round_tag=bytes(TAG_BYTES)))
    assert caught.value.refusal is Refusal.PHASE
    with pytest.raises(TooFewPeersError, match="0 shares of device 0 came"):
        played.sum()


UNFIT_SHARES: dict[str, tuple[Callable[[UnmaskReply], UnmaskReply], Refusal]] = {
    "one more": (lambda reply: replace(reply, shares=reply.shares + bytes(SHARE_BYTES)), Refusal.SHARES),
    "one less": (lambda reply: replace(reply, shares=reply.shares[:-SHARE_BYTES]), Refusal.SHARES),
    "a byte more": (lambda reply: replace(reply, shares=reply.shares + b"\0"), Refusal.SHARES),
    "none": (lambda reply: replace(reply, shares=b""), Refusal.SHARES),
    "one that did not open": (lambda reply: replace(reply, unopened=b"\x01\0"), Refusal.SHARES),
    "a bitmap of nobody": (lambda reply: replace(reply, unopened=bytes(2)), Refusal.SETS),
    "a bitmap that is too short": (lambda reply: replace(reply, unopened=b"\x01"), Refusal.SETS),
    "a bitmap that is too long": (lambda reply: replace(reply, unopened=b"\x01\0\0"), Refusal.SETS),
    "a stranger's bit": (lambda reply: replace(reply, unopened=b"\0\x02"), Refusal.SETS),
}


@pytest.mark.parametrize(("change", "refusal"), UNFIT_SHARES.values(), ids=UNFIT_SHARES)
def test_shares_are_one_for_each_record_that_opened(
    change: Callable[[UnmaskReply], UnmaskReply], refusal: Refusal
) -> None:
    played = uploaded()
    genuine, before = replies_of(played), played.server.to_bytes()
    with pytest.raises(PeerError) as caught:
        played.server.receive_unmask(0, change(genuine[0]))
    assert caught.value.refusal is refusal
    assert played.server.to_bytes() == before
    assert not played.server._unopened
    played.server.receive_unmask(0, genuine[0])
    assert len(played.server._members[0].shares) == DEVICES - 1


# Thresholds.


@pytest.mark.parametrize("devices", [4, 7, 10])
def test_t_minus_one_shares_never_suffice(devices: int) -> None:
    played = uploaded(devices=devices)
    threshold, commitment = played.terms.sharing.threshold, played.server._members[0].seed_commitment
    shares = [
        (index + 1, shares_in(reply, played.masking(index))[0])
        for index, reply in replies_of(played).items()
        if index != 0
    ]
    assert len(shares) == devices - 1
    for few in combinations(shares, threshold - 1):
        assert seed_commitment(combine(few), 0, played.terms.digest) != commitment
    for enough in combinations(shares, threshold):
        assert seed_commitment(combine(enough), 0, played.terms.digest) == commitment


@pytest.mark.parametrize("missing", range(4))
def test_the_server_needs_t_holders_of_every_secret(missing: int) -> None:
    played = uploaded()
    played.unmask(silent=range(missing))
    if missing <= DEVICES - 1 - THRESHOLD:
        assert played.sum()[0].tolist() == played.expected().tolist()
    else:
        with pytest.raises(TooFewPeersError, match="6 shares of device 3 came, 7 are needed"):
            played.sum()


@cache
def shared(degree: int, threshold: int) -> tuple[tuple[bytes, list[bytes]], tuple[bytes, list[bytes]]]:
    """A seed and a key, each with its shares for holders 1..k."""
    secrets = b"seed".ljust(16), b"key".ljust(16)
    points = range(1, degree + 1)
    one, other = ((each, split(each, threshold, points, np.random.default_rng(0).bytes)) for each in secrets)
    return one, other


def recovered(secret: bytes, shares: list[bytes], holders: Collection[int], threshold: int) -> bool:
    if not holders:
        return False
    chosen = [(holder + 1, shares[holder]) for holder in list(holders)[:threshold]]
    return combine(chosen) == secret


@pytest.mark.parametrize("devices", range(4, 11))
def test_no_split_of_the_honest_gives_both_secrets_while_2t_exceeds_k_plus_c(devices: int) -> None:
    """Every allocation: the honest neighbours are told one of two views each, the colluders answer to both."""
    degree, threshold = devices - 1, 2 * (devices - 1) // 3 + 1
    assert (degree, threshold) == (sharing(devices, 0.1, 0.25).degree, sharing(devices, 0.1, 0.25).threshold)
    seed, key = shared(degree, threshold)
    for colluding in range(degree + 1):
        both = False
        for views in product((False, True), repeat=degree - colluding):
            alive = [*range(colluding), *(colluding + place for place, view in enumerate(views) if view)]
            dropped = [*range(colluding), *(colluding + place for place, view in enumerate(views) if not view)]
            both |= recovered(*seed, alive, threshold) and recovered(*key, dropped, threshold)
        assert both == (2 * threshold <= degree + colluding)


def lied_to(played: Round, colluding: int, told_dropped: Collection[int], victim: int = 6) -> Vector:
    """What a lying server makes of a victim's upload.

    Neighbours below `colluding` answer both stories; of the others, `told_dropped` hear that the victim dropped.
    """
    server, seeds, keys = played.server, {}, {}
    for index in range(victim):
        genuine = server.unmask_request(index)
        dropped = replace(genuine, dropped=marks([victim], played.masking(index)))
        stories = [(genuine, seeds)] if index not in told_dropped else []
        if index in told_dropped or index < colluding:
            stories.append((dropped, keys))
        for story, gathered in stories:
            device = Device(deepcopy(played.cohort.federation.devices[index]), played.cohort.policy, played.cohort.now)
            reply = from_bytes(UnmaskReply, device.unmask(to_bytes(story)))
            gathered[index] = shares_in(reply, played.masking(index))[victim]
    digest, request = played.terms.digest, labels.digest(labels.REQUEST, to_bytes(server.upload_request(victim)))
    seed, key = guess(seeds), guess(keys)
    masks = [self_mask(seed, victim, digest, SHARED_INPUT, request)]
    for index in range(victim):
        head = server._members[index].head
        assert head is not None
        private = mask_private(key, victim, digest)
        masks.append(pairwise_mask(victim, private, index, head.mask_key, digest, SHARED_INPUT))
    return unmasked(played, victim, masks)


def guess(shares: dict[int, bytes]) -> bytes:
    """What up to t = 5 shares give; with fewer it is nonsense."""
    return combine([(index + 1, share) for index, share in shares.items()][:5]) if shares else bytes(16)


def unmasked(played: Round, index: int, masks: Iterable[Mask]) -> Vector:
    state = deepcopy(played.cohort.federation.devices[index])
    request = to_bytes(played.server.upload_request(index))
    reply = Device(state, played.cohort.policy, played.cohort.now).begin_upload(request, SHARED_INPUT)
    assert reply is not None
    vector = np.frombuffer(from_bytes(UploadReply, reply).vector, "<u4").copy()
    apply_masks(vector, [Mask(mask.seed, -mask.sign) for mask in masks], played.terms.grid.ring, VECTOR_STREAM)
    return vector


def with_constant_inputs() -> Round:
    """Seven devices, k = 6, t = 5; the victim's values are all 6."""
    played = Cohort(7).round(width=32, dimension=4096)
    played.inputs = {index: np.full(4096, index, np.uint32) for index in range(7)}
    played.prepare()
    played.upload()
    played.server.close_uploads()
    return played


@pytest.mark.of_vectors
@pytest.mark.parametrize("colluding", [0, 1, 2, 3])
def test_a_server_that_lies_about_a_device_learns_nothing_of_it(colluding: int) -> None:
    """2t = 10 > k + c, up to three of six: whichever way the honest neighbours are split."""
    played = with_constant_inputs()
    for count in range(6 - colluding + 1):
        assert looks_uniform(lied_to(played, colluding, range(colluding, colluding + count)).tobytes())


@pytest.mark.of_vectors
def test_with_one_colluder_more_than_assumed_the_lie_succeeds() -> None:
    """c = 4 of 6 neighbours: t of each kind, and the one value of the victim lies open. The bound is tight."""
    assert set(lied_to(with_constant_inputs(), 4, [5])) == {6}


# Records on their way from dealer to holder.


def refused_delivery(played: Round, change: Callable[[list[bytes]], list[bytes]]) -> RefusedError:
    """What device 0 says to other records and paths of its nine neighbours."""
    genuine, device = played.server.unmask_request(0), played.cohort.device(0)
    before, deliveries = device.state.to_bytes(), deliveries_in(genuine, played.terms, 0, all_but(0))
    with pytest.raises(RefusedError) as caught:
        device.unmask(to_bytes(replace(genuine, deliveries=b"".join(change(deliveries)))))
    assert device.state.to_bytes() == before
    assert len(shares_of(0, from_bytes(UnmaskReply, device.unmask(to_bytes(genuine))))) == 9
    return caught.value


def first_changed(change: Callable[[bytes], bytes]) -> Callable[[list[bytes]], list[bytes]]:
    return lambda deliveries: [change(deliveries[0]), *deliveries[1:]]


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("place", [0, 40, BOX_BYTES - 1, BOX_BYTES, RECORD_BYTES - 1])
def test_a_record_that_its_dealer_did_not_sign_is_refused(place: int) -> None:
    error = refused_delivery(uploaded(), first_changed(lambda delivery: flipped(delivery, place)))
    assert isinstance(error, TrustError)
    assert error.refusal is Refusal.SHARES


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path[:-HASH_BYTES],
        lambda path: path + bytes(HASH_BYTES),
        lambda path: b"",
        lambda path: path[HASH_BYTES : 2 * HASH_BYTES] + path[:HASH_BYTES] + path[2 * HASH_BYTES :],
        lambda path: flipped(path, 0),
        lambda path: flipped(path, len(path) - 1),
    ],
)
def test_a_record_with_a_wrong_path_is_refused(change: Callable[[bytes], bytes]) -> None:
    wrong = first_changed(lambda delivery: delivery[:RECORD_BYTES] + change(delivery[RECORD_BYTES:]))
    error = refused_delivery(uploaded(), wrong)
    assert error.refusal is Refusal.SHARES


@pytest.mark.parametrize("holder", [2, 9])
def test_a_record_for_another_holder_is_refused(holder: int) -> None:
    played = uploaded()
    other = played.server._delivery(1, holder)
    assert refused_delivery(played, lambda d: [other, *d[1:]]).refusal is Refusal.SHARES


def test_a_record_under_another_dealers_name_is_refused() -> None:
    error = refused_delivery(uploaded(), lambda d: [d[1], d[0], *d[2:]])
    assert error.refusal is Refusal.SHARES


def test_a_record_that_comes_twice_is_refused() -> None:
    error = refused_delivery(uploaded(), lambda d: [*d, d[0]])
    assert error.refusal is Refusal.SHARES


def test_a_record_that_is_missing_is_refused() -> None:
    for error in (refused_delivery(uploaded(), lambda d: d[:-1]), refused_delivery(uploaded(), lambda d: [])):
        assert error.refusal is Refusal.SHARES


def test_a_holder_reveals_its_share_of_the_right_kind() -> None:
    """The seed of those alive, the key of those that dropped, and of nobody both."""
    played = Cohort(DEVICES).round()
    played.prepare()
    states = played.cohort.federation.devices
    roles = [SecAggClient.from_bytes(state.round, bytes(32)) for state in states]
    played.upload(silent=[9])
    played.server.close_uploads()
    replies = replies_of(played)
    for index, reply in replies.items():
        assert list(shares_of(index, reply)) == all_but(index)
    of_nine = [(index + 1, shares_of(index, reply)[9]) for index, reply in replies.items()]
    assert combine(of_nine[:THRESHOLD]) == roles[9].mask_secret
    of_zero = [(i + 1, shares_of(i, reply)[0]) for i, reply in replies.items() if i != 0]
    assert combine(of_zero[:THRESHOLD]) == roles[0].seed


# Dishonest dealers.


def dealing(played: Round, dealer: int, forge: Callable[[PrepareReply], PrepareReply]) -> None:
    """All prepare; what the dealer sends is forged, with its own signature."""
    played.prepare(silent=[dealer])
    request = to_bytes(played.server.prepare_request(dealer))
    reply = from_bytes(PrepareReply, played.cohort.device(dealer).prepare(request))
    played.server.receive_prepare(dealer, forge(reply))


def resigned(
    played: Round, dealer: int, reply: PrepareReply, mask_key: bytes = b"", signed_as: int = 5, **changes: Any
) -> PrepareReply:
    """What the dealer, 5, may choose to send; or what another one signs in its place."""
    reply = replace(reply, **changes)
    last = server_record(reply.seed_commitment, reply.next_prekey)
    root = preparation_tree(signed_as, played.terms.digest, reply.deliveries, last).root
    head = replace(read_head(reply.head), root=root, mask_key=mask_key or read_head(reply.head).mask_key)
    return replace(reply, head=signed_head(played, dealer, head, index=signed_as))


@pytest.mark.parametrize(
    "start", [0, BOX_BYTES - 16, BOX_BYTES, BOX_BYTES + HASH_BYTES], ids=["box", "tag", "seed", "key"]
)
@pytest.mark.parametrize("dropped", [False, True])
def test_two_records_that_are_bad_by_their_dealers_fault_are_made_up_for(start: int, dropped: bool) -> None:
    """A box that does not open, or whose share is not the hashed one."""
    played = Cohort(DEVICES).round()

    def forge(reply: PrepareReply) -> PrepareReply:
        deliveries = flipped(flipped(reply.deliveries, start), RECORD_BYTES + start)
        return resigned(played, 5, reply, deliveries=deliveries)

    dealing(played, 5, forge)
    played.upload(silent=[5] if dropped else [])
    played.server.close_uploads()
    played.unmask()
    assert not played.refused
    assert played.sum()[0].tolist() == played.expected().tolist()
    unaffected = (start == BOX_BYTES) if dropped else (start == BOX_BYTES + HASH_BYTES)
    held = [index for index in played.server.alive if 5 in played.server._members[index].shares]
    assert ((0 not in held) and (1 not in held)) or unaffected


def test_a_box_that_does_not_open_costs_its_own_share_only() -> None:
    played = Cohort(DEVICES).round()
    dealing(played, 5, lambda reply: resigned(played, 5, reply, deliveries=flipped(reply.deliveries, 0)))
    played.upload()
    reply = from_bytes(UnmaskReply, played.cohort.device(0).unmask(to_bytes(played.server.unmask_request(0))))
    assert list(shares_of(0, reply)) == [1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize("malicious", [False, True])
def test_a_dealer_that_shares_another_seed_than_it_signed_is_noticed(malicious: bool) -> None:
    played = Cohort(DEVICES).round(malicious=malicious)
    dealing(played, 5, lambda reply: resigned(played, 5, reply, seed_commitment=b"c" * 16))
    played.upload()
    played.server.close_uploads()
    if malicious:
        played.confirm()
    played.unmask()
    with pytest.raises(PeerError, match="device 5 shared another secret than it signed") as caught:
        played.sum()
    assert caught.value.refusal is Refusal.SHARES


def test_a_dealer_that_shares_another_key_than_it_signed_is_noticed() -> None:
    played = Cohort(DEVICES).round()
    dealing(played, 5, lambda reply: resigned(played, 5, reply, mask_key=agreement_key()[1]))
    played.upload(silent=[5])
    played.server.close_uploads()
    played.unmask()
    with pytest.raises(PeerError, match="device 5 shared another secret than it signed") as caught:
        played.sum()
    assert caught.value.refusal is Refusal.SHARES


def test_a_dealer_that_seals_shares_of_no_polynomial_is_noticed() -> None:
    """Every share has the hash that the dealer signed, but any seven of them give another secret."""
    played = Cohort(DEVICES).round()

    def forge(reply: PrepareReply) -> PrepareReply:
        records, holders = [], played.terms.neighbours(5)
        descriptors = {index: labels.digest(labels.DESCRIPTOR, d.descriptor.payload) for index, d in enumerate(states)}
        for holder in holders:
            share = bytes([0, holder]) * 7 + bytes([1, holder**2])
            info = box_info(5, descriptors[5], holder, descriptors[holder], played.terms.digest)
            prekey = prekeys[holder]
            hashes = [
                server_module.share_hash(share, 5, holder, kind, played.terms.digest) for kind in (b"seed", b"key")
            ]
            records.append(seal(share * 2, prekey, info) + b"".join(hashes))
        return resigned(played, 5, reply, deliveries=b"".join(records))

    states = played.cohort.federation.devices
    prekeys = {i: public_half(state.prekey_private) for i, state in enumerate(states)}
    dealing(played, 5, forge)
    played.upload()
    played.server.close_uploads()
    played.unmask()
    with pytest.raises(PeerError, match="device 5 shared another secret") as caught:
        played.sum()
    assert caught.value.refusal is Refusal.SHARES


# What the server takes of a preparation.


def reencoded(key: bytes) -> bytes:
    """The same X25519 key in other bytes: the highest bit is ignored (RFC 7748, section 5)."""
    return key[:-1] + bytes([key[-1] ^ 0x80])


def head_of(played: Round, index: int) -> Head:
    head = played.server._members[index].head
    assert head is not None
    return head


def offered(dealer: int = 5) -> tuple[Round, PrepareReply]:
    """A round of ten, nine of whom prepared, and what the last one sends."""
    played = Cohort(DEVICES).round()
    played.prepare(silent=[dealer])
    request = to_bytes(played.server.prepare_request(dealer))
    return played, from_bytes(PrepareReply, played.cohort.device(dealer).prepare(request))


BAD_PREPARATIONS: dict[str, tuple[Callable[[Round, PrepareReply], PrepareReply], Refusal]] = {
    "another round's": (
        lambda played, reply: replace(reply, head=signed_head(played, 5, read_head(reply.head), plan=bytes(32))),
        Refusal.KEYS,
    ),
    "another device's": (lambda played, reply: resigned(played, 5, reply, signed_as=4), Refusal.KEYS),
    "signed by another": (lambda played, reply: resigned(played, 4, reply), Refusal.KEYS),
    "another's mask key": (
        lambda played, reply: resigned(played, 5, reply, mask_key=head_of(played, 0).mask_key),
        Refusal.KEYS,
    ),
    "another's mask key in another encoding": (
        lambda played, reply: resigned(played, 5, reply, mask_key=reencoded(head_of(played, 0).mask_key)),
        Refusal.KEYS,
    ),
    "no key at all": (lambda played, reply: resigned(played, 5, reply, mask_key=bytes(32)), Refusal.KEYS),
    "another next prekey": (
        lambda played, reply: replace(reply, next_prekey=played.server.keys_of(4).prekey),
        Refusal.SHARES,
    ),
    "another commitment": (lambda played, reply: replace(reply, seed_commitment=bytes(16)), Refusal.SHARES),
    "a record less": (
        lambda played, reply: resigned(played, 5, reply, deliveries=reply.deliveries[:-RECORD_BYTES]),
        Refusal.SHARES,
    ),
    "a record more": (
        lambda played, reply: resigned(played, 5, reply, deliveries=reply.deliveries + bytes(RECORD_BYTES)),
        Refusal.SHARES,
    ),
    "half a record": (
        lambda played, reply: resigned(played, 5, reply, deliveries=reply.deliveries[:-1]),
        Refusal.SHARES,
    ),
    "signed without what the server alone needs": (
        lambda played, reply: replace(
            reply,
            head=signed_head(
                played,
                5,
                replace(
                    read_head(reply.head),
                    root=MerkleTree(
                        records_of(reply.deliveries), labels.joined(*head_context(5, played.terms.digest))
                    ).root,
                ),
            ),
        ),
        Refusal.SHARES,
    ),
    "a record changed": (
        lambda played, reply: replace(reply, deliveries=flipped(reply.deliveries, 100)),
        Refusal.SHARES,
    ),
    "records exchanged": (
        lambda played, reply: replace(
            reply, deliveries=reply.deliveries[RECORD_BYTES:] + reply.deliveries[:RECORD_BYTES]
        ),
        Refusal.SHARES,
    ),
}


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize(("forge", "refusal"), BAD_PREPARATIONS.values(), ids=BAD_PREPARATIONS)
def test_a_preparation_that_the_others_would_refuse_is_not_taken(
    forge: Callable[[Round, PrepareReply], PrepareReply], refusal: Refusal, restored: bool
) -> None:
    played, reply = offered()
    if restored:
        played.server = server_from(played.server.to_bytes(), played.cohort.roster)
    with pytest.raises(RefusedError) as caught:
        played.server.receive_prepare(5, forge(played, reply))
    assert caught.value.refusal is refusal
    assert 5 not in played.server.prepared
    played.server.receive_prepare(5, reply)
    assert 5 in played.server.prepared


def test_a_device_prepares_once() -> None:
    played, reply = offered()
    played.server.receive_prepare(5, reply)
    with pytest.raises(PeerError, match="has prepared already") as caught:
        played.server.receive_prepare(5, reply)
    assert caught.value.refusal is Refusal.REPEATED


@pytest.mark.parametrize("restored", [False, True])
def test_a_preparation_after_the_first_upload_request_is_too_late(restored: bool) -> None:
    """Some would mask for the device, others not: the sum would be noise."""
    played, reply = offered()
    played.server.upload_request(0)
    if restored:
        played.server = server_from(played.server.to_bytes(), played.cohort.roster)
    with pytest.raises(PeerError, match="too late") as caught:
        played.server.receive_prepare(5, reply)
    assert caught.value.refusal is Refusal.PHASE


# What the server takes of an upload.


def asked(index: int = 0) -> tuple[Round, UploadReply]:
    """A round in which device `index` has not uploaded yet, and what it sends."""
    played = Cohort(5).round(width=17, dimension=9, lanes=2)
    played.prepare()
    played.upload(silent=[index])
    request = to_bytes(played.server.upload_request(index))
    return played, from_bytes(UploadReply, played.masked(index, request))


BAD_UPLOADS: dict[str, tuple[dict[str, Any], Refusal]] = {
    "no vector": ({"vector": b""}, Refusal.MALFORMED),
    "a byte less": ({"vector": bytes(19)}, Refusal.MALFORMED),
    "a byte more": ({"vector": bytes(21)}, Refusal.MALFORMED),
    "bits after the last element": ({"vector": bytes(19) + b"\x02"}, Refusal.MALFORMED),
    "no lanes": ({"lanes": b""}, Refusal.MALFORMED),
    "a lane less": ({"lanes": bytes(16)}, Refusal.MALFORMED),
    "a lane more": ({"lanes": bytes(32)}, Refusal.MALFORMED),
    "a metric more": ({"metrics": ("loss",), "lanes": bytes(32)}, Refusal.MODEL),
    "a metric in place of a lane": ({"metrics": ("loss",)}, Refusal.MODEL),
    "another round": ({"round_tag": bytes(TAG_BYTES)}, Refusal.PHASE),
}


@pytest.mark.parametrize(("change", "refusal"), BAD_UPLOADS.values(), ids=BAD_UPLOADS)
def test_an_upload_that_does_not_fit_is_refused_and_changes_nothing(change: dict[str, Any], refusal: Refusal) -> None:
    played, reply = asked()
    before = played.server.to_bytes()
    with pytest.raises(PeerError) as caught:
        played.server.receive_upload(0, replace(reply, **change))
    assert caught.value.refusal is refusal
    assert played.server.to_bytes() == before
    played.server.receive_upload(0, reply)
    played.server.close_uploads()
    played.unmask()
    assert played.sum()[0].tolist() == played.expected().tolist()


@pytest.mark.parametrize("change", [{"lanes": bytes(16)}, {"lanes": bytes(32)}, {"vector": b""}])
def test_a_first_upload_that_does_not_fit_does_not_set_the_measure(change: dict[str, Any]) -> None:
    played = Cohort(5).round()
    played.prepare()
    request = to_bytes(played.server.upload_request(0))
    reply = from_bytes(UploadReply, played.masked(0, request))
    with pytest.raises(PeerError):
        played.server.receive_upload(0, replace(reply, **change))
    played.upload()
    assert played.server.alive == (0, 1, 2, 3, 4)


def test_an_upload_counts_once() -> None:
    played, reply = asked()
    played.server.receive_upload(0, reply)
    before = played.server.to_bytes()
    for again in (reply, replace(reply, lanes=bytes(24))):
        with pytest.raises(PeerError, match="too late, or its second one") as caught:
            played.server.receive_upload(0, again)
        assert caught.value.refusal is Refusal.PHASE
    assert played.server.to_bytes() == before


@pytest.mark.parametrize("restored", [False, True])
def test_an_upload_that_comes_after_the_close_is_discarded(restored: bool) -> None:
    played, reply = asked()
    played.server.close_uploads()
    if restored:
        played.server = server_from(played.server.to_bytes(), played.cohort.roster)
    with pytest.raises(PeerError, match="too late") as caught:
        played.server.receive_upload(0, reply)
    assert caught.value.refusal is Refusal.PHASE
    played.unmask()
    assert played.server.alive == (1, 2, 3, 4)
    assert played.sum()[0].tolist() == played.expected().tolist()


def test_an_upload_that_nobody_asked_for_is_refused() -> None:
    _, reply = asked()
    fresh = Cohort(5).round(width=17, dimension=9, lanes=2)
    fresh.prepare()
    for index in range(5):
        with pytest.raises(PeerError, match="too late, or its second one"):
            fresh.server.receive_upload(index, replace(reply, round_tag=fresh.terms.tag))
    assert fresh.server.alive == ()


@pytest.mark.of_vectors
def test_metrics_have_the_same_names_everywhere() -> None:
    played = Cohort(5).round(lanes=0)
    played.prepare()
    for index in range(5):
        played.server.upload_request(index)
    vector = played.terms.grid.ring.pack(played.terms.grid.ring.zeros(8))
    reply = UploadReply(played.terms.tag, vector, LANES.pack(LANES.zeros(3)), ("accuracy", "loss"))
    played.server.receive_upload(0, reply)
    for names in (("loss", "accuracy"), ("accuracy",), ("accuracy", "loss", "loss"), (), ("accuracy", "Loss")):
        with pytest.raises(PeerError, match="the metrics of device 1 are not the other devices'") as caught:
            played.server.receive_upload(
                1, replace(reply, metrics=names, lanes=LANES.pack(LANES.zeros(len(names) + 1)))
            )
        assert caught.value.refusal is Refusal.MODEL
    played.server.receive_upload(1, reply)
    assert played.server.metrics == ("accuracy", "loss")


def test_no_metrics_are_remembered_too() -> None:
    """After a restart as before, the first upload's names are everybody's, also when there are none."""
    played = Cohort(5).round()
    played.prepare()
    played.upload(silent=[4])
    reply = from_bytes(UploadReply, played.masked(4, to_bytes(played.server.upload_request(4))))
    restored = server_from(played.server.to_bytes(), played.cohort.roster)
    before = restored.to_bytes()
    with pytest.raises(PeerError) as caught:
        restored.receive_upload(4, replace(reply, metrics=("loss",), lanes=reply.lanes + bytes(8)))
    assert caught.value.refusal is Refusal.MODEL
    assert restored.to_bytes() == before


def opened(played: Round) -> dict[int, list[dict[int, int]]]:
    """All prepare: by dealer, its shares of the seed and of the mask secret, at the points of those that open them."""
    replies: dict[int, PrepareReply] = {}

    def seen(step: str, index: int, data: bytes) -> bytes:
        if step == "prepare reply":
            replies[index] = from_bytes(PrepareReply, data)
        return data

    played.meddle = seen
    played.prepare()
    states = played.cohort.federation.devices
    roles = [SecAggClient.from_bytes(state.round, bytes(32)) for state in states]
    found: dict[int, list[dict[int, int]]] = {dealer: [{}, {}] for dealer in replies}
    for dealer, reply in replies.items():
        for holder, record in zip(played.terms.neighbours(dealer), records_of(reply.deliveries), strict=True):
            ends = (part for i in (dealer, holder) for part in (i, descriptor_digest(states[i].descriptor)))
            info = box_info(*ends, played.terms.digest)
            pair = open_sealed(record[:BOX_BYTES], roles[holder].own.prekey_private, info)
            found[dealer][0][holder + 1] = int.from_bytes(pair[:SHARE_BYTES], "big")
            found[dealer][1][holder + 1] = int.from_bytes(pair[SHARE_BYTES:], "big")
    return found


def polynomial_through(points: dict[int, int]) -> list[int]:
    """Its coefficients, lowest power first: Lagrange's interpolation."""
    found = [0] * len(points)
    for x, y in points.items():
        basis, scale = [1], 1
        for other in points.keys() - {x}:
            basis = [lower - other * same for lower, same in zip([0, *basis], [*basis, 0], strict=True)]
            scale = scale * (x - other) % PRIME
        weight = y * pow(scale, -1, PRIME)
        found = [(value + weight * each) % PRIME for value, each in zip(found, basis, strict=True)]
    return found


def test_no_two_secrets_are_shared_by_polynomials_that_have_a_coefficient_in_common() -> None:
    """One holder of two secrets' shares would learn their difference, or with a known polynomial the secret itself."""
    cohort, upper = Cohort(DEVICES), []
    for number, attempt in ((1, 0), (1, 1), (2, 0)):
        dealt = opened(cohort.round(number=number, attempt=attempt))
        assert len(dealt) == DEVICES
        for points in (kind for kinds in dealt.values() for kind in kinds):
            coefficients = polynomial_through(points)
            assert coefficients[THRESHOLD:] == [0] * (DEVICES - 1 - THRESHOLD)
            upper += coefficients[1:THRESHOLD]
    assert len(set(upper)) == len(upper) == 3 * DEVICES * 2 * (THRESHOLD - 1)


def test_secrets_are_elements_of_the_field_whatever_the_source_of_randomness() -> None:
    """Sixteen random bytes might be none."""
    played = Cohort(4).round()
    request = to_bytes(played.server.prepare_request(0, frozenset()))
    device = Device(played.cohort.federation.devices[0], played.cohort.policy, played.cohort.now, lambda n: b"\xff" * n)
    assert from_bytes(PrepareReply, device.prepare(request)).deliveries
