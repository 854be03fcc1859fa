"""A server that has devices open something else than a sum of theirs, and one that has them answer twice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from encrypted_app import EncryptedHive, another_key, encrypted_federation, sum_of
from flwr.app import Message, RecordDict
from secure_app import MODEL, body_of, exchange_of, honest, outcome_of, record

from propolis.client.encrypted_sums import open_model, open_model_file
from propolis.client.state import FileStore, MemoryStore
from propolis.flower import with_content
from propolis.messages import RECORD, protocol_record, refusal_of
from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal, TooFewPeersError, TrustError, UsageError
from propolis.secure.he.bfv import HEADER_BYTES, Decryptor
from propolis.secure.he.held import KeyBundle, scheme_of
from propolis.secure.he.keys import delegate_holder, state_key
from propolis.secure.he.messages import EncryptedPlan, EncryptedSum, EncryptedUpload, pieces
from propolis.secure.he.stream import Totals
from propolis.secure.he.tag import tag_bytes
from propolis.secure.identity import SigningKey
from propolis.secure.secagg import device_state
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.messages import to_bitmap
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.runs import began_at, new_run_id
from propolis.secure.secagg.states import Exchange
from propolis.simulations.federation import SIMULATED, make_federation

HOUR = 3600


@pytest.fixture(scope="module")
def trained() -> EncryptedHive:
    """Two rounds with five devices; what tests change of it they put back."""
    hive = EncryptedHive(5)
    hive.round(**{"server-round": 1})
    hive.round(**{"server-round": 2})
    return hive


@pytest.fixture
def hive(trained: EncryptedHive) -> Iterator[EncryptedHive]:
    before = sum_of(trained)
    deliver = trained.wire.deliver
    yield trained
    trained.grid.model, trained.wire.deliver = before, deliver
    trained.wire.replies.clear()


@pytest.fixture
def decrypted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What devices decrypt from here on."""
    seen: list[bytes] = []
    decrypt = Decryptor.decrypt
    monkeypatch.setattr(Decryptor, "decrypt", lambda self, data: (seen.append(data), decrypt(self, data))[1])
    return seen


def ciphertext_size(hive: EncryptedHive) -> int:
    parameters = hive.keys.public.parameters
    return scheme_of(parameters).ciphertext_bytes + tag_bytes(parameters)


