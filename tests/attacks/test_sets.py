"""A server that lies about who takes part, who is alive and who dropped is refused, and learns nothing by it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from attacks.insiders import read_head, signed_head
from protocol import SHARED_INPUT, UNLIMITED, Cohort, Round, asking, empty_total, plain_encoding, shares_in

from propolis.secure.errors import PeerError, Refusal, RefusedError, TooFewPeersError, TrustError
from propolis.secure.identity import Signed, agreement_key
from propolis.secure.secagg.client import Neighbour, Own, SecAggClient
from propolis.secure.secagg.confirmation import confirm_alive
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.masks import public_half
from propolis.secure.secagg.messages import (
    RECORD_BYTES,
    TAG_BYTES,
    Confirmation,
    ConfirmReply,
    ConfirmRequest,
    NeighbourKeys,
    PrepareReply,
    PrepareRequest,
    UnmaskReply,
    UnmaskRequest,
    UploadRequest,
    from_bytes,
    marks,
    to_bitmap,
    to_bytes,
)
from propolis.secure.secagg.plan import Plan, Terms
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.server import SecAggServer

# Of the roster's 11 devices, 10 are the cohort; 9 is silent at prepare, 8 at upload. Each has k = 9 neighbours and
# needs t = 7 of them; device 0 masks for 1..8, of whom 1..7 are alive: just enough.
MASKING = range(1, 9)
ALIVE, DROPPED, UNPREPARED, STRANGER, NOBODY = tuple(range(8)), (8,), 9, 10, 2**20 - 1
THRESHOLD = 7
SPARSE = {"corrupted_ppm": 50_000, "dropped_ppm": 100_000}

Lie = Callable[[UnmaskRequest], UnmaskRequest]


def uploaded(malicious: bool = False) -> Round:
    """The round above, with all uploads in."""
    played = Cohort(11).round(cohort=range(10), malicious=malicious)
    played.prepare(silent=[UNPREPARED])
    played.upload(silent=DROPPED)
    played.server.close_uploads()
    assert played.server.alive == ALIVE
    return played


def confirmed() -> Round:
    played = uploaded(malicious=True)
    played.confirm()
    return played


def refusal_of(answer: Callable[[bytes], object], request: object) -> RefusedError:
    """The error that a device refuses a request with."""
    with pytest.raises(RefusedError) as caught:
        answer(to_bytes(request))
    return caught.value


def told(dropped: Collection[int], masking: Sequence[int] = MASKING) -> Lie:
    return lambda request: replace(request, dropped=marks(dropped, masking))


# Alive and dropped. A request can only mark which of 1..8 dropped: nobody is in both sets, and nobody is left out.

IMPOSSIBLE = {
    "one too few alive": (told((7, 8)), "6 neighbours are alive, 7 are needed"),
    "one alive": (told(range(2, 9)), "1 neighbours are alive, 7 are needed"),
    "a bit too many": (lambda request: replace(request, dropped=b"\0\1"), "does not fit 8 devices"),
    "a byte too many": (lambda request: replace(request, dropped=b"\1\0"), "does not fit 8 devices"),
    "a bitmap of nobody": (lambda request: replace(request, dropped=b"\0"), "does not fit 8 devices"),
}


@pytest.mark.parametrize(("lie", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_sets_are_refused_and_cost_nothing(lie: Lie, message: str) -> None:
    played = uploaded()
    genuine = played.server.unmask_request(0)
    error = refusal_of(played.cohort.device(0).unmask, lie(genuine))
    assert isinstance(error, PeerError)
    assert error.refusal is Refusal.SETS
    assert message in str(error)
    reply = from_bytes(UnmaskReply, played.cohort.device(0).unmask(to_bytes(genuine)))
    assert list(shares_in(reply, MASKING)) == list(MASKING)


@pytest.mark.parametrize("number", [3, 4, 7, 10])
def test_a_device_insists_on_being_in_the_sum_that_it_unmasks(number: int) -> None:
    """A request in which it dropped is one to somebody else, and has no records for it."""
    played = Cohort(number).round()
    played.prepare()
    played.upload()
    for index in range(1, number):
        lie = replace(played.server.unmask_request(0), dropped=marks([index], played.masking(0)))
        assert refusal_of(played.cohort.device(index).unmask, lie).refusal in (Refusal.SHARES, Refusal.SETS)


@pytest.mark.parametrize("alive", [(), (8,)], ids=["itself", "another"])
def test_a_sum_of_one_is_not_unmasked_whatever_the_policy(alive: tuple[int, ...]) -> None:
    played = uploaded()
    lie = told(set(MASKING) - set(alive))
    error = refusal_of(played.cohort.device(0).unmask, lie(played.server.unmask_request(0)))
    assert error.refusal is (Refusal.SETS if alive else Refusal.POLICY)


@pytest.mark.parametrize("fewest", [8, 9])
def test_a_sum_of_fewer_than_the_devices_floor_is_not_unmasked(fewest: int) -> None:
    """Eight are alive: more than t, but perhaps fewer than this device wants to hide among."""
    played = uploaded()
    request = played.server.unmask_request(0)
    device = Device(played.cohort.federation.devices[0], Policy(min_cohort=fewest), played.cohort.now)
    if fewest == len(ALIVE):
        assert from_bytes(UnmaskReply, device.unmask(to_bytes(request))).shares
    else:
        assert refusal_of(device.unmask, request).refusal is Refusal.POLICY


# Order of the exchanges.


def request_of(exchange: str, played: Round) -> object:
    """A request to device 0 that only the phase speaks against."""
    server = played.server
    requests: dict[str, Callable[[], object]] = {
        "upload": lambda: server.upload_request(0),
        "confirm": lambda: ConfirmRequest(played.terms.tag, to_bitmap(range(9), 11)),
        "unmask": lambda: told(())(server.unmask_request(0)),
    }
    return requests[exchange]()


def begin(malicious: bool, until: str) -> Round:
    """A round of 9 of the 10 devices that has come as far as `until`."""
    played = Cohort(11).round(cohort=range(10), malicious=malicious)
    steps: list[tuple[str, Callable[[], object]]] = [
        ("prepared", lambda: played.prepare(silent=[UNPREPARED])),
        ("uploaded", lambda: (played.upload(), played.server.close_uploads())),
        ("confirmed", played.confirm if malicious else lambda: None),
        ("unmasked", played.unmask),
    ]
    for name, step in steps:
        step()
        if name == until:
            return played
    raise AssertionError(until)


def test_the_floor_holds_on_a_sparse_graph_too_as_far_as_a_device_can_see() -> None:
    """Of a cohort of 100 that has shrunk to 85, a device whose floor is 95 sees too few of its neighbours."""
    played = Cohort(100, policy=Policy(min_cohort=95, max_reveals_per_model=None)).round()
    assert played.terms.sharing.degree < 99
    gone = range(0, 100, 7)
    played.prepare()
    played.upload(silent=gone)
    played.unmask()
    assert {error.refusal for error in played.refused.values()} == {Refusal.POLICY}
    with pytest.raises(TooFewPeersError):
        played.sum()


@pytest.mark.parametrize(
    ("malicious", "until", "exchange"),
    [
        (False, "prepared", "unmask"),
        (False, "prepared", "confirm"),
        (False, "uploaded", "confirm"),
        (False, "unmasked", "confirm"),
        (False, "unmasked", "unmask"),
        (False, "unmasked", "upload"),
        (True, "confirmed", "confirm"),
        (True, "unmasked", "unmask"),
        (True, "prepared", "unmask"),
        (True, "prepared", "confirm"),
        (True, "uploaded", "unmask"),
        (True, "unmasked", "upload"),
    ],
)
def test_exchanges_come_in_their_order(malicious: bool, until: str, exchange: str) -> None:
    played = begin(malicious, until)
    device, request = played.cohort.device(0), request_of(exchange, played)
    device.state.answers.clear()  # even a device that has forgotten its answers
    before = device.state.to_bytes()
    answers = {
        "upload": lambda data: device.begin_upload(data, SHARED_INPUT),
        "confirm": device.confirm,
        "unmask": device.unmask,
    }
    assert refusal_of(answers[exchange], request).refusal is Refusal.PHASE
    assert device.state.to_bytes() == before


@pytest.mark.parametrize("exchange", ["upload", "confirm", "unmask"])
def test_without_a_round_nothing_is_answered(exchange: str) -> None:
    played = begin(malicious=True, until="prepared")
    stranger = played.cohort.device(STRANGER)
    answers = {"upload": lambda data: stranger.begin_upload(data, SHARED_INPUT)}
    answer = answers.get(exchange) or getattr(stranger, exchange)
    error = refusal_of(answer, request_of(exchange, played))
    assert error.refusal is Refusal.PHASE
    assert "no round is under way" in str(error)


@pytest.mark.parametrize(
    ("until", "exchange"), [("prepared", "upload"), ("uploaded", "confirm"), ("confirmed", "unmask")]
)
def test_requests_of_another_round_are_refused_by_device_and_role(until: str, exchange: str) -> None:
    played = begin(malicious=True, until=until)
    request = replace(request_of(exchange, played), round_tag=b"x" * TAG_BYTES)  # type: ignore[type-var]
    device = played.cohort.device(0)
    answer = (lambda data: device.begin_upload(data, SHARED_INPUT)) if exchange == "upload" else None
    assert refusal_of(answer or getattr(device, exchange), request).refusal is Refusal.PHASE
    role = SecAggClient.from_bytes(device.state.round, device.state.signing_key.private)
    with pytest.raises(PeerError, match="another round") as caught:
        getattr(role, "check_upload" if exchange == "upload" else exchange)(request)
    assert caught.value.refusal is Refusal.PHASE


def test_a_request_of_another_round_is_no_second_request_of_this_one() -> None:
    played = begin(malicious=False, until="unmasked")
    request = replace(played.server.unmask_request(0), round_tag=b"x" * TAG_BYTES)
    assert refusal_of(played.cohort.device(0).unmask, request).refusal is Refusal.PHASE


def test_a_device_outside_of_any_round_has_no_terms() -> None:
    with pytest.raises(PeerError, match="no round is under way") as caught:
        _ = Cohort(2).device(0).terms
    assert caught.value.refusal is Refusal.PHASE


# Neighbours that prepared.


def heads_refused(
    played: Round, heads: Callable[[tuple[Any, ...]], tuple[Any, ...]], silent: Collection[int] | None = None
) -> RefusedError:
    """What device 0 says to other heads, and to other neighbours called silent."""
    genuine = played.server.upload_request(0)
    marked = genuine.silent if silent is None else marks(silent, played.terms.neighbours(0))
    request = UploadRequest(genuine.round_tag, marked, heads(genuine.heads))
    return refusal_of(lambda data: played.cohort.device(0).begin_upload(data, SHARED_INPUT), request)


@pytest.mark.parametrize("prepared", range(7))
def test_fewer_than_t_prepared_neighbours_are_refused(prepared: int) -> None:
    played = begin(malicious=False, until="prepared")
    error = heads_refused(played, lambda heads: heads[:prepared], range(1 + prepared, 10))
    assert error.refusal is Refusal.SETS
    assert f"{prepared} neighbours prepared, 7 are needed" in str(error)


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_neighbour_counts_once(place: int) -> None:
    played = begin(malicious=False, until="prepared")
    assert "expected 8 heads, got 9" in str(heads_refused(played, lambda heads: (*heads, heads[place])))
    in_place = heads_refused(played, lambda heads: (*heads[:7], heads[place]))
    assert in_place.refusal is Refusal.KEYS
    assert "does not hold" in str(in_place)


@pytest.mark.parametrize("change", [lambda h: h[:-1], lambda h: (), lambda h: h[::-1], lambda h: (h[1], h[0], *h[2:])])
def test_heads_are_those_of_the_neighbours_that_prepared_in_their_order(
    change: Callable[[tuple[Any, ...]], tuple[Any, ...]],
) -> None:
    error = heads_refused(begin(malicious=False, until="prepared"), change)
    assert error.refusal in (Refusal.SETS, Refusal.KEYS)


@pytest.mark.parametrize("silent", [b"\0", b"\0\0", b"\0\1\0", b"\0\2", b"\1"])
def test_silent_neighbours_are_a_bitmap_over_the_neighbours(silent: bytes) -> None:
    played = begin(malicious=False, until="prepared")
    request = replace(played.server.upload_request(0), silent=silent)
    error = refusal_of(lambda data: played.cohort.device(0).begin_upload(data, SHARED_INPUT), request)
    assert error.refusal is Refusal.SETS


def test_only_neighbours_are_masked_for() -> None:
    played = Cohort(70).round(**SPARSE)
    neighbours = played.terms.neighbours(0)
    outside = next(index for index in range(1, 70) if index not in neighbours)
    few = neighbours[: played.terms.sharing.threshold - 1]
    played.prepare(silent=set(range(1, 70)) - {*few, outside})
    stranger = played.server._members[outside].signed_head
    silent = neighbours[played.terms.sharing.threshold :]
    assert heads_refused(played, lambda heads: (*heads, stranger)).refusal is Refusal.SETS
    error = heads_refused(played, lambda heads: (*heads, stranger), silent)  # in place of a neighbour
    assert error.refusal is Refusal.KEYS
    assert "does not hold" in str(error)


def test_a_device_is_no_neighbour_of_its_own() -> None:
    played = begin(malicious=False, until="prepared")
    own = played.server.upload_request(1).heads[0]
    error = heads_refused(played, lambda heads: (*heads, own))
    assert error.refusal is Refusal.SETS


@pytest.mark.parametrize("flip", [0, 0x80], ids=["as it is", "in another encoding"])
@pytest.mark.parametrize("copied", ["another neighbour's", "the device's own"])
def test_two_devices_with_one_mask_key_are_not_masked_for(copied: str, flip: int) -> None:
    """Their masks would be one mask, or cancel."""
    played = begin(malicious=False, until="prepared")
    own = SecAggClient.from_bytes(played.cohort.federation.devices[0].round, bytes(32))

    def forged(heads: tuple[Any, ...]) -> tuple[Any, ...]:
        key = public_half(own.mask_private) if copied == "the device's own" else read_head(heads[1]).mask_key
        key = key[:-1] + bytes([key[-1] ^ flip])  # X25519 ignores the highest bit
        return (signed_head(played, 1, replace(read_head(heads[0]), mask_key=key)), *heads[1:])

    error = heads_refused(played, forged)
    assert isinstance(error, TrustError)
    assert error.refusal is Refusal.KEYS
    assert ("not canonical" if flip else "one mask key") in str(error)


def test_a_mask_key_of_low_order_is_refused_before_any_training() -> None:
    """With it the pairwise mask would be known to everybody."""
    played = begin(malicious=False, until="prepared")

    def forged(heads: tuple[Any, ...]) -> tuple[Any, ...]:
        return (signed_head(played, 1, replace(read_head(heads[0]), mask_key=bytes(32))), *heads[1:])

    error = heads_refused(played, forged)
    assert error.refusal is Refusal.KEYS
    assert "low order" in str(error)


# The confirmed set.

IMPOSSIBLE_BITMAPS = {
    "itself left out": (to_bitmap(range(1, 9), 11), "own update is called dropped"),
    "an unprepared one": (to_bitmap((*ALIVE, UNPREPARED), 11), "did not prepare is called alive"),
    "a stranger": (to_bitmap((*ALIVE, STRANGER), 11), "did not prepare is called alive"),
    "beyond the roster": (to_bitmap((*ALIVE, 15), 16), "did not prepare is called alive"),
    "one too few": (to_bitmap(range(7), 11), "6 neighbours are alive, 7 are needed"),
    "alone": (to_bitmap((0,), 11), "0 neighbours are alive, 7 are needed"),
    "shorter": (to_bitmap(ALIVE, 8), "no bitmap over the roster"),
    "longer": (to_bitmap(ALIVE, 24), "no bitmap over the roster"),
}


@pytest.mark.parametrize(("bitmap", "message"), IMPOSSIBLE_BITMAPS.values(), ids=IMPOSSIBLE_BITMAPS)
def test_impossible_sets_are_not_confirmed(bitmap: bytes, message: str) -> None:
    played = uploaded(malicious=True)
    error = refusal_of(played.cohort.device(0).confirm, ConfirmRequest(played.terms.tag, bitmap))
    assert error.refusal is Refusal.SETS
    assert message in str(error)
    played.confirm()
    assert not played.refused


@pytest.mark.parametrize("forgetful", [False, True])
def test_a_device_confirms_one_set_only(forgetful: bool) -> None:
    played = uploaded(malicious=True)
    device = played.cohort.device(0)
    request = played.server.confirm_request()
    first = device.confirm(to_bytes(request))
    assert device.confirm(to_bytes(request)) == first
    if forgetful:
        device.state.answers.clear()
    another = replace(request, alive=to_bitmap((0, 1, 2, 3, 4, 5, 6, 8), 11))
    error = refusal_of(device.confirm, another)
    assert error.refusal is (Refusal.PHASE if forgetful else Refusal.REPEATED)


def test_another_set_than_the_confirmed_one_is_not_unmasked() -> None:
    played = confirmed()
    request = told((7,))(played.server.unmask_request(0))
    error = refusal_of(played.cohort.device(0).unmask, request)
    assert error.refusal is Refusal.SETS
    assert "not the one that this device confirmed" in str(error)


def signed_by(played: Round, signer: int, alive: Collection[int] = ALIVE, plan: bytes | None = None) -> bytes:
    key = played.cohort.federation.devices[signer].signing_key.private
    return confirm_alive(key, plan or played.terms.digest, to_bitmap(list(alive), 11))


FORGED: dict[str, Callable[[Round], Confirmation]] = {
    "random": lambda played: Confirmation(7, bytes(64)),
    "another device's": lambda played: Confirmation(7, signed_by(played, 6)),
    "over another set": lambda played: Confirmation(7, signed_by(played, 7, range(9))),
    "over another plan": lambda played: Confirmation(7, signed_by(played, 7, plan=b"p" * 32)),
    "the device's own": lambda played: Confirmation(0, signed_by(played, 0)),
    "a dropped one's": lambda played: Confirmation(8, signed_by(played, 8)),
    "an unprepared one's": lambda played: Confirmation(UNPREPARED, signed_by(played, UNPREPARED)),
    "a stranger's": lambda played: Confirmation(STRANGER, signed_by(played, STRANGER)),
    "nobody's": lambda played: Confirmation(NOBODY, bytes(64)),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_forged_confirmation_is_refused(forge: Callable[[Round], Confirmation]) -> None:
    """Whether it stands in for a genuine one, or comes on top of enough genuine ones."""
    played = confirmed()
    genuine, device = played.server.unmask_request(0), played.cohort.device(0)
    assert [each.index for each in genuine.confirmations] == list(range(1, 8))
    forged = forge(played)
    in_place = replace(genuine, confirmations=(*genuine.confirmations[:-1], forged))
    on_top = replace(genuine, confirmations=(*genuine.confirmations, forged))
    for request in (in_place, on_top):
        assert refusal_of(device.unmask, request).refusal is Refusal.SETS
    device.unmask(to_bytes(genuine))


@pytest.mark.parametrize("count", range(THRESHOLD))
def test_fewer_than_t_confirmations_unmask_nothing(count: int) -> None:
    played = confirmed()
    genuine, device = played.server.unmask_request(0), played.cohort.device(0)
    few = genuine.confirmations[:count]
    for confirmations in (few, few * 9):  # one signature many times is one signature
        error = refusal_of(device.unmask, replace(genuine, confirmations=confirmations))
        assert error.refusal is Refusal.SETS
        assert f"{count} confirm, 7 are needed" in str(error)


def test_the_server_takes_genuine_confirmations_only() -> None:
    played = uploaded(malicious=True)

    def forge(step: str, index: int, data: bytes) -> bytes:
        if step != "confirm reply":
            return data
        other = played.cohort.device(1).state.signing_key.private
        signature = confirm_alive(other, played.terms.digest, played.server.confirm_request().alive)
        return data.replace(data[-64:], signature)

    played.meddle = forge
    with pytest.raises(TrustError, match="confirmation of the alive set does not hold"):
        played.confirm()


def test_the_server_takes_confirmations_of_those_alive_only() -> None:
    """One of a device that dropped would have everybody refuse to unmask."""
    played = confirmed()
    reply = ConfirmReply(played.terms.tag, signed_by(played, DROPPED[0]))
    with pytest.raises(PeerError, match="not asked who is alive") as caught:
        played.server.receive_confirm(DROPPED[0], reply)
    assert caught.value.refusal is Refusal.PHASE


def test_the_server_takes_no_confirmation_before_the_close() -> None:
    played = Cohort(5).round(malicious=True)
    played.prepare()
    played.upload()
    with pytest.raises(PeerError, match="not asked who is alive") as caught:
        played.confirm()
    assert caught.value.refusal is Refusal.PHASE


# Split views.


def revealing(played: Round, groups: dict[int, list[int]], colluders: Collection[int]) -> set[int]:
    """The views that unmask something when each group is shown its own; colluders sign all of them.

    In view 0 all ten are alive; in view 1 device 9 dropped.
    """
    views, opened = {0: tuple(range(10)), 1: tuple(range(9))}, set()
    for view, members in groups.items():
        alive = views[view]
        signed = {index: signed_by(played, index, alive) for index in (*colluders, *members) if index in alive}
        for index in members:
            state = deepcopy(played.cohort.federation.devices[index])
            device = Device(state, played.cohort.policy, played.cohort.now)
            device.confirm(to_bytes(ConfirmRequest(played.terms.tag, to_bitmap(alive, 10))))
            confirmations = tuple(Confirmation(other, each) for other, each in signed.items() if other != index)
            request = replace(played.server.unmask_request(index), confirmations=confirmations)
            with suppress(PeerError):
                device.unmask(to_bytes(told(set(range(10)) - set(alive), played.masking(index))(request)))
                opened.add(view)
    return opened


@pytest.mark.parametrize("colluding", [0, 4])
def test_with_split_views_only_one_view_is_ever_unmasked(colluding: int) -> None:
    """2t = 14 > k + c = 9 + 4: two disjoint majorities do not exist."""
    played = Cohort(10).round(malicious=True)
    played.prepare()
    played.upload()
    colluders, honest = range(colluding), range(colluding, 10)
    opened = []
    for cut in range(len(honest)):
        groups = {1: list(honest[:cut]), 0: list(honest[cut:])}  # device 9 agrees only that it is alive
        opened.append(revealing(played, groups, colluders))
    assert all(len(views) < 2 for views in opened)
    assert {0} in opened
    assert set() in opened


def test_with_more_colluders_than_assumed_split_views_succeed() -> None:
    """What the bound is for: six of nine neighbours collude, and both views are unmasked."""
    played = Cohort(10).round(malicious=True)
    played.prepare()
    played.upload()
    assert revealing(played, {1: [6, 7], 0: [8, 9]}, range(6)) == {0, 1}


# Graph, cohort and plan.


def prepare_refused(cohort: Cohort, index: int, request: PrepareRequest) -> RefusedError:
    before = cohort.federation.devices[index].to_bytes()
    error = refusal_of(cohort.device(index).prepare, request)
    assert cohort.federation.devices[index].to_bytes() == before
    return error


Neighbours = tuple[NeighbourKeys, ...]
FORGED_GRAPHS: dict[str, Callable[[Neighbours, NeighbourKeys, NeighbourKeys], Neighbours]] = {
    "one less": lambda genuine, other, own: genuine[1:],
    "one more": lambda genuine, other, own: (*genuine, other),
    "another one": lambda genuine, other, own: (*genuine[1:], other),
    "one twice": lambda genuine, other, own: (*genuine, genuine[0]),
    "one twice in place of another": lambda genuine, other, own: (*genuine[1:], genuine[-1]),
    "itself too": lambda genuine, other, own: (*genuine, own),
    "itself in place of another": lambda genuine, other, own: (*genuine[1:], own),
    "none": lambda genuine, other, own: (),
}


@pytest.mark.parametrize("devices", [6, 70])
@pytest.mark.parametrize("forge", FORGED_GRAPHS.values(), ids=FORGED_GRAPHS)
def test_the_device_computes_its_neighbours_by_itself(
    forge: Callable[[Neighbours, NeighbourKeys, NeighbourKeys], Neighbours], devices: int
) -> None:
    asked = Asked(devices + 1)
    genuine = asked.genuine(cohort=range(devices), **SPARSE)
    neighbours = Terms(genuine.plan).neighbours(0)
    outside = next(keys for index, keys in asked.keys.items() if index and index not in neighbours)
    forged = forge(tuple(asked.keys[index] for index in neighbours), outside, asked.keys[0])
    error = prepare_refused(asked.cohort, 0, asking(genuine.plan, genuine.prekey_number, forged))
    assert error.refusal is Refusal.SETS
    asked.prepare(genuine)


@pytest.mark.parametrize("name", FORGED_GRAPHS)
def test_the_role_seals_to_the_neighbours_of_the_graph_only(name: str) -> None:
    terms, keys = Terms(Cohort(5).plan().to_bytes()), agreement_key()
    own = Own(0, bytes(32), bytes(32), keys[0])
    neighbours = [Neighbour(index, bytes(32), bytes(32), keys[1]) for index in range(7)]
    forged: Any = FORGED_GRAPHS[name](tuple(neighbours[1:5]), neighbours[6], neighbours[0])  # type: ignore[arg-type]
    with pytest.raises(PeerError, match="not those of the round's graph") as caught:
        SecAggClient.prepare(terms, own, forged, Signed(b"p", bytes(64)), os.urandom)
    assert caught.value.refusal is Refusal.SETS


@pytest.mark.parametrize(
    ("devices", "malicious", "complete"), [(64, False, True), (65, True, True), (65, False, False)]
)
def test_against_a_lying_server_every_graph_is_complete(devices: int, malicious: bool, complete: bool) -> None:
    asked = Asked(devices)
    genuine = asked.genuine(malicious=malicious, **SPARSE)
    assert (len(genuine.prekeys) == devices - 1) == complete
    if malicious:
        sparse = replace(genuine, prekeys=genuine.prekeys[:34], descriptors=genuine.descriptors[:34])
        assert prepare_refused(asked.cohort, 0, sparse).refusal is Refusal.SETS
    assert len(asked.prepare(genuine).deliveries) == len(genuine.prekeys) * RECORD_BYTES


class Asked:
    """Devices that have said hello, and a server that may ask device 0 for any plan it likes."""

    def __init__(self, devices: int = 10, policy: Policy = UNLIMITED) -> None:
        self.cohort = Cohort(devices, policy)
        self.keys = {index: self.cohort.hello(index) for index in range(devices)}

    def request(self, plan: Plan, neighbours: Collection[int]) -> PrepareRequest:
        number = self.cohort.federation.devices[0].prekey_number
        return asking(plan.to_bytes(), number, [self.keys[index] for index in neighbours])

    def genuine(self, **changes: Any) -> PrepareRequest:
        """A request that is right but for what the plan says."""
        plan = self.cohort.plan(**changes)
        return self.request(plan, Terms(plan.to_bytes()).neighbours(0))

    def prepare(self, request: PrepareRequest) -> PrepareReply:
        return from_bytes(PrepareReply, self.cohort.device(0).prepare(to_bytes(request)))


def test_a_cohort_without_the_device_is_refused() -> None:
    asked = Asked()
    error = prepare_refused(asked.cohort, 0, asked.request(asked.cohort.plan(cohort=range(1, 10)), range(1, 10)))
    assert error.refusal is Refusal.SETS
    assert "not in the cohort" in str(error)


@pytest.mark.parametrize("length", [1, 3, 1000])
def test_a_cohort_of_another_length_than_the_roster_is_refused(length: int) -> None:
    asked = Asked()
    plan = replace(asked.cohort.plan(), cohort=to_bitmap(range(8), 8 * length))
    error = prepare_refused(asked.cohort, 0, asked.request(plan, range(1, 8)))
    assert error.refusal is Refusal.SETS
    assert "no bitmap over the roster" in str(error)


def test_a_cohort_beyond_the_roster_is_refused() -> None:
    asked = Asked()
    plan = asked.cohort.plan(encoding=plain_encoding(("a",), devices=11))
    plan = replace(plan, cohort=to_bitmap((*range(10), 11), 16))
    error = prepare_refused(asked.cohort, 0, asked.request(plan, range(1, 10)))
    assert error.refusal is Refusal.IDENTITY


@pytest.mark.of_vectors
@pytest.mark.parametrize("width", [2, 4])
def test_a_plan_whose_ring_is_too_small_for_its_devices_is_refused(width: int) -> None:
    asked = Asked()
    plan = asked.cohort.plan()
    narrow = replace(plan, encoding=replace(plan.encoding, width=width, levels=1))
    error = prepare_refused(asked.cohort, 0, asked.request(narrow, range(1, 10)))
    assert isinstance(error, PeerError)
    assert error.refusal is Refusal.MALFORMED
    asked.prepare(asked.genuine(width=5))


def test_a_device_that_was_not_given_the_roster_takes_part_in_nothing() -> None:
    asked = Asked()
    asked.cohort.federation.devices[0].roster = None
    assert prepare_refused(asked.cohort, 0, asked.genuine()).refusal is Refusal.ROSTER


@pytest.mark.parametrize(
    "change",
    [
        {"corrupted_ppm": 60_000},
        {"dropped_ppm": 60_000},
        {"attempt": 1},
        {"cohort": range(9)},
        {"width": 17, "dimension": 9},
    ],
)
def test_devices_with_different_plans_do_not_mask_for_each_other(change: dict[str, Any]) -> None:
    """A server that has one device compute another threshold, graph or cohort ends up with two rounds."""
    cohort = Cohort(10)
    victim, terms = cohort.round(**SPARSE), Terms(cohort.plan(**{**SPARSE, **change}).to_bytes())
    keys = {index: victim.server.keys_of(index) for index in terms.cohort}
    others = Round(cohort, terms, SecAggServer(terms, cohort.roster, keys, empty_total(terms, 8), 2), 8, 2)
    victim.prepare(silent=range(1, 9))
    others.prepare(silent=[0, 9])
    foreign = [others.server._members[index].signed_head for index in range(1, 9)]
    error = heads_refused(victim, lambda heads: (*foreign, *heads), ())
    assert isinstance(error, TrustError)
    assert error.refusal is Refusal.KEYS
    assert "does not hold" in str(error)


# The device's own floors.

FLOORS: dict[str, tuple[Policy, dict[str, Any], dict[str, Any]]] = {
    "cohort": (Policy(min_cohort=5), {"cohort": range(4)}, {"cohort": range(5)}),
    "default cohort": (Policy(), {"cohort": range(2)}, {"cohort": range(3)}),
    "threshold": (Policy(min_threshold=5), {"cohort": range(6)}, {"cohort": range(7)}),
    "dropped": (Policy(min_dropped=0.2), {"dropped_ppm": 199_999}, {"dropped_ppm": 200_000}),
    "default dropped": (Policy(), {"dropped_ppm": 49_999}, {"dropped_ppm": 50_000}),
    "corrupted": (Policy(min_corrupted=0.2), {"corrupted_ppm": 199_999}, {"corrupted_ppm": 200_000}),
    "default corrupted": (Policy(), {"corrupted_ppm": 49_999}, {"corrupted_ppm": 50_000}),
    "malicious": (Policy(require_malicious=True), {"malicious": False}, {"malicious": True}),
}


@pytest.mark.parametrize(("policy", "below", "at"), FLOORS.values(), ids=FLOORS)
def test_below_the_devices_floor_nothing_is_prepared(policy: Policy, below: dict[str, Any], at: dict[str, Any]) -> None:
    asked = Asked(10, policy)
    error = prepare_refused(asked.cohort, 0, asked.genuine(**below))
    assert isinstance(error, PeerError)
    assert error.refusal is Refusal.POLICY
    asked.prepare(asked.genuine(**at))
