"""One round of federated training: sample, send, receive, aggregate, apply."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from propolis.secure.errors import PropolisError, TooFewPeersError
from propolis.server.batch import Outcome
from propolis.server.exchange import Snapshot
from propolis.server.model import ARRAYS_KEY, GlobalModel, average, split_replies
from propolis.server.protected_grid import ProtectedGrid
from propolis.server.replies import lines_of, metrics_fault, sift, update_fault


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training exchange brought.

    Attributes:
        model: the new global model.
        metrics: weighted means of the devices' training metrics.
        survivors: devices whose update is in the model.
        dropped: devices that were asked and are not.
        failures: what the dropped devices said, see `lines_of`; those that were lost said nothing.
    """

    model: GlobalModel
    metrics: dict[str, float]
    survivors: int
    dropped: int
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """One attempt at one round.

    Attributes:
        grid: any Flower Grid.
        strategy: any averaging strategy of Flower's Message API.
        number: the round, from 1.
        attempt: 0 for the first try; a retry samples anew.
        seed: the run's; sampling depends on (seed, number, attempt) alone.
        deadline: seconds that an exchange may take.
        min_clients: fewest survivors that may be aggregated.
        node_ids: the devices to sample from.
    """

    grid: Grid
    strategy: Strategy
    number: int
    attempt: int
    seed: int
    deadline: float
    min_clients: int
    node_ids: tuple[int, ...]

    def train(self, model: GlobalModel, config: ConfigRecord) -> Trained:
        """Have a sample of the devices train `model`, and aggregate.

        Raises:
            TooFewPeersError: fewer than `min_clients` usable updates came; the strategy has seen none of them.
        """
        with self._seeded_sampling("train"):
            messages = self.strategy.configure_train(
                self.number, model.record(model.trainable), config, Snapshot(self.grid, self.node_ids)
            )
        outgoing = _with_whole_model(messages, model)
        try:
            replies = self._exchange(outgoing)
        except TooFewPeersError as error:  # a secure sum over them does not exist
            raise TooFewPeersError(f"round {self.number}: {error}") from None
        usable, said = sift(replies, lambda reply: update_fault(reply, model))
        survivors = len(usable)
        if isinstance(self.grid, ProtectedGrid):
            survivors, said = _tally(usable, said)
        failures = lines_of(said)
        if survivors < self.min_clients:
            why = f"; one said: {failures[0]}" if failures else "; the others were lost or did not answer in time"
            raise TooFewPeersError(
                f"round {self.number}: {survivors} of {len(outgoing)} devices sent a usable update, "
                f"{self.min_clients} are needed{why}"
            )
        of_parameters, of_buffers = split_replies(usable, model)
        with self._aggregating():
            arrays, metrics = self.strategy.aggregate_train(self.number, of_parameters)
            buffers = average(of_buffers)
        if arrays is None:
            raise PropolisError(f"round {self.number}: {type(self.strategy).__name__} returned no model")
        new_model = model.updated(arrays, buffers)
        if not new_model.is_finite:
            raise PropolisError(f"round {self.number}: the new model is not finite; lower the server's learning rate")
        return Trained(new_model, _scalars(metrics), survivors, len(outgoing) - survivors, failures)

    def evaluate(self, model: GlobalModel) -> dict[str, float]:
        """Weighted means of the metrics of `model` on a sample of the devices; empty when none answered."""
        with self._seeded_sampling("evaluate"):
            messages = self.strategy.configure_evaluate(
                self.number, model.record(model.trainable), ConfigRecord(), Snapshot(self.grid, self.node_ids)
            )
        try:
            usable, _ = sift(self._exchange(_with_whole_model(messages, model)), metrics_fault)
        except TooFewPeersError:
            return {}
        if not usable:
            return {}
        with self._aggregating():
            return _scalars(self.strategy.aggregate_evaluate(self.number, usable))

    def _exchange(self, messages: list[Message]) -> list[Message]:
        """Replies in order of node id, so that sums do not depend on who was first."""
        if not messages:
            return []
        replies = self.grid.send_and_receive(messages=messages, timeout=self.deadline)
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    @contextmanager
    def _aggregating(self) -> Iterator[None]:
        """Whatever a strategy raises, which is anybody's code, is one error of ours."""
        try:
            yield
        except Exception as error:
            (why,) = lines_of([f"{type(error).__name__}: {error}"])
            raise PropolisError(
                f"round {self.number}: {type(self.strategy).__name__} cannot aggregate the replies: {why}"
            ) from error

    @contextmanager
    def _seeded_sampling(self, exchange: str) -> Iterator[None]:
        """Flower's strategies sample with the global generator: seed it for them, and put it back."""
        state = random.getstate()
        random.seed(f"{exchange}/{self.seed}/{self.number}/{self.attempt}")
        try:
            yield
        finally:
            random.setstate(state)


def _with_whole_model(messages: Iterable[Message], model: GlobalModel) -> list[Message]:
    """The strategy's messages, with buffers and frozen parameters beside what the strategy knows of."""
    outgoing = list(messages)
    whole = model.record()
    for message in outgoing:
        message.content[ARRAYS_KEY] = whole
    return outgoing


def _tally(usable: list[Message], failures: list[str]) -> tuple[int, list[str]]:
    """How many devices the replies of a secure grid are of, and what the others said."""
    outcomes = [Outcome.of(reply.content) for reply in usable]
    said = [failure for outcome in outcomes for failure in outcome.failures]
    return sum(outcome.survivors for outcome in outcomes), [*failures, *said]


def _scalars(metrics: MetricRecord | None) -> dict[str, float]:
    return {key: float(value) for key, value in (metrics or {}).items() if isinstance(value, (int, float))}
