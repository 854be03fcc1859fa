"""An HeGrid is a Grid: strategies that take the mean run on it as they are, and the server sees nothing of it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from encrypted_app import EncryptedHive, another_key, require_opened, sum_of, under_masks
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, FedProx, Strategy
from secure_app import MODEL, answer, app_of, arrays_of, honest, mean_shift, metrics_of, outcome_of, record, shift

from propolis.client.state import MemoryStore
from propolis.flower import message_to_bytes
from propolis.secure.errors import Refusal, TooFewPeersError, UsageError
from propolis.secure.he.held import Assignment, EncodedUpdate, HeldKey
from propolis.secure.he.messages import EncryptedPlan, EncryptedUpload
from propolis.secure.secagg.plan import Kind
from propolis.secure.secagg.policy import Policy
from propolis.server.encryption import Encryption
from propolis.server.masked_round import Masking
from propolis.simulations.federation import make_federation
from propolis.simulations.local import LocalGrid


@pytest.fixture(autouse=True, params=[False, True], ids=["he", "he+secagg"])
def masked(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the rounds of a test are under masks; what is particular to those without says `alone`."""
    is_masked = bool(request.param)
    if is_masked and request.node.get_closest_marker("alone"):
        pytest.skip("is about rounds without masks")
    token = under_masks.set(is_masked)
    yield is_masked
    under_masks.reset(token)


BOTH = pytest.mark.parametrize("seeded", [False, True], ids=["public", "seeded"])


def pulling(message: Message, index: int) -> RecordDict:
    """Each device pulls the model half of the way to a target of its own."""
    if message.metadata.message_type == "evaluate":
        return honest(message, index)
    moved = {
        name: (a + np.asarray((index - np.arange(a.size).reshape(a.shape) / 9 - a) / 2)).astype(a.dtype)
        for name, a in arrays_of(message).items()
    }
    return answer(moved, num_examples=index + 1, loss=float(np.mean(moved["w"])))


@BOTH
@pytest.mark.parametrize("kind", [FedAvg, partial(FedProx, proximal_mu=0.1)], ids=["FedAvg", "FedProx"])
def test_a_strategy_of_flowers_starts_unmodified_and_the_devices_end_where_it_would_unprotected(
    kind: Callable[..., Strategy], seeded: bool
) -> None:
    strategy = kind(min_available_nodes=5, min_train_nodes=5)
    hive = EncryptedHive(5, pulling, strategy=strategy, seeded=seeded, range=8.0)
    seen = strategy.start(hive.grid, record(MODEL), 3, timeout=60, train_config=ConfigRecord({"lr": 0.1}))
    plain = kind(min_available_nodes=5, min_train_nodes=5).start(
        LocalGrid(partial(app_of, pulling, None), 5), record(MODEL), 3, timeout=60
    )
    opened = hive.opened(4)
    for key, array in plain.arrays.items():
        np.testing.assert_allclose(opened.arrays[key], array.numpy(), atol=1e-3)
        np.testing.assert_array_equal(seen.arrays[key].numpy(), MODEL[key])  # what the server has is what it began with
    assert opened.metrics["loss"] == pytest.approx(plain.train_metrics_clientapp[3]["loss"], abs=1e-3)
    assert opened.round == 3
    assert opened.devices == 5
    assert hive.evaluation().metrics["accuracy"] == pytest.approx(
        plain.evaluate_metrics_clientapp[3]["accuracy"], abs=1e-6
    )


@BOTH
def test_devices_open_the_weighted_mean_and_its_metrics(seeded: bool) -> None:
    hive = EncryptedHive(5, seeded=seeded)
    reply = hive.round()
    for device in range(5):
        opened = hive.opened(device)
        require_opened(opened, MODEL, range(5))
        assert opened.metrics == pytest.approx({"loss": 2 + 40 / 15}, abs=1e-6)
        assert opened.weight == pytest.approx(15)
        assert opened.saturated == 0
    assert (outcome_of(reply).survivors, outcome_of(reply).asked) == (5, 5)


def test_each_round_goes_on_from_the_encrypted_model() -> None:
    hive = EncryptedHive(5)
    for _ in range(3):
        hive.round()
    require_opened(
        hive.opened(), {name: array + 2 * mean_shift(range(5)) for name, array in MODEL.items()}, range(5), 1e-3
    )


