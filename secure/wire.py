"""Frozen dataclasses to protobuf and back, with every bound checked: bytes from a peer raise only our errors.

A dataclass mirrors the protobuf message of its name, field by field; its fields say their bounds with `sized` and
`between`. Nothing is taken on trust from protobuf but the framing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from google.protobuf.message import DecodeError, Message

from propolis.secure.errors import PeerError, Refusal

T = TypeVar("T")

FORMAT_VERSION = 1
# Of what the roles keep between exchanges. 1 was before descriptors were remembered and secrets had 16 bytes.
STATE_VERSION = 2
LARGEST_MESSAGE = 64 * 2**20
_LARGEST_INT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Bound:
    """What a field may hold: a size in bytes or characters, or a value, and how many of them when repeated."""

    least: float = 0
    most: float = _LARGEST_INT
    count: int = 0


def sized(least: int, most: int | None = None, *, count: int = 0, default: Any = None) -> Any:
    """A field of `least` to `most` bytes or characters (exactly `least` without `most`), `count` times at most."""
    metadata = {"bound": Bound(least, least if most is None else most, count)}
    return field(metadata=metadata) if default is None else field(metadata=metadata, default=default)


def between(least: float, most: float, *, count: int = 0, default: Any = None, implied: bool = False) -> Any:
    """A number from `least` to `most`, both included; NaN is never between.

    Where the default is `implied` it does not travel: `proto` has an ``optional`` field, which older messages lack.
    """
    metadata = {"bound": Bound(least, most, count), "implied": implied}
    return field(metadata=metadata) if default is None else field(metadata=metadata, default=default)


def many(count: int) -> Any:
    """At most `count` messages."""
    return field(metadata={"bound": Bound(count=count)})


def version_field() -> Any:
    """The format's version, which must be ours."""
    return between(FORMAT_VERSION, FORMAT_VERSION, default=FORMAT_VERSION)


def encode(message: object, proto: type[Message]) -> bytes:
    """The bytes of a dataclass as the protobuf message `proto`."""
    filled = proto()
    fill(message, filled)
    return serialized(filled)


def serialized(proto: Message) -> bytes:
    """The bytes of a protobuf message, the same ones every time."""
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def decode(cls: type[T], data: bytes, proto: type[Message], limit: int = LARGEST_MESSAGE) -> T:
    """A dataclass from a peer's bytes.

    Args:
        cls: what is expected.
        data: what came.
        proto: the protobuf message that `cls` mirrors.
        limit: bytes; longer data is refused before it is parsed.

    Raises:
        PeerError: too long, no such message, or a field out of its bounds.
    """
    return read(cls, parse(proto, data, limit))


def decode_exactly(cls: type[T], data: bytes, proto: type[Message]) -> T:
    """`decode` for bytes that are hashed or signed: only those that `encode` writes, so that none can be added."""
    message = decode(cls, data, proto)
    if encode(message, proto) != data:
        raise PeerError(Refusal.MALFORMED, f"{proto.DESCRIPTOR.name}: the bytes are not in their canonical form")
    return message


def parse(proto: type[Message], data: bytes, limit: int = LARGEST_MESSAGE) -> Message:
    """A protobuf message from a peer's bytes; raises as `decode` does."""
    if len(data) > limit:
        raise PeerError(Refusal.MALFORMED, f"{proto.DESCRIPTOR.name}: {len(data)} bytes are more than {limit}")
    try:
        return proto.FromString(data)
    except DecodeError:
        raise PeerError(Refusal.MALFORMED, f"{proto.DESCRIPTOR.name}: the bytes are no such message") from None


def fill(message: Any, proto: Message) -> None:
    """Copy a dataclass into a protobuf message."""
    for each in _layout_of(cast(Hashable, type(message))):
        value = getattr(message, each.name)
        if value is None or (each.optional and value == each.default):
            continue
        if each.repeated:
            _fill_repeated(getattr(proto, each.name), value, each)
        elif each.is_message:
            getattr(proto, each.name).SetInParent()
            fill(value, getattr(proto, each.name))
        else:
            setattr(proto, each.name, value)


def read(cls: type[T], proto: Message) -> T:
    """A dataclass from a parsed protobuf message; raises as `decode` does."""
    values = []
    for each in _layout_of(cast(Hashable, cls)):
        raw = getattr(proto, each.name)
        if each.repeated:
            if len(raw) > each.bound.count:
                raise PeerError(
                    Refusal.MALFORMED, f"{cls.__name__}.{each.name}: {len(raw)} entries, at most {each.bound.count}"
                )
            values.append(tuple(_read_one(cls, each, one) for one in raw))
        elif each.optional and not proto.HasField(each.name):
            values.append(each.default)
        elif each.is_message and not proto.HasField(each.name):
            raise PeerError(Refusal.MALFORMED, f"{cls.__name__}.{each.name} is missing")
        else:
            values.append(_read_one(cls, each, raw))
    return cls(*values)


def _fill_repeated(proto: Any, values: Iterable[Any], layout: _Field) -> None:
    if not layout.is_message:
        proto.extend(values)
        return
    for value in values:
        fill(value, proto.add())


def _read_one(cls: type, layout: _Field, raw: Any) -> Any:
    if layout.is_message:
        return read(layout.kind, raw)
    size = len(raw) if isinstance(raw, (bytes, str)) else raw
    if not layout.bound.least <= size <= layout.bound.most:
        least, most = layout.bound.least, layout.bound.most
        raise PeerError(Refusal.MALFORMED, f"{cls.__name__}.{layout.name}: expected {least} to {most}, got {size}")
    return raw


@dataclass(frozen=True, slots=True)
class _Field:
    """What there is to know of a field.

    Attributes:
        kind: of an entry where the field is repeated.
        optional: it may be missing, and then is the default: None of a message, else what is implied.
    """

    name: str
    kind: type
    bound: Bound
    is_message: bool
    repeated: bool
    optional: bool
    default: Any


@lru_cache(maxsize=128)
def _layout_of(cls: Any) -> tuple[_Field, ...]:
    hints = get_type_hints(cls)
    layout = []
    for each in fields(cls):
        kind, repeated = hints[each.name], get_origin(hints[each.name]) is tuple
        may_lack = type(None) in get_args(kind)
        entry = get_args(kind)[0] if repeated or may_lack else kind
        bound, optional = each.metadata.get("bound", Bound()), may_lack or each.metadata.get("implied", False)
        is_message = hasattr(entry, "__dataclass_fields__")
        default = None if may_lack else each.default
        layout.append(_Field(each.name, entry, bound, is_message, repeated, optional, default))
    return tuple(layout)
