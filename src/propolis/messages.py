"""How the secure protocol rides on Flower's messages: what server and devices must agree on besides the protocol.

Every exchange is a Flower message of the strategy's own type with a ConfigRecord of one entry: the exchange's name, and
the protocol's bytes. What else the message holds (model, configuration) is bound to the masks by its digest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.secagg.states import Exchange

Arrays = dict[str, NDArray[Any]]

RECORD = "propolis"
_BROADCAST = "model"

# In an app's configuration: whether the zeros of the model's matrices are pruned and stay zero.
PRUNED_KEY = "pruned"

# The `stype` of an array that is empty here because its values come with the protocol's record.
_ELSEWHERE = "propolis.broadcast"
# Values that a device makes room for on a server's word.
MOST_VALUES = 2**28

# Error replies carry a `Refusal` above Flower's own codes.
_FIRST_CODE = 1000

_EXCHANGES = {exchange.label: exchange for exchange in Exchange}


def protocol_record(exchange: Exchange, body: bytes, broadcast: bytes = b"") -> ConfigRecord:
    """The record of one exchange: a request's, or a reply's; with the model's way to the device where it has one."""
    record = ConfigRecord({exchange.label: body})
    if broadcast:
        record[_BROADCAST] = broadcast
    return record


def open_record(content: RecordDict) -> tuple[Exchange, bytes]:
    """The exchange and the bytes in a message.

    Raises:
        PeerError: the message is not part of the protocol, or malformed.
    """
    record = content.config_records.get(RECORD)
    if record is None:
        raise PeerError(Refusal.UNPROTECTED, "the message is not part of a secure round")
    entries = [(name, value) for name, value in record.items() if name != _BROADCAST]
    if len(entries) == 1:
        ((name, body),) = entries
        if name in _EXCHANGES and isinstance(body, bytes):
            return _EXCHANGES[name], body
    raise PeerError(Refusal.MALFORMED, f"the message's record {RECORD} is not one exchange of the protocol")


def broadcast_in(content: RecordDict) -> bytes:
    """The model's way to the device, empty where the model is in the message as it is; raises PeerError."""
    data = content.config_records[RECORD].get(_BROADCAST, b"")
    if not isinstance(data, bytes):
        raise PeerError(Refusal.MALFORMED, f"the message's record {RECORD} holds no broadcast")
    return data


def with_model(content: RecordDict, model: Mapping[str, NDArray[Any]]) -> RecordDict:
    """The content with other arrays in its only ArrayRecord; all else are the same objects in the same order."""
    return _with_arrays(content, {name: Array(np.asarray(array)) for name, array in model.items()})


def with_model_elsewhere(content: RecordDict, names: Collection[str]) -> RecordDict:
    """The content with the named arrays emptied: their names, shapes and order stay, for `fill_model`."""
    (record,) = content.array_records.values()
    arrays = {
        name: Array(array.dtype, array.shape, _ELSEWHERE, b"") if name in names else array
        for name, array in record.items()
    }
    return _with_arrays(content, arrays)


def sizes_elsewhere(content: RecordDict) -> tuple[int, ...]:
    """How many values each emptied array of a content lacks, by rising name.

    Raises:
        PeerError: there is not one ArrayRecord, or they are unbelievably many.
    """
    if len(content.array_records) != 1:
        raise PeerError(Refusal.MODEL, f"expected one ArrayRecord, got {len(content.array_records)}")
    (record,) = content.array_records.values()
    shapes = [record[name].shape for name in sorted(record) if record[name].stype == _ELSEWHERE]
    sizes = tuple(prod(shape) for shape in shapes)
    if any(length < 0 for shape in shapes for length in shape) or sum(sizes) > MOST_VALUES:
        raise PeerError(Refusal.MALFORMED, f"a model of {sum(sizes)} values")
    return sizes


def fill_model(content: RecordDict, values: NDArray[np.float32]) -> RecordDict:
    """The inverse of `with_model_elsewhere`: `values` are those of the emptied arrays, by rising name."""
    (record,) = content.array_records.values()
    filled, start = {}, 0
    for name in sorted(record):
        if record[name].stype == _ELSEWHERE:
            end = start + prod(record[name].shape)
            filled[name], start = Array(values[start:end].reshape(record[name].shape)), end
    return _with_arrays(content, {name: filled.get(name, array) for name, array in record.items()})


def emptied_shapes(content: RecordDict) -> dict[str, tuple[int, ...]]:
    """The shapes of the emptied arrays of a content by name; raises PeerError where there is not one ArrayRecord."""
    if len(content.array_records) != 1:
        raise PeerError(Refusal.MODEL, f"expected one ArrayRecord, got {len(content.array_records)}")
    (record,) = content.array_records.values()
    return {name: tuple(array.shape) for name, array in record.items() if array.stype == _ELSEWHERE}


