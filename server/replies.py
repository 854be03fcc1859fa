"""What devices answer, sifted: which replies can be aggregated together, and what is wrong with the others.

Whoever takes part in an unprotected run may answer anything. A strategy gets numbers that it can average, and a
person gets short lines that a terminal can show.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, Message
from numpy.lib import format as npy
from numpy.typing import NDArray

from propolis.flower import is_made_up
from propolis.logs import one_line
from propolis.server.model import WEIGHT_KEY, GlobalModel

# What is kept of the failures of a round: so many different ones, each of so many characters.
MOST_FAILURES, LONGEST_FAILURE = 20, 200


def sift(replies: list[Message], fault_of: Callable[[Message], str | None]) -> tuple[list[Message], list[str]]:
    """The replies that can be aggregated together, and what the other devices said (lost ones say nothing).

    Args:
        replies: as they came.
        fault_of: why a reply is of no use, or None: `update_fault` or `metrics_fault`.
    """
    faults = [fault_of(reply) for reply in replies]
    usable = [reply for reply, fault in zip(replies, faults, strict=True) if fault is None]
    said = [fault for reply, fault in zip(replies, faults, strict=True) if fault and not is_made_up(reply)]
    forms = [_form(reply) for reply in usable]
    if len(set(forms)) > 1:  # Flower averages only replies of one form
        common = Counter(forms).most_common(1)[0][0]
        others = len(forms) - forms.count(common)
        said += ["the names or types of the metrics or records differ from the other devices'"] * others
        usable = [reply for reply, form in zip(usable, forms, strict=True) if form == common]
    return usable, said


def lines_of(failures: Iterable[str]) -> tuple[str, ...]:
    """What devices said, each once, for a person: few, short and printable, whatever it was."""
    return tuple(dict.fromkeys(map(_short_line, failures)))[:MOST_FAILURES]


def update_fault(reply: Message, model: GlobalModel) -> str | None:
    """Why a train reply cannot be averaged into a model, or None."""
    if (fault := metrics_fault(reply)) is not None:
        return fault
    records = list(reply.content.array_records.values())
    if len(records) != 1:
        return f"expected one ArrayRecord, got {len(records)}"
    expected = {name: model.arrays[name].shape for name in model.trainable | model.buffers}
    if {name: tuple(array.shape) for name, array in records[0].items()} != expected:
        return "the update's names or shapes are not the model's"
    for name, array in records[0].items():
        if (fault := _array_fault(array, model.arrays[name].dtype)) is not None:
            return f"the update's {name} {fault}"
    return None


def metrics_fault(reply: Message) -> str | None:
    """Why a reply's metrics cannot be averaged, or None."""
    if reply.has_error():
        return reply.error.reason or f"error {reply.error.code}"
    metrics = list(reply.content.metric_records.values())
    if len(metrics) != 1:
        return f"expected one MetricRecord, got {len(metrics)}"
    weight = metrics[0].get(WEIGHT_KEY)
    if not isinstance(weight, (int, float)) or not (math.isfinite(weight) and weight > 0):
        return f"the weight {WEIGHT_KEY} must be a positive number, got {weight!r}"
    return None


def _array_fault(array: Array, dtype: np.dtype[Any]) -> str | None:
    """Why an array is not one of finite numbers that can stand for values of the model's type, or None."""
    try:
        values = _values(array)
    except Exception:  # whatever numpy makes of a device's bytes
        return "is malformed"
    if not np.can_cast(values.dtype, dtype, "same_kind"):
        return f"has the type {values.dtype}, expected {dtype}"
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(values.astype(dtype, copy=False)).all()
    return None if is_finite else f"has values that are not finite as {dtype}"


def _values(array: Array) -> NDArray[Any]:
    """An array's values where they lie: they are not copied, and no more memory is taken than came.

    Raises:
        ValueError: the bytes are not what `numpy.save` writes of an array of this type and shape.
    """
    header = BytesIO(array.data)  # shares the bytes
    if array.stype != "numpy.ndarray" or npy.read_magic(header) != (1, 0):
        raise ValueError("not of numpy's format 1.0")
    shape, _, dtype = npy.read_array_header_1_0(header)
    if (str(dtype), shape) != (array.dtype, tuple(array.shape)):
        raise ValueError("the header is of another array than is declared")
    values: NDArray[Any] = np.ndarray(shape, dtype, array.data, header.tell())
    if len(array.data) != header.tell() + values.nbytes:
        raise ValueError("the values have another length than is declared")
    return values


def _form(reply: Message) -> Hashable:
    """What replies must have in common to be averaged: names of records and metrics, scalar or list of a length."""
    names = frozenset(reply.content.array_records), frozenset(reply.content.metric_records)
    (metrics,) = reply.content.metric_records.values()
    return names, frozenset((name, len(value) if isinstance(value, list) else None) for name, value in metrics.items())


def _short_line(text: str) -> str:
    line = one_line(text[: LONGEST_FAILURE + 1])
    return line if len(line) <= LONGEST_FAILURE else f"{line[: LONGEST_FAILURE - 3]}..."
