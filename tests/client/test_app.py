"""The ready ClientApp, message in, message out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from harness import Blobs
from propolis.client.app import Participant, make_client_app
from propolis.client.train import LocalTrainer
from propolis.flower import set_identity
from propolis.secure.errors import UsageError
from propolis.server.model import GlobalModel


def client() -> ClientApp:
    trainer, data = LocalTrainer(Blobs(), torch.device("cpu")), Blobs().data()
    return make_client_app(lambda context: Participant(trainer, data.train, data.test, "0"))


def ask(kind: str, content: RecordDict) -> Message:
    set_identity(1)
    context = Context(1, 1, {}, RecordDict(), {})
    return client()(Message(content, dst_node_id=1, message_type=kind), context)


def content(**config: float) -> RecordDict:
    record = ConfigRecord({key.replace("_", "-"): value for key, value in config.items()})
    return RecordDict({"arrays": GlobalModel.of(Blobs().model()).record(), "config": record})


def test_a_train_message_is_answered_with_update_weight_and_loss() -> None:
    reply = ask("train", content(epochs=1, lr=0.1))
    (arrays,) = reply.content.array_records.values()
    (metrics,) = reply.content.metric_records.values()
    assert "0.bias" not in arrays
    assert "1.running_mean" in arrays
    assert metrics["num-examples"] == 240
    assert metrics["train-loss"] > 0


def test_an_evaluate_message_is_answered_with_metrics_and_no_arrays() -> None:
    reply = ask("evaluate", content())
    assert not reply.content.array_records
    (metrics,) = reply.content.metric_records.values()
    assert metrics.keys() == {"num-examples", "loss", "accuracy"}


def test_the_servers_proximal_weight_reaches_the_training() -> None:
    def moved(mu: float) -> float:
        torch.manual_seed(0)
        request = content(epochs=5, lr=0.05, proximal_mu=mu)
        reply = ask("train", request)
        new, old = (c.array_records["arrays"]["0.weight"].numpy() for c in (reply.content, request))
        return float(np.linalg.norm(new - old))

    assert moved(10.0) < moved(0.0)


def test_an_update_that_is_not_finite_stays_on_the_device() -> None:
    with pytest.raises(UsageError, match="infinite or NaN; lower the learning rate"):
        ask("train", content(epochs=3, lr=1e30))


def test_a_message_without_one_model_is_refused() -> None:
    with pytest.raises(UsageError, match="expected one ArrayRecord with the global model, got 0"):
        ask("train", RecordDict())
    wrong = content()
    wrong["arrays"]["0.weight"] = Array(np.zeros((1, 1), np.float32))
    with pytest.raises(UsageError, match="does not fit the task's model"):
        ask("train", wrong)
