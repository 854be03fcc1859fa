"""Devices open the sum of the declared devices and nothing else, and say the same to whatever else they are sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import numpy as np
import pytest
from encrypting import FEDERATION, ROUND, adder, decryptor, drawn, encryptor, key_of, scheme, summed, tags, upload
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.he.bfv import Decryptor, Scheme
from propolis.secure.he.packing import pack
from propolis.secure.he.seal_format import pack_residues
from propolis.secure.he.stream import Declared, encrypt_vector, open_vector
from propolis.secure.he.tag import Tags, add_tags, require_set, tag_bytes, tag_from_wire, tag_to_wire
from propolis.secure.prg import Mask

ALIVE = (1, 4, 5, 9)
FLOOR = 3
CHUNKS = 2

both_modes = pytest.mark.parametrize("seeded", [False, True], ids=["public", "seeded"])


@dataclass(frozen=True)
class Attack:
    """What a server sends, and what it says of it."""

    ciphertexts: Sequence[bytes]
    alive: Collection[int] = ALIVE
    round_id: bytes = ROUND


def made_of(seeded: bool = False) -> Scheme:
    return scheme(10, 16, seeded)


def count_of(made: Scheme) -> int:
    return (CHUNKS - 1) * made.parameters.values + 1000


@cache
def uploads(seeded: bool = False) -> dict[int, list[bytes]]:
    made = made_of(seeded)
    return {device: upload(made, device, drawn(made, count_of(made), device)) for device in ALIVE}


@cache
def honest(seeded: bool = False) -> list[bytes]:
    return summed(made_of(seeded), list(uploads(seeded).values()))


def opened(attack: Attack, seeded: bool = False) -> Any:
    made = made_of(seeded)
    declared = Declared(attack.alive, FLOOR, count_of(made))
    return open_vector(attack.ciphertexts, decryptor(made), tags(made, CHUNKS, attack.round_id), declared)


@both_modes
def test_the_sum_of_the_declared_devices_is_opened(seeded: bool) -> None:
    made = made_of(seeded)
    expected = sum(drawn(made, count_of(made), device) for device in ALIVE)
    np.testing.assert_array_equal(opened(Attack(honest(seeded)), seeded), expected)


def parted(made: Scheme, data: bytes) -> tuple[bytes, NDArray[np.uint64]]:
    """Ciphertext and tag."""
    return data[: made.ciphertext_bytes], tag_from_wire(data[made.ciphertext_bytes :], made.parameters)


def changed(change: Callable[[Scheme, Any], Any], chunk: int, seeded: bool, times: int = 1) -> list[bytes]:
    """The honest sums, one of them changed as whoever has only public material can, and its tag multiplied."""
    made, data = made_of(seeded), list(honest(seeded))
    ciphertext, tag = parted(made, data[chunk])
    tag = (tag.astype(object) * times % np.array(made.parameters.primes, object)[:, None]).astype(np.uint64)
    data[chunk] = adder(made).write(change(made, adder(made).read(ciphertext))) + tag_to_wire(tag)
    return data


def combined(made: Scheme, operation: str, ciphertext: Any, other: Any) -> Any:
    result = made._seal.Ciphertext(made._context)
    getattr(made._seal.Evaluator(made._context), operation)(ciphertext, other, result)
    return result


def plaintext(made: Scheme, slots: dict[int, int]) -> Any:
    values = np.zeros(made.parameters.degree, np.uint64)
    for slot, value in slots.items():
        values[slot] = value
    return made._encoded(values)


def crafted(made: Scheme, polynomials: Sequence[dict[int, int]]) -> bytes:
    """A ciphertext with certain coefficients, and no tag."""
    shape = made._data_shape
    residues = np.zeros((2, len(shape.primes), shape.degree), np.uint64)
    for polynomial, coefficients in enumerate(polynomials):
        for at, value in coefficients.items():
            residues[polynomial, :, at] = [value % prime for prime in shape.primes]
    return bytes((1, 0)) + key_of(made)[0].key_id + pack_residues(residues, shape)


def with_crafted(seeded: bool, polynomials: Sequence[dict[int, int]]) -> list[bytes]:
    """The honest sums, with a crafted ciphertext on top of the second."""
    extra = adder(made_of(seeded)).read(crafted(made_of(seeded), polynomials))
    return changed(lambda made, sum_: combined(made, "add", sum_, extra), 1, seeded)


def delta(made: Scheme) -> int:
    """q / t: the distance of two plaintexts."""
    return prod(made.parameters.primes) // made.parameters.plain_modulus


def the_secret_key(seeded: bool) -> Attack:
    """(0, Delta), which decrypts to the secret key's own coefficients."""
    made = made_of(seeded)
    return Attack([crafted(made, [{}, {0: delta(made)}]) + data[made.ciphertext_bytes :] for data in honest(seeded)])