def test_the_server_learns_neither_the_mean_nor_a_weight_nor_a_metric() -> None:
    secret = 0.123456789

    def work(message: Message, index: int) -> RecordDict:
        if message.metadata.message_type == "evaluate":
            return answer(num_examples=7, accuracy=secret)
        return answer({n: np.full_like(a, secret) for n, a in MODEL.items()}, num_examples=7, loss=secret)

    hive = EncryptedHive(4, work, max_weight=10.0)
    replies = [hive.round(), hive.round("evaluate"), hive.round()]
    for form in (struct.pack("<f", secret), struct.pack("<d", secret), struct.pack(">d", secret)):
        assert form not in hive.wire.uplink()
        assert all(form not in message_to_bytes(m) for m in [*hive.wire.requests, *replies])
    for reply in replies:
        assert metrics_of(reply) == {"num-examples": 4}  # devices, not examples
    for reply in (replies[0], replies[2]):
        np.testing.assert_array_equal(arrays_of(reply)["w"], MODEL["w"])
    assert hive.opened().metrics == pytest.approx({"loss": secret}, abs=1e-6)


def test_two_uploads_of_the_same_have_nothing_in_common() -> None:
    def work(message: Message, index: int) -> RecordDict:
        return answer({name: np.zeros_like(array) for name, array in MODEL.items()}, num_examples=1)

    hive = EncryptedHive(3, work)
    hive.round()
    bits = [np.unpackbits(np.frombuffer(each.ciphertexts, np.uint8)) for each in hive.uploads()]
    for one, other in ((0, 1), (1, 2)):
        assert np.mean(bits[one] == bits[other]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("lost", [(), (2,), (1, 4)])
def test_drop_outs_cost_their_own_update_and_nothing_else(lost: tuple[int, ...]) -> None:
    hive = EncryptedHive(8)
    hive.wire.lose = lambda exchange, node_id: exchange == hive.exchange and node_id in lost
    reply = hive.round()
    alive = [index for index in range(8) if index + 1 not in lost]
    require_opened(hive.opened(), MODEL, alive)
    assert sum_of(hive).devices == tuple(alive)
    assert outcome_of(reply).survivors == len(alive)


def test_newcomers_and_those_who_were_away_go_on_from_the_broadcast() -> None:
    hive = EncryptedHive(6)
    hive.round(nodes=[1, 2, 3])
    hive.round(nodes=[1, 2, 3])
    hive.round(nodes=[4, 5, 6])
    expected = {name: array + 2 * mean_shift([0, 1, 2]) for name, array in MODEL.items()}
    require_opened(hive.opened(5), expected, [3, 4, 5], 1e-3)


def test_too_few_devices_are_tried_again_then_reported_and_the_model_stays() -> None:
    hive = EncryptedHive(4, attempts=2)
    hive.round()
    before = sum_of(hive)
    hive.wire.lose = lambda exchange, node_id: exchange == hive.exchange and node_id > 2
    with pytest.raises(TooFewPeersError, match=r"2 of 4 devices sent (an encrypted|a masked) update, 3 are needed"):
        hive.round()
    assert len(hive.wire.asked(hive.exchange)) == 12
    assert sum_of(hive) is before
    hive.wire.lose = lambda exchange, node_id: False
    hive.round()
    assert hive.opened().devices == 4


def test_a_retry_is_another_attempt() -> None:
    hive = EncryptedHive(3)
    failed = iter([True])
    hive.wire.lose = lambda exchange, node_id: exchange == hive.exchange and next(failed, False)
    hive.round(**{"server-round": 4})
    plan = EncryptedPlan.from_bytes(sum_of(hive).plan)
    assert (plan.round, plan.attempt) == (4, 1)


@BOTH
def test_another_server_goes_on_from_the_state(seeded: bool) -> None:
    hive = EncryptedHive(4, seeded=seeded)
    hive.round(**{"server-round": 1})
    hive.round("evaluate", **{"server-round": 1})
    state = hive.grid.state()
    assert {array.dtype for array in state.values()} == {np.dtype(np.uint8)}
    hive.grid = hive.new_grid(FedAvg())
    hive.grid.resume_from({}, state)
    assert hive.evaluation().metrics["accuracy"] == pytest.approx(sum((i + 1) * i / 8 for i in range(4)) / 10)
    hive.round(**{"server-round": 2})
    require_opened(hive.opened(), {n: a + mean_shift(range(4)) for n, a in MODEL.items()}, range(4), 1e-3)


def test_a_state_that_is_no_encrypted_model_is_a_mistake() -> None:
    hive = EncryptedHive(3)
    hive.round()
    state = hive.grid.state()
    with pytest.raises(UsageError, match="holds no encrypted model"):
        hive.new_grid(FedAvg()).resume_from({}, {"model": state["model"][1:]})
    with pytest.raises(UsageError, match="holds no encrypted model"):
        hive.new_grid(FedAvg()).resume_from({}, {"evaluation": state["model"]})


def with_state(message: Message, index: int) -> RecordDict:
    """A model with statistics, a counter, a flag and half precision; `fixed` does not come back."""
    moved = dict(arrays_of(message))
    assert moved.pop("fixed")[0] == 7
    moved = {
        name: (array + array.dtype.type(index + 1)).astype(array.dtype) for name, array in moved.items() if name != "on"
    }
    return answer({**moved, "on": np.array([True, index > 0])}, num_examples=1)


def test_every_type_of_array_comes_back_as_it_was_and_frozen_ones_go_out_as_they_are() -> None:
    model = {
        "w": np.array([0.5, -0.25], np.float32),
        "half": np.array([0.5], np.float16),
        "double": np.array([2.0], np.float64),
        "variance": np.array([1e-6, 1000.0], np.float32),
        "counter": np.array(1_000_000, np.int64),
        "byte": np.array([3], np.uint8),
        "on": np.array([False, True]),
        "fixed": np.array([7.0], np.float32),
    }
    hive = EncryptedHive(3, with_state, exact=["variance"], frozen=["fixed"], range=16.0)
    for _ in range(2):
        hive.round(model=model)
    arrays = hive.opened().arrays
    assert {n: (a.dtype, a.shape) for n, a in arrays.items()} == {
        n: (a.dtype, a.shape) for n, a in model.items() if n != "fixed"
    }
    assert arrays["counter"] == 1_000_004
    assert arrays["byte"] == 7
    np.testing.assert_array_equal(arrays["on"], [True, True])
    np.testing.assert_allclose(arrays["variance"], model["variance"] + 4, rtol=1e-6)
    np.testing.assert_allclose(arrays["w"], model["w"] + 4, atol=1e-2)
    np.testing.assert_allclose(arrays["double"], 6, atol=1e-2)
    asked = [message.content for message in hive.wire.requests if hive.exchange in message.content["propolis"]]
    last = asked[-1].array_records["arrays"]
    assert last["fixed"].numpy() == 7
    assert all(not array.data for name, array in last.items() if name != "fixed")


def test_what_is_out_of_range_is_cut_and_counted_and_the_range_follows() -> None:
    def leaping(message: Message, index: int) -> RecordDict:
        return answer({n: np.full_like(a, 3.0) for n, a in arrays_of(message).items()}, num_examples=1)

    hive = EncryptedHive(3, leaping, max_weight=1.0)
    cut = []
    for _ in range(3):
        hive.round()
        cut.append(hive.opened().saturated)
    assert cut[0] == 3 * 15
    assert cut[-1] == 0
    np.testing.assert_allclose(hive.opened().arrays["w"], 3.0, atol=1e-3)


def test_a_larger_weight_than_the_public_one_is_cut_and_counted() -> None:
    hive = EncryptedHive(3, max_weight=2.0)  # devices have 1, 2 and 3
    hive.round()
    opened = hive.opened()
    assert opened.weight == pytest.approx(5)
    assert opened.saturated == 1
    expected = sum(weight * shift(index) for index, weight in enumerate((1, 2, 2))) / 5
    np.testing.assert_allclose(opened.arrays["b"], MODEL["b"] + expected, atol=1e-3)


# What it refuses

BLIND = {"FedAvg", "FedProx"}
OTHERS = sorted(name for name in flower.__all__ if name not in {*BLIND, "Result", "Strategy"})


@pytest.mark.parametrize("name", OTHERS)
def test_a_strategy_that_computes_on_the_mean_is_refused_by_name(name: str) -> None:
    strategy = object.__new__(getattr(flower, name))
    with pytest.raises(UsageError, match=r"^\w+ computes on updates or on their mean") as caught:
        EncryptedHive(3, strategy=strategy)
    assert str(caught.value).split()[0] in {base.__name__ for base in type(strategy).__mro__}


def test_a_users_own_strategy_is_welcome_as_long_as_it_leaves_the_mean_alone() -> None:
    class Choosing(FedAvg):
        """Samples in its own way."""

        def configure_train(self, *arguments: Any, **more: Any) -> Any:
            return super().configure_train(*arguments, **more)

    class Averaging(FedAvg):
        """Does something with the mean."""

        def aggregate_train(self, *arguments: Any, **more: Any) -> Any:
            return super().aggregate_train(*arguments, **more)

    EncryptedHive(3, strategy=Choosing())
    with pytest.raises(UsageError, match=r"^Averaging computes"):
        EncryptedHive(3, strategy=Averaging())


def test_single_messages_are_refused() -> None:
    hive = EncryptedHive(3)
    for call in (lambda: hive.grid.push_messages(hive.messages()), lambda: hive.grid.pull_messages(["1"])):
        with pytest.raises(UsageError, match="a HeGrid sends whole rounds"):
            call()
    assert not hive.wire.requests


def test_more_devices_than_the_key_has_room_for_are_a_mistake() -> None:
    federation = make_federation(4, 0)
    keys = another_key(federation, clients=3)
    hive = EncryptedHive(4, federation=replace(federation, he=keys))
    with pytest.raises(UsageError, match="4 devices in a round: the key has room for 3"):
        hive.round()


def test_a_key_of_too_few_bits_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="weights need 8 bits or more, and the key is for 7"):
        Encryption(another_key(make_federation(3), bits=7).public, 1.0)