def crafted(hive: EncryptedHive) -> dict[str, Any]:
    """(0, Delta): decrypts to the secret key."""
    data = bytearray(sum_of(hive).ciphertexts)
    body = len(data) - tag_bytes(hive.keys.public.parameters) - HEADER_BYTES
    data[HEADER_BYTES : HEADER_BYTES + body] = bytes(body // 2) + b"\x01" + bytes(body - body // 2 - 1)
    return {"ciphertexts": bytes(data)}


def changed_by_one_bit(hive: EncryptedHive) -> dict[str, Any]:
    data = bytearray(sum_of(hive).ciphertexts)
    data[HEADER_BYTES + 99] ^= 1
    return {"ciphertexts": bytes(data)}


def with_another_tag(hive: EncryptedHive) -> dict[str, Any]:
    data = bytearray(sum_of(hive).ciphertexts)
    data[-tag_bytes(hive.keys.public.parameters)] ^= 1
    return {"ciphertexts": bytes(data)}


def upload_of(hive: EncryptedHive, place: int = -1) -> EncryptedUpload:
    return EncryptedUpload.from_bytes(body_of(hive.wire.said("encrypt")[place]), 2**24)


def one_device_as_itself(hive: EncryptedHive) -> dict[str, Any]:
    """Its own index: the tag holds, and one is too few."""
    hive.round(**{"server-round": 3})
    plan = sum_of(hive).plan
    return {"plan": plan, "alive": to_bitmap([4], 5), "ciphertexts": upload_of(hive).ciphertexts}


def one_device_as_all(hive: EncryptedHive) -> dict[str, Any]:
    hive.round(**{"server-round": 3})
    return {"plan": sum_of(hive).plan, "ciphertexts": upload_of(hive).ciphertexts}


def two_devices(hive: EncryptedHive) -> dict[str, Any]:
    """A true sum, over fewer than the devices' floor of three."""
    hive.round(**{"server-round": 3})
    parameters = hive.keys.public.parameters
    totals = Totals(scheme_of(parameters).adder(hive.keys.public.key_id), 1)
    for place in (-1, -2):
        totals.add(pieces(upload_of(hive, place).ciphertexts, ciphertext_size(hive)))
    data = b"".join(totals.ciphertexts())
    return {"plan": sum_of(hive).plan, "alive": to_bitmap([3, 4], 5), "ciphertexts": data}


def two_devices_as_five(hive: EncryptedHive) -> dict[str, Any]:
    return {**two_devices(hive), "alive": sum_of(hive).alive}


def fewer_than_there_are(hive: EncryptedHive) -> dict[str, Any]:
    return {"alive": to_bitmap([0, 1, 2], 5)}


def more_than_there_are(hive: EncryptedHive) -> dict[str, Any]:
    return {"alive": to_bitmap([0, 1, 2, 3, 4, 5], 6)}


def other_plan(**changes: Any) -> Callable[[EncryptedHive], dict[str, Any]]:
    def change(hive: EncryptedHive) -> dict[str, Any]:
        return {"plan": replace(EncryptedPlan.from_bytes(sum_of(hive).plan), **changes).encoded}

    change.__name__ = f"another {next(iter(changes))}"
    return change


def no_plan(hive: EncryptedHive) -> dict[str, Any]:
    return {"plan": b"\xff"}


def other_metrics(hive: EncryptedHive) -> dict[str, Any]:
    return {"metrics": ("accuracy",)}


def no_metrics(hive: EncryptedHive) -> dict[str, Any]:
    return {"metrics": ()}


def truncated(hive: EncryptedHive) -> dict[str, Any]:
    return {"ciphertexts": sum_of(hive).ciphertexts[:-1]}


def twice(hive: EncryptedHive) -> dict[str, Any]:
    return {"ciphertexts": 2 * sum_of(hive).ciphertexts}


def random_bytes(hive: EncryptedHive) -> dict[str, Any]:
    return {"ciphertexts": os.urandom(len(sum_of(hive).ciphertexts))}


def random_residues(hive: EncryptedHive) -> dict[str, Any]:
    data = sum_of(hive).ciphertexts
    return {"ciphertexts": data[:HEADER_BYTES] + os.urandom(len(data) - HEADER_BYTES)}


def of_another_key(hive: EncryptedHive) -> dict[str, Any]:
    other = EncryptedHive(5, federation=replace(hive.federation, he=another_key(hive.federation)))
    other.round()
    return {"ciphertexts": sum_of(other).ciphertexts}


LIES = [
    *(crafted, changed_by_one_bit, with_another_tag, one_device_as_itself, one_device_as_all, two_devices),
    *(two_devices_as_five, fewer_than_there_are, more_than_there_are, no_plan, other_metrics, no_metrics),
    *(truncated, twice, random_bytes, random_residues, of_another_key),
    *(other_plan(run_id=bytes(16)), other_plan(round=1), other_plan(attempt=7), other_plan(kind=2, entries=())),
    *(other_plan(roster_digest=bytes(32)), other_plan(max_weight=1.0)),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda f: f.__name__)
def test_what_is_no_sum_as_declared_is_refused_by_all_with_one_code_and_not_decrypted(
    hive: EncryptedHive, lie: Callable[[EncryptedHive], dict[str, Any]], decrypted: list[bytes]
) -> None:
    changes = lie(hive)
    decrypted.clear()
    hive.lie(**changes)
    with pytest.raises(TooFewPeersError, match="0 of 5 devices sent an encrypted update"):
        hive.round(**{"server-round": 9})
    said = {reply.error.code for reply in hive.wire.replies if reply.has_error()}
    assert {refusal_of(code) for code in said} == {Refusal.CIPHERTEXT}
    assert not decrypted


def test_a_sum_under_a_key_that_a_device_has_not_is_refused_as_such(
    hive: EncryptedHive, decrypted: list[bytes]
) -> None:
    """Which keys a device has is no secret, and what the ciphertext holds is not looked at."""
    for crafting in (crafted, lambda _: {}):
        decrypted.clear()
        hive.lie(**other_plan(key_id=bytes(32))(hive), **crafting(hive))
        with pytest.raises(TooFewPeersError, match="one said: encrypt: he-key"):
            hive.round(**{"server-round": 9})
        assert not decrypted


def test_a_refused_model_costs_nobody_anything_but_the_attempt(hive: EncryptedHive) -> None:
    deliver = hive.wire.deliver
    hive.lie(**changed_by_one_bit(hive))
    with pytest.raises(TooFewPeersError):
        hive.round(**{"server-round": 10})
    hive.wire.deliver = deliver
    assert outcome_of(hive.round(**{"server-round": 10})).survivors == 5


def test_a_devices_own_floor_counts() -> None:
    hive = EncryptedHive(5, policy=Policy(min_cohort=5, max_reveals_per_model=None))
    hive.wire.lose = lambda exchange, node_id: exchange == "encrypt" and node_id == 5
    hive.round()
    with pytest.raises(PeerError) as caught:
        open_model(hive.stores[0], sum_of(hive).to_bytes())
    assert caught.value.refusal is Refusal.CIPHERTEXT


def test_the_sum_of_another_model_is_refused_as_such(hive: EncryptedHive) -> None:
    """It is a sum, of this very run; what a device would open it for is something else."""
    for shape in ((3, 4), (12,)):
        for kind in ("train", "evaluate"):
            with pytest.raises(TooFewPeersError, match="model"):
                hive.round(kind, model={**MODEL, "w": MODEL["w"].reshape(shape)}, **{"server-round": 11})
    with pytest.raises(TooFewPeersError, match="model"):
        hive.round(model={"w": MODEL["w"]}, **{"server-round": 11})
    hive.round("evaluate", **{"server-round": 11})
    assert hive.grid.evaluation is not None
    with pytest.raises(PeerError, match="no model") as caught:
        open_model(hive.stores[0], hive.grid.evaluation.to_bytes())
    assert caught.value.refusal is Refusal.MODEL


def asked_again(hive: EncryptedHive, broadcast: bytes | None = None, **changes: Any) -> Refusal | None:
    """What device 0 says to the last request, or to one with another plan or model."""
    request = next(m for m in reversed(hive.wire.requests) if m.metadata.dst_node_id == 1)
    plan = replace(EncryptedPlan.from_bytes(body_of(request)), **changes)
    model = bytes(request.content[RECORD].get("model", b"")) if broadcast is None else broadcast
    told = protocol_record(Exchange.ENCRYPT, plan.encoded, model)
    again = with_content(request, RecordDict({**request.content, RECORD: told}))
    (message_id,) = hive.wire.inner.push_messages([again])
    (reply,) = hive.wire.inner.pull_messages([message_id])
    return refusal_of(reply.error.code) if reply.has_error() else None


def test_an_attempt_is_answered_once(hive: EncryptedHive) -> None:
    hive.round(**{"server-round": 20})
    assert asked_again(hive) is Refusal.STALE
    assert asked_again(hive, range=2.0) is Refusal.STALE
    assert asked_again(hive, round=19, attempt=99) is Refusal.STALE
    assert asked_again(hive, attempt=1) is None
    assert asked_again(hive, attempt=1) is Refusal.STALE
    assert asked_again(hive, attempt=0) is Refusal.STALE


def test_an_attempt_that_failed_in_training_is_answered_too() -> None:
    def failing(message: Message, index: int) -> RecordDict:
        raise ValueError("no")

    hive = EncryptedHive(3, failing, attempts=1)
    with pytest.raises(TooFewPeersError, match="training-failed"):
        hive.round()
    assert asked_again(hive) is Refusal.STALE


def test_a_device_that_restarts_remembers_what_it_answered(tmp_path: Any) -> None:
    hive = EncryptedHive(3)
    FileStore.create(tmp_path, hive.federation.devices[0].copy())
    for number in (1, 2):
        hive.stores[0] = store = FileStore(tmp_path, SIMULATED)
        store.keep_he_key(hive.keys.bundles[0])
        hive.round(**{"server-round": number})
        hive.stores[0] = FileStore(tmp_path, SIMULATED)
        assert asked_again(hive) is Refusal.STALE
    assert hive.opened().devices == 3


def test_a_plan_of_other_arrays_than_the_public_model_has_is_refused() -> None:
    hive = EncryptedHive(3)
    hive.round()
    w, b = EncryptedPlan.from_bytes(sum_of(hive).plan).entries
    others = (replace(w, shape=(3, 4)), replace(w, dtype="float64"), replace(w, name="v"))
    for attempt, other in enumerate(others, 1):
        assert asked_again(hive, attempt=attempt, entries=(other, b)) is Refusal.MODEL
    assert asked_again(hive, attempt=3, entries=(w, b)) is Refusal.STALE  # each attempt is looked at once
    assert asked_again(hive, attempt=4, entries=(w, b)) is None


def test_a_plan_is_held_to_the_devices_policy_and_roster(hive: EncryptedHive) -> None:
    hive.round(**{"server-round": 30})
    assert asked_again(hive, attempt=1, weight_key="train-loss") is Refusal.POLICY
    assert asked_again(hive, attempt=1, roster_number=7) is Refusal.ROSTER
    assert asked_again(hive, attempt=1, roster_digest=bytes(32)) is Refusal.ROSTER
    assert asked_again(hive, attempt=1, key_id=bytes(32)) is Refusal.HE_KEY
    assert asked_again(hive, attempt=1, kind=2, entries=()) is Refusal.MODEL
    entries = EncryptedPlan.from_bytes(sum_of(hive).plan).entries
    assert asked_again(hive, attempt=1, entries=entries[:1]) is Refusal.MODEL  # when it has trained
    assert asked_again(hive, attempt=2) is None


# Keys that nobody stands behind

FEDERATION = encrypted_federation(3)


def signed_by_another_root(bundle: KeyBundle, holder: SigningKey) -> KeyBundle:
    other = make_federation(1).root
    other.federation = FEDERATION.root.federation
    return replace(bundle, holder=delegate_holder(other, 1, holder.public, time.time(), HOUR))


def delegated(bundle: KeyBundle, holder: SigningKey, when: float = 0.0, serial: int = 1) -> KeyBundle:
    """The same key from a holder that the root delegates."""
    from propolis.secure.he.keys import read_material

    key = read_material(FEDERATION.root.federation, bundle.material)
    signed = delegate_holder(FEDERATION.root, serial, holder.public, time.time() + when, HOUR)
    return replace(bundle, holder=signed, statement=state_key(holder, key, 2))


def expired(bundle: KeyBundle, holder: SigningKey) -> KeyBundle:
    return delegated(bundle, holder, when=-30 * 24 * HOUR)


def stated_by_another(bundle: KeyBundle, holder: SigningKey) -> KeyBundle:
    return replace(delegated(bundle, SigningKey.generate()), holder=delegated(bundle, holder).holder)


def of_another_key_of_the_federation(bundle: KeyBundle, holder: SigningKey) -> KeyBundle:
    other = KeyBundle.from_bytes(another_key(FEDERATION).bundles[0])
    return replace(bundle, sealed=other.sealed)


def of_another_device(bundle: KeyBundle, holder: SigningKey) -> KeyBundle:
    assert FEDERATION.he is not None
    return replace(bundle, sealed=KeyBundle.from_bytes(FEDERATION.he.bundles[1]).sealed)


def with_other_material(bundle: KeyBundle, holder: SigningKey) -> KeyBundle:
    return replace(bundle, material=KeyBundle.from_bytes(another_key(FEDERATION).bundles[0]).material)


FORGED = [signed_by_another_root, expired, stated_by_another, of_another_key_of_the_federation, of_another_device]


def store_with(bundle: KeyBundle, roster: Any = None) -> MemoryStore:
    state = replace(FEDERATION.devices[0].copy(), roster=roster or FEDERATION.roster)
    return MemoryStore(state, SIMULATED, he_key=bundle.to_bytes())


@pytest.fixture(scope="module")
def file_of_a_run() -> bytes:
    hive = EncryptedHive(3, federation=FEDERATION)
    hive.round()
    return sum_of(hive).to_bytes()


@pytest.mark.parametrize("forge", [*FORGED, with_other_material], ids=lambda f: f.__name__)
def test_a_key_that_no_holder_of_the_root_stands_behind_opens_nothing(
    forge: Callable[[KeyBundle, SigningKey], KeyBundle], file_of_a_run: bytes
) -> None:
    assert FEDERATION.he is not None
    bundle, holder = KeyBundle.from_bytes(FEDERATION.he.bundles[0]), SigningKey.generate()
    for good in (bundle, delegated(bundle, holder)):
        assert open_model(store_with(good), file_of_a_run).devices == 3
    with pytest.raises(TrustError) as caught:
        open_model(store_with(forge(bundle, holder)), file_of_a_run)
    assert caught.value.refusal is Refusal.HE_KEY


def test_the_key_of_a_revoked_holder_opens_nothing(file_of_a_run: bytes) -> None:
    assert FEDERATION.he is not None
    bundle = KeyBundle.from_bytes(FEDERATION.he.bundles[0])
    roster = FEDERATION.root.sign_roster(FEDERATION.verified_roster.roster.revoking_release(1))
    with pytest.raises(TrustError, match="revoked"):
        open_model(store_with(bundle, roster), file_of_a_run)
    assert open_model(store_with(delegated(bundle, SigningKey.generate(), serial=2), roster), file_of_a_run)


def test_who_has_no_key_opens_nothing(file_of_a_run: bytes) -> None:
    state = replace(FEDERATION.devices[0].copy(), roster=FEDERATION.roster)
    with pytest.raises(TrustError, match="no key of homomorphic encryption"):
        open_model(MemoryStore(state, SIMULATED), file_of_a_run)


# The file that a run leaves


def test_a_file_that_was_changed_or_cut_is_refused(file_of_a_run: bytes, tmp_path: Any) -> None:
    assert FEDERATION.he is not None
    store = store_with(KeyBundle.from_bytes(FEDERATION.he.bundles[0]))
    total = EncryptedSum.from_bytes(file_of_a_run)
    bad = [
        *(b"", b"\x00", file_of_a_run[:-1], b"\x08\x02" + file_of_a_run[2:], os.urandom(500)),
        replace(total, plan=total.plan[:-1]).to_bytes(),
        replace(total, alive=b"\x03").to_bytes(),
        replace(total, frozen=b"no safetensors").to_bytes(),
    ]
    for data in bad:
        with pytest.raises(PeerError):
            open_model(store, data)
    with pytest.raises(UsageError, match="cannot read"):
        open_model_file(store, tmp_path / "none")
    (tmp_path / "model.encrypted").write_bytes(file_of_a_run)
    assert open_model_file(store, tmp_path / "model.encrypted").round == 1


def test_the_round_is_what_the_tags_are_for() -> None:
    plan = EncryptedPlan(bytes(16), 1, 0, 2, 1, bytes(32), bytes(32), "n", 1.0, 1.0, ())
    ids = {
        *(plan.round_id(names, bytes(32)) for names in ((), ("a",), ("b",), ("a", "b"), ("ab",))),
        replace(plan, attempt=1).round_id((), bytes(32)),
        plan.round_id((), b"i" * 32),
    }
    assert len(ids) == 7
    assert plan.round_id((), bytes(32)) == labels.digest(labels.HE_ROUND, plan.encoded, bytes(32))
    np.testing.assert_equal(len(plan.tag), 16)


# A server that makes a device forget what it answered


def test_runs_that_are_forgotten_are_never_answered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a flood of runs would have the attempts of an old one answered twice, and their tags tell of each other."""
    monkeypatch.setattr(device_state, "_MOST_RUNS", 3)
    hive = EncryptedHive(3)
    hive.round(**{"server-round": 1})
    for _ in range(4):
        time.sleep(0.002)  # runs are told apart by the millisecond that they begin in
        hive.grid._names.run_id = new_run_id(time.time(), os.urandom)
        hive.round(**{"server-round": 1})
    (first, *_) = [message for message in hive.wire.requests if exchange_of(message) == "encrypt"]
    plan = EncryptedPlan.from_bytes(body_of(first))
    for name in ({"round": 1}, {"round": 9, "attempt": 5}):
        assert asked_again(hive, run_id=plan.run_id, **name) is Refusal.STALE
    state = hive.stores[0].change(lambda device: DeviceState.from_bytes(device.state.to_bytes()))
    assert state.forgotten >= began_at(plan.run_id)
    assert state.is_forgotten(plan.run_id)


def test_a_run_of_a_time_that_is_far_from_having_come_is_refused() -> None:
    """It would be remembered in place of true ones."""
    hive = EncryptedHive(3)
    hive.round()
    assert asked_again(hive, run_id=new_run_id(time.time() + 7200, os.urandom)) is Refusal.STALE
    assert asked_again(hive, run_id=b"\xff" * 16) is Refusal.STALE
    assert asked_again(hive, run_id=new_run_id(time.time() + 1800, os.urandom)) is None


# A server that asks questions


def test_whether_a_model_opens_is_told_once_for_each_attempt(hive: EncryptedHive) -> None:
    hive.round(**{"server-round": 40})
    old = EncryptedPlan.from_bytes(sum_of(hive).plan)
    for broadcast in (sum_of(hive).to_bytes(), replace(sum_of(hive), **changed_by_one_bit(hive)).to_bytes()):
        assert asked_again(hive, broadcast, round=old.round, attempt=old.attempt) is Refusal.STALE
    assert asked_again(hive, broadcast, attempt=1) is Refusal.CIPHERTEXT
    assert asked_again(hive, attempt=1) is Refusal.STALE


def test_the_metrics_of_an_evaluation_are_no_model_to_train() -> None:
    hive = EncryptedHive(3)
    hive.round(**{"server-round": 1})
    hive.round("evaluate", **{"server-round": 1})
    assert hive.grid.evaluation is not None
    assert asked_again(hive, hive.grid.evaluation.to_bytes(), attempt=3) is Refusal.CIPHERTEXT


def test_uploads_over_different_models_are_no_sum() -> None:
    """A server that gives a model of its own to some would mix it with the secret one, and see what comes of it."""
    hive = EncryptedHive(5, attempts=1)
    hive.round(**{"server-round": 1})
    before = hive.opened()

    def deliver(exchange: str, message: Message) -> Message:
        if exchange != "encrypt" or message.metadata.dst_node_id > 2:
            return message
        own = RecordDict(
            {**message.content, "arrays": record({name: 100 * np.ones_like(a) for name, a in MODEL.items()})}
        )
        return with_content(message, RecordDict({**own, RECORD: protocol_record(Exchange.ENCRYPT, body_of(message))}))

    hive.wire.deliver = deliver
    hive.round(**{"server-round": 2})
    hive.wire.deliver = lambda exchange, message: message
    with pytest.raises(TooFewPeersError, match="5 refused the model of the round before"):
        hive.round(**{"server-round": 3})
    np.testing.assert_array_equal(hive.opened().arrays["w"], before.arrays["w"])


def test_a_key_under_which_too_many_sums_were_none_is_used_no_more() -> None:
    hive = EncryptedHive(3, policy=Policy(max_refused_sums=4, max_reveals_per_model=None))
    hive.round()
    forged = replace(sum_of(hive), **changed_by_one_bit(hive)).to_bytes()
    for attempt in range(1, 5):
        assert asked_again(hive, forged, attempt=attempt) is Refusal.CIPHERTEXT
    assert asked_again(hive, attempt=5) is Refusal.HE_KEY
    state = hive.stores[0].change(lambda device: DeviceState.from_bytes(device.state.to_bytes()))
    assert state.refused_sums == {hive.keys.public.key_id: 4}
    other = EncryptedHive(3, policy=Policy(max_refused_sums=4, max_reveals_per_model=None))
    other.round()
    assert asked_again(other, attempt=5) is None


def test_what_training_leaves_alone_does_not_ride_on_the_encrypted_model(hive: EncryptedHive) -> None:
    hive.round(**{"server-round": 50})
    assert asked_again(hive, replace(sum_of(hive), frozen=b"more").to_bytes(), attempt=1) is Refusal.MALFORMED


def test_a_floor_that_is_not_reached_is_no_forgery() -> None:
    hive = EncryptedHive(4, policy=Policy(max_refused_sums=2, min_cohort=4, max_reveals_per_model=None))
    hive.round()
    three = replace(sum_of(hive), alive=to_bitmap([0, 1, 2], 4)).to_bytes()
    for attempt in range(1, 5):
        assert asked_again(hive, three, attempt=attempt) is Refusal.CIPHERTEXT
    assert asked_again(hive, attempt=9) is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_worked_on_a_limited_number_of_times_whatever_comes_of_it(fails: bool) -> None:
    """Whether training fails under settings of the server's choice tells it how large the weights are."""
    sick: list[bool] = []

    def work(message: Message, index: int) -> RecordDict:
        if sick:
            raise ValueError("not finite")
        return honest(message, index)

    hive = EncryptedHive(3, work, policy=Policy(max_trainings_per_model=3, max_reveals_per_model=None))
    hive.round()
    hive.round()  # once
    sick.extend([True] * fails)
    said = [asked_again(hive, attempt=attempt) for attempt in range(1, 5)]
    assert said == [Refusal.TRAINING_FAILED if fails else None] * 2 + [Refusal.REVEALS] * 2
