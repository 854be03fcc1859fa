"""A server that has the key of homomorphic encryption from a device: under masks it learns the sum and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks.uniformity import looks_uniform
from encrypted_app import EncryptedHive, another_key, encrypted_federation, require_opened, sum_of, under_masks
from encrypting import adder, decryptor, scheme, tags
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from protocol import MOST_DEVICES, SHARED_INPUT, Cohort, Round, over_ciphertexts, pairwise_mask
from secure_app import MODEL, Hive, answer, arrays_of, body_of, exchange_of, honest, mean_shift, outcome_of

from propolis.client import he_fetch
from propolis.client.encrypted import encrypt_under_masks
from propolis.client.encrypted_sums import keys_of
from propolis.client.state import FileStore, MemoryStore
from propolis.flower import with_content
from propolis.messages import RECORD, broadcast_in, protocol_record, refusal_of
from propolis.protos import he_pb2
from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal, TooFewPeersError, TrustError
from propolis.secure.he.held import KeyBundle, scheme_of
from propolis.secure.he.keys import Material
from propolis.secure.he.masks import CiphertextMasks
from propolis.secure.he.messages import EncryptedPlan, EncryptedSum, EncryptedUpload, pieces
from propolis.secure.he.tag import add_tags, tag_bytes, tag_from_wire
from propolis.secure.prg import Mask
from propolis.secure.secagg.client import SecAggClient
from propolis.secure.secagg.masks import mask_private, self_mask
from propolis.secure.secagg.messages import PrepareRequest, UploadReply, from_bytes, to_bitmap, to_bytes
from propolis.secure.secagg.plan import Kind, Plan, Terms
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.states import Exchange
from propolis.secure.wire import decode, encode
from propolis.server.encryption import Encryption
from propolis.server.masked_round import MaskedRounds, Masking
from propolis.simulations.federation import SIMULATED

DIMENSION = 20_000  # three ciphertexts
OTHER_INPUT = b"j" * 32
ALL = range(7)


@pytest.fixture(autouse=True)
def masked() -> Iterator[None]:
    tokens = over_ciphertexts.set(True), under_masks.set(True)
    yield
    over_ciphertexts.reset(tokens[0])
    under_masks.reset(tokens[1])


@dataclass
class Chunk:
    """A ciphertext and its tag, as who has the key works with them."""

    residues: NDArray[np.uint64]
    tag: NDArray[np.uint64]


def chunks_of(data: bytes) -> list[Chunk]:
    made = scheme(MOST_DEVICES)
    opened = EncryptedUpload.from_bytes(data, len(data)).ciphertexts
    size, read = made.upload_bytes + tag_bytes(made.parameters), adder(made)
    return [
        Chunk(
            read.residues(read.read(each[: made.upload_bytes])),
            tag_from_wire(each[made.upload_bytes :], made.parameters),
        )
        for each in pieces(opened, size)
    ]


def without(chunks: Sequence[Chunk], masks: Sequence[Mask]) -> list[Chunk]:
    """The chunks once these masks have been taken away."""
    streams = CiphertextMasks([Mask(mask.seed, -mask.sign) for mask in masks], scheme(MOST_DEVICES).parameters)
    left = []
    for chunk in chunks:
        first, tag = streams.onto(chunk.residues[0], chunk.tag)
        left.append(Chunk(np.stack([first, chunk.residues[1]]), tag))
    return left


def added(uploads: Sequence[Sequence[Chunk]]) -> list[Chunk]:
    parameters = scheme(MOST_DEVICES).parameters
    primes = np.array(parameters.primes, np.uint64)[:, None]
    total = list(uploads[0])
    for upload in uploads[1:]:
        total = [
            Chunk((one.residues + other.residues) % primes, add_tags(one.tag, other.tag, parameters))
            for one, other in zip(total, upload, strict=True)
        ]
    return total


def decrypted(chunk: Chunk) -> NDArray[np.uint64]:
    made = scheme(MOST_DEVICES)
    return decryptor(made).decrypt(adder(made).whole(chunk.residues))


def is_hidden(chunks: Sequence[Chunk], played: Round, devices: Collection[int]) -> bool:
    """Whether neither ciphertexts nor tags tell who has secret key and MAC key anything."""
    made = scheme(MOST_DEVICES)
    maker = tags(made, len(chunks), played._encrypted_plan.round_id((), SHARED_INPUT))
    opened = np.concatenate([decrypted(chunk) for chunk in chunks])
    expected = maker.of_devices(devices)
    for place, chunk in enumerate(chunks):
        if (add_tags(maker.of_residues(place, chunk.residues), expected[place], made.parameters) == chunk.tag).any():
            return False
    first = np.concatenate([chunk.residues[0] for chunk in chunks], axis=1)
    # Of a constant, all slots are one value: under masks no two of them are alike.
    uniform = looks_uniform((first & np.uint64(0xFFFF)).astype("<u2").tobytes())
    return uniform and len(np.unique(opened)) > 0.999 * len(opened)


def begun(shared_inputs: dict[int, bytes] | None = None) -> tuple[Round, dict[int, list[Chunk]]]:
    """A round of constants up to the uploads, which the server keeps."""
    played = Cohort(7).round(dimension=DIMENSION)
    uploads: dict[int, list[Chunk]] = {}

    def keep(step: str, index: int, data: bytes) -> bytes:
        if step == "upload reply":
            uploads[index] = chunks_of(from_bytes(UploadReply, data).vector)
        return data

    played.meddle = keep
    played.inputs = {index: np.full(played._layout.count, index) for index in ALL}
    played.shared_inputs = dict(shared_inputs or {})
    played.prepare()
    return played, uploads


def pairs_of(played: Round, victim: int, others: Collection[int]) -> list[Mask]:
    """The masks between a victim and its neighbours, as these know them before they upload."""
    head = played.server._members[victim].head
    assert head is not None
    masks = []
    for other in others:
        role = SecAggClient.from_bytes(played.cohort.federation.devices[other].round, bytes(32))
        own = role.mask_private
        pair = pairwise_mask(other, own, victim, head.mask_key, played.terms.digest, SHARED_INPUT)
        masks.append(Mask(pair.seed, -pair.sign))
    return masks


def own_of(played: Round, index: int) -> Mask:
    """A device's own mask, which the server knows once the sum is told."""
    request = labels.digest(labels.REQUEST, to_bytes(played.server.upload_request(index)))
    return self_mask(played.server._reconstruct(index), index, played.terms.digest, SHARED_INPUT, request)


