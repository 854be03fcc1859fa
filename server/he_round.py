"""One attempt at one encrypted round without masks: the mirror of `propolis.client.encrypted`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from propolis.messages import encrypted_input_of
from propolis.secure.errors import RefusedError
from propolis.secure.he.messages import EncryptedPlan
from propolis.secure.he.total import EncryptedTotal, Summed
from propolis.secure.secagg.states import Exchange
from propolis.server.channel import Channel, Content


@dataclass(frozen=True, slots=True)
class Given:
    """What devices are given in a round.

    Attributes:
        content: what the application tells them, with the encrypted model.
        model: digest of the model, however it comes.
        shared_input: digest of all of it.
    """

    content: Content
    model: bytes
    shared_input: bytes

    @classmethod
    def of(cls, content: Content, group_id: str) -> Self:
        """With its digests, of messages in this group."""
        return cls(content, *encrypted_input_of(content.records, content.broadcast, group_id))


@dataclass(frozen=True, slots=True)
class Asking:
    """What a round is about.

    Attributes:
        channel: to the devices.
        plan: of the attempt.
        total: what the devices' uploads are added to.
        nodes: their node ids, by index.
        given: what the application tells them.
        timeout: seconds that they may train.
    """

    channel: Channel
    plan: EncryptedPlan
    total: EncryptedTotal
    nodes: Mapping[int, int]
    given: Given
    timeout: float


@dataclass(frozen=True, slots=True)
class Collected:
    """What a round came to.

    Attributes:
        plan: that it was made under.
        alive: indices of the devices in the sum, rising.
        summed: the sum; of nobody's, it has no ciphertexts.
    """

    plan: EncryptedPlan
    alive: tuple[int, ...]
    summed: Summed


def collect(asked: Asking) -> Collected:
    """Have the devices train, and add up what they send; a device whose reply is refused is a drop-out."""
    channel, indices = asked.channel, {node_id: index for index, node_id in asked.nodes.items()}
    bodies = dict.fromkeys(indices, asked.plan.encoded)
    alive = []
    for node_id, body in channel.ask(Exchange.ENCRYPT, bodies, asked.timeout, lambda _: asked.given.content):
        try:
            asked.total.add(body)
            alive.append(indices[node_id])
        except RefusedError as error:
            channel.failures[node_id] = f"{Exchange.ENCRYPT.label}: {error}"
    return Collected(asked.plan, tuple(sorted(alive)), asked.total.summed())
