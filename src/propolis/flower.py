"""Everything that touches Flower's internals: an upgrade of Flower is this file's work.

Pinned to flwr 1.41; the rest of the package imports `flwr.app`, `flwr.clientapp` and `flwr.serverapp` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from flwr.app import Error, Message, RecordDict
from flwr.app.exception import AppExitException as AppExitException
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = SUPERLINK_NODE_ID

# Replies that Flower's server makes up for a device that said nothing: no byte of them crossed a wire.
_MADE_UP_CODES = frozenset(
    {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}
)


def set_identity(run_id: int) -> None:
    """Make this process the server of a run: Flower's Message constructor asks for it."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID


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


def is_made_up(message: Message) -> bool:
    """Whether the server wrote this reply itself, because none came."""
    return message.has_error() and message.error.code in _MADE_UP_CODES


def wire_size(messages: Iterable[Message]) -> int:
    """Bytes of the serialised messages that cross the wire; replies that the server made up itself cost nothing."""
    crossing = (message for message in messages if not is_made_up(message))
    return sum(len(head) + len(content) for head, content in serialized(crossing))


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
