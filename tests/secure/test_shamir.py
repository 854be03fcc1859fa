"""Any t shares give the secret, t - 1 give nothing, and what is no share is refused."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, combine, draw_secret, split

Points = list[tuple[int, int]]
SECRET = bytes(range(16))
elements = st.one_of(st.integers(0, PRIME - 1), st.sampled_from([0, PRIME - 1]))
secrets = elements.map(lambda value: value.to_bytes(16, "big"))


def naive_value(points: Points, at: int) -> int:
    """Lagrange's formula as in the textbook: the value at `at` of the polynomial through `points`, modulo p."""
    value = 0
    for i, (x, y) in enumerate(points):
        term = y
        for j, (other, _) in enumerate(points):
            if i != j:
                term = term * (at - other) * pow(x - other, PRIME - 2, PRIME) % PRIME
        value += term
    return value % PRIME


def as_points(shares: list[tuple[int, bytes]]) -> Points:
    return [(x, int.from_bytes(share, "big")) for x, share in shares]


def element(value: int) -> bytes:
    return value.to_bytes(SHARE_BYTES, "big")


@st.composite
def sharings(draw: st.DrawFn) -> tuple[bytes, int, list[tuple[int, bytes]]]:
    """A secret, a threshold and shares in any order."""
    xs = draw(st.lists(st.integers(1, 2**20), min_size=1, max_size=12, unique=True))
    threshold, secret = draw(st.integers(1, len(xs))), draw(secrets)
    shares = split(secret, threshold, xs, Random(draw(st.integers())).randbytes)
    return secret, threshold, draw(st.permutations(list(zip(xs, shares, strict=True))))


def test_the_modulus_is_prime() -> None:
    for base in (2, 3, 5, 7, 11, 13):  # Fermat
        assert pow(base, PRIME - 1, PRIME) == 1
    assert 2**127 < PRIME < 2**128
    assert SHARE_BYTES == SECRET_BYTES == 16


@given(sharings())
@settings(deadline=None)
def test_any_t_shares_suffice_and_agree_with_the_textbook(drawn: tuple[bytes, int, list[tuple[int, bytes]]]) -> None:
    secret, threshold, shares = drawn
    chosen = shares[:threshold]
    assert combine(chosen) == secret
    assert naive_value(as_points(chosen), 0) == int.from_bytes(secret, "big")
    for x, share in shares[threshold:]:
        assert naive_value(as_points(chosen), x) == int.from_bytes(share, "big")


def test_every_subset_of_t_suffices_and_none_smaller_does() -> None:
    shares = list(zip(range(1, 8), split(SECRET, 4, range(1, 8), Random(0).randbytes), strict=True))
    assert all(combine(subset) == SECRET for subset in combinations(shares, 4))
    assert SECRET not in [combine(subset) for size in (1, 2, 3) for subset in combinations(shares, size)]


@given(sharings(), secrets)
@settings(deadline=None)
def test_fewer_than_t_shares_fit_every_secret(drawn: tuple[bytes, int, list[tuple[int, bytes]]], other: bytes) -> None:
    """With any other candidate there is one more share that completes the t - 1 to it: they exclude nothing."""
    _, threshold, shares = drawn
    known, (x, _) = shares[: threshold - 1], shares[-1]
    completing = naive_value([(0, int.from_bytes(other, "big")), *as_points(known)], x)
    assert combine([*known, (x, element(completing))]) == other


def test_every_coefficient_is_drawn_uniformly_and_afresh() -> None:
    drawn: list[bytes] = []

    def random_bytes(count: int) -> bytes:
        drawn.append(Random(len(drawn)).randbytes(count))
        return drawn[-1]

    (share,) = split(SECRET, 1, [9], random_bytes)
    assert share == SECRET
    assert drawn == []
    shares = split(SECRET, 4, [1, 2, 3, 4], random_bytes)
    assert len(drawn) == 3
    assert all(len(each) >= 32 for each in drawn)  # at least 128 bits more than the modulus: no bias
    c3, c2, c1 = (int.from_bytes(each, "big") for each in drawn)
    secret = int.from_bytes(SECRET, "big")
    expected = [(c3 * x**3 + c2 * x**2 + c1 * x + secret) % PRIME for x in (1, 2, 3, 4)]
    assert [int.from_bytes(each, "big") for each in shares] == expected


@pytest.mark.parametrize(
    "shares",
    [
        [],
        [(0, element(1))],
        [(PRIME, element(1))],
        [(-1, element(1))],
        [(1, element(1)), (1, element(1))],
        [(1, element(1)), (1, element(2)), (2, element(3))],
        [(1, element(PRIME))],
        [(1, b"\xff" * SHARE_BYTES)],
        [(1, element(1)[:-1])],
        [(1, element(1) + b"\0")],
        [(1, b"")],
        [(1, b"\0" + element(1))],  # of a field whose elements take 17 bytes
    ],
)
def test_what_is_no_share_is_refused(shares: list[tuple[int, bytes]]) -> None:
    with pytest.raises(PeerError) as caught:
        combine(shares)
    assert caught.value.refusal is Refusal.SHARES


def test_a_wrong_share_gives_a_wrong_secret() -> None:
    shares = list(zip((1, 2, 3), split(SECRET, 3, (1, 2, 3), Random(0).randbytes), strict=True))
    value = int.from_bytes(shares[0][1], "big")
    assert combine([(1, element((value + 1) % PRIME)), *shares[1:]]) != SECRET


@pytest.mark.parametrize("threshold", [-1, 0, 4])
def test_a_threshold_that_cannot_be_met_is_a_mistake(threshold: int) -> None:
    with pytest.raises(UsageError, match=f"1 <= threshold <= 3, got 16 and {threshold}"):
        split(SECRET, threshold, [1, 2, 3], Random(0).randbytes)


@pytest.mark.parametrize("length", [0, 15, 17, 32])
def test_a_secret_of_another_length_is_a_mistake(length: int) -> None:
    with pytest.raises(UsageError, match="need 16 bytes"):
        split(bytes(length), 2, [1, 2, 3], Random(0).randbytes)


@pytest.mark.parametrize("value", [PRIME, 2**128 - 1])
def test_a_secret_that_is_no_element_of_the_field_is_a_mistake(value: int) -> None:
    with pytest.raises(UsageError, match="no element of the field"):
        split(value.to_bytes(16, "big"), 2, [1, 2, 3], Random(0).randbytes)


def test_secrets_are_drawn_from_the_whole_field() -> None:
    """From twice as many bytes, so that no secret is likelier than another by more than 2^-127."""
    drawn = [draw_secret(lambda count: b"\xff" * count), draw_secret(bytes), draw_secret(Random(0).randbytes)]
    assert [int.from_bytes(each, "big") for each in drawn] == [
        (2**256 - 1) % PRIME,
        0,
        int.from_bytes(Random(0).randbytes(32), "big") % PRIME,
    ]
    assert {len(each) for each in drawn} == {16}


@pytest.mark.parametrize("xs", [[0, 1], [1, 1], [1, PRIME], [-1, 1]])
def test_shares_are_made_for_distinct_points_only(xs: list[int]) -> None:
    with pytest.raises(PeerError, match="distinct and not zero"):
        split(SECRET, 2, xs, Random(0).randbytes)
