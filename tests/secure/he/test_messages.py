"""The messages of encrypted training as bytes: what was written is read, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.errors import PeerError, Refusal
from propolis.secure.he.held import KeyBundle
from propolis.secure.he.messages import EncryptedPlan, EncryptedSum, EncryptedUpload, Entry, pieces
from propolis.secure.identity import Signed

W = Entry("w", "float32", (5, 3))
PLAN = EncryptedPlan(bytes(16), 1, 0, 1, 1, bytes(32), bytes(32), "num-examples", 100.0, 1.0, (W,))
UPLOAD = EncryptedUpload(bytes(16), ("loss",), b"ciphertexts")
SUM = EncryptedSum(PLAN.encoded, b"\x07", ("loss",), b"ciphertexts", b"i" * 32, b"frozen")
BUNDLE = KeyBundle(Signed(b"a", bytes(64)), Signed(b"b", bytes(64)), b"material", b"sealed")

READ: dict[bytes, Callable[[bytes], object]] = {
    PLAN.encoded: EncryptedPlan.from_bytes,
    UPLOAD.to_bytes(): lambda data: EncryptedUpload.from_bytes(data, 2**20),
    SUM.to_bytes(): EncryptedSum.from_bytes,
    BUNDLE.to_bytes(): KeyBundle.from_bytes,
}


def test_what_was_written_is_read() -> None:
    assert [read(data) for data, read in READ.items()] == [PLAN, UPLOAD, SUM, BUNDLE]
    assert SUM.devices == (0, 1, 2)
    assert replace(PLAN, kind=2, entries=()).encoded != PLAN.encoded


@pytest.mark.parametrize(
    "changes",
    [
        {"entries": (W, W)},
        {"entries": ()},
        {"kind": 2},
        *({"entries": (replace(W, dtype=name),)} for name in ("object", "complex64", "U8", "datetime64", "float31")),
        {"entries": (replace(W, shape=(2**14, 2**14)), replace(W, name="b", shape=(1,)))},
    ],
    ids=str,
)
def test_a_plan_whose_arrays_cannot_be_is_refused(changes: dict[str, object]) -> None:
    plan = replace(PLAN, **changes)  # type: ignore[arg-type]
    with pytest.raises(PeerError) as caught:
        EncryptedPlan.from_bytes(plan.encoded)
    assert caught.value.refusal is Refusal.MODEL


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": b""},
        {"kind": 3},
        {"max_weight": 0.0},
        {"max_weight": float("nan")},
        {"range": float("inf")},
        {"version": 2},
    ],
    ids=str,
)
def test_a_field_out_of_its_bounds_is_malformed(changes: dict[str, object]) -> None:
    plan = replace(PLAN, **changes)  # type: ignore[arg-type]
    with pytest.raises(PeerError) as caught:
        EncryptedPlan.from_bytes(plan.encoded)
    assert caught.value.refusal is Refusal.MALFORMED


def test_a_plan_has_one_form() -> None:
    with pytest.raises(PeerError, match="canonical"):
        EncryptedPlan.from_bytes(PLAN.encoded + b"\x18\x01")


def test_an_upload_is_not_parsed_when_it_is_longer_than_it_can_be() -> None:
    with pytest.raises(PeerError, match="more than 10"):
        EncryptedUpload.from_bytes(UPLOAD.to_bytes(), 10)


@pytest.mark.parametrize("data", READ, ids=lambda data: READ[data].__qualname__)
@given(noise=st.binary(max_size=60), at=st.integers(0, 400), cut=st.booleans())
@settings(max_examples=200, deadline=None)
def test_bytes_of_a_peer_raise_our_errors_only(data: bytes, noise: bytes, at: int, cut: bool) -> None:
    at %= len(data) + 1
    for mutated in (
        noise,
        data[:at] + noise + (b"" if cut else data[at:]),
        data[:at] + noise + data[at + len(noise) :],
    ):
        try:
            READ[data](mutated)
        except PeerError:
            continue


def test_pieces_are_of_one_size_but_for_a_rest() -> None:
    assert list(pieces(b"abcdefg", 3)) == [b"abc", b"def", b"g"]
    assert list(pieces(b"", 3)) == []