def finished(played: Round) -> None:
    played.upload()
    played.server.close_uploads()
    played.unmask()
    assert not played.refused


@pytest.mark.parametrize("colluding", [[], [0], [0, 1, 2, 3]], ids=str)
def test_fewer_than_t_neighbours_with_the_key_do_not_open_an_update(colluding: list[int]) -> None:
    """The server tells the sum, which takes every own mask; colluding neighbours give theirs, and the key. t is 5."""
    played, uploads = begun()
    assert len(colluding) < played.terms.sharing.threshold == 5
    pairs = pairs_of(played, 6, colluding)
    finished(played)
    assert is_hidden(uploads[6], played, [6])
    assert is_hidden(without(uploads[6], pairs), played, [6])
    assert is_hidden(without(uploads[6], [own_of(played, 6), *pairs]), played, [6])


def test_with_all_neighbours_colluding_the_update_lies_open() -> None:
    """There is no honest one to hide among: what is found above is the masks."""
    played, uploads = begun()
    pairs = pairs_of(played, 6, range(6))
    finished(played)
    assert is_hidden(without(uploads[6], pairs), played, [6])
    opened = without(uploads[6], [own_of(played, 6), *pairs])
    assert not is_hidden(opened, played, [6])
    assert len({tuple(np.unique(decrypted(chunk))[:3]) for chunk in opened[:1]}) == 1
    assert len(np.unique(decrypted(opened[0]))) == 1


def test_the_two_honest_ones_show_their_sum() -> None:
    played, uploads = begun()
    pairs = [pairs_of(played, victim, range(5)) for victim in (5, 6)]
    finished(played)
    single = [without(uploads[index], [own_of(played, index), *pairs[index - 5]]) for index in (5, 6)]
    assert all(is_hidden(each, played, [index]) for index, each in zip((5, 6), single, strict=True))
    assert not is_hidden(added(single), played, [5, 6])


