"""Sums are exact to the last client, and no bytes of a peer's do more than raise an error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from encrypting import adder, decryptor, encryptor, key_of, scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.he import bfv
from propolis.secure.he.bfv import HEADER_BYTES, Scheme
from propolis.secure.he.memory_file import saved_bytes
from propolis.secure.he.packing import pack, unpack
from propolis.secure.he.seal_format import SEED_BYTES, ciphertext_to_wire

both_modes = pytest.mark.parametrize("seeded", [False, True], ids=["public", "seeded"])


def random_slots(made: Scheme, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, made.parameters.plain_modulus, made.parameters.degree, np.uint64)


def refused(made: Scheme, data: bytes, refusal: Refusal = Refusal.MALFORMED) -> str:
    with pytest.raises(PeerError) as caught:
        decryptor(made).decrypt(data)
    assert caught.value.refusal is refusal
    with pytest.raises(PeerError):
        adder(made).read(data)
    return str(caught.value)


@both_modes
@pytest.mark.parametrize(
    ("clients", "value_bits"), [(2, 16), (10, 16), (100, 16), (1000, 16), (32, 8), (1000, 8), (10, 4)]
)
def test_the_sum_of_all_clients_is_exact_at_the_extremes(clients: int, value_bits: int, seeded: bool) -> None:
    """All have the same values, so that neither carries nor the rounding of messages cancel."""
    made = scheme(clients, value_bits, seeded)
    half = 1 << value_bits - 1
    values = np.where(np.arange(made.parameters.values) % 3 == 0, -half, half - 1)
    slots = pack(values, made.parameters)
    encrypts, adds = encryptor(made), adder(made)
    total, plaintext = adds.read(encrypts.encrypt(slots)[0]), made._encoded(slots)
    for _ in range(clients - 1):
        fresh = made._seal.Ciphertext(made._context)
        encrypts._encrypt(plaintext, fresh)
        total = adds.add(total, fresh)
    data = adds.write(total)
    assert len(data) == made.ciphertext_bytes
    opened = decryptor(made).decrypt(data)
    np.testing.assert_array_equal(unpack(opened, made.parameters, clients, made.parameters.values), clients * values)
    assert decryptor(made).noise_budget(data) >= 1


@both_modes
def test_every_slot_takes_every_element(seeded: bool) -> None:
    made = scheme(10, 16, seeded)
    slots = random_slots(made)
    slots[:3] = 0, 1, made.parameters.plain_modulus - 1
    data, residues = encryptor(made).encrypt(slots)
    whole = adder(made).write(adder(made).read(data))
    np.testing.assert_array_equal(decryptor(made).residues(whole), residues)
    np.testing.assert_array_equal(decryptor(made).decrypt(data), slots)
    assert len(data) == made.upload_bytes
    assert data != encryptor(made).encrypt(slots)[0]


def test_a_seed_is_no_sum() -> None:
    made = scheme(10, 16, True)
    with pytest.raises(PeerError, match="a seed in place of a sum"):
        decryptor(made).residues(encryptor(made).encrypt(random_slots(made))[0])


def test_a_seed_takes_the_place_of_half_of_a_ciphertext() -> None:
    made = scheme(10, 16, True)
    assert made.upload_bytes == HEADER_BYTES + (made.ciphertext_bytes - HEADER_BYTES) // 2 + SEED_BYTES


def test_plaintexts_that_are_none_are_refused() -> None:
    made = scheme()
    slots = random_slots(made)
    for wrong in (slots[:-1], np.append(slots, slots[:1]), np.full_like(slots, made.parameters.plain_modulus)):
        with pytest.raises(UsageError, match="slots below the plain modulus"):
            encryptor(made).encrypt(wrong)


@both_modes
def test_another_key_decrypts_to_noise(seeded: bool) -> None:
    made = scheme(10, 16, seeded)
    slots = random_slots(made)
    data = encryptor(made).encrypt(slots)[0]
    other = made.decryptor(key_of(made, 1)[1].secret_key, key_of(made)[0].key_id)
    assert np.count_nonzero(other.decrypt(data) == slots) < 3
    assert other.noise_budget(data) == 0


@both_modes
def test_bytes_of_another_length_version_kind_or_key_are_refused(seeded: bool) -> None:
    made = scheme(10, 16, seeded)
    data = encryptor(made).encrypt(random_slots(made))[0]
    for wrong in (b"", data[:1], data[:HEADER_BYTES], data[:-1], data + b"\0", b"\2" + data[1:]):
        assert "no ciphertext of these parameters" in refused(made, wrong)
    for kind in (1 - data[1], 2, 255):
        assert "no ciphertext of these parameters" in refused(made, data[:1] + bytes((kind,)) + data[2:])
    third_polynomial = data + data[-(made.ciphertext_bytes - HEADER_BYTES) // 2 :]
    assert "no ciphertext of these parameters" in refused(made, third_polynomial)
    of_another_key = encryptor(made, 1).encrypt(random_slots(made))[0]
    assert "another key" in refused(made, of_another_key, Refusal.HE_KEY)


def test_ciphertexts_of_other_parameters_are_refused() -> None:
    made, other = scheme(10, 16), scheme(1000, 16)
    data = encryptor(other).encrypt(random_slots(other))[0]
    refused(made, data)
    refused(made, data[:2] + key_of(made)[0].key_id + data[HEADER_BYTES:])


@both_modes
def test_residues_that_are_not_below_their_prime_are_refused(seeded: bool) -> None:
    made = scheme(1000, 16, seeded)
    data = bytearray(encryptor(made).encrypt(random_slots(made))[0])
    # The four low bytes of the first residue, and its 33rd bit, which comes after those of all.
    data[HEADER_BYTES : HEADER_BYTES + 4] = bytes(4)
    decryptor(made).decrypt(bytes(data))
    data[HEADER_BYTES : HEADER_BYTES + 4] = b"\xff" * 4
    data[HEADER_BYTES + 4 * made.parameters.degree] |= 1
    assert "SEAL does not take" in refused(made, bytes(data))


@both_modes
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_random_bytes_of_the_right_length_are_no_more_than_refused(seeded: bool, data: st.DataObject) -> None:
    made = scheme(10, 16, seeded)
    size = made.upload_bytes - HEADER_BYTES
    payload = np.random.default_rng(data.draw(st.integers(0, 2**32))).bytes(size)
    header = encryptor(made).encrypt(random_slots(made))[0][:HEADER_BYTES]
    try:
        decrypted = decryptor(made).decrypt(header + payload)
    except PeerError as error:
        assert error.refusal is Refusal.MALFORMED  # noqa: PT017
    else:
        assert len(decrypted) == made.parameters.degree


def test_what_seal_itself_writes_is_refused() -> None:
    """Its headers, which say how much memory to take, never come from a peer."""
    made = scheme()
    saved = saved_bytes(adder(made).read(encryptor(made).encrypt(random_slots(made))[0]))
    refused(made, saved)
    refused(made, b"\1\0" + key_of(made)[0].key_id + saved)


def test_ciphertexts_that_hide_nothing_are_refused() -> None:
    made = scheme()
    header = encryptor(made).encrypt(random_slots(made))[0][:HEADER_BYTES]
    half = (made.ciphertext_bytes - HEADER_BYTES) // 2
    assert "hides nothing" in refused(made, header + bytes(2 * half))
    first = encryptor(made).encrypt(random_slots(made))[0][HEADER_BYTES : HEADER_BYTES + half]
    assert "hides nothing" in refused(made, header + first + bytes(half))


def test_a_sum_that_would_hide_nothing_is_refused() -> None:
    made = scheme()
    adds = adder(made)
    one = adds.read(encryptor(made).encrypt(random_slots(made))[0])
    minus = made._seal.Ciphertext(made._context)
    made._seal.Evaluator(made._context).negate(one, minus)
    before = adds.write(one)
    with pytest.raises(PeerError, match="takes the others away"):
        adds.add(one, minus)
    assert adds.write(one) == before


def of_size_three(made: Scheme, one: Any) -> Any:
    product = made._seal.Ciphertext(made._context)
    made._seal.Evaluator(made._context).multiply(one, one, product)
    return product


def in_ntt_form(made: Scheme, one: Any) -> Any:
    made._seal.Evaluator(made._context).transform_to_ntt_inplace(one)
    return one


def of_the_level_of_keys(made: Scheme, one: Any) -> Any:
    higher = made._seal.Ciphertext(made._context, made._context.key_parms_id(), 2)
    higher.resize(2)
    return higher


@pytest.mark.parametrize("make", [of_size_three, in_ntt_form, of_the_level_of_keys])
def test_only_two_polynomials_of_the_first_level_are_added(make: Callable[[Scheme, Any], Any]) -> None:
    made = scheme(1000, 16)
    one = adder(made).read(encryptor(made).encrypt(random_slots(made))[0])
    made._require_addable(one)
    with pytest.raises(PeerError, match="another size, form or level"):
        made._require_addable(make(made, one))


def test_no_other_form_can_be_written() -> None:
    made = scheme(1000, 16)
    for make in (of_size_three, in_ntt_form, of_the_level_of_keys):
        one = adder(made).read(encryptor(made).encrypt(random_slots(made))[0])
        with pytest.raises(UsageError, match="another format than SEAL 4"):
            ciphertext_to_wire(saved_bytes(make(made, one)), made._data_shape)


def test_keys_that_are_none_are_refused() -> None:
    made = scheme()
    public, secret = key_of(made)
    for wrong in (secret.secret_key[:-1], secret.secret_key + b"\0", b""):
        with pytest.raises(PeerError):
            made.decryptor(wrong, public.key_id)
        with pytest.raises(PeerError):
            made.secret_encryptor(wrong, public.key_id)
    for wrong in (public.public_key[:-1], b"", secret.secret_key):
        with pytest.raises(PeerError):
            made.public_encryptor(wrong, public.key_id)
    for load, size in ((made.decryptor, len(secret.secret_key)), (made.public_encryptor, len(public.public_key))):
        with pytest.raises(PeerError) as caught:
            load(b"\xff" * size, public.key_id)
        assert caught.value.refusal is Refusal.HE_KEY


def test_without_tenseal_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheme()
    bfv._sealapi.cache_clear()
    monkeypatch.setitem(sys.modules, "tenseal.sealapi", None)
    with pytest.raises(UsageError, match=r"pip install 'propolis\[he\]'"):
        Scheme(made.parameters)
    monkeypatch.undo()
    bfv._sealapi.cache_clear()


def test_without_files_in_memory_nothing_is_written_to_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheme()
    monkeypatch.delattr("os.memfd_create")
    with pytest.raises(UsageError, match="needs Linux's files in memory"):
        made.generate()


def test_parameters_that_seal_thinks_insecure_are_refused() -> None:
    chosen = scheme(1000, 16).parameters
    with pytest.raises(UsageError, match="SEAL does not take the parameters"):
        Scheme(replace(chosen, degree=2048))
