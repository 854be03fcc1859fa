"""A new key takes over in a round: its model is under the old one, and what comes of it is under the new one alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from encrypted_app import EncryptedHive, another_key, encrypted_federation, require_opened, sum_of
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from secure_app import MODEL, honest, mean_shift, outcome_of

from propolis.client import encrypted
from propolis.client.encrypted_sums import HeldKeys, open_model
from propolis.client.he_folder import HE_FORMER_FILE
from propolis.client.state import DeviceStore, FileStore, MemoryStore
from propolis.secure.errors import TooFewPeersError, TrustError
from propolis.secure.he.messages import EncryptedPlan, EncryptedUpload
from propolis.secure.secagg.policy import Policy
from propolis.simulations.federation import SIMULATED, EncryptionKeys


def rotated(hive: EncryptedHive, devices: Iterable[int] | None = None, bits: int = 16) -> EncryptionKeys:
    """Give some devices another key, and the server its public part."""
    keys = another_key(hive.federation, bits=bits)
    for index in range(len(hive.stores)) if devices is None else devices:
        store = hive.stores[index]
        assert isinstance(store, (MemoryStore, FileStore))
        store.keep_he_key(keys.bundles[index])
    hive.grid.renew_key(keys.public)
    return keys


def newcomers(hive: EncryptedHive, keys: EncryptionKeys, *indices: int) -> None:
    """Let these devices have come after the key was made."""
    for index in indices:
        state = replace(hive.federation.devices[index].copy(), roster=hive.federation.roster)
        hive.stores[index] = MemoryStore(state, SIMULATED, he_key=keys.bundles[index])


def key_id_of(hive: EncryptedHive) -> bytes:
    return EncryptedPlan.from_bytes(sum_of(hive).plan).key_id


def after(rounds: int, devices: int) -> dict[str, object]:
    return {name: array + rounds * mean_shift(range(devices)) for name, array in MODEL.items()}


def spoiling(exchange: str, node_id: int, body: bytes) -> bytes:
    """Node 2's upload has a wrong tag, which no server can tell."""
    if (exchange, node_id) != ("encrypt", 2):
        return body
    upload = EncryptedUpload.from_bytes(body, 2**24)
    data = bytearray(upload.ciphertexts)
    data[-32] ^= 1
    return EncryptedUpload(upload.round_tag, upload.metrics, bytes(data)).to_bytes()


@pytest.mark.parametrize("bits", [16, 12])
def test_the_round_after_a_new_key_puts_the_model_under_it_and_devices_erase_the_old_one(bits: int) -> None:
    hive = EncryptedHive(4)
    hive.round(**{"server-round": 1})
    old = sum_of(hive)
    keys = rotated(hive, bits=bits)
    assert key_id_of(hive) == hive.keys.public.key_id  # nobody has put it under the new one yet
    assert outcome_of(hive.round(**{"server-round": 2})).survivors == 4
    assert key_id_of(hive) == keys.public.key_id
    require_opened(hive.opened(), after(1, 4), range(4), 1e-2 if bits < 16 else 1e-3)
    assert [len(store.he_keys()) for store in hive.stores] == [2] * 4  # the round may have been in vain
    hive.round(**{"server-round": 3})
    assert [store.he_keys() for store in hive.stores] == [(bundle,) for bundle in keys.bundles]
    with pytest.raises(TrustError, match="has not, or that it has erased"):
        open_model(hive.stores[0], old.to_bytes())
    require_opened(hive.opened(), after(2, 4), range(4), 2e-2 if bits < 16 else 1e-3)


def test_who_has_the_new_key_alone_is_a_drop_out_in_that_one_round() -> None:
    hive = EncryptedHive(4)
    hive.round()
    keys = rotated(hive, [0, 1, 2])
    newcomers(hive, keys, 3)
    reply = hive.round()
    assert (outcome_of(reply).survivors, outcome_of(reply).failures) == (3, ("encrypt: he-key",))
    assert outcome_of(hive.round()).survivors == 4


