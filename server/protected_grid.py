"""What a grid whose server does not see single updates has in common with another one, whatever protects them."""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from flwr.app import Message
from numpy.typing import NDArray

from propolis.secure.errors import TooFewPeersError, UsageError
from propolis.secure.identity import TrustedRoster
from propolis.secure.secagg.runs import new_run_id
from propolis.server.batch import Batch
from propolis.server.exchange import GridWrapper

# Exchanges without training take no longer than this, whatever a round's deadline is.
HANDSHAKE_S = 120.0
_log = logging.getLogger("flwr")


class Attempts:
    """The names of a run's attempts: (run_id, round, attempt) rises and never comes twice.

    Attributes:
        run_id: see `propolis.secure.secagg.runs`.
        number: the round, as the application counts.
        attempt: within the round.
    """

    def __init__(self) -> None:
        self.run_id = new_run_id(time.time(), os.urandom)
        self.number = self.attempt = 0

    def next(self, server_round: int | None) -> None:
        """Name the next attempt, at this round of the application's, or at one more than the last."""
        number = self.number + 1 if server_round is None else max(server_round, self.number)
        self.attempt = self.attempt + 1 if number == self.number else 0
        self.number = number


class ProtectedGrid(GridWrapper, ABC):
    """Turns each batch of train or evaluate messages into one round with ONE reply for all of them."""

    _attempts: int

    def push_messages(self, messages: Iterable[Message]) -> NoReturn:
        """Refused: a message on its own is not protected."""
        raise UsageError(
            f"a {type(self).__name__} sends whole rounds: use send_and_receive, or the grid that it is around"
        )

    def pull_messages(self, message_ids: Iterable[str]) -> NoReturn:
        """Refused, like `push_messages`."""
        self.push_messages([])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """One protected round.

        Args:
            messages: all of type train, or all of type evaluate, with one content for all; each for another node.
            timeout: seconds that each exchange of the round may take; None waits for every device.

        Returns:
            One reply for all; `Outcome.of` its content says how many devices it is over.

        Raises:
            UsageError: the messages are none of these.
            TooFewPeersError: too few devices survived, in every attempt.
        """
        outgoing = list(messages)
        if not outgoing:
            return []
        batch = self._prepared(Batch.of(outgoing, float("inf") if timeout is None else timeout))
        for attempt in range(1, self._attempts + 1):
            try:
                return [self._round(batch)]
            except TooFewPeersError as error:
                if attempt == self._attempts:
                    raise
                _log.warning("protected round: %s; trying again", error)
        raise AssertionError("unreachable")

    @abstractmethod
    def _prepared(self, batch: Batch) -> Batch:
        """The batch over the model as its devices will have it."""

    @abstractmethod
    def _round(self, batch: Batch) -> Message:
        """One attempt; raises TooFewPeersError where another one may do better."""

    @abstractmethod
    def renew(self, roster: TrustedRoster) -> None:
        """Go by a newer roster from the next round on; an equal one changes nothing."""

    @abstractmethod
    def resume_from(self, metrics: Mapping[str, float], state: Mapping[str, NDArray[Any]]) -> None:
        """Go on after a round with these metrics, after which `state` was this."""

    @abstractmethod
    def state(self) -> dict[str, NDArray[Any]]:
        """What a run needs, besides the last round's metrics, to go on as if it had never stopped."""

    def adopted(self, model: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """A new model as its devices will have it: a run that begins with it has nothing to make up for."""
        return model
