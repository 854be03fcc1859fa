"""What a strategy asks of a secure round, and what it is told besides the mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self, cast

from flwr.app import ConfigRecord, Message, RecordDict

from propolis.messages import PRUNED_KEY, RECORD, Arrays, model_digest, model_in, shapes_of, shared_input_of, with_model
from propolis.secure.errors import PeerError, UsageError
from propolis.secure.secagg.plan import Kind

_KINDS = {"train": Kind.TRAIN, "evaluate": Kind.EVALUATE}


@dataclass(frozen=True, slots=True)
class Batch:
    """The messages of one round, and what they have in common.

    Attributes:
        messages: one for each node.
        timeout: seconds that each exchange may take.
        kind: what the round is for.
        asked: digest of the content as the strategy made it.
        shared_input: digest of the content as the devices get it.
        model_key: name of the record with the model.
        model: its arrays, as the devices get them.
        model_digest: of them.
        precise: the same arrays as the strategy has them.
    """

    messages: list[Message]
    timeout: float
    kind: Kind
    asked: bytes
    shared_input: bytes
    model_key: str
    model: Arrays
    model_digest: bytes
    precise: Arrays

    @classmethod
    def of(cls, messages: list[Message], timeout: float) -> Self:
        """The messages as one batch; raises UsageError when they are none."""
        types = {message.metadata.message_type for message in messages}
        if len(types) > 1 or not types <= _KINDS.keys():
            raise UsageError(f"a SecureGrid protects train or evaluate messages, got {', '.join(sorted(types))}")
        if len({message.metadata.dst_node_id for message in messages}) < len(messages):
            raise UsageError("a SecureGrid sends each device one message in a round")
        if len({message.metadata.group_id for message in messages}) > 1:
            raise UsageError("a SecureGrid sends messages of one group")
        _require_one_content(messages)
        content = messages[0].content
        try:
            model = model_in(content)
        except PeerError as error:
            raise UsageError(f"a SecureGrid needs the model in each message: {error}") from None
        (key,) = content.array_records
        (kind,) = (_KINDS[each] for each in types)
        digest = model_digest(model)
        shared_input = shared_input_of(content, digest, messages[0].metadata.group_id)
        return cls(messages, timeout, kind, shared_input, shared_input, key, model, digest, model)

    def with_model(self, model: Arrays) -> Self:
        """The same messages over another model of the same names, which is what the devices will rebuild."""
        content = with_model(self.content, model)
        digest = model_digest(model)
        shared_input = shared_input_of(content, digest, self.messages[0].metadata.group_id)
        return replace(self, model=model, model_digest=digest, shared_input=shared_input)

    @property
    def message_type(self) -> str:
        """Flower's name for the kind."""
        return self.kind.name.lower()

    @property
    def content(self) -> RecordDict:
        """What all the messages hold."""
        return self.messages[0].content

    @property
    def node_ids(self) -> list[int]:
        """Who the messages are for."""
        return [message.metadata.dst_node_id for message in self.messages]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the model's arrays."""
        return shapes_of(self.model)

    @property
    def is_pruned(self) -> bool:
        """Whether the zeros of the model's matrices are to stay zero."""
        return any(record.get(PRUNED_KEY) is True for record in self.content.config_records.values())

    @property
    def server_round(self) -> int | None:
        """The round as the application counts, where it says so."""
        for record in self.content.config_records.values():
            if isinstance(number := record.get("server-round"), int) and 0 <= number < 2**31:
                return number
        return None


def _require_one_content(messages: list[Message]) -> None:
    """Raise UsageError when the messages' contents differ, so that a device could be singled out."""
    first = messages[0].content
    if RECORD in first:
        raise UsageError(f"the record name {RECORD} is taken by the protocol")
    for message in messages[1:]:
        same = all(message.content.get(name) is record for name, record in first.items())
        if not (same and len(message.content) == len(first)) and message.content != first:
            raise UsageError("the strategy sends devices different models or configurations; a secure sum needs one")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a secure round's one reply is over; travels in it as a ConfigRecord.

    Attributes:
        survivors: devices in the mean.
        asked: devices that the round was for.
        failures: what the others said or did wrong.
    """

    survivors: int
    asked: int
    failures: tuple[str, ...]

    def record(self) -> ConfigRecord:
        """As part of a reply."""
        return ConfigRecord({"survivors": self.survivors, "asked": self.asked, "failures": list(self.failures)})

    @classmethod
    def of(cls, content: RecordDict) -> Self:
        """The outcome in a reply of a `SecureGrid`."""
        record = content.config_records[RECORD]
        survivors, asked, failures = record["survivors"], record["asked"], record["failures"]
        return cls(cast(int, survivors), cast(int, asked), tuple(cast(list[str], failures)))