def test_a_key_for_masks_without_them_is_a_mistake() -> None:
    federation = make_federation(3)
    masked, plain = another_key(federation, masked=True).public, another_key(federation).public
    for key in (masked, plain):
        Encryption(key, 1.0, masking=Masking())
    with pytest.raises(UsageError, match="is for updates under masks only: an Encryption under it needs masking"):
        Encryption(masked, 1.0)
    Encryption(plain, 1.0)
    hive = EncryptedHive(3, masking=None)
    with pytest.raises(UsageError, match="needs masking"):
        hive.grid.renew_key(masked)


# A device that sends something else is a drop-out, and the round goes on


def truncated(upload: EncryptedUpload) -> bytes:
    return upload.to_bytes()[:-1]


def random_bytes(upload: EncryptedUpload) -> bytes:
    return os.urandom(len(upload.to_bytes()))


def random_ciphertexts(upload: EncryptedUpload) -> bytes:
    return EncryptedUpload(upload.round_tag, upload.metrics, os.urandom(len(upload.ciphertexts))).to_bytes()


def shorter(upload: EncryptedUpload) -> bytes:
    return EncryptedUpload(upload.round_tag, upload.metrics, upload.ciphertexts[:-1]).to_bytes()


def longer(upload: EncryptedUpload) -> bytes:
    return EncryptedUpload(upload.round_tag, upload.metrics, 2 * upload.ciphertexts).to_bytes()


