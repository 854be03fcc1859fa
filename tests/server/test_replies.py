"""What a device may answer in an unprotected run, and what is made of it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.lib import format as npy

from propolis.flower import set_identity
from propolis.server.model import GlobalModel
from propolis.server.replies import LONGEST_FAILURE, MOST_FAILURES, lines_of, metrics_fault, sift, update_fault

MODEL = GlobalModel(
    {"w": np.zeros((2, 3), np.float32), "half": np.zeros(2, np.float16), "count": np.array(7), "on": np.array(True)},
    trainable=frozenset({"w", "half"}),
    frozen=frozenset(),
)
Metrics = dict[str, int | float | list[int] | list[float]]


def reply(metrics: Metrics | None = None, names: tuple[str, str] = ("arrays", "metrics"), **arrays: Array) -> Message:
    set_identity(1)
    request = Message(RecordDict(), dst_node_id=1, message_type="train")
    record = MetricRecord({"num-examples": 1, "loss": 0.5} if metrics is None else metrics)
    return Message(
        RecordDict({names[0]: ArrayRecord(dict(MODEL.record()) | arrays), names[1]: record}), reply_to=request
    )


def fault_with(**arrays: Array) -> str | None:
    return update_fault(reply(**arrays), MODEL)


def saved(array: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def as_w(data: bytes, dtype: str = "float32", stype: str = "numpy.ndarray") -> Array:
    return Array(dtype, (2, 3), stype, data)


def headed(shape: tuple[int, ...], descr: str = "<f4", body: bytes = bytes(24)) -> bytes:
    buffer = BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + body


def with_header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24)


GOOD = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "array",
    [
        Array(GOOD),
        Array(np.asfortranarray(GOOD)),
        Array(GOOD.astype(">f4")),
        Array(GOOD.astype(np.float64)),
        Array(GOOD.astype(np.int8)),
    ],
)
def test_numbers_are_usable_in_every_layout(array: Array) -> None:
    assert fault_with(w=array) is None


@pytest.mark.parametrize(
    "array",
    [
        as_w(b""),
        as_w(b"garbage"),
        as_w(saved(GOOD)[:-1]),
        as_w(saved(GOOD) + b"\0"),
        as_w(saved(GOOD).replace(b"\x01\x00", b"\x09\x00", 1)),
        as_w(saved(GOOD[:1])),
        as_w(saved(GOOD.reshape(3, 2))),
        as_w(saved(GOOD.astype(np.float64))),
        as_w(saved(GOOD), dtype="float64"),
        as_w(saved(GOOD), stype="pickle"),
        as_w(saved(GOOD.astype("U8"))),
        as_w(saved(np.full((2, 3), None), pickled=True), dtype="object"),
        as_w(headed((2**40,), body=b"")),
        as_w(headed((2**70, 3))),
        as_w(headed((2, 3), "|O"), dtype="object"),
        as_w(with_header(b"-" * 9000 + b"1\n")),
        as_w(with_header(b"(" * 9000 + b"\n")),
        as_w(with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }" + b" " * 60_000 + b"\n")),
    ],
)
def test_an_array_that_is_not_what_it_says_is_malformed(array: Array) -> None:
    assert fault_with(w=array) == "the update's w is malformed"


@pytest.mark.parametrize(
    "dtype", ["U8", "S8", "complex64", "datetime64[s]", "timedelta64[s]", "V4", [("a", "f4"), ("b", "f4")]]
)
def test_what_is_no_real_number_is_refused(dtype: str) -> None:
    assert "expected float32" in (fault_with(w=Array(np.zeros((2, 3), dtype))) or "")


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("w", np.full((2, 3), np.nan, np.float32), "has values that are not finite as float32"),
        ("w", np.full((2, 3), -np.inf, np.float32), "has values that are not finite as float32"),
        ("w", np.full((2, 3), 1e300), "has values that are not finite as float32"),
        ("half", np.full(2, 1e5, np.float32), "has values that are not finite as float16"),
        ("count", np.array(7.5), "has the type float64, expected int64"),
        ("on", np.array(1), "has the type int64, expected bool"),
    ],
)
def test_a_value_that_the_models_type_cannot_hold_is_refused(name: str, value: np.ndarray, fault: str) -> None:
    assert fault_with(**{name: Array(value)}) == f"the update's {name} {fault}"


def test_checking_takes_little_memory_beside_the_reply() -> None:
    model = GlobalModel({"w": np.zeros(1_000_000, np.float32)}, frozenset({"w"}), frozenset())
    update = reply()
    update.content["arrays"] = model.record()
    tracemalloc.start()
    try:
        assert update_fault(update, model) is None
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2_000_000  # a copy of the values would be twice that


@pytest.mark.parametrize(
    "odd",
    [
        lambda: reply({"num-examples": 1, "loss": [0.5, 0.5]}),
        lambda: reply({"num-examples": 1}),
        lambda: reply(names=("other", "metrics")),
        lambda: reply(names=("arrays", "other")),
    ],
)
def test_a_reply_of_another_form_is_left_out(odd: Callable[[], Message]) -> None:
    others = [reply({"num-examples": 2, "loss": 1}), reply()]
    usable, said = sift([odd(), *others], metrics_fault)
    assert usable == others
    assert said == ["the names or types of the metrics or records differ from the other devices'"]


def test_lists_of_other_lengths_are_not_averaged_together() -> None:
    two = [reply({"num-examples": 1, "loss": [0.5, 0.5]}) for _ in range(2)]
    usable, _ = sift([reply({"num-examples": 1, "loss": [0.5]}), *two], metrics_fault)
    assert usable == two


def test_what_devices_said_is_short_and_printable() -> None:
    said = lines_of(["ill", "\x1b]0;owned\x07\n\u202e", "\x1b" * 1_000_000, "A" * 1_000_000, "B" * LONGEST_FAILURE])
    assert said[:2] == ("ill", "\\x1b]0;owned\\x07\\n\\u202e")
    assert all(line.isprintable() for line in said)
    assert [len(line) for line in said[2:]] == [LONGEST_FAILURE] * 3
    assert (said[3], said[4]) == ("A" * (LONGEST_FAILURE - 3) + "...", "B" * LONGEST_FAILURE)


def test_what_devices_said_is_kept_once_and_not_without_end() -> None:
    said = lines_of(f"device {number // 2}" for number in range(1000))
    assert said == tuple(f"device {number}" for number in range(MOST_FAILURES))