@pytest.mark.parametrize("victims", [(0,), (6,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("shared_input", [SHARED_INPUT, OTHER_INPUT])
def test_with_two_models_the_sum_is_noise(victims: tuple[int, ...], shared_input: bytes) -> None:
    played, uploads = begun(dict.fromkeys(victims, OTHER_INPUT))
    finished(played)
    with pytest.raises(PeerError, match="the sum is noise"):
        played.server.sum(shared_input)
    masks = [Mask(mask.seed, -mask.sign) for mask in played.server._masks_left(shared_input)]
    assert is_hidden(without(added(list(uploads.values())), masks), played, ALL)


def test_with_one_model_the_sum_opens() -> None:
    played, _ = begun()
    finished(played)
    np.testing.assert_array_equal(played.sum()[0], played.expected())


def test_who_dropped_stays_hidden() -> None:
    """Its key is told, so its neighbours' masks are known; its own mask is not."""
    played, _ = begun()
    upload = chunks_of(from_bytes(UploadReply, played.masked(6, to_bytes(played.server.upload_request(6)))).vector)
    played.upload(silent=[6])
    played.server.close_uploads()
    played.unmask()
    np.testing.assert_array_equal(played.sum()[0], played.expected())
    key = mask_private(played.server._reconstruct(6), 6, played.terms.digest)
    pairs = []
    for other in range(6):
        head = played.server._members[other].head
        assert head is not None
        pairs.append(pairwise_mask(6, key, other, head.mask_key, played.terms.digest, SHARED_INPUT))
    assert is_hidden(without(upload, pairs), played, [6])


# The same in Flower's messages


def stolen(hive: EncryptedHive, victim: int) -> EncryptedSum:
    """A device's upload as a sum over it alone."""
    return replace(sum_of(hive), alive=to_bitmap([victim], 5), ciphertexts=hive.uploads()[victim].ciphertexts)


def constant(message: Message, index: int) -> RecordDict:
    return answer({name: np.ones_like(array) for name, array in MODEL.items()}, num_examples=1)


def test_a_device_with_the_key_cannot_open_the_upload_of_another() -> None:
    hive = EncryptedHive(5, constant)
    hive.round()
    key = keys_of(hive.stores[1]).newest
    with pytest.raises(PeerError) as caught:
        key.open(stolen(hive, 0), 1)
    assert caught.value.refusal is Refusal.CIPHERTEXT
    made = scheme_of(hive.keys.public.parameters)
    slots = key._decryptor.decrypt(hive.uploads()[0].ciphertexts[: made.ciphertext_bytes])
    assert len(np.unique(slots)) > 0.999 * len(slots)


def test_without_masks_it_could() -> None:
    """What is above is the masks; a device's floor is its own, and an attacker's is one."""
    under_masks.set(False)
    hive = EncryptedHive(5, constant)
    hive.round()
    key = keys_of(hive.stores[1]).newest
    np.testing.assert_allclose(key.open(stolen(hive, 0), 1)[1].arrays["w"], np.ones_like(MODEL["w"]), atol=1e-3)
    made = scheme_of(hive.keys.public.parameters)
    slots = key._decryptor.decrypt(hive.uploads()[0].ciphertexts[: made.ciphertext_bytes])
    assert len(np.unique(slots)) < 0.1 * len(slots)


def have_asked_without_masks(hive: EncryptedHive) -> None:
    """Have the server ask for an encrypted update that has no masks, under the very plan of the round."""

    def deliver(exchange: str, message: Message) -> Message:
        if exchange != "upload":
            return message
        plan = plan_of(hive)
        told = protocol_record(Exchange.ENCRYPT, plan, broadcast_in(message.content))
        return with_content(message, RecordDict({**message.content, RECORD: told}))

    hive.wire.deliver = deliver


def plan_of(hive: EncryptedHive) -> bytes:
    """The plan of what is encrypted in the round under way."""
    (asked, *_) = [from_bytes(PrepareRequest, body_of(m)) for m in hive.wire.requests if exchange_of(m) == "prepare"][
        -1:
    ]
    return Terms(asked.plan).plan.encrypted


def test_a_device_that_is_asked_without_masks_refuses_where_its_policy_says_so() -> None:
    strict = EncryptedHive(5, policy=Policy(require_masks=True, max_reveals_per_model=None))
    strict.round()
    under_masks.set(False)
    lax = EncryptedHive(5, policy=Policy(require_masks=True, max_reveals_per_model=None))
    with pytest.raises(TooFewPeersError, match="encrypt: policy"):
        lax.round()


def test_a_round_that_was_prepared_with_masks_is_never_answered_without() -> None:
    """Whatever the policy: the attempt is taken, and its tags are made once."""
    hive = EncryptedHive(5)
    hive.round()
    have_asked_without_masks(hive)
    with pytest.raises(TooFewPeersError):
        hive.round()
    said = [m for m in hive.wire.replies if m.has_error()]
    assert len(said) >= 5
    assert {refusal_of(message.error.code) for message in said} == {Refusal.STALE}


def test_under_a_key_for_masks_devices_encrypt_under_masks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a server asks for, in rounds to train and to evaluate, and whatever the device's policy."""
    trained: list[int] = []

    def noted(message: Message, index: int) -> RecordDict:
        trained.append(index)
        return honest(message, index)

    federation = encrypted_federation(5, masked=True)
    EncryptedHive(5, noted, federation=federation).round()
    assert len(trained) == 5
    monkeypatch.setattr(Encryption, "__post_init__", lambda self: None)  # a server that does not keep to it
    under_masks.set(False)
    EncryptedHive(5, noted, federation=encrypted_federation(5)).round()
    assert len(trained) == 10
    lax = EncryptedHive(5, noted, federation=federation, attempts=1)
    for kind in ("train", "evaluate"):
        with pytest.raises(TooFewPeersError, match="encrypt: policy"):
            lax.round(kind=kind)
    assert len(trained) == 10


def test_no_server_makes_a_key_for_masks_one_without() -> None:
    """What the key is for is in its id, which the holder signs."""
    hive = EncryptedHive(5, federation=encrypted_federation(5, masked=True))
    hive.round()
    store, bundle = hive.stores[0], KeyBundle.from_bytes(hive.keys.bundles[0])
    assert isinstance(store, MemoryStore)
    assert keys_of(store).newest.public.masked
    material = replace(decode(Material, bundle.material, he_pb2.Material), masked=False)
    store.keep_he_key(replace(bundle, material=encode(material, he_pb2.Material)).to_bytes())
    with pytest.raises(TrustError, match="of another key"):
        keys_of(store)


@pytest.mark.parametrize(("said", "is_refused"), [(True, True), (False, False), (None, False)])
def test_a_device_without_a_key_insists_on_encryption_where_it_is_told_to(said: bool | None, is_refused: bool) -> None:
    plain = Hive(5, policy=Policy(require_encryption=said, max_reveals_per_model=None))
    with pytest.raises(TooFewPeersError, match="prepare: policy") if is_refused else nullcontext():
        plain.round()


@pytest.mark.parametrize(("said", "is_refused"), [(True, True), (False, False), (None, True)])
@pytest.mark.parametrize("kind", [MemoryStore, FileStore])
def test_a_device_with_a_key_insists_on_encryption_unless_it_is_told_not_to(
    kind: type[MemoryStore] | type[FileStore], said: bool | None, is_refused: bool, tmp_path: Path
) -> None:
    """What the key is worth does not matter: nothing of it is read."""
    plain, policy = Hive(3, attempts=1), Policy(require_encryption=said)
    for index, state in enumerate(plain.federation.devices):
        store: MemoryStore | FileStore = MemoryStore(state.copy(), policy)
        if kind is FileStore:
            FileStore.create(tmp_path / str(index), state)
            store = FileStore(tmp_path / str(index), policy)
        store.keep_he_key(b"a key")
        plain.stores[index] = store
    with pytest.raises(TooFewPeersError, match="prepare: policy") if is_refused else nullcontext():
        plain.round()


def test_who_insists_on_encryption_takes_part_in_it() -> None:
    for said in (True, False, None):
        EncryptedHive(5, policy=Policy(require_encryption=said)).round()


CHANGES: list[dict[str, Any]] = [
    {"run_id": bytes(16)},
    {"round": 7},
    {"attempt": 7},
    {"kind": Kind.EVALUATE, "entries": ()},
    {"roster_number": 7},
    {"roster_digest": bytes(32)},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_what_is_encrypted_is_of_the_very_attempt_that_is_masked(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a server could have the tags of one attempt made twice."""
    hive, original = EncryptedHive(5, attempts=1), MaskedRounds._plan

    def planned(self: MaskedRounds, plan: EncryptedPlan, *more: Any) -> Plan:
        return replace(original(self, plan, *more), encrypted=replace(plan, **change).encoded)

    monkeypatch.setattr(MaskedRounds, "_plan", planned)
    with pytest.raises(TooFewPeersError, match="upload: model"):
        hive.round()


def test_sums_over_one_model_are_counted() -> None:
    hive = EncryptedHive(5, policy=Policy(max_reveals_per_model=2))
    before = hive.grid.model
    for _ in range(2):
        hive.round()
        hive.grid.model = before
    with pytest.raises(TooFewPeersError, match="upload: reveals"):
        hive.round()


def test_an_error_after_training_counts_like_a_sum() -> None:
    def fail(message: Message, index: int) -> RecordDict:
        raise ValueError("no")

    hive = EncryptedHive(5, fail, policy=Policy(max_reveals_per_model=2), attempts=1)
    for said in ("training-failed", "training-failed", "reveals"):
        with pytest.raises(TooFewPeersError, match=f"upload: {said}"):
            hive.round()


def test_two_sums_of_nearly_the_same_devices_are_not_told() -> None:
    hive = EncryptedHive(8)
    before = hive.grid.model
    hive.round()
    hive.grid.model = before
    with pytest.raises(TooFewPeersError, match="differ by fewer than 3"):
        hive.round(nodes=range(1, 8))
    hive.grid.model = before
    hive.round(nodes=range(1, 6))


def test_the_same_request_gets_the_same_bytes_and_another_one_none() -> None:
    hive = EncryptedHive(5)
    hive.round()
    (request, *_) = [m for m in hive.wire.requests if exchange_of(m) == "upload" and m.metadata.dst_node_id == 1]
    (reply, *_) = [m for m in hive.wire.said("upload") if m.metadata.src_node_id == 1]
    (again,) = hive.wire.inner.send_and_receive(messages=[request])
    assert again.has_error()  # the round has been unmasked, and its answers are gone or kept: never made anew
    assert refusal_of(again.error.code) in (Refusal.PHASE, Refusal.REPEATED) or body_of(again) == body_of(reply)


def test_malicious_servers_are_stood_too() -> None:
    hive = EncryptedHive(5, masking=Masking(malicious=True))
    hive.round()
    require_opened(hive.opened(), MODEL, range(5))
    assert len(hive.wire.said("confirm")) == 5
    picky = EncryptedHive(5, policy=Policy(require_malicious=True))
    with pytest.raises(TooFewPeersError, match="prepare: policy"):
        picky.round()


def test_a_round_that_begins_while_an_upload_is_looked_at_ends_it() -> None:
    """What was read of the round before would be encrypted for it, under the masks of the next."""
    hive = EncryptedHive(5)
    hive.round()
    old = hive.stores[0].change(lambda device: device.terms)
    refusals = []

    def deliver(exchange: str, message: Message) -> Message:
        if exchange == "upload" and message.metadata.dst_node_id == 1:
            with pytest.raises(PeerError, match="another round has begun") as caught:
                encrypt_under_masks(hive.stores[0], body_of(message), old, message, None, None)  # type: ignore[arg-type]
            refusals.append(caught.value.refusal)
        return message

    hive.wire.deliver = deliver
    hive.round()
    assert refusals == [Refusal.PHASE]
    require_opened(hive.opened(), {n: a + mean_shift(range(5)) for n, a in MODEL.items()}, range(5), 1e-3)


# A server that crashes


def test_after_a_crash_the_same_round_costs_no_second_reveal(tmp_path: Path) -> None:
    hive = EncryptedHive(5, journal=tmp_path / "journal")
    hive.round(**{"server-round": 1})
    asked, first = len(hive.wire.asked("unmask")), sum_of(hive)
    hive.grid = hive.new_grid(FedAvg())
    assert outcome_of(hive.round(**{"server-round": 1})).survivors == 5
    assert len(hive.wire.asked("unmask")) == asked
    assert sum_of(hive) == first
    require_opened(hive.opened(), MODEL, range(5))


@pytest.mark.parametrize("what", ["round", "kind", "model", "key"])
def test_what_was_revealed_for_something_else_is_asked_again(tmp_path: Path, what: str) -> None:
    hive = EncryptedHive(5, journal=tmp_path / "journal")
    hive.round(**{"server-round": 1})
    asked, state = len(hive.wire.asked("unmask")), hive.grid.state()
    hive.grid = hive.new_grid(FedAvg())
    if what == "model":
        hive.grid.resume_from({}, state)
    if what == "key":
        keys = another_key(hive.federation)
        hive.encryption = replace(hive.encryption, key=keys.public)
        hive.stores[:] = [
            MemoryStore(state.copy(), SIMULATED, he_key=bundle)
            for state, bundle in zip(hive.federation.devices, keys.bundles, strict=True)
        ]
        hive.grid = hive.new_grid(FedAvg())
    number = 2 if what == "round" else 1
    hive.round("evaluate" if what == "kind" else "train", **{"server-round": number})
    assert len(hive.wire.asked("unmask")) == asked + 5


# A server that shows devices different models


def told_otherwise(hive: EncryptedHive, change: Callable[[RecordDict, bytes], tuple[RecordDict, bytes]]) -> None:
    """Have device 1 get another content, or another broadcast, with the same request."""

    def deliver(exchange: str, message: Message) -> Message:
        if exchange != "upload" or message.metadata.dst_node_id != 1:
            return message
        records, broadcast = change(message.content, broadcast_in(message.content))
        told = protocol_record(Exchange.UPLOAD, body_of(message), broadcast)
        return with_content(message, RecordDict({**records, RECORD: told}))

    hive.wire.deliver = deliver


def test_a_device_that_is_given_an_older_model_makes_the_sum_noise() -> None:
    """Both are sums of the federation, so the device opens either."""
    hive = EncryptedHive(5, attempts=1)
    hive.round()
    older = sum_of(hive).to_bytes()
    hive.round()
    told_otherwise(hive, lambda records, broadcast: (records, older))
    with pytest.raises(TooFewPeersError, match="the sum is noise"):
        hive.round()


def test_a_device_that_is_given_other_frozen_values_makes_the_sum_noise() -> None:
    def work(message: Message, index: int) -> RecordDict:
        moved = dict(arrays_of(message))
        del moved["fixed"]
        return answer(moved, num_examples=1)

    model = {**MODEL, "fixed": np.array([7.0], np.float32)}
    hive = EncryptedHive(5, work, frozen=["fixed"], attempts=1)
    hive.round(model=model)

    def change(records: RecordDict, broadcast: bytes) -> tuple[RecordDict, bytes]:
        arrays = {**records.array_records["arrays"], "fixed": Array(np.array([8.0], np.float32))}
        return RecordDict({**records, "arrays": ArrayRecord(arrays)}), broadcast

    told_otherwise(hive, change)
    with pytest.raises(TooFewPeersError, match="the sum is noise"):
        hive.round(model=model)


def test_the_same_model_in_other_bytes_is_counted_as_the_same() -> None:
    hive = EncryptedHive(5, policy=Policy(max_reveals_per_model=1), attempts=1)
    hive.round()
    before = hive.grid.model
    hive.round()
    assert before is not None
    # Field 99 of the sum, which nobody knows: to protobuf the same message.
    hive.grid.model = before

    def deliver(exchange: str, message: Message) -> Message:
        if exchange != "upload":
            return message
        told = protocol_record(Exchange.UPLOAD, body_of(message), broadcast_in(message.content) + b"\x98\x06\x01")
        return with_content(message, RecordDict({**message.content, RECORD: told}))

    hive.wire.deliver = deliver
    with pytest.raises(TooFewPeersError, match="upload: reveals"):
        hive.round()


def test_after_a_crash_the_sum_that_was_told_counts_against_another_of_nearly_the_same(tmp_path: Path) -> None:
    hive = EncryptedHive(8, journal=tmp_path / "journal", attempts=1)
    hive.round(**{"server-round": 1})
    hive.grid = hive.new_grid(FedAvg())
    hive.round(**{"server-round": 1})
    hive.grid.model = None
    with pytest.raises(TooFewPeersError, match="differ by fewer than 3"):
        hive.round(nodes=range(1, 8), **{"server-round": 1})


def test_an_error_counts_for_the_kind_of_round_that_it_came_in() -> None:
    """A server that begins another kind of round while the app trains would else have errors counted for that."""
    hives: list[EncryptedHive] = []

    def fail(message: Message, index: int) -> RecordDict:
        store = hives[0].stores[index]
        plan = store.change(lambda device: device.terms.plan)
        other = replace(plan, kind=Kind.EVALUATE).to_bytes()
        store.change(lambda device: setattr(device.state, "plan", other))
        raise ValueError("no")

    hives.append(EncryptedHive(5, fail, policy=Policy(max_reveals_per_model=1), attempts=1))
    for said in ("training-failed", "reveals"):
        with pytest.raises(TooFewPeersError, match=f"upload: {said}"):
            hives[0].round()


def test_a_device_looks_for_the_key_of_a_round_when_it_is_asked_to_prepare() -> None:
    hive = EncryptedHive(5)
    hive.round()
    prepares, uploads = ([m for m in hive.wire.requests if exchange_of(m) == name] for name in ("prepare", "upload"))
    assert {he_fetch._wanted(message) for message in prepares} == {hive.keys.public.key_id}
    assert {he_fetch._wanted(message) for message in uploads} == {b""}
    plain = Hive(3)
    plain.round()
    assert {he_fetch._wanted(m) for m in plain.wire.requests if exchange_of(m) == "prepare"} == {b""}


def test_other_frozen_values_do_not_make_another_model_to_be_summed_over() -> None:
    def work(message: Message, index: int) -> RecordDict:
        moved = dict(arrays_of(message))
        del moved["fixed"]
        return answer(moved, num_examples=1)

    hive = EncryptedHive(5, work, frozen=["fixed"], attempts=1, policy=Policy(max_reveals_per_model=2))
    hive.round(model={**MODEL, "fixed": np.zeros(1, np.float32)})
    before = hive.grid.model
    for value in (1, 2):
        hive.round(model={**MODEL, "fixed": np.full(1, value, np.float32)})
        hive.grid.model = before
    with pytest.raises(TooFewPeersError, match="upload: reveals"):
        hive.round(model={**MODEL, "fixed": np.full(1, 3, np.float32)})


def test_a_key_that_comes_between_prepare_and_upload_ends_a_plain_round() -> None:
    hive = Hive(5, policy=Policy(max_reveals_per_model=None), attempts=1)
    keys = encrypted_federation(5).he
    assert keys is not None

    def deliver(exchange: str, message: Message) -> Message:
        if exchange == "upload":
            index = message.metadata.dst_node_id - 1
            hive.stores[index].keep_he_key(keys.bundles[index])
        return message

    hive.wire.deliver = deliver
    with pytest.raises(TooFewPeersError, match="upload: policy"):
        hive.round()


def test_a_key_that_is_used_up_is_used_up_under_masks_too() -> None:
    """Also for what is encrypted in a first round, of a model that is in clear."""
    hive = EncryptedHive(5, policy=Policy(max_refused_sums=1, max_reveals_per_model=None), attempts=1)
    for store in hive.stores:
        store.change(lambda device: device.state.count_refused_sum(hive.keys.public.key_id))
    with pytest.raises(TooFewPeersError, match="upload: he-key"):
        hive.round()
