"""What the protocol costs on the wire, in bytes of whole Flower messages; the model and its update are not counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from secure_app import Hive, answer, arrays_of, body_of, exchange_of

from propolis.flower import message_to_bytes, with_content
from propolis.messages import RECORD
from propolis.secure.secagg.messages import PrepareRequest, UploadReply, from_bytes

DEVICES, NEIGHBOURS = 20, 19
# Of each device and round, per neighbour up and in all down.
MOST_UP, MOST_DOWN = 175, 9500

MODEL = {f"{layer}.{part}": np.zeros(256, np.float32) for layer in (0, 2) for part in ("weight", "bias")}


def train(message: Message, index: int) -> RecordDict:
    return answer(arrays_of(message), num_examples=index + 1, train_loss=0.5)


def besides_the_update(reply: Message) -> int:
    size = len(message_to_bytes(reply))
    if exchange_of(reply) == "upload":
        size -= len(from_bytes(UploadReply, body_of(reply)).vector)
    return size


def besides_the_model(request: Message) -> int:
    protocol = RecordDict({RECORD: request.content[RECORD]})
    return len(message_to_bytes(with_content(request, protocol)))


def largest(messages: Iterable[Message], size_of: Callable[[Message], int]) -> int:
    """Bytes of one device in a round: the largest message of each exchange."""
    sizes: dict[str, int] = {}
    for message in messages:
        exchange = exchange_of(message)
        sizes[exchange] = max(sizes.get(exchange, 0), size_of(message))
    return sum(sizes.values())


@pytest.fixture(scope="module")
def rounds() -> list[tuple[list[Message], list[Message]]]:
    """Requests and replies of three rounds of twenty devices."""
    hive, seen = Hive(DEVICES, train), []
    for _ in range(3):
        hive.wire.requests, hive.wire.replies = [], []
        hive.round(model=MODEL)
        seen.append((hive.wire.requests, hive.wire.replies))
    return seen


@pytest.mark.parametrize("number", [2, 3])
def test_a_round_stays_within_its_bytes(rounds: list[tuple[list[Message], list[Message]]], number: int) -> None:
    requests, replies = rounds[number - 1]
    assert {exchange_of(message) for message in requests} == {"prepare", "upload", "unmask"}
    assert len(requests) == len(replies) == 3 * DEVICES
    assert largest(replies, besides_the_update) <= MOST_UP * NEIGHBOURS
    assert largest(requests, besides_the_model) <= MOST_DOWN


def test_descriptors_are_sent_in_the_first_round_alone(rounds: list[tuple[list[Message], list[Message]]]) -> None:
    sent = []
    for requests, _ in rounds:
        prepares = [message for message in requests if exchange_of(message) == "prepare"]
        sent.append({len(from_bytes(PrepareRequest, body_of(message)).descriptors) for message in prepares})
    assert sent == [{NEIGHBOURS}, {0}, {0}]
