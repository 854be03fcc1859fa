"""The ready Flower ClientApp over a `Task`: train on the device's own examples, evaluate on those it held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from torch import Tensor

from propolis.client.arrays import record_of, tensors_of
from propolis.client.train import LocalTrainer, TrainConfig, derive_seed
from propolis.secure.errors import UsageError
from propolis.task import Examples


@dataclass(frozen=True, slots=True)
class Participant:
    """One device: its trainer, its examples, and the name that tells its randomness from the others'."""

    trainer: LocalTrainer
    train: Examples
    held_out: Examples
    name: str


def make_client_app(participant_of: Callable[[Context], Participant], mods: Sequence[Mod] = ()) -> ClientApp:
    """A ClientApp whose devices are what `participant_of` finds for a Flower context.

    It answers Flower's ``train`` with the updated arrays, the number of examples and the mean training loss, and
    ``evaluate`` with the task's metrics. What goes wrong raises; Flower turns it into an error reply.
    """
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        participant = participant_of(context)
        config = TrainConfig.from_record(_config(message))
        trainer = participant.trainer
        trainer.load(_arrays(message))
        seed = derive_seed("train", config.seed, config.server_round, participant.name)
        loss = trainer.train(participant.train, config, seed)
        updated = trainer.updated()
        _require_finite(updated, participant.name)
        metrics = MetricRecord({"num-examples": len(participant.train), "train-loss": loss})
        return Message(RecordDict({"arrays": record_of(updated), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        participant = participant_of(context)
        participant.trainer.load(_arrays(message))
        metrics = participant.trainer.evaluate(participant.held_out)
        record = MetricRecord({"num-examples": len(participant.held_out), **metrics})
        return Message(RecordDict({"metrics": record}), reply_to=message)

    return app


def hold_out(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Split a device's examples into those it trains on and those it evaluates on.

    Args:
        examples: n examples.
        share: part held out, in [0, 1); floor(share * n) examples, so that something is left to train on.
        seed: decides which.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    count = int(share * len(examples))
    return examples.subset(np.sort(order[count:])), examples.subset(np.sort(order[:count]))


def _arrays(message: Message) -> Mapping[str, Tensor]:
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise UsageError(f"expected one ArrayRecord with the global model, got {len(records)}")
    return tensors_of(records[0])


def _config(message: Message) -> dict[str, object]:
    merged: dict[str, object] = {}
    for record in message.content.config_records.values():
        merged.update(record)
    return merged


def _require_finite(state: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"device {name}: training made {key} infinite or NaN; lower the learning rate")
