"""Everything that touches Flower's internals: an upgrade of Flower is this file's work.

Pinned to flwr 1.41; the rest of the package imports `flwr.app`, `flwr.clientapp` and `flwr.serverapp` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.error_pb2 import Error as ProtoError
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

SERVER_NODE_ID = SUPERLINK_NODE_ID

# Replies that Flower's server makes up for a device that said nothing: no byte of them crossed a wire.
_MADE_UP_CODES = frozenset(
    {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}
)


def set_identity(run_id: int, node_id: int = SERVER_NODE_ID) -> None:
    """Make this process a node of a run, the server by default: Flower's Message constructor asks for it."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id


def make_run(run_id: int) -> Run:
    """A run without an app bundle, as a Grid reports it."""
    return Run.create_empty(run_id)


def serialized(messages: Iterable[Message]) -> Iterator[tuple[bytes, bytes]]:
    """Each message as Flower puts it on a wire, in two parts: its metadata or error, and its content.

    Joined, the parts are the protobuf of the whole message (protobuf merges what is concatenated). A content that
    several messages share is serialised once: a strategy sends one model to many devices.
    """
    last: RecordDict | None = None
    content = b""
    for message in messages:
        bare = remove_content_from_message(message) if message.has_content() else message
        if message.has_content() and message.content is not last:
            last = message.content
            content = ProtoMessage(content=recorddict_to_proto(last)).SerializeToString()
        yield message_to_proto(bare).SerializeToString(), content if message.has_content() else b""


def message_to_bytes(message: Message) -> bytes:
    """The message as Flower puts it on a wire: one protobuf."""
    return b"".join(next(serialized([message])))


def message_from_bytes(data: bytes) -> Message:
    """The message that `message_to_bytes` or `serialized` wrote."""
    return message_from_proto(ProtoMessage.FromString(data))


@dataclass(frozen=True, slots=True, repr=False)
class Parted:
    """A message, or a content, as a short header and the bytes of its arrays as they are, which nobody copies.

    Attributes:
        header: a protobuf in which every array, and every byte string of a ConfigRecord, is empty.
        parts: what was taken out, in the order in which it is met.
    """

    header: bytes
    parts: tuple[bytes, ...]


def part_content(content: RecordDict) -> Parted:
    """Take the large parts out of a content."""
    bare, parts = _without_parts(content)
    return Parted(ProtoMessage(content=recorddict_to_proto(bare)).SerializeToString(), parts)


def part_metadata(message: Message) -> bytes:
    """A message's metadata and error; with the header of its parted content behind it, the header of the message."""
    bare = remove_content_from_message(message) if message.has_content() else message
    data: bytes = message_to_proto(bare).SerializeToString()
    return data


def join_message(header: bytes, parts: Iterable[bytes], request: Message | None = None) -> Message:
    """A message from its header and its parts.

    Args:
        header: of the message.
        parts: as many as were taken out, each taken when its place is met.
        request: what the message must be the reply to. Who sent it is then known, and nothing that the header says
            of that counts.

    Raises:
        ValueError: the header is no message's, or does not fit the parts.
    """
    try:
        proto = ProtoMessage.FromString(header)
        if request is None:
            message = message_from_proto(proto)
        elif proto.HasField("error"):
            message = Message(Error(proto.error.code, proto.error.reason), reply_to=request)
        else:
            message = Message(recorddict_from_proto(proto.content), reply_to=request)
        if message.has_content():
            _fill_parts(message.content, iter(parts))
    except StopIteration:
        raise ValueError("the header has more arrays than came") from None
    except (DecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the header is no message's: {type(error).__name__}") from None
    return message


def _without_parts(content: RecordDict) -> tuple[RecordDict, tuple[bytes, ...]]:
    bare, parts = RecordDict(), list[bytes]()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            parts += [array.data for array in record.values()]
            bare[name] = ArrayRecord({key: Array(a.dtype, a.shape, a.stype, b"") for key, a in record.items()})
        elif isinstance(record, ConfigRecord):
            parts += [value for value in record.values() if isinstance(value, bytes)]
            bare[name] = ConfigRecord({k: b"" if isinstance(v, bytes) else v for k, v in record.items()})
        else:
            bare[name] = record
    return bare, tuple(parts)


def _fill_parts(content: RecordDict, parts: Iterator[bytes]) -> None:
    for record in content.values():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                array.data = next(parts)
        elif isinstance(record, ConfigRecord):
            for key in [key for key, value in record.items() if isinstance(value, bytes)]:
                record[key] = next(parts)


def error_header(reason: str) -> bytes:
    """The header of a reply that says that the device could not even take the request."""
    header: bytes = ProtoMessage(
        error=ProtoError(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
    ).SerializeToString()
    return header


def is_made_up(message: Message) -> bool:
    """Whether the server wrote this reply itself, because none came."""
    return message.has_error() and message.error.code in _MADE_UP_CODES


def wire_size(messages: Iterable[Message]) -> int:
    """Bytes of the serialised messages that cross the wire; replies that the server made up itself cost nothing.

    The arrays are counted and not copied: a message may be as large as a quarter of the memory.
    """
    size, last, content = 0, None, 0
    for message in messages:
        if is_made_up(message):
            continue
        size += len(part_metadata(message))
        if message.has_content():
            if message.content is not last:
                last, content = message.content, _field_size(_content_size(message.content))
            size += content
    return size


def _content_size(content: RecordDict) -> int:
    """Bytes of a content as protobuf."""
    bare, parts = _without_parts(content)
    sizes = map(len, parts)
    total = 0
    for item in recorddict_to_proto(bare).items:
        total += _field_size(item.ByteSize() + _growth(item, sizes))
    return total


def _growth(item: ProtoRecordDict.Item, sizes: Iterator[int]) -> int:
    """By how much a record's item grows when its parts are put back."""
    kind = str(item.WhichOneof("value"))
    if kind == "metric_record":
        return 0
    record = getattr(item, kind)
    size = 0
    for entry in record.items:
        value = entry.value
        inner = value.ByteSize()
        if kind == "array_record":
            grown = inner + _data_size(next(sizes))
        elif value.WhichOneof("value") == "bytes":
            grown = _field_size(next(sizes))
        else:
            grown = inner
        size += _field_size(entry.ByteSize() - _field_size(inner) + _field_size(grown))
    return _field_size(size) - _field_size(record.ByteSize())


def _data_size(length: int) -> int:
    """Bytes of a field that is absent when it is empty."""
    return _field_size(length) if length else 0


def _field_size(length: int) -> int:
    """Bytes of a field of this many bytes: a tag of one byte, the length as a varint, the content."""
    return 1 + max(1, (length.bit_length() + 6) // 7) + length


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, which is the Grid's to choose."""
    message.metadata.__dict__["_message_id"] = message_id


def with_content(message: Message, content: RecordDict) -> Message:
    """The same message (ids, sender, receiver) with another content."""
    return make_message(metadata=message.metadata, content=content)


def unavailable_reply(message: Message, reason: str) -> Message:
    """What the server notes in place of a reply that will not come."""
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)


def failed_reply(message: Message, reason: str) -> Message:
    """What a device answers when its ClientApp raised."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def quiet_flower() -> None:
    """Leave the terminal to our own progress: Flower then logs errors only."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
