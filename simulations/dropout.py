"""Devices that are lost in the middle of a round, reproducibly."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from propolis.flower import set_message_id, unavailable_reply
from propolis.messages import RECORD, open_record
from propolis.secure.secagg.states import Exchange
from propolis.server.checkpoint import RunState
from propolis.server.exchange import GridWrapper
from propolis.settings import Settings


def steps_of(settings: Settings) -> list[str]:
    """The exchanges of one of a run's rounds, in their order."""
    kinds = ["train", "evaluate"] if settings.evaluate_fraction else ["train"]
    if not settings.is_protected:
        return kinds
    if not settings.is_masked:
        return [f"{kind} {each.label}" for kind in kinds for each in (Exchange.HELLO, Exchange.ENCRYPT)]
    secagg = [each for each in Exchange if each is not Exchange.ENCRYPT]
    exchanges = [each for each in secagg if settings.malicious or each is not Exchange.CONFIRM]
    return [f"{kind} {each.label}" for kind in kinds for each in exchanges]


def _step(message: Message) -> str:
    kind = message.metadata.message_type
    return f"{kind} {open_record(message.content)[0].label}" if RECORD in message.content else kind


class DropoutGrid(GridWrapper):
    """A grid that loses devices: from some exchange of the round on, a lost device answers nothing.

    What is sent to a lost device crosses the wire (and is counted by a meter around this grid) but reaches no
    device; in place of its reply comes Flower's own "node unavailable", at once, so nobody waits for it.

    Args:
        grid: where the others are.
        probability: chance that a device is lost in a round, in [0, 1).
        seed: decides which, together with the round, the attempt and the device.
        steps: the exchanges of a round in their order, see `steps_of`; the one at which a device is lost is drawn
            uniformly.
    """

    def __init__(self, grid: Grid, probability: float, seed: int, steps: Sequence[str] = ("train",)) -> None:
        super().__init__(grid)
        self._probability, self._seed, self._steps = probability, seed, steps
        self._round = "0/0"
        self._lost: dict[str, Message] = {}

    def round_started(self, number: int, attempt: int) -> None:
        """Draw anew who is lost: this grid observes the run."""
        self._round = f"{number}/{attempt}"
        self._lost.clear()

    def round_finished(self, state: RunState) -> None:
        """Nothing: losses are drawn when the next round starts."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send what is for devices that are still there; the others hear nothing."""
        outgoing = list(messages)
        lost = [self._is_lost(message) for message in outgoing]
        reachable = [message for message, gone in zip(outgoing, lost, strict=True) if not gone]
        sent = iter(super().push_messages(reachable) if reachable else [])
        return [self._lose(m) if gone else next(sent) for m, gone in zip(outgoing, lost, strict=True)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Replies of the devices that are there, and the server's own note for those that are not."""
        present = []
        for message_id in message_ids:
            if message_id in self._lost:
                yield unavailable_reply(self._lost.pop(message_id), "the device was lost in this round")
            else:
                present.append(message_id)
        yield from super().pull_messages(present)

    def _is_lost(self, message: Message) -> bool:
        seed = f"dropout/{self._seed}/{self._round}/{message.metadata.dst_node_id}"
        draw = random.Random(seed)  # noqa: S311 (a simulation)
        if draw.random() >= self._probability:
            return False
        return draw.randrange(len(self._steps)) <= self._steps.index(_step(message))

    def _lose(self, message: Message) -> str:
        message_id = f"lost-{self._round}-{_step(message)}-{message.metadata.dst_node_id}"
        set_message_id(message, message_id)
        self._lost[message_id] = message
        return message_id