def test_who_has_the_old_key_alone_is_a_drop_out_and_learns_nothing_more() -> None:
    hive = EncryptedHive(4)
    hive.round()
    rotated(hive, [0, 1, 2])
    reply = hive.round()
    assert (outcome_of(reply).survivors, outcome_of(reply).failures) == (3, ("encrypt: he-key",))
    with pytest.raises(TrustError, match="has not, or that it has erased"):
        hive.opened(3)
    assert hive.opened(0).devices == 3


def test_a_round_under_an_older_key_than_the_devices_is_refused() -> None:
    """Whoever left has it, and would read what they send."""
    hive = EncryptedHive(3, attempts=1)
    hive.round()
    rotated(hive)
    hive.grid.renew_key(hive.keys.public)
    with pytest.raises(TooFewPeersError, match=r"0 of 3 devices sent an encrypted update.*he-key"):
        hive.round()
    assert [len(store.he_keys()) for store in hive.stores] == [2] * 3


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_is_set_back_to_the_old_keys_model_goes_on(resumed: bool) -> None:
    """The round that put it under the new key had garbage in it."""
    hive = EncryptedHive(4, attempts=1)
    hive.round(**{"server-round": 1})
    keys = rotated(hive)
    hive.wire.meddle = spoiling
    hive.round(**{"server-round": 2})
    hive.wire.meddle = lambda exchange, node_id, body: body
    if resumed:
        hive.encryption = replace(hive.encryption, key=keys.public)
        state, hive.grid = hive.grid.state(), hive.new_grid(FedAvg())
        hive.grid.resume_from({}, state)
    with pytest.raises(TooFewPeersError, match="4 refused the model of the round before, which is therefore given up"):
        hive.round(**{"server-round": 3})
    assert key_id_of(hive) == hive.keys.public.key_id
    hive.round(**{"server-round": 3})
    require_opened(hive.opened(), after(1, 4), range(4), 1e-3)


def test_newcomers_do_not_keep_a_spoilt_model() -> None:
    """They cannot judge the model; those who can have refused it."""
    hive = EncryptedHive(6, attempts=1, federation=encrypted_federation(6))
    hive.round()
    hive.wire.meddle = spoiling
    hive.round()
    hive.wire.meddle = lambda exchange, node_id, body: body
    keys = rotated(hive, [0, 1, 2])
    newcomers(hive, keys, 3, 4, 5)
    with pytest.raises(TooFewPeersError, match="3 refused the model of the round before"):
        hive.round()
    assert outcome_of(hive.round()).survivors == 3


def test_newcomers_do_not_set_a_good_model_back() -> None:
    hive = EncryptedHive(5, attempts=1)
    for _ in range(2):
        hive.round()
    before = sum_of(hive)
    keys = rotated(hive, [0, 1])
    hive.stores[0].policy = Policy(min_cohort=6)  # type: ignore[misc]
    newcomers(hive, keys, 2, 3, 4)
    with pytest.raises(TooFewPeersError, match="1 of 5 devices sent an encrypted update, 3 are needed"):
        hive.round()
    assert sum_of(hive) is before


def test_another_server_goes_on_under_the_new_key_from_a_state_under_the_old_one() -> None:
    hive = EncryptedHive(4)
    for number in (1, 2):
        hive.round(**{"server-round": number})
        hive.round("evaluate", **{"server-round": number})
    state, keys = hive.grid.state(), rotated(hive)
    assert {"model", "before", "evaluation"} <= set(state)
    hive.encryption = replace(hive.encryption, key=keys.public)
    hive.grid = hive.new_grid(FedAvg())
    hive.grid.resume_from({}, state)
    assert hive.evaluation().metrics["accuracy"] == pytest.approx(sum((i + 1) * i / 8 for i in range(4)) / 10)
    hive.round("evaluate", **{"server-round": 2})  # of the old key's model, and under the new key
    assert hive.grid.evaluation is not None
    assert EncryptedPlan.from_bytes(hive.grid.evaluation.plan).key_id == keys.public.key_id
    assert hive.evaluation().metrics["accuracy"] == pytest.approx(sum((i + 1) * i / 8 for i in range(4)) / 10)
    hive.round(**{"server-round": 3})
    assert key_id_of(hive) == keys.public.key_id
    require_opened(hive.opened(), after(2, 4), range(4), 1e-3)