def the_secret_key_with_no_tag(seeded: bool) -> Attack:
    made = made_of(seeded)
    tag = bytes(tag_bytes(made.parameters))
    return Attack([crafted(made, [{}, {0: delta(made)}]) + tag for _ in range(CHUNKS)])


def the_secret_key_on_top(seeded: bool) -> Attack:
    return Attack(with_crafted(seeded, [{}, {0: delta(made_of(seeded))}]))


def noise_that_a_coefficient_of_the_key_decides_on(seeded: bool) -> Attack:
    return Attack(with_crafted(seeded, probe(made_of(seeded), 0)))


def probe(made: Scheme, place: int) -> list[dict[int, int]]:
    """What breaks a decryption when s_0 = 1, or -s_(N - place) = 1, and does nothing otherwise."""
    step = delta(made) // 4
    return [{0: 2 * step - step // 2}, {place: step}]


def the_least_noise(seeded: bool) -> Attack:
    return Attack(with_crafted(seeded, [{17: 1}, {9: 1}]))


def one_for_the_sum(seeded: bool) -> Attack:
    made = made_of(seeded)
    return Attack(summed(made, [uploads(seeded)[1]]))


def one_four_times(seeded: bool) -> Attack:
    made = made_of(seeded)
    return Attack(summed(made, [uploads(seeded)[1]] * len(ALIVE)))


def one_twice_and_one_not(seeded: bool) -> Attack:
    made, sent = made_of(seeded), uploads(seeded)
    return Attack(summed(made, [sent[1], sent[1], sent[4], sent[5]]))


def one_twice_and_the_others(seeded: bool) -> Attack:
    made, sent = made_of(seeded), uploads(seeded)
    return Attack(summed(made, [sent[1], *sent.values()]))


def one_left_out(seeded: bool) -> Attack:
    made, sent = made_of(seeded), uploads(seeded)
    return Attack(summed(made, [sent[1], sent[4], sent[5]]))


def below_the_floor(seeded: bool) -> Attack:
    made, sent = made_of(seeded), uploads(seeded)
    return Attack(summed(made, [sent[1], sent[4]]), alive=(1, 4))


def another_round(seeded: bool) -> Attack:
    return Attack(honest(seeded), round_id=ROUND + b"!")


def chunks_swapped(seeded: bool) -> Attack:
    return Attack(honest(seeded)[::-1])


def a_chunk_twice(seeded: bool) -> Attack:
    return Attack([honest(seeded)[0]] * 2)


def a_chunk_missing(seeded: bool) -> Attack:
    return Attack(honest(seeded)[:1])


def a_chunk_too_many(seeded: bool) -> Attack:
    return Attack([*honest(seeded), honest(seeded)[0]])


def three_times_all(seeded: bool) -> Attack:
    made = made_of(seeded)
    three = plaintext(made, dict.fromkeys(range(made.parameters.degree), 3))
    return Attack(changed(lambda made, sum_: combined(made, "multiply_plain", sum_, three), 0, seeded, 3))


def minus_all(seeded: bool) -> Attack:
    def change(made: Scheme, sum_: Any) -> Any:
        result = made._seal.Ciphertext(made._context)
        made._seal.Evaluator(made._context).negate(sum_, result)
        return result

    return Attack(changed(change, 0, seeded, -1))


def one_added_to_a_value(seeded: bool) -> Attack:
    one = plaintext(made_of(seeded), {0: 1})
    return Attack(changed(lambda made, sum_: combined(made, "add_plain", sum_, one), 1, seeded))


def another_tag(seeded: bool) -> Attack:
    return Attack(changed(lambda made, sum_: sum_, 1, seeded, 2))


def one_bit_of_a_tag(seeded: bool) -> Attack:
    first, second = honest(seeded)
    at = made_of(seeded).ciphertext_bytes
    return Attack([first, second[:at] + bytes((second[at] ^ 1,)) + second[at + 1 :]])


def tags_swapped(seeded: bool) -> Attack:
    (first, second), at = honest(seeded), made_of(seeded).ciphertext_bytes
    return Attack([first[:at] + second[at:], second[:at] + first[at:]])


def nobody(seeded: bool) -> Attack:
    return Attack(honest(seeded), alive=())


def somebody_twice(seeded: bool) -> Attack:
    return Attack(honest(seeded), alive=(*ALIVE, 1))


def two_that_count_for_three(seeded: bool) -> Attack:
    """Its tag holds, and somebody who knows one of the two knows the other."""
    made, sent = made_of(seeded), uploads(seeded)
    return Attack(summed(made, [sent[1], sent[1], sent[4]]), alive=(1, 1, 4))


def somebody_below_zero(seeded: bool) -> Attack:
    return Attack(honest(seeded), alive=(*ALIVE, -1))


def more_than_there_is_room_for(seeded: bool) -> Attack:
    return Attack(honest(seeded), alive=range(11))


ATTACKS = [
    the_secret_key, the_secret_key_with_no_tag, the_secret_key_on_top, noise_that_a_coefficient_of_the_key_decides_on,
    the_least_noise, one_for_the_sum, one_four_times, one_twice_and_one_not, one_twice_and_the_others, one_left_out,
    below_the_floor, another_round, chunks_swapped, a_chunk_twice, a_chunk_missing, a_chunk_too_many, three_times_all,
    minus_all, one_added_to_a_value, another_tag, one_bit_of_a_tag, tags_swapped, nobody, somebody_twice,
    two_that_count_for_three, somebody_below_zero, more_than_there_is_room_for,
]  # fmt: skip


@both_modes
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_every_forgery_gets_the_same_refusal(attack: Callable[[bool], Attack], seeded: bool) -> None:
    with pytest.raises(PeerError) as caught:
        opened(attack(seeded), seeded)
    assert caught.value.refusal is Refusal.CIPHERTEXT
    assert str(caught.value) == "an encrypted sum is not that of the devices it is said to be of"


def secret_coefficients(made: Scheme) -> list[int]:
    """What (0, Delta) decrypts to."""
    coefficients = made._seal.Plaintext()
    made._encoder.encode(decryptor(made).decrypt(crafted(made, [{}, {0: delta(made)}])).tolist(), coefficients)
    return [int(coefficients[place]) for place in range(made.parameters.degree)]


def test_crafted_ciphertexts_do_what_they_are_for() -> None:
    """Without tags they would work, so their refusals say something."""
    made = made_of()
    assert set(secret_coefficients(made)) == {0, 1, made.parameters.plain_modulus - 1}
    before, after = honest()[1], one_added_to_a_value(False).ciphertexts[1]
    at = made.ciphertext_bytes
    changes = np.flatnonzero(decryptor(made).decrypt(before[:at]) != decryptor(made).decrypt(after[:at]))
    assert changes.tolist() == [0]


def test_a_tag_that_is_decrypted_first_would_tell_the_key() -> None:
    """Whether a decryption comes out right is one coefficient of the secret key, so tags are on ciphertexts."""
    made = made_of()
    secret, right = secret_coefficients(made), decryptor(made).decrypt(honest()[1][: made.ciphertext_bytes])
    minus_one = made.parameters.plain_modulus - 1
    broken = []
    for place in range(1, 9):
        probed = with_crafted(False, probe(made, place))[1][: made.ciphertext_bytes]
        broken.append(bool((decryptor(made).decrypt(probed) != right).any()))
    assert broken == [secret[made.parameters.degree - place] == minus_one for place in range(1, 9)]


def test_nothing_is_decrypted_before_its_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    decrypted, decrypt = [], Decryptor.decrypt
    monkeypatch.setattr(Decryptor, "decrypt", lambda self, data: decrypted.append(data) or decrypt(self, data))
    for attack, expected in ((the_secret_key, []), (one_added_to_a_value, honest()[:1])):
        decrypted.clear()
        with pytest.raises(PeerError):
            opened(attack(False))
        assert decrypted == [data[: made_of().ciphertext_bytes] for data in expected]


def test_whoever_knows_the_key_of_tags_can_forge() -> None:
    """So it is the tags' secret that holds the forgeries off, and nothing else."""
    made = made_of()
    offsets, forged = tags(made, CHUNKS).of_devices(ALIVE), []
    for chunk in range(CHUNKS):
        data, residues = encryptor(made).encrypt(pack(np.arange(100), made.parameters))
        tag = add_tags(tags(made, CHUNKS).of_residues(chunk, residues), offsets[chunk], made.parameters)
        forged.append(data + tag_to_wire(tag))
    assert opened(Attack(forged))[0] == -(2**15) * (len(ALIVE) - 1)


@given(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1), st.integers(0, 4095), st.integers(1, 2**60))
@settings(max_examples=50, deadline=None)
def test_any_other_residue_has_another_tag(chunk: int, polynomial: int, place: int, at: int, change: int) -> None:
    made = scheme(1000, 16)  # two primes
    maker, prime = tags(made, CHUNKS), made.parameters.primes[place]
    drawn_from = np.random.default_rng(1)
    residues = np.stack([drawn_from.integers(0, each, (2, 4096), np.uint64) for each in made.parameters.primes], axis=1)
    before = maker.of_residues(chunk, residues)
    residues[polynomial, place, at] = (int(residues[polynomial, place, at]) + change) % prime
    differs = before != maker.of_residues(chunk, residues)
    assert differs[place].all() == differs.any() == (change % prime != 0)


@pytest.mark.parametrize("primes", [(2**33 - 9, 2**31 - 1), (2**60 - 93,)])
def test_tags_are_exact_at_the_largest_residues(primes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Double precision holds every sum of products that there can be, and the result is that of Python's integers."""
    parameters = replace(made_of().parameters, degree=8192, primes=primes)
    maker = Tags(FEDERATION, ROUND, parameters, 1)
    for largest in (True, False):
        if largest:
            full = np.full((2, 4, 8192), 2.0**16 - 1)
            monkeypatch.setattr(Tags, "_coefficients", lambda self, chunk, full=full: full)
        rows = [np.full((2, 8192), prime - 1, np.uint64) for prime in primes]
        r = maker._coefficients(0).astype(np.int64).astype(object)
        expected = [[sum(r[:, k].ravel()) * (prime - 1) % prime for k in range(4)] for prime in primes]
        assert maker.of_residues(0, np.stack(rows, axis=1)).tolist() == expected
        monkeypatch.undo()


def test_coefficients_and_pads_look_uniform() -> None:
    made = made_of()
    maker = Tags(FEDERATION, ROUND, made.parameters, 4096)
    (prime,) = made.parameters.primes
    for values, most in ((maker._coefficients(0).ravel(), 2**16), (maker.of_device(1).ravel(), prime)):
        observed = np.bincount((values / most * 64).astype(np.int64), minlength=64)
        expected = values.size / 64
        assert len(observed) == 64
        assert abs(float(((observed - expected) ** 2 / expected).sum()) - 63) < 5 * 126**0.5


def test_tags_depend_on_key_round_device_chunk_prime_and_repetition() -> None:
    parameters, one, other = scheme(1000, 16).parameters, bytes(32), bytes(31) + b"\1"
    residues = np.ones((2, 2, parameters.degree), np.uint64)
    makers = [Tags(one, b"a", parameters, 3), Tags(other, b"a", parameters, 3), Tags(one, b"b", parameters, 3)]
    of_residues = {
        int(each) for maker in makers for chunk in range(3) for each in maker.of_residues(chunk, residues)[0]
    }
    of_devices = {int(each) for maker in makers for device in range(3) for each in maker.of_device(device).ravel()}
    assert len(of_residues) == 9 * 4
    assert len(of_devices) == 9 * 3 * 2 * 4


# What every device must compute: key 0..31, round "vector", parameters for 1000 devices and 16 bits, 3 chunks.
VECTOR_OF_DEVICE_5 = [[8557308045, 4522146039, 2912682020, 349465681], [2318365272, 5221678783, 3950285470, 7467726214]]
VECTOR_OF_ONES = [[267970569, 268073151, 266238027, 266012651], [267970569, 268073151, 266238027, 266012651]]


def test_vectors() -> None:
    parameters = scheme(1000, 16).parameters
    maker = Tags(FEDERATION, b"vector", parameters, 3)
    assert maker.of_device(5)[2].tolist() == VECTOR_OF_DEVICE_5
    assert maker.of_residues(2, np.ones((2, 2, parameters.degree), np.uint64)).tolist() == VECTOR_OF_ONES


def test_more_devices_than_there_is_room_for_are_not_opened() -> None:
    """Their tag holds, but their fields may have run over."""
    made = scheme(2, 16)
    values = np.full(10, 2**15 - 1)
    parts = [parted(made, upload(made, device, values)[0]) for device in range(3)]
    total, tag = adder(made).read(parts[0][0]), parts[0][1]
    for ciphertext, other in parts[1:]:
        total = adder(made).add(total, adder(made).read(ciphertext))
        tag = add_tags(tag, other, made.parameters)
    data = adder(made).write(total) + tag_to_wire(tag)
    maker = tags(made, 1)
    residues = decryptor(made).residues(data[: made.ciphertext_bytes])
    maker.require(0, residues, tag, maker.of_devices(range(3))[0])
    with pytest.raises(PeerError) as caught:
        open_vector([data], decryptor(made), maker, Declared(range(3), 1, 10))
    assert caught.value.refusal is Refusal.CIPHERTEXT


def test_a_floor_is_at_least_one() -> None:
    for floor in (0, -1, 1):
        with pytest.raises(PeerError) as caught:
            require_set((), floor, made_of().parameters)
        assert caught.value.refusal is Refusal.CIPHERTEXT


def test_misuse_is_refused() -> None:
    made = made_of()
    with pytest.raises(UsageError, match="32 bytes"):
        Tags(bytes(16), ROUND, made.parameters, 1)
    with pytest.raises(UsageError, match="no chunk 2 among 2"):
        tags(made, 2).of_residues(2, np.zeros((2, 1, made.parameters.degree), np.uint64))
    require_set([3, 1, 2], 3, made.parameters)


def test_a_masked_upload_shows_nothing_even_to_whoever_decrypts_it() -> None:
    made = made_of()
    values = [drawn(made, count_of(made), device) for device in ALIVE[:3]]
    masks = [[Mask(b"a" * 32, 1), Mask(b"b" * 32, 1)], [Mask(b"a" * 32, -1)], [Mask(b"b" * 32, -1)]]
    sent = [
        list(encrypt_vector(value, encryptor(made), tags(made, CHUNKS), device, mask))
        for value, device, mask in zip(values, ALIVE, masks, strict=False)
    ]
    result = opened(Attack(summed(made, sent), alive=ALIVE[:3]))
    np.testing.assert_array_equal(result, sum(values))
    plain = pack(values[0][: made.parameters.values], made.parameters)
    slots = decryptor(made).decrypt(sent[0][0][: made.upload_bytes])
    assert np.count_nonzero(slots == plain) < 3
    observed = np.bincount((slots / made.parameters.plain_modulus * 16).astype(np.int64), minlength=16)
    assert float(((observed - len(slots) / 16) ** 2 / (len(slots) / 16)).sum()) < 15 + 5 * 30**0.5
    assert key_of(made)[1].mac_key not in sent[0][0]