def nothing(upload: EncryptedUpload) -> bytes:
    return EncryptedUpload(upload.round_tag, upload.metrics, b"").to_bytes()


def of_another_run(upload: EncryptedUpload) -> bytes:
    return EncryptedUpload(bytes(16), upload.metrics, upload.ciphertexts).to_bytes()


def with_other_metrics(upload: EncryptedUpload) -> bytes:
    return EncryptedUpload(upload.round_tag, ("other",), upload.ciphertexts).to_bytes()


def of_another_version(upload: EncryptedUpload) -> bytes:
    return b"\x08\x02" + upload.to_bytes()[2:]


def of_another_key(upload: EncryptedUpload) -> bytes:
    changed = bytearray(upload.ciphertexts)
    changed[2] ^= 1  # the key's id is in front of every ciphertext
    return EncryptedUpload(upload.round_tag, upload.metrics, bytes(changed)).to_bytes()


def hiding_nothing(upload: EncryptedUpload) -> bytes:
    changed = bytearray(upload.ciphertexts)
    changed[34:-32] = bytes(len(changed) - 66)
    return EncryptedUpload(upload.round_tag, upload.metrics, bytes(changed)).to_bytes()


WRONG = [
    *(truncated, random_bytes, random_ciphertexts, shorter, longer, nothing, of_another_run, with_other_metrics),
    *(of_another_version, of_another_key, hiding_nothing),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
@pytest.mark.parametrize("first", [1, 3], ids=["the first", "a later one"])
def test_a_device_that_sends_something_else_is_a_drop_out(
    wrong: Callable[[EncryptedUpload], bytes], first: int
) -> None:
    hive = EncryptedHive(5)
    hive.have_send(first, wrong)
    if wrong is with_other_metrics and first == 1:
        hive.round()  # what is usual decides, not who is first: the attempt fails, and the next one knows better
        assert hive.opened().devices == 4
        return
    reply = hive.round()
    alive = [index for index in range(5) if index + 1 != first]
    require_opened(hive.opened(), MODEL, alive)
    (failure,) = outcome_of(reply).failures
    assert failure.startswith(f"{hive.exchange}: ")


def test_a_device_with_another_key_parameters_or_none_is_a_drop_out() -> None:
    hive = EncryptedHive(12)
    others = [another_key(hive.federation), another_key(hive.federation, clients=100), None]
    for index, keys in enumerate(others):
        bundle = keys.bundles[index] if keys else None
        hive.stores[index] = MemoryStore(hive.federation.devices[index].copy(), hive.stores[0].policy, he_key=bundle)
    reply = hive.round()
    require_opened(hive.opened(5), MODEL, range(3, 12))
    assert outcome_of(reply).failures == (f"{hive.exchange}: he-key",) * 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_an_error_and_a_drop_out(value: float) -> None:
    def work(message: Message, index: int) -> RecordDict:
        content = honest(message, index)
        if index == 1:
            return answer({n: np.full_like(a, value) for n, a in MODEL.items()}, num_examples=1, loss=1.0)
        return content

    hive = EncryptedHive(5, work)
    reply = hive.round()
    require_opened(hive.opened(), MODEL, [0, 2, 3, 4])
    assert outcome_of(reply).failures == (f"{hive.exchange}: {Refusal.NOT_FINITE.reason}",)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), "none"])
