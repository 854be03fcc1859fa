"""Rounds over a local grid: aggregation, buffers, retries, deadlines, faulty devices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from harness import Blobs
from propolis.client.app import Participant, hold_out, make_client_app
from propolis.client.train import LocalTrainer
from propolis.secure.errors import PropolisError, TooFewPeersError
from propolis.server.app import FederatedRun
from propolis.server.checkpoint import RunState
from propolis.server.replies import LONGEST_FAILURE, MOST_FAILURES
from propolis.settings import Settings
from propolis.simulations.dropout import DropoutGrid
from propolis.simulations.local import LocalGrid
from propolis.simulations.partition import Partition

CPU = torch.device("cpu")
Reply = Callable[[Message, int], tuple[ArrayRecord, MetricRecord]]


def federated_run(settings: Settings, start: RunState | None = None) -> FederatedRun:
    task = Blobs()
    return FederatedRun(settings, task, task.data().test, device=CPU, start=start)


def real_devices(clients: int, holdout: float = 0.0) -> Callable[[], ClientApp]:
    def load() -> ClientApp:
        trainer, data = LocalTrainer(Blobs(), CPU), Blobs().data().train
        parts = Partition("iid").split(data, clients, seed=0)

        def participant(context: Context) -> Participant:
            index = int(context.node_config["partition-id"])
            train, held_out = hold_out(data.subset(parts[index]), holdout, seed=index)
            return Participant(trainer, train, held_out, str(index))

        return make_client_app(participant)

    return load


def scripted_devices(reply: Reply) -> Callable[[], ClientApp]:
    """Devices that answer what `reply` says, and whose update adds their node id to every entry they got."""

    def load() -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            arrays, metrics = reply(message, context.node_id)
            return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

        return app

    return load


def shifted(message: Message, node_id: int) -> ArrayRecord:
    received = message.content.array_records["arrays"]
    return ArrayRecord(
        {name: Array(np.asarray(array.numpy() + node_id)) for name, array in received.items() if name != "0.bias"}
    )


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox"])
def test_every_strategy_learns_and_leaves_buffers_whole(strategy: str) -> None:
    settings = Settings(clients=4, rounds=6, strategy=strategy, epochs=1, lr=0.1)
    run = federated_run(settings)
    start = run.state.model
    state = run.run(LocalGrid(real_devices(4), 4))
    assert state.history[-1].accuracy is not None
    assert state.history[-1].accuracy > 0.75
    arrays = state.model.arrays
    assert arrays["1.num_batches_tracked"].dtype == np.int64
    # Two batches an epoch on 60 examples, six rounds, every device the same: a counter counts.
    assert arrays["1.num_batches_tracked"] == 12
    assert (arrays["1.running_var"] > 0).all()
    np.testing.assert_array_equal(arrays["0.bias"], start.arrays["0.bias"])
    assert {name: a.dtype for name, a in arrays.items()} == {name: a.dtype for name, a in start.arrays.items()}


def test_the_aggregate_is_the_weighted_mean() -> None:
    run = federated_run(Settings(clients=3, rounds=1))
    start = run.state.model
    grid = LocalGrid(scripted_devices(lambda m, n: (shifted(m, n), MetricRecord({"num-examples": n}))), 3)
    state = run.run(grid)
    mean = (1 * 1 + 2 * 2 + 3 * 3) / 6
    np.testing.assert_allclose(state.model.arrays["0.weight"], start.arrays["0.weight"] + mean, rtol=1e-6)
    np.testing.assert_allclose(state.model.arrays["1.running_mean"], start.arrays["1.running_mean"] + mean, rtol=1e-6)
    assert state.model.arrays["1.num_batches_tracked"] == round(mean)


def bad(kind: str) -> Reply:
    def reply(message: Message, node_id: int) -> tuple[ArrayRecord, MetricRecord]:
        arrays, metrics = shifted(message, node_id), MetricRecord({"num-examples": 1, "train-loss": 0.5})
        if node_id == 1:
            spoil(kind, arrays, metrics)
        return arrays, metrics

    return reply


BAD_METRICS: dict[str, dict[str, float | list[float]]] = {
    "extra metric": {"mood": 0.5},
    "list": {"train-loss": [0.5, 0.5]},
    "negative examples": {"num-examples": -5.0},
    "zero examples": {"num-examples": 0.0},
    "nan examples": {"num-examples": float("nan")},
}


def spoil(kind: str, arrays: ArrayRecord, metrics: MetricRecord) -> None:
    if kind == "raises":
        raise ValueError("the device is ill")
    if kind == "names":
        del arrays["0.weight"]
    if kind == "shape":
        arrays["0.weight"] = Array(np.zeros((1, 1), np.float32))
    if kind == "bytes":
        arrays["0.weight"].data = b"garbage"
    if kind == "nan":
        arrays["0.weight"] = Array(np.full_like(arrays["0.weight"].numpy(), np.nan))
    if kind == "no weight":
        del metrics["num-examples"]
    metrics.update(BAD_METRICS.get(kind, {}))


@pytest.mark.parametrize(
    "kind",
    [
        *("names", "shape", "bytes", "nan", "list", "extra metric", "raises"),
        *("no weight", "negative examples", "zero examples", "nan examples"),
    ],
)
def test_a_faulty_device_is_a_dropped_one(kind: str) -> None:
    run = federated_run(Settings(clients=3, rounds=1))
    start = run.state.model
    state = run.run(LocalGrid(scripted_devices(bad(kind)), 3))
    assert (state.history[0].survivors, state.history[0].dropped) == (2, 1)
    assert len(state.history[0].failures) == 1
    np.testing.assert_allclose(state.model.arrays["0.weight"], start.arrays["0.weight"] + 2.5, rtol=1e-6)


def test_a_device_does_not_pass_for_many() -> None:
    def reply(message: Message, node_id: int) -> tuple[ArrayRecord, MetricRecord]:
        return shifted(message, node_id), MetricRecord({"num-examples": 1})

    def load() -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            arrays, metrics = reply(message, context.node_id)
            boast = ConfigRecord({"survivors": 1000, "asked": 1000, "failures": 3})
            return Message(RecordDict({"arrays": arrays, "metrics": metrics, "propolis": boast}), reply_to=message)

        return app

    state = federated_run(Settings(clients=3, rounds=1)).run(LocalGrid(load, 3))
    assert (state.history[0].survivors, state.history[0].dropped) == (3, 0)


def ranting(message: Message, node_id: int) -> tuple[ArrayRecord, MetricRecord]:
    if node_id > 2:
        raise ValueError(f"{node_id} \x1b[2J" + "A" * 100_000)
    return shifted(message, node_id), MetricRecord({"num-examples": 1})


def test_what_devices_rant_is_cut_and_not_all_kept() -> None:
    state = federated_run(Settings(clients=30, rounds=1)).run(LocalGrid(scripted_devices(ranting), 30))
    failures = state.history[0].failures
    assert (state.history[0].dropped, len(failures)) == (28, MOST_FAILURES)
    assert all(len(failure) <= LONGEST_FAILURE and failure.isprintable() for failure in failures)


def test_what_devices_rant_is_cut_where_it_ends_a_run() -> None:
    run = federated_run(Settings(clients=4, rounds=1, min_clients=3, attempts=2))
    with pytest.raises(TooFewPeersError, match=r"2 of 4 devices .* \\x1b\[2JA+\.\.\. \(tried 2 times\)") as raised:
        run.run(LocalGrid(scripted_devices(ranting), 4))
    said = [str(raised.value), *run.retries]
    assert all(len(line) < 2 * LONGEST_FAILURE and line.isprintable() for line in said)


def test_too_few_survivors_are_an_error_after_the_attempts_and_the_model_is_kept() -> None:
    run = federated_run(Settings(clients=3, rounds=2, min_clients=3, attempts=2))
    start = run.state
    with pytest.raises(TooFewPeersError, match=r"2 of 3 devices .* the device is ill \(tried 2 times\)"):
        run.run(LocalGrid(scripted_devices(bad("raises")), 3))
    assert run.state is start


def test_a_lost_round_is_tried_again_with_other_losses() -> None:
    settings = Settings(clients=4, rounds=8, min_clients=3, dropout=0.4, attempts=10, epochs=1)
    grid = DropoutGrid(LocalGrid(real_devices(4), 4), settings.dropout, settings.seed)
    state = federated_run(settings).run(grid, grid)
    assert max(record.attempts for record in state.history) > 1
    assert min(record.survivors for record in state.history) >= 3
    assert sum(record.dropped for record in state.history) > 0


def test_waiting_for_devices_ends() -> None:
    run = federated_run(Settings(clients=4, rounds=1, min_clients=4, round_deadline=0.3))
    with pytest.raises(TooFewPeersError, match=r"2 devices connected within 0\.3 s, 4 are needed"):
        run.run(LocalGrid(real_devices(2), 2))


def test_devices_evaluate_on_what_they_hold_out() -> None:
    settings = Settings(clients=4, rounds=2, evaluate_fraction=1.0, epochs=1)
    state = federated_run(settings).run(LocalGrid(real_devices(4, holdout=0.2), 4))
    for record in state.history:
        assert 0 <= record.metrics["device-accuracy"] <= 1
        assert record.metrics["device-loss"] > 0
        assert record.metrics["train-loss"] > 0


def test_holding_out_splits_and_leaves_something_to_train_on() -> None:
    examples = Blobs().data().train
    train, held_out = hold_out(examples, 0.25, seed=3)
    assert (len(train), len(held_out)) == (180, 60)
    rows = torch.cat([train.inputs[:], held_out.inputs[:]])
    assert torch.equal(rows.sort(dim=0).values, examples.inputs[:].sort(dim=0).values)
    one = examples.subset(np.array([0]))
    assert len(hold_out(one, 0.9, seed=0)[0]) == 1


def test_sampling_depends_on_seed_and_round_only() -> None:
    def asked(seed: int) -> list[int]:
        nodes: list[int] = []

        def reply(message: Message, node_id: int) -> tuple[ArrayRecord, MetricRecord]:
            nodes.append(node_id)
            return shifted(message, 0), MetricRecord({"num-examples": 1})

        settings = Settings(clients=20, rounds=3, fraction=0.25, seed=seed)
        federated_run(settings).run(LocalGrid(scripted_devices(reply), 20))
        return nodes

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)


def test_an_aggregate_that_is_not_finite_stops_the_run_and_keeps_the_model() -> None:
    def reply(message: Message, node_id: int) -> tuple[ArrayRecord, MetricRecord]:
        arrays = {name: Array(np.full_like(a.numpy(), 3e38)) for name, a in shifted(message, 0).items()}
        return ArrayRecord(arrays), MetricRecord({"num-examples": 1})

    run = federated_run(Settings(clients=2, rounds=1, strategy="fedavgm", server_lr=10.0))
    start = run.state
    with pytest.raises(PropolisError, match="the new model is not finite"):
        run.run(LocalGrid(scripted_devices(reply), 2))
    assert run.state is start


@pytest.mark.parametrize("method", ["aggregate_train", "aggregate_evaluate"])
def test_whatever_a_strategy_raises_is_one_error_and_keeps_the_model(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("momentum" + "!" * 1_000_000)

    monkeypatch.setattr(FedAvg, method, fail)
    run = federated_run(Settings(clients=2, rounds=1, evaluate_fraction=1.0))
    start = run.state
    with pytest.raises(
        PropolisError, match="round 1: FedAvg cannot aggregate the replies: KeyError: 'momentum!"
    ) as raised:
        run.run(LocalGrid(real_devices(2, holdout=0.2), 2))
    assert run.state is start
    assert len(str(raised.value)) < 2 * LONGEST_FAILURE