def fill_arrays(content: RecordDict, arrays: Mapping[str, NDArray[Any]]) -> RecordDict:
    """The inverse of `with_model_elsewhere`: `arrays` are the emptied ones by name."""
    (record,) = content.array_records.values()
    filled = {name: Array(np.asarray(arrays[name])) if name in arrays else array for name, array in record.items()}
    return _with_arrays(content, filled)


def _with_arrays(content: RecordDict, arrays: dict[str, Array]) -> RecordDict:
    """The content with these arrays in place of its only ArrayRecord's."""
    record = ArrayRecord(arrays)
    return RecordDict({name: record if isinstance(each, ArrayRecord) else each for name, each in content.items()})


def without_record(content: RecordDict) -> RecordDict:
    """What the application put into a message; the records are the same objects."""
    return RecordDict({name: record for name, record in content.items() if name != RECORD})


def refusal_code(refusal: Refusal) -> int:
    """The code of an error reply."""
    return _FIRST_CODE + refusal


def refusal_of(code: int) -> Refusal | None:
    """The refusal in an error reply's code; None for Flower's own codes."""
    try:
        return Refusal(code - _FIRST_CODE)
    except ValueError:
        return None


def model_in(content: RecordDict) -> Arrays:
    """The arrays of a message's or reply's only ArrayRecord, as copies.

    Raises:
        PeerError: there is none or more than one, or an array is not one of real numbers.
    """
    records = list(content.array_records.values())
    if len(records) != 1:
        raise PeerError(Refusal.MODEL, f"expected one ArrayRecord, got {len(records)}")
    return _real_arrays(records[0])


def _real_arrays(record: Mapping[str, Array]) -> Arrays:
    try:
        arrays = {name: array.numpy() for name, array in record.items()}
    except Exception:  # whatever numpy makes of a peer's bytes
        raise PeerError(Refusal.MODEL, "an array is malformed") from None
    if any(array.dtype.kind not in "fiub" for array in arrays.values()):
        raise PeerError(Refusal.MODEL, "an array does not hold real numbers")
    return arrays


def shared_input_of(content: RecordDict, model: bytes, group_id: str) -> bytes:
    """Digest of everything that the application put into a message: model, configuration, metrics.

    The order counts too: an app may take arrays by their position, or merge records one over the other.

    Args:
        content: the message's, without the protocol's record.
        model: `model_digest` of the arrays in it.
        group_id: the message's.
    """
    parts: list[bytes] = [model, group_id.encode()]
    for name, record in content.items():
        values: Iterable[tuple[str, object]] = record.items()
        if isinstance(record, ArrayRecord):
            values = [(key, "") for key in record]
        items = [part for item in values for part in _value_parts(*item)]
        parts.append(labels.joined(name.encode(), type(record).__name__.encode(), *items))
    return labels.digest(labels.INPUT, *parts)


def encrypted_input_of(content: RecordDict, broadcast: bytes, group_id: str) -> tuple[bytes, bytes]:
    """Digest of a model that comes encrypted, and of everything that the application put into a message with it.

    Args:
        content: the message's, without the protocol's record.
        broadcast: the encrypted model; empty where the arrays are in the content as they are.
        group_id: the message's.

    Raises:
        PeerError: there is not one ArrayRecord, or an array is not one of real numbers.
    """
    emptied = emptied_shapes(content)
    (record,) = content.array_records.values()
    rest = _real_arrays({name: array for name, array in record.items() if name not in emptied})
    model = labels.digest(labels.MODEL, broadcast, model_digest(rest))
    return model, shared_input_of(content, model, group_id)


def shapes_of(arrays: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays by name."""
    return {name: array.shape for name, array in arrays.items()}


def model_digest(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Digest of a model: names, types, shapes and values, whatever their encoding and order were."""
    parts: list[bytes | memoryview] = []
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        # A view of the array's memory: a large model is hashed where it lies.
        parts += [
            name.encode(),
            array.dtype.str.encode(),
            repr(arrays[name].shape).encode(),
            array.reshape(-1).view(np.uint8).data,
        ]
    return labels.digest(labels.MODEL, *parts)


def _value_parts(name: str, value: object) -> Iterable[bytes]:
    kinds = [type(each).__name__ for each in value] if isinstance(value, list) else []
    return name.encode(), repr((type(value).__name__, kinds)).encode(), repr(value).encode()