def test_several_new_keys_between_two_rounds_lose_nothing(tmp_path: Path) -> None:
    hive = EncryptedHive(3)
    for index in range(3):
        FileStore.create(tmp_path / str(index), hive.federation.devices[index].copy())
        hive.stores[index] = store = FileStore(tmp_path / str(index), SIMULATED)
        store.keep_he_key(hive.keys.bundles[index])
    hive.round()
    for _ in range(3):
        keys = rotated(hive)
    assert len(hive.stores[0].he_keys()) == 4
    for _ in range(2):
        hive.round()
    assert key_id_of(hive) == keys.public.key_id
    assert hive.stores[0].he_keys() == (keys.bundles[0],)
    assert not (tmp_path / "0" / HE_FORMER_FILE).exists()
    require_opened(hive.opened(), after(2, 3), range(3), 1e-3)


def test_a_new_run_erases_the_old_key_once_its_model_is_under_the_new_one() -> None:
    """Its first round is from the public model: that says nothing of what became of the old one."""
    hive = EncryptedHive(3)
    hive.round()
    keys = rotated(hive)
    hive.encryption = replace(hive.encryption, key=keys.public)
    hive.grid = hive.new_grid(FedAvg())
    hive.round()
    assert len(hive.stores[0].he_keys()) == 2
    hive.round()
    assert len(hive.stores[0].he_keys()) == 1


def test_a_server_says_which_devices_have_not_the_key(caplog: pytest.LogCaptureFixture) -> None:
    hive = EncryptedHive(5)
    for index in (1, 3):
        hive.stores[index] = MemoryStore(hive.federation.devices[index].copy(), SIMULATED)
    hive.round()
    assert "2 without the key of this round or of its model: device 1, 3" in caplog.text
    assert "this device has no key of homomorphic encryption" in caplog.text


def test_a_key_that_comes_while_a_model_is_worked_on_does_not_cost_the_one_that_it_is_under(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or all devices, which hear of a new key at the same time, would have nothing left to open the model with."""
    hive = EncryptedHive(4)
    hive.round(**{"server-round": 1})
    second = rotated(hive)
    hive.round(**{"server-round": 2})
    third = another_key(hive.federation)
    keys_of = encrypted.keys_of

    def late(store: DeviceStore) -> HeldKeys:
        """The keys as they are when a round looks at them; and then there is another one."""
        keys, index = keys_of(store), hive.stores.index(store)
        if third.bundles[index] not in store.he_keys():
            store.keep_he_key(third.bundles[index])
        return keys

    monkeypatch.setattr(encrypted, "keys_of", late)
    hive.round(**{"server-round": 3})
    expected = [(third.bundles[i], second.bundles[i]) for i in range(4)]
    assert [store.he_keys() for store in hive.stores] == expected


def test_a_device_keeps_the_old_key_until_it_has_trained_a_model_under_the_new_one() -> None:
    """One that opens and cannot be trained is given up for that before it, which is under the old one."""
    sick: list[bool] = []

    def work(message: Message, index: int) -> RecordDict:
        if sick and message.metadata.message_type == "train":
            raise ValueError("nothing finite comes of this")
        return honest(message, index)

    hive = EncryptedHive(4, work, attempts=1)
    hive.round(**{"server-round": 1})
    rotated(hive)
    hive.round(**{"server-round": 2})
    sick.append(True)
    with pytest.raises(TooFewPeersError, match="which is therefore given up"):
        hive.round(**{"server-round": 3})
    assert [len(store.he_keys()) for store in hive.stores] == [2] * 4
    hive.round("evaluate", **{"server-round": 3})
    assert [len(store.he_keys()) for store in hive.stores] == [2] * 4
    sick.clear()
    hive.round(**{"server-round": 3})
    require_opened(hive.opened(), after(1, 4), range(4), 1e-3)


def test_a_former_key_that_is_used_up_opens_no_model() -> None:
    hive = EncryptedHive(4, attempts=1, policy=Policy(max_refused_sums=1, max_reveals_per_model=None))
    hive.round()
    old = key_id_of(hive)
    rotated(hive)
    for store in hive.stores:
        store.change(lambda device: device.state.count_refused_sum(old))
    with pytest.raises(TooFewPeersError, match="encrypt: he-key"):
        hive.round()