def test_a_weight_that_cannot_be_is_a_drop_out(weight: Any) -> None:
    def work(message: Message, index: int) -> RecordDict:
        if index != 1:
            return honest(message, index)
        arrays = arrays_of(message)
        return answer(arrays, loss=1.0) if weight == "none" else answer(arrays, num_examples=weight, loss=1.0)

    hive = EncryptedHive(5, work)
    assert outcome_of(hive.round()).failures == (f"{hive.exchange}: weight",)


def test_the_data_holders_own_limits_hold() -> None:
    hive = EncryptedHive(3, policy=Policy(max_weight=1.0, max_norm=0.001, max_reveals_per_model=None))
    hive.round()
    opened = hive.opened()
    assert opened.weight == pytest.approx(3)
    np.testing.assert_allclose(opened.arrays["w"], MODEL["w"], atol=0.001)


def test_evaluation_leaves_the_model_alone() -> None:
    hive = EncryptedHive(3)
    hive.round("evaluate")  # of the public model
    assert hive.grid.model is None
    hive.round()
    model = sum_of(hive)
    hive.round("evaluate")
    assert sum_of(hive) is model
    assert EncryptedPlan.from_bytes(hive.grid.evaluation.plan).kind == Kind.EVALUATE  # type: ignore[union-attr]


# A model that devices refuse


def with_a_wrong_tag(upload: EncryptedUpload) -> bytes:
    """What nobody without the key can tell from an update."""
    changed = bytearray(upload.ciphertexts)
    changed[-32] ^= 1
    return EncryptedUpload(upload.round_tag, upload.metrics, bytes(changed)).to_bytes()


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_model_that_devices_refuse_is_given_up_for_the_one_before(rounds: int, resumed: bool) -> None:
    hive = EncryptedHive(4, attempts=1)
    for _ in range(rounds):
        hive.round()
    hive.have_send(2, with_a_wrong_tag)
    hive.round()
    hive.wire.meddle = lambda exchange, node_id, body: body
    if resumed:
        state, hive.grid = hive.grid.state(), hive.new_grid(FedAvg())
        hive.grid.resume_from({}, state)
    with pytest.raises(TooFewPeersError, match="4 refused the model of the round before, which is therefore given up"):
        hive.round()
    hive.round()
    shifted = {name: array + rounds * mean_shift(range(4)) for name, array in MODEL.items()}
    require_opened(hive.opened(), shifted, range(4), 1e-3)


@pytest.mark.alone  # under masks a device that insists on more devices says so before
def test_few_devices_that_refuse_the_model_do_not_set_a_run_back() -> None:
    hive = EncryptedHive(4)
    picky = Policy(min_cohort=5, max_reveals_per_model=None)
    hive.stores[0] = MemoryStore(hive.federation.devices[0].copy(), picky, he_key=hive.keys.bundles[0])
    for _ in range(2):
        reply = hive.round()
    assert outcome_of(reply).failures == (f"{hive.exchange}: ciphertext",)
    opened = hive.opened(1)
    shifted = {name: array + mean_shift(range(4)) for name, array in MODEL.items()}
    require_opened(opened, shifted, [1, 2, 3], 1e-3)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_model_that_opens_and_that_nothing_can_be_trained_from_is_given_up_too(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One device has the steps of a sum larger than they are, which the tag allows to who has the key."""
    hive, encoded = EncryptedHive(4, finite_only, attempts=1), HeldKey.encoded

    def lie(self: HeldKey, assignment: Assignment, *more: Any) -> EncodedUpdate:
        update = encoded(self, assignment, *more)
        if self._device != 1 or assignment.plan.kind != Kind.TRAIN:
            return update
        values, entries = update.values.copy(), assignment.plan.entries
        start = sum(entry.size for entry in entries)
        values[start : start + len(entries)] += 4 * 80
        return replace(update, values=values)

    hive.round()
    with monkeypatch.context() as patch:
        patch.setattr(HeldKey, "encoded", lie)
        hive.round()
    assert float(np.abs(hive.opened().arrays["w"]).max()) > 1e15
    if kind == "evaluate":
        hive.round("evaluate")  # what an app makes of it is no reason to give the model up
    with pytest.raises(TooFewPeersError, match="4 refused the model of the round before"):
        hive.round()
    hive.round()
    shifted = {name: array + mean_shift(range(4)) for name, array in MODEL.items()}
    require_opened(hive.opened(), shifted, range(4), 1e-3)


def finite_only(message: Message, index: int) -> RecordDict:
    """A device that cannot train what is too large."""
    content = honest(message, index)
    if message.metadata.message_type == "train" and float(np.abs(arrays_of(message)["w"]).max()) > 1e15:
        return answer({n: np.full_like(a, np.nan) for n, a in MODEL.items()}, num_examples=1, loss=1.0)
    return content


def test_one_device_that_refuses_a_good_model_does_not_have_it_given_up() -> None:
    hive = EncryptedHive(3, attempts=1)
    hive.round()
    hive.round()
    model = sum_of(hive)
    hive.lie(ciphertexts=bytes([*sum_of(hive).ciphertexts[:-1], sum_of(hive).ciphertexts[-1] ^ 1]))
    told = hive.wire.deliver
    hive.wire.deliver = lambda exchange, message: (
        told(exchange, message) if message.metadata.dst_node_id == 1 else message
    )
    with pytest.raises(TooFewPeersError):
        hive.round()
    assert sum_of(hive) is model


def test_an_app_that_cannot_evaluate_costs_no_model() -> None:
    def work(message: Message, index: int) -> RecordDict:
        if message.metadata.message_type == "evaluate":
            raise ValueError("no")
        return honest(message, index)

    hive = EncryptedHive(4, work, attempts=1)
    hive.round()
    hive.round()
    model = sum_of(hive)
    with pytest.raises(TooFewPeersError, match="training-failed"):
        hive.round("evaluate")
    assert sum_of(hive) is model
